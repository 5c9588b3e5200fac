"""Activations as uint8 while the model runs: one scale for all of a value, or one for each token."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.algebra import producer
from graphopt.graph.edits import Editor

CONTRIB = "com.microsoft"
_TINY = 1e-30
"""What a token of zeros is divided by."""
_LEAST = {"Gelu": 0.1700, "Relu": _TINY, "Sigmoid": _TINY, "Softmax": _TINY}
"""Activations that go no further below 0 than this: where the largest number is above it, it is the largest magnitude
too."""
_REDUCE_AXES = 18
"""The opset from which ReduceMax takes its axes as an input."""


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A value as uint8: x = scale · (codes - zero_point).

    Attributes:
        codes: uint8 [..., K].
        scale: float32 [], or [..., 1] where `by_token`.
        zero_point: uint8 [].
        by_token: Whether each token has a scale.
    """

    codes: ir.Value
    scale: ir.Value
    zero_point: ir.Value
    by_token: bool

    def product(
        self, codes: ir.Value, scales: ir.Value, bias: ir.Value | None, edit: Editor, like: ir.Value | None = None
    ) -> ir.Value:
        """x · W + b, float32 [..., N], by int8 [K, N], its scales float32 [N], and b, float32 [N]."""
        # With a scale for each row ONNX Runtime (1.22 and 1.31) leaves out the bias that the node is given.
        inside = None if self.by_token else bias
        inputs = [self.codes, codes, self.scale, scales, self.zero_point, None, inside]
        y = edit.op("MatMulIntegerToFloat", inputs, domain=CONTRIB, like=like)
        return y if bias is inside else edit.op("Add", [y, bias], like=like)


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """How a value is quantized.

    Attributes:
        x: The value, float32 [..., K].
        edit: Where it is written.
        by_token: A scale for each token.
        shifted: Look for the least number of all too, so that a value that is mostly on one side of 0 has all codes
            for that side; of a value without tokens' scales it always is.
        kept: float32 [K], 0 for features that don't count for a token's scale and are cut off; None: all count.
    """

    x: ir.Value
    edit: Editor
    by_token: bool
    shifted: bool = False
    kept: npt.NDArray[np.float32] | None = None

    def write(self) -> Quantized:
        """Write it at the site of the editor."""
        edit, x = self.edit, self.x
        if self.kept is not None:
            x = edit.op("Mul", [x, edit.constant(self.kept, "kept")], like=x)
        if not self.by_token:
            return Quantized(*self._whole(x), by_token=False)
        largest = self._largest(x)
        unit = edit.op("Div", [x, largest], like=x)
        if self.shifted:
            codes, step, zero_point = self._whole(unit)
            return Quantized(codes, edit.op("Mul", [largest, step]), zero_point, by_token=True)
        step = edit.constant(np.array(1 / 127, np.float32), "step")
        zero_point = edit.constant(np.array(128, np.uint8), "zero_point")
        codes = edit.op("QuantizeLinear", [unit, step, zero_point])
        return Quantized(codes, edit.op("Mul", [largest, step]), zero_point, by_token=True)

    def _whole(self, x: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        made = self.edit.op("DynamicQuantizeLinear", [x], outputs=3).producer()
        assert made is not None
        codes, step, zero_point = made.outputs
        return codes, step, zero_point

    def _largest(self, x: ir.Value) -> ir.Value:
        """The largest magnitude of each token, [..., 1], above 0."""
        edit = self.edit
        activation = producer(x, *_LEAST)
        least = _TINY if activation is None else _LEAST[activation.op_type]
        magnitude = edit.op("Abs", [x], like=x) if activation is None else x
        if edit.opset >= _REDUCE_AXES:
            axes = edit.constant(np.array([-1]), "last")
            found = edit.op("ReduceMax", [magnitude, axes], {"keepdims": 1})
        else:
            found = edit.op("ReduceMax", [magnitude], {"axes": [-1], "keepdims": 1})
        # Of no tokens at all, ONNX Runtime's reductions keep the features.
        one, last = edit.constant(np.array([1]), "one"), edit.constant(np.array([-1]), "last")
        found = edit.op("Slice", [found, edit.constant(np.array([0]), "zero"), one, last])
        return edit.op("Max", [found, edit.constant(np.array(least, np.float32), "least")])
