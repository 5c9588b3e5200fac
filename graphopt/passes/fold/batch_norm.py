"""fold-batch-norm: batch normalization goes into the weights beside it."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.graph.constants import constant_array
from graphopt.graph.edits import Editor
from graphopt.passes.fold.layers import Layer, Numbers, layer_of, sole_reader
from graphopt.passes.raise_.shape_rules import ShapeRulePass


@dataclasses.dataclass(frozen=True)
class _Affine:
    """y = scale · x + shift for each channel, in float64: [C]."""

    scale: Numbers
    shift: Numbers


class FoldBatchNorm(ShapeRulePass):
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
    2. BatchNormalization, then Conv without padding (with padding only where t = 0, since the border is padded with
       zeros after the normalization), ConvTranspose where t = 0, Gemm, or MatMul: into that layer.
    3. A batch normalization that was spelled out: Conv or ConvTranspose, then Mul, Div, Add or Sub with a constant of
       one number a channel ([C,1,1] for images): into that layer, one after the other.

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
        before = self._fold_into_producer(node, affine, edit)
        if isinstance(before, Layer):
            return self.applied(node, f"folded into {before.name} before it")
        behind = self._fold_into_reader(node, affine, edit)
        if isinstance(behind, Layer):
            return self.applied(node, f"folded into {behind.name} behind it")
        return self.left(node, f"before it: {before}; behind it: {behind}")

    def _fold_into_producer(self, node: ir.Node, affine: _Affine, edit: Editor) -> Layer | str:
        x = node.inputs[0]
        producer = None if x is None else x.producer()
        if x is None or producer is None:
            return "no layer"
        layer = layer_of(producer)
        if isinstance(layer, str):
            return layer
        if (why := sole_reader(x)) is not None:
            return why
        if producer.graph is not node.graph:
            return f"{layer.name} is in an outer graph"
        if layer.node.op_type == "MatMul" and self.rank(x) != 2:
            return f"the output of {layer.name} isn't known to be a matrix, so its columns may not be the channels"
        return _scale_output(layer, affine, node, edit)

    def _fold_into_reader(self, node: ir.Node, affine: _Affine, edit: Editor) -> Layer | str:
        x, y = node.inputs[0], node.outputs[0]
        assert x is not None
        if (why := sole_reader(y)) is not None:
            return why
        if not y.uses():
            return "nothing reads it"
        (use,) = y.uses()
        layer = layer_of(use.node)
        if isinstance(layer, str) or layer.add is not None:
            return layer if isinstance(layer, str) else f"{use.node.op_type} has no weights to fold into"
        if use.idx != 0:
            return f"it isn't the input of {layer.name}"
        if layer.node.graph is not node.graph:
            return f"{layer.name} is in an inner graph"
        why = self._blurred(layer, affine, x)
        if why is not None:
            return why
        if layer.inputs != affine.scale.size:
            return f"{layer.name} takes {layer.inputs} channels, not {affine.scale.size}"
        add = _bias_behind(layer)
        layer = dataclasses.replace(layer, add=add)
        bias = layer.bias()
        if isinstance(bias, str):
            return bias
        factor = layer.per_input(affine.scale)
        if (why := layer.problem(factor)) is not None:
            return why
        bias = bias + layer.response(affine.shift) if affine.shift.any() else bias
        if (why := _overflow(layer, bias)) is not None:
            return why
        old = layer.output
        edit.set_input(layer.node, 0, x)
        new = layer.change(factor, bias, edit)
        if new is not old:
            edit.replace(old, new)
        return layer

    def _blurred(self, layer: Layer, affine: _Affine, x: ir.Value) -> str | None:
        """Why the channels of the input, or a shift of them, don't reach every output in the same way."""
        attributes = layer.node.attributes
        if layer.node.op_type == "Gemm":
            transposed = attributes.get("transA")
            return f"{layer.name} transposes its input" if transposed is not None and transposed.value else None
        if layer.node.op_type == "MatMul":
            return None if self.rank(x) == 2 else f"the input of {layer.name} isn't known to be a matrix"
        if not affine.shift.any():
            return None
        if layer.node.op_type == "ConvTranspose":
            return f"the border of {layer.name} gets less of the shift than its middle"
        pads, auto_pad = attributes.get("pads"), attributes.get("auto_pad")
        padded = pads is not None and any(pads.value)
        if auto_pad is not None and auto_pad.value not in ("NOTSET", "VALID"):
            padded = True
        return f"{layer.name} pads its input with zeros, which the shift would have to spare" if padded else None

    def _fold_spelled_out(self, node: ir.Node, edit: Editor) -> bool:
        for index, x in enumerate(node.inputs):
            producer = None if x is None else x.producer()
            if x is None or producer is None or producer.op_type not in ("Conv", "ConvTranspose"):
                continue
            array = constant_array(node.inputs[1 - index])
            if array is None or sole_reader(x) is not None or producer.graph is not node.graph:
                return False
            if index == 1 and node.op_type in ("Sub", "Div"):
                return False
            layer = layer_of(producer)
            if isinstance(layer, str):
                return self.left(node, layer)
            aligned = (1,) * (layer.rank - array.ndim) + array.shape
            if aligned != (1, layer.outputs, *(1 for _ in aligned[2:])):
                return False
            affine = _spelled_out(node.op_type, array.astype(np.float64).reshape(-1))
            done = _scale_output(layer, affine, node, edit)
            if isinstance(done, str):
                return self.left(node, done)
            return self.applied(node, f"folded into {done.name} before it")
        return False


