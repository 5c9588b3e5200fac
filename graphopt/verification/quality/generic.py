"""Any model: how near each output stays to the original's."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from graphopt.verification.quality.metrics import Metric, Quality, counted
from graphopt.verification.quality.runs import Array, Batch, same_shape


class GenericMeasure:
    """The cosine between all numbers of an output in one batch, and its largest error over its largest magnitude.

    A cosine hides what happens to few of many numbers, so look at the error as well, and name the task where there is
    a measure for it.
    """

    def __init__(self) -> None:
        self._worst: dict[str, tuple[float, float]] = {}
        self._batches = 0

    def add(self, feeds: Batch, expected: Mapping[str, Array], found: Mapping[str, Array]) -> None:
        """See `Measure`."""
        self._batches += 1
        for name, array in expected.items():
            if array.dtype.kind not in "fiub" or not array.size:
                continue
            same_shape(name, array, found[name])
            a, b = (x.astype(np.float64).reshape(-1) for x in (array, found[name]))
            cosine, error = self._worst.get(name, (1.0, 0.0))
            self._worst[name] = (_least(cosine, cosine_of(a, b)), _most(error, relative_error(a, b)))

    def quality(self) -> Quality:
        """See `Measure`."""
        outputs = tuple((name, _metrics(cosine, error)) for name, (cosine, error) in self._worst.items())
        worst = [math.nan, math.nan]
        if self._worst:
            cosines, errors = zip(*self._worst.values(), strict=True)
            worst = [float(np.min(cosines)), float(np.max(errors))]  # NaN stays
        return Quality("generic", _metrics(*worst), counted(self._batches, "batch", "batches"), outputs=outputs)


def cosine_of(a: Array, b: Array) -> float:
    """The cosine of two vectors; 1 where they are the same, 0 where only one is zero, NaN where one is no number."""
    if np.array_equal(a, b):
        return 1.0
    lengths = float(np.linalg.norm(a)) * float(np.linalg.norm(b))
    return float(np.clip(float(a @ b) / lengths, -1.0, 1.0)) if lengths else 0.0


def relative_error(expected: Array, found: Array) -> float:
    """The largest error over the largest magnitude of what is expected; NaN where one is no number."""
    error, scale = float(np.max(np.abs(expected - found))), float(np.max(np.abs(expected)))
    if error == 0:
        return 0.0
    return error / scale if scale else math.inf


def _least(a: float, b: float) -> float:
    return float(np.minimum(a, b))


def _most(a: float, b: float) -> float:
    return float(np.maximum(a, b))


def _metrics(cosine: float, error: float) -> tuple[Metric, ...]:
    return (
        Metric("cosine", "lowest cosine of an output", "higher", cosine),
        Metric("error", "largest error of an output over its largest magnitude", "lower", error),
    )
