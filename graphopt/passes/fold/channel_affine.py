"""The per-channel affine map y = s·x + t: read off a graph, composed, and put into the layer before or behind it.

before:   s·(W x + b) + t = (s·W) x + (s·b + t)
behind:   W (s·x + t) + b = (W·s) x + (b + Σ W·t)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.algebra import is_op, producer
from graphopt.graph.constants import constant_array, constant_tensor
from graphopt.graph.edits import Editor
from graphopt.passes.fold.layers import FLOATS, Layer, Numbers, layer_of
from graphopt.passes.raise_.shape_rules import ShapeRulePass


@dataclasses.dataclass(frozen=True)
class Affine:
    """y = scale · x + shift, in float64.

    Attributes:
        scale: One number a channel, [C], or one for all, [1].
        shift: The same.
        axis: The axis of the channels, from the front or from the back; of no meaning where both are one number.
    """

    scale: Numbers
    shift: Numbers
    axis: int = -1

    @property
    def size(self) -> int:
        """The number of channels, 1 where one number is for all."""
        return max(self.scale.size, self.shift.size)

    @property
    def shifts(self) -> bool:
        """Whether it adds anything."""
        return bool(self.shift.any())

    @property
    def increasing(self) -> bool:
        """Whether it keeps the order of numbers, as far as it doesn't make them equal."""
        return bool((self.scale >= 0).all())

    def on(self, axis: int, rank: int | None) -> bool:
        """Whether its channels lie along `axis` of a value of this rank."""
        return self.size == 1 or same_axis(self.axis, axis, rank)

    def plus(self, other: Affine) -> Affine:
        """The sum of two maps of one value, whose channels lie along the same axis."""
        return Affine(self.scale + other.scale, self.shift + other.shift, (self if self.size > 1 else other).axis)

    def then(self, after: Affine) -> Affine:
        """`after` of what this gives, where the channels lie along the same axis."""
        axis = (self if self.size > 1 else after).axis
        return Affine(self.scale * after.scale, self.shift * after.scale + after.shift, axis)


@dataclasses.dataclass(frozen=True)
class Change:
    """What becomes of a layer: its weight multiplied by `factor`, its bias replaced by `bias`."""

    layer: Layer
    factor: Numbers
    bias: Numbers

    def apply(self, edit: Editor) -> None:
        """Make the change; what the layer gives out may be a new value, which takes the place of the old one."""
        old = self.layer.output
        new = self.layer.change(self.factor, self.bias, edit)
        if new is not old:
            edit.replace(old, new)


def same_axis(a: int, b: int, rank: int | None) -> bool:
    """Whether `a` and `b`, each from the front or from the back, are one axis; False where that needs the rank."""
    return a == b or (rank is not None and a % rank == b % rank)


def rank_of(value: ir.Value, shapes: ShapeRulePass) -> int | None:
    """The rank of `value`; that of a convolution's output is the rank of its weight, whatever its input."""
    rank = shapes.rank(value)
    if rank is None and (node := producer(value, "Conv", "ConvTranspose")) is not None:
        layer = layer_of(node)
        rank = layer.rank if isinstance(layer, Layer) else None
    return rank


def read(node: ir.Node, shapes: ShapeRulePass) -> tuple[ir.Value, Affine] | None:
    """The operand and the map of a Mul, Div, Add or Sub with a constant of one number a channel, or one in all."""
    if not is_op(node, "Mul", "Div", "Add", "Sub") or len(node.inputs) != 2:
        return None
    index = 1 if constant_tensor(node.inputs[0]) is not None else 0
    x, tensor = node.inputs[index], constant_tensor(node.inputs[1 - index])
    if x is None or tensor is None or constant_tensor(x) is not None or (index == 1 and node.op_type == "Div"):
        return None
    dims = tuple(tensor.shape.numpy())
    along = [axis for axis, size in enumerate(dims) if size != 1]
    if tensor.dtype not in FLOATS or len(along) > 1:
        return None
    array = constant_array(node.inputs[1 - index])
    if array is None or not array.size:
        return None
    if dims and (rank_of(x, shapes) or 0) < len(dims) and not _is_row(x, dims):
        return None  # the constant may give the result more axes than x has
    numbers = array.astype(np.float64).reshape(-1)
    axis = along[0] - len(dims) if along else -1
    one, zero = np.ones(1), np.zeros(1)
    if node.op_type == "Mul":
        return x, Affine(numbers, zero, axis)
    if node.op_type == "Div":
        with np.errstate(divide="ignore"):
            return x, Affine(1 / numbers, zero, axis)
    if node.op_type == "Add":
        return x, Affine(one, numbers, axis)
    return x, Affine(one, -numbers, axis) if index == 0 else Affine(-one, numbers, axis)


def _is_row(x: ir.Value, dims: tuple[int, ...]) -> bool:
    """What a MatMul makes has an axis at least where its second operand has two, so a vector adds none."""
    node = producer(x, "MatMul", "Add")
    return len(dims) == 1 and node is not None and isinstance(layer_of(node), Layer)


