"""Layers whose weights a per-channel scale or shift can be moved into: Conv, ConvTranspose, Gemm and MatMul.

In all of them a scale of the output channels, or of the input channels, is a product of the weight with an array that
broadcasts to it: W · `per_output(scale)`, W · `per_input(scale)`. A matrix that the graph transposes first (the output
layer that is tied to an embedding) counts as the transposed weight.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.algebra import is_op, producer
from graphopt.graph.computed import computed, identity, weight
from graphopt.graph.constants import constant_array, constant_tensor
from graphopt.graph.edits import Editor

Numbers = npt.NDArray[np.float64]

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")

FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_CHUNK = 1 << 20
_SMALLEST_PEAK = {ir.DataType.FLOAT16: 2.0**-15}
"""Half of the smallest normal number: where the largest weight of a channel is below it, rounding would lose bits."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """A node with constant weights.

    Attributes:
        node: The Conv, ConvTranspose, Gemm or MatMul.
        weight: Its weight: [M, C/group, ...], [C, M/group, ...], [K, N] (or [N, K] with transB), [K, N].
        add: For a MatMul, the Add behind it that holds its bias, where there is one.
    """

    node: ir.Node
    weight: ir.TensorProtocol
    add: ir.Node | None = None

    @property
    def output(self) -> ir.Value:
        """What the layer computes, bias included."""
        return (self.add or self.node).outputs[0]

    @property
    def rank(self) -> int:
        """The rank of the weight, which is that of the output of a convolution."""
        return len(self.weight.shape)

    @property
    def channel_axis(self) -> int:
        """The axis of the channels, of the input and of the output alike."""
        return 1 if self.node.op_type in ("Conv", "ConvTranspose") else -1

    @property
    def outputs(self) -> int:
        """The number of output channels."""
        return self._dims[self._output_axis] * (self._group if self.node.op_type == "ConvTranspose" else 1)

    @property
    def inputs(self) -> int:
        """The number of input channels."""
        return self._dims[1 - self._output_axis] * (self._group if self.node.op_type == "Conv" else 1)

    def per_output(self, numbers: Numbers) -> Numbers:
        """Numbers of the output channels, [M] or [1], as an array that broadcasts to the weight."""
        return self._spread(numbers, self._output_axis, self.node.op_type == "ConvTranspose")

    def per_input(self, numbers: Numbers) -> Numbers:
        """Numbers of the input channels, [C], as an array that broadcasts to the weight."""
        return self._spread(numbers, 1 - self._output_axis, self.node.op_type == "Conv")

    def response(self, shift: Numbers) -> Numbers:
        """What the layer, without its bias, makes of an input that is `shift[c]` everywhere in channel c: [M].

        For a convolution, away from its padding.
        """
        factor = self.per_input(shift)
        axes = tuple(axis for axis in range(self.rank) if axis != self._output_axis)
        parts = [
            (rows.astype(np.float64) * _rows(factor, start, len(rows))).sum(axis=axes)
            for start, rows in chunks(self.weight)
        ]
        total = np.sum(parts, axis=0) if self._output_axis else np.concatenate(parts)
        return np.asarray(total * self._number("alpha", 1.0))

    def bias(self) -> Numbers | str:
        """The constant added to the output: [M], [1] or, for Gemm, [.., M]; [1] zero if none. A reason otherwise."""
        value = self._bias_value()
        if value is None:
            return np.zeros(1)
        array = constant_array(value)
        if array is None:
            return f"the bias of {self.name} isn't constant"
        numbers = array.astype(np.float64) * self._number("beta", 1.0)
        if numbers.ndim > 2 or (numbers.ndim and numbers.shape[-1] not in (1, self.outputs)):
            return f"the bias of {self.name} isn't one number a channel"
        if numbers.ndim == 2 and numbers.shape[0] > 1 and numbers.shape[1] != self.outputs:
            return f"the bias of {self.name} has one number a row"
        if numbers.ndim == 0 or (numbers.ndim == 2 and numbers.shape[0] == 1):
            numbers = numbers.reshape(-1)
        return numbers

    @property
    def name(self) -> str:
        """For reasons."""
        return f"{self.node.op_type} {self.node.name!r}"

    def change(self, factor: Numbers, bias: Numbers, edit: Editor) -> ir.Value:
        """Multiply the weight by `factor`, set the bias, and return the output (a new one where it got a bias).

        Call `problem` first.
        """
        edit.at(self.node)
        if not (factor == 1).all():
            _set_constant(self.node, 1, multiplied(self.weight, factor), "weight", edit)
        return self._set_bias(bias, edit)

    def problem(self, factor: Numbers, sharers: int = 1) -> str | None:
        """Why the weight can't be multiplied by `factor`.

        Args:
            factor: What it is to be multiplied by; ones leave it as it is.
            sharers: How many other nodes may read the weight, which then keep the original. Two readers cost at most
                one copy in all: the second to be folded has the original for itself.
        """
        if (factor == 1).all():
            return None
        others = self.sharers()
        if len(others) > sharers:
            several = f"{len(others)} other nodes" if len(others) > 1 else f"{others[0].op_type} {others[0].name!r}"
            return f"the weights of {self.name} are shared with {several}"
        axes = tuple(axis for axis in range(self.rank) if axis != self._output_axis)
        dtype = self.weight.dtype
        highest = _largest(dtype)
        peak = np.zeros(1)
        for start, rows in chunks(self.weight):
            products = np.abs(rows.astype(np.float64) * _rows(factor, start, len(rows)))
            if not (products <= highest).all():
                return f"the weights of {self.name} would overflow {dtype.name.lower()}"
            if dtype in _SMALLEST_PEAK:
                over = products.max(axis=axes, initial=0.0)
                peak = over if start == 0 else np.maximum(peak, over) if self._output_axis else np.append(peak, over)
        if dtype in _SMALLEST_PEAK and ((peak > 0) & (peak < _SMALLEST_PEAK[dtype])).any():
            return f"the weights of {self.name} would lose precision in {dtype.name.lower()}"
        return None

    def sharers(self) -> list[ir.Node]:
        """The other nodes that read the weight."""
        value = self.node.inputs[1]
        assert value is not None
        found = [user for user, _ in value.uses() if user is not self.node]
        if (transpose := producer(value, "Transpose")) is not None:
            base = transpose.inputs[0]
            assert base is not None
            found += [user for user, _ in base.uses() if user is not transpose]
        return found

    # ---- parts

    @property
    def _dims(self) -> tuple[int, ...]:
        return tuple(self.weight.shape.numpy())

    @property
    def _group(self) -> int:
        return int(self._number("group", 1))

    @property
    def _output_axis(self) -> int:
        if self.node.op_type == "Gemm":
            return 0 if self._number("transB", 0) else 1
        return 0 if self.node.op_type == "Conv" else 1

    def _number(self, name: str, default: float) -> float:
        attribute = self.node.attributes.get(name)
        return default if attribute is None else float(attribute.value)

    def _spread(self, numbers: Numbers, axis: int, grouped: bool) -> Numbers:
        shape = [1] * self.rank
        if grouped and numbers.size > 1:
            # Of the two channel axes of a convolution, axis 0 runs through all groups, and its part in one group
            # meets the channels of axis 1 in that group only.
            shape[0], shape[1] = self._dims[:2]
            return np.repeat(numbers.reshape(self._group, -1), shape[0] // self._group, axis=0).reshape(shape)
        shape[axis] = numbers.size
        return numbers.reshape(shape)

    def _bias_value(self) -> ir.Value | None:
        if self.node.op_type == "MatMul":
            return None if self.add is None else self.add.inputs[_constant_operand(self.add)]
        return self.node.inputs[2] if len(self.node.inputs) > 2 else None

    def _set_bias(self, bias: Numbers, edit: Editor) -> ir.Value:
        if not bias.any() and self._bias_value() is None:
            return self.output
        full = np.broadcast_to(bias, (*bias.shape[:-1], self.outputs))
        with np.errstate(over="ignore"):
            array = full.astype(self.weight.dtype.numpy())
        if self.node.op_type != "MatMul":
            if self.node.op_type == "Gemm":
                self.node.attributes.pop("beta", None)
            if len(self.node.inputs) < 3:
                self.node.resize_inputs(3)
            _set_constant(self.node, 2, ir.tensor(array), "bias", edit)
            return self.output
        if self.add is not None:
            edit.at(self.add)
            _set_constant(self.add, _constant_operand(self.add), ir.tensor(array), "bias", edit)
            return self.output
        # New nodes go before the site: compute the product anew, the old node dies with its last reader.
        product = edit.op("MatMul", self.node.inputs, like=self.output)
        return edit.op("Add", [product, edit.constant(array, "bias")], like=self.output)


def layer_of(node: ir.Node) -> Layer | str:
    """The layer that `node` is (or, for an Add, ends), or why it is none."""
    label = f"{node.op_type} {node.name!r}"
    if (
        node.op_type == "Add"
        and node.domain == ""
        and constant_tensor(node.inputs[_constant_operand(node)]) is not None
    ):
        product = node.inputs[1 - _constant_operand(node)]
        below = None if product is None else product.producer()
        if product is None or below is None or below.op_type != "MatMul" or below.domain != "":
            return f"{label} has no weights to fold into"
        if (why := sole_reader_of_numbers(product)) is not None:
            return why
        layer = layer_of(below)
        return layer if isinstance(layer, str) else dataclasses.replace(layer, add=node)
    if node.op_type not in LAYERS or node.domain != "":
        return f"{label} has no weights to fold into"
    if any(a.is_ref() for a in node.attributes.values()):
        return f"{label} takes an attribute from the function that it is in"
    weight = constant_tensor(node.inputs[1]) or _transposed_weight(node)
    if weight is None:
        return f"the weights of {label} aren't constant"
    if weight.dtype not in FLOATS:
        return f"the weights of {label} are {weight.dtype.name.lower()}"
    if len(weight.shape) < 2 or (node.op_type == "MatMul" and len(weight.shape) != 2):
        return f"the weights of {label} are no matrix"
    return Layer(node, weight)


def sole_reader(value: ir.Value) -> str | None:
    """Why `value` can't be changed for the sake of its one reader: None where it has one and nothing else sees it."""
    return _readers(value, [user for user, _ in value.uses()])


