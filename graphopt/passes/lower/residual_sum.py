"""residual-sum: residual additions before a LayerNormalization take the form that the target runs fastest."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from graphopt.graph.constants import is_constant
from graphopt.graph.edits import Editor
from graphopt.passes.raise_.shape_rules import ShapeRulePass

_OPERATORS = {"add": "Add", "sum": "Sum"}
"""Operator by alternative of the choice "residual-norm"."""


class ResidualSum(ShapeRulePass):
    """Write the residual addition before a LayerNormalization as a `Sum` of two, or as an `Add`, whichever is faster.

    ONNX Runtime fuses `Add` + `LayerNormalization` into its own `SkipLayerNormalization`. It looks for `Add`; `Sum` of
    two inputs is the same addition by the same kernel, and is left alone. So the choice holds in every session, without
    any setting. Which is faster changes with the version: up to 1.29 the fused kernel takes 0.2 to 0.8 of the time of
    the two, from 1.30 on two to four times it.

    Measured on ONNX Runtime 1.31 (CPU time, interleaved, median ratio to the same graph with `Add`): all-MiniLM-L6
    0.91 at batch 1 × 128 tokens, 0.92 at 1 × 16, 0.90 at 8 × 64; an A/A control gave 0.98 to 1.00.

    1. With no target profile the addition becomes a `Sum` where the installed ONNX Runtime is 1.30 or newer, else an
       `Add`.
    2. With one, it becomes what the profile prefers for the choice `residual-norm` at the width of the site, at the
       usual numbers of tokens or those that the graph fixes: `Sum`, or `Add` (and ONNX Runtime fuses it).

    **Needs:** nothing. **Guarantees:** the same numbers, bit for bit. A sum with a constant (a bias) stays an `Add`,
    which other fusions look for; a float64 one is left, as nothing is fused there.

    **Targets:** cpu.

    **When not to use it:** for other providers, where the fused kernel is the faster one.
    """

    name: ClassVar[str] = "residual-sum"
    family: ClassVar[str] = "lower"
    bitwise: ClassVar[bool] = True
    targets: ClassVar[tuple[str, ...]] = ("cpu",)
    anchors: ClassVar[tuple[str, ...]] = ("LayerNormalization",)

    def rewrite(self, node: ir.Node, edit: Editor) -> bool:
        """See the class."""
        summed = node.inputs[0]
        addition = summed.producer() if summed is not None else None
        if summed is None or addition is None or addition.domain != "" or len(addition.inputs) != 2:
            return False
        if addition.op_type not in _OPERATORS.values() or any(is_constant(v) for v in addition.inputs):
            return False
        if self.dtype(summed) == ir.DataType.DOUBLE:
            return False  # ONNX Runtime fuses no float64, so nothing is gained
        wanted = _OPERATORS[self.preferred_at(summed, node.inputs[1])]
        if addition.op_type == wanted:
            return False
        edit.at(addition)
        edit.replace(summed, edit.op(wanted, list(addition.inputs), like=summed))
        return self.applied(node, f"the addition {addition.name!r} before it became a {wanted}")

    def preferred_at(self, summed: ir.Value, scale: ir.Value | None) -> str:
        """The alternative that is preferred at the width of `scale` and the rows of `summed`."""
        if self.profile is None:  # no shape is needed for the default
            return self.prefers("residual-norm")
        lengths = self.shape(scale) if scale is not None else None
        rows = 1
        for size in (self.shape(summed) or (None, None))[:-1]:
            rows = rows * size if size else 0
        return self.prefers("residual-norm", (lengths[-1] if lengths else None) or None, rows or None)
