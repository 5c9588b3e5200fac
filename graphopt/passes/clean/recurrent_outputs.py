"""recurrent-outputs: what is read of a recurrent layer, read as directly as its outputs allow."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analysis.algebra import attribute_int, is_op, users
from graphopt.graph.constants import constant_array, scalar
from graphopt.graph.edits import Editor
from graphopt.passes.base import RulePass

LAYERS = ("GRU", "LSTM", "RNN")
TIME, DIRECTION = 0, 1
OPSET = 13
MAX_DEPTH = 6


@dataclasses.dataclass(frozen=True)
class _View:
    """A part of Y: its value, the axes of Y that are left, and the index at which each other one, or one of size 1,
    was taken."""

    value: ir.Value
    axes: tuple[int, ...]
    fixed: dict[int, int]


class RecurrentOutputs(RulePass):
    """Read the last step of a recurrent layer from its final state, and both directions of it with one transpose.

    LSTM, GRU and RNN return all steps as Y [steps, directions, batch, hidden] and the last one of each direction as Y_h
    [directions, batch, hidden]. Without sequence lengths

        Y[−1, d] = Y_h[d] for a direction that runs forward        Y[0, d] = Y_h[d] for one that runs backward
        Concat(Y[:, 0], Y[:, 1], last axis) = Reshape(Transpose(Y, [0, 2, 1, 3]), [steps, batch, 2 · hidden])

    1. A step and a direction that are chosen with Slice and Squeeze, or Gather, in any order become one Gather of Y_h.
    2. A Concat of all directions of Y, or of Y_h, along the hidden axis becomes a Transpose and a Reshape.

    Keras' `Bidirectional` and PyTorch's `output[-1]` are exported so. Nine nodes of openwakeword's "hey mycroft" become
    two.

    **Needs:** constant indices; no input `sequence_lens` for rule 1; `layout` 0; opset 13. **Guarantees:** the same
    numbers, bit for bit.

    **Left alone, with the reason:** nothing is reported: other parts of Y are no fault.

    **When not to use it:** never.
    """

    name: ClassVar[str] = "recurrent-outputs"
    family: ClassVar[str] = "clean"
    bitwise: ClassVar[bool] = True
    anchors: ClassVar[tuple[str, ...]] = LAYERS

    def rewrite(self, node: ir.Node, edit: Editor) -> bool:
        """See the class."""
        hidden = attribute_int(node, "hidden_size", 0)
        directions = _directions(node)
        if edit.opset < OPSET or attribute_int(node, "layout", 0) != 0 or not hidden or directions is None:
            return False
        return self._final(node, directions, edit) or self._joined(node, directions, hidden, edit)

    def _final(self, node: ir.Node, directions: list[bool], edit: Editor) -> bool:
        if len(node.inputs) > 4 and node.inputs[4] is not None:
            return False
        changed = False
        only = {DIRECTION: 0} if len(directions) == 1 else {}
        for view in list(_views(node.outputs[0], (0, 1, 2, 3), only)):
            step, direction = view.fixed.get(TIME), view.fixed.get(DIRECTION, len(directions))
            if view.axes != (2, 3) or step is None or direction >= len(directions):
                continue
            backward = directions[direction]
            maker = view.value.producer()
            if step != (0 if backward else -1) or maker is None or maker.graph is not node.graph:
                continue
            edit.at(maker)
            index = edit.constant(np.array(direction, np.int64), "direction")
            final = edit.op("Gather", [_final_state(node, edit), index], {"axis": 0}, like=view.value)
            self.applied(
                node, f"the {'first' if backward else 'last'} step of direction {direction} is its final state"
            )
            edit.replace(view.value, final)
            changed = True
        return changed

    def _joined(self, node: ir.Node, directions: list[bool], hidden: int, edit: Editor) -> bool:
        """Rule 2."""
        if len(directions) != 2:
            return False
        for output, axes in ((0, (0, 1, 2, 3)), (1, (1, 2, 3))):
            whole = node.outputs[output] if output < len(node.outputs) else None
            if whole is None:
                continue
            left = tuple(axis for axis in axes if axis != DIRECTION)
            views = [view for view in _views(whole, axes, {}) if view.axes == left]
            parts = {v.value: v.fixed[DIRECTION] for v in views if set(v.fixed) == {DIRECTION}}
            concats = [u for value in parts for u in users(value) if is_op(u, "Concat") and u.graph is node.graph]
            for concat in dict.fromkeys(concats):
                order = [parts.get(value) for value in concat.inputs if value is not None]
                if order != [0, 1] or attribute_int(concat, "axis", 0) not in (-1, len(left) - 1):
                    continue
                self.applied(node, f"both directions joined by a Transpose in place of {concat.name!r}")
                edit.at(concat)
                order_of_axes = [axes.index(axis) for axis in (*left[:-1], DIRECTION, left[-1])]
                moved = edit.op("Transpose", [whole], {"perm": order_of_axes})
                target = edit.constant(np.array([0] * (len(left) - 1) + [2 * hidden], np.int64), "shape")
                edit.replace(concat.outputs[0], edit.op("Reshape", [moved, target], like=concat.outputs[0]))
                return True
        return False


def _directions(node: ir.Node) -> list[bool] | None:
    """For each direction whether it runs backward; None where that isn't known."""
    attribute = node.attributes.get("direction")
    if attribute is not None and attribute.is_ref():
        return None
    text = "forward" if attribute is None else attribute.as_string()
    return {"forward": [False], "reverse": [True], "bidirectional": [False, True]}.get(text)


