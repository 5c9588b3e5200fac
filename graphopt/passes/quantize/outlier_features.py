"""Features of activations that are much larger than the others, from what a model computes on calibration data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.passes.quantize.value_ranges import observed

Features = dict[ir.Value, npt.NDArray[np.int64]]


def outlier_features(
    model: ir.Model, values: Sequence[ir.Value], data: Any, times: float, share: float, limit: int | None = None
) -> Features:
    """The outlier features of each value, ascending.

    Args:
        model: The model, unchanged.
        values: Values [..., K] of the main graph.
        data: The calibration data.
        times: A feature is one where its largest magnitude is so many times the median of all features' largest.
        share: At most so large a part of the features, the largest ones.
        limit: Samples that are used at most.

    Raises:
        UsageError, InputDataError: See `observed`.
    """
    largest: dict[str, npt.NDArray[np.float32]] = {}
    for sample in observed(model, values, data, limit):
        for value in values:
            name = value.name or ""
            array = np.abs(np.asarray(sample[name], np.float32))
            seen = array.reshape(-1, array.shape[-1]).max(axis=0, initial=0)
            largest[name] = np.maximum(largest[name], seen) if name in largest else seen
    found: Features = {}
    for value in values:
        sizes = largest[value.name or ""]
        most = max(1, int(len(sizes) * share))
        ranked = np.argsort(-sizes, kind="stable")[:most]
        found[value] = np.sort(ranked[sizes[ranked] >= times * np.median(sizes)]).astype(np.int64)
    return found
