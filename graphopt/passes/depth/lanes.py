"""Lanes: stretches of a residual stream side by side, each reading what the first of them reads.

    in a row:      x₁ = x₀ + f(x₀),   x₂ = x₁ + g(x₁)
    side by side:  x₁ = x₀ + f(x₀),   x₂ = x₁ + g(x₀)

The additions of the stream stay where they are; what the later lanes read changes. A lane of several branches sees its
own sums, x₀ + g(x₀) and so on, which are added anew for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.algebra import is_op
from graphopt.analysis.depth_units import DepthUnit, depth_units, same_shape
from graphopt.analysis.shapes import ShapeFacts, infer
from graphopt.graph.edits import Editor, captured_values, sort

Lane = Sequence[DepthUnit]
"""Branches that follow one another in a stream: those of a layer, or one alone."""


_VIEWS = ("Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze")
"""What may stand between an addition and the branch that reads it: the same elements in the same order."""


def obstacle(lanes: Sequence[Lane]) -> str | None:
    """Why some lanes can't stand side by side; None where they can."""
    units = [unit for lane in lanes for unit in lane]
    if len({unit.stream for unit in units}) > 1:
        return "they are of several streams"
    known = [units[0].branch.skip]
    for before, unit in zip((None, *units), units, strict=False):
        if unit.placement in ("post", "both"):
            return f"the sum of {unit.name} is normalised, so that what it adds can't be added elsewhere"
        follows = before is None or _origin(unit.remainder, [before.total]) is not None
        if not follows or _origin(unit.branch.skip, known) is None:
            return f"something stands between {unit.name} and what is before it"
        if any(value is unit.branch.skip for node in unit.branch.nodes for value in captured_values(node)):
            return f"a graph within {unit.name} reads the stream"
        known.append(unit.total)
    return None


def put_side_by_side(lanes: Sequence[Lane], facts: ShapeFacts, edit: Editor) -> None:
    """Let all lanes read what the first reads.

    Args:
        lanes: In the order of the stream, one right behind the other, without an `obstacle`.
        facts: The shapes of their graph.
        edit: What writes to it.
    """
    first = lanes[0][0].branch.skip
    for lane in lanes[1:]:
        _enter(lane, _shaped(first, first, lane[0], facts, edit), edit)


@dataclasses.dataclass(frozen=True)
class LanedModel:
    """A model in which each lane can be switched to read what the lane before it reads.

    Attributes:
        model: The copy. With all switches off it gives the original's numbers, bit for bit.
        switches: The initializers, bool scalars, false at first: that of each lane by its place; the first has none.
    """

    model: ir.Model
    switches: dict[int, ir.Value]

    def joined(self, places: Sequence[int]) -> dict[str, npt.NDArray[np.bool_]]:
        """What `Trials.loss` is given where the lanes at these places read what the ones before them read."""
        return {self.switches[place].name or "": np.asarray(True) for place in places}


def switched(model: ir.Model, lanes: Sequence[Lane]) -> LanedModel:
    """A copy of a model with a choice in front of each lane but the first: Where(switch, what the one before reads, x).

    Args:
        model: The model, which stays as it is.
        lanes: As of `put_side_by_side`: any run of them is without an `obstacle`.
    """
    copy = model.clone()
    facts = infer(copy, believe_names=True)
    units = {unit.name: unit for unit in depth_units(copy, facts).units}
    edit = Editor(copy)
    before = units[lanes[0][0].name].branch.skip
    shaped_as = before
    switches = {}
    for place, lane in enumerate(lanes[1:], 1):
        own = [units[unit.name] for unit in lane]
        skip = own[0].branch.skip
        edit.at(own[0].branch.add)
        switches[place] = edit.constant(np.asarray(False), f"switch.{place}")
        before = _shaped(before, shaped_as, own[0], facts, edit)
        before, shaped_as = edit.op("Where", [switches[place], before, skip], like=skip), skip
        _enter(own, before, edit)
    # A choice stands in front of the addition of its branch, and is read by what is computed for that.
    sort(copy)
    return LanedModel(copy, switches)


def _origin(value: ir.Value, known: Collection[ir.Value]) -> ir.Value | None:
    """The known value that `value` is, or is a view of."""
    current: ir.Value | None = value
    while current is not None and current not in known:
        node = current.producer()
        current = node.inputs[0] if node is not None and is_op(node, *_VIEWS) else None
    return current


def _shaped(value: ir.Value, shaped_as: ir.Value, unit: DepthUnit, facts: ShapeFacts, edit: Editor) -> ir.Value:
    """A value in the shape of what a unit reads; `shaped_as` is one of its own shape that `facts` know."""
    skip = unit.branch.skip
    if value is skip or same_shape(shaped_as, skip, facts):
        return value
    a, b = facts.shape(shaped_as), facts.shape(skip)
    if a is not None and b is not None and len(a) == len(b):
        return value
    edit.at(unit.branch.nodes[0])
    return edit.op("Reshape", [value, edit.op("Shape", [skip])], like=skip)


def _enter(lane: Lane, value: ir.Value, edit: Editor) -> None:
    """Let a lane read `value`, and its later branches the sums that follow from it."""
    now = {lane[0].branch.skip: value}

    def at_present(old: ir.Value, unit: DepthUnit) -> ir.Value:
        if old not in now:
            source = _origin(old, now)
            assert source is not None
            edit.at(unit.branch.nodes[0])
            now[old] = edit.op("Reshape", [now[source], edit.op("Shape", [old])], like=old)
        return now[old]

    totals = [unit.total for unit in lane]
    needed = {_origin(unit.branch.skip, totals) for unit in lane}
    for unit in reversed(lane):
        if unit.total in needed:
            needed.add(_origin(unit.remainder, totals))
    for unit in lane:
        skip, entered = unit.branch.skip, at_present(unit.branch.skip, unit)
        if unit.total in needed:
            remainder = at_present(unit.remainder, unit)
            edit.at(unit.branch.add)
            output = unit.branch.output
            operands = [remainder, output] if unit.branch.operand == 0 else [output, remainder]
            now[unit.total] = edit.op("Add", operands, like=unit.total)
        for node in unit.branch.nodes:
            for place, read in enumerate(node.inputs):
                if read is skip:
                    node.replace_input_with(place, entered)
