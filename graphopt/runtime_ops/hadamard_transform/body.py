"""The portable body of HadamardTransform."""

# mypy: ignore-errors
# ruff: noqa: D103
from onnxscript import opset18 as op
from onnxscript import script
from onnxscript.values import Opset

from graphopt.runtime_ops.operator import DOMAIN, VERSION


@script(Opset(DOMAIN, VERSION), default_opset=op)
def HadamardTransform(x, factor, group_size: int, scale: float):
    rows = op.Size(factor) / op.Shape(factor, start=0, end=1)
    group = op.Reshape(op.Constant(value_int=group_size), op.Constant(value_ints=[1]))
    halves = group / rows
    # [groups, 2^k, m]: the factor first, then one addition and one subtraction for each level.
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
    scaled = op.Mul(values, op.Constant(value_float=scale))
    return op.CastLike(op.Reshape(scaled, op.Shape(x), allowzero=1), x)


BODY = HadamardTransform
