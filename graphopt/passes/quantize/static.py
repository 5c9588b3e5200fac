"""quantize-static: convolutions and products in int8, with ranges of activations that were calibrated."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.algebra import attribute_int, is_op, producer
from graphopt.errors import UsageError
from graphopt.graph.edits import Editor, opset
from graphopt.passes.base import Guarantee, Pass
from graphopt.passes.fold.layers import Layer, bias_behind, layer_of, sole_reader
from graphopt.passes.quantize.integer_weights import SignedGrid, finite, quantized_kernels, quantized_matrix
from graphopt.passes.quantize.quantized_region import (
    LAYERS,
    MOVERS,
    Region,
    clamp_limits,
    data_inputs,
    last_layers,
    region,
)
from graphopt.passes.quantize.selection import Selection
from graphopt.passes.quantize.token_scales import CONTRIB, Quantized
from graphopt.passes.quantize.value_ranges import LARGEST, METHODS, ValueRange, ranges

OPSET = 13
_LARGEST_BIAS = 2.0**30
_LEAST_CHANNELS = 4
_LOWEST = np.array(np.finfo(np.float32).min, np.float32)
_FEW_LAYERS = 8
"""Below so many rule 4 would leave too little."""
_LEAST_LEVELS = {"Concat": 64, "Add": 8}
"""Steps of the result's scale that the smallest input of a node must reach over."""


@dataclasses.dataclass(frozen=True)
class _Scale:
    """How a value is rounded: x = step · (code - zero_point), codes from 0 to 255."""

    step: float
    zero_point: int


