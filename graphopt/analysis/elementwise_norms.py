"""The normalizations without a reduction that stand in for LayerNorm in norm-free transformers, read off a graph.

    Dynamic Tanh:             y = γ · tanh(α x) + β
    elementwise LayerNorm:    y = γ · x / √(x² + c) + β

Both bound each element by itself. The second is what the first approximates: a LayerNorm, seen from one element, with
the sum of squares of the others as the constant c.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.algebra import below, escaping, expand, is_op, other_operand, source, users
from graphopt.analysis.clamps import affine_of
from graphopt.analysis.moments import folded
from graphopt.graph.constants import scalar
from graphopt.graph.edits import nodes

Numbers = npt.NDArray[Any]

ANCHORS = ("Tanh", "Sqrt", "Pow")
"""The operators that such a norm has one of."""


@dataclasses.dataclass
class ElementwiseNorm:
    """One site.

    Attributes:
        kind: "tanh" for γ · tanh(α x) + β, "root" for γ · x / √(x² + c) + β.
        x: The input.
        constant: α, or c.
        gain: γ, in float64: at most one axis has more than one element.
        bias: β, in the same way; zero where there is none.
        nodes: The nodes of the site, from x to the result.
        root: The last of them.
    """

    kind: Literal["tanh", "root"]
    x: ir.Value
    constant: float
    gain: Numbers
    bias: Numbers
    nodes: list[ir.Node]
    root: ir.Node

    @property
    def is_canonical(self) -> bool:
        """Whether it is written in the one form, with each constant once: [Mul,] Tanh [, Mul] [, Add] and so on."""
        written = ["Mul", "Add", "Sqrt", "Div"] if self.kind == "root" else ["Tanh"]
        if self.kind == "tanh" and self.constant != 1.0:
            written.insert(0, "Mul")
        written += ["Mul"] * bool((self.gain != 1).any()) + ["Add"] * bool((self.bias != 0).any())
        return [node.op_type for node in self.nodes] == written


def elementwise_norms(model: ir.Model) -> Iterator[ElementwiseNorm]:
    """The element-wise norms of a model, its subgraphs and functions."""
    for node in nodes(model):
        if is_op(node, *ANCHORS) and (norm := read_norm(node)) is not None:
            yield norm


def read_norm(node: ir.Node) -> ElementwiseNorm | None:
    """The norm around a Tanh, or around the root of x² + c; None where it is something else.

    A tanh without a gain for each channel is an activation, and no norm.
    """
    norm = _tanh(node) if node.op_type == "Tanh" else _root(node)
    if norm is None:
        return None
    _follow(norm)
    return None if norm.kind == "tanh" and norm.gain.size == 1 else norm


def _tanh(node: ir.Node) -> ElementwiseNorm | None:
    x, alpha, inside = node.inputs[0], 1.0, [node]
    if x is None:
        return None
    while (step := _scale(x, node)) is not None:
        x, alpha = step[0], alpha * step[1]
        inside.insert(0, step[2])
    one = np.ones(())
    # tanh is odd: the sign of α goes to γ.
    return ElementwiseNorm("tanh", x, abs(alpha), one * math.copysign(1.0, alpha), 0 * one, inside, node)


def _scale(value: ir.Value, reader: ir.Node) -> tuple[ir.Value, float, ir.Node] | None:
    """What `value` is a constant times of, where nothing else reads it."""
    node = source(value).producer()
    if node is None or node.graph is not reader.graph or len(value.uses()) != 1 or value.is_graph_output():
        return None
    step = affine_of(node)
    return (step[0], step[1], node) if step is not None and step[2] == 0.0 else None


def _root(node: ir.Node) -> ElementwiseNorm | None:
    argument, power = node.inputs[0], 0.5 if node.op_type == "Sqrt" else scalar(node.inputs[1])
    if argument is None or power not in (0.5, -0.5):
        return None
    found = None
    for x in below(argument):
        under = expand(argument, [x])
        if under is None or x is argument or under.terms.keys() != {(2,), (0,)}:
            continue
        square, constant = under.terms[(2,)], under.terms[(0,)]
        quotient = _quotient(node, power, x)
        if square <= 0 or constant <= 0 or quotient is None:
            continue
        root, factor, between = quotient
        inside = list(dict.fromkeys([*reversed(under.nodes), *between[:-1], node, root]))
        # The x furthest down that leaves nothing behind: for v = 2 x it is x, unless v is read elsewhere too.
        if found is None or escaping(inside, root) is None:
            gain = np.array(factor / math.sqrt(square))
            found = ElementwiseNorm("root", x, constant / square, gain, np.zeros(()), inside, root)
    return found


def _quotient(node: ir.Node, power: float, x: ir.Value) -> tuple[ir.Node, float, list[ir.Node]] | None:
    """The node that makes p · x / √(…), the number p, and the nodes from the root to it."""
    root = node.outputs[0]
    inverses: list[tuple[ir.Value, list[ir.Node]]] = [(root, [])] if power < 0 else []
    for user in users(root) if power > 0 else []:
        if is_op(user, "Reciprocal") or (is_op(user, "Div") and scalar(user.inputs[0]) == 1.0):
            inverses.append((user.outputs[0], [user]))
        elif is_op(user, "Div") and user.inputs[1] is root and (factor := _multiple(user.inputs[0], x)) is not None:
            return user, factor[0], [*factor[1], user]
    for inverse, before in inverses:
        for user in users(inverse):
            factor = _multiple(other_operand(user, inverse), x) if is_op(user, "Mul") else None
            if factor is not None:
                return user, factor[0], [*before, *factor[1], user]
    return None


def _multiple(value: ir.Value | None, x: ir.Value) -> tuple[float, list[ir.Node]] | None:
    """p and the arithmetic where `value` is p · x."""
    found = None if value is None else expand(value, [x])
    if found is None or found.terms.keys() != {(1,)}:
        return None
    return found.terms[(1,)], list(reversed(found.nodes))


def _follow(norm: ElementwiseNorm) -> None:
    """Take along what is multiplied and added behind, as far as nothing else reads what is in between."""
    while True:
        output = norm.root.outputs[0]
        if output.is_graph_output() or len(output.uses()) != 1:
            return
        ((user, index),) = output.uses()
        if user.graph is not norm.root.graph or not is_op(user, "Mul", "Add", "Sub", "Div", "Neg"):
            return
        number: Numbers = np.ones(())
        if user.op_type != "Neg":
            array = folded(user.inputs[1 - index])
            if array is None or array.dtype.kind not in "fV":
                return
            number = array.astype(np.float64)
        gain, bias = norm.gain, norm.bias
        if user.op_type == "Mul" or (user.op_type == "Div" and index == 0):
            if (number == 0).any():
                return
            number = number if user.op_type == "Mul" else 1.0 / number
            gain, bias = gain * number, bias * number
        elif user.op_type == "Neg" or (user.op_type == "Sub" and index == 1):
            gain, bias = -gain, (-bias if user.op_type == "Neg" else number - bias)
        elif user.op_type in ("Add", "Sub"):
            bias = bias + (number if user.op_type == "Add" else -number)
        else:
            return
        shape = np.broadcast_shapes(gain.shape, bias.shape)
        # A table over several axes, such as positions, is no bias of a norm.
        if sum(size > 1 for size in shape) > 1 or not np.isfinite(gain).all() or not np.isfinite(bias).all():
            return
        norm.gain, norm.bias, norm.root = gain, bias, user
        norm.nodes.append(user)
