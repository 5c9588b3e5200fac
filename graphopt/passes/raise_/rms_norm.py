"""raise-rms-norm: every spelling of an RMSNorm becomes `RMSNormalization`."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from graphopt.graph.edits import Editor
from graphopt.passes.raise_.normalization import Matcher
from graphopt.passes.raise_.root_mean_square import NotRaised
from graphopt.passes.raise_.shape_rules import ShapeRulePass

OPSET = 23


class RaiseRmsNorm(ShapeRulePass):
    """Write an RMSNorm that an exporter took apart as one `RMSNormalization`.

        y = x / √(mean(x²) + ε) · gain        (mean over the last k axes)

    Paper: Root Mean Square Layer Normalization (Zhang, Sennrich, 2019).

    Taken as the same: the spellings of the square, the mean, the root and the casts that `raise-layer-norm` lists; a
    gain that is a constant or a sum, product or cast of constants (Gemma's 1 + w), before or after the cast back; and
    ONNX Runtime's `SimplifiedLayerNormalization` where only its first output is used.

    **Needs:** opset 23. That the axes are the last: negative, or the rank known. The length of the normalised
    axes. **Guarantees:** the same function.

    **Left alone, with the reason:** ε outside of the root; a bound instead of ε (L2 normalization divides by
    max(‖x‖, ε)); axes that aren't the last; sites in float64, because `RMSNormalization` computes in float32; a mean
    square that something else reads too. A centred x is a LayerNorm and no site of this pass.

    In half precision the operator computes in float32: where the spelled-out x² overflows, it doesn't.

    **Why not onnxscript's rules:** they find all 61 sites of SmolLM2 as torch.export spells them and none of the 61 as
    TorchScript does; those of LayerNorm find none of 13 in MiniLM (TorchScript, opset 14) and none of 5 in PP-OCRv4.

    **When not to use it:** for a runtime without `RMSNormalization` (opset below 23).
    """

    name: ClassVar[str] = "raise-rms-norm"
    family: ClassVar[str] = "raise"
    paper: ClassVar[str] = "Root Mean Square Layer Normalization"
    anchors: ClassVar[tuple[str, ...]] = ("ReduceMean", "ReduceSum", "ReduceSumSquare", "SimplifiedLayerNormalization")

    def rewrite(self, node: ir.Node, edit: Editor) -> bool:
        """See the class."""
        if node.op_type == "SimplifiedLayerNormalization":
            return self._rewrite_simplified(node, edit)
        try:
            found = Matcher(node, False, self).match()
        except NotRaised as reason:
            return self.left(node, str(reason))
        if found is None or not self._has_opset(node, edit):
            return False
        return self.applied(found.root, found.write(edit, "RMSNormalization"))

    def _rewrite_simplified(self, node: ir.Node, edit: Editor) -> bool:
        if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
            return self.left(node, "its inverse root is used too, which RMSNormalization doesn't give")
        if not self._has_opset(node, edit):
            return False
        old = node.outputs[0]
        attributes = {name: a.value for name, a in node.attributes.items() if name in ("axis", "epsilon", "stash_type")}
        edit.replace(old, edit.op("RMSNormalization", node.inputs[:2], attributes, like=old))
        return self.applied(node, "RMSNormalization")

    def _has_opset(self, node: ir.Node, edit: Editor) -> bool:
        if edit.opset >= OPSET:
            return True
        return self.left(node, f"needs opset {OPSET}, the model has {edit.opset}: run convert-opset first")