class QuantizeStatic(Pass):
    """Compute convolutions, products and what lies between them on 8-bit codes, with ranges found on calibration data.

        x ≈ s_x (x̂ − z_x),   x̂ = clip(round(x / s_x) + z_x, 0, 255),   s_x = (max x − min x) / 255
        w ≈ s_w[n] ŵ,   ŵ in −127 … 127,   bias in int32 with the step s_x s_w[n]

    Papers: Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference (Jacob et al.,
    2018); Integer Quantization for Deep Learning Inference (Wu et al., 2020).

    1. Around every `Conv` with constant weights, activations go through `QuantizeLinear` and `DequantizeLinear`,
       weights are int8 with a scale for each output channel. ONNX Runtime makes `QLinearConv` of it.
    2. What lies between two layers is computed on codes as well, where ONNX Runtime has a kernel: `Add`, `Mul`,
       `Sigmoid`, `LeakyRelu`, `Concat`, `GlobalAveragePool`; `MaxPool`, `Reshape`, `Split` and the like keep the codes
       of their input. A `Relu` or `Clip` behind a layer becomes the range of its codes.
    3. Between the last layers and the outputs nothing is, and the last convolutions stay floats (`keep_last`): scores
       beside coordinates on one scale would be lost, and nothing behind averages out how they were rounded.
    4. Of every 32 layers the one stays in floats whose values have so wide a range, for what most of them is, that
       rounding loses most (the variance of the value over that of its rounding; `float_share`): on YOLOv8n two layers
       of 64, without which the error of the scores is a third.
    5. A `MatMul` or `Gemm` with a constant matrix becomes `MatMulIntegerToFloat`, whose result isn't rounded.

    **Options:** `method` (default "minmax"): "percentile" cuts off what is rarer than 1 − `fraction` on each side,
    "mse" cuts where the squared error is least; `fraction` (default 0.9999); `samples` (default 64): calibration
    samples that are used; `float_share` (default 0.03): rule 4, 0 for none; `keep_last` (default true): rule 3;
    `min_weights` (default 256): numbers of the smallest weight that is quantized; `search` (default false): shrink each
    scale of a weight to where its squared error is least; `reduce_range` (default false): weights of 7 bits, for
    processors without VNNI, whose kernels would saturate; `exclude` (default none): nodes that stay floats, by operator
    or pattern of the node's name.

    **Needs:** opset 13; float32; calibration data. **Guarantees:** LOSSY.

    **Targets:** cpu.

    **Left alone, with the reason:** weights that aren't constant or finite; convolutions of less than 4 channels, or
    of groups (but depthwise ones), whose integer kernels are slower; a value that reaches the size of a mask's
    constant, which would leave a single code for all others; a `Concat` (or `Add`) one of whose inputs would have less
    than 64 (8) of the result's 255 steps; a node in a subgraph.

    **When not to use it:** for models of products alone, where `quantize-dynamic` follows each input's range.
    """

    name: ClassVar[str] = "quantize-static"
    family: ClassVar[str] = "quantize"
    guarantee: ClassVar[Guarantee] = Guarantee.LOSSY
    paper: ClassVar[str] = (
        "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference"
    )
    targets: ClassVar[tuple[str, ...]] = ("cpu",)
    needs: tuple[str, ...] = ("samples",)

    def __init__(
        self,
        method: str = "minmax",
        fraction: float = 0.9999,
        samples: int = 64,
        float_share: float = 0.03,
        keep_last: bool = True,
        min_weights: int = 256,
        search: bool = False,
        reduce_range: bool = False,
        exclude: list[str] | None = None,
    ) -> None:
        super().__init__()
        if method not in METHODS:
            raise ValueError(f"method is one of {', '.join(METHODS)}, not {method!r}")
        if not 0.5 < fraction <= 1 or samples < 1:
            raise ValueError("fraction lies between 0.5 and 1, and samples must be positive")
        if not 0 <= float_share < 1:
            raise ValueError("float_share lies between 0 and 1")
        self.method, self.fraction, self.samples = method, fraction, samples
        self.float_share, self.keep_last, self.min_weights = float_share, keep_last, min_weights
        self.search, self.reduce_range, self.exclude = search, reduce_range, exclude
        self._selection = Selection(exclude)

    def apply(self, model: ir.Model) -> bool:
        """See the class."""
        layers = {node: layer for node in model.graph if (layer := self._layer(node, opset(model))) is not None}
        last = [node for node in last_layers(layers, model.graph) if self.keep_last and is_op(node, "Conv")]
        for node in last:
            del layers[node]
            self.left(node, "it is one of the last layers, and keep_last is set")
        if not layers:
            return False
        refused: dict[ir.Node, str] = {}
        whole = region(layers, model.graph, self._excluded, last)
        seen = self._ranges(model, whole.values())
        for node in list(layers):
            if (why := _out_of_range(node, whole, seen)) is not None:
                del layers[node]
                self.left(node, why)
        for node in self._loudest(layers, whole, seen):
            del layers[node]
            self.left(node, f"rounding what it reads and makes loses most of all {len(layers) + 1} layers")
        # What is refused may leave its neighbours without a reader in the region.
        while True:
            found = region(layers, model.graph, lambda node: node in refused or self._excluded(node), last)
            bad = {node: why for node in found.between if (why := _lost(node, found, seen)) is not None}
            if not bad:
                break
            refused.update(bad)
        for node, why in refused.items():
            self.left(node, why)
        if not layers:
            return False
        _Writer(model, found, seen, SignedGrid(7 if self.reduce_range else 8, search=self.search), self).write(layers)
        return True

    # ---- deciding

    def _excluded(self, node: ir.Node) -> bool:
        return self._selection.excluded(node) is not None

    def _layer(self, node: ir.Node, version: int) -> Layer | None:
        if is_op(node, "ConvTranspose"):
            self.left(node, "ONNX Runtime has no integer kernel for it")
        if not is_op(node, *LAYERS):
            return None
        layer = layer_of(node)
        if isinstance(layer, str):
            if is_op(node, "Conv"):
                self.left(node, layer)
            return None
        why = self._selection.excluded(node)
        if why is None and layer.weight.dtype != ir.DataType.FLOAT:
            why = f"it computes in {layer.weight.dtype.name.lower()}, and the kernels in float32"
        if why is None and version < OPSET:
            why = f"needs opset {OPSET}, the model has {version}: run convert-opset first"
        if why is None and is_op(node, "Gemm") and attribute_int(node, "transA", 0) != 0:
            why = "it transposes what it multiplies"
        if why is None and layer.weight.size < self.min_weights:
            why = f"its weight has {layer.weight.size} numbers, and min_weights is {self.min_weights}"
        if why is None and is_op(node, "Conv"):
            why = _slow(layer)
        if why is None and not finite(layer.weight):
            why = "its weight holds NaN or infinity"
        if why is None and is_op(node, "MatMul") and (add := bias_behind(layer, sole_reader)) is not None:
            layer = dataclasses.replace(layer, add=add)
        if why is None:
            bias = layer.bias()
            if isinstance(bias, str) or bias.ndim > 1:
                why = bias if isinstance(bias, str) else f"the bias of {layer.name} has one number a row"
        if why is not None:
            self.left(node, why)
            return None
        return layer

    def _loudest(self, layers: Iterable[ir.Node], found: Region, seen: dict[ir.Value, ValueRange]) -> list[ir.Node]:
        """Rule 4: the layers whose values lose most, the worst first."""
        worst = {node: min(seen[found.root(value)].snr for value in found.touched(node)) for node in layers}
        ranked = sorted(worst, key=lambda node: worst[node])
        return ranked[: math.ceil(len(ranked) * self.float_share) if len(ranked) >= _FEW_LAYERS else 0]

    def _ranges(self, model: ir.Model, values: list[ir.Value]) -> dict[ir.Value, ValueRange]:
        data: Any = self.calibration
        if data is None:
            raise UsageError("The pass 'quantize-static' needs calibration data.")
        return ranges(model, values, data, self.method, self.fraction, self.samples)


