"""Clamped lines, read off a graph: min(max(a·z + b, low), high), however an exporter took it apart."""

from __future__ import annotations

import dataclasses
import math

import onnx_ir as ir

from graphopt.analysis.algebra import expand, is_op, source
from graphopt.graph.constants import scalar

BOUNDS = ("Clip", "Relu", "Min", "Max")
"""The operators that may bound their operand by constants."""


@dataclasses.dataclass(frozen=True)
class Line:
    """min(max(slope · z + offset, low), high).

    Such functions are closed under what a chain of operators does: a scale, a shift, a bound.
    """

    slope: float = 1.0
    offset: float = 0.0
    low: float = -math.inf
    high: float = math.inf

    def of_affine(self, slope: float, offset: float) -> Line:
        """This function of slope · z + offset."""
        return dataclasses.replace(self, slope=self.slope * slope, offset=self.slope * offset + self.offset)

    def of_bounded(self, low: float, high: float) -> Line:
        """This function of z bounded to [low, high]: one bound again, whose ends are the images of these."""
        ends = sorted(self(end) for end in (low, high))
        return dataclasses.replace(self, low=ends[0], high=ends[1])

    def scaled(self, factor: float, shift: float = 0.0) -> Line:
        """factor times this function, plus shift."""
        ends = sorted((factor * self.low + shift, factor * self.high + shift))
        return Line(factor * self.slope, factor * self.offset + shift, *ends)

    def __call__(self, z: float) -> float:
        """The function at z."""
        return min(max(self.slope * z + self.offset, self.low), self.high)


@dataclasses.dataclass
class Chain:
    """A value as a clamped line of another value.

    Attributes:
        z: What the line is a function of.
        line: The function.
        nodes: The nodes in between, the last one first.
    """

    z: ir.Value
    line: Line
    nodes: list[ir.Node]

    @property
    def constants(self) -> list[ir.Value]:
        """The constants that its nodes read."""
        return [v for node in self.nodes for v in node.inputs if v is not None and scalar(v) is not None]


def bounds_of(node: ir.Node) -> tuple[ir.Value, float, float] | None:
    """The operand and the bounds of a Clip, a Relu, or a Min or Max with a constant, where they are constant."""
    if not is_op(node, *BOUNDS) or not node.inputs:
        return None
    operand = node.inputs[0]
    low, high = -math.inf, math.inf
    if node.op_type == "Relu":
        return None if operand is None else (operand, 0.0, high)
    if node.op_type == "Clip":
        for index, name in ((1, "min"), (2, "max")):
            attribute = node.attributes.get(name)
            value = node.inputs[index] if len(node.inputs) > index else None
            if attribute is not None:
                number = None if attribute.is_ref() else attribute.as_float()
            else:
                number = scalar(value) if value is not None else (-math.inf, math.inf)[index - 1]
            if number is None:
                return None
            low, high = (number, high) if index == 1 else (low, number)
        # Where they cross, Clip gives the upper one; so does Line.
        return None if operand is None or math.isnan(low + high) else (operand, min(low, high), high)
    if len(node.inputs) != 2:
        return None
    for value, other in (node.inputs, reversed(node.inputs)):
        number = scalar(other)
        if value is not None and number is not None and scalar(value) is None and not math.isnan(number):
            return (value, number, high) if node.op_type == "Max" else (value, low, number)
    return None


def affine_of(node: ir.Node) -> tuple[ir.Value, float, float] | None:
    """The operand, slope and offset of an Add, Sub, Mul, Div or Neg that is slope · operand + offset."""
    if not is_op(node, "Add", "Sub", "Mul", "Div", "Neg"):
        return None
    varying = [value for value in node.inputs if value is not None and scalar(value) is None]
    if len(varying) != 1:
        return None
    terms = getattr(expand(node.outputs[0], varying), "terms", {})
    slope = terms.get((1,), 0.0)
    if slope == 0.0 or not terms.keys() <= {(1,), (0,)} or not all(map(math.isfinite, terms.values())):
        return None
    return varying[0], slope, terms.get((0,), 0.0)


def clamped(node: ir.Node) -> Chain | None:
    """The output of a bound as a clamped line of the value furthest down that nothing but the chain reads."""
    step = bounds_of(node)
    if step is None:
        return None
    chain = Chain(step[0], Line(low=step[1], high=step[2]), [node])
    while True:
        below = source(chain.z).producer()
        # A value with other readers stays anyway, and may be what the clamp is multiplied with.
        if below is None or below.graph is not node.graph or chain.z.is_graph_output() or len(chain.z.uses()) != 1:
            return chain
        if (bounds := bounds_of(below)) is not None:
            chain.z, chain.line = bounds[0], chain.line.of_bounded(bounds[1], bounds[2])
        elif (affine := affine_of(below)) is not None:
            chain.z, chain.line = affine[0], chain.line.of_affine(affine[1], affine[2])
        else:
            return chain
        chain.nodes.append(below)