def constant_operand(node: ir.Node) -> ir.TensorProtocol:
    """The constant of a node that `read` reads."""
    tensor = constant_tensor(node.inputs[0]) or constant_tensor(node.inputs[1])
    assert tensor is not None
    return tensor


def rounded_to(numbers: Numbers, dtype: ir.DataType) -> npt.NDArray[Any] | None:
    """`numbers` in a type, None where one of them isn't a normal number there."""
    limits = ml_dtypes.finfo(dtype.numpy())
    size = np.abs(numbers)
    if not (size <= float(limits.max)).all() or ((size > 0) & (size < float(limits.smallest_normal))).any():
        return None
    return numbers.astype(dtype.numpy())


# ---- into layers


def into_output(layer: Layer, affine: Affine, rank: int | None, sharers: int = 1) -> Change | str:
    """The layer that does what `affine` does to its output, of this rank, as well; or why it can't."""
    if not affine.on(layer.channel_axis, layer.rank if layer.channel_axis == 1 else rank):
        if affine.axis < 0:
            return ""  # another axis on purpose: this isn't about the channels
        return f"the output of {layer.name} isn't known to be a matrix, so its columns may not be the channels"
    if affine.size not in (1, layer.outputs):
        return f"{layer.name} has {layer.outputs} channels, not {affine.size}"
    if not np.isfinite(affine.scale).all():
        return "it divides by 0"
    bias = layer.bias()
    if isinstance(bias, str):
        return bias
    if affine.size == 1 and affine.scale == 1 and is_swallowed(affine.shift, bias, layer.weight.dtype):
        return f"the bias of {layer.name} would swallow the {affine.shift[0]:.3g} that is added"
    bias = bias * affine.scale + affine.shift
    return _checked(Change(layer, layer.per_output(affine.scale), bias), sharers)


def into_input(layer: Layer, affine: Affine, rank: int | None, sharers: int = 1) -> Change | str:
    """The layer that does what `affine` does to its input, of this rank, as well; or why it can't."""
    if (why := _blurred(layer, affine, rank)) is not None:
        return why
    if affine.size not in (1, layer.inputs):
        return f"{layer.name} takes {layer.inputs} channels, not {affine.size}"
    if not np.isfinite(affine.scale).all():
        return "it divides by 0"
    bias = layer.bias()
    if isinstance(bias, str):
        return bias
    bias = bias + layer.response(affine.shift) if affine.shifts else bias
    return _checked(Change(layer, layer.per_input(affine.scale), bias), sharers)


def _checked(change: Change, sharers: int) -> Change | str:
    layer = change.layer
    if (why := layer.problem(change.factor, sharers)) is not None:
        return why
    dtype = layer.weight.dtype.numpy()
    with np.errstate(over="ignore"):
        rounded = change.bias.astype(dtype).astype(np.float64)
    if not np.isfinite(rounded).all():
        return f"the bias of {layer.name} would overflow"
    return change


def replace(node: ir.Node, x: ir.Value, changes: list[Change], edit: Editor) -> None:
    """Make the changes, which do what `node` does to its operand `x`, and remove `node`."""
    index = list(node.inputs).index(x)
    for change in changes:
        change.apply(edit)
    x = node.inputs[index] or x  # a layer before it that got a bias gives out a new value
    edit.at(node)
    edit.replace(node.outputs[0], x)


def is_swallowed(small: Numbers, rest: Numbers, dtype: ir.DataType) -> bool:
    """Whether rounding `rest` + `small` loses more than a thousandth of `small`.

    Log(x + 1e-10) after a sum with 1 is no longer the logarithm of anything above 0.
    """
    total = (rest + small).astype(dtype.numpy()).astype(np.float64)
    return bool((np.abs(total - rest - small) > np.abs(small) / 1000).any())


def added_columns(changes: list[Change]) -> int:
    """How many numbers a row new additions of a bias would make: for MatMuls that have none yet."""
    return sum(
        c.layer.outputs for c in changes if c.bias.any() and c.layer.node.op_type == "MatMul" and c.layer.add is None
    )


def _blurred(layer: Layer, affine: Affine, rank: int | None) -> str | None:
    """Why the channels of the input, or a shift of them, don't reach every output in the same way."""
    attributes = layer.node.attributes
    if layer.node.op_type == "Gemm":
        transposed, rank = attributes.get("transA"), 2
        if transposed is not None and transposed.value:
            return f"{layer.name} transposes its input"
    elif layer.node.op_type != "MatMul":
        rank = layer.rank
    if not affine.on(layer.channel_axis, rank):
        if layer.node.op_type == "MatMul" and rank is None:
            return f"the input of {layer.name} isn't known to be a matrix"
        return f"{layer.name} takes its channels along another axis"
    if not affine.shifts:
        return None
    if layer.node.op_type == "ConvTranspose":
        return f"the border of {layer.name} gets less of the shift than its middle"
    pads, auto_pad = attributes.get("pads"), attributes.get("auto_pad")
    padded = layer.node.op_type == "Conv" and pads is not None and any(pads.value)
    if auto_pad is not None and auto_pad.value not in ("NOTSET", "VALID"):
        padded = True
    return f"{layer.name} pads its input with zeros, which the shift would have to spare" if padded else None
