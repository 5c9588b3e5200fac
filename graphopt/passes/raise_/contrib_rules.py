"""What ONNX Runtime's contributed operators compute, as formulas over standard operators: one rule an operator.

Read off the kernels and schemas of ONNX Runtime 1.31, and held to its kernels by tests where the CPU has one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

from graphopt.graph.constants import constant_array, scalar
from graphopt.passes.raise_.expression import Operand, added, ints, op
from graphopt.passes.raise_.root_mean_square import NotRaised
from graphopt.passes.raise_.shape_rules import ShapeRulePass

Formulas: TypeAlias = "Operand | dict[int, Operand]"
"""What stands for output 0, or for several outputs by index."""


class Call:
    """A node as a rule sees it; what a rule can't have raises `NotRaised`."""

    def __init__(self, node: ir.Node, facts: ShapeRulePass) -> None:
        self.node, self._facts = node, facts

    def __getitem__(self, index: int) -> ir.Value:
        """A required input."""
        value = self.get(index)
        if value is None:
            raise NotRaised(f"its input {index} isn't given")
        return value

    def get(self, index: int) -> ir.Value | None:
        """An optional input."""
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    def uses(self, index: int) -> bool:
        """Whether anything reads output `index`."""
        if index >= len(self.node.outputs):
            return False
        output = self.node.outputs[index]
        return bool(output.uses()) or output.is_graph_output()

    def attribute(self, name: str, default: Any) -> Any:
        """The value of an attribute."""
        attribute = self.node.attributes.get(name)
        return default if attribute is None else attribute.value

    def attributes(self, *without: str) -> dict[str, Any]:
        """All attributes but some."""
        return {name: a.value for name, a in self.node.attributes.items() if name not in without}

    def shape(self, value: ir.Value) -> tuple[int | None, ...] | None:
        """See `ShapeRulePass.shape`."""
        return self._facts.shape(value)

    def rank(self, value: ir.Value) -> int:
        """The rank of a value."""
        rank = self._facts.rank(value)
        if rank is None:
            raise NotRaised(f"the rank of {value.name!r} isn't known")
        return rank

    def dtype(self, value: ir.Value) -> ir.DataType:
        """The element type of a value."""
        dtype = self._facts.dtype(value)
        if dtype is None:
            raise NotRaised(f"the element type of {value.name!r} isn't known")
        return dtype

    def number(self, number: float, like: ir.Value) -> Operand:
        """A constant scalar of the type of `like`."""
        return np.asarray(number, dtype=self.dtype(like).numpy())


Rule: TypeAlias = Callable[[Call], Formulas]


# ---- activations that are fused into something else

_PLAIN = ("Relu", "Sigmoid", "Softplus", "Softsign", "Tanh", "HardSwish", "Identity")
_WITH = {
    "Celu": ("alpha",), "Elu": ("alpha",), "HardSigmoid": ("alpha", "beta"), "Hardmax": ("axis",),
    "LeakyRelu": ("alpha",), "LogSoftmax": ("axis",), "Selu": ("alpha", "gamma"), "Softmax": ("axis",),
    "ThresholdedRelu": ("alpha",),
}  # fmt: skip

_CONV_PARAMETERS = {"": 0, "Relu": 0, "Tanh": 0, "Sigmoid": 0, "Silu": 0, "LeakyRelu": 1, "Clip": 2, "HardSigmoid": 2}


def activated(call: Call, x: Operand) -> Operand:
    """`x` through the activation that FusedGemm and FusedMatMulActivation name, with its own attributes prefixed."""
    name = call.attribute("activation", "")
    if name not in _PLAIN and name not in _WITH:
        raise NotRaised(f"its activation {name!r} isn't one of the ONNX standard")
    if name == "Celu" and call.dtype(call.node.outputs[0]) != ir.DataType.FLOAT:
        raise NotRaised("Celu is of float32 only")
    given = {key: call.attribute(f"activation_{key}", None) for key in _WITH.get(name, ())}
    return op(name, x, **given)


