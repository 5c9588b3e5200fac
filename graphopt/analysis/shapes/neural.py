"""Shape rules of matrix products, convolutions, pooling, resizing, recurrent layers and attention."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphopt.analysis import dim_functions as df
from graphopt.analysis.dims import ONE, Dim
from graphopt.analysis.shapes.elementwise import broadcast_shapes
from graphopt.analysis.shapes.rule import (
    FLOAT,
    INT64,
    Op,
    Result,
    Shape,
    UnknownShapeError,
    axis_of,
    constant_of,
    microsoft,
    rule,
)
from graphopt.graph.constants import constant_array

# ---- matrix products


def matmul_shape(a: Shape, b: Shape) -> Shape:
    """The shape of `a @ b` by numpy's rules; each operand has rank 1 or more."""
    left = a if len(a) > 1 else (ONE, *a)
    right = b if len(b) > 1 else (*b, ONE)
    batch = broadcast_shapes([left[:-2], right[:-2]])
    rows = () if len(a) == 1 else (left[-2],)
    columns = () if len(b) == 1 else (right[-1],)
    return (*batch, *rows, *columns)


@rule("MatMul")
@rule("MatMulInteger", types=ir.DataType.INT32)
@rule(*microsoft("DynamicQuantizeMatMul", "MatMulIntegerToFloat"), types=FLOAT)
def _matmul(op: Op) -> Result:
    return matmul_shape(op.shape(0), op.shape(1))


@rule("QLinearMatMul", types=7)
def _quantized_matmul(op: Op) -> Result:
    return matmul_shape(op.shape(0), op.shape(3))


@rule("com.microsoft::FusedMatMul")
def _fused_matmul(op: Op) -> Result:
    a, b = op.shape(0), op.shape(1)
    if op.integer("transBatchA", 0) or op.integer("transBatchB", 0):
        return op.unknowns(max(len(a), len(b)))
    if op.integer("transA", 0) and len(a) > 1:
        a = (*a[:-2], a[-1], a[-2])
    if op.integer("transB", 0) and len(b) > 1:
        b = (*b[:-2], b[-1], b[-2])
    return matmul_shape(a, b)


@rule("Gemm", *microsoft("FusedGemm"))
def _gemm(op: Op) -> Result:
    a, b = op.shape(0), op.shape(1)
    return a[1 if op.integer("transA", 0) else 0], b[0 if op.integer("transB", 0) else 1]


@rule("com.microsoft::MatMulNBits", "com.microsoft::MatMulBnb4")
def _matmul_bits(op: Op) -> Result:
    return (*op.shape(0)[:-1], Dim.of(op.integer("N")))


@rule("ai.graphopt::QuantizedLinear")
def _quantized_linear(op: Op) -> Result:
    return (*op.shape(0)[:-1], op.shape(2)[0])


@rule("ai.graphopt::CodebookMatMul")
def _codebook_matmul(op: Op) -> Result:
    return (*op.shape(0)[:-1], op.shape(3)[0])


@rule("ai.graphopt::QuantizedMlp", "ai.graphopt::HadamardTransform", "ai.graphopt::KroneckerTransform")
def _as_the_first_input(op: Op) -> Result:
    return op.shape(0)


@rule("ai.graphopt::HadamardQuantize", "ai.graphopt::KroneckerQuantize", types=(ir.DataType.UINT8, ir.DataType.FLOAT))
def _quantized_by_token(op: Op) -> list[Result]:
    x = op.shape(0)
    return [x, (*x[:-1], ONE)]


@rule("Einsum")
def _einsum(op: Op) -> Result:
    equation = op.text("equation", "").replace(" ", "")
    left, arrow, right = equation.partition("->")
    if "." in equation or not arrow:
        raise UnknownShapeError
    sizes: dict[str, Dim] = {}
    for i, letters in enumerate(left.split(",")):
        for letter, dim in zip(letters, op.shape(i), strict=True):
            sizes[letter] = df.broadcast(sizes.get(letter, ONE), dim)
    return tuple(sizes[letter] for letter in right)


