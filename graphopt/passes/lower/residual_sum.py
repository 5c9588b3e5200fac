"""residual-sum: residual additions before a LayerNormalization take the form that the target runs fastest."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from graphopt.graph.constants import is_constant
from graphopt.graph.edits import Editor
from graphopt.passes.lower.addition import AdditionPass


class ResidualSum(AdditionPass):
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
    choice: ClassVar[str] = "residual-norm"

    def rewrite(self, node: ir.Node, edit: Editor) -> bool:
        """See the class."""
        addition = self.addition(node.inputs[0])
        if addition is None or any(is_constant(v) for v in addition.inputs):
            return False
        return self.rewrite_addition(node, addition, node.inputs[1], edit)
