"""The portable body of HadamardQuantize."""

# mypy: ignore-errors
# ruff: noqa: D103
from onnxscript import opset18 as op
from onnxscript import script
from onnxscript.values import Opset

from graphopt.runtime_ops.operator import DOMAIN, VERSION


@script(Opset(DOMAIN, VERSION), default_opset=op)
def HadamardQuantize(x, factor, group_size: int, scale: float, clip: float, largest: int):
    # HadamardTransform, in float32 whatever the type of x.
    rows = op.Size(factor) / op.Shape(factor, start=0, end=1)
    group = op.Reshape(op.Constant(value_int=group_size), op.Constant(value_ints=[1]))
    halves = group / rows
    blocks = op.Concat(op.Constant(value_ints=[-1]), halves, rows, axis=0)
    values = op.MatMul(op.Reshape(op.Cast(x, to=1), blocks), op.Transpose(factor, perm=[1, 0]))
    levels = op.Cast(op.Round(op.Div(op.Log(op.Cast(halves, to=1)), op.Log(op.Constant(value_float=2.0)))), to=7)
    width = rows
    for _ in range(op.Squeeze(levels)):
        pairs = op.Reshape(values, op.Concat(op.Constant(value_ints=[-1, 2]), width, axis=0))
        first = op.Slice(pairs, [0], [1], [1])
        second = op.Slice(pairs, [1], [2], [1])
        values = op.Concat(op.Add(first, second), op.Sub(first, second), axis=1)
        width = op.Add(width, width)
    rotated = op.Reshape(op.Mul(values, op.Constant(value_float=scale)), op.Shape(x), allowzero=1)
    # One scale a token. A product with 0 is NaN where a number isn't finite, and makes the scale NaN.
    most = op.Cast(op.Constant(value_int=largest), to=1)
    magnitude = op.ReduceMax(op.Abs(rotated), [-1], keepdims=1)
    told = op.ReduceSum(op.Mul(rotated, op.Constant(value_float=0.0)), [-1], keepdims=1)
    raw = op.Div(op.Mul(magnitude, op.Constant(value_float=clip)), most)
    tiny = op.Less(raw, op.Constant(value_float=1.1754943508222875e-38))
    # Of no tokens at all, ONNX Runtime's reductions keep the features.
    y_scale = op.Slice(op.Add(op.Where(tiny, op.Constant(value_float=1.0), raw), told), [0], [1], [-1])
    scaled = op.Mul(rotated, op.Div(op.Constant(value_float=1.0), y_scale))
    rounded = op.Round(op.Min(op.Max(scaled, op.Neg(most)), most))
    shifted = op.Add(op.Where(op.IsNaN(y_scale), op.Constant(value_float=0.0), rounded), op.Constant(value_float=128.0))
    return op.Cast(shifted, to=2), y_scale


BODY = HadamardQuantize
