"""Constant tensors as functions of their indices: ranges, triangles, bands, single numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.conditions import Condition
from graphopt.analysis.dims import Dim
from graphopt.analysis.leaves import Element, Numbers, OpaqueError, Poly


def table(
    numbers: Numbers, array: npt.NDArray[Any], indices: Sequence[Dim], dtype: ir.DataType | None
) -> Element | None:
    """The element of a constant at `indices`, None where it is no such function of them.

    A table that is the same along an axis doesn't depend on that index; one of a single axis that counts evenly is
    linear; one of two values that change on diagonals only is a condition on the difference of row and column.
    """
    if (
        array.ndim != len(indices)
        or array.size == 0
        or (array.dtype.kind not in "fiub" and array.dtype.name != "bfloat16")
    ):
        raise OpaqueError("a constant of another rank or type")
    left: list[Dim] = []
    for axis, index in reversed(list(enumerate(indices))):
        number = index.value
        if number is not None:
            if not 0 <= number < array.shape[axis]:
                raise OpaqueError("an index is out of range")
            array = array.take(number, axis)
            continue
        head = array.take([0], axis)
        if bool((array == head).all()):
            array = head.squeeze(axis)
        else:
            left.insert(0, index)
    if array.ndim == 0:
        return _number(numbers, array[()], dtype)
    if array.ndim == 1 and array.dtype.kind in "iu":
        first, step = int(array[0]), int(array[1]) - int(array[0])
        if all(int(n) == first + step * k for k, n in enumerate(array)):
            return numbers.constant(dtype, left[0] * step + first)
    kinds = np.unique(array) if array.ndim <= 2 else np.empty(0)
    masks = dtype is not None and (not dtype.is_floating_point() or (len(kinds) and float(kinds[0]) < -1))
    if len(kinds) == 2 and (masks or array.ndim == 2):
        two_axes = array if array.ndim == 2 else array[None, :]
        row = left[0] if array.ndim == 2 else Dim.of(0)
        band = _band(numbers, two_axes == kinds[1], left[-1] - row)
        if band is not None:
            high, low = (_number(numbers, kind, dtype) for kind in (kinds[1], kinds[0]))
            return numbers.choose(band, high, low)
    return None


def _number(numbers: Numbers, number: Any, dtype: ir.DataType | None) -> Element:
    if dtype == ir.DataType.BOOL:
        return numbers.logic.ne(Dim.of(int(number)))
    if dtype is not None and dtype.is_floating_point():
        return numbers.constant(dtype, Poly.of(float(number)))
    return numbers.constant(dtype, Dim.of(int(number)))


def _band(numbers: Numbers, chosen: npt.NDArray[np.bool_], distance: Dim) -> Condition | None:
    """The condition on `distance` (column - row) that gives `chosen`, where it depends on that only and is a band."""
    rows, columns = chosen.shape
    apart = np.arange(columns)[None, :] - np.arange(rows)[:, None]
    for wanted in (True, False):
        where = apart[chosen == wanted]
        low, high = int(where.min()), int(where.max())
        if not bool((((apart >= low) & (apart <= high)) == (chosen == wanted)).all()):
            continue
        logic = numbers.logic
        # An end at the edge of the table says nothing.
        ends = [logic.ge(distance - low)] if low > 1 - rows else []
        ends += [logic.ge(Dim.of(high) - distance)] if high < columns - 1 else []
        inside = logic.all_of(ends)
        return inside if wanted else logic.negate(inside)
    return None
