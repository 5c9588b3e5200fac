"""A second moment of all samples and of both halves, for what must be judged by samples that it wasn't fitted on.

Rows of one sample are alike, such as the tokens of a sentence. What other rows of the same samples judge, as in
generalised cross-validation, looks better than it is.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from graphopt.calibration.statistics import Accumulator, Array, SecondMoment, Statistic

HALVES = ("even", "odd")


@dataclasses.dataclass(frozen=True)
class HalvedMoment(Statistic):
    """E[xᵀx] over rows x, "second_moment" [channels, channels], as `SecondMoment`, and of each half of the samples.

    Those are "even" and "odd", and "rows" [2] says how many rows each has; of a single sample there are no halves.
    """

    def accumulator(self) -> Accumulator:
        """See the base."""
        return _Halved()

    def bytes(self, channels: int) -> int:
        """See the base."""
        return 2 * SecondMoment().bytes(channels)


class _Halved(Accumulator):
    """Every block is that of one sample."""

    def __init__(self) -> None:
        super().__init__()
        self._halves = [SecondMoment().accumulator() for _ in HALVES]
        self._turn = 0

    def _take(self, block: Array, weights: Array | None) -> None:
        self._halves[self._turn].add(block, weights)
        self._turn = 1 - self._turn

    def _arrays(self) -> dict[str, Array]:
        found = [half.summary() for half in self._halves if half.rows]
        if not found:
            return {}
        whole = sum(one.array * one.weight for one in found) / sum(one.weight for one in found)
        arrays = {"second_moment": np.asarray(whole, np.float32)}
        if len(found) == len(HALVES):
            arrays |= {name: one.array for name, one in zip(HALVES, found, strict=True)}
            arrays["rows"] = np.array([one.rows for one in found])
        return arrays
