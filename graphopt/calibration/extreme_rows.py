"""The rows of an activation whose largest number stands out most: what a scale for many numbers serves worst."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt.calibration.statistics import Accumulator, Statistic

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class ExtremeRows(Statistic):
    """The rows with the largest ratio of absolute maximum to root mean square: "rows" [count or fewer, channels],
    float32, in their order; of equal ratios the first ones. Weights don't matter.

    In a decoder they are those of the first token of a text, which a sample of rows may lack.

    Attributes:
        count: Rows that are kept at most.
    """

    count: int = 16

    def accumulator(self) -> Accumulator:
        """See the base."""
        return _ExtremeRows(self.count)

    def bytes(self, channels: int) -> int:
        """See the base."""
        return 4 * self.count * channels


class _ExtremeRows(Accumulator):
    def __init__(self, count: int) -> None:
        super().__init__()
        self._count = count
        self._kept: Array | None = None
        self._ratios = np.zeros(0)

    def _take(self, block: Array, weights: Array | None) -> None:
        mean_square = np.square(block, dtype=np.float64).mean(axis=1)
        largest = np.abs(block).max(axis=1).astype(np.float64)
        ratios = np.divide(largest, np.sqrt(mean_square), out=np.zeros(len(block)), where=mean_square > 0)
        old = len(self._ratios)
        whole = np.concatenate([self._ratios, ratios])
        kept = np.sort(np.argsort(-whole, kind="stable")[: self._count])
        new = block[kept[kept >= old] - old]
        self._kept = new.copy() if self._kept is None else np.concatenate([self._kept[kept[kept < old]], new])
        self._ratios = whole[kept]

    def _arrays(self) -> dict[str, Array]:
        return {} if self._kept is None else {"rows": self._kept}