def _final_state(node: ir.Node, edit: Editor) -> ir.Value:
    """Y_h of the layer, which gets that output where it had none."""
    if len(node.outputs) < 2:
        node.resize_outputs(2)
    state = node.outputs[1]
    if not state.name:
        state.name = edit.names.fresh(f"{node.name or node.op_type}/final")
    if state.type is None:
        state.type = node.outputs[0].type
    return state


def _views(value: ir.Value, axes: tuple[int, ...], fixed: dict[int, int]) -> Iterator[_View]:
    """The parts of `value` that nodes of its graph take with constant indices, `value` itself left out."""
    stack = [(_View(value, axes, fixed), 0)]
    while stack:
        view, depth = stack.pop()
        for user in users(view.value) if depth < MAX_DEPTH else ():
            if user.graph is value.graph or value.graph is None:
                following = _taken(view, user)
                if following is not None:
                    yield following
                    stack.append((following, depth + 1))


def _taken(view: _View, node: ir.Node) -> _View | None:
    """What `node` leaves of a view; None where it is no choice of one index, and no dropping of a chosen axis."""
    if not node.inputs or node.inputs[0] is not view.value or any(v is view.value for v in node.inputs[1:]):
        return None
    rank = len(view.axes)
    if is_op(node, "Gather"):
        axis, index = attribute_int(node, "axis", 0), scalar(node.inputs[1])
        array = constant_array(node.inputs[1], 1)
        if axis is None or index is None or array is None or array.ndim:
            return None
        return _fix(view, node, {axis % rank: int(index)}, drop=True)
    if is_op(node, "Squeeze"):
        array = constant_array(node.inputs[1], 8) if len(node.inputs) > 1 else None
        if array is None:
            return None
        places = {int(a) % rank for a in array.reshape(-1)}
        if not all(view.axes[p] in view.fixed for p in places):
            return None
        return _View(node.outputs[0], tuple(a for p, a in enumerate(view.axes) if p not in places), view.fixed)
    if is_op(node, "Slice") and len(node.inputs) >= 4:
        lists = [constant_array(v, 8) for v in node.inputs[1:]]
        if any(array is None for array in lists):
            return None
        columns = [array.reshape(-1).tolist() for array in lists if array is not None]
        steps = columns[3] if len(columns) > 3 else [1] * len(columns[0])
        chosen = {}
        for start, end, axis, step in zip(columns[0], columns[1], columns[2], steps, strict=True):
            one = end == start + 1 if start != -1 else end >= np.iinfo(np.int32).max
            if step != 1 or not one:
                return None
            chosen[axis % rank] = start
        return _fix(view, node, chosen, drop=False)
    return None


def _fix(view: _View, node: ir.Node, chosen: dict[int, int], drop: bool) -> _View | None:
    fixed = dict(view.fixed)
    for place, index in chosen.items():
        axis = view.axes[place]
        if axis in fixed:  # one element already: the same again
            continue
        if axis not in (TIME, DIRECTION) or (axis == DIRECTION and index < 0):
            return None
        fixed[axis] = index
    axes = tuple(a for p, a in enumerate(view.axes) if not (drop and p in chosen))
    return _View(node.outputs[0], axes, fixed)
