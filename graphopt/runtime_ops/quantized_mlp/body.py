"""The portable body of QuantizedMlp."""

# mypy: ignore-errors
# ruff: noqa: D103
from onnxscript import opset18 as op
from onnxscript import script
from onnxscript.values import Opset

from graphopt.runtime_ops.operator import DOMAIN, VERSION
from graphopt.runtime_ops.quantized_linear.body import Dequantized, Given, Normalised, Rounded


@script(Opset(DOMAIN, VERSION), default_opset=op)
def Activated(x, activation: int):
    kind = op.Constant(value_int=activation)
    if kind == 0:
        y = op.Mul(x, op.Sigmoid(x))
    else:
        if kind == 1:
            y = op.Mul(op.Mul(x, 0.5), op.Add(op.Erf(op.Mul(x, 0.7071067811865476)), 1.0))
        else:
            if kind == 2:
                cubic = op.Add(x, op.Mul(op.Mul(op.Mul(x, x), x), 0.044715))
                y = op.Mul(op.Mul(x, 0.5), op.Add(op.Tanh(op.Mul(cubic, 0.7978845608028654)), 1.0))
            else:
                y = op.Relu(x)
    return y


@script(Opset(DOMAIN, VERSION), default_opset=op)
def QuantizedMlp(
    x, norm,
    gate_up, gate_up_scales, gate_up_zero_points, gate_up_minimums,
    down, down_scales, down_zero_points, down_minimums,
    bits: int, block_size: int, activation_bits: int, activation: int, epsilon: float,
):  # fmt: skip
    stream = op.Cast(x, to=1)
    normal = Rounded(Normalised(stream, norm, epsilon=epsilon), block_size=block_size, activation_bits=activation_bits)
    first = Dequantized(
        gate_up, gate_up_scales, gate_up_zero_points, gate_up_minimums, bits=bits, block_size=block_size
    )
    gate, up = op.Split(op.MatMul(normal, op.Transpose(first, perm=[1, 0])), axis=-1, num_outputs=2)
    hidden = op.Mul(Activated(gate, activation=activation), up)
    rounded = Rounded(hidden, block_size=block_size, activation_bits=activation_bits)
    second = Dequantized(down, down_scales, down_zero_points, down_minimums, bits=bits, block_size=block_size)
    return op.CastLike(op.Add(stream, op.MatMul(rounded, op.Transpose(second, perm=[1, 0]))), x)


BODY = QuantizedMlp
PARTS = (Dequantized, Rounded, Normalised, Given, Activated)
