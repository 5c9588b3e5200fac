"""couple-kv: the cache holds a byte for several channels together, the place of the nearest vector of a codebook."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analysis.shapes import ShapeFacts
from graphopt.passes.kv.cache_codes import Codebook, Rows
from graphopt.passes.kv.cache_rows import Samples
from graphopt.passes.kv.codebook_fit import fitted_codebook
from graphopt.passes.kv.coded_kv import CodedKV, read_by, undivided
from graphopt.passes.kv.coded_writer import Coding, Member
from graphopt.passes.kv.feature_bases import RIDGE, Floats


class CoupleKV(CodedKV):
    """Cache a byte for several channels of keys or values together, the place of a vector in a codebook.

        k̂[g] = t_g[u],   u = argmin (k[g] − t_g[u]) M_g (k[g] − t_g[u])ᵀ,   t_g [256, c]

    for each group g of c neighbouring channels of a head, of keys before their rotation and of values. The cache of
    each is [batch, 1, tokens, channels / c] of uint8: 8 / c bits a number, with nothing beside.

    Paper: KV Cache is 1 Bit Per Channel: Efficient Large Language Model Inference with Coupled Quantization (Zhang et
    al., 2024).

    1. Each group of each layer has a codebook of its own, by k-means on the data: several channels together have fewer
       states than each by itself, since they depend on each other.
    2. With `weighted` errors count by what they do. Keys: M is the second moment of the queries that ask the head,
       turned by the distances of a sample. Values: M is what the output projection makes of them. Both are taken within
       a group. Half of what a token counts is the attention that it receives. Without it M is the identity, and tokens
       count alike.
    3. Keys and values of all tokens are rebuilt at each step, those of the run itself too: what one long prompt says
       about quality holds for generation.

    **Options:** `keys` (default 4): channels of keys for a byte, which is 2 bits a number; 8 are 1 bit, 2 are 4 bits;
    `values` (default 4): the same of values; `weighted` (default true): rule 2; `samples` (default 8): of the data;
    `keep` (default none): layers that stay as they are, counted from 0 among those with a cache.

    **Needs:** `Attention` with a cache, as `raise-attention` makes it; data; heads whose size is a multiple of the
    channels; for keys that are rotated the assumption counted-positions, and max-length where the table of rotations is
    to be a constant.
    **Guarantees:** LOSSY; exact for vectors that are in the codebooks.

    **Left alone, with the reason:** a cache that isn't joined by `Attention`, or that isn't an input and an output of
    the model as it is; rotations of positions that aren't known; a cache of which the sizes are read; float64.

    `group-query-attention` and `quantize-kv` leave such a layer alone; `Attention` runs it.

    **When not to use it:** for batches of prompts of different lengths, where keys are rotated: a row's positions have
    to be its places in the cache. For 4 bits, where quantize-kv needs no data and no codebooks: these take 1 KB a
    channel in each layer, and twice as much in memory.
    """

    name: ClassVar[str] = "couple-kv"
    paper: ClassVar[str] = (
        "KV Cache is 1 Bit Per Channel: Efficient Large Language Model Inference with Coupled Quantization"
    )

    def __init__(
        self,
        keys: int = 4,
        values: int = 4,
        weighted: bool = True,
        samples: int = 8,
        keep: list[int] | None = None,
    ) -> None:
        super().__init__(samples, keep)
        for name, channels in (("keys", keys), ("values", values)):
            if channels < 1:
                raise ValueError(f"{name} is the channels of a byte, at least 1, not {channels}")
        self.keys, self.values, self.weighted = keys, values, weighted

    def problem(self, member: Member) -> str:
        """See the base."""
        return undivided(self.keys, member) or undivided(self.values, member)

    def codings(
        self, model: ir.Model, groups: Sequence[Sequence[Member]], samples: Samples, facts: ShapeFacts
    ) -> list[tuple[Coding, Coding]]:
        """See the base."""
        found = []
        members = [group[0] for group in groups]
        every = self.rows(model, members, samples, attended=self.weighted)
        for member, rows in zip(members, every, strict=True):
            read = read_by([member], facts) if self.weighted else None
            codings, told = [], []
            for name, numbers, asked, channels in (
                ("keys", rows.keys, rows.asked, self.keys), ("values", rows.values, read, self.values)
            ):  # fmt: skip
                codebook = _fitted(numbers, channels, rows.counts, asked)
                lost = np.square(numbers - codebook.stored(numbers)).sum()
                energy = np.square(numbers - numbers.mean(axis=0)).sum() + np.finfo(np.float32).tiny
                told.append(f"{name} {codebook.width} bytes a token, {lost / energy:.2%} lost")
                codings.append(Coding(None, codebook))
            self.applied(member.layer.node, f"cached by codebooks: {', '.join(told)}")
            found.append((codings[0], codings[1]))
        return found


def _fitted(rows: Rows, channels: int, counts: Rows | None, asked: Floats | None) -> Codebook:
    """A codebook for each group of channels of rows [N, d]; `asked` is M of each head [heads, D, D]."""
    groups = rows.reshape(len(rows), -1, channels)
    metrics = None if asked is None else _within(asked, channels)
    tables = [
        fitted_codebook(groups[:, index], counts, None if metrics is None else metrics[index], index)
        for index in range(groups.shape[1])
    ]
    return Codebook(rows.shape[1], np.stack(tables), metrics)


def _within(asked: Floats, channels: int) -> Floats:
    """The blocks of M that lie within groups, [groups, c, c], damped."""
    heads, depth, _ = asked.shape
    split = asked.reshape(heads, depth // channels, channels, depth // channels, channels)
    blocks = np.concatenate([split[:, index, :, index] for index in range(depth // channels)], axis=1)
    blocks = blocks.reshape(heads * (depth // channels), channels, channels)
    level = np.trace(blocks, axis1=1, axis2=2)[:, None, None] / channels
    eye = np.eye(channels)
    return np.asarray(np.where(level > 0, blocks / np.where(level > 0, level, 1), eye) + RIDGE * eye)