def _slow(layer: Layer) -> str | None:
    """Why the integer kernel is slower than that of floats (measured on ONNX Runtime 1.31 with AMX and with 3 channels:
    6 times; with 4 groups 1.5 times, with 16 groups 20 times)."""
    shape, groups = layer.weight.shape.numpy(), attribute_int(layer.node, "group", 1) or 1
    if shape[1] < _LEAST_CHANNELS and groups == 1:
        return f"of {shape[1]} channels the integer kernel is slower than that of floats"
    if groups > 1 and not (shape[1] == 1 and shape[0] % groups == 0):
        return f"with {groups} groups the integer kernel is slower than that of floats"
    return None


def _out_of_range(node: ir.Node, found: Region, seen: dict[ir.Value, ValueRange]) -> str | None:
    """Why what a layer reads or makes has no scale."""
    for value in found.touched(node):
        held = seen[found.root(value)]
        if held.excluded or max(abs(held.low), abs(held.high)) >= LARGEST:
            return f"{value.name!r} holds numbers of the size of a mask's constant, or NaN"
    return None


def _lost(node: ir.Node, found: Region, seen: dict[ir.Value, ValueRange]) -> str | None:
    """Why a node between layers loses too much on codes."""
    if (why := _out_of_range(node, found, seen)) is not None:
        return why
    least = _LEAST_LEVELS.get(node.op_type)
    if least is None:
        return None
    whole = seen[found.root(found.outputs(node)[0])]
    for value in data_inputs(node):
        held = seen[found.root(value)]
        part, all_of_it = _width(held), _width(whole)
        if 0 < part * 255 < least * all_of_it:
            return f"{value.name!r} would have {int(part * 255 / all_of_it)} of the 255 steps of the result"
    return None


def _width(held: ValueRange) -> float:
    return max(held.high, 0.0) - min(held.low, 0.0)


