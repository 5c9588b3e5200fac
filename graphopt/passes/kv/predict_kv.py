"""predict-kv: the cache holds what a prediction from the layer before leaves of keys and values, in few bits."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.shapes import ShapeFacts
from graphopt.passes.kv.cache_codes import ENTRIES, Codebook, Residual
from graphopt.passes.kv.cache_rows import CacheRows, Samples
from graphopt.passes.kv.coded_kv import CodedKV, undivided
from graphopt.passes.kv.coded_writer import Coding, Member
from graphopt.passes.kv.feature_bases import Basis, Floats
from graphopt.passes.quantize.gaussian_grids import gaussian_vectors
from graphopt.passes.quantize.rotations import hadamard

CHANNELS = (1, 2, 4)
"""Numbers for which a grid of 256 vectors is there."""


class PredictKV(CodedKV):
    """Predict each layer's keys and values from what is cached before them, and cache the residual in few bits.

        k̂ₗ = k̂ₗ₋₁ Wₖ + wₖ + r̂,   v̂ₗ = [k̂ₗ, v̂ₗ₋₁] Wᵥ + wᵥ + r̂,   r̂ = s · g[u],   u = argmin |r / s − g[u]|²

    with the keys k [d] of one token, all KV heads side by side, before their rotation. k̂ and v̂ are what is rebuilt from
    the cache, so that what is left of one layer's error is seen by the next. A byte u stands for `channels` neighbours
    of the residual r, and another one for the scale s of a token and head: the cache of keys is [batch, 1, tokens,
    d / channels + KV heads] of uint8, that of values likewise.

    Paper: Cache Me If You Must: Adaptive Key-Value Quantization for Large Language Models (AQUA-KV, Shutova et al.,
    2025).

    1. W and w are fitted by ridge regression of the original keys and values on rebuilt ones, one layer after the
       other, in closed form.
    2. Keys and values of each head are turned by a Hadamard matrix, so that residuals are about normal. Then g is the
       best grid for normal vectors, the same for all, as in HIGGS.
    3. The first layer, and one that can't follow the layer before it, has a mean for a prediction, and bytes of its own
       (`first`).
    4. Keys and values of all tokens are rebuilt at each step, those of the run itself too: what one long prompt says
       about quality holds for generation.

    **Options:** `keys` (default 4): channels of the residual of keys for a byte: 4, which is 2 bits a number, 2 (4
    bits) or 1 (8 bits); `values` (default 4): the same of values; `first` (default 2): the same of both in a layer
    without one before; `ridge` (default 0.001): what is added to the diagonal of the covariances, as a part of its
    mean; `samples` (default 8): of the data; `keep` (default none): layers that stay as they are, counted from 0 among
    those with a cache.

    **Needs:** `Attention` with a cache, as `raise-attention` makes it; data; heads whose size is a multiple of the
    channels; for keys that are rotated the assumption counted-positions, and max-length where the table of rotations is
    to be a constant.
    **Guarantees:** LOSSY.

    **Left alone, with the reason:** a cache that isn't joined by `Attention`, or that isn't an input and an output of
    the model as it is; rotations of positions that aren't known; a cache of which the sizes are read; float64. The
    newest tokens and the first ones aren't kept in full precision, which would take a cache of another length.

    `group-query-attention` and `quantize-kv` leave such a layer alone; `Attention` runs it.

    **When not to use it:** for batches of prompts of different lengths, where keys are rotated: a row's positions have
    to be its places in the cache. Where time counts, not memory: rebuilding takes up to 3 d² products for each token of
    the past and layer at each step, and the file holds as many numbers more for each layer, in float32 (d: channels of
    keys, 1024 in a model with 8 heads of 128: 12.6 MB a layer).
    """

    name: ClassVar[str] = "predict-kv"
    paper: ClassVar[str] = "Cache Me If You Must: Adaptive Key-Value Quantization for Large Language Models"

    def __init__(
        self,
        keys: int = 4,
        values: int = 4,
        first: int = 2,
        ridge: float = 1e-3,
        samples: int = 8,
        keep: list[int] | None = None,
    ) -> None:
        super().__init__(samples, keep)
        for name, channels in (("keys", keys), ("values", values), ("first", first)):
            if channels not in CHANNELS:
                raise ValueError(f"{name} is the channels of a byte, 1, 2 or 4, not {channels}")
        if not ridge > 0:
            raise ValueError(f"ridge must be positive, not {ridge}")
        self.keys, self.values, self.first, self.ridge = keys, values, first, ridge

    def problem(self, member: Member) -> str:
        """See the base."""
        return undivided(max(self.keys, self.values, self.first), member)

    def codings(
        self, model: ir.Model, groups: Sequence[Sequence[Member]], samples: Samples, facts: ShapeFacts
    ) -> list[tuple[Coding, Coding]]:
        """See the base."""
        found: list[tuple[Coding, Coding]] = []
        before: _Rebuilt | None = None
        members = [group[0] for group in groups]
        for member, rows in zip(members, self.rows(model, members, samples, attended=False), strict=True):
            if before is not None and not before.leads_to(member):
                before = None
            coding, before = self._fitted(member, rows, before)
            found.append(coding)
        return found

    def _fitted(
        self, member: Member, rows: CacheRows, before: _Rebuilt | None
    ) -> tuple[tuple[Coding, Coding], _Rebuilt]:
        """How keys and values of a layer are cached, and what is rebuilt of them."""
        site, number = member.site, member.layer.number
        heads = site.kv_heads
        basis = _spread(heads, site.depth)
        rebuilt: list[Floats] = []
        codings, told = [], []
        for slot, (name, numbers) in enumerate((("keys", rows.keys), ("values", rows.values))):
            features = numbers.astype(np.float64) @ basis.encoder
            channels = self.first if before is None else (self.keys, self.values)[slot]
            codes = Codebook(heads * site.depth, gaussian_vectors(channels, ENTRIES)[None], None, heads)
            places, given = [], []
            if before is not None:
                places, given = [(before.member.layer.number, slot)], [before.features[slot]]
                if slot:
                    places, given = [(number, 0), *places], [rebuilt[0], *given]
            inputs = np.concatenate(given, axis=1) if given else np.zeros((len(features), 0))
            weight, shift = fitted(inputs, features, self.ridge)
            # As it is written: those of all layers wait until the last one is fitted.
            store = Residual(codes, tuple(places), weight.astype(np.float32), shift)
            base = store.predicted(inputs)
            rebuilt.append(base + codes.stored(features - base))
            energy = np.square(features - features.mean(axis=0)).sum() + np.finfo(np.float64).tiny
            unforeseen, lost = (np.square(features - part).sum() / energy for part in (base, rebuilt[-1]))
            told.append(f"{name} {store.width} bytes a token, {unforeseen:.0%} unforeseen, {lost:.2%} lost")
            codings.append(Coding(basis, store))
        self.applied(member.layer.node, f"cached as residuals: {', '.join(told)}")
        return (codings[0], codings[1]), _Rebuilt(member, (rebuilt[0], rebuilt[1]))


@functools.lru_cache(maxsize=4)
def _spread(heads: int, depth: int) -> Basis:
    """Each head of `depth` channels rotated by itself; one for all layers, since it is as large as a weight."""
    return Basis.of_blocks(np.stack([hadamard(depth).T.astype(np.float64)] * heads))


@dataclasses.dataclass(frozen=True, eq=False)
class _Rebuilt:
    """A layer with the features of its keys and of its values that are rebuilt from the cache, [N, d] each."""

    member: Member
    features: tuple[Floats, Floats]

    def leads_to(self, member: Member) -> bool:
        """Whether another layer has as many tokens in its cache."""
        own, other = self.member.site, member.site
        return (own.batch, own.total) == (other.batch, other.total)


def fitted(inputs: npt.NDArray[Any], targets: npt.NDArray[Any], ridge: float) -> tuple[Floats, Floats]:
    """W and w of the ridge regression y ≈ x W + w, by the normal equations.

    Args:
        inputs: x, [N, p]; p may be 0.
        targets: y, [N, q].
        ridge: What is added to the diagonal of the covariance of x, as a part of its mean.

    Returns:
        W [p, q] and w [q].
    """
    x_mean, y_mean = inputs.mean(axis=0), targets.mean(axis=0)
    x, y = inputs - x_mean, targets - y_mean
    covariance = x.T @ x
    level = np.trace(covariance) / max(len(covariance), 1)
    damped = covariance + max(ridge * level, np.finfo(np.float64).tiny) * np.eye(len(covariance))
    weight = np.asarray(np.linalg.solve(damped, x.T @ y), np.float64)
    return weight, np.asarray(y_mean - x_mean @ weight, np.float64)
