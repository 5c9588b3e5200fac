"""Shape rules of operators that rearrange elements, each with what it does to the content of small tensors."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from graphopt.analysis import dim_functions as df
from graphopt.analysis.dims import ZERO, Dim
from graphopt.analysis.shapes.elementwise import broadcast_shapes
from graphopt.analysis.shapes.rule import (
    FLOAT,
    INT64,
    MAX_CONTENT,
    Content,
    Fact,
    Op,
    Result,
    Shape,
    UnknownShapeError,
    axis_of,
    constant_of,
    content_of,
    rule,
    static,
)

ENDLESS = 2**31 - 1
"""Exporters write this and larger numbers for "to the end" in Slice."""


@rule("Shape", types=INT64)
def _shape(op: Op) -> Result:
    shape = op.shape(0)
    start, end = op.integer("start", 0), op.integer("end", len(shape))
    return content_of(shape[slice(start, end)])


@rule("Size", types=INT64)
def _size(op: Op) -> Result:
    shape = op.fact(0).shape
    return () if shape is None else content_of(df.product(shape))


@rule("ConstantOfShape", types=None)
def _constant_of_shape(op: Op) -> Result:
    value = op.attribute("value")
    dtype = FLOAT if value is None else value.dtype
    target = op.fact(0)
    if target.content is None:
        known_rank = target.shape is not None and target.shape[0].value is not None
        return Fact(dtype, op.unknowns(static(target.shape)[0]) if known_rank and target.shape is not None else None)
    # A negative size is an error, so in a run that succeeds each size is the number itself.
    shape = tuple(target.content.flat)
    sizes = [d.value for d in shape]
    if value is not None and dtype in (INT64, ir.DataType.INT32, ir.DataType.BOOL):
        known = [s for s in sizes if s is not None]
        if len(known) == len(sizes) and math.prod(known) <= MAX_CONTENT:
            return Fact(dtype, shape, content_of([int(value.numpy().reshape(-1)[0])] * math.prod(known), tuple(known)))
    return Fact(dtype, shape)


@rule("Range", types=0)
def _range(op: Op) -> Result:
    start, limit, delta = (op.fact(i).content for i in range(3))
    if start is None or limit is None or delta is None:
        return op.unknowns(1)
    first, step = start.flat[0], delta.flat[0].value
    if not step:
        return op.unknowns(1)
    span = limit.flat[0] - first
    count = df.maximum(span if step == 1 else df.ceil_div(span, step), ZERO)
    if count.value is not None and count.value <= MAX_CONTENT:
        return content_of([first + i * step for i in range(count.value)])
    return (count,)


# ---- other arrangements


@rule("Transpose")
def _transpose(op: Op) -> Result:
    fact, shape = op.fact(0), op.shape(0)
    perm = op.integers("perm") or list(reversed(range(len(shape))))
    content = None if fact.content is None else fact.content.transpose(perm)
    return Fact(fact.dtype, tuple(shape[p] for p in perm), content)


@rule("Expand")
def _expand(op: Op) -> Result:
    fact, target = op.fact(0), op.fact(1).content
    if target is None:
        rank = op.fact(1).shape
        if rank is None or rank[0].value is None or fact.shape is None:
            return None
        return op.unknowns(max(rank[0].value, len(fact.shape)))
    shape = broadcast_shapes([op.shape(0), tuple(target.flat)])
    return _repeated(fact, shape)


def _repeated(fact: Fact, shape: Shape) -> Result:
    sizes = [d.value for d in shape]
    known = [s for s in sizes if s is not None]
    if fact.content is None or len(known) < len(sizes) or math.prod(known) > MAX_CONTENT:
        return Fact(fact.dtype, shape)
    return Fact(fact.dtype, shape, np.broadcast_to(fact.content, known))


@rule("Tile")
def _tile(op: Op) -> Result:
    shape = op.shape(0)
    repeats = op.fact(1).content
    if repeats is None:
        return op.unknowns(len(shape))
    return tuple(d * r if r.low >= 0 else op.unknown() for d, r in zip(shape, repeats.flat, strict=True))


@rule("Concat")
def _concat(op: Op) -> Result:
    shapes = [op.shape(i) for i in range(len(op.facts))]
    axis = axis_of(op.integer("axis", 1), len(shapes[0]))
    contents = [f.content for f in op.facts if f is not None and f.content is not None]
    if len(contents) == len(shapes):
        return np.concatenate(contents, axis)
    result: list[Dim] = []
    for i, dims in enumerate(zip(*shapes, strict=True)):
        if i == axis:
            result.append(sum(dims[1:], dims[0]))
        else:
            # All are equal. Where that isn't seen, a constant says most, then the last (the others are the past).
            result.append(next((d for d in dims if d.value is not None), dims[-1]))
    return tuple(result)


@rule("Split")
def _split(op: Op) -> list[Result]:
    shape, count = op.shape(0), len(op.node.outputs)
    axis = axis_of(op.integer("axis", 0), len(shape))
    total = shape[axis]
    given = op.integers("split")
    if given is not None:
        parts = [Dim.of(n) for n in given]
    elif op.has(1):
        content = op.fact(1).content
        parts = list(content.flat) if content is not None else [op.unknown() for _ in range(count)]
    else:
        exact = total.exact_div(count)
        chunk = exact if exact is not None else df.ceil_div(total, count)
        last = chunk if exact is not None else df.maximum(total - chunk * (count - 1), ZERO)
        parts = [chunk] * (count - 1) + [last]
    result: list[Result] = []
    fact, start = op.fact(0), 0
    for part in parts:
        if fact.content is not None:
            index: list[slice] = [slice(None)] * len(shape)
            index[axis] = slice(start, start + constant_of(part))
            start += constant_of(part)
            result.append(fact.content[tuple(index)])
        else:
            result.append((*shape[:axis], part, *shape[axis + 1 :]))
    return result


@rule("Pad", types=0)
def _pad(op: Op) -> Result:
    shape = op.shape(0)
    pads = op.integers("pads") or op.integers("paddings")
    content = content_of(pads) if pads is not None else op.fact(1).content
    axes = list(range(len(shape)))
    if op.has(3):
        axes = [axis_of(a, len(shape)) for a in op.constants(3)]
    if content is None:
        return op.unknowns(len(shape))
    amounts, result = list(content.flat), list(shape)
    for i, axis in enumerate(axes):
        result[axis] = result[axis] + amounts[i] + amounts[i + len(axes)]
    return tuple(result)


@rule("Gather")
def _gather(op: Op) -> Result:
    data, indices = op.fact(0), op.fact(1)
    shape = op.shape(0)
    axis = axis_of(op.integer("axis", 0), len(shape))
    if data.content is not None and indices.content is not None:
        places = [constant_of(d) for d in indices.content.flat]
        if all(-data.content.shape[axis] <= p < data.content.shape[axis] for p in places):
            index = np.array(places, dtype=np.int64).reshape(indices.content.shape)
            return _array(np.take(data.content, index, axis))
    return (*shape[:axis], *op.shape(1), *shape[axis + 1 :])


@rule("com.microsoft::GatherBlockQuantized", types=2)
def _gather_quantized(op: Op) -> Result:
    data, bits = op.shape(0), op.integer("bits", 4)
    quantized = axis_of(op.integer("quantize_axis", 1), len(data))
    if op.fact(0).dtype == ir.DataType.UINT8 and bits < 8:  # a byte holds several numbers
        data = (*data[:quantized], data[quantized] * (8 // bits), *data[quantized + 1 :])
    axis = axis_of(op.integer("gather_axis", 0), len(data))
    return (*data[:axis], *op.shape(1), *data[axis + 1 :])


def _array(result: Content | Dim) -> Content:
    return content_of(result) if isinstance(result, Dim) else result


def slice_size(size: Dim, start: Dim, end: Dim, step: int, unknown: Dim) -> Dim:
    """How many elements `start:end:step` takes from an axis of `size`."""
    if step < 0:
        number = size.value
        if number is None or start.value is None or end.value is None:
            return size if step == -1 and _from_last(size, start) and end.high <= -ENDLESS else unknown
        stop = end.value + number if end.value < 0 else end.value
        begin = min(start.value + number if start.value < 0 else start.value, number - 1)
        if begin < 0:  # numpy takes nothing here, ONNX the first element
            return unknown
        return Dim.of(max(0, -((max(stop, -1) - begin) // -step)))
    first, last = _clamped(size, start), _clamped(size, end)
    if first is None or last is None:
        return unknown
    if last == size and start.value == 0:
        span = size  # no size is negative, also where its expression could be (what a convolution leaves of 0)
    elif last == size and start.low >= 0:
        span = df.maximum(size - start, ZERO)
    elif last == size and start.high < 0:
        span = df.minimum(-start, size)
    else:
        span = df.maximum(last - first, ZERO)
    return span if step == 1 else df.ceil_div(span, step)


def _from_last(size: Dim, start: Dim) -> bool:
    return start.value == -1 or start.low >= ENDLESS or start == size - 1


def _clamped(size: Dim, position: Dim) -> Dim | None:
    """`position` as Slice reads it: counted from the end where negative, and kept within 0 and `size`."""
    if position.low >= ENDLESS:
        return size
    if position.low >= 0:
        return df.minimum(position, size)
    if position.high < 0:
        return ZERO if position.high <= -ENDLESS else df.maximum(size + position, ZERO)
    return None


def _numpy_slice(start: int, end: int, step: int, size: int) -> slice:
    """The Python slice that takes what ONNX's `start:end:step` takes of `size` elements."""
    if step > 0:
        return slice(start, end, step)
    first = min(start + size if start < 0 else start, size - 1)
    if first < 0:
        raise UnknownShapeError
    stop = end + size if end < 0 else end
    return slice(first, stop if stop >= 0 else None, step)