def activated_conv(call: Call, x: Operand) -> Operand:
    """`x` through the activation of FusedConv, whose parameters are a list."""
    name, given = call.attribute("activation", ""), list(call.attribute("activation_params", ()))
    count = {"": 0, "Relu": 0, "Tanh": 0, "Sigmoid": 0, "Silu": 0, "LeakyRelu": 1, "Clip": 2, "HardSigmoid": 2}.get(
        name
    )
    if count is None or (count and count != len(given)):
        raise NotRaised(f"its activation {name!r} with {len(given)} parameters isn't known")
    if name == "Silu":
        return op("Mul", x, op("Sigmoid", x))
    if name == "Clip":
        return op("Clip", x, *(call.number(number, call[0]) for number in given))
    return op(name, x, **dict(zip(("alpha", "beta"), given, strict=False))) if name else x


# ---- products


def fused_matmul(call: Call) -> Operand:
    """A FusedMatMul, its activation left out: α · op(A) · op(B)."""
    product: Operand = op("MatMul", *(_turned(call, index, side) for index, side in enumerate("AB")))
    alpha = call.attribute("alpha", 1.0)
    return product if alpha == 1.0 else op("Mul", product, call.number(alpha, call[0]))


def _turned(call: Call, index: int, side: str) -> Operand:
    """An operand transposed as the attributes say: [m, batch..., k] → [batch..., m, k] first, then the last two."""
    value = call[index]
    matrix, batch = call.attribute(f"trans{side}", 0), call.attribute(f"transBatch{side}", 0)
    if not (matrix or batch):
        return value
    order = list(range(call.rank(value)))
    if batch:
        order = [*order[1:-1], order[0], order[-1]]
    if matrix and len(order) > 1:  # the kernel takes a vector as it is
        order[-2:] = order[:-3:-1]
    return op("Transpose", value, perm=order) if order != sorted(order) else value


def conv(call: Call) -> Operand:
    """A FusedConv: activation(Conv(x, w, b) + z)."""
    done = op("Conv", call[0], call[1], call.get(2), **call.attributes("activation", "activation_params"))
    return activated_conv(call, added(done, call.get(3)))


def gemm(call: Call) -> Operand:
    """A FusedGemm: activation(Gemm(a, b, c))."""
    kept = call.attributes(*(name for name in call.node.attributes if name.startswith("activation")))
    if unknown := sorted(set(kept) - {"alpha", "beta", "transA", "transB"}):
        raise NotRaised(f"its attribute {unknown[0]!r} isn't one of FusedGemm's")
    return activated(call, op("Gemm", call[0], call[1], call.get(2), **kept))


# ---- normalization


def skip_norm(operator: str, shift: int | None, bias: int) -> Rule:
    """The norm of a residual sum: inputs input, skip, gain, [shift,] bias; outputs norm, –, –, the sum."""

    def formulas(call: Call) -> Formulas:
        x, skip, offset = call[0], call[1], call.get(bias)
        maker = skip.producer()
        if offset is not None and maker is not None and maker.op_type in ("MatMul", "Gemm", "FusedMatMul"):
            total = op("Add", x, op("Add", skip, offset))  # beside its product, where other passes look for a bias
        else:
            total = op("Add", added(x, offset), skip)
        shifted = None if shift is None else call.get(shift)
        epsilon = call.attribute("epsilon", 1e-12)
        return {0: op(operator, total, call[2], shifted, axis=-1, epsilon=epsilon), 3: total}

    return formulas


