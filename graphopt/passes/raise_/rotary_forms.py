"""What each element of a vector is made of: the algebra that `raise-rotary` reads rotations off.

Slices, halves, strides, concatenations, reshapes and signs only move elements of the last axis about. So instead of
chains of operators, a value is described element by element: each is a sum of terms

    sign · x[i] · table[j]          sign ∈ {-1, 0, 1}; x or the table may be absent

where x is one chosen value and a table anything that is multiplied with it (cos and sin of the positions). A form is
an integer array of the shape (terms, 4, *elements); its four rows are sign, index in x, table, index in the table. Every
operator that moves elements is then one numpy call on the trailing axes.

The leading axes (batch, heads, positions) are the same for all elements. A table says for each of them which axis of its
own stands there, or that it is broadcast.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.algebra import attribute_int, cast_target, is_op, source
from graphopt.analysis.shapes import ShapeFacts
from graphopt.graph.constants import constant_array, is_constant, scalar

Form = npt.NDArray[np.int64]
Lead = tuple[int | None, ...]

SIGN, X, TABLE, INDEX = range(4)
_MAX_NODES = 64
_MAX_TERMS = 4
_MAX_ELEMENTS = 1 << 13


@dataclasses.dataclass(frozen=True)
class Step:
    """An operator applied to every element of a table alike.

    Attributes:
        op_type: Cos, Sin, Cast, Mul or Div.
        operand: The constant of one element that Mul and Div take.
        to: The type that Cast makes.
    """

    op_type: str
    operand: ir.Value | None = None
    to: ir.DataType | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """A value, with operators applied to every element alike.

    Attributes:
        base: The value; elements are counted along its axes from `first` on.
        first: The first axis of its elements.
        steps: What is applied to them, in order.
        lead: For each leading axis of the described value the axis of `base` there; None: broadcast.
    """

    base: ir.Value
    first: int
    steps: tuple[Step, ...]
    lead: Lead


class Forms:
    """Forms of the values between a chosen `x` and what is computed from it."""

    def __init__(self, facts: ShapeFacts, x: ir.Value | None, tables: dict[Table, int]) -> None:
        self.x, self.nodes = x, dict[ir.Node, None]()
        self._facts, self._numbers = facts, tables
        self._tables = list(tables)
        self._known: dict[tuple[ir.Value, int], Form | None] = {}

    @property
    def tables(self) -> Sequence[Table]:
        """The tables by number."""
        return self._tables

    def of(self, value: ir.Value, lead: int) -> Form | None:
        """The form of `value` with `lead` leading axes; None where its elements can't be counted."""
        value = source(value)
        key = value, lead
        if key not in self._known:
            self._known[key] = None
            self._known[key] = self._made(value, lead)
        return self._known[key]

    def _made(self, value: ir.Value, lead: int) -> Form | None:
        if value is self.x:
            return self._x(value, lead)
        if is_constant(value):
            return self._constant(value, lead)
        node = value.producer()
        if node is not None and node.domain in ("", "ai.onnx") and len(self.nodes) < _MAX_NODES:
            rule = _RULES.get(node.op_type)
            if rule is not None and all(v is not None for v in node.inputs):
                self.nodes[node] = None
                form = rule(self, node, value, lead)
                if form is not None:
                    return form if len(form) <= _MAX_TERMS else None
        return self._atom(value, lead)

    # ---- leaves

    def _x(self, value: ir.Value, lead: int) -> Form | None:
        elements = self.elements(value, lead)
        if elements is None or lead != (self._rank(value) or 0) - 1:
            return None
        count = int(np.prod(elements))
        return _form(1, np.arange(count).reshape(elements), -1, 0)

    def _atom(self, value: ir.Value, lead: int) -> Form | None:
        elements = self.elements(value, lead)
        if elements is None:
            return None
        table = self._number(Table(value, lead, (), tuple(range(lead))))
        return _form(1, -1, table, np.arange(int(np.prod(elements))).reshape(elements))

    def _constant(self, value: ir.Value, lead: int) -> Form | None:
        """A constant: signs where it holds nothing else, else a table in which equal and opposite columns are one."""
        array = constant_array(value)
        elements = self.elements(value, lead)
        if array is None or elements is None or array.dtype.kind not in "fV":
            return self._atom(value, lead)
        numbers = np.asarray(array, dtype=np.float64)
        if int(np.prod(array.shape[:lead])) == 1 and np.isin(numbers, (-1.0, 0.0, 1.0)).all():
            return _form(numbers.reshape(elements).astype(np.int64), -1, -1, 0)
        columns = numbers.reshape(-1, int(np.prod(elements))).T + 0.0  # no negative zeros
        signs, index = _columns(columns)
        table = self._number(Table(value, lead, (), tuple(range(lead))))
        return _form(signs.reshape(elements), -1, table, index.reshape(elements))

    def _number(self, table: Table) -> int:
        if table not in self._numbers:
            self._numbers[table] = len(self._numbers)
        if len(self._tables) < len(self._numbers):
            self._tables = list(self._numbers)
        return self._numbers[table]

    # ---- shapes

    def elements(self, value: ir.Value, lead: int) -> tuple[int, ...] | None:
        """The sizes of the axes of `value` from `lead` on."""
        shape = self._facts.shape(value)
        if shape is None or len(shape) < lead:
            return None
        sizes = tuple(dim.value for dim in shape[lead:])
        if any(size is None for size in sizes) or not 0 < int(np.prod([s or 0 for s in sizes])) <= _MAX_ELEMENTS:
            return None
        return tuple(size or 0 for size in sizes)

    def _rank(self, value: ir.Value) -> int | None:
        shape = self._facts.shape(value)
        return None if shape is None else len(shape)

    # ---- leading axes

    def _relead(self, form: Form | None, lead: int, sources: Sequence[int | None]) -> Form | None:
        """`form` with other leading axes: the i-th was number `sources[i]` of `lead`, or is new and broadcast."""
        if form is None or list(sources) == list(range(lead)):
            return form
        if (form[:, X] >= 0).any():
            return None  # x has the leading axes that it has
        result = form.copy()
        for number in np.unique(form[:, TABLE]):
            if number >= 0:
                table = self._tables[number]
                axes = tuple(None if s is None else table.lead[s] for s in sources)
                moved = self._number(dataclasses.replace(table, lead=axes))
                result[:, TABLE][form[:, TABLE] == number] = moved
        return result

    def _stepped(self, form: Form | None, step: Step) -> Form | None:
        """`form`, which must be made of tables alone, with an operator applied to every element."""
        if form is None or len(form) != 1 or (form[0, X] >= 0).any() or (form[0, TABLE] < 0).any():
            return None
        if step.op_type in ("Cos", "Sin") and (form[0, SIGN] != 1).any():
            return None
        result = form.copy()
        for number in np.unique(form[0, TABLE]):
            table = self._tables[number]
            further = self._number(dataclasses.replace(table, steps=(*table.steps, step)))
            result[0, TABLE][form[0, TABLE] == number] = further
        return result

    # ---- operators

    def _operands(self, node: ir.Node, value: ir.Value, lead: int) -> Iterator[Form | None]:
        """The forms of the operands of an elementwise operator, their leading axes aligned to those of the result."""
        rank = self._rank(value)
        for operand in node.inputs:
            assert operand is not None
            own = self._rank(operand)
            if rank is None or own is None:
                yield None
                continue
            its_lead = max(own - (rank - lead), 0)
            missing = lead - its_lead
            yield self._relead(
                self.of(operand, its_lead), its_lead, [i - missing if i >= missing else None for i in range(lead)]
            )

    def _sum(self, node: ir.Node, value: ir.Value, lead: int) -> Form | None:
        a, b = self._operands(node, value, lead)
        if a is None or b is None or a.shape[2:] != b.shape[2:]:
            return None
        if node.op_type == "Sub":
            b = _negated(b)
        if not (_of_x(a) and _of_x(b)):
            return None
        return _packed(np.concatenate([a, b]))

    def _product(self, node: ir.Node, value: ir.Value, lead: int) -> Form | None:
        a, b = node.inputs
        for one, other in ((a, b), (b, a)):
            number = scalar(one)
            if number is not None and abs(number) != 1.0 and one is not None and other is not None:
                if node.op_type == "Div" and one is a:
                    return None
                fitting = (self._rank(one) or 0) <= (self._rank(other) or 0)
                return self._stepped(self.of(other, lead), Step(node.op_type, one)) if fitting else None
        if node.op_type == "Div":
            return None
        first, second = self._operands(node, value, lead)
        return None if first is None or second is None else _multiplied(first, second)

    def _negative(self, node: ir.Node, value: ir.Value, lead: int) -> Form | None:
        del value
        form = self.of(_input(node), lead)
        return None if form is None else _negated(form)

    def _step(self, node: ir.Node, value: ir.Value, lead: int) -> Form | None:
        del value
        to = cast_target(node) if node.op_type == "Cast" else None
        if node.op_type == "Cast" and (to is None or not to.is_floating_point()):
            return None
        if node.op_type == "Cast":
            dtype = self._facts.dtype(_input(node))
            if dtype is None or not dtype.is_floating_point():
                return None
        return self._stepped(self.of(_input(node), lead), Step(node.op_type, to=to))

    def _slice(self, node: ir.Node, value: ir.Value, lead: int) -> Form | None:
        del value
        rank = self._rank(_input(node))
        vectors = [constant_array(v) for v in node.inputs[1:]]
        if rank is None or len(vectors) < 2 or any(v is None for v in vectors):
            return None
        starts, ends = ([int(n) for n in np.ravel(v)] for v in vectors[:2])  # type: ignore[arg-type]
        axes = [int(n) for n in np.ravel(vectors[2])] if len(vectors) > 2 else list(range(len(starts)))  # type: ignore[arg-type]
        steps = [int(n) for n in np.ravel(vectors[3])] if len(vectors) > 3 else [1] * len(starts)  # type: ignore[arg-type]
        form = self.of(_input(node), lead)
        if form is None:
            return None
        for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
            axis %= rank
            if axis < lead:
                if start != 0 or step != 1 or end < (1 << 31) - 1:
                    return None
                continue
            place = axis - lead + 2
            form = form[(slice(None),) * place + (slice(start, end, step),)]
        return form if form.size else None

    def _split(self, node: ir.Node, value: ir.Value, lead: int) -> Form | None:
        rank, axis = self._rank(_input(node)), attribute_int(node, "axis", 0)
        if rank is None or axis is None or (axis % rank) < lead:
            return None
        form = self.of(_input(node), lead)
        if form is None:
            return None
        place, which = axis % rank - lead + 2, value.index()
        given = constant_array(node.inputs[1]) if len(node.inputs) > 1 else None
        if len(node.inputs) > 1 and given is None:
            return None
        parts = len(node.outputs)
        size = -(-form.shape[place] // parts)
        sizes = [size] * parts if given is None else [int(n) for n in given]
        start = sum(sizes[: which or 0])
        return form[(slice(None),) * place + (slice(start, start + sizes[which or 0]),)]

    def _gather(self, node: ir.Node, value: ir.Value, lead: int) -> Form | None:
        del value
        rank, axis = self._rank(_input(node)), attribute_int(node, "axis", 0)
        index = constant_array(node.inputs[1])
        if rank is None or axis is None or index is None or (axis % rank) < lead:
            return None
        form = self.of(_input(node), lead)
        if form is None:
            return None
        size = form.shape[axis % rank - lead + 2]
        if index.size == 0 or index.min() < -size or index.max() >= size:
            return None
        return np.take(form, np.asarray(index, dtype=np.int64), axis=axis % rank - lead + 2)

    def _concat(self, node: ir.Node, value: ir.Value, lead: int) -> Form | None:
        rank, axis = self._rank(value), attribute_int(node, "axis", 0)
        if rank is None or axis is None or (axis % rank) < lead:
            return None
        forms = [None if v is None else self.of(v, lead) for v in node.inputs]
        if any(form is None for form in forms):
            return None
        known = [form for form in forms if form is not None]
        terms = max(len(form) for form in known)
        padded = [_lengthened(form, terms) for form in known]
        return np.concatenate(padded, axis=axis % rank - lead + 2)

    def _reshape(self, node: ir.Node, value: ir.Value, lead: int) -> Form | None:
        """Reshape, Squeeze, Unsqueeze and Flatten: elements keep their order, leading axes of size 1 come and go."""
        before, after = self._facts.shape(_input(node)), self._facts.shape(value)
        elements = self.elements(value, lead)
        if before is None or after is None or elements is None:
            return None
        kept = [axis for axis in range(lead) if after[axis] != 1]
        count = int(np.prod(elements))
        for own in reversed(range(len(before) + 1)):
            inner = self.elements(_input(node), own)
            if inner is None or int(np.prod(inner)) != count:
                continue
            old = [axis for axis in range(own) if before[axis] != 1]
            if len(old) != len(kept) or any(before[o] != after[k] for o, k in zip(old, kept, strict=True)):
                continue
            sources: list[int | None] = [None] * lead
            if own == lead and all(before[i] == after[i] for i in range(lead)):
                sources = list(range(lead))
            else:
                for o, k in zip(old, kept, strict=True):
                    sources[k] = o
            form = self._relead(self.of(_input(node), own), own, sources)
            if form is not None:
                return form.reshape(*form.shape[:2], *elements)
        return None

    def _expand(self, node: ir.Node, value: ir.Value, lead: int) -> Form | None:
        """An Expand, or what a Tile does that is one; a Tile that repeats elements in blocks is counted too."""
        before, after = self._facts.shape(_input(node)), self._facts.shape(value)
        elements = self.elements(value, lead)
        if before is None or after is None or elements is None:
            return None
        own = max(lead + len(before) - len(after), 0)
        missing = lead - own
        form = self.of(_input(node), own)
        if form is None:
            return None
        for axis in range(own):
            if before[axis] != after[axis + missing] and before[axis] != 1:
                return None
        if any((form[:, X] >= 0).ravel()) and any(before[i] != after[i + missing] for i in range(own)):
            return None
        form = self._relead(form, own, [i - missing if i >= missing else None for i in range(lead)])
        if form is None:
            return None
        if node.op_type == "Tile":
            form = form.reshape(*form.shape[:2], *[1] * (len(elements) - (form.ndim - 2)), *form.shape[2:])
            return np.tile(form, [1, 1, *(n // m for n, m in zip(elements, form.shape[2:], strict=True))])
        return np.broadcast_to(form, (*form.shape[:2], *elements)) if _fits(form.shape[2:], elements) else None

    def _transpose(self, node: ir.Node, value: ir.Value, lead: int) -> Form | None:
        del value
        rank, attribute = self._rank(_input(node)), node.attributes.get("perm")
        if rank is None or attribute is None or attribute.is_ref():
            return None
        perm = list(attribute.as_ints())
        if any(axis >= lead for axis in perm[:lead]):
            return None
        form = self.of(_input(node), lead)
        if form is None:
            return None
        form = form.transpose(0, 1, *(axis - lead + 2 for axis in perm[lead:]))
        return self._relead(form, lead, perm[:lead])


_NONE = np.array([0, -1, -1, 0], dtype=np.int64)

Rule = Callable[[Forms, ir.Node, ir.Value, int], "Form | None"]

_RULES: Mapping[str, Rule] = {
    "Add": Forms._sum, "Sub": Forms._sum, "Mul": Forms._product, "Div": Forms._product, "Neg": Forms._negative,
    "Cos": Forms._step, "Sin": Forms._step, "Cast": Forms._step, "Slice": Forms._slice, "Split": Forms._split,
    "Gather": Forms._gather, "Concat": Forms._concat, "Reshape": Forms._reshape, "Squeeze": Forms._reshape,
    "Unsqueeze": Forms._reshape, "Flatten": Forms._reshape, "Expand": Forms._expand, "Tile": Forms._expand,
    "Transpose": Forms._transpose,
}  # fmt: skip


def _input(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value


def _form(sign: npt.ArrayLike, x: npt.ArrayLike, table: npt.ArrayLike, index: npt.ArrayLike) -> Form:
    return np.stack(np.broadcast_arrays(sign, x, table, index)).astype(np.int64)[None]


def _columns(columns: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """For every row the first that is equal to it or to its negative, and which of the two."""
    seen: dict[bytes, int] = {}
    signs, index = np.ones(len(columns), np.int64), np.arange(len(columns))
    for i, column in enumerate(columns):
        same, opposite = seen.get(column.tobytes()), seen.get((0.0 - column).tobytes())
        if same is not None:
            index[i] = same
        elif opposite is not None:
            index[i], signs[i] = opposite, -1
        else:
            seen[column.tobytes()] = i
    return signs, index


def _negated(form: Form) -> Form:
    result = form.copy()
    result[:, SIGN] *= -1
    return result


def _of_x(form: Form) -> bool:
    """Whether every term has x in it."""
    return bool(((form[:, X] >= 0) | (form[:, SIGN] == 0)).all())


def _lengthened(form: Form, terms: int) -> Form:
    nothing = np.broadcast_to(_NONE.reshape((1, 4) + (1,) * (form.ndim - 2)), (terms - len(form), *form.shape[1:]))
    return np.concatenate([form, nothing])


def _multiplied(a: Form, b: Form) -> Form | None:
    if len(a) * len(b) > _MAX_TERMS:
        return None
    shape = _broadcast(a.shape[2:], b.shape[2:])
    if shape is None:
        return None
    a = a.reshape(*a.shape[:2], *[1] * (len(shape) - (a.ndim - 2)), *a.shape[2:])
    b = b.reshape(*b.shape[:2], *[1] * (len(shape) - (b.ndim - 2)), *b.shape[2:])
    terms = []
    for one in a:
        for other in b:
            one, other = (np.broadcast_to(f, (4, *shape)) for f in (one, other))
            there = one[SIGN] * other[SIGN] != 0
            if (there & (((one[X] >= 0) & (other[X] >= 0)) | ((one[TABLE] >= 0) & (other[TABLE] >= 0)))).any():
                return None
            term = np.stack(
                [
                    one[SIGN] * other[SIGN],
                    np.maximum(one[X], other[X]),
                    np.maximum(one[TABLE], other[TABLE]),
                    np.where(one[TABLE] >= 0, one[INDEX], other[INDEX]),
                ]
            )
            term[:, ~there] = _NONE[:, None]
            terms.append(term)
    return np.stack(terms)


def _packed(form: Form) -> Form:
    """`form` with the terms that are there first and those that no element has left out."""
    order = np.argsort(form[:, SIGN] == 0, axis=0, kind="stable")
    form = np.take_along_axis(form, order[:, None], axis=0)
    used = (form[:, SIGN] != 0).reshape(len(form), -1).any(axis=1)
    return form[: max(int(used.sum()), 1)]


def _broadcast(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...] | None:
    try:
        return np.broadcast_shapes(a, b)
    except ValueError:
        return None


def _fits(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return _broadcast(a, b) == b
