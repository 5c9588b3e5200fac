"""The portable body of KroneckerQuantize."""

# mypy: ignore-errors
# ruff: noqa: D103
from onnxscript import opset18 as op
from onnxscript import script
from onnxscript.values import Opset

from graphopt.runtime_ops.hadamard_quantize.body import QuantizedTokens
from graphopt.runtime_ops.kronecker_transform.body import KroneckerTransform
from graphopt.runtime_ops.operator import DOMAIN, VERSION


@script(Opset(DOMAIN, VERSION), default_opset=op)
def KroneckerQuantize(x, left, right, clip: float, largest: int):
    # In float32 whatever the type of x.
    transformed = KroneckerTransform(op.Cast(x, to=1), left, right)
    y, y_scale = QuantizedTokens(transformed, clip=clip, largest=largest)
    return y, y_scale


BODY = KroneckerQuantize
PARTS = (KroneckerTransform, QuantizedTokens)
