"""A rule pass that can ask for shapes."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from graphopt.analysis.shapes import Shape, ShapeFacts, lazily
from graphopt.analysis.shapes.rule import Content
from graphopt.graph.edits import Editor
from graphopt.passes.base import RulePass


class ShapeRulePass(RulePass):
    """A `RulePass` whose rules can ask for shapes and types; they are inferred for the values asked for only.

    Most models have no site, and many sites say enough by themselves, so nothing is inferred up front.
    """

    def prepare(self, model: ir.Model, edit: Editor) -> None:
        """Know what is known already."""
        self._facts: ShapeFacts = lazily(model)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """As `Pass.call`; facts, which hold on to all values that they are of, don't outlive it."""
        try:
            return super().call(model)
        finally:
            self.__dict__.pop("_facts", None)

    def shape(self, value: ir.Value) -> tuple[int | None, ...] | None:
        """The sizes of the axes of `value`, None where one isn't certain or the rank isn't."""
        shape = self._facts.shape(value)
        return None if shape is None else tuple(dim.value for dim in shape)

    def dims(self, value: ir.Value) -> Shape | None:
        """The sizes of the axes of `value` as expressions that can be compared, None where the rank isn't certain."""
        return self._facts.shape(value)

    def data(self, value: ir.Value) -> Content | None:
        """The elements of a small tensor of integers as expressions, None where they aren't certain."""
        return self._facts.data(value)

    def rank(self, value: ir.Value) -> int | None:
        """The rank of `value`, None where it isn't certain."""
        shape = self._facts.shape(value)
        return None if shape is None else len(shape)

    def has_rank(self, value: ir.Value, rank: int) -> bool:
        """Whether `value` certainly has at least `rank` axes, so that a constant of that rank adds none."""
        return rank == 0 or (self.rank(value) or 0) >= rank

    def keeps_axes(self, value: ir.Value, whole: ir.Value, axes: Sequence[int] | None) -> bool:
        """Whether `value` certainly has the shape of `whole`, but with length 1 at `axes`."""
        shape, full = self._facts.shape(value), self._facts.shape(whole)
        if axes is None or shape is None or full is None or len(shape) != len(full):
            return False
        if not all(-len(full) <= axis < len(full) for axis in axes):
            return False
        reduced = {axis % len(full) for axis in axes}
        return all(a == (1 if axis in reduced else b) for axis, (a, b) in enumerate(zip(shape, full, strict=True)))

    def dtype(self, value: ir.Value) -> ir.DataType | None:
        """The element type of `value`, None where neither the graph nor the file says it."""
        return self._facts.dtype(value) or value.dtype
