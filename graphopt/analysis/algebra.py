"""Scalar algebra read off a graph: the same formula, however an exporter spelled it.

A rule for `0.5 x (1 + erf(x / √2))` shouldn't list the orders in which it can be multiplied out. `expand` turns
the arithmetic below a value into a polynomial in a few chosen values (its atoms), so that a rule compares
coefficients: x·0.5·(1 + t), x·(0.5 + 0.5t), (x + xt)/2 and 0.5x + 0.5xt are one polynomial.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

import ml_dtypes
import numpy as np
import onnx_ir as ir

from graphopt.graph.constants import constant_tensor, scalar

Terms = Mapping[tuple[int, ...], float]
"""A polynomial: the exponents of the atoms, in their order, to the coefficient of that product."""

_Numbers = dict[tuple[int, ...], float]

_MAX_NODES = 24
_MAX_DEGREE = 4


def producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node of the default domain that makes `value`, where its operator is one of `op_types`."""
    node = None if value is None else value.producer()
    return node if node is not None and is_op(node, *op_types) else None


def is_op(node: ir.Node, *op_types: str) -> bool:
    """Whether `node` is one of these operators of the default domain."""
    return node.op_type in op_types and node.domain in ("", "ai.onnx")


def attribute_int(node: ir.Node, name: str, default: int) -> int | None:
    """An integer attribute; `default` where it is absent, None where a function's caller sets it."""
    attribute = node.attributes.get(name)
    if attribute is None:
        return default
    return None if attribute.is_ref() or attribute.type != ir.AttributeType.INT else attribute.as_int()


def source(value: ir.Value) -> ir.Value:
    """The value that `value` copies: Identity, and Cast to the type that its input has, are looked through."""
    while (node := producer(value, "Identity", "Cast")) is not None:
        before = node.inputs[0]
        if before is None:
            return value
        if node.op_type == "Cast" and (before.dtype is None or cast_target(node) != before.dtype):
            return value
        value = before
    return value


def cast_target(node: ir.Node) -> ir.DataType | None:
    """The type that a Cast node makes, None where a function's caller sets it."""
    to = attribute_int(node, "to", 0)
    return None if to is None else ir.DataType(to)


def same(a: ir.Value | None, b: ir.Value | None) -> bool:
    """Whether two values always hold the same numbers, as far as `source` sees."""
    return a is not None and b is not None and source(a) is source(b)


def other_operand(node: ir.Node, value: ir.Value | None) -> ir.Value | None:
    """The operand of a binary node that isn't `value`; `value` itself where both are."""
    if len(node.inputs) != 2:
        return None
    a, b = node.inputs
    return b if a is value else a if b is value else None


def users(value: ir.Value | None) -> list[ir.Node]:
    """The nodes that read `value`, each once."""
    return [] if value is None else list(dict.fromkeys(user for user, _ in value.uses()))


def epsilon_of(dtype: ir.DataType | None) -> float:
    """The spacing of the numbers of a floating-point type at 1 (float32's for an unknown type)."""
    if dtype is None or not dtype.is_floating_point():
        dtype = ir.DataType.FLOAT
    return float(ml_dtypes.finfo(dtype.numpy()).eps)


@dataclasses.dataclass
class Expansion:
    """A value as a polynomial in atoms.

    Attributes:
        terms: Coefficients by exponents; none of them is zero.
        nodes: The nodes that were multiplied out.
        constants: The scalar constants met, exponents left out.
    """

    terms: dict[tuple[int, ...], float]
    nodes: dict[ir.Node, None]
    constants: list[ir.Value]

    @property
    def dtype(self) -> ir.DataType | None:
        """The type that its constants are in, None where there is no constant."""
        tensors = (constant_tensor(value) for value in self.constants)
        return next((t.dtype for t in tensors if t is not None), None)

    def equals(self, target: Terms) -> bool:
        """Whether the coefficients are those of `target`, each rounded to the type that the graph wrote it in.

        Exporters write √½ as the nearest float32. A coefficient is the product of at most a few such numbers, so
        two spacings of the type are allowed and no more: 1.41421 for √2 is another function in float32.
        """
        allowed = 2 * epsilon_of(self.dtype)
        return self.terms.keys() == target.keys() and all(
            abs(self.terms[key] - number) <= allowed * abs(number) for key, number in target.items()
        )


def expand(value: ir.Value, atoms: Sequence[ir.Value]) -> Expansion | None:
    """`value` as a polynomial in `atoms`, None where anything else enters or it grows beyond a small formula.

    Add, Sub, Mul, Neg, Div by a constant and Pow with a whole constant exponent are multiplied out; constants are
    scalars of any rank (see `constant_rank`).
    """
    roots = [source(atom) for atom in atoms]
    result = Expansion({}, {}, [])
    terms = _expand(value, roots, result, {})
    if terms is None:
        return None
    result.terms = {key: number for key, number in terms.items() if number != 0.0}
    return result


