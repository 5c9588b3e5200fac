"""Numbers of factors: which elements of a value share a factor, and how a Reshape regroups them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from graphopt.analysis.dims import Dim

Numbers = npt.NDArray[np.int64]
"""The number of the factor of every element of a value: of its rank, of length 1 along axes that don't matter."""


class Ties:
    """Which of the factors 0 to n - 1 must be equal; n itself is the factor that is 1."""

    def __init__(self, count: int) -> None:
        self.pinned = count
        self._parent = np.arange(count + 1)

    def copy(self) -> Ties:
        """The ties as they stand."""
        other = Ties(self.pinned)
        other._parent = self._parent.copy()
        return other

    def roots(self, numbers: Numbers) -> Numbers:
        """One number for all that are tied to each other."""
        found = self._parent[numbers]
        while not np.array_equal(deeper := self._parent[found], found):
            found = deeper
        return found

    def tie(self, a: Numbers, b: Numbers) -> None:
        """Make the factors of `a` equal to those of `b`, element by element."""
        pairs = np.stack([x.reshape(-1) for x in np.broadcast_arrays(a, b)], axis=1)
        for first, second in np.unique(pairs, axis=0):
            low, high = sorted(int(self.roots(np.asarray(n))) for n in (first, second))
            self._parent[low] = high

    def along(self, numbers: Numbers, axis: int) -> Numbers:
        """Tie all that lie along an axis, which becomes one of length 1."""
        first = numbers.take([0], axis=axis)
        if numbers.shape[axis] > 1:
            self.tie(numbers, first)
        return first


def regrouped(numbers: Numbers, source: Sequence[Dim], target: Sequence[Dim]) -> Numbers | None:
    """Numbers of a value of shape `source` as those of the same elements in shape `target`, None where that isn't
    certain. Axes along which they don't vary have length 1; where they vary, their length is that of the axis, which
    may be known from who reads it while the shape itself says less."""
    actual = [Dim.of(n) if n > 1 else dim for n, dim in zip(numbers.shape, source, strict=True)]
    full, shape = list(numbers.shape), list[list[int]]()
    i, j = len(source), len(target)
    while i or j:
        end, other_end = i, j
        i, j = max(i - 1, 0), max(j - 1, 0)
        while not _same(source[i:end], actual[i:end], target[j:other_end]):
            here, there = _product(actual[i:end]).value, _product(target[j:other_end]).value
            if i and here is not None and (there is None or here < there):
                i -= 1
            elif j and there is not None and (here is None or here > there):
                j -= 1
            else:
                i = j = 0  # all that is left is one group
                break
        if math.prod(numbers.shape[i:end]) == 1:
            shape.insert(0, [1] * (other_end - j))
            continue
        sizes = [dim.value for dim in actual[i:end]]
        known = [n for n in sizes if n is not None]
        solved = _solved(target[j:other_end], math.prod(known))
        if len(known) < len(sizes) or solved is None:
            return None
        full[i:end] = known
        shape.insert(0, solved)
    return np.broadcast_to(numbers, full).reshape([n for part in shape for n in part])


def _product(dims: Sequence[Dim]) -> Dim:
    return math.prod(dims, start=Dim.of(1))


def _same(source: Sequence[Dim], actual: Sequence[Dim], target: Sequence[Dim]) -> bool:
    """Whether axes of one side certainly hold as many elements as those of the other."""
    return _product(target) in (_product(source), _product(actual))


def _solved(dims: Sequence[Dim], total: int) -> list[int] | None:
    """Sizes whose product is `total`, where at most one isn't known."""
    rest, unknown = total, [i for i, dim in enumerate(dims) if dim.value is None]
    for dim in dims:
        if dim.value is not None:
            if not dim.value or rest % dim.value:
                return None
            rest //= dim.value
    if len(unknown) > 1 or (not unknown and rest != 1):
        return None
    return [rest if dim.value is None else dim.value for dim in dims]