@rule("Slice")
def _slice(op: Op) -> Result:
    shape = op.shape(0)
    starts_given, ends_given = op.integers("starts"), op.integers("ends")
    if starts_given is not None and ends_given is not None:  # opset 1 to 9
        starts, ends = content_of(starts_given), content_of(ends_given)
        axes = op.integers("axes") or list(range(len(starts_given)))
        steps = [1] * len(axes)
    else:
        given = op.constants(3) if op.has(3) else None
        unknown_part = op.fact(1).content is None or op.fact(2).content is None
        if unknown_part and given is None:
            return op.unknowns(len(shape))
        axes = given if given is not None else list(range(op.content(1).size))
        if unknown_part or (op.has(4) and op.fact(4).content is None):
            sliced = {axis_of(a, len(shape)) for a in axes}
            return tuple(op.unknown(0, d.high) if i in sliced else d for i, d in enumerate(shape))
        starts, ends = op.content(1), op.content(2)
        steps = op.constants(4) if op.has(4) else [1] * len(axes)
    axes = [axis_of(a, len(shape)) for a in axes]
    content = op.fact(0).content
    bounds = [*starts.flat, *ends.flat]
    if content is not None and all(d.value is not None for d in bounds):
        index = [slice(None)] * len(shape)
        for axis, start, end, step in zip(axes, starts.flat, ends.flat, steps, strict=True):
            index[axis] = _numpy_slice(constant_of(start), constant_of(end), step, content.shape[axis])
        return content[tuple(index)]
    result = list(shape)
    for axis, first, last, step in zip(axes, starts.flat, ends.flat, steps, strict=True):
        result[axis] = slice_size(shape[axis], first, last, step, op.unknown(0, shape[axis].high))
    return tuple(result)


@rule("DepthToSpace", "SpaceToDepth")
def _depth_space(op: Op) -> Result:
    n, c, h, w = op.shape(0)
    block = op.integer("blocksize")
    if op.node.op_type == "DepthToSpace":
        return n, c // (block * block), h * block, w * block
    return n, c * (block * block), h // block, w // block