def group_norm(call: Call) -> Formulas:
    """GroupNorm and SkipGroupNorm: [N, H, W, C] unless `channels_last` is 0, in the type of the gain."""
    x, gain, shift = call[0], call[1], call[2]
    last, activation = call.attribute("channels_last", 1), call.attribute("activation", 0)
    if activation not in (0, 1):
        raise NotRaised(f"its activation {activation} isn't known")
    rank = call.rank(x)
    total: Operand = x
    if call.node.op_type == "SkipGroupNorm":
        skip, bias = call[3], call.get(4)
        spatial = ints(*(range(1, rank - 1) if last else range(2, rank)))
        aligned = op("Unsqueeze", skip, spatial) if call.rank(skip) == 2 else skip
        spread = bias if bias is None or last else op("Unsqueeze", bias, ints(*range(1, rank - 1)))
        total = added(x, aligned, spread)
    wide = call.dtype(gain) != call.dtype(x)
    y = op("Cast", total, to=call.dtype(gain)) if wide else total
    if last:
        y = op("Transpose", y, perm=[0, rank - 1, *range(1, rank - 1)])
    y = op("GroupNormalization", y, gain, shift,
           num_groups=call.attribute("groups", 0), epsilon=call.attribute("epsilon", 1e-5))  # fmt: skip
    if last:
        y = op("Transpose", y, perm=[0, *range(2, rank), 1])
    if activation:
        y = op("Mul", y, op("Sigmoid", y))
    return {0: op("Cast", y, to=call.dtype(x)) if wide else y, 1: total}


def embed(call: Call) -> Formulas:
    """EmbedLayerNormalization: LayerNorm(words[ids] + positions[0, 1, …] + segments[types]), and the mask's counts."""
    ids, types, positions, mask = call[0], call.get(1), call.get(8), call.get(7)
    length = op("Shape", ids, start=1, end=2)
    places = op("Slice", call[3], ints(0), length, ints(0)) if positions is None else op("Gather", call[3], positions)
    segments = None if types is None or call.get(4) is None else op("Gather", call[4], types)
    total = added(op("Gather", call[2], ids), places, segments)
    y = op("LayerNormalization", total, call[5], call[6], axis=-1, epsilon=call.attribute("epsilon", 1e-12))
    if mask is None:
        zero = ir.tensor(np.zeros(1, dtype=np.int32))
        counts = op("ConstantOfShape", op("Shape", ids, start=0, end=1), value=zero)
    else:
        ones = op("Equal", mask, np.asarray(1, dtype=np.int32))
        counts = op("ReduceSum", op("Cast", ones, to=ir.DataType.INT32), ints(1), keepdims=0)
    return {0: y, 1: counts, 2: total}


# ---- softmax, dropout, and shapes


def bias_softmax(call: Call) -> Operand:
    """BiasSoftmax: the dimensions from `axis` on are one row."""
    data, bias = call[0], call[1]
    if call.attribute("is_inner_broadcast", 0) and call.rank(data) != call.rank(bias):
        raise NotRaised("its bias is spread over inner axes, which Add does only between equal ranks")
    total, axis = op("Add", data, bias), int(call.attribute("axis", 1))
    if axis in (-1, call.rank(data) - 1):
        return op("Softmax", total, axis=-1)
    return op("Reshape", op("Softmax", op("Flatten", total, axis=axis), axis=-1), op("Shape", total))


def undropped(ratio: int, *summed: int) -> Rule:
    """A dropout in inference sums what it is fed; the input behind the ratio says whether it trains."""

    def formulas(call: Call) -> Operand:
        training = call.get(ratio + 1)
        if training is not None and scalar(training) != 0.0:
            raise NotRaised("it may be in training mode")
        return added(call[0], *(call.get(index) for index in summed))

    return formulas


def gather_nd(call: Call) -> Operand:
    """GatherND of before the standard had it, which takes int32 too."""
    indices = call[1]
    return op("GatherND", call[0], indices if call.dtype(indices) == ir.DataType.INT64 else op("Cast", indices, to=7))


