"""Statistics of activations, gathered sample by sample in memory that doesn't grow with the number of samples.

A statistic is a small description (`AbsMax()`, `SecondMoment()`); its accumulator takes blocks [rows, channels] and
gives a `Summary` at the end. Rows are tokens, pixels or samples: every axis of the activation but that of its channels.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

LARGEST = 1e30
"""What is at least as large stands for -inf in a mask, or is an overflow, and is counted as excluded."""
_ROWS = 4096
"""Rows that are multiplied at once."""
_COLUMNS = 512
"""Columns of a second moment that are made at once."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a statistic found.

    Attributes:
        arrays: The arrays of the statistic by name.
        rows: Rows that counted.
        weight: The sum of their weights; `rows` where there were none.
        excluded: Elements left out because they were NaN, infinite or as large as a mask's constant.
    """

    arrays: Mapping[str, Array]
    rows: int
    weight: float
    excluded: int

    def __getitem__(self, name: str) -> Array:
        """One array by its name."""
        return self.arrays[name]

    @property
    def array(self) -> Array:
        """The first array, which of most statistics is the only one."""
        return next(iter(self.arrays.values()))


class Accumulator(abc.ABC):
    """Takes blocks of rows one after the other."""

    def __init__(self) -> None:
        self.rows, self.weight, self.excluded = 0, 0.0, 0

    def add(self, block: Array, weights: Array | None = None) -> None:
        """Take a block.

        Args:
            block: [rows, channels], any type of numbers; NaN, infinities and what is as large as `LARGEST` are left
                out: of the range statistics element by element, of the others with their row.
            weights: [rows], none negative; None: 1 for each.
        """
        block = np.asarray(block, dtype=np.float32)
        weights = None if weights is None else np.asarray(weights, dtype=np.float64)
        usable = np.abs(block) < LARGEST  # False for NaN
        if not usable.all():
            self.excluded += int(usable.size - usable.sum())
            if self.by_element:
                block = np.where(usable, block, np.float32(np.nan))
            else:
                kept = usable.all(axis=1)
                block, weights = block[kept], None if weights is None else weights[kept]
        if block.size == 0:
            return
        self.rows += len(block)
        self.weight += float(len(block) if weights is None else weights.sum())
        self._take(block, weights)

    by_element: ClassVar[bool] = False

    @abc.abstractmethod
    def _take(self, block: Array, weights: Array | None) -> None:
        """Take a block, float32, which is NaN where an element doesn't count (`by_element`)."""

    @abc.abstractmethod
    def _arrays(self) -> dict[str, Array]:
        """The arrays so far; empty where nothing came."""

    def summary(self) -> Summary:
        """What was found so far."""
        return Summary(self._arrays(), self.rows, self.weight, self.excluded)


@dataclasses.dataclass(frozen=True)
class Statistic(abc.ABC):
    """What is to be gathered of an activation; equal descriptions are gathered once."""

    @abc.abstractmethod
    def accumulator(self) -> Accumulator:
        """A new accumulator."""

    def bytes(self, channels: int) -> int:
        """Memory that an accumulator holds for an activation of so many channels."""
        return 8 * channels


@dataclasses.dataclass(frozen=True)
class AbsMax(Statistic):
    """The largest absolute value: "absmax", float32, [] or [channels]. Weights don't matter.

    Attributes:
        per_channel: One for each channel.
    """

    per_channel: bool = False

    def accumulator(self) -> Accumulator:
        """See the base."""
        return _Range(self.per_channel, absolute=True)


@dataclasses.dataclass(frozen=True)
class MinMax(Statistic):
    """The smallest and the largest value: "low" and "high", float32, [] or [channels]. Weights don't matter.

    Attributes:
        per_channel: One pair for each channel.
    """

    per_channel: bool = False

    def accumulator(self) -> Accumulator:
        """See the base."""
        return _Range(self.per_channel, absolute=False)


@dataclasses.dataclass(frozen=True)
class Histogram(Statistic):
    """How often values fall into bins of equal width over [-range, range]: "counts" [bins] float64, "range" [] float64.

    The range is a power of two; where a larger value comes, it doubles and pairs of bins become one.

    Attributes:
        bins: Number of bins, a multiple of 4.
        most: Numbers of a block that are counted at most, evenly spread; None: all. The range is that of all.
    """

    bins: int = 4096
    most: int | None = None

    def accumulator(self) -> Accumulator:
        """See the base."""
        return _Histogram(self.bins, self.most)

    def bytes(self, channels: int) -> int:
        """See the base."""
        return 8 * self.bins