class _Writer:
    """Writes a region in the order of its nodes, so that what a node reads is written before it."""

    def __init__(
        self, model: ir.Model, found: Region, seen: dict[ir.Value, ValueRange], grid: SignedGrid, report: Pass
    ) -> None:
        self._model, self._edit, self._found, self._seen = model, Editor(model), found, seen
        self._grid, self._report = grid, report
        self._scales = {root: self._scale(root) for root in {found.root(value): None for value in found.values()}}
        self._codes: dict[ir.Value, Quantized] = {}
        """By the value that is dequantized, or by the float that is read: its codes."""
        self._floats: dict[ir.Value, ir.Value] = {}
        self._scale_of_codes: dict[ir.Value, _Scale] = {}
        self._constants: dict[_Scale, tuple[ir.Value, ir.Value]] = {}

    def write(self, layers: dict[ir.Node, Layer]) -> None:
        order = [node for node in self._model.graph if node in self._found]
        # Edits change who makes a value, so that roots are looked up before them.
        self._root = {value: self._found.root(value) for value in self._found.values()}
        for node in order:
            if node in layers and is_op(node, "MatMul", "Gemm"):
                self._product(node, layers[node])
            elif node in layers:
                self._convolution(node, layers[node])
            else:
                self._other(node)

    def _scale(self, value: ir.Value) -> _Scale:
        held = self._seen[value]
        low, high = min(held.low, 0.0), max(held.high, 0.0)
        node = value.producer()
        if node is not None and is_op(node, "Sigmoid"):
            return _Scale(1 / 256, 0)
        if node is not None and any(clamp is node for clamp in self._found.clamps.values()):
            least, most = clamp_limits(node)
            low, high = max(low, least), min(high, most)
        step = float(np.float32((high - low) / 255))
        if step < np.finfo(np.float32).tiny:
            return _Scale(1.0, 0)
        return _Scale(step, int(np.clip(np.rint(-low / step), 0, 255)))

    # ---- nodes

    def _convolution(self, node: ir.Node, layer: Layer) -> None:
        edit = self._edit
        edit.at(node)
        x = data_inputs(node)[0]
        step = self._scale_of(x).step
        bias = layer.bias()
        assert not isinstance(bias, str)
        numbers = np.broadcast_to(bias, (layer.outputs,)).astype(np.float64)
        weight = quantized_kernels(layer.weight, self._grid, np.abs(numbers) / (_LARGEST_BIAS * step))
        inputs = [self._dequantized(x), self._constant(weight.codes, weight.scales, "int8")]
        if numbers.any():
            steps = weight.scales * np.float32(step)
            codes = np.rint(numbers / steps).astype(np.int32)
            inputs.append(self._constant(ir.tensor(codes), steps, "bias"))
        self._replace(node, inputs)
        self._report.applied(node, "int8, with a scale for each output channel")

    def _product(self, node: ir.Node, layer: Layer) -> None:
        edit = self._edit
        edit.at(node)
        quantized = self._quantized(data_inputs(node)[0])
        edit.at(layer.add or node)
        weight = quantized_matrix(
            layer.weight, is_op(node, "Gemm") and attribute_int(node, "transB", 0) == 1, self._grid
        )
        alpha = node.attributes.get("alpha")
        scales = weight.scales if alpha is None else weight.scales * np.float32(alpha.as_float())
        bias = layer.bias()
        assert not isinstance(bias, str)
        shift = np.broadcast_to(bias, (layer.outputs,)).astype(np.float32)
        y = quantized.product(
            edit.constant(weight.codes, "int8"),
            edit.constant(scales, "scales"),
            edit.constant(shift, "bias") if shift.any() else None,
            edit,
            like=layer.output,
        )
        self._model.graph.opset_imports.setdefault(CONTRIB, 1)
        self._report.applied(node, "int8, with a scale for each output")
        edit.replace(layer.output, y)

    def _other(self, node: ir.Node) -> None:
        self._edit.at(node)
        given = data_inputs(node)
        inputs = [self._dequantized(v) if v is not None and v in given else v for v in node.inputs]
        self._replace(node, inputs)
        self._report.applied(node, "on the codes of its input" if is_op(node, *MOVERS) else "on codes")

    def _replace(self, node: ir.Node, inputs: Sequence[ir.Value | None]) -> None:
        """Write a node anew with its result rounded."""
        edit = self._edit
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        outs = self._found.outputs(node)
        made = edit.op(node.op_type, list(inputs), attributes, outputs=len(node.outputs), like=node.outputs[0])
        new = made.producer()
        assert new is not None
        for old, y in zip(outs, new.outputs, strict=True):
            if y is not made:
                y.type, y.shape = old.type, None if old.shape is None else ir.Shape(old.shape)
            scale = self._scales[self._root[old]]
            quantized = self._round(y, scale)
            dequantized = self._restore(quantized, like=old)
            self._codes[dequantized] = quantized
            self._floats[dequantized] = dequantized
            edit.replace(old, dequantized)

    # ---- values

    def _scale_of(self, value: ir.Value) -> _Scale:
        made = self._codes.get(value)
        if made is not None:
            return self._scale_of_codes[made.codes]
        return self._scales[self._root[value]]

    def _quantized(self, value: ir.Value) -> Quantized:
        if value not in self._codes:
            x, scale = value, self._scales[self._root[value]]
            if producer(value, "MaxPool") is not None:
                # ONNX Runtime would round before the pooling, whose kernel for bytes is slow in this layout.
                x = self._edit.op("Max", [value, self._edit.constant(_LOWEST, "lowest")], like=value)
            self._codes[value] = self._round(x, scale)
        return self._codes[value]

    def _dequantized(self, value: ir.Value) -> ir.Value:
        if value not in self._floats:
            self._floats[value] = self._restore(self._quantized(value), like=value)
        return self._floats[value]

    def _round(self, value: ir.Value, scale: _Scale) -> Quantized:
        if scale not in self._constants:
            step = self._edit.constant(np.array(scale.step, np.float32), "step")
            self._constants[scale] = step, self._edit.constant(np.array(scale.zero_point, np.uint8), "zero_point")
        step, zero_point = self._constants[scale]
        codes = self._edit.op("QuantizeLinear", [value, step, zero_point])
        codes.type = ir.TensorType(ir.DataType.UINT8)
        codes.shape = None if value.shape is None else ir.Shape(value.shape)
        self._scale_of_codes[codes] = scale
        return Quantized(codes, step, zero_point, by_token=False)

    def _restore(self, quantized: Quantized, like: ir.Value) -> ir.Value:
        return self._edit.op("DequantizeLinear", [quantized.codes, quantized.scale, quantized.zero_point], like=like)

    def _constant(self, codes: ir.TensorProtocol, steps: npt.NDArray[np.float32], name: str) -> ir.Value:
        """A constant with one step for each entry of its first axis."""
        edit = self._edit
        zeros = np.zeros(len(steps), codes.dtype.numpy())
        inputs = [edit.constant(codes, name), edit.constant(steps, "steps"), edit.constant(zeros, "zero_points")]
        return edit.op("DequantizeLinear", inputs, {"axis": 0})
