"""fold-batch-norm: batch normalization goes into the weights beside it."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.graph.constants import constant_array
from graphopt.graph.edits import Editor
from graphopt.passes.fold.channel_affine import Affine, Change, added_columns, into_output, read, replace
from graphopt.passes.fold.layers import layer_of, sole_reader_of_numbers
from graphopt.passes.fold.neighbours import AffinePass, Neighbours


class FoldBatchNorm(AffinePass):
    """Fold inference batch normalization into the weights of the layer before or behind it.

        BatchNorm(x) = γ (x − μ) / √(σ² + ε) + β = s·x + t        s = γ / √(σ² + ε), t = β − s·μ, one pair a channel
        before:   s·(W∗x + b) + t = (s·W)∗x + (s·b + t)
        behind:   W∗(s·x + t) + b = (W·s)∗x + (b + Σ W·t)

    Paper: Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift (Ioffe,
    Szegedy, 2015). The classic target is the Conv + BatchNorm of residual networks (Deep Residual Learning for Image
    Recognition, 2015).

    The rules, in the order in which they are tried:

    1. Conv, ConvTranspose (both with groups), Gemm, or MatMul with or without a constant Add, then BatchNormalization:
       into that layer.
    2. BatchNormalization, then layers alone: Conv without padding (with padding only where t = 0, since the border is
       padded with zeros after the normalization), ConvTranspose where t = 0, Gemm, or MatMul: into all of them.
    3. A batch normalization that was spelled out: Conv or ConvTranspose, then Mul, Div, Add or Sub with a constant of
       one number a channel ([C,1,1] for images): into that layer, one after the other.

    Between the two may stand what only moves numbers (Transpose, Reshape, Slice, Concat), pooling, and Relu for t = 0.

    **Needs:** constant weights, bias and statistics; float64, float32, float16 or bfloat16. **Guarantees:** the same
    function: the new weights are computed in float64 and rounded once. Large ones are computed when they are saved.

    **Left alone, with the reason:** a value between the two that something else reads, or that is a graph output;
    weights that three or more nodes share (with two, one copy is made at most); batch normalization in training form;
    a pre-activation network, whose normalization reads a sum and feeds an activation; weights that would overflow or
    lose bits in float16. `Mul` and `Add` that aren't a spelled-out normalization aren't reported.

    **When not to use it:** before training goes on, or when quantization is to learn the range of each channel first.
    """

    name: ClassVar[str] = "fold-batch-norm"
    family: ClassVar[str] = "fold"
    paper: ClassVar[str] = (
        "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift"
    )
    anchors: ClassVar[tuple[str, ...]] = ("BatchNormalization", "Mul", "Div", "Add", "Sub")

    def rewrite(self, node: ir.Node, edit: Editor) -> bool:
        """See the class."""
        if node.op_type != "BatchNormalization":
            return self._fold_spelled_out(node, edit)
        affine = normalization(node, edit.opset)
        if isinstance(affine, str):
            return self.left(node, affine)
        x, neighbours = node.inputs[0], Neighbours(self)
        assert x is not None
        before = neighbours.before(x, affine, node.graph)
        if not isinstance(before, str):
            return self._replace(node, x, before, "before", edit)
        behind = neighbours.behind(node.outputs[0], affine, node.graph)
        if not isinstance(behind, str):
            if added_columns(behind) <= affine.size:
                return self._replace(node, x, behind, "behind", edit)
            behind = "the shift would have to be added to more numbers than it normalizes"
        return self.left(node, f"before it: {before or 'no layer'}; behind it: {behind}")

    def _fold_spelled_out(self, node: ir.Node, edit: Editor) -> bool:
        found = read(node, self)
        producer = None if found is None else found[0].producer()
        if found is None or producer is None or producer.op_type not in ("Conv", "ConvTranspose"):
            return False
        x, affine = found
        if sole_reader_of_numbers(x) is not None or producer.graph is not node.graph:
            return False
        if node.op_type == "Sub" and node.inputs[1] is x:
            return False
        layer = layer_of(producer)
        if isinstance(layer, str):
            return self.left(node, layer)
        if affine.size != layer.outputs or not affine.on(1, layer.rank):
            return False
        done = into_output(layer, affine, layer.rank)
        return self.left(node, done) if isinstance(done, str) else self._replace(node, x, [done], "before", edit)

    def _replace(self, node: ir.Node, x: ir.Value, changes: list[Change], where: str, edit: Editor) -> bool:
        replace(node, x, changes, edit)
        return self.applied(node, f"folded into {', '.join(c.layer.name for c in changes)} {where} it")


def normalization(node: ir.Node, opset: int) -> Affine | str:
    """Scale and shift of a BatchNormalization in inference, or why it has none."""
    attributes = node.attributes
    if any(a.is_ref() for a in attributes.values()):
        return "it takes an attribute from the function that it is in"
    training = attributes.get("training_mode")
    if training is not None and training.value:
        return "it is in training mode, where its statistics are those of the batch"
    # Before opset 14 it is the presence of these outputs that asks for statistics of the batch.
    if any(out.uses() or out.is_graph_output() or (out.name and opset < 14) for out in node.outputs[1:]):
        return "it gives out its statistics, so it is in training form"
    spatial = attributes.get("spatial")
    if spatial is not None and not spatial.value:
        return "it normalizes every element by statistics of its own (spatial = 0)"
    arrays = [constant_array(value) for value in node.inputs[1:5]]
    if any(array is None for array in arrays):
        return "its scale, shift or statistics aren't constant"
    gamma, beta, mean, variance = (np.asarray(array, dtype=np.float64) for array in arrays)
    epsilon = attributes.get("epsilon")
    # The attribute is a float32: 1e-5 means the float32 that is nearest to it.
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = gamma / np.sqrt(variance + float(np.float32(1e-5 if epsilon is None else epsilon.value)))
    if not np.isfinite(scale).all():
        return "a variance of it is below 0"
    return Affine(scale, beta - scale * mean, axis=1)