@dataclasses.dataclass(frozen=True)
class MeanAbs(Statistic):
    """The (weighted) mean of the absolute values of each channel: "mean_abs" [channels], float32."""

    def accumulator(self) -> Accumulator:
        """See the base."""
        return _MeanAbs()


@dataclasses.dataclass(frozen=True)
class MeanVariance(Statistic):
    """The (weighted) mean and variance of each channel: "mean" and "variance" [channels], float32.

    Blocks are merged by the formula of Chan, Golub and LeVeque: no digits are lost where the mean is large.
    """

    def accumulator(self) -> Accumulator:
        """See the base."""
        return _MeanVariance()

    def bytes(self, channels: int) -> int:
        """See the base."""
        return 16 * channels


@dataclasses.dataclass(frozen=True)
class SecondMoment(Statistic):
    """H = Σ r xᵀx / Σ r over rows x with weights r: "second_moment" [channels, channels], float32.

    Products are float32 (BLAS), sums float64.
    """

    def accumulator(self) -> Accumulator:
        """See the base."""
        return _SecondMoment()

    def bytes(self, channels: int) -> int:
        """See the base."""
        return 12 * channels * channels


@dataclasses.dataclass(frozen=True)
class Rows(Statistic):
    """Some of the rows, each as probable as any other: "rows" [count or fewer, channels], float32, in their order.

    Every row draws a number, and those of the smallest stay (reservoir sampling). Weights don't matter.

    Attributes:
        count: Rows that are kept at most.
        seed: Of the draw.
    """

    count: int = 256
    seed: int = 0

    def accumulator(self) -> Accumulator:
        """See the base."""
        return _Rows(self.count, self.seed)

    def bytes(self, channels: int) -> int:
        """See the base."""
        return 4 * self.count * channels


def percentile(histogram: Summary, fraction: float) -> float:
    """The value below which `fraction` (0 to 1, or ValueError) of what a `Histogram` saw lies, linear in a bin."""
    if not 0 <= fraction <= 1 or histogram.rows == 0:
        raise ValueError("a percentile needs a fraction from 0 to 1 of at least one value")
    counts, limit = histogram["counts"], float(histogram["range"])
    edges = np.linspace(-limit, limit, len(counts) + 1)
    sums = np.concatenate([[0.0], np.cumsum(counts)])
    wanted = fraction * sums[-1]
    index = min(int(np.searchsorted(sums[1:], wanted, side="left")), len(counts) - 1)
    inside = counts[index]
    part = (wanted - sums[index]) / inside if inside else 0.0
    return float(edges[index] + part * (edges[index + 1] - edges[index]))


class _Range(Accumulator):
    by_element = True

    def __init__(self, per_channel: bool, *, absolute: bool) -> None:
        super().__init__()
        self._axis = 0 if per_channel else None
        self._absolute = absolute
        self._low: Array | None = None
        self._high: Array | None = None

    def _take(self, block: Array, weights: Array | None) -> None:
        low = np.asarray(np.fmin.reduce(block, axis=self._axis))
        high = np.asarray(np.fmax.reduce(block, axis=self._axis))
        self._low = low if self._low is None else np.fmin(self._low, low)
        self._high = high if self._high is None else np.fmax(self._high, high)

    def _arrays(self) -> dict[str, Array]:
        if self._low is None or self._high is None:
            return {}
        # A channel of which nothing counted holds zeros as far as a range is concerned.
        low, high = np.nan_to_num(self._low), np.nan_to_num(self._high)
        return {"absmax": np.maximum(-low, high)} if self._absolute else {"low": low, "high": high}


