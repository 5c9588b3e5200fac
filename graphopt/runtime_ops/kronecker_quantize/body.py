"""The portable body of KroneckerQuantize."""

# mypy: ignore-errors
# ruff: noqa: D103
from onnxscript import opset18 as op
from onnxscript import script
from onnxscript.values import Opset

from graphopt.runtime_ops.operator import DOMAIN, VERSION


@script(Opset(DOMAIN, VERSION), default_opset=op)
def KroneckerQuantize(x, left, right, clip: float, largest: int):
    # KroneckerTransform, in float32 whatever the type of x.
    rows = op.Shape(left, start=0, end=1)
    columns = op.Shape(right, start=0, end=1)
    tokens = op.Reshape(op.Cast(x, to=1), op.Concat(op.Constant(value_ints=[-1]), rows, columns, axis=0))
    # Aᵀ T as (Tᵀ A)ᵀ, and Tᵀ of all tokens one matrix: then it may be of none.
    turned = op.Transpose(op.MatMul(tokens, right), perm=[0, 2, 1])
    rest = op.Constant(value_ints=[-1])
    mixed = op.MatMul(op.Reshape(turned, op.Concat(rest, rows, axis=0)), left)
    product = op.Transpose(op.Reshape(mixed, op.Concat(rest, columns, rows, axis=0)), perm=[0, 2, 1])
    transformed = op.Reshape(product, op.Shape(x), allowzero=1)
    # One scale a token. A product with 0 is NaN where a number isn't finite, and makes the scale NaN.
    most = op.Cast(op.Constant(value_int=largest), to=1)
    magnitude = op.ReduceMax(op.Abs(transformed), [-1], keepdims=1)
    told = op.ReduceSum(op.Mul(transformed, op.Constant(value_float=0.0)), [-1], keepdims=1)
    raw = op.Div(op.Mul(magnitude, op.Constant(value_float=clip)), most)
    tiny = op.Less(raw, op.Constant(value_float=1.1754943508222875e-38))
    # Of no tokens at all, ONNX Runtime's reductions keep the features.
    y_scale = op.Slice(op.Add(op.Where(tiny, op.Constant(value_float=1.0), raw), told), [0], [1], [-1])
    scaled = op.Mul(transformed, op.Div(op.Constant(value_float=1.0), y_scale))
    rounded = op.Round(op.Min(op.Max(scaled, op.Neg(most)), most))
    shifted = op.Add(op.Where(op.IsNaN(y_scale), op.Constant(value_float=0.0), rounded), op.Constant(value_float=128.0))
    return op.Cast(shifted, to=2), y_scale


BODY = KroneckerQuantize
