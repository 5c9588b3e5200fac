"""The numbers that the form of a mask says, for comparing them with the numbers that a run gives."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.analysis.conditions import Condition, Literal
from graphopt.analysis.dims import Dim, Symbol
from graphopt.analysis.elements import Elements
from graphopt.analysis.masks import MaskForm
from graphopt.graph.constants import constant_array

Arrays = Mapping[str, np.ndarray]


class UnknownSize(Exception):
    """A size that shape inference made a symbol of its own for, so that arrays don't tell it."""


class Numbers:
    """Evaluates conditions and integers of a form on the arrays of a run."""

    def __init__(self, elements: Elements, arrays: Arrays) -> None:
        self.elements, self.arrays = elements, arrays
        self.indices: dict[Symbol, int] = {}

    def array(self, value: ir.Value) -> np.ndarray:
        """The numbers of a value."""
        constant = constant_array(value, 1 << 24)
        return constant if constant is not None else self.arrays[value.name or ""]

    def _symbol(self, symbol: Symbol) -> int | float:
        if symbol in self.indices:
            return self.indices[symbol]
        read = self.elements.reads.get(symbol)
        if read is not None:
            place = tuple(int(self.dim(i)) for i in read.indices)
            return self.array(read.value)[place].item()
        if "[" not in symbol.name:
            raise UnknownSize(symbol.name)
        name, axis = symbol.name.removesuffix("]").rsplit("[", 1)
        return self.arrays[name].shape[int(axis)]

    def dim(self, dim: Dim) -> int | float:
        """The number that `dim` is."""
        number = dim.evaluate(self._symbol)  # type: ignore[arg-type]
        assert number is not None
        return number

    def holds(self, condition: Condition) -> bool:
        """Whether `condition` does."""
        if isinstance(condition, Literal):
            number = self.dim(condition.dim)
            return {"ge": number >= 0, "eq": number == 0, "ne": number != 0}[condition.kind]
        return (all if condition.conjunction else any)(self.holds(part) for part in condition.parts)


def each_element(
    form: MaskForm, elements: Elements, arrays: Arrays, look: Callable[[Numbers, tuple[int, ...]], Any]
) -> np.ndarray:
    """`look` at each place of the mask, with the numbers of the indices set."""
    numbers = Numbers(elements, arrays)
    mask = numbers.array(form.value)
    result = np.empty(mask.shape, dtype=object)
    places = form.axes[4 - mask.ndim :]
    for place in itertools.product(*map(range, mask.shape)):
        numbers.indices = {
            symbol: k
            for axis, k in zip(places, place, strict=True)
            for monomial in axis.terms() for symbol in monomial
        }  # fmt: skip
        result[place] = look(numbers, place)
    return result


def allowed(form: MaskForm, elements: Elements, arrays: Arrays) -> np.ndarray:
    """Where the form says that keys are attended to, by its parts."""

    def look(numbers: Numbers, place: tuple[int, ...]) -> bool:
        b, _, i, j = (0,) * (4 - len(place)) + place
        ok = numbers.holds(form.allowed)
        parts = all(numbers.holds(c) for c in form.other)
        offset = None if form.offset is None else numbers.dim(form.offset)
        if form.causal:
            assert offset is not None
            parts = parts and j <= i + offset
        if form.window is not None:
            assert offset is not None
            parts = parts and i + offset - j < form.window
        if form.padding is not None:
            parts = parts and bool(numbers.array(form.padding)[b, j + numbers.dim(form.shift)] != 0)
        if form.positions is not None:
            positions = numbers.array(form.positions)
            parts = parts and bool(j <= (positions[b, i] if positions.ndim == 2 else positions[i]))
        assert ok == parts, (place, form)
        return ok

    return each_element(form, elements, arrays, look).astype(bool)


def assert_form(form: MaskForm, elements: Elements, arrays: Arrays) -> None:
    """The mask of a run is what the form says."""
    mask = Numbers(elements, arrays).array(form.value)
    expected = allowed(form, elements, arrays)
    if form.boolean:
        np.testing.assert_array_equal(mask, expected)
        return
    if form.masked_values:
        lowest = np.isin(mask.astype(np.float64), form.masked_values)
        masked = lowest if not form.biased else mask <= max(form.masked_values) / 2
        if form.biased and form.bias is None:
            masked = masked & ~expected  # what is added may mask as well
        np.testing.assert_array_equal(masked, ~expected)
    else:
        assert expected.all()
    if not form.biased:
        np.testing.assert_array_equal(mask[expected], 0)
    elif form.bias is not None:
        bias = np.broadcast_to(Numbers(elements, arrays).array(form.bias), mask.shape)
        np.testing.assert_allclose(mask[expected], bias[expected], rtol=1e-6)
    if form.alibi is not None:
        mask, expected = (a.reshape((1,) * (4 - a.ndim) + a.shape) for a in (mask, expected))
        full = np.broadcast_to(mask, (mask.shape[0], len(form.alibi), *mask.shape[2:]))
        columns = np.arange(mask.shape[-1]) * form.alibi[None, :, None, None]
        shared = np.where(np.broadcast_to(expected, full.shape), full - columns, np.nan)
        np.testing.assert_allclose(np.nanmax(shared, -1), np.nanmin(shared, -1), atol=1e-4)