# ---- convolutions and pooling


def _window_output(size: Dim, kernel: int, stride: int, dilation: int, pads: tuple[int, int], auto_pad: str) -> Dim:
    if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        return df.ceil_div(size, stride)
    total = 0 if auto_pad == "VALID" else sum(pads)
    return (size + (total - (kernel - 1) * dilation - 1)) // stride + 1


def _spatial(op: Op, kernel: Sequence[Dim]) -> tuple[list[int], list[int], list[tuple[int, int]], str]:
    n = len(kernel)
    strides, dilations = op.integers("strides") or [1] * n, op.integers("dilations") or [1] * n
    pads = op.integers("pads") or [0] * (2 * n)
    return strides, dilations, list(zip(pads[:n], pads[n:], strict=True)), op.text("auto_pad", "NOTSET")


def _convolved(op: Op, x: Shape, w: Shape) -> Shape:
    given = op.integers("kernel_shape")
    kernel = [Dim.of(k) for k in given] if given else list(w[2:])
    strides, dilations, pads, auto_pad = _spatial(op, kernel)
    spatial = [
        _window_output(d, constant_of(k), s, r, p, auto_pad)
        for d, k, s, r, p in zip(x[2:], kernel, strides, dilations, pads, strict=True)
    ]
    return (x[0], w[0], *spatial)


@rule("Conv", "DeformConv", *microsoft("FusedConv"))
@rule("ConvInteger", types=ir.DataType.INT32)
def _conv(op: Op) -> Result:
    return _convolved(op, op.shape(0), op.shape(1))


@rule("QLinearConv", types=7)
def _quantized_conv(op: Op) -> Result:
    return _convolved(op, op.shape(0), op.shape(3))


@rule("ConvTranspose")
def _conv_transpose(op: Op) -> Result:
    x, w = op.shape(0), op.shape(1)
    given, sizes = op.integers("kernel_shape"), op.integers("output_shape")
    kernel = [Dim.of(k) for k in given] if given else list(w[2:])
    channels = w[1] * op.integer("group", 1)
    if sizes is not None:
        return (x[0], channels, *(Dim.of(s) for s in sizes[-len(kernel) :]))
    strides, dilations, pads, auto_pad = _spatial(op, kernel)
    extra = op.integers("output_padding") or [0] * len(kernel)
    spatial = []
    for d, k, s, r, p, e in zip(x[2:], kernel, strides, dilations, pads, extra, strict=True):
        if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
            spatial.append(d * s)
        else:
            total = 0 if auto_pad == "VALID" else sum(p)
            spatial.append((d - 1) * s + ((constant_of(k) - 1) * r + 1 + e - total))
    return (x[0], channels, *spatial)


@rule("MaxPool", "AveragePool", "LpPool", types=(0, INT64))
def _pool(op: Op) -> list[Result]:
    x = op.shape(0)
    kernel = op.integers("kernel_shape") or []
    strides, dilations, pads, auto_pad = _spatial(op, [Dim.of(k) for k in kernel])
    spatial = []
    for d, k, s, r, p in zip(x[2:], kernel, strides, dilations, pads, strict=True):
        size = _window_output(d, k, s, r, p, auto_pad)
        if op.integer("ceil_mode", 0) and auto_pad == "NOTSET":
            rest = (d + (sum(p) - (k - 1) * r - 1)) % s
            # Versions differ in whether a last window that starts in the padding counts.
            size = size if rest.value == 0 else _ceil_size(d, k, s, r, p) or op.unknown()
        spatial.append(size)
    shape = (*x[:2], *spatial)
    return [shape, shape]


