"""quantize-static: convolutions and products in int8, with ranges of activations that were calibrated."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, get_args

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
from graphopt.passes.quantize.layer_rounding import CORRECTIONS, Correction, RoundedLayer
from graphopt.passes.quantize.quantized_region import (
    LAYERS,
    Region,
    data_inputs,
    last_layers,
    only_swish,
    region,
)
from graphopt.passes.quantize.region_scales import Narrow, scale_of
from graphopt.passes.quantize.region_writer import RegionWriter
from graphopt.passes.quantize.roundings import Rounding
from graphopt.passes.quantize.selection import Selection
from graphopt.passes.quantize.twin_model import round_layers
from graphopt.passes.quantize.value_ranges import METHODS, Method, Seen, ValueRange, calibration_of, run_outputs, seen

Array = npt.NDArray[Any]

OPSET, OPSET_INT4 = 13, 21
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
       of their input. A `Relu` or `Clip` behind a layer becomes the range of its codes, and what goes through
       x · Sigmoid(x) alone has a range that ends where that is rounded to 0. What a `Concat` alone reads has the scale
       of what it makes, so that it moves codes and rounds nothing again.
    3. Between the last layers and the outputs nothing is, and the last convolutions stay floats (`keep_last`): scores
       beside coordinates on one scale would be lost, and nothing behind averages out how they were rounded.
    4. Layers whose values have so wide a range, for what most of them is, that rounding loses most (the variance of the
       value over that of its rounding) are tried in floats, the worst first, and stay so where that halves the outputs'
       error on eight samples, if it is more than 1 % (`float_share`): on YOLOv8n two layers of 64, without which the
       error of the scores is half; on ResNet-50 none.
    5. A `MatMul` or `Gemm` with a constant matrix becomes `MatMulIntegerToFloat`, whose result isn't rounded.
    6. In 4 bits, activations are what layers read: on ONNX Runtime's CPU no kernel takes codes of 4 bits, so that they
       are bytes of which 16 values are used (`Clip` of the codes), the same numbers at the speed of 8 bits. What lies
       between layers keeps 8 bits. Weights are stored as int4 and widened when the model is loaded (`Cast`, which is
       folded), because a convolution with int4 weights would run on floats.
    7. Rounding and correction look at data: a copy of the model that is rounded layer by layer runs beside the original
       (`round_layer`), so that each layer is rounded for what it reads then.
    8. Ranges end at numbers of 7 binary digits. Where a step differs by a millionth, as it does with another order of
       summation, a few codes are others; after five layers nearly all are, and a score can move as far as it does by
       rounding at all. So the same data give the same model on any processor.

    **Options:** `weight_bits` (default 8): 4 or 8, rule 6; `activation_bits` (default 8): 4 or 8, rule 6; `method`
    (default "minmax"): "percentile" cuts off what is rarer than 1 − `fraction` on each side, "mse" cuts where the
    squared error is least, "entropy" where the distribution loses least; `rounding` (default "nearest"): "gptq", "comq"
    or "gptq+comq"; `correction` (default "none"): "bias" keeps the mean of each output, "moments" its mean and variance
    (norm re-estimation), "reconstruct" rounds the weights that make the original's outputs of the rounded inputs;
    `fraction` (default 0.9999): of what was seen; `samples` (default 64): calibration samples that are used;
    `float_share` (default 0.06): rule 4, the most layers that may stay in floats by it, as a share of all, 0 for none;
    `keep_last` (default true): rule 3; `min_weights` (default 256): numbers of the smallest weight that is quantized;
    `search` (default false): shrink each scale of a weight to where its squared error is least; `reduce_range` (default
    false): weights of 7 bits, for processors without VNNI, whose kernels would saturate; `exclude` (default none):
    nodes that stay floats, by operator or pattern of the node's name.

    **Needs:** opset 13 (21 for `weight_bits` 4); float32; calibration data. **Guarantees:** LOSSY.

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
        weight_bits: int = 8,
        activation_bits: int = 8,
        method: Method = "minmax",
        fraction: float = 0.9999,
        samples: int = 64,
        float_share: float = 0.06,
        keep_last: bool = True,
        min_weights: int = 256,
        search: bool = False,
        rounding: Rounding = "nearest",
        correction: Correction = "none",
        reduce_range: bool = False,
        exclude: list[str] | None = None,
    ) -> None:
        super().__init__()
        if weight_bits not in (4, 8) or activation_bits not in (4, 8):
            raise ValueError("weight_bits and activation_bits are 4 or 8")
        if rounding not in get_args(Rounding) or correction not in CORRECTIONS:
            raise ValueError(
                f"rounding is one of {', '.join(get_args(Rounding))}, correction one of {', '.join(CORRECTIONS)}"
            )
        self.weight_bits, self.activation_bits = weight_bits, activation_bits
        self.rounding, self.correction = rounding, correction
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
        self._trial: tuple[dict[str, Seen], set[str]] | None = None
        """Of a trial of rule 4: what was seen by name, and the layers that stay in floats."""

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
        held = self._seen(model, whole.values())
        seen = {v: one.range(self.method, self.fraction, swish=only_swish(v)) for v, one in held.items()}
        for node in list(layers):
            if (why := _out_of_range(node, whole, seen)) is not None:
                del layers[node]
                self.left(node, why)
        if self._trial is None:
            for node in self._in_floats(model, layers, whole, seen, held):
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
        grid = SignedGrid(min(self.weight_bits, 7) if self.reduce_range else self.weight_bits, search=self.search)
        narrow = self._narrow(layers, found, held)
        rounded = self._rounded(model, layers, found, seen, narrow, grid)
        RegionWriter(model, found, seen, grid, self, narrow, rounded).write(layers)
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
        if why is None and self.weight_bits == 4 and version < OPSET_INT4:
            why = f"int4 needs opset {OPSET_INT4}, the model has {version}: run convert-opset first"
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
        self,
        model: ir.Model,
        layers: Iterable[ir.Node],
        found: Region,
        seen: dict[ir.Value, ValueRange],
        all_seen: dict[ir.Value, Seen],
    ) -> list[ir.Node]:
        """Rule 4: as many of the layers whose values lose most as the outputs gain by."""
        worst = {node: min(seen[found.root(value)].snr for value in found.touched(node)) for node in layers}
        most = math.ceil(len(worst) * self.float_share) if len(worst) >= _FEW_LAYERS else 0
        ranked = sorted(worst, key=lambda node: worst[node])[:most]
        if not ranked:
            return []
        held = {value.name or "": one for value, one in all_seen.items()}
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
        self, model: ir.Model, apart: Sequence[ir.Node], held: dict[str, Seen], reference: list[Array]
    ) -> float:
        """The outputs' squared error, relative to their squares, with some layers in floats."""
        copy = model.clone()
        options = {**self.option_values(), "rounding": "nearest", "correction": "none"}
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

    def _seen(self, model: ir.Model, values: list[ir.Value]) -> dict[ir.Value, Seen]:
        if self._trial is not None:
            return {value: self._trial[0][value.name or ""] for value in values}
        if self.calibration is None:
            raise UsageError("The pass 'quantize-static' needs calibration data.")
        return seen(model, values, self.calibration, self.samples)

    def _narrow(self, layers: Iterable[ir.Node], found: Region, held: dict[ir.Value, Seen]) -> Narrow | None:
        """The ranges of what layers read, where that has fewer bits than other values."""
        if self.activation_bits == 8:
            return None
        levels = 1 << self.activation_bits
        roots = dict.fromkeys(found.root(value) for node in layers for value in data_inputs(node))
        return Narrow({root: held[root].range(self.method, self.fraction, levels) for root in roots}, levels)

    def _rounded(
        self,
        model: ir.Model,
        layers: dict[ir.Node, Layer],
        found: Region,
        seen: dict[ir.Value, ValueRange],
        narrow: Narrow | None,
        grid: SignedGrid,
    ) -> dict[ir.Node, RoundedLayer]:
        """Rule 7: the weights that look at data."""
        if self.rounding == "nearest" and self.correction == "none":
            return {}
        scales = {}
        for node in layers:
            root = found.root(data_inputs(node)[0])
            held, levels = (seen[root], 256) if narrow is None else (narrow.seen[root], narrow.levels)
            scales[node] = scale_of(root, held, found, levels)
        data = calibration_of(self.calibration, self.samples)
        return round_layers(model, layers, scales, data, grid, self.rounding, self.correction)


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
    if len(data_inputs(node)) > 1:
        for value in data_inputs(node):
            held = seen[found.root(value)]
            if held.low == held.high == 0 and not value.is_initializer():
                return f"of {value.name!r} only 0 was seen, which says nothing of its range"
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
