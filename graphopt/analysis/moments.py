"""Squares, means and centred values, read off a graph: what normalization layers are made of."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.algebra import attribute_int, cast_target, is_op, other_operand, producer, same, users
from graphopt.graph.constants import constant_array, scalar

_SHAPE_OPERATORS = ("Gather", "Slice", "Unsqueeze", "Squeeze", "Concat", "Cast", "Reshape")
_SHAPE_NODES = 16


@dataclasses.dataclass
class Mean:
    """A mean over some axes.

    Attributes:
        operand: What is averaged.
        axes: The axes as written, None where they aren't constant or not given.
        kept: Whether the reduced axes stay, with length 1.
        view: Where they don't, the Unsqueeze or Reshape that may put them back: ask for its shape.
        count: The divisor where the mean is spelled as a sum, else None.
        nodes: The reduction, and the division where there is one.
        value: The mean.
    """

    operand: ir.Value
    axes: tuple[int, ...] | None
    kept: bool
    count: float | None
    nodes: list[ir.Node]
    value: ir.Value
    view: ir.Node | None = None


@dataclasses.dataclass
class Centred:
    """x − mean(x) as made by the Sub node `node`."""

    x: ir.Value
    mean: Mean
    node: ir.Node


def reduced_axes(node: ir.Node) -> tuple[int, ...] | None:
    """The axes that a Reduce operator names, as written; None where they aren't constant, or none are named."""
    axes: tuple[int, ...] | None = None
    attribute = node.attributes.get("axes")
    if attribute is not None and not attribute.is_ref():
        axes = tuple(attribute.as_ints())
    elif len(node.inputs) > 1 and (array := constant_array(node.inputs[1])) is not None:
        axes = tuple(int(a) for a in array.reshape(-1))
    return axes or None


def read_mean(node: ir.Node) -> Mean | None:
    """The mean that starts at a ReduceMean, or at a ReduceSum or ReduceSumSquare divided by a constant."""
    operand = node.inputs[0]
    if operand is None:
        return None
    total = node.outputs[0]
    mean = Mean(operand, reduced_axes(node), attribute_int(node, "keepdims", 1) == 1, None, [node], total)
    if is_op(node, "ReduceMean"):
        return mean
    for user in users(total):
        if not is_op(user, "Div", "Mul"):
            continue
        divided = user.op_type == "Div"
        factor = scalar(user.inputs[1] if divided else other_operand(user, total))
        if factor is not None and factor > 0 and (not divided or user.inputs[0] is total):
            count = factor if divided else 1.0 / factor
            return dataclasses.replace(mean, count=count, nodes=[node, user], value=user.outputs[0])
    return None


def viewed(mean: Mean) -> Mean:
    """`mean`, with the view that may put the reduced axes back where they aren't kept and there is one."""
    if mean.kept:
        return mean
    view = next((user for user in users(mean.value) if is_op(user, "Unsqueeze", "Reshape")), None)
    if view is None or view.inputs[0] is not mean.value:
        return mean
    return _behind(mean, view)


def _behind(mean: Mean, view: ir.Node) -> Mean:
    nodes = [*mean.nodes, *shape_arithmetic(mean.value, view), view]
    return dataclasses.replace(mean, nodes=nodes, value=view.outputs[0], view=view)


def shape_arithmetic(value: ir.Value, view: ir.Node) -> list[ir.Node]:
    """The nodes between the shape of `value` and the view of it that they are computed for, at most a few."""
    found: dict[ir.Node, None] = {}
    level = [user for user in users(value) if is_op(user, "Shape")]
    while level and len(found) < _SHAPE_NODES:
        found.update(dict.fromkeys(level))
        readers = [user for node in level for user in users(node.outputs[0]) if user is not view]
        level = [user for user in dict.fromkeys(readers) if is_op(user, *_SHAPE_OPERATORS) and user not in found]
    return list(found)


def mean_of(value: ir.Value | None) -> Mean | None:
    """The mean that `value` is, or a view of one whose axes aren't kept; None where it is something else."""
    view = producer(value, "Unsqueeze", "Reshape")
    if view is not None:
        mean = mean_of(view.inputs[0])
        if mean is None or mean.kept or mean.view is not None:
            return None
        return _behind(mean, view)
    node = producer(value, "ReduceMean", "Div", "Mul")
    if node is None or node.op_type == "ReduceMean":
        return None if node is None else read_mean(node)
    for operand in node.inputs:
        total = producer(operand, "ReduceSum")
        if total is not None and (mean := read_mean(total)) is not None and mean.value is value:
            return mean
    return None


def centred(value: ir.Value | None) -> Centred | None:
    """x and its mean where `value` is x − mean(x)."""
    node = producer(value, "Sub")
    if node is None or node.inputs[0] is None:
        return None
    mean = mean_of(node.inputs[1])
    return Centred(node.inputs[0], mean, node) if mean is not None and same(mean.operand, node.inputs[0]) else None


def squared(value: ir.Value | None) -> tuple[ir.Value, list[ir.Node]] | None:
    """`v` and the nodes on the way where `value` is v²: Mul(v, v), Pow(v, 2), either over Abs(v)."""
    node = producer(value, "Mul", "Pow")
    if node is None or len(node.inputs) != 2 or node.inputs[0] is None:
        return None
    base, second = node.inputs
    assert base is not None
    if not (same(base, second) if node.op_type == "Mul" else scalar(second) == 2.0):
        return None
    absolute = producer(base, "Abs")
    if absolute is not None and absolute.inputs[0] is not None:
        return absolute.inputs[0], [absolute, node]
    return base, [node]


def folded(value: ir.Value | None, depth: int = 3) -> npt.NDArray[Any] | None:
    """The numbers of a constant, or of a sum, product or cast of constants that nobody folded yet: Gemma's 1 + w."""
    array = constant_array(value)
    if array is not None or depth == 0:
        return array
    node = producer(value, "Add", "Sub", "Mul", "Cast", "Identity")
    if node is None:
        return None
    operands = [folded(operand, depth - 1) for operand in node.inputs]
    first = operands[0]
    if first is None:
        return None
    if node.op_type == "Identity":
        return first
    if node.op_type == "Cast":
        target = cast_target(node)
        floating = target is not None and target.is_floating_point() and first.dtype.kind != "O"
        return first.astype(target.numpy()) if floating and target is not None else None
    second = operands[1]
    if second is None:
        return None
    operation = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply}[node.op_type]
    result: npt.NDArray[Any] = operation(first, second)
    return result if result.size <= first.size * second.size else None
