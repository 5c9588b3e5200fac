"""The two tables of a rotation: read off a form, and written once for all layers."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.algebra import attribute_int, producer
from graphopt.analysis.dims import Dim, as_symbol
from graphopt.analysis.shapes import ShapeFacts
from graphopt.graph.computed import identity, weight
from graphopt.graph.constants import constant_tensor
from graphopt.graph.edits import Editor
from graphopt.passes.raise_.rotary_forms import Step, Table, Tables
from graphopt.passes.raise_.rotary_terms import INDEX, SIGN, TABLE, Form, X

Numbers = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Half:
    """The cosine or sine of each pair: sign, number of the table, element of it."""

    sign: int
    table: Numbers
    index: Numbers


@dataclasses.dataclass(frozen=True)
class Rotation:
    """What turns `size` elements of a vector in pairs, and leaves the others.

    Attributes:
        start: The first element that is turned.
        last: Whether the last element of the vector is turned.
        size: How many elements are turned.
        interleaved: Whether neighbours make a pair; else the element in the same place of the other half does.
        order: The elements of the vector in the order in which they are turned; None: as they are.
        cos: The cosine of each pair.
        sin: Its sine.
    """

    start: int
    last: bool
    size: int
    interleaved: bool
    order: Numbers | None
    cos: Half
    sin: Half


def rotation(form: Form) -> Rotation | str | None:
    """The rotation that a form is; the reason where it nearly is one; None where it is something else.

        y[i] = x[o(i)] c - x[o(k)] s,   y[k] = x[o(k)] c + x[o(i)] s        for pairs (i, k)

    The order o is that of x itself but for models that take pairs apart and put halves together.
    """
    if form.ndim != 3 or len(form) != 2:
        return None
    count = form.shape[-1]
    there = (form[:, SIGN] != 0).sum(axis=0)
    straight = (form[0, TABLE] < 0) & (form[0, SIGN] == 1) & (there == 1)
    turned = (there == 2) & (form[:, TABLE] >= 0).all(axis=0)
    size, start = int(turned.sum()), int(turned.argmax())
    end = start + size
    if size < 2 or size % 2 or not turned[start:end].all() or not straight[~turned].all():
        return None
    near: str | None = None
    place = np.arange(count)
    first = form[0, TABLE, start]
    for own in (form[0, X] == place, form[0, TABLE] == first, form[0, TABLE] != first):
        own = own | ~turned
        order = np.where(own, form[0, X], form[1, X])
        if len(np.unique(order)) != count:
            continue
        cos, sin = (np.where(mask, form[0], form[1])[:, start:end] for mask in (own, ~own))
        found = _paired(cos, sin)
        if isinstance(found, Rotation):
            return dataclasses.replace(
                found, start=start, last=end == count, order=None if (order == place).all() else order
            )
        near = near or found
    return near


def _paired(cos: Numbers, sin: Numbers) -> Rotation | str | None:
    """The rotation of these terms by x itself and by its partner, in halves or interleaved."""
    size = cos.shape[-1]
    place, half = np.arange(size), size // 2
    if (sin[X] == cos[X][(place + half) % size]).all():
        first, second, interleaved = place[:half], place[half:], False
    elif (sin[X] == cos[X][place ^ 1]).all():
        first, second, interleaved = place[::2], place[1::2], True
    else:
        return None
    for name, both, opposite in (("cosines", cos, 1), ("sines", sin, -1)):
        a, b = both[:, first], both[:, second]
        if (a[TABLE:] != b[TABLE:]).any():
            return f"the {name} of the two elements that turn together aren't known to be the same"
        if (a[SIGN] != opposite * b[SIGN]).any() or len(np.unique(a[SIGN])) != 1:
            return f"the signs of the {name} aren't those of a rotation"
    return Rotation(0, True, size, interleaved, None, _half(cos[:, second]), _half(sin[:, second]))


def _half(rows: Numbers) -> Half:
    return Half(int(rows[SIGN, 0]), rows[TABLE], rows[INDEX])


class Replaced:
    """Replacements, and what stands now for a value that was read before them."""

    def __init__(self, edit: Editor) -> None:
        self._edit = edit
        self._new: dict[ir.Value, ir.Value] = {}

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Let `new` take the place of `old`."""
        self._edit.replace(old, new)
        self._new[old] = new

    def now(self, value: ir.Value) -> ir.Value:
        """What stands for `value`."""
        while value in self._new:
            value = self._new[value]
        return value


