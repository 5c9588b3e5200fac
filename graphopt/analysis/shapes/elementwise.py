"""Shape rules of operators that work element by element, with the arithmetic of shape content."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.analysis import dim_functions as df
from graphopt.analysis.dims import ONE, ZERO, Dim
from graphopt.analysis.shapes.rule import (
    BOOL,
    FLOAT,
    INT64,
    SYMBOLIC_TYPES,
    Content,
    Fact,
    Op,
    Result,
    Shape,
    UnknownShapeError,
    content_of,
    microsoft,
    rule,
)


def broadcast_shapes(shapes: Sequence[Shape]) -> Shape:
    """The shape that elementwise operands of these shapes give."""
    if len(shapes) == 1:
        return shapes[0]
    result: list[Dim] = []
    for dims in itertools.zip_longest(*(reversed(s) for s in shapes), fillvalue=ONE):
        size = dims[0]
        for dim in dims[1:]:
            if dim is not size:
                size = df.broadcast(size, dim)
        result.append(size)
    return tuple(reversed(result))


def compute(function: Callable[..., Any], *contents: Content) -> Content:
    """`function` of the elements, broadcast."""
    result = np.frompyfunc(function, len(contents), 1)(*contents)
    return result if isinstance(result, np.ndarray) else content_of(result)


# ---- one operand

SAME = """
    Acos Acosh Asin Asinh Atan Atanh Ceil Celu Clip Cos Cosh CumSum CumProd Elu Erf Exp Floor Gelu
    Hardmax HardSigmoid HardSwish LeakyRelu Log LogSoftmax LpNormalization LRN MeanVarianceNormalization Mish
    Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin Sinh Softmax Softplus Softsign Sqrt Swish Tan Tanh
    ThresholdedRelu Trilu InstanceNormalization GroupNormalization RMSNormalization RotaryEmbedding ReverseSequence
    BitwiseNot ScatterElements ScatterND Scatter TensorScatter SimplifiedLayerNormalization PRelu
