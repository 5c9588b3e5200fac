"""Operators that compute elements, as rules of `graphopt.analysis.elements`."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from graphopt.analysis.algebra import cast_target
from graphopt.analysis.conditions import FALSE, TRUE
from graphopt.analysis.dims import Dim
from graphopt.analysis.elements import Binary, Elements, Indices, rule
from graphopt.analysis.leaves import Cases, Element, Leaf, OpaqueError, Poly
from graphopt.graph.constants import is_constant

_SPLIT_FROM = 1e3
"""A float factor this large on an element of an integer tensor makes a mask of it."""


@rule("Range")
def _range(elements: Elements, node: ir.Node, indices: Indices) -> Element:
    start, step = elements.at(node.inputs[0], ()), elements.at(node.inputs[2], ())
    if not isinstance(start, Cases) or not isinstance(step, Cases):
        raise OpaqueError("a Range of booleans")
    real = start.dtype is not None and start.dtype.is_floating_point()
    index: Leaf = Poly.from_dim(indices[0]) if real else indices[0]
    count = elements.numbers.constant(start.dtype, index)
    return _sum(elements, [start, _product(elements, [count, step])], start.dtype)


@rule("Cast CastLike")
def _cast(elements: Elements, node: ir.Node, indices: Indices) -> Element:
    element = elements.at(node.inputs[0], indices)
    target = cast_target(node) if node.op_type == "Cast" else elements.facts.dtype(node.inputs[1])
    if target is None:
        raise OpaqueError("the type that a Cast makes isn't known")
    if target == ir.DataType.BOOL:
        return elements.numbers.condition(element)
    return elements.numbers.number(element, target)


@rule("And BitwiseAnd Or BitwiseOr Xor BitwiseXor Not BitwiseNot")
def _logical(elements: Elements, node: ir.Node, indices: Indices) -> Element:
    parts = [e for e in elements.operands(node, indices) if not isinstance(e, Cases)]
    if len(parts) < len(node.inputs):
        raise OpaqueError("a bitwise operator on integers")
    match node.op_type.removeprefix("Bitwise"):
        case "And":
            return elements.logic.all_of(parts)
        case "Or":
            return elements.logic.any_of(parts)
        case "Not":
            return elements.logic.negate(parts[0])
    return elements.numbers.compare(parts[0], parts[1], "ne")


@rule("Equal Less LessOrEqual Greater GreaterOrEqual")
def _compare(elements: Elements, node: ir.Node, indices: Indices) -> Element:
    a, b = elements.operands(node, indices)
    match node.op_type:
        case "Equal":
            return elements.numbers.compare(a, b, "eq")
        case "Greater":
            return elements.numbers.compare(a, b, "gt")
        case "GreaterOrEqual":
            return elements.numbers.compare(a, b, "ge")
        case "Less":
            return elements.numbers.compare(b, a, "gt")
    return elements.numbers.compare(b, a, "ge")


@rule("Where")
def _where(elements: Elements, node: ir.Node, indices: Indices) -> Element:
    condition = elements.truth(elements.operand(node, 0, indices))
    if condition == TRUE:
        return elements.operand(node, 1, indices)
    if condition == FALSE:
        return elements.operand(node, 2, indices)
    return elements.numbers.choose(condition, elements.operand(node, 1, indices), elements.operand(node, 2, indices))


@rule("IsNaN IsInf")
def _special(elements: Elements, node: ir.Node, indices: Indices) -> Element:
    element = elements.at(node.inputs[0], indices)
    found = []
    if not isinstance(element, Cases) or any(not isinstance(p, Poly) or p.terms for _, p in element.items):
        raise OpaqueError("whether a number that isn't constant is finite")
    for guard, leaf in element.items:
        assert isinstance(leaf, Poly)
        infinite = leaf.constant in (float("inf"), float("-inf"))
        if (leaf.constant != leaf.constant) if node.op_type == "IsNaN" else infinite:
            found.append(guard)
    return elements.logic.any_of(found)


@rule("Add Sub Sum Neg")
def _add(elements: Elements, node: ir.Node, indices: Indices) -> Element:
    parts = elements.operands(node, indices)
    dtype = elements.facts.dtype(node.outputs[0])
    if node.op_type in ("Sub", "Neg"):
        parts[-1] = _product(elements, [parts[-1], _minus_one(elements, dtype)])
    return _sum(elements, parts, dtype)


def _minus_one(elements: Elements, dtype: ir.DataType | None) -> Element:
    real = dtype is not None and dtype.is_floating_point()
    return elements.numbers.constant(dtype, Poly(-1.0) if real else Dim.of(-1))


def _sum(elements: Elements, parts: Sequence[Element], dtype: ir.DataType | None) -> Cases:
    def plus(x: Leaf, y: Leaf) -> Leaf:
        if isinstance(x, Dim) and isinstance(y, Dim):
            return x + y
        if isinstance(x, Poly) and isinstance(y, Poly):
            return x.plus(y, dtype)
        raise OpaqueError("an integer is added to a float")

    return elements.numbers.combine(parts, plus)


def _product(elements: Elements, parts: Sequence[Element]) -> Cases:
    dtype = next((p.dtype for p in parts if isinstance(p, Cases)), None)

    def times(x: Leaf, y: Leaf) -> Leaf:
        if isinstance(x, Dim) and isinstance(y, Dim):
            return x * y
        if isinstance(x, Poly) and isinstance(y, Poly):
            return x.times(y, dtype)
        raise OpaqueError("an integer is multiplied by a float")

    return elements.numbers.combine(parts, times)


@rule("Mul")
def _mul(elements: Elements, node: ir.Node, indices: Indices) -> Element:
    parts = elements.operands(node, indices)
    for k, part in enumerate(parts):
        if isinstance(part, Cases) and any(
            isinstance(leaf, Poly) and not leaf.terms and abs(leaf.constant) >= _SPLIT_FROM for _, leaf in part.items
        ):
            parts = [_split(elements, p) if j != k else p for j, p in enumerate(parts)]
    return _product(elements, parts)


@rule("Div")
def _div(elements: Elements, node: ir.Node, indices: Indices) -> Element:
    parts = elements.operands(node, indices)
    divisor = parts[1].leaf if isinstance(parts[1], Cases) else None
    if not isinstance(divisor, Poly) or divisor.terms or divisor.constant == 0:
        raise OpaqueError("a division by what isn't constant")
    inverse = elements.numbers.constant(
        parts[1].dtype if isinstance(parts[1], Cases) else None, Poly(1 / divisor.constant)
    )
    return _product(elements, [parts[0], inverse])


def _split(elements: Elements, element: Element) -> Element:
    """An element that is linear in one element read from a mask, for both values of that: 1 and 0."""
    if not isinstance(element, Cases):
        return element
    result: Element | None = None
    for guard, leaf in element.items:
        chosen: Element = elements.numbers.constant(element.dtype, leaf)
        if isinstance(leaf, Poly) and leaf.terms:
            symbols = {s for m, _ in leaf.terms for s in m}
            symbol = next(iter(symbols))
            read = elements.reads.get(symbol)
            if len(symbols) == 1 and read is not None and not is_constant(read.value):
                total = leaf.constant + sum(f for _, f in leaf.terms)
                condition = elements.logic.ne(Dim({(symbol,): 1}))
                one = elements.numbers.constant(element.dtype, Poly.of(total))
                zero = elements.numbers.constant(element.dtype, Poly.of(leaf.constant))
                chosen = elements.numbers.choose(condition, one, zero)
                elements.assume(Binary(read.value))
        result = chosen if result is None else elements.numbers.choose(guard, chosen, result)
    return element if result is None else result


@rule("Max Min Clip")
def _extreme(elements: Elements, node: ir.Node, indices: Indices) -> Element:
    parts = elements.operands(node, indices) if node.op_type != "Clip" else []
    if node.op_type == "Clip":
        result = elements.at(node.inputs[0], indices)
        for place, larger in ((1, True), (2, False)):
            if len(node.inputs) > place and node.inputs[place] is not None:
                result = _larger(elements, result, elements.at(node.inputs[place], ()), larger)
        return result
    result = parts[0]
    for part in parts[1:]:
        result = _larger(elements, result, part, node.op_type == "Max")
    return result


def _larger(elements: Elements, a: Element, b: Element, larger: bool) -> Element:
    first = elements.numbers.compare(a, b, "ge") if larger else elements.numbers.compare(b, a, "ge")
    return elements.numbers.choose(first, a, b)


@rule("Log")
def _log(elements: Elements, node: ir.Node, indices: Indices) -> Element:
    """Of a mask of 0 and 1."""
    element = elements.at(node.inputs[0], indices)
    if not isinstance(element, Cases):
        raise OpaqueError("a logarithm of booleans")
    element = (
        element if all(isinstance(p, Poly) and not p.terms for _, p in element.items) else _split(elements, element)
    )
    assert isinstance(element, Cases)
    result = []
    for guard, leaf in element.items:
        if not isinstance(leaf, Poly) or leaf.terms or leaf.constant not in (0.0, 1.0):
            raise OpaqueError("a logarithm of what is no mask")
        result.append((guard, Poly(0.0 if leaf.constant else float("-inf"))))
    return elements.numbers.cases(element.dtype, result)
