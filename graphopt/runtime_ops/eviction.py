"""Dropping tokens from the key/value cache while a decoder runs: each layer keeps those that get most attention.

    generator = graphopt.Generator("folder")
    generator.generate([prompt_ids], eviction=graphopt.Eviction(budget=0.25, allocation="prefix"))

The model must be one that the pass evictable-kv has prepared.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from graphopt.errors import InputDataError, UsageError
from graphopt.runtime_ops.decoding import Decoding
from graphopt.runtime_ops.token_budgets import Allocation, budgets, by_chunks, places

Array: TypeAlias = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Eviction:
    """What a cache keeps.

    Attributes:
        budget: Tokens that a layer keeps, in the mean over the layers: a number, or a part (a float up to 1) of all
            tokens so far. What always stays, `recent` and `sinks`, is among them, and stays where it is more.
        allocation: How the layers divide the budget. "uniform": evenly. "prefix": each keeps the same share of its
            attention, as large as the budget allows (PrefixKV: Adaptive Prefix KV Cache is What Vision
            Instruction-Following Models Need for Efficient Generation). "uncertainty": `minimum`, and beyond it in
            proportion to the tokens that hold `share` of the layer's attention (ZigZagkv: Dynamic KV Cache Compression
            for Long-context Modeling based on Layer Uncertainty). "dynamic": the tokens of most attention in all layers
            together, with `most` times the budget in one layer (DynamicKV: Task-Aware Adaptive KV Cache Compression for
            Long Context LLMs; divided anew at each eviction).
        chunk: Tokens in a row that go or stay together, by their attention in sum (ChunkKV: Semantic-Preserving KV
            Cache Compression for Efficient Long-Context LLM Inference). 1: each by itself.
        reuse: Neighbouring layers that keep the same places, those of the first of them (ChunkKV).
        recent: The last tokens, which stay.
        sinks: The first tokens, which stay.
        every: Tokens after which the cache is cut to its budget again, by the attention of the tokens just before;
            None: it is cut after the prompt alone, and grows from there.
        share: "uncertainty": part of the attention.
        minimum: "uncertainty": tokens of a layer; None: half of the budget.
        most: "dynamic": what one layer may keep, in budgets.

    Raises:
        UsageError: A number is out of its range.
    """

    budget: int | float
    allocation: Allocation = "uniform"
    chunk: int = 1
    reuse: int = 1
    recent: int = 32
    sinks: int = 4
    every: int | None = None
    share: float = 0.9
    minimum: int | None = None
    most: float = 2.0

    def __post_init__(self) -> None:
        if self.allocation not in get_args(Allocation):
            raise UsageError(f"allocation is one of {', '.join(get_args(Allocation))}, not {self.allocation!r}.")
        whole = isinstance(self.budget, int) and not isinstance(self.budget, bool)
        if not (whole and self.budget > 0) and not (isinstance(self.budget, float) and 0 < self.budget <= 1):
            raise UsageError(f"budget is a number of tokens, or a part of them up to 1.0, not {self.budget!r}.")
        if self.recent < 1 or self.sinks < 0:
            raise UsageError("At least one recent token must stay, and sinks can't be negative.")
        if whole and self.budget < self.recent + self.sinks:
            raise UsageError(
                f"A budget of {self.budget} tokens has no room for the {self.recent} recent and {self.sinks} first "
                "ones that always stay."
            )
        if self.chunk < 1 or self.reuse < 1 or (self.every is not None and self.every < 1):
            raise UsageError("chunk, reuse and every must be at least 1.")
        if not 0 < self.share <= 1 or self.most < 1 or (self.minimum is not None and self.minimum < 0):
            raise UsageError("share is a part up to 1, most at least 1, and minimum can't be negative.")

    def tokens(self, seen: int) -> int:
        """The budget of a layer after so many tokens."""
        return int(self.budget) if isinstance(self.budget, int) else max(1, round(self.budget * seen))

    def chosen(self, scores: list[Array], seen: int) -> list[npt.NDArray[np.int64]]:
        """The places that each layer keeps, [batch, heads, kept].

        Args:
            scores: The attention that tokens got, of each layer [batch, heads, tokens].
            seen: Tokens that there have been.
        """
        ends = {"sinks": self.sinks, "recent": self.recent}
        # Layers keep the same places only where they have as many tokens: always, unless others dropped some of them.
        groups = _groups(scores, self.reuse)
        leaders = [by_chunks(scores[group[0]], self.chunk, **ends) for group in groups]
        tokens = self.tokens(seen)
        minimum = tokens // 2 if self.minimum is None else min(self.minimum, tokens)
        counts = budgets(
            leaders, tokens * len(groups), self.allocation, **ends, minimum=minimum, share=self.share, most=self.most
        )
        kept = [places(leader, count, **ends) for leader, count in zip(leaders, counts, strict=True)]
        return [found for found, group in zip(kept, groups, strict=True) for _ in group]


class Evictor:
    """Feeds a batch, and drops tokens from its cache when it is time.

    Args:
        decoding: The batch.
        eviction: What is kept.
        name: What the model is called.

    Raises:
        UsageError: The model's caches can't lose tokens.
    """

    def __init__(self, decoding: Decoding, eviction: Eviction, name: str = "the model") -> None:
        if decoding.importance is None:
            raise UsageError(
                f"{name} can't drop tokens from its cache; prepare it with the pass evictable-kv: graphopt optimize "
                "decoder.onnx --recipe evictable-kv"
            )
        self._decoding, self._eviction = decoding, eviction
        self.window = decoding.importance.window
        """Queries whose attention says what matters."""
        self._seen: list[dict[int, Array]] = []
        self._since = 0

    def feed(self, ids: npt.NDArray[np.int64], valid: npt.NDArray[np.bool_] | None = None) -> Array:
        """As `Decoding.feed`, of a part of the prompt that isn't its end."""
        self._check(valid)
        return self._decoding.feed(ids, valid)

    def end_prompt(self, ids: npt.NDArray[np.int64], valid: npt.NDArray[np.bool_] | None = None) -> Array:
        """The same of the end of the prompt, after which tokens are dropped."""
        self._check(valid)
        logits = self._decoding.feed(ids, valid, ask=True)
        self._seen = [self._decoding.told]
        self._drop()
        return logits

    def step(self, ids: npt.NDArray[np.int64]) -> Array:
        """The same of a token [batch, 1] that was made."""
        every = self._eviction.every
        self._since += ids.shape[1]
        if every is None or self._since <= every - self.window:
            return self._decoding.feed(ids)
        logits = self._decoding.feed(ids, ask=True)
        self._seen.append(self._decoding.told)
        if self._since >= every:
            self._drop()
        return logits

    def _check(self, valid: npt.NDArray[np.bool_] | None) -> None:
        if valid is not None and not valid.all():
            raise InputDataError("Tokens can be dropped where all prompts have one length: padding would be kept too.")

    def _drop(self) -> None:
        told = {layer: _sum([told[layer] for told in self._seen]) for layer in self._seen[-1]}
        drop(self._decoding, self._eviction, told)
        self._seen, self._since = [], 0


def drop(decoding: Decoding, eviction: Eviction, told: Mapping[int, Array]) -> None:
    """Cut a cache to its budget.

    Args:
        decoding: The batch whose cache it is.
        eviction: What is kept.
        told: The attention that its tokens got, as `Decoding.told`.
    """
    layers = sorted(told)
    chosen = eviction.chosen([told[layer] for layer in layers], int(decoding.lengths.max()))
    decoding.keep(dict(zip(layers, chosen, strict=True)))


def _sum(parts: list[Array]) -> Array:
    """The sum of arrays [batch, heads, tokens], of which later ones have more tokens."""
    total = np.array(parts[-1])
    for part in parts[:-1]:
        total[..., : part.shape[-1]] += part
    return total


def _groups(scores: list[Array], size: int) -> list[list[int]]:
    """Numbers of layers in a row, `size` at most together, and only such as have scores of one shape."""
    groups: list[list[int]] = []
    for _, alike in itertools.groupby(range(len(scores)), lambda layer: scores[layer].shape):
        row = list(alike)
        groups += [row[first : first + size] for first in range(0, len(row), size)]
    return groups
