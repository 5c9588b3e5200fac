"""The portable body of HadamardQuantize."""

# mypy: ignore-errors
# ruff: noqa: D103
from onnxscript import opset18 as op
from onnxscript import script
from onnxscript.values import Opset

from graphopt.runtime_ops.hadamard_transform.body import HadamardTransform
from graphopt.runtime_ops.operator import DOMAIN, VERSION

_domain = Opset(DOMAIN, VERSION)


@script(_domain, default_opset=op)
def QuantizedTokens(x, clip: float, largest: int):
    """Tokens of float32 as uint8 around 128, and one scale each."""
    # A product with 0 is NaN where a number isn't finite, and makes the scale NaN.
    most = op.Cast(op.Constant(value_int=largest), to=1)
    magnitude = op.ReduceMax(op.Abs(x), [-1], keepdims=1)
    told = op.ReduceSum(op.Mul(x, op.Constant(value_float=0.0)), [-1], keepdims=1)
    raw = op.Div(op.Mul(magnitude, op.Constant(value_float=clip)), most)
    tiny = op.Less(raw, op.Constant(value_float=1.1754943508222875e-38))
    # Of no tokens at all, ONNX Runtime's reductions keep the features.
    y_scale = op.Slice(op.Add(op.Where(tiny, op.Constant(value_float=1.0), raw), told), [0], [1], [-1])
    scaled = op.Mul(x, op.Div(op.Constant(value_float=1.0), y_scale))
    rounded = op.Round(op.Min(op.Max(scaled, op.Neg(most)), most))
    shifted = op.Add(op.Where(op.IsNaN(y_scale), op.Constant(value_float=0.0), rounded), op.Constant(value_float=128.0))
    return op.Cast(shifted, to=2), y_scale


@script(_domain, default_opset=op)
def HadamardQuantize(x, factor, group_size: int, scale: float, clip: float, largest: int):
    # In float32 whatever the type of x.
    rotated = HadamardTransform(op.Cast(x, to=1), factor, group_size=group_size, scale=scale)
    y, y_scale = QuantizedTokens(rotated, clip=clip, largest=largest)
    return y, y_scale


BODY = HadamardQuantize
PARTS = (HadamardTransform, QuantizedTokens)
