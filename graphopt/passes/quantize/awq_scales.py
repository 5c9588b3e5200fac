"""awq-scales: channels that matter are scaled up before weights are rounded, and some ranges are clipped."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.attention_sites import attention_sites
from graphopt.analysis.shapes import infer
from graphopt.calibration.request import Request
from graphopt.calibration.statistics import MeanAbs, SecondMoment
from graphopt.graph.computed import identity, weight
from graphopt.graph.edits import Editor
from graphopt.passes.fold.centring import set_constant
from graphopt.passes.fold.layers import Layer
from graphopt.passes.quantize.channel_folds import ChannelFold, ReaderGroup, outputs_first
from graphopt.passes.quantize.grid_names import make_grid
from graphopt.passes.quantize.scale_channels import ScaleChannels, ScalePlan, Statistics
from graphopt.passes.quantize.token_weights import TokensOf

Array = npt.NDArray[np.float32]

_SHARES = np.linspace(1, 0.5, 10, endpoint=False, dtype=np.float32)
"""Parts of a group's range that clipping tries."""
TOKENS = ("all", "linear", "received")
TOKEN_ROLES = ("k", "v", "kv", "qkv")
_UNCLIPPED = ("q", "k", "qkv")
"""Roles whose output goes through a product with itself, of which the error of the layer says little."""