class TableWriter:
    """Writes tables [batch, positions, pairs] into one graph, each once, before the first site that reads it."""

    def __init__(self, facts: ShapeFacts, tables: Tables, written: Replaced) -> None:
        self._facts, self._tables, self._written = facts, tables, written
        self._made: dict[tuple[object, ...], ir.Value] = {}

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

    def write(self, half: Half, batch: int | None, positions: int, count: int, edit: Editor) -> ir.Value:
        """The table with batch and positions taken from these of the `count` leading axes of x."""
        key = (half.sign, half.table.tobytes(), half.index.tobytes(), batch, positions, count)
        if key not in self._made:
            edges = [0, *(np.flatnonzero(np.diff(half.table)) + 1), len(half.table)]
            parts = [
                self._part(self._tables[half.table[a]], half.index[a:b], batch, positions, count, edit)
                for a, b in itertools.pairwise(edges)
            ]
            value = parts[0] if len(parts) == 1 else edit.op("Concat", parts, {"axis": -1})
            self._made[key] = value if half.sign > 0 else edit.op("Neg", [value])
        return self._made[key]

    def _part(
        self, table: Table, index: Numbers, batch: int | None, positions: int, count: int, edit: Editor
    ) -> ir.Value:
        missing = count - len(table.lead)
        places = [None if i is None or i < missing else table.lead[i - missing] for i in (batch, positions)]
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
        base = self._written.now(table.base)
        key = (base, index.tobytes())
        if key in self._made:
            return self._made[key]
        shape = self._facts.shape(base)
        assert shape is not None
        count = math.prod(dim.value or 0 for dim in shape[table.first :])
        whole = count == len(index) and (index == np.arange(count)).all()
        gathered = None if whole and producer(base, "GatherElements") is None else self._rows(base)
        if gathered is not None:
            rows, positions = gathered
            value = edit.op(
                "Gather", [edit.constant(_columns(rows, rows.shape.numpy()[-2:], index), "table"), positions]
            )
        else:
            value = base
            if len(shape) > table.first + 1:
                sizes = np.array([0] * table.first + [count], dtype=np.int64)
                value = edit.op("Reshape", [base, edit.constant(sizes, "sizes")])
            if not whole:
                value = self._picked(value, index, edit)
        self._made[key] = value
        return value

    def _picked(self, base: ir.Value, index: Numbers, edit: Editor) -> ir.Value:
        numbers = constant_tensor(base)
        if numbers is not None:
            return edit.constant(_columns(numbers, numbers.shape.numpy(), index), "table")
        steps = np.unique(np.diff(index))
        if len(index) > 1 and len(steps) == 1 and steps[0] > 0:
            bounds = ([index[0]], [index[-1] + 1], [-1], [steps[0]])
            return edit.op("Slice", [base, *(edit.constant(np.array(b, dtype=np.int64)) for b in bounds)])
        return edit.op("Gather", [base, edit.constant(index)], {"axis": -1})

    def _rows(self, base: ir.Value) -> tuple[ir.TensorProtocol, ir.Value] | None:
        """The constant rows and the positions that a table is gathered from and by.

        GatherElements of rows repeated for each batch, by positions repeated for each element, is that too.
        """
        node = producer(base, "Gather", "GatherElements")
        shape = self._facts.shape(base)
        if node is None or shape is None or any(value is None for value in node.inputs):
            return None
        rows, positions = node.inputs
        assert rows is not None
        assert positions is not None
        if node.op_type == "Gather":
            tensor = constant_tensor(rows)
            axis = attribute_int(node, "axis", 0)
            return None if tensor is None or len(tensor.shape) != 2 or axis != 0 else (tensor, positions)
        whole, repeated = self._facts.shape(rows), producer(positions, "Expand", "Tile")
        while (node_above := producer(rows, "Expand", "Tile")) is not None and node_above.inputs[0] is not None:
            rows = node_above.inputs[0]
        tensor = constant_tensor(rows)
        single = None if repeated is None else producer(repeated.inputs[0], "Unsqueeze")
        if tensor is None or whole is None or repeated is None or single is None or len(shape) != 3:
            return None
        before, plain = self._facts.shape(repeated.inputs[0]), single.inputs[0]
        axis = attribute_int(node, "axis", 0)
        if before is None or before[2] != 1 or before[:2] != shape[:2] or self._facts.shape(plain) != shape[:2]:
            return None
        sizes = tensor.shape.numpy()
        if (
            axis not in (1, -2)
            or tensor.size != math.prod(sizes[-2:])
            or [d.value for d in whole[1:]] != list(sizes[-2:])
        ):
            return None
        assert plain is not None
        return tensor, plain

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