def expand_dims(call: Call) -> Operand:
    """ExpandDims: one axis of size 1, at a place that is an int32 input."""
    axis = scalar(call[1])
    if axis is None:
        raise NotRaised("its axis isn't constant")
    return op("Unsqueeze", call[0], ints(int(axis)))


def _scalar(call: Call, value: ir.Value) -> Operand:
    """A value of one element as a scalar; Squeeze leaves a scalar as it is."""
    return value if call.shape(value) == () else op("Squeeze", value)


def range_of(call: Call) -> Operand:
    """Range, whose bounds may be vectors of one element and whose step may be left out."""
    bounds = [value for value in (call[0], call[1], call.get(2)) if value is not None]
    scalars = [_scalar(call, value) for value in bounds]
    return op("Range", *scalars, *([call.number(1, call[0])] if len(scalars) == 2 else []))


def pad(call: Call) -> Operand:
    """Pad, whose pads may be a matrix of one row and whose value may be a vector of one element."""
    pads, value = call[1], call.get(2)
    known = constant_array(pads)
    flat: Operand = pads if known is not None and known.ndim == 1 else op("Reshape", pads, ints(-1))
    fill = None if value is None else _scalar(call, value)
    return op("Pad", call[0], flat, fill, mode=call.attribute("mode", "constant"))


def split_gelu(call: Call) -> Operand:
    """BiasSplitGelu: the left half of x + b times the Gelu of the right half."""
    halves = op("Split", op("Add", call[0], call[1]), axis=-1, num_outputs=2, outputs=2)
    return op("Mul", halves, op("Gelu", halves[1]))


def swish(x: Operand, alpha: Operand | None) -> Operand:
    """x · Sigmoid(α x), the canonical form; `raise-silu` writes Swish where the opset has it."""
    return op("Mul", x, op("Sigmoid", x if alpha is None else op("Mul", x, alpha)))


def tanh_gelu(x: Operand) -> Operand:
    """Gelu by its approximation."""
    return op("Gelu", x, approximate="tanh")


def quick_gelu(call: Call) -> Operand:
    """QuickGelu: α is 1.702 unless it says otherwise, and 1 where ONNX Runtime fused a SiLU."""
    alpha = call.attribute("alpha", float(np.float32(1.702)))
    return swish(call[0], None if alpha == 1.0 else call.number(alpha, call[0]))


RULES: Mapping[str, Rule] = {
    "Gelu": lambda n: op("Gelu", n[0]),
    "BiasGelu": lambda n: op("Gelu", op("Add", n[0], n[1])),
    "FastGelu": lambda n: tanh_gelu(added(n[0], n.get(1))),
    "GemmFastGelu": lambda n: tanh_gelu(added(op("MatMul", n[0], n[1]), n.get(2))),
    "QuickGelu": quick_gelu,
    "BiasSplitGelu": split_gelu,
    "FusedMatMul": fused_matmul,
    "TransposeMatMul": fused_matmul,
    "FusedMatMulActivation": lambda n: activated(n, fused_matmul(n)),
    "FusedGemm": gemm,
    "FusedConv": conv,
    "SkipLayerNormalization": skip_norm("LayerNormalization", shift=3, bias=4),
    "SkipSimplifiedLayerNormalization": skip_norm("RMSNormalization", shift=None, bias=3),
    "GroupNorm": group_norm,
    "SkipGroupNorm": group_norm,
    "EmbedLayerNormalization": embed,
    "BiasSoftmax": bias_softmax,
    "BiasAdd": lambda n: added(n[0], n[1], n[2]),
    "BiasDropout": undropped(3, 1, 2),
    "BitmaskBiasDropout": undropped(3, 1, 2),
    "BitmaskDropout": undropped(1),
    "Trilu": lambda n: op("Trilu", n[0], n.get(1), upper=n.attribute("upper", None)),
    "GatherND": gather_nd,
    "ExpandDims": expand_dims,
    "Range": range_of,
    "Pad": pad,
}
"""By operator of the domain com.microsoft."""
