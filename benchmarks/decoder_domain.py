"""The calls that a decoder with a cache must answer: batch 1, 3 × prompt, step, chunk × padding none, left, right.

One table for everybody: an export is checked against PyTorch with it, and an optimized file against the export. What
lies in the cache comes from the reference's own answer to the tokens before.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

TOLERANCE = 1e-3
"""Largest difference of the logits that counts as equal, relative to the largest logit."""

_SIZES = {"prefill": (7, 0), "decode": (1, 6), "chunk": (3, 5)}
"""Tokens of the call, and tokens in the cache before it."""

Array = np.ndarray[Any, Any]
Call = Callable[[Mapping[str, Array]], Mapping[str, Array]]
"""Inputs by name to outputs by name."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the inputs' shapes depend on.

    Attributes:
        layers: Layers.
        heads: Heads of keys and values.
        head_size: Numbers in one of them.
        vocabulary: Tokens.
    """

    layers: int
    heads: int
    head_size: int
    vocabulary: int


@dataclasses.dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        batch: Rows.
        step: "prefill" (no cache), "decode" (one token after a cache), "chunk" (several tokens after a cache).
        padding: "none"; "left": the first slots are masked; "right": the last ones, or in a step the last ones of the
            cache, as after a prompt that was padded at its right.
    """

    batch: int
    step: str
    padding: str

    @property
    def label(self) -> str:
        """As in tables."""
        return f"batch {self.batch}, {self.step}" + (f", {self.padding} padding" if self.padding != "none" else "")

    def mask(self) -> Array:
        """`attention_mask` [batch, past + sequence]; two slots of the first row are masked, one of the second."""
        sequence, past = _SIZES[self.step]
        mask = np.ones((self.batch, past + sequence), np.int64)
        end = past if self.step == "decode" else past + sequence
        for row in range(self.batch):
            masked = max(2 - row, 0)
            if self.padding == "left":
                mask[row, :masked] = 0
            elif self.padding == "right":
                mask[row, end - masked : end] = 0
        return mask

    @property
    def past(self) -> int:
        """Tokens in the cache before the call."""
        return _SIZES[self.step][1]

    def tokens(self, vocabulary: int) -> dict[str, Array]:
        """`input_ids`, `attention_mask` and `position_ids` [batch, past + sequence] of the cache and of the call."""
        mask = self.mask()
        ids = np.random.default_rng(0).integers(0, vocabulary, mask.shape)
        return {"input_ids": ids, "attention_mask": mask, "position_ids": np.maximum(np.cumsum(mask, 1) - 1, 0)}

    def feeds(self, sizes: Sizes, reference: Call) -> dict[str, Array]:
        """Inputs by name; `reference` fills the cache."""
        tokens = self.tokens(sizes.vocabulary)
        cache = {
            f"{layer}.{part}": np.zeros((self.batch, sizes.heads, 0, sizes.head_size), np.float32)
            for layer, part in itertools.product(range(sizes.layers), ("key", "value"))
        }

        def part(start: int, end: int) -> dict[str, Array]:
            return {**cut(tokens, start, end), **{f"past_key_values.{k}": v for k, v in cache.items()}}

        past = self.past
        if past:
            before = reference(part(0, past))
            cache = {name: before[f"present.{name}"] for name in cache}
        return part(past, tokens["attention_mask"].shape[1])

    def error(self, expected: Array, found: Array) -> float:
        """Largest difference at tokens that aren't padding, relative to the largest logit; NaN counts as infinite."""
        real = self.mask()[:, -expected.shape[1] :] == 1
        if found.shape != expected.shape or not np.isfinite(found[real]).all():
            return float("inf")
        return float(np.max(np.abs(expected - found)[real]) / np.max(np.abs(expected[real])))


def cut(tokens: Mapping[str, Array], start: int, end: int) -> dict[str, Array]:
    """The inputs of the call that reads the tokens from `start` to `end`: the mask reaches over those before too."""
    return {name: array[:, 0 if name == "attention_mask" else start : end] for name, array in tokens.items()}


CASES = [
    Case(batch, step, padding) for batch, step, padding in itertools.product((1, 3), _SIZES, ("none", "left", "right"))
]


def errors(
    reference: Call, candidates: Mapping[str, Call], sizes: Sizes, cases: Sequence[Case] = CASES
) -> dict[str, dict[str, float | str]]:
    """Errors by candidate and by the label of the case; a sentence in place of a number where the call is refused."""
    result: dict[str, dict[str, float | str]] = {name: {} for name in candidates}
    for case in cases:
        feeds = case.feeds(sizes, reference)
        expected = reference(feeds)["logits"]
        for name, candidate in candidates.items():
            try:
                result[name][case.label] = case.error(expected, candidate(feeds)["logits"])
            except Exception as error:
                result[name][case.label] = " ".join(str(error).split())
    return result
