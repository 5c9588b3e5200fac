"""What passes that merge convolutions share: a Conv with all its numbers, and writing a new one."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import onnx_ir as ir

from graphopt.analysis.windows import Sizes, group_of, window_of
from graphopt.graph.edits import Editor
from graphopt.passes.fold.kernels import Kernel
from graphopt.passes.fold.layers import Layer, Numbers, layer_of
from graphopt.passes.raise_.shape_rules import ShapeRulePass


@dataclasses.dataclass(frozen=True)
class Convolution:
    """A Conv whose weights, bias and window are certain.

    Attributes:
        layer: Its node and weight.
        kernel: Its weights with their window.
        bias: What it adds to each output channel: [M], zeros where it has no bias.
    """

    layer: Layer
    kernel: Kernel
    bias: Numbers

    @property
    def shared(self) -> str | None:
        """Why replacing its weights wouldn't free them (with two readers, one copy is made at most)."""
        value = self.layer.node.inputs[1]
        readers = 0 if value is None else len(value.uses())
        return f"the weights of {self.layer.name} are shared with {readers - 1} other nodes" if readers > 2 else None


class ConvRulePass(ShapeRulePass):
    """A rule pass that reads and writes convolutions."""

    def convolution(self, node: ir.Node) -> Convolution | str:
        """A Conv with its numbers, or why they aren't certain."""
        layer = layer_of(node)
        if isinstance(layer, str):
            return layer
        shape = tuple(layer.weight.shape.numpy())
        group = group_of(node)
        if node.op_type != "Conv" or len(shape) < 3 or math.prod(shape) == 0 or group < 1 or shape[0] % group:
            return f"the weights of {layer.name} are no kernel"
        window = window_of(node, shape[2:], lambda: self.sizes(node.inputs[0], len(shape)))
        if isinstance(window, str):
            return window
        bias = layer.bias()
        if isinstance(bias, str):
            return bias
        kernel = Kernel(shape, group, window, layer.weight.dtype, layer.weight.numpy)
        return Convolution(layer, kernel, np.broadcast_to(bias.reshape(-1), (shape[0],)))

    def sizes(self, value: ir.Value | None, rank: int) -> Sizes:
        """The spatial sizes of `value`, None where one isn't certain."""
        shape = None if value is None else self.shape(value)
        return shape[2:] if shape is not None and len(shape) == rank else (None,) * (rank - 2)

    def conv(self, x: ir.Value | None, kernel: Kernel, bias: Numbers | None, like: ir.Value, edit: Editor) -> ir.Value:
        """A new Conv of `x` at the site."""
        inputs = [x, edit.constant(kernel.tensor(), "weight")]
        if bias is not None:
            inputs.append(edit.constant(bias.astype(kernel.dtype.numpy()), "bias"))
        return edit.op("Conv", inputs, kernel.window.attributes(kernel.group), like=like)


def overflow(numbers: Numbers, dtype: ir.DataType) -> str | None:
    """Why a bias can't be written in `dtype`."""
    with np.errstate(over="ignore"):
        finite = np.isfinite(numbers.astype(dtype.numpy()).astype(np.float64)).all()
    return None if finite else f"the bias would overflow {dtype.name.lower()}"