def _ceil_size(d: Dim, k: int, s: int, r: int, p: tuple[int, int]) -> Dim | None:
    if d.value is None:
        return None
    size = -(-(d.value + sum(p) - (k - 1) * r - 1) // s) + 1
    return Dim.of(size) if (size - 1) * s < d.value + p[0] else None


@rule("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
def _global_pool(op: Op) -> Result:
    x = op.shape(0)
    return (*x[:2], *[ONE] * (len(x) - 2))


@rule("MaxRoiPool")
def _max_roi_pool(op: Op) -> Result:
    return (op.shape(1)[0], op.shape(0)[1], *(Dim.of(n) for n in op.integers("pooled_shape") or []))


@rule("RoiAlign")
def _roi_align(op: Op) -> Result:
    return op.shape(1)[0], op.shape(0)[1], Dim.of(op.integer("output_height", 1)), Dim.of(op.integer("output_width", 1))


@rule("GridSample")
def _grid_sample(op: Op) -> Result:
    x, grid = op.shape(0), op.shape(1)
    return (*x[:2], *grid[1:-1])


# ---- resizing


@rule("Resize", "Upsample")
def _resize(op: Op) -> Result:
    x = op.shape(0)
    axes = op.integers("axes") or list(range(len(x)))
    upsample = op.node.op_type == "Upsample"
    if op.text("keep_aspect_ratio_policy", "stretch") != "stretch":
        return op.unknowns(len(x))
    result = list(x)
    if op.has(3) and not upsample:
        sizes = op.fact(3).content
        for i, axis in enumerate(axes):
            result[axis_of(axis, len(x))] = op.unknown() if sizes is None else sizes.flat[i]
        return tuple(result)
    if op.text("coordinate_transformation_mode", "") == "tf_crop_and_resize":
        return op.unknowns(len(x))
    given = op.attribute("scales")
    place = 1 if upsample or op.opset < 11 else 2
    scales = list(given) if given is not None else _numbers(op, place)
    for scale, axis in zip(scales, axes, strict=True):
        where = axis_of(axis, len(x))
        result[where] = _scaled(op, x[where], float(scale))
    return tuple(result)


def _numbers(op: Op, index: int) -> list[float]:
    array = constant_array(op.node.inputs[index] if index < len(op.node.inputs) else None, 16)
    if array is None:
        raise UnknownShapeError
    return [float(n) for n in array.reshape(-1)]


def _scaled(op: Op, size: Dim, scale: float) -> Dim:
    if scale == int(scale):
        return size * int(scale)
    if size.value is None:
        return op.unknown()
    exact, rounded = size.value * scale, float(np.float32(size.value) * np.float32(scale))
    if exact == rounded:
        return Dim.of(math.floor(exact))
    # Runtimes multiply in float32 or float64: close to a whole number they could differ.
    return Dim.of(math.floor(exact)) if math.floor(exact + 1e-4) == math.floor(rounded - 1e-4) else op.unknown()


# ---- recurrent layers


@rule("LSTM", "GRU", "RNN")
def _recurrent(op: Op) -> list[Result]:
    x, hidden = op.shape(0), op.attribute("hidden_size")
    size = Dim.of(int(hidden)) if hidden is not None else op.shape(2)[-1]
    directions = Dim.of(2 if op.text("direction", "forward") == "bidirectional" else 1)
    if op.integer("layout", 0):
        batch, steps = x[0], x[1]
        last: Shape = (batch, directions, size)
        return [(batch, steps, directions, size), last, last]
    steps, batch = x[0], x[1]
    last = (directions, batch, size)
    return [(steps, directions, batch, size), last, last]


# ---- attention


def _heads_size(shape: Shape, heads: int) -> Dim:
    """The size of one head of a tensor of rank 3 or 4."""
    return shape[3] if len(shape) == 4 else shape[2] // heads


@rule("Attention", types=(0, 1, 2, 0))
def _attention(op: Op) -> list[Result]:
    q, k, v = op.shape(0), op.shape(1), op.shape(2)
    if len(q) == 4:
        batch, q_heads, length, kv_heads, new = q[0], q[1], q[2], k[1], k[2]
        head, value_size = k[3], v[3]
        output: Shape = (batch, q_heads, length, value_size)
    else:
        q_count, kv_count = op.integer("q_num_heads"), op.integer("kv_num_heads")
        batch, length, new, q_heads, kv_heads = q[0], q[1], k[1], Dim.of(q_count), Dim.of(kv_count)
        head, value_size = _heads_size(k, kv_count), _heads_size(v, kv_count)
        output = (batch, length, value_size * q_count)
    past = op.fact(4).shape if op.has(4) else None
    if op.has(4) and past is None:
        return [output, None, None, None]
    total = new if past is None else past[2] + new
    return [
        output,
        (batch, kv_heads, total, head),
        (batch, kv_heads, total, value_size),
        (batch, q_heads, length, total),
    ]


@rule("com.microsoft::MultiHeadAttention")
def _multi_head_attention(op: Op) -> list[Result]:
    q = op.shape(0)
    if len(q) != 3 or not op.has(1) or not op.has(2):
        raise UnknownShapeError
    k, v, heads = op.shape(1), op.shape(2), op.integer("num_heads")
    width = v[2] if len(v) == 3 else v[1] * v[3]
    present: list[Result] = [None, None]
    if len(k) == 3 and len(v) == 3 and not op.has(6):
        count = Dim.of(heads)
        present = [(k[0], count, k[1], k[2] // heads), (v[0], count, v[1], v[2] // heads)]
    return [(q[0], q[1], width), *present]


@rule("com.microsoft::GroupQueryAttention", "ai.graphopt::CachedAttention")
def _group_query_attention(op: Op) -> list[Result]:
    q = op.shape(0)
    # CachedAttention is given an empty tensor where there is nothing.
    if op.has(1) and len(op.shape(1)) == 3:
        width = q[2]
    else:  # queries, keys and values packed side by side
        heads, kv_heads = op.integer("num_heads"), op.integer("kv_num_heads")
        width = (q[2] // (heads + 2 * kv_heads)) * heads
    past = op.fact(3).shape
    # The cache grows, or is a buffer shared with the past whose length stays: which one is decided at run time.
    present = None if past is None else (past[0], past[1], op.unknown(), past[3])
    return [(q[0], q[1], width), present, present]


@rule("ai.graphopt::QuantizedKVAttention", types=(0, ir.DataType.UINT8, ir.DataType.FLOAT16, ir.DataType.FLOAT16))
def _quantized_kv_attention(op: Op) -> list[Result]:
    # As many blocks as there are, or as are needed: the lengths decide at run time.
    grown = [None if (past := op.fact(i).shape) is None else (past[0], op.unknown(), *past[2:]) for i in (3, 4)]
    return [op.shape(0), *grown, op.fact(5).shape]


@rule("com.microsoft::Attention", "com.microsoft::QAttention", types=0)
def _packed_attention(op: Op) -> Result:
    x, bias = op.shape(0), op.fact(2).shape
    sizes = op.integers("qkv_hidden_sizes")
    if op.node.op_type == "QAttention" or (bias is None and sizes is None):
        raise UnknownShapeError
    width = Dim.of(sizes[2]) if sizes else bias[0] // 3 if bias is not None else op.unknown()
    return x[0], x[1], width


@rule("com.microsoft::EmbedLayerNormalization", types=(2, ir.DataType.INT32, 2))
def _embed_layer_normalization(op: Op) -> list[Result]:
    ids, width = op.shape(0), op.shape(2)[-1]
    return [(*ids, width), (ids[0],), (*ids, width)]


@rule("AffineGrid")
def _affine_grid(op: Op) -> Result:
    size = list(op.content(1).flat)
    return (size[0], *size[2:], Dim.of(len(size) - 2))


@rule("CenterCropPad")
def _center_crop_pad(op: Op) -> Result:
    shape, sizes = list(op.shape(0)), op.content(1)
    axes = op.integers("axes") or list(range(len(shape)))
    for axis, size in zip(axes, sizes.flat, strict=True):
        shape[axis_of(axis, len(shape))] = size
    return tuple(shape)


@rule("MaxUnpool")
def _max_unpool(op: Op) -> Result:
    x = op.shape(0)
    return tuple(op.content(2).flat) if op.has(2) else (*x[:2], *op.unknowns(len(x) - 2))
