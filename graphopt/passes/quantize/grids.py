"""Grids: to which numbers a weight may be rounded.

A grid sees a block [N, m] of a weight of which each row is one group: it *fits* the group's parameters (scale, zero
point or offset, codebook), then says for any number which code is nearest and what a code stands for. Roundings
(`roundings`) decide which of the codes a weight gets; they ask for nothing else, so that every grid goes with each.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt.passes.quantize.quantized_weight import QuantizedWeight

Array = npt.NDArray[Any]

_SHARES = {True: np.linspace(1.0, 0.4, 8), False: np.linspace(1.0, 0.35, 5)}
"""Shares of the range that `UniformGrid(search=True)` tries: of the one range of a symmetric grid, of either side of
another, which are tried in all pairs."""
_REFITS = 4
"""How often that search then takes turns between the codes nearest to the weights and the step best for the codes."""
_LEAST_HALF, _MOST_HALF = float(np.finfo(np.float16).tiny), float(np.finfo(np.float16).max)


@dataclasses.dataclass(frozen=True)
class Fit:
    """The parameters of one group in each of N rows; what a grid doesn't use is None.

    Attributes:
        scale: float32 [N], not 0; negative where that puts the number that is largest in magnitude on the grid.
        zero_point: uint8 [N].
        offset: float32 [N].
        selector: uint8 [N].
    """

    scale: npt.NDArray[np.float32]
    zero_point: npt.NDArray[np.uint8] | None = None
    offset: npt.NDArray[np.float32] | None = None
    selector: npt.NDArray[np.uint8] | None = None


class Grid(abc.ABC):
    """A set of numbers for each group.

    Attributes:
        bits: Bits of a code.
        width: Numbers that one code stands for.
        half: Scales and offsets are numbers of float16, see `stored`.
    """

    bits: int
    width: int = 1
    half: bool = False

    def for_weight(
        self, weight: npt.NDArray[np.float32], group_size: int, importance: npt.NDArray[np.float32] | None = None
    ) -> Grid:
        """The grid for one matrix: this one, but for grids that all of a matrix has a say in, such as an exponent.

        Args:
            weight: [N, K].
            group_size: Columns of a group.
            importance: [K], as in `fit`.
        """
        return self

    @abc.abstractmethod
    def fit(self, block: npt.NDArray[np.float32], importance: npt.NDArray[np.float32] | None = None) -> Fit:
        """The parameters of a group in each row.

        Args:
            block: [N, m], each row a group.
            importance: [m], what a squared error of each column counts; None: all the same.
        """

    @abc.abstractmethod
    def nearest(self, numbers: npt.NDArray[np.float32], fit: Fit) -> Array:
        """Codes [N, m] of the grid's numbers that are nearest to `numbers` [N, m]."""

    def nearest_under(self, numbers: npt.NDArray[np.float32], fit: Fit, metric: npt.NDArray[np.float32]) -> Array:
        """Codes [N, 1] of the vectors q nearest to x, rows of `numbers` [N, width]: of least (x - q) M (x - q)ᵀ.

        Args:
            numbers: x.
            fit: Of a group in each row.
            metric: M, [width, width], symmetric and positive.
        """
        return self.nearest(numbers, fit)

    @abc.abstractmethod
    def values(self, codes: Array, fit: Fit) -> npt.NDArray[np.float32]:
        """What codes [N, m] stand for, float32 [N, m]."""

    def levels(self) -> npt.NDArray[np.float32] | None:
        """The codebooks [C, 2^bits, width]; None where a code is its own level."""
        return None

    def assemble(self, codes: Array, fits: Sequence[Fit], group_size: int, columns: int) -> QuantizedWeight:
        """Codes and the parameters of all groups, in order, as a weight."""

        def stacked(name: str) -> Any:
            parts = [getattr(fit, name) for fit in fits]
            return None if parts[0] is None else np.stack(parts, axis=1)

        return QuantizedWeight(
            codes,
            self.bits,
            group_size,
            columns,
            stacked("scale"),
            zero_points=stacked("zero_point"),
            offsets=stacked("offset"),
            levels=self.levels(),
            selectors=stacked("selector"),
        )


