"""What is known of the outputs of If, Loop and Scan."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import onnx_ir as ir

from graphopt.analysis.dims import Dim
from graphopt.analysis.shapes.rule import NOTHING, Fact, Op, UnknownShapeError

if TYPE_CHECKING:
    from graphopt.analysis.shapes.facts import ShapeFacts


def _graph(op: Op, name: str) -> ir.Graph:
    attribute = op.node.attributes.get(name)
    if attribute is None or attribute.is_ref():
        raise UnknownShapeError
    return attribute.as_graph()


def join(a: Fact, b: Fact, op: Op) -> Fact:
    """What holds where either `a` or `b` does."""
    dtype = a.dtype if a.dtype == b.dtype else None
    if a.shape is None or b.shape is None or len(a.shape) != len(b.shape):
        return Fact(dtype)
    shape = tuple(
        x if x == y else op.unknown(int(min(x.low, y.low, 1)) if min(x.low, y.low) > 0 else 0)
        for x, y in zip(a.shape, b.shape, strict=True)
    )
    same = (
        a.content is not None
        and b.content is not None
        and a.content.shape == b.content.shape
        and all(x == y for x, y in zip(a.content.flat, b.content.flat, strict=True))
    )
    return Fact(dtype, shape, a.content if same else None)


def _if(facts: ShapeFacts, op: Op) -> list[Fact]:
    branches = [_graph(op, name) for name in ("then_branch", "else_branch")]
    condition = op.fact(0).content
    if condition is not None and condition.size and (decided := condition.flat[0].value) is not None:
        branches = [branches[0] if decided else branches[1]]
    results = [[facts.fact(value) for value in branch.outputs] for branch in branches]
    if len(results) == 1:
        return results[0]
    return [join(a, b, op) for a, b in zip(*results, strict=True)]


def _constant_sizes(fact: Fact, op: Op) -> list[Dim] | None:
    """The sizes of a value of a loop's body that are the same in each iteration: the constants, no symbols."""
    if fact.shape is None:
        return None
    return [d if d.value is not None else op.unknown() for d in fact.shape]


def _loop(facts: ShapeFacts, op: Op) -> list[Fact]:
    body = _graph(op, "body")
    carried = len(op.facts) - 2
    results = [Fact(op.fact(i + 2).dtype) for i in range(carried)]
    for value in list(body.outputs)[1 + carried :]:
        fact = facts.fact(value)
        sizes = _constant_sizes(fact, op)
        results.append(Fact(fact.dtype, None if sizes is None else (op.unknown(), *sizes)))
    return results


def _scan(facts: ShapeFacts, op: Op) -> list[Fact]:
    if op.opset < 9:  # an older form with a batch axis
        return []
    body, count = _graph(op, "body"), op.integer("num_scan_inputs")
    states = len(op.facts) - count
    results = [Fact(op.fact(i).dtype) for i in range(states)]
    axes = op.integers("scan_output_axes")
    for i, value in enumerate(list(body.outputs)[states:]):
        fact = facts.fact(value)
        sizes = _constant_sizes(fact, op)
        if sizes is not None:
            axis = axes[i] if axes else 0
            sizes.insert(axis if axis >= 0 else len(sizes) + 1 + axis, op.unknown())
        results.append(Fact(fact.dtype, None if sizes is None else tuple(sizes)))
    return results


def _opaque(facts: ShapeFacts, op: Op) -> list[Fact]:
    return [NOTHING] * len(op.node.outputs)


RULES: dict[str, Callable[[ShapeFacts, Op], list[Fact]]] = {
    "If": _if,
    "Loop": _loop,
    "Scan": _scan,
    "SequenceMap": _opaque,
}
