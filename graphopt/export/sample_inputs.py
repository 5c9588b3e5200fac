"""Numbers to trace and to verify a module with: functions that fill a torch tensor of a given shape, one a kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from graphopt.export.dependencies import require

Maker = Callable[[tuple[int, ...], np.random.Generator], Any]
"""Gives a tensor of the shape asked for, made with the generator given."""


def integers(below: int) -> Maker:
    """int64 from 0 to `below` - 1: ids of tokens."""

    def make(shape: tuple[int, ...], generator: np.random.Generator) -> Any:
        return require("torch").from_numpy(generator.integers(0, below, size=shape))

    return make


def padded_tokens(below: int, padding: int) -> Maker:
    """int64 [batch, places]: ids of tokens, and that of padding where `padding_mask` has it, as tokenizers write it.

    Models look at it: they count positions from it, or pool at the largest id.
    """

    def make(shape: tuple[int, ...], generator: np.random.Generator) -> Any:
        ids = integers(below)(shape, generator)
        return ids.masked_fill(padding_mask(shape, generator) == 0, padding)

    return make


def floats(dtype: Any) -> Maker:
    """Normally distributed numbers of this torch dtype: features, pixels, a cache."""

    def make(shape: tuple[int, ...], generator: np.random.Generator) -> Any:
        return require("torch").from_numpy(generator.normal(size=shape).astype(np.float32)).to(dtype)

    return make


def padding_mask(shape: tuple[int, ...], generator: np.random.Generator) -> Any:
    """int64 [batch, places]: ones; a third is 0 at the right end of row 0, 3, ..., at the left end of row 2, 5, ..."""
    mask = np.ones(shape, dtype=np.int64)
    padded = shape[1] // 3
    mask[0::3, shape[1] - padded :] = 0
    mask[2::3, :padded] = 0
    return require("torch").from_numpy(mask)
