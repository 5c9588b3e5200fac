"""Grids of any numbers: a scaled codebook for each group, or the best of several codebooks."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt.passes.quantize.codebooks import Codebook, bitmod, minifloat, normal_float, power
from graphopt.passes.quantize.gaussian_grids import lloyd_max
from graphopt.passes.quantize.grids import Array, Fit, Grid, step_size
from graphopt.passes.quantize.scale_search import best_fit, row_errors, searched_fit

EXPONENTS = tuple(round(1 - 0.05 * step, 2) for step in range(13))
"""Exponents of NUPES among which the search finds the best: 1 to 0.4."""

_SHARES = tuple(1 - 0.07 * step for step in range(11))
"""Ranges that a search tries, from the whole one down; 2 bits of normal numbers want 0.4 of it in large groups."""
_FEW = 16
"""So many numbers are found by as many comparisons, which takes a fifth of a binary search's time."""
_ROWS = 256
"""Rows by which the codebook of a matrix is chosen."""


@dataclasses.dataclass(frozen=True)
class CodebookGrid(Grid):
    """w = s · c[code] with a codebook c for all groups, or that of several ones which suits a group or a matrix best.

    A scale is a group's largest magnitude over the end of the codebook that reaches further. Where one end does, the
    sign of the scale puts the largest number there; else scales are positive.

    Attributes:
        books: The codebooks, each ascending, of 2 to 2^bits numbers of which the last is above 0 or the first below.
        bits: 1 to 8.
        search: Shrink the range to where the squared error (weighed by importance) is least, then fit the scale to the
            codes it gives by least squares. Negative scales are tried where they make a codebook that isn't there yet.
        half: Scales are numbers of float16, which is how they are stored.
        root_mean_square: A scale is the root of a group's mean square, for codebooks made for numbers of variance 1.
        by_matrix: `for_weight` chooses one codebook for a matrix; without it each group chooses.
    """

    books: tuple[Codebook, ...]
    bits: int
    search: bool = False
    half: bool = True
    root_mean_square: bool = False
    by_matrix: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"codes of single weights have 1 to 8 bits here, not {self.bits}")
        if not 1 <= len(self.books) <= 256:
            raise ValueError(f"a grid has 1 to 256 codebooks, not {len(self.books)}")
        for book in self.books:
            if not 2 <= len(book) <= 1 << self.bits or list(book) != sorted(book):
                raise ValueError(f"a codebook of {self.bits} bits has 2 to {1 << self.bits} ascending numbers")

    def for_weight(
        self, weight: npt.NDArray[np.float32], group_size: int, importance: npt.NDArray[np.float32] | None = None
    ) -> Grid:
        """See the base. With `by_matrix`: of the codebooks the one with the least squared error on up to 256 rows."""
        if not self.by_matrix or len(self.books) == 1:
            return self
        rows = weight[:: -(-len(weight) // _ROWS)]
        # All whole groups at once, and what is left behind them: each fit is then a few large operations.
        whole = weight.shape[1] // group_size * group_size
        errors = np.zeros(len(self.books))
        for columns, size in ((slice(0, whole), group_size), (slice(whole, None), weight.shape[1] - whole)):
            if not rows[:, columns].size:
                continue
            block = np.ascontiguousarray(rows[:, columns]).reshape(-1, size)
            weights = None if importance is None else np.tile(importance[columns], len(rows)).reshape(-1, size)
            for index, book in enumerate(self.books):
                grid = dataclasses.replace(self, books=(book,))
                errors[index] += row_errors(grid, block, grid.fit(block, weights), weights).sum()
        return dataclasses.replace(self, books=(self.books[int(np.argmin(errors))],))

    def fit(self, block: npt.NDArray[np.float32], importance: npt.NDArray[np.float32] | None = None) -> Fit:
        """See the base."""
        books = (self._fit_book(block, index, importance) for index in range(len(self.books)))
        return next(books) if len(self.books) == 1 else best_fit(self, block, books, importance)

    def _fit_book(self, block: npt.NDArray[np.float32], index: int, importance: Array | None) -> Fit:
        """The scales for one of the codebooks."""
        selector = np.full(len(block), index, np.uint8) if len(self.books) > 1 else None
        whole = self._whole_range(block, self._levels[index])
        if not self.search:
            return Fit(step_size(whole, self.half), selector=selector)
        # Numbers of variance 1 may want a larger scale than the root of the mean square.
        largest = 1.2 if self.root_mean_square else 1.0
        shares = [share * sign * largest for share in _SHARES for sign in self._signs(index)]
        trials = (Fit(step_size(whole * share, self.half), selector=selector) for share in shares)
        return searched_fit(self, block, trials, importance, self.half)

    def _whole_range(self, block: npt.NDArray[np.float32], book: Array) -> Array:
        if self.root_mean_square:
            mean: Array = np.einsum("nm,nm->n", block, block) / max(block.shape[1], 1)
            return np.sqrt(mean)
        far = np.take_along_axis(block, np.abs(block).argmax(axis=1)[:, None], axis=1)[:, 0]
        low, high = float(book.min()), float(book.max())
        return np.abs(far) / high if high == -low else far / (high if high > -low else low)

    def _signs(self, index: int) -> tuple[int, ...]:
        """Both where the ends are alike and what lies between isn't, and no other codebook is the mirror image."""
        book = self.books[index]
        if book[0] != -book[-1] or tuple(-number for number in book[::-1]) in self.books:
            return (1,)
        return (1, -1)

    def nearest(self, numbers: npt.NDArray[np.float32], fit: Fit) -> Array:
        """See the base. Between two numbers at the same distance the lower one is taken."""
        scaled = numbers / fit.scale[:, None]
        middles = self._middles
        if middles.shape[1] < _FEW:
            rows = middles[:1] if fit.selector is None else middles[fit.selector]
            codes = np.zeros(scaled.shape, np.uint8)
            for step in range(rows.shape[1]):
                codes += scaled > rows[:, step : step + 1]
            return codes
        if fit.selector is None:
            return np.searchsorted(middles[0], scaled).astype(np.uint8)
        codes = np.empty(scaled.shape, np.uint8)
        for index in np.unique(fit.selector):
            rows = fit.selector == index
            codes[rows] = np.searchsorted(middles[index], scaled[rows])
        return codes

    def values(self, codes: Array, fit: Fit) -> npt.NDArray[np.float32]:
        """See the base."""
        if fit.selector is None:
            level = self._levels[0][codes]
        else:
            level = self._levels.reshape(-1)[codes + (fit.selector.astype(np.int32)[:, None] << self.bits)]
        found: npt.NDArray[np.float32] = level * fit.scale[:, None]
        return found

    def levels(self) -> npt.NDArray[np.float32]:
        """See the base. Shorter codebooks repeat their last number, whose codes are never given."""
        return self._levels[:, :, None]

    @functools.cached_property
    def _levels(self) -> npt.NDArray[np.float32]:
        """The codebooks [C, 2^bits]."""
        return np.array([book + book[-1:] * ((1 << self.bits) - len(book)) for book in self.books], np.float32)

    @functools.cached_property
    def _middles(self) -> npt.NDArray[np.float32]:
        """Where a code ends and the next begins, [C, 2^bits - 1 or fewer]; without an end behind the last number."""
        longest = max(len(book) for book in self.books)
        found = np.full((len(self.books), longest - 1), np.inf, np.float32)
        for index, book in enumerate(self.books):
            numbers = np.array(book)
            found[index, : len(book) - 1] = (numbers[:-1] + numbers[1:]) / 2
        return found


def normal_float_grid(bits: int, **options: Any) -> CodebookGrid:
    """NF4, NF3, NF2 and so on; see `normal_float`. The options are those of `CodebookGrid`."""
    return CodebookGrid((normal_float(bits),), bits, **options)


def minifloat_grid(exponent: int, fraction: int, **options: Any) -> CodebookGrid:
    """ExMy, such as FP4 (2, 1) and FP8 (4, 3); see `minifloat`."""
    return CodebookGrid((minifloat(exponent, fraction),), 1 + exponent + fraction, **options)


def power_grid(bits: int, exponent: float | None = None, **options: Any) -> CodebookGrid:
    """NUPES with an exponent, or None: with that of `EXPONENTS` that suits a matrix best; see `power`."""
    exponents = EXPONENTS if exponent is None else (exponent,)
    return CodebookGrid(tuple(power(bits, a) for a in exponents), bits, by_matrix=True, **options)


def bitmod_grid(bits: int, **options: Any) -> CodebookGrid:
    """BitMoD of 3 or 4 bits; see `bitmod`."""
    return CodebookGrid(bitmod(bits), bits, **options)


def gaussian_grid(bits: int, **options: Any) -> CodebookGrid:
    """HIGGS with single numbers: those for normal weights, such as rotated ones, with mean squares as scales.

    See `lloyd_max`.
    """
    return CodebookGrid((lloyd_max(1 << bits),), bits, root_mean_square=True, **options)
