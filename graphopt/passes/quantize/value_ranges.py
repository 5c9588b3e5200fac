"""Ranges of activations for static scales, from histograms of what a model computes on calibration data."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.calibration.calibration import Calibration
from graphopt.calibration.data import ArrayDataset, Dataset, FirstSamples
from graphopt.calibration.request import Request
from graphopt.calibration.statistics import Histogram, MinMax, Summary, percentile
from graphopt.runtime_ops.memory_session import make_session, run

Array = npt.NDArray[Any]
Method = Literal["minmax", "percentile", "mse", "entropy"]
METHODS: tuple[Method, ...] = get_args(Method)

LEVELS = 256
_COUNTED = 1 << 15
"""Numbers of a sample that go into a histogram, evenly spread; the range is that of all."""
_SHARES = np.concatenate([np.linspace(1.0, 0.2, 41), np.geomspace(0.19, 0.02, 20)])
"""Of either side of a range, what the searches try."""


_SWISH_BOTTOM, _SWISH_DEPTH, _SWISH_FLAT = 1.2785, 0.2785, 16.0
"""Where x · Sigmoid(x) is least, how far below 0 it is there, and from where on it counts as 0."""


@dataclasses.dataclass(frozen=True)
class ValueRange:
    """What was seen of one value.

    Attributes:
        low: The least number that a quantized value must hold.
        high: The largest one.
        snr: Variance of the value over that of its rounding, in dB; infinite where nothing was seen.
        excluded: Numbers that were left out: NaN, infinite, or as large as a mask's constant.
    """

    low: float
    high: float
    snr: float = math.inf
    excluded: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Seen:
    """The histogram of a value, and its least and largest number."""

    histogram: Summary
    extremes: Summary

    @functools.cache  # noqa: B019 - a pass holds it while it runs
    def range(
        self, method: Method = "minmax", fraction: float = 0.9999, levels: int = LEVELS, *, swish: bool = False
    ) -> ValueRange:
        """The range that is rounded to so many levels.

        Args:
            method: "minmax": all that was seen; "percentile": `fraction` of it on each side; "mse": where the squared
                error of rounding and clipping is least; "entropy": where what is lost of the distribution
                (`divergence`) is.
            fraction: For "percentile".
            levels: To how many numbers the value is rounded.
            swish: x · Sigmoid(x) is all that is made of the value, so that the range ends where that is so near 0 that
                it is rounded to 0.
        """
        excluded = self.extremes.excluded
        if not self.extremes.arrays or not self.extremes.rows:
            return ValueRange(0.0, 0.0, excluded=excluded)
        low, high = float(self.extremes["low"]), float(self.extremes["high"])
        if low == high == 0:
            return ValueRange(low, high, excluded=excluded)
        bins = _Bins.of(self.histogram)
        if method == "percentile":
            top, bottom = (percentile(self.histogram, share) for share in (fraction, 1 - fraction))
            low, high = max(low, min(bottom, high)), min(high, max(top, low))
        elif method != "minmax":
            low, high = _least(bins, low, high, levels, squared_error if method == "mse" else divergence)
        if swish and low < 0:
            low = max(low, _swish_low(high, levels))
            return ValueRange(low, high, bins.swish_snr(low, max(high, 0.0), levels), excluded)
        return ValueRange(low, high, bins.snr(min(low, 0.0), max(high, 0.0), levels), excluded)


def seen(model: ir.Model, values: Sequence[ir.Value], samples: Any, limit: int | None = None) -> dict[ir.Value, Seen]:
    """The histogram of each value over the samples, in memory that doesn't grow with their number.

    Args:
        model: The model, unchanged.
        values: Float values of the main graph.
        samples: Calibration data, a data set, or an iterable of feeds.
        limit: Samples that are used at most; None: all.

    Raises:
        UsageError: There are no samples.
        InputDataError: The model doesn't run on one.
    """
    requests = {value: (Request(value, Histogram(most=_COUNTED)), Request(value, MinMax())) for value in values}
    found = calibration_of(samples, limit).gather(model, [one for pair in requests.values() for one in pair])
    return {value: Seen(found[histogram], found[extremes]) for value, (histogram, extremes) in requests.items()}


def calibration_of(samples: Any, limit: int | None = None) -> Calibration:
    """Calibration data of the first samples.

    Args:
        samples: Calibration data, a data set, or an iterable of feeds.
        limit: Samples that are used at most; None: all.

    Raises:
        UsageError: There are no samples.
    """
    if isinstance(samples, Calibration):
        found = samples
    else:
        found = Calibration(samples if isinstance(samples, Dataset) else ArrayDataset(samples))
    return found if limit is None else dataclasses.replace(found, data=FirstSamples(found.data, limit))


def run_outputs(model: ir.Model, samples: Any, limit: int = 8) -> list[npt.NDArray[Any]]:
    """The outputs of floats of a model on the first samples, one array after the other."""
    names = [v.name or "" for v in model.graph.outputs if v.dtype in (ir.DataType.FLOAT, None)]
    session = make_session(model)
    order = [output.name for output in session.get_outputs()]
    found: list[npt.NDArray[Any]] = []
    for sample in itertools.islice(_feeds(model, samples), limit):
        by_name = dict(zip(order, run(session, sample), strict=True))
        found += [np.asarray(by_name[name]) for name in names]
    return found


def _feeds(model: ir.Model, samples: Any) -> Iterable[Mapping[str, Any]]:
    """The feeds that samples stand for: those that a data set gives, or themselves."""
    feeds: Iterable[Mapping[str, Any]] = samples.feeds(model) if hasattr(samples, "feeds") else samples
    return feeds


@dataclasses.dataclass(frozen=True)
class _Bins:
    """The bins of a histogram that something fell into.

    Attributes:
        centres: float64 [bins], ascending.
        counts: float64 [bins].
        width: Of a bin.
    """

    centres: Array
    counts: Array
    width: float

    @classmethod
    def of(cls, histogram: Summary) -> _Bins:
        counts, limit = histogram["counts"], float(histogram["range"])
        width = 2 * limit / len(counts)
        kept = counts > 0
        return cls(((np.arange(len(counts)) + 0.5) * width - limit)[kept], counts[kept], width)

    def snr(self, low: float, high: float, levels: int) -> float:
        # Here the error within the range is spread evenly over a step, so that neighbouring bins don't decide.
        step = (high - low) / (levels - 1)
        outside = np.clip(self.centres, low, high) - self.centres
        outside = np.where(np.abs(outside) < step, 0.0, outside)
        error = float(self.counts @ outside**2 + self.counts[outside == 0].sum() * step**2 / 12)
        return self._decibels(self.centres, error)

    def swish_snr(self, low: float, high: float, levels: int) -> float:
        """As `snr`, of x · Sigmoid(x), where that is all that is made of the value."""
        gate = 1 / (1 + np.exp(np.clip(-self.centres, -80, 80)))
        slope = gate * (1 + self.centres * (1 - gate))
        inside = (self.centres >= low) & (self.centres <= high)
        step = (high - low) / (levels - 1)
        error = float(self.counts @ (np.where(inside, slope, 0.0) * step) ** 2 / 12)
        return self._decibels(self.centres * gate, error)

    def _decibels(self, values: Array, error: float) -> float:
        """The variance of what the bins stand for over a squared error summed over all that was counted."""
        mean = self.counts @ values / self.counts.sum()
        variance = float(self.counts @ (values - mean) ** 2)
        return 10 * math.log10(variance / error) if variance > 0 and 0 < error < math.inf else math.inf


def _swish_low(high: float, levels: int) -> float:
    """Below it, x · Sigmoid(x) is less than half a step from 0, where values end at `high`."""
    half = (max(high, 0.0) + _SWISH_DEPTH) / (levels - 1) / 2
    lows = np.linspace(-_SWISH_BOTTOM, -_SWISH_FLAT, 256)
    below = -lows / (1 + np.exp(-lows)) <= half
    return float(lows[below.argmax()]) if below.any() else -_SWISH_FLAT


def _least(bins: _Bins, low: float, high: float, levels: int, loss: Any) -> tuple[float, float]:
    """One side after the other is shrunk to where a loss is least."""
    best = (min(low, 0.0), max(high, 0.0))
    least = loss(bins, *best, levels)
    for side in (1, 0, 1):
        start = best
        for share in _SHARES[1:]:
            tried = (start[0], start[1] * share) if side else (start[0] * share, start[1])
            if tried != start and (found := loss(bins, *tried, levels)) < least:
                best, least = tried, found
    return best


def squared_error(bins: _Bins, low: float, high: float, levels: int) -> float:
    """The squared error of rounding what fell into bins to evenly spaced levels from `low` to `high`, 0 among them."""
    step = (high - low) / (levels - 1)
    if step <= 0:
        return math.inf
    zero_point = np.rint(-low / step)
    codes = np.clip(np.rint(bins.centres / step) + zero_point, 0, levels - 1)
    return float(bins.counts @ ((codes - zero_point) * step - bins.centres) ** 2)


def divergence(bins: _Bins, low: float, high: float, levels: int) -> float:
    """What rounding loses of a distribution: Σ p log (p / q), for each number that counts.

    8-bit Inference with TensorRT (Migacz, 2017): p is the distribution with what lies outside of the range in its
    outermost bins, and without the peak of exact zeros; q has the mass that each level got from inside of the range,
    spread evenly over its bins that aren't empty. Where the outermost bins got mass that q lacks, or a level covers
    bins of unlike masses, it is large.
    """
    step = (high - low) / (levels - 1)
    inside = (bins.centres >= low - bins.width) & (bins.centres <= high + bins.width)
    if step <= 0 or not inside.any():
        return math.inf
    every = bins.counts.copy()
    zero = int(np.abs(bins.centres - bins.width / 2).argmin())
    if len(every) > 2:
        # 0 is a level of any range, and a bin that many zeros fell into would have all others given up for it.
        beside = every[max(zero - 1, 0) : zero + 2]
        every[zero] = min(every[zero], (beside.sum() - every[zero]) / (len(beside) - 1))
    counts = every[inside]
    p = counts.copy()
    places = np.flatnonzero(inside)
    p[0] += every[: places[0]].sum()
    p[-1] += every[places[-1] + 1 :].sum()
    codes = np.clip(np.rint((bins.centres[inside] - low) / step), 0, levels - 1).astype(np.int64)
    mass = np.bincount(codes, counts, levels) / np.maximum(np.bincount(codes, minlength=levels), 1)
    p, q = p / p.sum(), mass[codes] / counts.sum()
    return float(p @ np.log(p / q))