def sole_reader_of_numbers(value: ir.Value) -> str | None:
    """As `sole_reader`, for who leaves the shape as it is: what asks for the shape alone doesn't count."""
    return _readers(value, [user for user, _ in value.uses() if not is_op(user, "Shape", "Size")])


def _readers(value: ir.Value, readers: list[ir.Node]) -> str | None:
    if value.is_graph_output():
        return f"{value.name!r} is a graph output"
    return f"{value.name!r} is read by {len(readers)} nodes" if len(readers) > 1 else None


def bias_behind(layer: Layer, obstacle: Callable[[ir.Value], str | None] = sole_reader_of_numbers) -> ir.Node | None:
    """The Add of a constant that alone reads a MatMul, where it adds one number a column.

    `obstacle` says why another reader stands in the way: `sole_reader` for who changes the product's shape or drops it.
    """
    output = layer.output
    if layer.node.op_type != "MatMul" or obstacle(output) is not None:
        return None
    for use in output.uses():
        ended = layer_of(use.node) if use.node.op_type == "Add" and use.node.graph is layer.node.graph else ""
        if isinstance(ended, Layer) and not isinstance(ended.bias(), str):
            return ended.add
    return None


def _transposed_weight(node: ir.Node) -> ir.TensorProtocol | None:
    """The weight of a MatMul or Gemm that reads it through a Transpose of a constant matrix."""
    transpose = producer(node.inputs[1], "Transpose") if node.op_type in ("MatMul", "Gemm") else None
    tensor = None if transpose is None else constant_tensor(transpose.inputs[0])
    if transpose is None or tensor is None or len(tensor.shape) != 2:
        return None
    perm = transpose.attributes.get("perm")
    if perm is not None and (perm.is_ref() or list(perm.as_ints()) != [1, 0]):
        return None
    origin = ("transposed", identity(tensor))
    return computed(
        lambda: ir.tensor(tensor.numpy().T, dtype=tensor.dtype),
        tensor.dtype, tensor.shape.numpy()[::-1], tensor.name, origin,
    )  # fmt: skip


