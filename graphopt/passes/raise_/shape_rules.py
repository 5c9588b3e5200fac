"""A rule pass that can ask for shapes."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from graphopt.graph.edits import Editor
from graphopt.passes.base import RulePass


class ShapeRulePass(RulePass):
    """A `RulePass` that infers shapes when the first site asks for one.

    Most models have no site, and most sites say enough by themselves, so the inference is not run up front.
    """

    def prepare(self, model: ir.Model, edit: Editor) -> None:
        """Forget what was inferred of another model."""
        self._model = model
        self._facts: Any = None

    def shape(self, value: ir.Value) -> tuple[Any, ...] | None:
        """The dims of `value`, ints where they are certain; None where even the rank isn't."""
        if value.is_graph_input() and value.graph is self._model.graph:
            return None if value.shape is None else tuple(value.shape)
        return None

    def rank(self, value: ir.Value) -> int | None:
        """The rank of `value`, None where it isn't certain."""
        shape = self.shape(value)
        return None if shape is None else len(shape)

    def has_rank(self, value: ir.Value, rank: int) -> bool:
        """Whether `value` certainly has at least `rank` axes, so that a constant of that rank adds none."""
        return rank == 0 or (self.rank(value) or 0) >= rank
