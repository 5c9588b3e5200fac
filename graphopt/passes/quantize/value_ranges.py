"""Ranges of activations for static scales, from histograms of what a model computes on calibration data."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.calibration.statistics import LARGEST
from graphopt.errors import InputDataError, UsageError, first_line
from graphopt.runtime_ops.memory_session import make_session, run

Method = Literal["minmax", "percentile", "mse"]
METHODS: tuple[Method, ...] = ("minmax", "percentile", "mse")

_BINS = 4096
_COUNTED = 1 << 15
"""Numbers of a sample that go into a histogram, evenly spread; the range is that of all."""
_LEVELS = 256
_SHARES = np.linspace(1.0, 0.2, 41)


@dataclasses.dataclass(frozen=True)
class ValueRange:
    """What was seen of one value.

    Attributes:
        low: The least number that a quantized value must hold.
        high: The largest one.
        snr: Variance of the value over that of its rounding to 256 steps, in dB; infinite where nothing was seen.
        excluded: Numbers that were left out: NaN, infinite, or as large as a mask's constant.
    """

    low: float
    high: float
    snr: float = math.inf
    excluded: int = 0


def ranges(
    model: ir.Model,
    values: Sequence[ir.Value],
    samples: Any,
    method: Method = "minmax",
    fraction: float = 0.9999,
    limit: int | None = None,
) -> dict[ir.Value, ValueRange]:
    """The range of each value over all samples.

    The model runs once on each sample, with the values among its outputs; of each a histogram is kept and no numbers.

    Args:
        model: The model, unchanged.
        values: Float values of the main graph.
        samples: An iterable of feeds, or a data set that gives them (`feeds(model)`).
        method: "minmax": all that was seen; "percentile": `fraction` of it on each side; "mse": where the squared error
            of 256 steps is least.
        fraction: For "percentile".
        limit: Samples that are used at most; None: all.

    Raises:
        UsageError: There are no samples.
        InputDataError: The model doesn't run on one.
    """
    seen = {value: _Histogram() for value in values}
    for sample in observed(model, values, samples, limit):
        for value, histogram in seen.items():
            histogram.add(np.asarray(sample[value.name or ""]))
    return {value: histogram.range(method, fraction) for value, histogram in seen.items()}


def observed(
    model: ir.Model, values: Sequence[ir.Value], samples: Any, limit: int | None = None
) -> Iterator[dict[str, Any]]:
    """What values are on each sample, by their names.

    Raises:
        UsageError: There are no samples.
        InputDataError: The model doesn't run on one.
    """
    session = make_session(_with_outputs(model, [value.name or "" for value in values]), "none")
    order = [output.name for output in session.get_outputs()]
    count = 0
    for count, sample in enumerate(itertools.islice(_feeds(model, samples), limit), 1):
        try:
            found = run(session, sample)
        except Exception as error:
            raise InputDataError(f"The model doesn't run on calibration sample {count}: {first_line(error)}") from error
        yield {**sample, **dict(zip(order, found, strict=True))}
    if count == 0:
        raise UsageError("Calibration needs at least one sample.")


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


def _with_outputs(model: ir.Model, names: Sequence[str]) -> ir.Model:
    copy = model.clone()
    graph = copy.graph
    known = {value.name for value in graph.outputs}
    by_name = {v.name: v for v in (*graph.inputs, *(v for node in graph for v in node.outputs))}
    for name in names:
        value = by_name[name]
        if name in known or value.is_graph_input():
            continue
        if value.type is None:
            value.type = ir.TensorType(ir.DataType.FLOAT)
        graph.outputs.append(value)
    return copy


class _Histogram:
    """Counts of bins of equal width over [-limit, limit]; the limit doubles where a larger number comes."""

    def __init__(self) -> None:
        self._counts = np.zeros(_BINS)
        self._limit = 0.0
        self._low, self._high = np.inf, -np.inf
        self.excluded = 0

    def add(self, array: npt.NDArray[Any]) -> None:
        numbers = array.reshape(-1).astype(np.float32, copy=False)
        usable = np.abs(numbers) < LARGEST
        if not usable.all():
            self.excluded += int(usable.size - usable.sum())
            numbers = numbers[usable]
        if numbers.size == 0:
            return
        low, high = float(numbers.min()), float(numbers.max())
        self._low, self._high = min(self._low, low), max(self._high, high)
        largest = max(abs(low), abs(high))
        if self._limit == 0.0 and largest > 0:
            self._limit = float(2.0 ** np.ceil(np.log2(largest)))
        while largest > self._limit:
            halves = self._counts.reshape(-1, 2).sum(axis=1)
            self._counts = np.concatenate([np.zeros(_BINS // 4), halves, np.zeros(_BINS // 4)])
            self._limit *= 2
        if self._limit > 0:
            numbers = numbers[:: max(1, numbers.size // _COUNTED)]
            places = ((numbers + self._limit) * (_BINS / (2 * self._limit))).astype(np.int32)
            self._counts += np.bincount(np.clip(places, 0, _BINS - 1), minlength=_BINS)

    def range(self, method: Method, fraction: float) -> ValueRange:
        if self._low > self._high:
            return ValueRange(0.0, 0.0, excluded=self.excluded)
        low, high = self._low, self._high
        if not self._counts.any():
            return ValueRange(low, high, excluded=self.excluded)
        if method == "percentile":
            low, high = self._percentile(low, high, fraction)
        elif method == "mse":
            low, high = self._least_error(low, high)
        return ValueRange(low, high, self._snr(min(low, 0.0), max(high, 0.0)), self.excluded)

    def _snr(self, low: float, high: float) -> float:
        centres, counts = self._centres()
        mean = counts @ centres / counts.sum()
        variance = float(counts @ (centres - mean) ** 2)
        error = _error(centres, counts, low, high)
        return 10 * math.log10(variance / error) if variance > 0 and math.isfinite(error) else math.inf

    def _centres(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        centres = (np.arange(_BINS) + 0.5) * (2 * self._limit / _BINS) - self._limit
        kept = self._counts > 0
        return centres[kept], self._counts[kept]

    def _percentile(self, low: float, high: float, fraction: float) -> tuple[float, float]:
        edges = np.linspace(-self._limit, self._limit, _BINS + 1)
        sums = np.cumsum(self._counts) / self._counts.sum()
        top = edges[min(int(np.searchsorted(sums, fraction)) + 1, _BINS)]
        bottom = edges[int(np.searchsorted(sums, 1 - fraction))]
        return max(low, min(bottom, high)), min(high, max(top, low))

    def _least_error(self, low: float, high: float) -> tuple[float, float]:
        """One side after the other is shrunk as far as the squared error falls."""
        centres, counts = self._centres()
        best = (min(low, 0.0), max(high, 0.0))
        least = _error(centres, counts, *best)
        for side in (1, 0, 1):
            start = best
            for share in _SHARES[1:]:
                tried = (start[0], start[1] * share) if side else (start[0] * share, start[1])
                error = _error(centres, counts, *tried)
                if error < least:
                    best, least = tried, error
        return best


def _error(centres: npt.NDArray[Any], counts: npt.NDArray[Any], low: float, high: float) -> float:
    step = (high - low) / (_LEVELS - 1)
    if step <= 0:
        return float("inf")
    outside = np.clip(centres, low, high) - centres
    outside = np.where(np.abs(outside) < step, 0.0, outside)  # of a bin that the range ends in
    # Inside the range the error is spread evenly over a step.
    return float(counts @ (outside**2) + counts[outside == 0].sum() * step**2 / 12)