@dataclasses.dataclass(frozen=True)
class UniformGrid(Grid):
    """Evenly spaced numbers: w = s (c - z), with c from 0 to 2^bits - 1.

    Attributes:
        bits: 2 to 8.
        symmetric: z = 2^(bits - 1), so that 0 is a number of the grid and no zero points need be stored; the range is
            that of the number that is largest in magnitude, whose sign is put where the grid reaches further.
        floats: Without `symmetric`: the least number is m itself and not a multiple of the step, w = s c + m.
        search: Make the squared error (weighed by importance) small: of ranges from the whole one down, cut on either
            side, the best, then steps (and offsets) by least squares for fixed codes in turn with the nearest codes.
            Never worse than `search=False`, which takes min and max.
        half: Scales and offsets are numbers of float16, which is how they are stored, so that nothing is rounded again.
    """

    bits: int = 4
    symmetric: bool = True
    floats: bool = False
    search: bool = False
    half: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"integers have 2 to 8 bits here, not {self.bits}")
        if self.symmetric and self.floats:
            raise ValueError("a symmetric grid has no offsets")

    def fit(self, block: npt.NDArray[np.float32], importance: npt.NDArray[np.float32] | None = None) -> Fit:
        """See the base."""
        ends = self._ends(block)
        best = self._of_range(ends, 1.0, 1.0)
        if not self.search:
            return best
        # Groups are short, and numpy adds up short rows slowly: columns of all groups at once take half to a third.
        columns = np.ascontiguousarray(block.T)
        least = self._error(columns, best, importance)
        if not self.symmetric and not self.floats:
            # Rows of a Hadamard matrix are two numbers, s and -s, which no range from -s to s has both: steps of s do.
            furthest = step_size(np.maximum(np.abs(ends[0]), np.abs(ends[1])), self.half)
            steps = Fit(furthest, np.full(len(block), 1 << (self.bits - 1), np.uint8))
            error = self._error(columns, steps, importance)
            least, best = np.minimum(error, least), mixed(steps, best, error < least)
        shares = _SHARES[self.symmetric]
        pairs = [(share, side) for share in shares for side in ((1.0, -1.0) if self.symmetric else shares)]
        for turn in range(len(pairs) + _REFITS):
            refit = turn >= len(pairs)
            fit = self._refitted(columns, best, importance) if refit else self._of_range(ends, *pairs[turn])
            error = self._error(columns, fit, importance)
            better = error < least
            least, best = np.where(better, error, least), mixed(fit, best, better)
        return best

    def _error(self, columns: npt.NDArray[np.float32], fit: Fit, importance: Array | None) -> npt.NDArray[np.float32]:
        """The squared error of each group, float32 [N], in `columns` [m, N] rounded to nearest."""
        inverse = 1 / fit.scale
        zero: Any = fit.zero_point if fit.offset is None else -fit.offset * inverse
        level = columns * inverse
        level += zero
        wrong = np.rint(level)
        np.clip(wrong, 0, (1 << self.bits) - 1, out=wrong)
        wrong -= level
        wrong *= wrong
        total = wrong.sum(axis=0) if importance is None else importance @ wrong
        return np.asarray(total * fit.scale**2, np.float32)

    def _refitted(self, columns: npt.NDArray[np.float32], fit: Fit, importance: Array | None) -> Fit:
        """The step, and the offset or the zero point, by least squares for the codes nearest to `columns` [m, N]."""
        weights = np.ones(len(columns), np.float32) if importance is None else importance
        level = np.ascontiguousarray(self.nearest(columns.T, fit).T).astype(np.float32)
        offset, zero_point = fit.offset, fit.zero_point
        if not self.symmetric:
            share = weights / max(float(weights.sum()), 1e-30)
            middle, mean = share @ level, share @ columns
            away = level - middle
            slope = self._ratio(weights @ (away * (columns - mean)), weights @ away**2, fit.scale)
            if self.floats:
                return Fit(slope, offset=stored(mean - slope * middle, self.half))
            zero_point = np.clip(np.rint(middle - mean / slope), 0, (1 << self.bits) - 1).astype(np.uint8)
        assert zero_point is not None
        level -= zero_point
        return Fit(self._ratio(weights @ (level * columns), weights @ level**2, fit.scale), zero_point, offset)

    def _ratio(self, above: Array, below: Array, otherwise: Array) -> npt.NDArray[np.float32]:
        """A step by least squares; `otherwise` where all codes are one."""
        sure = (below > np.finfo(np.float32).tiny) & (np.abs(above) > np.finfo(np.float32).tiny)
        return stored(np.where(sure, above / np.where(sure, below, 1), otherwise), self.half)

    def _ends(self, block: npt.NDArray[np.float32]) -> tuple[Array, Array]:
        """The least and the largest number of each group, [N]; of a symmetric grid, twice the one furthest from 0."""
        if not self.symmetric:
            return block.min(axis=1), block.max(axis=1)
        far = np.take_along_axis(block, np.abs(block).argmax(axis=1)[:, None], axis=1)[:, 0]
        return far, far

    def _of_range(self, ends: tuple[Array, Array], below: float, above: float) -> Fit:
        """The fit to a share of the range on either side; a symmetric one takes `below`, and the sign from `above`."""
        top = (1 << self.bits) - 1
        low, high = ends
        if self.symmetric:
            middle = 1 << (self.bits - 1)
            # -2^(bits-1) is a number of the grid and +2^(bits-1) isn't: a negative step puts the largest there.
            scale = -low / middle if above > 0 else low / (middle - 1)
            return Fit(step_size(scale * below, self.half), np.full(len(low), middle, np.uint8))
        if self.floats:
            centre, half = (low + high) / 2, (high - low) / 2
            step = step_size(half * (below + above) / top, self.half)
            return Fit(step, offset=stored(centre - half * below, self.half))
        least, most = np.minimum(low, 0) * below, np.maximum(high, 0) * above
        step = step_size((most - least) / top, self.half)
        return Fit(step, np.clip(np.rint(-least / step), 0, top).astype(np.uint8))

    def nearest(self, numbers: npt.NDArray[np.float32], fit: Fit) -> Array:
        """See the base."""
        shifted: Array = numbers / fit.scale[:, None]
        if fit.offset is not None:
            shifted = (numbers - fit.offset[:, None]) / fit.scale[:, None]
        elif fit.zero_point is not None:
            shifted = shifted + fit.zero_point[:, None]
        codes: Array = np.clip(np.rint(shifted), 0, (1 << self.bits) - 1).astype(np.uint8)
        return codes

    def values(self, codes: Array, fit: Fit) -> npt.NDArray[np.float32]:
        """See the base."""
        found: npt.NDArray[np.float32] = codes.astype(np.float32)
        if fit.zero_point is not None:
            found -= fit.zero_point[:, None]
        found *= fit.scale[:, None]
        if fit.offset is not None:
            found += fit.offset[:, None]
        return found


def step_size(scale: Array, half: bool) -> npt.NDArray[np.float32]:
    """Scales as they are stored that can be divided by: a group of zeros gets one of 1."""
    return stored(np.where(np.abs(scale) > np.finfo(np.float32).tiny, scale, 1), half)


def stored(numbers: Array, half: bool) -> npt.NDArray[np.float32]:
    """Scales or offsets as they are stored: with `half`, numbers of float16."""
    if not half:
        return numbers.astype(np.float32)
    sizes = np.abs(numbers)
    # What float16 holds with fewer than its 11 digits stays as it is; such a weight's scales are stored in float32.
    fits = ((sizes >= _LEAST_HALF) & (sizes <= _MOST_HALF)) | (sizes == 0)
    with np.errstate(over="ignore"):
        return np.where(fits, numbers.astype(np.float16), numbers).astype(np.float32)


def mixed(first: Fit, second: Fit, choose: Array) -> Fit:
    """The first's parameters where `choose`, else the second's."""

    def one(name: str) -> Any:
        a, b = getattr(first, name), getattr(second, name)
        return None if a is None else np.where(choose, a, b)

    return Fit(one("scale"), one("zero_point"), one("offset"), one("selector"))
