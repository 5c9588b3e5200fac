"""An element of a tensor as a function of its indices.

`Elements.at(value, indices)` says what the element of `value` at symbolic indices is, as a function of the indices, of
sizes, and of elements read from other tensors: Range(0, n) at i is i, LessOrEqual(a, b) at (i, j) the condition
b[j] - a[i] ≥ 0, Slice(x, start) at i is x at i + start, Gather(x, k) at i is x at k[i]. Graph inputs and whatever has
no rule are *reads*: a symbol for that tensor at those indices, equal to itself only. So arithmetic on masks is
understood by what it computes, not by how an exporter spells it.

Taken for granted: sizes and integer arithmetic don't overflow. What is needed beyond that is an `Assumption`, kept with
the element: two sizes that broadcast against each other are equal (else one of them is 1), a padding mask holds
nothing but 0 and 1.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import onnx_ir as ir

from graphopt.analysis.conditions import Condition, Logic, TooComplexError
from graphopt.analysis.dim_functions import known
from graphopt.analysis.dims import Dim, Symbol, as_symbol
from graphopt.analysis.leaves import Cases, Element, Numbers, OpaqueError, Poly
from graphopt.analysis.shapes import ShapeFacts
from graphopt.analysis.tables import table
from graphopt.graph.constants import constant_array

Indices: TypeAlias = tuple[Dim, ...]

MAX_DEPTH = 150
MAX_TABLE = 1 << 24
_LIMITS = {ir.DataType.INT64: 63, ir.DataType.INT32: 31, ir.DataType.INT16: 15, ir.DataType.INT8: 7}


@dataclasses.dataclass(frozen=True, slots=True)
class Read:
    """An element of a tensor that isn't followed further."""

    value: ir.Value
    indices: Indices


@dataclasses.dataclass(frozen=True, slots=True)
class SameSize:
    """Two sizes that the graph broadcasts against each other are equal (in a run where they aren't, one is 1)."""

    a: Dim
    b: Dim


@dataclasses.dataclass(frozen=True, slots=True)
class Binary:
    """The tensor holds nothing but 0 and 1."""

    value: ir.Value


Assumption: TypeAlias = SameSize | Binary
Rule: TypeAlias = Callable[["Elements", ir.Node, Indices], Element]
RULES: dict[str, Rule] = {}
"""Rules by operator, of the default domain or "domain::Op"."""


