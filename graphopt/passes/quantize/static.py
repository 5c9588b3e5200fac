"""quantize-static: convolutions and products in int8, with ranges of activations that were calibrated."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.algebra import attribute_int, is_op
from graphopt.calibration.statistics import LARGEST
from graphopt.errors import UsageError
from graphopt.graph.edits import opset, sort
from graphopt.passes.base import Guarantee, Pass
from graphopt.passes.fold.layers import Layer, bias_behind, layer_of, sole_reader
from graphopt.passes.quantize.integer_weights import SignedGrid, finite
from graphopt.passes.quantize.quantized_region import (
    LAYERS,
    Region,
    data_inputs,
    last_layers,
    region,
)
from graphopt.passes.quantize.region_writer import RegionWriter
from graphopt.passes.quantize.selection import Selection
from graphopt.passes.quantize.value_ranges import METHODS, ValueRange, ranges, run_outputs

Array = npt.NDArray[Any]

OPSET = 13
_LEAST_CHANNELS = 4
_FEW_LAYERS = 8
_SMALL_ERROR, _GAIN, _ENOUGH = 1e-4, 0.5, 1.1
"""Rule 4 looks for layers where the outputs' squared error, relative to their squares, isn't small; they must halve it,
and of sets that are as good the smallest is taken."""
"""Below so many rule 4 would leave too little."""
_LEAST_LEVELS = {"Concat": 64, "Add": 8}
"""Steps of the result's scale that the smallest input of a node must reach over."""


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
    4. Layers whose values have so wide a range, for what most of them is, that rounding loses most (the variance of the
       value over that of its rounding) are tried in floats, the worst first, and stay so where that halves the outputs'
       error on eight samples, if it is more than 1 % (`float_share`): on YOLOv8n two layers of 64, without which the
       error of the scores is half; on ResNet-50 none.
    5. A `MatMul` or `Gemm` with a constant matrix becomes `MatMulIntegerToFloat`, whose result isn't rounded.

    **Options:** `method` (default "minmax"): "percentile" cuts off what is rarer than 1 − `fraction` on each side,
    "mse" cuts where the squared error is least; `fraction` (default 0.9999): of what was seen; `samples` (default 64):
    calibration samples that are used; `float_share` (default 0.06): rule 4, the most layers that may stay in floats by
    it, as a share of all, 0 for none; `keep_last` (default true): rule 3; `min_weights` (default 256): numbers of the
    smallest weight that is quantized; `search` (default false): shrink each scale of a weight to where its squared
    error is least; `reduce_range` (default false): weights of 7 bits, for processors without VNNI, whose kernels would
    saturate; `exclude` (default none): nodes that stay floats, by operator or pattern of the node's name.

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
        float_share: float = 0.06,
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
        self._trial: tuple[dict[str, ValueRange], set[str]] | None = None
        """Of a trial of rule 4: the ranges by name, and the layers that stay in floats."""

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
        if self._trial is not None:
            layers = {node: layer for node, layer in layers.items() if node.name not in self._trial[1]}
        whole = region(layers, model.graph, self._excluded, last)
        seen = self._ranges(model, whole.values())
        for node in list(layers):
            if (why := _out_of_range(node, whole, seen)) is not None:
                del layers[node]
                self.left(node, why)
        if self._trial is None:
            for node in self._in_floats(model, layers, whole, seen):
                del layers[node]
                self.left(node, "in floats the outputs' error on the samples is less than half")
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
        RegionWriter(model, found, seen, SignedGrid(7 if self.reduce_range else 8, search=self.search), self).write(
            layers
        )
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

    def _in_floats(
        self, model: ir.Model, layers: Iterable[ir.Node], found: Region, seen: dict[ir.Value, ValueRange]
    ) -> list[ir.Node]:
        """Rule 4: as many of the layers whose values lose most as the outputs gain by."""
        worst = {node: min(seen[found.root(value)].snr for value in found.touched(node)) for node in layers}
        most = math.ceil(len(worst) * self.float_share) if len(worst) >= _FEW_LAYERS else 0
        ranked = sorted(worst, key=lambda node: worst[node])[:most]
        if not ranked:
            return []
        held = {value.name or "": one for value, one in seen.items()}
        reference = run_outputs(model, self.calibration)
        whole = self._error_without(model, [], held, reference)
        if whole < _SMALL_ERROR:
            return []
        errors = [self._error_without(model, ranked[: count + 1], held, reference) for count in range(most)]
        least = min(errors)
        if least > _GAIN * whole:
            return []
        return ranked[: 1 + next(i for i, error in enumerate(errors) if error <= _ENOUGH * least)]

    def _error_without(
        self, model: ir.Model, apart: Sequence[ir.Node], held: dict[str, ValueRange], reference: list[Array]
    ) -> float:
        """The outputs' squared error, relative to their squares, with some layers in floats."""
        copy = model.clone()
        options = self.option_values()
        trial = QuantizeStatic(**options)
        trial.calibration = self.calibration
        trial._trial = held, {node.name or "" for node in apart}
        trial.apply(copy)
        sort(copy)
        total = 0.0
        for found, wanted in zip(run_outputs(copy, self.calibration), reference, strict=True):
            error = np.square(found.astype(np.float64) - wanted).sum()
            total += float(error / max(float(np.square(wanted.astype(np.float64)).sum()), 1e-30))
        return total / max(len(reference), 1)

    def _ranges(self, model: ir.Model, values: list[ir.Value]) -> dict[ir.Value, ValueRange]:
        if self._trial is not None:
            return {value: self._trial[0][value.name or ""] for value in values}
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