def _expand(
    value: ir.Value, atoms: list[ir.Value], result: Expansion, known: dict[ir.Value, _Numbers | None]
) -> _Numbers | None:
    here = source(value)
    for index, atom in enumerate(atoms):
        if here is atom:
            return {tuple(int(i == index) for i in range(len(atoms))): 1.0}
    number = scalar(value)
    if number is not None:
        result.constants.append(value)
        return {(0,) * len(atoms): number}
    node = producer(here, "Add", "Sub", "Mul", "Div", "Neg", "Pow")
    if node is None:
        return None
    # Without this a chain of x + x would be walked once for every path through it.
    if here not in known:
        if len(result.nodes) >= _MAX_NODES:
            return None
        result.nodes[node] = None
        known[here] = _arithmetic(node, atoms, result, known)
    return known[here]


def _arithmetic(
    node: ir.Node, atoms: list[ir.Value], result: Expansion, known: dict[ir.Value, _Numbers | None]
) -> _Numbers | None:
    operands = [v for v in node.inputs if v is not None]
    first = _expand(operands[0], atoms, result, known)
    if first is None:
        return None
    if node.op_type == "Neg":
        return _scaled(first, -1.0)
    if node.op_type == "Pow":
        exponent = scalar(operands[1])
        if exponent is None or exponent not in range(1, _MAX_DEGREE + 1):
            return None
        power = first
        for _ in range(int(exponent) - 1):
            power = _product(power, first)
        return _small(power)
    second = _expand(operands[1], atoms, result, known)
    if second is None:
        return None
    if node.op_type == "Div":
        divisor = second.get((0,) * len(atoms), 0.0)
        return _scaled(first, 1.0 / divisor) if len(second) == 1 and divisor != 0.0 else None
    if node.op_type == "Mul":
        return _small(_product(first, second))
    return _sum(first, second if node.op_type == "Add" else _scaled(second, -1.0))


def _small(terms: _Numbers) -> _Numbers | None:
    return terms if all(sum(key) <= _MAX_DEGREE for key in terms) else None


def _scaled(terms: Terms, factor: float) -> _Numbers:
    return {key: number * factor for key, number in terms.items()}


def _sum(a: Terms, b: Terms) -> _Numbers:
    total = dict(a)
    for key, number in b.items():
        total[key] = total.get(key, 0.0) + number
    return total


def _product(a: Terms, b: Terms) -> _Numbers:
    total: _Numbers = {}
    for left, x in a.items():
        for right, y in b.items():
            key = tuple(i + j for i, j in zip(left, right, strict=True))
            total[key] = total.get(key, 0.0) + x * y
    return total


def below(value: ir.Value, limit: int = _MAX_NODES) -> Iterator[ir.Value]:
    """`value` and the values that its arithmetic reads, nearest first: what may be the atom of a formula."""
    seen: dict[ir.Value, None] = {value: None}
    queue = [value]
    for current in queue:
        yield current
        node = producer(current, "Add", "Sub", "Mul", "Div", "Neg", "Pow")
        for operand in node.inputs if node is not None else ():
            if operand is not None and operand not in seen and len(seen) < limit and scalar(operand) is None:
                seen[operand] = None
                queue.append(operand)


def above(value: ir.Value, limit: int = _MAX_NODES, depth: int = 5) -> Iterator[ir.Node]:
    """The arithmetic of the same graph that reads `value`, nearest first: what may be the root of a formula."""
    seen: dict[ir.Node, None] = {}
    level = [value]
    for _ in range(depth):
        found: list[ir.Value] = []
        for current in level:
            for node in users(current):
                if node in seen or len(seen) >= limit:
                    continue
                if is_op(node, "Add", "Sub", "Mul", "Div", "Neg") and node.graph is value.graph:
                    seen[node] = None
                    found.append(node.outputs[0])
                    yield node
        level = found


def escaping(nodes: Iterable[ir.Node], root: ir.Node) -> ir.Value | None:
    """A value made inside the formula that something outside it reads too, None where there is none.

    Rewriting such a formula would compute that part twice.
    """
    inside = dict.fromkeys([*nodes, root])
    for node in inside:
        if node is root:
            continue
        for value in node.outputs:
            if value.is_graph_output() or any(user not in inside for user, _ in value.uses()):
                return value
    return None


def constant_rank(nodes: Iterable[ir.Node]) -> int:
    """The highest rank among the one-element constants that arithmetic reads.

    A constant of shape [1, 1] makes a vector a matrix, so a formula may drop it only where the rank is no lower anyway.
    """
    rank = 0
    for node in nodes:
        if is_op(node, "Add", "Sub", "Mul", "Div", "Pow", "Max", "Min"):
            tensors = [constant_tensor(value) for value in node.inputs]
            rank = max([rank, *(len(tensor.shape) for tensor in tensors if tensor is not None and tensor.size == 1)])
    return rank


def as_float32(number: float) -> float | None:
    """`number` where it is a float32 exactly (what a FLOAT attribute can hold), else None."""
    return number if float(np.float32(number)) == number else None
