"""Numbers of factors: which elements of a value share a factor, how a Reshape regroups them, what a part holds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.algebra import attribute_int, is_op
from graphopt.analysis.dims import Dim
from graphopt.analysis.shapes import ShapeFacts
from graphopt.graph.constants import constant_array

Numbers = npt.NDArray[np.int64]
"""The number of the factor of every element of a value: of its rank, of length 1 along axes that don't matter."""
PARTS = ("Slice", "Gather", "Split")
"""What takes a part of a value along an axis."""


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


def places_of(node: ir.Node, value: ir.Value, facts: ShapeFacts) -> tuple[int | None, list[int] | None]:
    """What an output of one of `PARTS` holds of its input.

    Args:
        node: The Slice, Gather or Split.
        value: Its output.
        facts: Shapes of the model.

    Returns:
        The axis of the input, from the front, and the places along it; no places where the axis has no known size or
        the index isn't constant, and neither where it takes more than one axis or can't be told.
    """
    x = node.inputs[0]
    shape = None if x is None else facts.shape(x)
    if shape is None:
        return None, None
    if is_op(node, "Slice"):
        given = [constant_array(v) for v in node.inputs[1:]]
        known = [int(a.reshape(())) for a in given if a is not None and a.size == 1]
        if len(given) < 3 or len(known) < len(given) or known[3:] not in ([], [1]):
            return None, None
        axis = known[2] % len(shape)
        size = shape[axis].value
        return axis, None if size is None else list(range(size))[known[0] : known[1]]
    written = attribute_int(node, "axis", 0)
    if written is None:
        return None, None
    axis = written % len(shape)
    size = shape[axis].value
    if is_op(node, "Gather"):
        indices = None if node.inputs[1] is None else facts.shape(node.inputs[1])
        array = constant_array(node.inputs[1])
        if indices is None or len(indices) > 1:
            return None, None
        if size is None or array is None:
            return axis, None
        return axis, [int(i) % size for i in array.reshape(-1)]
    sizes = [None if (s := facts.shape(out)) is None else s[axis].value for out in node.outputs]
    lengths = [n for n in sizes if n is not None]
    if len(lengths) < len(sizes):
        return axis, None
    index = next(i for i, out in enumerate(node.outputs) if out is value)
    start = sum(lengths[:index])
    return axis, list(range(start, start + lengths[index]))
