"""Additions that a target's fusions look for, or don't: one base for the passes that choose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import onnx_ir as ir

from graphopt.graph.edits import Editor
from graphopt.passes.raise_.shape_rules import ShapeRulePass


class AdditionPass(ShapeRulePass):
    """A pass that writes the addition before its anchor as an `Add`, or as a `Sum` of two, which is the same addition
    by the same kernel, and which ONNX Runtime's fusions don't look for.

    Attributes:
        choice: The choice of the target profile; its alternatives "add" and "sum" are the two.
    """

    choice: ClassVar[str]
    operators: ClassVar[Mapping[str, str]] = {"add": "Add", "sum": "Sum"}

    def addition(self, value: ir.Value | None) -> ir.Node | None:
        """The addition of two that makes `value`, in a type that ONNX Runtime fuses."""
        node = value.producer() if value is not None else None
        if value is None or node is None or node.domain != "" or len(node.inputs) != 2 or None in node.inputs:
            return None
        # ONNX Runtime fuses no float64, so nothing is gained there.
        if node.op_type not in self.operators.values() or self.dtype(value) == ir.DataType.DOUBLE:
            return None
        return node

    def rewrite_addition(self, node: ir.Node, addition: ir.Node, vector: ir.Value | None, edit: Editor) -> bool:
        """Give `addition` the form that the target runs fastest before `node`.

        Args:
            node: The anchor.
            addition: What `self.addition` found.
            vector: A value whose last axis has the width of the site, certainly.
            edit: What to edit through.
        """
        summed = addition.outputs[0]
        wanted = self.operators.get(self.at_site(summed, vector))
        if wanted is None or addition.op_type == wanted:
            return False
        edit.at(addition)
        edit.replace(summed, edit.op(wanted, list(addition.inputs), like=summed))
        return self.applied(node, f"the addition {addition.name!r} before it became a {wanted}")

    def at_site(self, summed: ir.Value, vector: ir.Value | None) -> str:
        """The alternative that is preferred at the width of `vector` and the rows of `summed`."""
        if self.profile is None:  # no shape is needed for the default
            return self.prefers(self.choice)
        lengths = self.shape(vector) if vector is not None else None
        width = lengths[-1] if lengths else None
        rows = 1
        for size in (self.shape(summed) or (None, None))[:-1]:
            rows = rows * size if size else 0
        return self.prefers(self.choice, width or None, rows or None)
