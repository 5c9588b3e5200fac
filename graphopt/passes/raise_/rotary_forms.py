"""What each element of a vector is made of: the algebra that `raise-rotary` reads rotations off.

Slices, halves, strides, concatenations, reshapes and signs only move elements of the last axis about. So instead of
chains of operators, a value is described element by element: each is a sum of terms

    sign · x[i] · table[j]          sign ∈ {-1, 0, 1}; x or the table may be absent

where x is one chosen value and a table anything that is multiplied with it (cos and sin of the positions). An operator
that moves elements is then one numpy call on the trailing axes of an array (see `rotary_terms`).

The leading axes (batch, heads, positions) are the same for all elements. A table says for each of them which axis of
its own stands there, or that it is broadcast.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.analysis.algebra import source
from graphopt.analysis.shapes import ShapeFacts
from graphopt.graph.constants import constant_array, is_constant
from graphopt.passes.raise_.rotary_terms import MAX_TERMS, SIGN, TABLE, Form, X, columns_of, fits, term

Lead = tuple[int | None, ...]

_MAX_NODES = 64
_MAX_ELEMENTS = 1 << 13
_MAX_CONSTANT = 1 << 24
"""Elements up to which a constant is searched for equal columns."""


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


class Tables(list[Table]):
    """The tables met, each once; forms name them by number.

    Attributes:
        columns: Sign, and place of the first equal column, of each column of the constants met; no places where the
            constant is signs.
    """

    def __init__(self) -> None:
        super().__init__()
        self._numbers: dict[Table, int] = {}
        self.columns: dict[tuple[ir.Value, int], tuple[Form, Form | None]] = {}

    def number(self, table: Table) -> int:
        """The number of `table`."""
        number = self._numbers.setdefault(table, len(self))
        if number == len(self):
            self.append(table)
        return number


Rule = Callable[["Forms", ir.Node, ir.Value, int], "Form | None"]


class Forms:
    """Forms of the values between a chosen vector and what is computed from it.

    Attributes:
        x: The vector.
        tables: The tables met.
        nodes: The nodes met.
        facts: The shapes.
    """

    def __init__(self, facts: ShapeFacts, x: ir.Value | None, tables: Tables, rules: Mapping[str, Rule]) -> None:
        self.facts, self.x, self.tables, self.nodes = facts, x, tables, dict[ir.Node, None]()
        self._rules = rules
        self._known: dict[tuple[ir.Value, int], Form | None] = {}

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
            rule = self._rules.get(node.op_type)
            if rule is not None and all(v is not None for v in node.inputs):
                self.nodes[node] = None
                form = rule(self, node, value, lead)
                if form is not None:
                    return form if len(form) <= MAX_TERMS else None
        return self._atom(value, lead)

    # ---- leaves

    def _x(self, value: ir.Value, lead: int) -> Form | None:
        elements = self.elements(value, lead)
        if elements is None or lead != (self.rank(value) or 0) - 1:
            return None
        count = int(np.prod(elements))
        return term(1, np.arange(count).reshape(elements), -1, 0)

    def _atom(self, value: ir.Value, lead: int) -> Form | None:
        elements = self.elements(value, lead)
        if elements is None:
            return None
        return term(1, -1, self._plain(value, lead), np.arange(int(np.prod(elements))).reshape(elements))

    def _constant(self, value: ir.Value, lead: int) -> Form | None:
        """A constant: signs where it holds nothing else, else a table in which equal and opposite columns are one."""
        elements = self.elements(value, lead)
        if elements is None:
            return None
        key = value, lead
        if key not in self.tables.columns:
            array = constant_array(value, _MAX_CONSTANT)
            if array is None or array.dtype.kind not in "fV":
                return self._atom(value, lead)
            if array.dtype.kind == "V":  # bfloat16
                array = array.astype(np.float32)
            columns = array.reshape(-1, int(np.prod(elements))).T
            if len(columns[0]) == 1 and np.isin(columns, (-1.0, 0.0, 1.0)).all():
                self.tables.columns[key] = columns.astype(np.int64).ravel(), None
            else:
                self.tables.columns[key] = columns_of(columns)
        signs, index = self.tables.columns[key]
        if index is None:
            return term(signs.reshape(elements), -1, -1, 0)
        return term(signs.reshape(elements), -1, self._plain(value, lead), index.reshape(elements))

    def alike(self, value: ir.Value, lead: int, *sources: Form | None) -> Form | None:
        """`value` as a table in which elements that are computed alike, from equal elements of `sources`, are one."""
        elements = self.elements(value, lead)
        if elements is None:
            return None
        keys = []
        for form in sources:
            shape = None if form is None or len(form) != 1 or (form[0, X] >= 0).any() else form.shape[2:]
            if form is None or shape is None or not fits(shape, elements):
                return None
            keys.append(
                np.broadcast_to(form[0].reshape(4, *[1] * (len(elements) - len(shape)), *shape), (4, *elements))
            )
        rows = np.concatenate(keys).reshape(4 * len(keys), -1).T
        _, first, inverse = np.unique(rows, axis=0, return_index=True, return_inverse=True)
        return term(1, -1, self._plain(value, lead), first[inverse.ravel()].reshape(elements))

    def _plain(self, value: ir.Value, lead: int) -> int:
        return self.tables.number(Table(value, lead, (), tuple(range(lead))))

    # ---- shapes

    def elements(self, value: ir.Value, lead: int) -> tuple[int, ...] | None:
        """The sizes of the axes of `value` from `lead` on."""
        shape = self.facts.shape(value)
        if shape is None or len(shape) < lead:
            return None
        sizes = tuple(dim.value for dim in shape[lead:])
        if any(size is None for size in sizes) or not 0 < int(np.prod([s or 0 for s in sizes])) <= _MAX_ELEMENTS:
            return None
        return tuple(size or 0 for size in sizes)

    def rank(self, value: ir.Value) -> int | None:
        """The number of axes of `value`."""
        shape = self.facts.shape(value)
        return None if shape is None else len(shape)

    # ---- leading axes

    def relead(self, form: Form | None, lead: int, sources: Sequence[int | None]) -> Form | None:
        """`form` with other leading axes: the i-th was number `sources[i]` of `lead`, or is new and broadcast."""
        if form is None or list(sources) == list(range(lead)):
            return form
        if (form[:, X] >= 0).any():
            return None  # x has the leading axes that it has
        result = form.copy()
        for number in np.unique(form[:, TABLE]):
            if number >= 0:
                table = self.tables[number]
                axes = tuple(None if s is None else table.lead[s] for s in sources)
                moved = self.tables.number(dataclasses.replace(table, lead=axes))
                result[:, TABLE][form[:, TABLE] == number] = moved
        return result

    def stepped(self, form: Form | None, step: Step) -> Form | None:
        """`form`, which must be made of tables alone, with an operator applied to every element."""
        if form is None or len(form) != 1 or (form[0, X] >= 0).any() or (form[0, TABLE] < 0).any():
            return None
        if step.op_type in ("Cos", "Sin") and (form[0, SIGN] != 1).any():
            return None
        result = form.copy()
        for number in np.unique(form[0, TABLE]):
            table = self.tables[number]
            further = self.tables.number(dataclasses.replace(table, steps=(*table.steps, step)))
            result[:, TABLE][form[:, TABLE] == number] = further
        return result
