"""remove-dead-channels: neurons that say nothing are cut out."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.algebra import is_op
from graphopt.errors import UsageError
from graphopt.graph.computed import identity, origin_of, weight
from graphopt.graph.constants import constant_array, constant_tensor
from graphopt.graph.edits import Editor
from graphopt.passes.base import RulePass
from graphopt.passes.clean.fold_constants import evaluate, frozen_copy
from graphopt.passes.fold.layers import Layer, Numbers, bias_behind, layer_of, sole_reader

_MAX_NODES = 16
_LAYERS = ("MatMul", "Gemm", "Conv")

_ACTIVATIONS = frozenset(
    {"Abs", "Clip", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Neg", "Relu",
     "Selu", "Sigmoid", "Softplus", "Softsign", "Sqrt", "Swish", "Tanh"}
)  # fmt: skip
_COMBINED = ("Add", "Sub", "Mul", "Div")
_CUT = "channels"

Flags = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.int64]
_erf = np.vectorize(math.erf, otypes=[np.float64])


@dataclasses.dataclass
class _Region:
    """What lies between the layers that make the channels and the one that reads them.

    Attributes:
        sources: The layers that make the channels.
        constants: Constants that are combined with them: node and index of the input.
        nodes: All of these nodes, those of the sources too.
        values: What they give.
    """

    sources: list[Layer] = dataclasses.field(default_factory=list)
    constants: list[tuple[ir.Node, int]] = dataclasses.field(default_factory=list)
    nodes: dict[ir.Node, None] = dataclasses.field(default_factory=dict)
    values: dict[ir.Value, None] = dataclasses.field(default_factory=dict)


class RemoveDeadChannels(RulePass):
    """Remove hidden channels that are the same for every input, or that nothing reads.

        y = Σ_c f(x·u_c + a_c) · v_c + b
        u_c = 0:   the channel is f(a_c) for every x, so it goes, and b becomes b + f(a_c)·v_c   (nothing for f(0) = 0)
        v_c = 0:   the channel is never read, so it goes

    Such channels are what training with a sparsity penalty leaves (Model-Based Control with Sparse Neural Dynamics,
    whose neurons are removed one by one until few are left), or structured pruning that writes zeros. The rules:

    1. MatMul, Gemm or Conv (without groups), each with or without bias; then elementwise operators: activations, and
       Add, Sub, Mul, Div with constants or among several such layers, as in a gated MLP, `f(x·U) ⊙ (x·W)`, where one
       zero factor is enough; then MatMul, Gemm or Conv.
    2. A channel that is constant and not 0 needs a bias behind it, which a padded Conv can't give at its border: there
       only zeros are removed.

    What a dead channel costs is more than its share: weight decay leaves denormal numbers in it, which processors
    multiply slowly. PP-OCR v6's text detector has 192 and 480 such channels of 768 in two layers, and takes 0.36 of the
    time without them (ONNX Runtime on CPU, one thread; 0.46 to 0.51 with two).

    **Needs:** constant weights. Looked at are the first rows of each weight, and all of it only where these are 0.
    **Guarantees:** the same function for finite activations; 0 times an infinity, which would be NaN, doesn't occur any
    more. Weights shrink. One channel at least stays, and as many dead ones as `multiple` asks for.

    **Left alone, with the reason:** dead channels whose values something else reads or that are a graph output, and
    those of weights that other nodes read too. Weights that are computed only when the model is saved aren't looked at.

    **Options:** `multiple` (channels, a power of two, default 16): the largest power of two up to this one that divides
    the number of channels divides it afterwards. ONNX Runtime's kernels for Conv need that: from 64 to 63 channels
    they take 1.27 times the time, to 60 as long as before, to 48 0.85 times.

    **When not to use it:** before training goes on: a dead channel may come to life again.
    """

    name: ClassVar[str] = "remove-dead-channels"
    family: ClassVar[str] = "fold"
    paper: ClassVar[str] = "Model-Based Control with Sparse Neural Dynamics"
    anchors: ClassVar[tuple[str, ...]] = _LAYERS

    def __init__(self, multiple: int = 16) -> None:
        super().__init__()
        if multiple < 1 or multiple & (multiple - 1):
            raise UsageError(f"remove-dead-channels: multiple must be a power of two, not {multiple}.")
        self.multiple = multiple

    def rewrite(self, node: ir.Node, edit: Editor) -> bool:
        """See the class."""
        second = _plain(layer_of(node))
        value = node.inputs[0]
        transposed = node.attributes.get("transA")
        if second is None or value is None or second.inputs < 2 or (transposed is not None and transposed.value):
            return False
        axis = -1 if node.op_type != "Conv" else 1 - second.rank
        region = _Region()
        if not self._collect(value, node, second.inputs, region):
            return False
        unread = _zero_channels(second.weight, 1 - _output_axis(second))
        known = self._known(value, region, second.inputs, axis, edit.opset)
        if known is None:
            known = np.full(second.inputs, np.nan)
        if _padded(node):
            known[known != 0] = np.nan
        dead = unread | np.isfinite(known)
        if not dead.any():
            return False
        count = int(dead.sum())
        unit = math.gcd(dead.size, self.multiple)
        stay = max(1, -(-(dead.size - count) // unit)) * unit - (dead.size - count)
        if stay >= count:
            return self.left(node, f"{count} of {dead.size} channels are dead, too few to leave a multiple of {unit}")
        dead[np.flatnonzero(dead)[:stay]] = False
        if (why := self._problem(region, node, second)) is not None:
            return self.left(node, f"{count} of {dead.size} channels are dead, but {why}")
        shift = np.where(dead & ~unread & np.isfinite(known), known, 0.0)
        bias = None
        if shift.any():
            if (add := bias_behind(second, sole_reader)) is not None:
                second = dataclasses.replace(second, add=add)
            old = second.bias()
            if isinstance(old, str):
                return self.left(node, f"{count} of {dead.size} channels are dead, but {old}")
            bias = old + second.response(shift)
        self.applied(node, f"{int(dead.sum())} of {dead.size} channels before it removed")
        self._cut(region, second, np.flatnonzero(~dead).astype(np.int64), bias, axis, edit)
        return True

    # ---- looking

    def _collect(self, value: ir.Value, reader: ir.Node, channels: int, region: _Region) -> bool:
        """Gather what makes the channels; False where something else than layers and elementwise operators does."""
        if value in region.values:
            return True
        node = value.producer()
        if node is None or node.graph is not reader.graph or len(region.nodes) >= _MAX_NODES:
            return False
        layer = _plain(layer_of(node))
        if layer is not None and (layer.node.op_type == "Conv") == (reader.op_type == "Conv"):
            region.sources.append(layer)
            for part in (layer.node, layer.add):
                if part is not None:
                    region.nodes[part] = None
                    region.values[part.outputs[0]] = None
            return layer.outputs == channels
        if any(a.is_ref() for a in node.attributes.values()) or not is_op(node, *_ACTIVATIONS, *_COMBINED):
            return False
        region.nodes[node] = None
        region.values[value] = None
        if node.op_type in _ACTIVATIONS:
            rest = [v for v in node.inputs[1:] if v is not None]
            if any((t := constant_tensor(v)) is None or t.size != 1 for v in rest):
                return False
            return node.inputs[0] is not None and self._collect(node.inputs[0], reader, channels, region)
        for index, operand in enumerate(node.inputs):
            if operand is None:
                return False
            if constant_tensor(operand) is not None:
                region.constants.append((node, index))
            elif not self._collect(operand, reader, channels, region):
                return False
        return True

    def _problem(self, region: _Region, node: ir.Node, second: Layer) -> str | None:
        inside = {*region.nodes, node}
        for value in region.values:
            if value.is_graph_output():
                return f"{value.name!r} is a graph output"
            if any(user not in inside for user, _ in value.uses()):
                return f"{value.name!r} is read elsewhere"
        for layer in (*region.sources, second):
            # A bias of several layers is copied: the weights shrink by more.
            weight = layer.node.inputs[1]
            if weight is not None and len(weight.uses()) > 1:
                return f"other nodes read the weights {weight.name!r} too"
        return None

    def _known(self, value: ir.Value, region: _Region, channels: int, axis: int, opset: int) -> Numbers | None:
        """What each channel of `value` holds for every input, NaN where it depends on the input."""
        for source in region.sources:
            if source.output is value:
                return _made_constant(source)
        if (array := constant_array(value)) is not None:
            if array.dtype.kind != "f":
                return None
            numbers = array.astype(np.float64)
            if array.size == 1:
                return np.full(channels, float(numbers.reshape(())))
            if array.ndim >= -axis and array.shape[axis] == channels == array.size:
                return numbers.reshape(-1)
            return np.full(channels, np.nan)
        node = value.producer()
        operands = [] if node is None else [v for v in node.inputs if v is not None]
        if node is None or node not in region.nodes or not operands:
            return None
        count = 1 if node.op_type in _ACTIVATIONS else len(operands)
        known = [self._known(v, region, channels, axis, opset) for v in operands[:count]]
        arrays = [np.full(channels, np.nan) if k is None else k for k in known]
        if all(np.isnan(k).all() for k in arrays):
            return None
        with np.errstate(all="ignore"):
            if node.op_type in _ACTIVATIONS:
                return _activation(node, arrays[0], opset)
            a, b = arrays
            if node.op_type == "Mul":
                return np.where((a == 0) | (b == 0), 0.0, a * b)
            return a + b if node.op_type == "Add" else a - b if node.op_type == "Sub" else a / b

    # ---- cutting

    def _cut(
        self, region: _Region, second: Layer, kept: Indices, bias: Numbers | None, axis: int, edit: Editor
    ) -> None:
        for source in region.sources:
            _take(source.node, 1, kept, _output_axis(source), edit)
            if source.add is not None:
                index = 0 if constant_tensor(source.add.inputs[0]) is not None else 1
                _take(source.add, index, kept, -1, edit)
            elif len(source.node.inputs) > 2:
                _take(source.node, 2, kept, -1, edit)
        for node, index in region.constants:
            _take(node, index, kept, axis, edit)
        for value in region.values:
            value.shape = None  # declared with the old number of channels
        _take(second.node, 1, kept, 1 - _output_axis(second), edit)
        if bias is not None:
            weight = constant_tensor(second.node.inputs[1])
            assert weight is not None
            old = second.output
            new = dataclasses.replace(second, weight=weight).change(np.ones((1,) * second.rank), bias, edit)
            if new is not old:
                edit.replace(old, new)


def _plain(layer: Layer | str) -> Layer | None:
    """A layer without groups, None for anything else."""
    if isinstance(layer, str) or layer.node.op_type not in _LAYERS:
        return None
    group = layer.node.attributes.get("group")
    return None if group is not None and group.value != 1 else layer


def _output_axis(layer: Layer) -> int:
    transposed = layer.node.attributes.get("transB")
    rows = layer.node.op_type == "Conv" or (
        layer.node.op_type == "Gemm" and transposed is not None and bool(transposed.value)
    )
    return 0 if rows else 1


def _padded(node: ir.Node) -> bool:
    pads, auto = node.attributes.get("pads"), node.attributes.get("auto_pad")
    return (pads is not None and any(pads.value)) or (auto is not None and auto.value not in ("NOTSET", "VALID"))


def _zero_channels(tensor: ir.TensorProtocol, axis: int) -> Flags:
    """Which channels of `axis` hold nothing but zeros; all of a weight is read only where its start is zero."""
    size = tensor.shape.numpy()[axis]
    origin = origin_of(tensor)
    # What this pass cut is cheap to compute, and other channels may have died with those cut.
    dear = isinstance(tensor, ir.LazyTensor) and (origin is None or origin[0] != _CUT)
    if dear or tensor.size == 0:
        return np.zeros(size, dtype=bool)
    channels = np.moveaxis(tensor.numpy(), axis, 0)
    zero: Flags = ~(channels[:, :8] != 0).reshape(size, -1).any(axis=1)
    candidates = np.flatnonzero(zero)
    if candidates.size:
        zero[candidates] = ~(channels[candidates] != 0).reshape(candidates.size, -1).any(axis=1)
    return zero


def _made_constant(layer: Layer) -> Numbers | None:
    """The bias of each output channel whose weights are all 0, NaN for the others."""
    zero = _zero_channels(layer.weight, _output_axis(layer))
    if not zero.any():
        return np.full(layer.outputs, np.nan)
    bias = layer.bias()
    if isinstance(bias, str) or bias.ndim > 1:
        return None
    return np.where(zero, np.broadcast_to(bias, (layer.outputs,)), np.nan)


def _activation(node: ir.Node, numbers: Numbers, opset: int) -> Numbers | None:
    """The function on the channels that are known."""
    if node.op_type in ("Erf", "Gelu", "Swish"):
        # The reference implementations go through float32.
        if node.op_type == "Erf":
            return np.asarray(_erf(numbers))
        if node.op_type == "Swish":
            alpha = node.attributes.get("alpha")
            slope = 1.0 if alpha is None else alpha.as_float()
            return np.asarray(numbers / (1 + np.exp(-numbers * slope)))
        approximate = node.attributes.get("approximate")
        if approximate is not None and approximate.as_string() == "tanh":
            inner = math.sqrt(2 / math.pi) * (numbers + 0.044715 * numbers**3)
            return np.asarray(0.5 * numbers * (1 + np.tanh(inner)))
        return np.asarray(0.5 * numbers * (1 + _erf(numbers / math.sqrt(2))))
    rest = [None if v is None else constant_array(v) for v in node.inputs[1:]]
    arrays = [None if array is None else array.astype(np.float64) for array in rest]
    known = np.isfinite(numbers)
    # Not the NaN of an unknown channel, which Relu and Clip may turn into a number.
    results = evaluate(frozen_copy(node), [np.where(known, numbers, 0.0), *arrays], opset)
    return None if results is None else np.where(known, results[0], np.nan)


def _take(node: ir.Node, index: int, kept: Indices, axis: int, edit: Editor) -> None:
    """Keep some channels of the constant that `node` reads; one number for all channels stays."""
    tensor = constant_tensor(node.inputs[index])
    if tensor is None or len(tensor.shape) < (-axis if axis < 0 else axis + 1):
        return
    shape = list(tensor.shape.numpy())
    if shape[axis] == 1:
        return
    shape[axis] = kept.size

    def compute() -> ir.TensorProtocol:
        return ir.tensor(np.ascontiguousarray(np.take(tensor.numpy(), kept, axis=axis)), dtype=tensor.dtype)

    edit.at(node)
    origin = (_CUT, identity(tensor), kept.tobytes(), axis)
    smaller = weight(compute, tensor.dtype, shape, origin=origin)
    edit.set_input(node, index, edit.constant(smaller, "channels"))