def _scale_output(layer: Layer, affine: _Affine, node: ir.Node, edit: Editor) -> Layer | str:
    """Let the layer do what `node`, its only reader, does, and remove `node`; or say why not."""
    if affine.scale.size != layer.outputs:
        return f"{layer.name} has {layer.outputs} channels, not {affine.scale.size}"
    if not np.isfinite(affine.scale).all():
        return "it divides by 0"
    bias = layer.bias()
    if isinstance(bias, str):
        return bias
    factor = layer.per_output(affine.scale)
    if (why := layer.problem(factor)) is not None:
        return why
    bias = bias * affine.scale + affine.shift
    if (why := _overflow(layer, bias)) is not None:
        return why
    edit.replace(node.outputs[0], layer.change(factor, bias, edit))
    return layer


def _overflow(layer: Layer, bias: Numbers) -> str | None:
    with np.errstate(over="ignore"):
        rounded = bias.astype(layer.weight.dtype.numpy()).astype(np.float64)
    return None if np.isfinite(rounded).all() else f"the bias of {layer.name} would overflow"


def _bias_behind(layer: Layer) -> ir.Node | None:
    """The Add of a constant that alone reads a MatMul, where it adds one number a column."""
    output = layer.output
    if layer.node.op_type != "MatMul" or sole_reader(output) is not None:
        return None
    for use in output.uses():
        ended = layer_of(use.node) if use.node.op_type == "Add" and use.node.graph is layer.node.graph else ""
        if isinstance(ended, Layer) and not isinstance(ended.bias(), str):
            return ended.add
    return None


def _spelled_out(op_type: str, numbers: Numbers) -> _Affine:
    """What Mul, Div, Add or Sub does to its first operand when `numbers`, [C], are the second."""
    one, zero = np.ones_like(numbers), np.zeros_like(numbers)
    if op_type == "Mul":
        return _Affine(numbers, zero)
    if op_type == "Div":
        with np.errstate(divide="ignore"):
            return _Affine(1 / numbers, zero)
    return _Affine(one, numbers if op_type == "Add" else -numbers)


def normalization(node: ir.Node, opset: int) -> _Affine | str:
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
    return _Affine(scale, beta - scale * mean)