def _columns(tensor: ir.TensorProtocol, shape: Sequence[int], index: Numbers) -> ir.TensorProtocol:
    """These columns of a constant that is taken to have a shape."""

    def compute() -> ir.TensorProtocol:
        return ir.tensor(np.ascontiguousarray(tensor.numpy().reshape(shape)[..., index]))

    origin = ("columns", identity(tensor), tuple(shape), index.tobytes())
    return weight(compute, tensor.dtype, (*shape[:-1], len(index)), None, origin)


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
        self._targets: dict[tuple[Dim, ...], ir.Value] = {}
        self._fitted: dict[tuple[object, ...], ir.Value] = {}

    def fitted(self, value: ir.Value, x: ir.Value, axes: Sequence[int | None], edit: Editor) -> ir.Value:
        """`value` [batch, positions, ...] with these axes of the size that `axes` of x have, None standing for 1.

        It is expanded where it isn't known to have them.
        """
        shape, of_x = self._facts.shape(value), self._facts.shape(x)
        assert shape is not None
        assert of_x is not None
        wanted = [Dim.of(1) if axis is None else of_x[axis] for axis in axes]
        if all(_has(own, size) for own, size in zip(shape, wanted, strict=False)):
            return value
        if any(
            own.value not in (None, 1) and size.value not in (None, own.value)
            for own, size in zip(shape, wanted, strict=False)
        ):
            return value  # which no run can be with
        target = [Dim.of(1) if _has(own, size) else size for own, size in zip(shape, wanted, strict=False)]
        target += [Dim.of(1)] * (len(shape) - len(target))
        key = value, *target
        if key not in self._fitted:
            self._fitted[key] = edit.op("Expand", [value, self._target(target, x, axes, edit)])
        return self._fitted[key]

    def counted(self, start: ir.Value, x: ir.Value, axes: Sequence[int], edit: Editor) -> ir.Value:
        """The positions [batch, positions] of x counted from one number."""
        shape = self._facts.shape(x)
        assert shape is not None
        wanted = [shape[axis] for axis in axes]
        key = start, *wanted, "counted"
        if key not in self._fitted:
            scalars = [edit.constant(np.array(number, dtype=np.int64)) for number in (0, 1)]
            length = edit.op("Squeeze", [self._size(wanted[1], x, axes[1], edit)])
            counted = edit.op("Add", [edit.op("Range", [scalars[0], length, scalars[1]]), start])
            self._fitted[key] = edit.op("Expand", [counted, self._target(wanted, x, axes, edit)])
        return self._fitted[key]

    def vector(self, number: int, edit: Editor) -> ir.Value:
        """A constant vector of one integer."""
        return edit.constant(np.array([number], dtype=np.int64))

    def _target(self, sizes: Sequence[Dim], x: ir.Value, axes: Sequence[int | None], edit: Editor) -> ir.Value:
        key = tuple(sizes)
        if key not in self._targets:
            known = [size.value for size in sizes]
            if None not in known:
                self._targets[key] = edit.constant(np.array(known, dtype=np.int64), "sizes")
            else:
                padded = [*axes, *[None] * (len(sizes) - len(axes))]
                parts = [self._size(size, x, axis, edit) for size, axis in zip(sizes, padded, strict=True)]
                self._targets[key] = edit.op("Concat", parts, {"axis": 0})
        return self._targets[key]

    def _size(self, size: Dim, x: ir.Value, axis: int | None, edit: Editor) -> ir.Value:
        if size not in self._made:
            if size.value is not None or axis is None:
                self._made[size] = self.vector(size.value or 0, edit)
            else:
                value, place = self._inputs.get(size, (x, axis))
                self._made[size] = edit.op("Shape", [value], {"start": place, "end": place + 1})
        return self._made[size]


def _has(dim: Dim, size: Dim) -> bool:
    """Whether an axis of size `dim` is one of `size`, or was broadcast to it."""
    return dim == size or _parts(size) <= _parts(dim)


def _parts(dim: Dim) -> set[Dim]:
    symbol = as_symbol(dim)
    return set(symbol.args) if symbol is not None and symbol.op == "broadcast" else {dim}
