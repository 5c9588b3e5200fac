"""The two tables of a rotation: read off a form, and written once for all layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.algebra import attribute_int, producer
from graphopt.analysis.dims import Dim, as_symbol
from graphopt.analysis.shapes import ShapeFacts
from graphopt.graph.constants import constant_array
from graphopt.graph.edits import Editor
from graphopt.passes.raise_.rotary_forms import INDEX, SIGN, TABLE, Form, Step, Table, X

Numbers = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Half:
    """The cosine or sine of each pair: sign, number of the table, element of it."""

    sign: int
    table: Numbers
    index: Numbers


@dataclasses.dataclass(frozen=True)
class Rotation:
    """What turns the first `size` elements of a vector in pairs, and leaves the others."""

    size: int
    interleaved: bool
    cos: Half
    sin: Half


def rotation(form: Form) -> Rotation | str | None:
    """The rotation that a form is; the reason where it nearly is one; None where it is something else.

    y[i] = x[i] c - x[k] s,   y[k] = x[k] c + x[i] s        for pairs (i, k)
    """
    count = form.shape[-1]
    if form.ndim != 3 or len(form) != 2:
        return None
    place = np.arange(count)
    there = (form[:, SIGN] != 0).sum(axis=0)
    straight = (form[0, TABLE] < 0) & (form[0, X] == place) & (form[0, SIGN] == 1) & (there == 1)
    turned = (there == 2) & (form[:, TABLE] >= 0).all(axis=0)
    size = int(turned.sum())
    if size < 2 or size % 2 or not (straight | turned).all():
        return None
    own = form[0, X] == place
    cos, sin = np.where(own, form[0], form[1]), np.where(own, form[1], form[0])
    if not turned[:size].all():
        return None
    cos, sin = cos[:, :size], sin[:, :size]
    if (cos[X] != place[:size]).any():
        return None
    place = place[:size]
    half = size // 2
    if (sin[X] == (place + half) % size).all():
        first, second, interleaved = place[:half], place[half:], False
    elif (sin[X] == place ^ 1).all():
        first, second, interleaved = place[::2], place[1::2], True
    else:
        return None
    for name, both, opposite in (("cosines", cos, 1), ("sines", sin, -1)):
        a, b = both[:, first], both[:, second]
        if (a[TABLE:] != b[TABLE:]).any() or (a[SIGN] != opposite * b[SIGN]).any():
            return f"the {name} of the two elements that turn together aren't known to be the same"
        if len(np.unique(a[SIGN])) != 1:
            return f"the {name} have different signs"
    return Rotation(size, interleaved, _half(cos[:, second]), _half(sin[:, second]))


def _half(rows: Numbers) -> Half:
    return Half(int(rows[SIGN, 0]), rows[TABLE], rows[INDEX])


class TableWriter:
    """Writes tables [batch, positions, pairs] into one graph, each once, before the first site that reads it."""

    def __init__(self, facts: ShapeFacts, tables: dict[Table, int]) -> None:
        self._facts, self._tables = facts, list(tables)
        self._made: dict[tuple[object, ...], ir.Value] = {}

    # ---- before anything is written

    def obstacle(self, half: Half) -> str | None:
        """Why a table can't be written, None where it can."""
        for number in np.unique(half.table):
            table = self._tables[number]
            shape = self._facts.shape(table.base)
            if shape is None or len(shape) != table.first + 1:
                return f"the elements of {table.base.name!r} aren't along its last axis"
        return None

    def axes(self, half: Half, count: int) -> set[int]:
        """The leading axes along which a table isn't broadcast, of the `count` of x."""
        found = set()
        for number in np.unique(half.table):
            table = self._tables[number]
            shape = self._facts.shape(table.base)
            assert shape is not None
            missing = count - len(table.lead)
            found |= {i + missing for i, axis in enumerate(table.lead) if axis is not None and shape[axis] != 1}
        return found

    # ---- writing

    def write(self, half: Half, batch: int, positions: int, count: int, edit: Editor) -> ir.Value:
        """The table with batch and positions taken from these of the `count` leading axes of x."""
        key = (half.sign, half.table.tobytes(), half.index.tobytes(), batch, positions, count)
        if key not in self._made:
            edges = [0, *(np.flatnonzero(np.diff(half.table)) + 1), len(half.table)]
            parts = [
                self._part(self._tables[half.table[a]], half.index[a:b], batch, positions, count, edit)
                for a, b in zip(edges, edges[1:], strict=False)
            ]
            value = parts[0] if len(parts) == 1 else edit.op("Concat", parts, {"axis": -1})
            self._made[key] = value if half.sign > 0 else edit.op("Neg", [value])
        return self._made[key]

    def _part(self, table: Table, index: Numbers, batch: int, positions: int, count: int, edit: Editor) -> ir.Value:
        missing = count - len(table.lead)
        places = [table.lead[i - missing] if i >= missing else None for i in (batch, positions)]
        key = (table.base, table.steps, index.tobytes(), *places)
        if key in self._made:
            return self._made[key]
        if table.steps:
            *steps, last = table.steps
            before = self._part(dataclasses.replace(table, steps=tuple(steps)), index, batch, positions, count, edit)
            value = _stepped(before, last, edit)
        else:
            value = self._placed(self._selected(table, index, edit), table, places, edit)
        self._made[key] = value
        return value

    def _selected(self, table: Table, index: Numbers, edit: Editor) -> ir.Value:
        """The elements of a table that are asked for."""
        base = table.base
        key = (base, index.tobytes())
        if key in self._made:
            return self._made[key]
        shape = self._facts.shape(base)
        assert shape is not None
        value = base
        if shape[-1] != len(index) or (index != np.arange(len(index))).any():
            value = self._picked(base, index, edit)
        self._made[key] = value
        return value

    def _picked(self, base: ir.Value, index: Numbers, edit: Editor) -> ir.Value:
        numbers = constant_array(base)
        if numbers is not None:
            return edit.constant(np.ascontiguousarray(numbers[..., index]), "table")
        gather = producer(base, "Gather")
        if gather is not None and attribute_int(gather, "axis", 0) == 0:
            rows = constant_array(gather.inputs[0])
            if rows is not None and rows.ndim == 2:
                return edit.op(
                    "Gather", [edit.constant(np.ascontiguousarray(rows[:, index]), "table"), gather.inputs[1]]
                )
        steps = np.unique(np.diff(index))
        if len(index) > 1 and len(steps) == 1 and steps[0] > 0:
            bounds = ([index[0]], [index[-1] + 1], [-1], [steps[0]])
            return edit.op("Slice", [base, *(edit.constant(np.array(b, dtype=np.int64)) for b in bounds)])
        return edit.op("Gather", [base, edit.constant(index)], {"axis": -1})

    def _placed(self, value: ir.Value, table: Table, places: Sequence[int | None], edit: Editor) -> ir.Value:
        """`value` as [batch, positions, pairs], of size 1 where a table is broadcast."""
        batch, positions = places
        kept = [axis for axis in places if axis is not None]
        dropped = [axis for axis in range(table.first) if axis not in kept]
        if dropped:
            value = edit.op("Squeeze", [value, edit.constant(np.array(dropped, dtype=np.int64), "axes")])
        if batch is not None and positions is not None and positions < batch:
            value = edit.op("Transpose", [value], {"perm": [1, 0, 2]})
        added = [place for place, axis in enumerate(places) if axis is None]
        if added:
            value = edit.op("Unsqueeze", [value, edit.constant(np.array(added, dtype=np.int64), "axes")])
        return value


