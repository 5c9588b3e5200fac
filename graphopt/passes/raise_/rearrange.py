"""Brings a value whose axes are known in atoms to other axes, by Transpose and Reshape."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphopt.analysis.attention_scores import NotAttention
from graphopt.analysis.layout import Atom, Axes, Stage, settled, total
from graphopt.analysis.shapes import ShapeFacts
from graphopt.graph.edits import Editor


class Rearrangement:
    """Writes views at the site of `edit`.

    Attributes:
        stages: Values whose axes are known in the same atoms, to read lengths from.
    """

    def __init__(self, edit: Editor, facts: ShapeFacts, stages: Sequence[Stage]) -> None:
        self.edit, self.facts, self.stages = edit, facts, stages

    def first(self, stages: Sequence[Stage], wanted: Axes) -> tuple[ir.Value, Stage]:
        """The last of `stages` of which one Transpose, else any, else a few views, make the axes `wanted`.

        Raises:
            NotAttention: None is.
        """
        for stage in reversed(stages):
            if len(stage.axes) == len(wanted) and sorted(map(id, _joined(stage.settled()))) == sorted(
                map(id, _joined(wanted))
            ):
                perm = _permutation(stage.settled(), wanted)
                if perm is not None:
                    return self.edit.op("Transpose", [stage.value], {"perm": perm}), stage
        reason: NotAttention | None = None
        for stage in reversed(stages):
            try:
                return self.to(stage.value, stage.settled(), wanted), stage
            except NotAttention as found:
                reason = found
        raise reason or NotAttention("its operands aren't known")

    def to(self, value: ir.Value, axes: Axes, wanted: Axes) -> ir.Value:
        """`value`, which has `axes`, with the axes `wanted`.

        Raises:
            NotAttention: They aren't made of the same atoms, or one is scattered.
        """
        axes, wanted = settled(axes), settled(wanted)
        if axes == wanted:
            return value
        have, want = _joined(axes), _joined(wanted)
        if sorted(map(id, have)) != sorted(map(id, want)):
            raise NotAttention(f"{value.name!r} hasn't the elements of the heads")
        if have != want:
            perm = _permutation(axes, wanted)
            if perm is None:
                # Axes of the value that stand together where they are wanted.
                perm = _order(axes, want)
            if perm is None:
                raise NotAttention(f"an axis of {value.name!r} is scattered over those of the heads")
            value = self.edit.op("Transpose", [value], {"perm": perm})
            axes = tuple(axes[axis] for axis in perm)
            if axes == wanted:
                return value
        return self.edit.op("Reshape", [value, self._target(axes, wanted)])

    def _target(self, axes: Axes, wanted: Axes) -> ir.Value:
        """The sizes of `wanted` as the target of a Reshape of a value with `axes`."""
        entries: list[int | ir.Value] = []
        free = False
        for index, axis in enumerate(wanted):
            size = total(axis).value
            if size is not None:
                entries.append(size)
            elif index < len(axes) and axes[index] == axis:
                entries.append(0)
            elif not free:
                entries.append(-1)
                free = True
            else:
                entries.append(self.length(axis))
        return self.sizes(entries)

    def sizes(self, entries: Sequence[int | ir.Value]) -> ir.Value:
        """A shape of numbers and of values of one element."""
        if all(isinstance(entry, int) for entry in entries):
            return self.edit.constant(np.array(entries, dtype=np.int64), "shape")
        parts = [
            entry if isinstance(entry, ir.Value) else self.edit.constant(np.array([entry], dtype=np.int64), "size")
            for entry in entries
        ]
        return self.edit.op("Concat", parts, {"axis": 0})

    def length(self, atoms: Sequence[Atom]) -> ir.Value:
        """The length of an axis of these atoms, read off an input of the graph (all layers then read the same), else
        off a value that has it.

        Raises:
            NotAttention: No value is known to have it.
        """
        wanted = total(atoms)
        if wanted.value is not None:
            return self.edit.constant(np.array([wanted.value], dtype=np.int64), "size")
        for value in self.edit.model.graph.inputs:
            for axis, size in enumerate(self.facts.shape(value) or ()):
                if size == wanted:
                    return self._length_of(value, axis)
        for stage in self.stages:
            for axis, held in enumerate(stage.settled()):
                if total(held) == wanted:
                    return self._length_of(stage.value, axis)
        raise NotAttention(f"no tensor is known to have an axis of {wanted} elements")

    def _length_of(self, value: ir.Value, axis: int) -> ir.Value:
        return self.edit.op("Shape", [value], {"start": axis, "end": axis + 1})


def _joined(axes: Axes) -> list[Atom]:
    return [atom for axis in axes for atom in axis]


def _permutation(axes: Axes, wanted: Axes) -> list[int] | None:
    """The order that makes `wanted` of `axes`, None where there is none."""
    left = list(range(len(axes)))
    perm = []
    for axis in wanted:
        found = next((index for index in left if axes[index] == axis), None)
        if found is None:
            return None
        left.remove(found)
        perm.append(found)
    return perm if not left else None


def _order(axes: Axes, want: Sequence[Atom]) -> list[int] | None:
    """The order of whole axes in which their atoms are `want`; axes of length 1 come first."""
    order = [index for index, axis in enumerate(axes) if not axis]
    position = 0
    while position < len(want):
        found = next((index for index, axis in enumerate(axes) if axis and axis[0] is want[position]), None)
        if found is None or list(axes[found]) != list(want[position : position + len(axes[found])]):
            return None
        order.append(found)
        position += len(axes[found])
    return order
