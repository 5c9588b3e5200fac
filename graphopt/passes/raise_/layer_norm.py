"""raise-layer-norm: every spelling of a LayerNorm becomes `LayerNormalization`."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from graphopt.graph.edits import Editor
from graphopt.passes.raise_.normalization import Matcher
from graphopt.passes.raise_.root_mean_square import NotRaised
from graphopt.passes.raise_.shape_rules import ShapeRulePass

OPSET = 17


class RaiseLayerNorm(ShapeRulePass):
    """Write a LayerNorm that an exporter took apart as one `LayerNormalization`.

        d = x − mean(x),  y = d / √(mean(d²) + ε) · gain + bias        (means over the last k axes)

    Paper: Layer Normalization (Ba, Kiros, Hinton, 2016).

    Taken as the same:

    1. The square: `Pow(d, 2)`, `Mul(d, d)`, either over `Abs(d)`, or `ReduceSumSquare`.
    2. The mean: `ReduceMean`, or a sum divided by the number of elements.
    3. x − mean(x) written once or twice.
    4. 1/√v: `Sqrt` or `Pow 0.5` with `Div`, `Reciprocal`, `Div(1, ·)` or `Pow −1`; `Pow −0.5`; the root of `1/v`.
    5. Gain and bias: constants over the normalised axes, whatever axes of length 1 are in front, or absent (the
       gain is then ones); the gain after the division or multiplied into 1/√v (`s`), also as x·s + (bias − mean·s).
    6. x cast from half precision to float32 and the quotient cast back: `stash_type` = 1 says the same.

    **Needs:** opset 17. That the axes are the last: negative, or the rank known. The length of the normalised
    axes. **Guarantees:** the same function. A mean that something else reads too stays beside the
    operator.

    **Left alone, with the reason:** ε outside of the root; Bessel's correction (`torch.std`); a variance taken as
    E[x²] − E[x]², which cancels; axes that aren't the last (channels-first LayerNorm); sites in float64, because
    `LayerNormalization` computes in float32; a variance that something else reads too.

    In half precision the operator computes in float32: where the spelled-out d² overflows, it doesn't. Why not
    onnxscript's rule: see `raise-rms-norm`.

    **When not to use it:** for a runtime without `LayerNormalization` (opset below 17).
    """

    name: ClassVar[str] = "raise-layer-norm"
    family: ClassVar[str] = "raise"
    paper: ClassVar[str] = "Layer Normalization"
    anchors: ClassVar[tuple[str, ...]] = ("ReduceMean", "ReduceSum", "ReduceSumSquare")

    def rewrite(self, node: ir.Node, edit: Editor) -> bool:
        """See the class."""
        try:
            found = Matcher(node, True, self).match()
        except NotRaised as reason:
            return self.left(node, str(reason))
        if found is None:
            return False
        if edit.opset < OPSET:
            return self.left(node, f"needs opset {OPSET}, the model has {edit.opset}: run convert-opset first")
        return self.applied(found.root, found.write(edit, "LayerNormalization"))