"""


@rule(SAME, *microsoft("Gelu", "FastGelu", "QuickGelu", "BiasGelu", "RotaryEmbedding", "Trilu", "GroupNorm"))
def _same(op: Op) -> Result:
    return op.fact(0).shape


del SAME


@rule("Identity")
def _identity(op: Op) -> Result:
    return op.fact(0)


@rule("IsNaN", "IsInf", types=BOOL)
def _test(op: Op) -> Result:
    return op.shape(0)


@rule("RandomNormalLike", "RandomUniformLike", "EyeLike", "Bernoulli", types=None)
def _like(op: Op) -> Result:
    given = op.attribute("dtype")
    return Fact(ir.DataType(given) if given else op.dtype(0), op.fact(0).shape)


@rule("Dropout", types=None)
def _dropout(op: Op) -> list[Result]:
    data = op.fact(0)
    # The mask has the type of the data before opset 10.
    return [Fact(data.dtype, data.shape), Fact(BOOL if op.opset >= 10 else data.dtype, data.shape)]


@rule("BatchNormalization", types=(0, 3, 4, 3, 4))
def _batch_normalization(op: Op) -> list[Result]:
    shape = op.fact(0).shape
    per_channel = (shape[1],) if shape is not None and len(shape) > 1 else op.unknowns(1)
    return [shape, *[per_channel] * 4]


@rule("LayerNormalization", types=(0, None))
def _layer_normalization(op: Op) -> list[Result]:
    shape = op.shape(0)
    stash = ir.DataType(op.integer("stash_type", FLOAT))
    axis = op.integer("axis", -1)
    axis += len(shape) if axis < 0 else 0
    reduced = tuple(d if i < axis else ONE for i, d in enumerate(shape))
    return [shape, Fact(stash, reduced), Fact(stash, reduced)]


UNARY = {"Neg": lambda a: -a, "Not": lambda a: ONE - a, "Abs": lambda a: df.maximum(a, -a)}


@rule(*UNARY)
def _unary(op: Op) -> Result:
    fact = op.fact(0)
    if fact.content is not None and fact.dtype in SYMBOLIC_TYPES:
        return compute(UNARY[op.node.op_type], fact.content)
    return op.shape(0)


@rule("Cast", "CastLike", types=None)
def _cast(op: Op) -> Result:
    fact = op.fact(0)
    target = op.dtype(1) if op.node.op_type == "CastLike" else ir.DataType(op.integer("to"))
    return Fact(target, fact.shape, _cast_content(fact, target))


def _cast_content(fact: Fact, target: ir.DataType | None) -> Content | None:
    if fact.content is None:
        return None
    if target == fact.dtype:
        return fact.content
    dims = list(fact.content.flat)
    if target == BOOL:
        if all(d.low >= 0 and d.high <= 1 for d in dims):
            return fact.content
        return compute(lambda d: ONE - df.equal(d, ZERO), fact.content)
    if target == INT64:
        return fact.content
    if target == ir.DataType.INT32 and all(d.value is None or abs(d.value) < 1 << 31 for d in dims):
        return fact.content
    return None


@rule("BitCast", types=None)
def _bit_cast(op: Op) -> Result:
    target = ir.DataType(op.integer("to"))
    return Fact(target, op.fact(0).shape)


# ---- two and more operands


def _div(a: Dim, b: Dim) -> Dim:
    exact = a.exact_div(b)
    if exact is not None:
        return exact
    if a.low >= 0 and b.low >= 0:
        return a // b
    if a.value is not None and b.value:
        quotient = abs(a.value) // abs(b.value)
        return Dim.of(quotient if (a.value < 0) == (b.value < 0) else -quotient)
    raise UnknownShapeError  # rounds towards zero, and the signs aren't known


def _power(a: Dim, b: Dim) -> Dim:
    if b.value is None or not 0 <= b.value <= 4:
        raise UnknownShapeError
    return df.product([a] * b.value)


def _modulo(a: Dim, b: Dim) -> Dim:
    if b.value == 0:
        raise UnknownShapeError
    return a % b


BINARY: dict[str, Callable[[Dim, Dim], Dim]] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Div": _div,
    "Pow": _power,
    "Mod": _modulo,
    "Max": df.maximum,
    "Min": df.minimum,
    "Sum": lambda a, b: a + b,
    "Equal": df.equal,
    "Less": df.less,
    "Greater": lambda a, b: df.less(b, a),
    "LessOrEqual": lambda a, b: ONE - df.less(b, a),
    "GreaterOrEqual": lambda a, b: ONE - df.less(a, b),
    "And": lambda a, b: a * b,
    "Or": lambda a, b: a + b - a * b,
    "Xor": lambda a, b: a + b - 2 * (a * b),
}
COMPARISONS = ("Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual")
BOOLEAN = ("And", "Or", "Xor")
OTHERS = ("BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Mean")


def _legacy_axis(op: Op) -> bool:
    """Opset 6 and before broadcast by an `axis` attribute; such nodes are left unknown."""
    return op.attribute("broadcast") is not None or (op.opset < 7 and op.node.op_type not in ("Mean", "Sum"))


def _nary(op: Op) -> Result:
    if _legacy_axis(op):
        return None
    kind, facts = op.node.op_type, [op.fact(i) for i in range(len(op.facts))]
    if kind in BINARY and all(f.content is not None and f.dtype in SYMBOLIC_TYPES for f in facts):
        contents = [f.content for f in facts if f.content is not None]
        if kind == "Mod" and op.integer("fmod", 0) and any(d.low < 0 for c in contents for d in c.flat):
            return broadcast_shapes([op.shape(i) for i in range(len(facts))])
        try:
            result = contents[0]
            for content in contents[1:]:
                result = compute(BINARY[kind], result, content)
            return result
        except UnknownShapeError:
            pass
    return broadcast_shapes([op.shape(i) for i in range(len(facts))])


rule(*(k for k in BINARY if k not in (*COMPARISONS, *BOOLEAN)), *OTHERS)(_nary)
rule(*COMPARISONS, *BOOLEAN, types=BOOL)(_nary)


@rule("Where", types=1)
def _where(op: Op) -> Result:
    facts = [op.fact(i) for i in range(3)]
    condition, a, b = (f.content for f in facts)
    if condition is not None and a is not None and b is not None and facts[1].dtype in SYMBOLIC_TYPES:
        return compute(df.where, condition, a, b)
    return broadcast_shapes([op.shape(i) for i in range(3)])


@rule(*microsoft("QLinearAdd", "QLinearMul"))
def _quantized_binary(op: Op) -> Result:
    return broadcast_shapes([op.shape(0), op.shape(3)])


@rule(*microsoft("SkipLayerNormalization", "SkipSimplifiedLayerNormalization"), types=(0, FLOAT, FLOAT, 0))
def _skip_normalization(op: Op) -> list[Result]:
    shape = op.shape(0)
    reduced = (*shape[:-1], ONE)
    return [shape, reduced, reduced, shape]


@rule("QuantizeLinear", "com.microsoft::QuantizeLinear", types=None)
def _quantize(op: Op) -> Result:
    given = op.attribute("output_dtype") if op.node.domain == "" else None
    dtype = ir.DataType(given) if given else op.dtype(2) if op.has(2) else ir.DataType.UINT8
    return Fact(dtype, op.fact(0).shape)


@rule("DequantizeLinear", "com.microsoft::DequantizeLinear", types=None)
def _dequantize(op: Op) -> Result:
    given = op.attribute("output_dtype") if op.node.domain == "" else None
    return Fact(ir.DataType(given) if given else op.dtype(1), op.fact(0).shape)


@rule("DynamicQuantizeLinear", types=(ir.DataType.UINT8, FLOAT, ir.DataType.UINT8))
def _dynamic_quantize(op: Op) -> list[Result]:
    return [op.shape(0), (), ()]