class _Histogram(Accumulator):
    by_element = True

    def __init__(self, bins: int, most: int | None = None) -> None:
        super().__init__()
        self._most = most
        if bins < 4 or bins % 4:
            raise ValueError("the number of bins must be a multiple of 4")
        self._counts = np.zeros(bins)
        self._range = 0.0

    def _take(self, block: Array, weights: Array | None) -> None:
        seen = np.isfinite(block)
        values = block[seen]
        each = None if weights is None else np.broadcast_to(weights[:, None], block.shape)[seen]
        largest = float(np.abs(values).max(initial=0))
        if largest > 0 and self._range == 0:
            # What came so far was zero, which lies in the middle of any range.
            self._range = 2.0 ** np.ceil(np.log2(largest))
        while largest > self._range:
            half = self._counts.reshape(-1, 2).sum(axis=1)
            quarter = len(self._counts) // 4
            self._counts = np.concatenate([np.zeros(quarter), half, np.zeros(quarter)])
            self._range *= 2
        limit = self._range or 1.0
        if self._most is not None and values.size > self._most:
            stride = -(-values.size // self._most)
            while math.gcd(stride, block.shape[1]) > 1:  # else some channels alone would be seen
                stride += 1
            values, each = values[::stride], None if each is None else each[::stride]
        self._counts += np.histogram(values, len(self._counts), (-limit, limit), weights=each)[0]

    def _arrays(self) -> dict[str, Array]:
        return {"counts": self._counts, "range": np.asarray(self._range)} if self.rows else {}


class _MeanAbs(Accumulator):
    def __init__(self) -> None:
        super().__init__()
        self._sum: Array | None = None

    def _take(self, block: Array, weights: Array | None) -> None:
        sizes = np.abs(block)
        found = sizes.sum(axis=0, dtype=np.float64) if weights is None else weights @ sizes.astype(np.float64)
        self._sum = found if self._sum is None else self._sum + found

    def _arrays(self) -> dict[str, Array]:
        if self._sum is None:
            return {}
        return {"mean_abs": (self._sum / (self.weight or 1.0)).astype(np.float32)}


class _MeanVariance(Accumulator):
    def __init__(self) -> None:
        super().__init__()
        self._seen = 0.0
        self._mean: Array | None = None
        self._squares: Array | None = None

    def _take(self, block: Array, weights: Array | None) -> None:
        values = block.astype(np.float64)
        share = np.ones(len(values)) if weights is None else weights
        weight = float(share.sum())
        if weight == 0:
            return
        mean = share @ values / weight
        squares = share @ np.square(values - mean)
        if self._mean is None or self._squares is None:
            self._seen, self._mean, self._squares = weight, mean, squares
            return
        total = self._seen + weight
        difference = mean - self._mean
        self._mean = self._mean + difference * (weight / total)
        self._squares = self._squares + squares + np.square(difference) * (self._seen * weight / total)
        self._seen = total

    def _arrays(self) -> dict[str, Array]:
        if self._mean is None or self._squares is None:
            return {}
        return {"mean": self._mean.astype(np.float32), "variance": (self._squares / self._seen).astype(np.float32)}


class _SecondMoment(Accumulator):
    """Only blocks on and above the diagonal are summed: half of the work, and what is made at once is small."""

    def __init__(self) -> None:
        super().__init__()
        self._sum: Array | None = None

    def _take(self, block: Array, weights: Array | None) -> None:
        size = block.shape[1]
        if self._sum is None:
            self._sum = np.zeros((size, size))
        for start in range(0, len(block), _ROWS):
            rows = block[start : start + _ROWS]
            if weights is not None:
                rows = rows * np.sqrt(weights[start : start + _ROWS, None]).astype(np.float32)
            for first in range(0, size, _COLUMNS):
                self._sum[first : first + _COLUMNS, first:] += rows[:, first : first + _COLUMNS].T @ rows[:, first:]

    def _arrays(self) -> dict[str, Array]:
        if self._sum is None:
            return {}
        size = len(self._sum)
        made = np.empty((size, size), dtype=np.float32)
        for first in range(0, size, _COLUMNS):
            last = first + _COLUMNS
            mean = self._sum[first:last, first:] / (self.weight or 1.0)
            # Within a block on the diagonal both halves were summed, and may differ in the last digit.
            own = mean[:, : last - first]
            mean[:, : last - first] = (own + own.T) / 2
            made[first:last, first:] = mean
            made[first:, first:last] = mean.T
        return {"second_moment": made}


class _Rows(Accumulator):
    def __init__(self, count: int, seed: int) -> None:
        super().__init__()
        self._count, self._random = count, np.random.default_rng(seed)
        self._kept: Array | None = None
        self._drawn = np.zeros(0)

    def _take(self, block: Array, weights: Array | None) -> None:
        drawn = np.concatenate([self._drawn, self._random.random(len(block))])
        kept = np.sort(np.argsort(drawn, kind="stable")[: self._count])
        old = 0 if self._kept is None else len(self._kept)
        new = block[kept[kept >= old] - old]
        self._kept = new.copy() if self._kept is None else np.concatenate([self._kept[kept[kept < old]], new])
        self._drawn = drawn[kept]

    def _arrays(self) -> dict[str, Array]:
        return {} if self._kept is None else {"rows": self._kept}