def multiplied(tensor: ir.TensorProtocol, factor: Numbers) -> ir.TensorProtocol:
    """`tensor` · `factor` in float64, rounded once to the type of `tensor`; large ones when they are asked for."""

    def compute() -> ir.TensorProtocol:
        result = np.empty(tensor.shape.numpy(), dtype=tensor.dtype.numpy())
        for start, rows in chunks(tensor):
            result[start : start + len(rows)] = rows.astype(np.float64) * _rows(factor, start, len(rows))
        return ir.tensor(result, dtype=tensor.dtype, name=tensor.name)

    numbers = (factor.shape, hashlib.blake2b(np.ascontiguousarray(factor).tobytes()).digest())
    origin = ("multiplied", identity(tensor), *numbers)
    return weight(compute, tensor.dtype, tensor.shape.numpy(), tensor.name, origin)


def _set_constant(node: ir.Node, index: int, tensor: ir.TensorProtocol, label: str, edit: Editor) -> None:
    """Give `node` a new constant, under the name of the old one where nothing else reads that."""
    value = node.inputs[index]
    if value is not None and value.is_initializer() and len(value.uses()) == 1 and not value.is_graph_output():
        tensor.name = value.name
        value.const_value, value.shape = tensor, ir.Shape(tensor.shape.numpy())
    else:
        edit.set_input(node, index, edit.constant(tensor, label))


def chunks(tensor: ir.TensorProtocol) -> list[tuple[int, npt.NDArray[Any]]]:
    """Views of some rows each, by their first row, so that their copies in float64 stay small."""
    array = tensor.numpy()
    rows = max(1, _CHUNK // max(1, array[:1].size))
    return [(start, array[start : start + rows]) for start in range(0, len(array), rows)]


def _rows(factor: Numbers, start: int, count: int) -> Numbers:
    return factor if factor.shape[0] == 1 else factor[start : start + count]


def _largest(dtype: ir.DataType) -> float:
    import ml_dtypes

    return float(ml_dtypes.finfo(dtype.numpy()).max)


def _constant_operand(node: ir.Node) -> int:
    return 0 if constant_tensor(node.inputs[0]) is not None else 1