def _stepped(value: ir.Value, step: Step, edit: Editor) -> ir.Value:
    if step.op_type == "Cast":
        return edit.op("Cast", [value], {"to": step.to})
    return edit.op(step.op_type, [value] if step.operand is None else [value, step.operand])


class Sizes:
    """Sizes of axes as values of one graph, each made once, from an input of the model where one has that size."""

    def __init__(self, facts: ShapeFacts, model: ir.Model) -> None:
        self._facts = facts
        self._inputs: dict[Dim, tuple[ir.Value, int]] = {}
        for value in model.graph.inputs:
            for axis, dim in enumerate(facts.shape(value) or ()):
                if dim.value is None:
                    self._inputs.setdefault(dim, (value, axis))
        self._made: dict[Dim, ir.Value] = {}
        self._expanded: dict[tuple[ir.Value, tuple[Dim, Dim]], ir.Value] = {}

    def fitted(
        self, table: ir.Value, wanted: tuple[Dim, Dim], x: ir.Value, axes: tuple[int, int], edit: Editor
    ) -> ir.Value:
        """`table` [batch, positions, pairs] expanded to the sizes that x has, where it isn't known to have them."""
        shape = self._facts.shape(table)
        assert shape is not None
        if all(has(dim, size) for dim, size in zip(shape, wanted, strict=False)):
            return table
        key = table, wanted
        if key not in self._expanded:
            known = [d.value for d in wanted]
            if all(size is not None for size in known):
                target = edit.constant(np.array([*known, 1], dtype=np.int64), "sizes")
            else:
                parts = [
                    self._size(dim, x, axis, edit) if not has(own, dim) else edit.constant(np.array([1]), "one")
                    for own, dim, axis in zip(shape, wanted, axes, strict=False)
                ]
                target = edit.op("Concat", [*parts, edit.constant(np.array([1]), "one")], {"axis": 0})
            self._expanded[key] = edit.op("Expand", [table, target])
        return self._expanded[key]

    def _size(self, dim: Dim, x: ir.Value, axis: int, edit: Editor) -> ir.Value:
        if dim.value is not None:
            return edit.constant(np.array([dim.value], dtype=np.int64), "size")
        if dim not in self._made:
            value, place = self._inputs.get(dim, (x, axis))
            self._made[dim] = edit.op("Shape", [value], {"start": place, "end": place + 1})
        return self._made[dim]


def has(dim: Dim, size: Dim) -> bool:
    """Whether an axis of size `dim` is one of `size`, or was broadcast to it."""
    symbol = as_symbol(dim)
    return dim == size or (symbol is not None and symbol.op == "broadcast" and size in symbol.args)