class AwqScales(ScaleChannels):
    """Scale up the channels of weights that meet large activations, and divide the activations by the same, exactly.

        x W = (x / s) (s W)        s_j = mean|x_j|^α / sqrt(max s · min s)

    Rounding s W with the same step and dividing by s afterwards makes the error of channel j smaller by s_j, at the
    cost of the others in its group where s_j W sets a larger step. α is searched: 0, 1/20, ..., 19/20.

    Paper: AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration.

    1. A group is all MatMul and Gemm nodes with constant weights that read one value (q, k, v; gate, up), with one s.
       α is what gives the group the least error, Σ tr((Ŵ − W) H (Ŵ − W)ᵀ) with H = E[xᵀx] and Ŵ = Q(s W) / s, which is
       the mean squared error of the outputs; no activations are kept. α = 0 is no scale, so it never gets worse by it.
    2. 1/s goes into what makes x: gain and bias of a normalization; the output channels of V for O, through the
       attention, where query heads share the factors of the head of keys and values that they read; those of up for
       down, through the product with the gate; those of fc1 for fc2 through a ReLU.
    3. `tokens` weighs tokens by the attention that they receive in the H of `token_roles`, as in quantize-weights.
    4. With `clip`, each group of each row of the scaled weights is clipped to the part of its range (1 to 0.5) that
       gives the least error of this group alone; q and k are not, as in the paper's code.

    Differs from the paper's code in that q, k and v are judged by their own outputs, not by that of the attention, and
    in that scales of single groups and errors come from second moments instead of stored activations.

    **Options:** `bits` (default 4): of a number of the grid that weights are rounded to afterwards, as in
    quantize-weights; `group_size` (default 32): inputs that share a scale, 0 for all; `grid` (default "int"): the
    numbers of the grid by name; `symmetric` (default true): the middle of the integers is 0; `floats` (default false):
    s · c + m with a float m; `steps` (default 20): values of α; `rows` (default 512): of how many rows of each weight,
    evenly spread, the search looks at the error, 0 for all; `clip` (default true): rule 4, which changes the function
    by itself; `tokens` (default "all"): "all" alike, "linear" or "received": rule 3; `token_roles` (default none):
    of the weights that rule 3 is for, by default k, v, kv and qkv; `head` (default false): scale the output layer too.

    **Needs:** calibration data (mean magnitude and second moments of what each group reads). **Guarantees:** LOSSY.
    Without `clip` outputs are the same up to the rounding of the new weights, but where V → O is scaled the cache of a
    decoder holds scaled values, so caches of the original can't be continued.

    **Left alone, with the reason:** a value that something else than linear layers reads (post-norm networks, whose
    residual addition reads what the norm gives out); activations that a scale doesn't commute with (GELU before fc2);
    weights that another node reads too, such as an output layer tied to the embedding.

    **When not to use it:** without quantizing the weights afterwards, to the same grid; where ranges were clipped, with
    `search` off.
    """

    name: ClassVar[str] = "awq-scales"
    paper: ClassVar[str] = "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration"
    needs = ("mean-abs", "second-moment")

    def __init__(
        self,
        bits: int = 4,
        group_size: int = 32,
        grid: str = "int",
        symmetric: bool = True,
        floats: bool = False,
        steps: int = 20,
        rows: int = 512,
        clip: bool = True,
        tokens: str = "all",
        token_roles: list[str] | None = None,
        head: bool = False,
    ) -> None:
        super().__init__()
        if group_size < 0 or rows < 0 or steps < 1:
            raise ValueError("group_size and rows can't be negative, and steps must be positive")
        self.bits, self.group_size, self.grid = bits, group_size, grid
        self.symmetric, self.floats = symmetric, floats
        if tokens not in TOKENS:
            raise ValueError(f"tokens is one of {', '.join(TOKENS)}, not {tokens!r}")
        self.tokens, self.token_roles = tokens, list(TOKEN_ROLES if token_roles is None else token_roles)
        self._numbers = make_grid(grid, bits, symmetric, floats, search=False)
        self.steps, self.rows, self.clip, self.head = steps, rows, clip, head

    def apply(self, model: ir.Model) -> bool:
        """See the class."""
        attention = attention_sites(model, infer(model)) if self.tokens != "all" else []
        self._weights = TokensOf(model, attention, self.tokens, self.token_roles)
        try:
            return super().apply(model)
        finally:
            del self._weights

    def requests(self, group: ReaderGroup) -> Sequence[Request]:
        """The mean magnitude, then the second moments for each reader."""
        moments = [Request(group.x, SecondMoment(), self._weights.of(site)) for site in group.sites]
        return [Request(group.x, MeanAbs()), *moments]

    def plan(self, group: ReaderGroup, fold: ChannelFold, statistics: Statistics) -> ScalePlan:
        """See the class."""
        magnitude, *hessians = (statistics[request].astype(np.float32) for request in self.requests(group))
        mean = fold.pooled(magnitude.astype(np.float64))
        mean = np.maximum(mean, mean.max() * 1e-6) if mean.any() else np.ones(fold.count)
        candidates = []
        for step in range(self.steps):
            factors = mean ** (step / self.steps)
            candidates.append(factors / np.sqrt(factors.max() * factors.min()))
        errors = np.zeros(self.steps)
        for whole, hessian in zip(group.weights(), hessians, strict=True):
            rows = whole[:: -(-len(whole) // self.rows)] if self.rows else whole
            for step, factors in enumerate(candidates):
                channels = fold.spread(factors).astype(np.float32)
                errors[step] += output_error(self._rounded(rows * channels) / channels - rows, hessian)
        best = int(errors.argmin())
        share = errors[best] / errors[0] if errors[0] else 1.0
        detail = f"α = {best / self.steps:.2f}, {share:.3g} of the error without"
        if not self.clip:
            return ScalePlan(candidates[best], detail)
        channels = fold.spread(candidates[best]).astype(np.float32)
        shares = [
            None if role in _UNCLIPPED else self._shares(rows * channels, hessian / np.outer(channels, channels))
            for rows, hessian, role in zip(group.weights(), hessians, group.roles, strict=True)
        ]
        known = [part for part in shares if part is not None]
        clipped = sum(int((part < 1).sum()) for part in known) / max(1, sum(part.size for part in known))
        return ScalePlan(candidates[best], f"{detail}, {clipped:.0%} of ranges clipped" if known else detail, shares)

    def finish(self, group: ReaderGroup, plan: ScalePlan, edit: Editor) -> None:
        """Rule 4."""
        for layer, shares in zip(group.layers(), plan.shares, strict=False):
            if shares is not None and (shares < 1).any():
                _clip(layer, shares, self._size(group.channels), edit)

    def _size(self, columns: int) -> int:
        return self.group_size or columns

    def _rounded(self, rows: Array) -> Array:
        """What round-to-nearest makes of rows, without the codes."""
        found = np.empty(rows.shape, np.float32)
        for start in range(0, rows.shape[1], self._size(rows.shape[1])):
            block = rows[:, start : start + self._size(rows.shape[1])]
            fit = self._numbers.fit(block)
            found[:, start : start + block.shape[1]] = self._numbers.values(self._numbers.nearest(block, fit), fit)
        return found

    def _shares(self, rows: Array, hessian: Array) -> Array:
        """The part of its range that each group of each row should keep, [N, G]."""
        size, found = self._size(rows.shape[1]), []
        for start in range(0, rows.shape[1], size):
            block, part = rows[:, start : start + size], hessian[start : start + size, start : start + size]
            largest = np.abs(block).max(axis=1)
            kept, least = np.ones(len(block), np.float32), np.full(len(block), np.inf)
            for share in _SHARES:
                bound = (largest * share)[:, None]
                error = self._rounded(np.clip(block, -bound, bound)) - block
                errors = np.einsum("nk,nk->n", error @ part, error)
                kept, least = np.where(errors < least, share, kept), np.minimum(errors, least)
            found.append(kept)
        return np.stack(found, axis=1)


def output_error(error: Array, hessian: Array) -> float:
    """tr(E H Eᵀ): the expected squared error of a layer's outputs, summed over them.

    Args:
        error: Ŵ − W, [N, K].
        hessian: H = E[xᵀx], [K, K].
    """
    return float(np.einsum("nk,nk->", error @ hessian, error, dtype=np.float64))


def _clip(layer: Layer, shares: Array, size: int, edit: Editor) -> None:
    """Clip each group of `size` columns of each row to a part of its range, [N, G]."""
    tensor, value = layer.weight, layer.node.inputs[1]
    assert value is not None

    def compute() -> ir.TensorProtocol:
        array = tensor.numpy()
        rows = array if outputs_first(layer) else array.T
        clipped = np.empty_like(rows)
        for group, start in enumerate(range(0, rows.shape[1], size)):
            block = rows[:, start : start + size]
            bound = np.abs(block).max(axis=1) * shares[:, group].astype(array.dtype)
            clipped[:, start : start + size] = np.clip(block, -bound[:, None], bound[:, None])
        clipped = clipped if outputs_first(layer) else clipped.T
        return ir.tensor(np.ascontiguousarray(clipped), dtype=tensor.dtype, name=tensor.name)

    origin = ("clipped", identity(tensor), hashlib.blake2b(np.ascontiguousarray(shares).tobytes()).digest(), size)
    clipped = weight(compute, tensor.dtype, tensor.shape.numpy(), tensor.name, origin)
    set_constant(value, [(layer.node, 1)], clipped, edit, "clipped")
