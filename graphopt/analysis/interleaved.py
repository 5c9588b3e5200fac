"""Timing things in turn, so that the noise of a busy machine meets all of them alike."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

NO_SPINNING = {"session.intra_op.allow_spinning": "0", "session.inter_op.allow_spinning": "0"}
"""Session config entries with which waiting threads sleep: spinning ones would count as CPU time and would slow down
the other models' runs."""


@dataclasses.dataclass(frozen=True)
class Ratio:
    """Time over the time of the first model, round by round.

    Attributes:
        median: Below 1 is faster.
        low: The smallest of all rounds.
        high: The largest of all rounds.
        uncertainty: Half the width of the median's confidence interval of about 95 %, 1.57 · (interquartile range) / √n
            ("Variations of Box Plots").
    """

    median: float
    low: float
    high: float
    uncertainty: float = 0.0

    @classmethod
    def of(cls, times: Sequence[float], first: Sequence[float]) -> Ratio:
        """The ratios of two series of rounds."""
        # The clock of CPU time may tick too coarsely for a tiny model.
        ratios = [t / f if f > 0 else 1.0 for t, f in zip(times, first, strict=True)]
        lower, median, upper = np.quantile(ratios, (0.25, 0.5, 0.75))
        uncertainty = 1.57 * (upper - lower) / np.sqrt(len(ratios))
        return cls(float(median), min(ratios), max(ratios), float(uncertainty))


class Interleaved:
    """Seconds of wall-clock and of CPU time of every candidate in every round.

    Args:
        candidates: What is timed; each is called once for one run.
        calls: How often a candidate runs within one round.
    """

    def __init__(self, candidates: Sequence[Callable[[], Any]], calls: int = 1) -> None:
        self.candidates = candidates
        self.calls = calls
        self.wall: list[list[float]] = [[] for _ in candidates]
        self.cpu: list[list[float]] = [[] for _ in candidates]
        self._rounds = 0

    def round(self, *, keep: bool = True) -> None:
        """Run every candidate in turn; without `keep` it is a warmup."""
        # In another order every time, so that no candidate always follows the same neighbour.
        order = np.random.default_rng(self._rounds).permutation(len(self.candidates))
        self._rounds += 1
        for index in order.tolist():
            wall, cpu = seconds(self.candidates[index], self.calls)
            if keep:
                self.wall[index].append(wall)
                self.cpu[index].append(cpu)


def seconds(run: Callable[[], Any], calls: int = 1) -> tuple[float, float]:
    """Seconds of wall-clock and of CPU time for one run, averaged over `calls`."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
        run()
    return (time.perf_counter() - wall) / calls, (time.process_time() - cpu) / calls
