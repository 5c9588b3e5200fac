"""Outliers: single weights that keep their precision, chosen, left out of a rounding and added to it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt.passes.quantize.quantized_weight import Outliers, QuantizedWeight

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]


def largest(weight: Floats, fraction: float) -> Mask:
    """Which weights to keep in full, bool [N, K]: the given fraction of all, those largest in magnitude.

    EasyQuant: An Efficient Data-free Quantization Algorithm for LLMs. The paper keeps less than 1 % of the entries,
    those beyond n standard deviations; one threshold for the whole weight is that rule with n set by the fraction.

    Raises:
        ValueError: The fraction isn't within 0 and 0.5.
    """
    if not 0 <= fraction <= 0.5:
        raise ValueError(f"the share of outliers must lie between 0 and 0.5, not at {fraction}")
    count = round(fraction * weight.size)
    found = np.zeros(weight.size, np.bool_)
    if count:
        found[np.argpartition(np.abs(weight).ravel(), -count)[-count:]] = True
    return found.reshape(weight.shape)


def without(weight: Floats, kept: Mask, group_size: int) -> Floats:
    """The weight with the mean of the rest of its group, in its row, where a number is kept."""
    starts = np.arange(0, weight.shape[1], group_size)
    total = np.add.reduceat(np.where(kept, 0, weight), starts, axis=1)
    count = np.add.reduceat((~kept).astype(np.float32), starts, axis=1)
    mean = total / np.maximum(count, 1)
    return np.where(kept, mean[:, np.arange(weight.shape[1]) // group_size], weight).astype(np.float32)


def with_outliers(quantized: QuantizedWeight, rest: Floats, kept: Mask) -> QuantizedWeight:
    """The numbers of `rest` [N, K] added where they are kept."""
    rows, columns = np.nonzero(kept)
    found = Outliers(rows.astype(np.int32), columns.astype(np.int32), rest[rows, columns].astype(np.float32))
    return dataclasses.replace(quantized, outliers=found)
