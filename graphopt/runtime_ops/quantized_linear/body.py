"""The portable body of QuantizedLinear, and the parts that other bodies share with it."""

# mypy: ignore-errors
# ruff: noqa: D103
from onnxscript import opset18 as op
from onnxscript import script
from onnxscript.values import Opset

from graphopt.runtime_ops.operator import DOMAIN, VERSION

_domain = Opset(DOMAIN, VERSION)


@script(_domain, default_opset=op)
def Given(value, shape, default):
    """A value of a shape; the default everywhere where it is the empty tensor.

    A branch of an If would do, but ONNX Runtime infers the shapes of both, and refuses those that don't fit.
    """
    size = op.ReduceProd(shape, keepdims=1)
    fill = op.Expand(op.CastLike(default, value), size)
    return op.Reshape(op.Slice(op.Concat(op.Reshape(value, [-1]), fill, axis=0), [0], size), shape, allowzero=1)


@script(_domain, default_opset=op)
def Dequantized(packed, scales, zero_points, minimums, bits: int, block_size: int):
    """The weight [rows, blocks · block_size] as float32."""
    width = op.Constant(value_int=bits)
    one_byte = op.Constant(value_int=8)
    shifts = op.Cast(op.Range(op.Constant(value_int=0), one_byte, width), to=2)
    levels = op.Pow(op.Constant(value_float=2.0), op.Cast(width, to=1))
    mask = op.Cast(op.Sub(levels, op.Constant(value_float=1.0)), to=2)
    rows = op.Shape(packed, start=0, end=1)
    blocks = op.Shape(packed, start=1, end=2)
    block = op.Reshape(op.Constant(value_int=block_size), op.Constant(value_ints=[1]))
    parts = op.BitwiseAnd(op.BitShift(op.Unsqueeze(packed, [3]), shifts, direction="RIGHT"), mask)
    numbers = op.Cast(op.Reshape(parts, op.Concat(rows, blocks, block, axis=0), allowzero=1), to=1)
    by_block = op.Concat(rows, blocks, [1], axis=0)
    # Zero points, unpacked; where there are none, the middle of the numbers, or zero beside minimums.
    bytes_of_row = op.Div(op.Add(op.Mul(blocks, op.Reshape(width, [1])), [7]), [8])
    stored = op.Unsqueeze(Given(zero_points, op.Concat(rows, bytes_of_row, axis=0), 0), [2])
    spread = op.BitwiseAnd(op.BitShift(stored, shifts, direction="RIGHT"), mask)
    in_row = op.Mul(bytes_of_row, op.Shape(shifts))
    unpacked = op.Slice(op.Reshape(spread, op.Concat(rows, in_row, axis=0), allowzero=1), [0], blocks, [1])
    symmetric = op.Cast(op.Size(minimums) == 0, to=1)
    middle = op.Mul(op.Div(levels, op.Constant(value_float=2.0)), symmetric)
    zeros = op.Where(op.Size(zero_points) == 0, middle, op.Unsqueeze(op.Cast(unpacked, to=1), [2]))
    scaled = op.Mul(op.Sub(numbers, zeros), op.Reshape(op.Cast(scales, to=1), by_block, allowzero=1))
    weight = op.Add(scaled, Given(op.Cast(minimums, to=1), by_block, 0.0))
    return op.Reshape(weight, op.Concat(rows, op.Mul(blocks, block), axis=0), allowzero=1)


@script(_domain, default_opset=op)
def Rounded(x, block_size: int, activation_bits: int):
    """Activations [..., K] as the multiples of their blocks' scales that they are rounded to."""
    block = op.Reshape(op.Constant(value_int=block_size), op.Constant(value_ints=[1]))
    # 127 for 8 bits; 127 · 256 for 16, since a product takes the high bytes and the low ones apart.
    low_byte = op.Sub(op.Constant(value_int=activation_bits), op.Constant(value_int=8))
    shift = op.Pow(op.Constant(value_float=2.0), op.Cast(low_byte, to=1))
    most = op.Mul(op.Constant(value_float=127.0), shift)
    shape = op.Shape(x)
    by_block = op.Concat(
        op.Slice(shape, [0], [-1]), op.Div(op.Slice(shape, [-1], [9223372036854775807]), block), block, axis=0
    )
    blocks = op.Reshape(x, by_block, allowzero=1)
    peaks = op.ReduceMax(op.Abs(blocks), [-1], keepdims=1)
    # Blocks of next to nothing become zeros: the inverse of their largest number wouldn't be finite.
    inverse = op.Where(peaks > 1e-30, op.Div(most, peaks), op.Constant(value_float=0.0))
    return op.Reshape(op.Mul(op.Round(op.Mul(blocks, inverse)), op.Div(peaks, most)), shape, allowzero=1)


@script(_domain, default_opset=op)
def Normalised(x, norm, epsilon: float):
    """Activations [..., K] over their root mean square, times the gains; as they are where there are no gains."""
    squares = op.ReduceMean(op.Mul(x, x), [-1], keepdims=1)
    root = op.Sqrt(op.Add(squares, op.Constant(value_float=epsilon)))
    width = op.Slice(op.Shape(x), [-1], [9223372036854775807])
    return op.Where(op.Size(norm) == 0, x, op.Mul(op.Div(x, root), Given(norm, width, 1.0)))


@script(_domain, default_opset=op)
def QuantizedLinear(
    x, norm, weight, scales, zero_points, minimums, bias, residual,
    bits: int, block_size: int, activation_bits: int, epsilon: float,
):  # fmt: skip
    normal = Normalised(op.Cast(x, to=1), norm, epsilon=epsilon)
    rounded = Rounded(normal, block_size=block_size, activation_bits=activation_bits)
    matrix = Dequantized(weight, scales, zero_points, minimums, bits=bits, block_size=block_size)
    product = op.MatMul(rounded, op.Transpose(matrix, perm=[1, 0]))
    biased = op.Add(product, Given(bias, op.Shape(matrix, start=0, end=1), 0.0))
    y = op.Add(biased, Given(op.Cast(residual, to=1), op.Shape(product), 0.0))
    return op.CastLike(y, x)


BODY = QuantizedLinear
PARTS = (Dequantized, Rounded, Normalised, Given)
