"""Shape rules of reductions, and of operators that pick, scatter or count elements."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from graphopt.analysis import dim_functions as df
from graphopt.analysis.dims import ONE, Dim
from graphopt.analysis.shapes.rule import (
    BOOL,
    FLOAT,
    INT64,
    SYMBOLIC_TYPES,
    Fact,
    Op,
    Result,
    Shape,
    UnknownShapeError,
    axis_of,
    constant_of,
    content_of,
    rule,
)

FOLDS: dict[str, Callable[[Dim, Dim], Dim]] = {
    "ReduceProd": lambda a, b: a * b,
    "ReduceSum": lambda a, b: a + b,
    "ReduceMin": df.minimum,
    "ReduceMax": df.maximum,
}


@rule(*FOLDS, "ReduceMean", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceSumSquare")
def _reduce(op: Op) -> Result:
    fact, shape, keep = op.fact(0), op.shape(0), bool(op.integer("keepdims", 1))
    try:
        axes = op.axes("axes", 1)
    except UnknownShapeError:
        return op.unknowns(len(shape)) if keep else None
    if not axes:
        if op.integer("noop_with_empty_axes", 0):
            return shape
        axes = list(range(len(shape)))
    gone = {axis_of(a, len(shape)) for a in axes}
    result = _without(shape, gone, keep)
    fold = FOLDS.get(op.node.op_type)
    if fold and fact.content is not None and fact.content.size and fact.dtype in SYMBOLIC_TYPES and len(shape) == 1:
        total = fact.content[0]
        for dim in fact.content[1:]:
            total = fold(total, dim)
        return content_of([total] if keep else total)
    return result


def _without(shape: Shape, gone: set[int], keep: bool) -> Shape:
    if keep:
        return tuple(ONE if i in gone else d for i, d in enumerate(shape))
    return tuple(d for i, d in enumerate(shape) if i not in gone)


@rule("ArgMax", "ArgMin", types=INT64)
def _arg(op: Op) -> Result:
    shape = op.shape(0)
    return _without(shape, {axis_of(op.integer("axis", 0), len(shape))}, bool(op.integer("keepdims", 1)))


@rule("TopK", types=(0, INT64))
def _top_k(op: Op) -> list[Result]:
    shape = list(op.shape(0))
    axis = axis_of(op.integer("axis", -1), len(shape))
    k = op.attribute("k")
    if k is not None:
        shape[axis] = Dim.of(int(k))
    else:
        content = op.fact(1).content
        shape[axis] = op.unknown() if content is None or content.flat[0].low < 0 else content.flat[0]
    return [tuple(shape)] * 2


@rule("NonZero", types=INT64)
def _non_zero(op: Op) -> Result:
    shape = op.fact(0).shape
    return (op.unknown() if shape is None else Dim.of(len(shape)), op.unknown())


@rule("Unique", types=(0, INT64))
def _unique(op: Op) -> list[Result]:
    count = op.unknown()
    if op.attribute("axis") is None:
        return [(count,), (count,), (op.unknown(),), (count,)]
    shape = list(op.shape(0))
    axis = axis_of(op.integer("axis"), len(shape))
    whole = shape[axis]
    shape[axis] = count
    return [tuple(shape), (count,), (whole,), (count,)]


@rule("Compress")
def _compress(op: Op) -> Result:
    if op.attribute("axis") is None:
        return op.unknowns(1)
    shape = list(op.shape(0))
    shape[axis_of(op.integer("axis"), len(shape))] = op.unknown()
    return tuple(shape)


@rule("GatherElements")
def _gather_elements(op: Op) -> Result:
    return op.shape(1)


@rule("GatherND")
def _gather_nd(op: Op) -> Result:
    data, indices, batch = op.shape(0), op.shape(1), op.integer("batch_dims", 0)
    return (*indices[:-1], *data[batch + constant_of(indices[-1]) :])


@rule("OneHot", types=2)
def _one_hot(op: Op) -> Result:
    shape, depth = op.shape(0), op.fact(1).content
    axis = axis_of(op.integer("axis", -1), len(shape) + 1)
    size = op.unknown() if depth is None or depth.flat[0].low < 0 else depth.flat[0]
    return (*shape[:axis], size, *shape[axis:])


@rule("Det")
def _det(op: Op) -> Result:
    return op.shape(0)[:-2]


@rule("NonMaxSuppression", types=INT64)
def _non_max_suppression(op: Op) -> Result:
    return (op.unknown(), Dim.of(3))


@rule("Multinomial", types=None)
def _multinomial(op: Op) -> Result:
    shape = (op.shape(0)[0], Dim.of(op.integer("sample_size", 1)))
    return Fact(ir.DataType(op.integer("dtype", ir.DataType.INT32)), shape)


@rule("RandomNormal", "RandomUniform", types=None)
def _random(op: Op) -> Result:
    return Fact(ir.DataType(op.integer("dtype", FLOAT)), tuple(Dim.of(n) for n in op.integers("shape") or []))


@rule("BlackmanWindow", "HannWindow", "HammingWindow", types=None)
def _window(op: Op) -> Result:
    content = op.fact(0).content
    size = op.unknown() if content is None or content.flat[0].low < 0 else content.flat[0]
    return Fact(ir.DataType(op.integer("output_datatype", FLOAT)), (size,))


@rule("MelWeightMatrix", types=None)
def _mel_weight_matrix(op: Op) -> Result:
    bins, length = op.content(0).flat[0], op.content(1).flat[0]
    return Fact(ir.DataType(op.integer("output_datatype", FLOAT)), (length // 2 + 1, bins))


@rule("DFT")
def _dft(op: Op) -> Result:
    shape = list(op.shape(0))
    if op.integer("inverse", 0) and op.integer("onesided", 0):
        return op.unknowns(len(shape))
    axis = op.integer("axis", 1) if op.opset < 20 else op.constants(2)[0] if op.has(2) else -2
    place = axis_of(axis, len(shape))
    if op.has(1):
        length = op.fact(1).content
        shape[place] = op.unknown() if length is None else length.flat[0]
    if op.integer("onesided", 0):
        shape[place] = shape[place] // 2 + 1
    shape[-1] = Dim.of(2)
    return tuple(shape)


@rule("STFT")
def _stft(op: Op) -> Result:
    signal, step = op.shape(0), op.content(1).flat[0]
    length = op.content(3).flat[0] if op.has(3) else op.shape(2)[0]
    frames = (signal[1] - length) // step + 1
    bins = length // 2 + 1 if op.integer("onesided", 1) else length
    return signal[0], frames, bins, Dim.of(2)


@rule("StringConcat", types=0)
def _string_concat(op: Op) -> Result:
    a, b = op.shape(0), op.shape(1)
    return tuple(df.broadcast(x, y) for x, y in zip(a, b, strict=True)) if len(a) == len(b) else None


@rule("RegexFullMatch", types=BOOL)
def _regex(op: Op) -> Result:
    return op.shape(0)


@rule("SequenceLength", types=INT64)
def _sequence_length(op: Op) -> Result:
    return ()


@rule("OptionalHasElement", types=BOOL)
def _optional_has_element(op: Op) -> Result:
    return ()


@rule("Constant", types=None)
def _constant(op: Op) -> Result:
    for name, dtype in (("value_int", INT64), ("value_ints", INT64), ("value_float", FLOAT), ("value_floats", FLOAT)):
        value = op.attribute(name)
        if value is not None:
            shape: Shape = () if np.ndim(value) == 0 else (Dim.of(len(value)),)
            small = dtype == INT64 and np.size(value) <= 64
            return Fact(dtype, shape, content_of(value) if small else None)
    tensor = op.attribute("value")
    return Fact() if tensor is None else tensor_fact(tensor)


def tensor_fact(tensor: ir.TensorProtocol) -> Fact:
    """What is known of a stored tensor: everything but the numbers of large and floating-point ones."""
    dtype = tensor.dtype
    shape = tuple(Dim.of(d) for d in tensor.shape.numpy())
    if (dtype.is_integer() or dtype == BOOL) and tensor.size <= 64:
        return Fact(dtype, shape, content_of([int(n) for n in tensor.numpy().reshape(-1)], tensor.numpy().shape))
    return Fact(dtype, shape)
