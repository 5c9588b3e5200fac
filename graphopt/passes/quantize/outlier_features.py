"""Features of activations that are much larger than the others, from what a model computes on calibration data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.calibration.request import Request
from graphopt.calibration.statistics import AbsMax
from graphopt.passes.quantize.value_ranges import calibration_of

Features = dict[ir.Value, npt.NDArray[np.int64]]


def outlier_features(
    model: ir.Model, values: Sequence[ir.Value], data: Any, times: float, share: float, limit: int | None = None
) -> Features:
    """The outlier features of each value, ascending.

    Args:
        model: The model, unchanged.
        values: Values [..., K] of the main graph.
        data: The calibration data; what is no number in it, and padding, doesn't count.
        times: A feature is one where its largest magnitude is so many times the median of all features' largest.
        share: At most so large a part of the features, the largest ones.
        limit: Samples that are used at most.

    Raises:
        UsageError: There are no samples.
        InputDataError: The model doesn't run on one.
    """
    requests = {value: Request(value, AbsMax(per_channel=True)) for value in values}
    summaries = calibration_of(data, limit).gather(model, list(requests.values()))
    found: Features = {}
    for value, request in requests.items():
        sizes = summaries[request].arrays.get("absmax")
        if sizes is None:
            found[value] = np.zeros(0, np.int64)
            continue
        most = max(1, int(len(sizes) * share))
        ranked = np.argsort(-sizes, kind="stable")[:most]
        found[value] = np.sort(ranked[sizes[ranked] >= times * np.median(sizes)]).astype(np.int64)
    return found
