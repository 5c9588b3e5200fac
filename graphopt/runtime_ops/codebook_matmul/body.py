"""The portable body of CodebookMatMul: the weights written out, and one MatMul."""

# mypy: ignore-errors
# ruff: noqa: D103
import onnx
from onnxscript import opset18 as op
from onnxscript import script
from onnxscript.values import Opset

from graphopt.runtime_ops.operator import DOMAIN, VERSION


@script(Opset(DOMAIN, VERSION), default_opset=op)
def CodebookMatMul(
    x,
    indices,
    codebooks,
    scales,
    selectors,
    outlier_rows,
    outlier_columns,
    outlier_values,
    bias,
    columns: int,
    bits: int,
    group_size: int,
    activation_block: int,
):
    one = op.Constant(value_ints=[1])
    zero = op.Constant(value_ints=[0])
    width = op.Reshape(op.Constant(value_int=bits), one)
    group = op.Reshape(op.Constant(value_int=group_size), one)
    depth = op.Reshape(op.Constant(value_int=columns), one)
    rows = op.Shape(scales, start=0, end=1)
    tile_rows = op.Shape(codebooks, start=2, end=3)
    tile_columns = op.Shape(codebooks, start=3, end=4)

    # The indices: each lies within the three bytes from the one that its first bit is in.
    index_rows = op.Shape(indices, start=0, end=1)
    per_row = (depth + tile_columns - one) / tile_columns
    numbers = op.Range(op.Squeeze(zero), op.Squeeze(per_row), op.Squeeze(one))
    first_bits = numbers * width
    padded = op.Pad(indices, op.Constant(value=onnx.helper.make_tensor("pads", 7, [4], [0, 0, 0, 2])))
    bytes_at = first_bits / op.Constant(value_ints=[8])
    low = op.Cast(op.Gather(padded, bytes_at, axis=1), to=12)
    middle = op.Cast(op.Gather(padded, bytes_at + one, axis=1), to=12)
    high = op.Cast(op.Gather(padded, bytes_at + op.Constant(value_ints=[2]), axis=1), to=12)
    shifted = op.BitShift(
        op.BitwiseOr(
            op.BitwiseOr(low, op.BitShift(middle, op.Cast(op.Constant(value_ints=[8]), to=12), direction="LEFT")),
            op.BitShift(high, op.Cast(op.Constant(value_ints=[16]), to=12), direction="LEFT"),
        ),
        op.Cast(op.Mod(first_bits, op.Constant(value_ints=[8])), to=12),
        direction="RIGHT",
    )
    power = op.BitShift(op.Cast(one, to=12), op.Cast(width, to=12), direction="LEFT")
    mask = op.Cast(op.Cast(power, to=7) - one, to=12)
    found = op.Cast(op.BitwiseAnd(shifted, mask), to=7)

    # The codebook of each: what the selectors say, which follow on one another with nothing before the default.
    groups = op.Shape(scales, start=1, end=2)
    row_numbers = op.Range(op.Squeeze(zero), op.Squeeze(index_rows), op.Squeeze(one))
    several = op.Cast(op.Shape(codebooks, start=0, end=1) > one, to=7)
    default = op.Expand(op.Unsqueeze(row_numbers * several, one), op.Concat(index_rows, groups, axis=0))
    flat = op.Concat(op.Reshape(op.Cast(selectors, to=7), [-1]), op.Reshape(default, [-1]), axis=0)
    selected = op.Reshape(op.Slice(flat, zero, index_rows * groups), op.Concat(index_rows, groups, axis=0), allowzero=1)
    books = op.Gather(selected, numbers * tile_columns / group, axis=1)
    entries = op.Shape(codebooks, start=1, end=2)
    table = op.Reshape(codebooks, op.Concat([-1], tile_rows, tile_columns, axis=0))
    tiles = op.Transpose(op.Gather(table, books * entries + found), perm=[0, 2, 1, 3])
    whole = op.Reshape(tiles, op.Concat(index_rows * tile_rows, per_row * tile_columns, axis=0), allowzero=1)
    values = op.Slice(whole, [0, 0], op.Concat(rows, depth, axis=0), [0, 1])
    column_numbers = op.Range(op.Squeeze(zero), op.Squeeze(depth), op.Squeeze(one))
    weights = values * op.Gather(op.Cast(scales, to=1), column_numbers / group, axis=1)

    # The outliers: the row of each is the number of rows that have ended before it.
    count = op.Shape(outlier_values)
    ends = op.Unsqueeze(op.Cast(op.Slice(outlier_rows, [1], [-1]), to=7), one)
    none_ended = op.ConstantOfShape(count + one)
    ended = op.ScatterND(none_ended, ends, op.ConstantOfShape(op.Shape(ends, end=1)) + 1.0, reduction="add")
    row_of = op.Slice(op.CumSum(op.Cast(ended, to=7), op.Squeeze(zero)), zero, count)
    places = op.Concat(op.Unsqueeze(row_of, one), op.Unsqueeze(op.Cast(outlier_columns, to=7), one), axis=1)
    weights = op.ScatterND(weights, places, outlier_values, reduction="add")

    # The activation, quantized to 8 bits or not. A block with a number that isn't finite becomes NaN.
    asked = op.Reshape(op.Constant(value_int=activation_block), one)
    block = op.Max(asked, one)  # constants of the branch that isn't taken are computed too
    if op.Squeeze(asked > zero):
        filled = op.Pad(
            op.Cast(x, to=1), op.Concat(zero, op.Mod(block - op.Mod(depth, block), block), axis=0), 0.0, [-1]
        )
        whole_blocks = (depth + block - one) / block
        blocks = op.Reshape(filled, op.Concat(op.Shape(x, start=0, end=-1), whole_blocks, block, axis=0), allowzero=1)
        step = op.ReduceMax(op.Abs(blocks), [-1], keepdims=1) / 127.0 + op.ReduceSum(blocks * 0.0, [-1], keepdims=1)
        rounded = op.Round(blocks / op.Where(step == 0.0, 1.0, step)) * step
        taken = op.Slice(op.Reshape(rounded, op.Shape(filled), allowzero=1), zero, depth, [-1])
    else:
        taken = op.Cast(x, to=1)

    added = op.Slice(op.Concat(op.Cast(bias, to=1), op.ConstantOfShape(rows), axis=0), zero, rows)
    return op.CastLike(op.MatMul(taken, op.Transpose(weights, perm=[1, 0])) + added, x)


BODY = CodebookMatMul
