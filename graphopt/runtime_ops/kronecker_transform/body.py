"""The portable body of KroneckerTransform."""

# mypy: ignore-errors
# ruff: noqa: D103
from onnxscript import opset18 as op
from onnxscript import script
from onnxscript.values import Opset

from graphopt.runtime_ops.operator import DOMAIN, VERSION


@script(Opset(DOMAIN, VERSION), default_opset=op)
def KroneckerTransform(x, left, right):
    rows = op.Shape(left, start=0, end=1)
    columns = op.Shape(right, start=0, end=1)
    tokens = op.Reshape(op.Cast(x, to=1), op.Concat(op.Constant(value_ints=[-1]), rows, columns, axis=0))
    # Aᵀ T as (Tᵀ A)ᵀ, and Tᵀ of all tokens one matrix: then it may be of none.
    turned = op.Transpose(op.MatMul(tokens, right), perm=[0, 2, 1])
    rest = op.Constant(value_ints=[-1])
    mixed = op.MatMul(op.Reshape(turned, op.Concat(rest, rows, axis=0)), left)
    transformed = op.Transpose(op.Reshape(mixed, op.Concat(rest, columns, rows, axis=0)), perm=[0, 2, 1])
    return op.CastLike(op.Reshape(transformed, op.Shape(x), allowzero=1), x)


BODY = KroneckerTransform