def rule(operators: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule of `operators`."""

    def register(function: Rule) -> Rule:
        for operator in operators.split():
            RULES[operator] = function
        return function

    return register


class Elements:
    """Elements of the values of one model; each is found once.

    Attributes:
        facts: Shapes.
        logic: Conditions.
        numbers: Arithmetic.
        reads: What each symbol that was read stands for.
        obstacles: Why a value isn't followed further, for those that a node makes.
    """

    def __init__(self, facts: ShapeFacts) -> None:
        self.facts = facts
        self.logic = Logic()
        self.numbers = Numbers(self.logic)
        self.reads: dict[Symbol, Read] = {}
        self.obstacles: dict[ir.Value, str] = {}
        self._symbols: dict[tuple[ir.Value, Indices], Symbol] = {}
        self._indices: dict[tuple[str | Dim, ...], Dim] = {}
        self._memo: dict[tuple[ir.Value, Indices], tuple[Element, frozenset[Assumption]]] = {}
        self._assumed: list[set[Assumption]] = [set()]
        self._depth = 0

    def index(self, name: str, size: Dim, *also: Dim) -> Dim:
        """The index symbol `name` of an axis of `size` elements, which is `also` another size; 0 where there is one."""
        if size == 1:
            return Dim.of(0)
        key = (name, size, *also)
        if key not in self._indices:
            made = Dim.unknown(name, 0, max(size.high - 1, 0))
            symbol = as_symbol(made)
            self._indices[key] = made
            if symbol is not None:
                self.logic.last[symbol] = tuple(s - 1 for s in (size, *also))
        return self._indices[key]

    def element(self, value: ir.Value, indices: Sequence[Dim]) -> tuple[Element, frozenset[Assumption]]:
        """The element of `value` at `indices`, and what it is that only under."""
        self._assumed.append(set())
        try:
            found = self.at(value, tuple(indices))
        finally:
            assumed = self._assumed.pop()
        return found, frozenset(assumed)

    def at(self, value: ir.Value | None, indices: Indices) -> Element:
        """The element of `value` at `indices`, for rules: what it assumes is assumed of their result."""
        if value is None:
            raise OpaqueError("an input isn't given")
        shape = self.facts.shape(value)
        if shape is not None and len(shape) == len(indices):
            indices = tuple(Dim.of(0) if d == 1 else i for d, i in zip(shape, indices, strict=True))
        key = (value, indices)
        if key not in self._memo:
            self._assumed.append(set())
            self._depth += 1
            try:
                found = self._find(value, indices)
            except (OpaqueError, TooComplexError) as error:
                self._assumed[-1] = set()
                self.obstacles.setdefault(value, str(error) or "its conditions are too many")
                found = self.read(value, indices)
            finally:
                assumed = self._assumed.pop()
                self._depth -= 1
            self._memo[key] = (self._decided(found, indices), frozenset(assumed))
        found, needs = self._memo[key]
        self._assumed[-1] |= needs
        return found

    def _decided(self, element: Element, indices: Indices) -> Element:
        """`element` without the minima that are decided where there is an element at `indices`: no axis is empty."""
        if not isinstance(element, Cases) or not any(isinstance(leaf, Dim) and leaf.depth for _, leaf in element.items):
            return element
        lasts = self.lasts(indices)
        items = [(guard, known(leaf, lasts) if isinstance(leaf, Dim) else leaf) for guard, leaf in element.items]
        return self.numbers.cases(element.dtype, items)

    def lasts(self, indices: Sequence[Dim]) -> list[Dim]:
        """The last index of each axis that the symbols in `indices` count: not negative where there is an element."""
        found: list[Dim] = []
        for index in indices:
            for symbol in index.symbols():
                for last in self.logic.last.get(symbol, ()):
                    size = as_symbol(last + 1)
                    parts = size.args if size is not None and size.op == "broadcast" else (last + 1,)
                    found += [part - 1 for part in parts]
        return found

    def assume(self, assumption: Assumption) -> None:
        """Note what the element that a rule makes needs."""
        self._assumed[-1].add(assumption)

    def integer(self, value: ir.Value | None, indices: Indices = ()) -> Dim:
        """The element of an integer tensor, where it is the same polynomial in all cases (raises otherwise)."""
        element = self.at(value, indices)
        leaf = element.leaf if isinstance(element, Cases) else None
        if not isinstance(leaf, Dim):
            raise OpaqueError("an index or size depends on a condition")
        return leaf

    def read(self, value: ir.Value, indices: Indices) -> Element:
        """The element of `value` as a symbol."""
        dtype = self.facts.dtype(value) or value.dtype
        key = (value, indices)
        symbol = self._symbols.get(key)
        if symbol is None:
            bits = _LIMITS.get(dtype) if dtype is not None else None
            low = -(1 << bits) if bits else -math.inf
            high = (1 << bits) - 1 if bits else math.inf
            if dtype is not None and dtype in (ir.DataType.BOOL, ir.DataType.UINT8):
                low, high = 0, 1 if dtype == ir.DataType.BOOL else 255
            made = as_symbol(Dim.unknown(f"{value.name}[{', '.join(map(repr, indices))}]", low, high))
            assert made is not None
            symbol = self._symbols[key] = made
            self.reads[symbol] = Read(value, indices)
        dim = Dim({(symbol,): 1})
        if dtype == ir.DataType.BOOL:
            return self.logic.ge(dim - 1)
        if dtype is None or dtype.is_floating_point():
            return self.numbers.constant(dtype, Poly(0.0, frozenset({((symbol,), 1.0)})))
        return self.numbers.constant(dtype, dim)

    # ---- following

    def _find(self, value: ir.Value, indices: Indices) -> Element:
        dtype = self.facts.dtype(value)
        if self._depth > MAX_DEPTH:
            raise OpaqueError("too many operators stand before it")
        fixed = [i.value for i in indices]
        content = self.facts.data(value)
        if content is not None and content.ndim == len(indices):
            picked = {content[tuple(i for i in fixed)]} if None not in fixed else set(content.flat)
            if len(picked) == 1:
                return self._whole(next(iter(picked)), dtype)
        array = constant_array(value, MAX_TABLE)
        if array is not None:
            return table(self.numbers, array, indices, dtype) or self.read(value, indices)
        node = value.producer()
        if node is None or value is not node.outputs[0]:
            return self.read(value, indices)
        entry = RULES.get(node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}")
        if entry is None:
            raise OpaqueError(f"{node.op_type} isn't followed")
        if any(a.is_ref() for a in node.attributes.values()):
            raise OpaqueError("an attribute is set by the caller of the function")
        shape = self.facts.shape(value)
        if shape is None or len(shape) != len(indices):
            raise OpaqueError("its rank isn't known")
        return entry(self, node, indices)

    def _whole(self, dim: Dim, dtype: ir.DataType | None) -> Element:
        if dtype == ir.DataType.BOOL:
            return self.logic.ne(dim)
        if dtype is not None and dtype.is_floating_point():
            return self.numbers.constant(dtype, Poly.from_dim(dim))
        return self.numbers.constant(dtype, dim)

    def operand(self, node: ir.Node, place: int, indices: Indices) -> Element:
        """The element of input `place` of an elementwise node at the `indices` of its output: broadcasting undone."""
        return self.at(node.inputs[place], self.broadcast(node, node.inputs[place], indices))

    def broadcast(self, node: ir.Node, value: ir.Value | None, indices: Indices) -> Indices:
        """The indices at which `value` is read where it is broadcast to the output of `node`."""
        shape, whole = self.facts.shape(value), self.facts.shape(node.outputs[0])
        if shape is None or whole is None or len(shape) > len(indices):
            raise OpaqueError("the shape of an operand isn't known")
        for size, full in zip(reversed(shape), reversed(whole), strict=False):
            if size != 1 and size != full and not size.low >= 2:
                self.assume(SameSize(size, full))
        return indices[len(indices) - len(shape) :]

    def operands(self, node: ir.Node, indices: Indices) -> list[Element]:
        """The elements of all inputs of an elementwise node."""
        return [self.operand(node, place, indices) for place in range(len(node.inputs))]

    def truth(self, element: Element) -> Condition:
        """`element` as a condition."""
        return self.numbers.condition(element)
