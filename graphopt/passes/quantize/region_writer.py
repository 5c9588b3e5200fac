"""Writes the nodes of a graph that compute on 8-bit codes, between QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.algebra import attribute_int, is_op, producer
from graphopt.graph.edits import Editor
from graphopt.passes.base import Pass
from graphopt.passes.fold.layers import Layer
from graphopt.passes.quantize.integer_weights import SignedGrid, as_int4, quantized_kernels, quantized_matrix
from graphopt.passes.quantize.layer_rounding import RoundedLayer
from graphopt.passes.quantize.quantized_region import FUSED, LAYERS, MOVERS, Region, data_inputs
from graphopt.passes.quantize.region_scales import Narrow, Scale, layers_alone, scale_of, share_with_concats
from graphopt.passes.quantize.token_scales import CONTRIB, Quantized
from graphopt.passes.quantize.value_ranges import ValueRange

_LARGEST_BIAS = 2.0**30
_LOWEST = np.array(np.finfo(np.float32).min, np.float32)


class RegionWriter:
    """Writes a region in the order of its nodes, so that what a node reads is written before it.

    Args:
        model: The model.
        found: Its nodes that compute on codes.
        seen: The range of every value that they read or make.
        grid: The integers of weights.
        report: The pass that tells of each site.
        narrow: Where layers read fewer bits than the others: the range of what they read, by its root, and the levels.
        rounded: Layers whose weights were rounded already.
    """

    def __init__(
        self,
        model: ir.Model,
        found: Region,
        seen: dict[ir.Value, ValueRange],
        grid: SignedGrid,
        report: Pass,
        narrow: Narrow | None = None,
        rounded: Mapping[ir.Node, RoundedLayer] | None = None,
    ) -> None:
        self._model, self._edit, self._found = model, Editor(model), found
        self._grid, self._report, self._rounded = grid, report, rounded or {}
        roots = {found.root(value): None for value in found.values()}
        self._read = (
            {root: scale_of(root, held, found, narrow.levels) for root, held in narrow.seen.items()}
            if narrow is not None
            else {}
        )
        """By its root: how layers read a value, where that isn't as all others do."""
        alone = {root for root in self._read if layers_alone(root, found)}
        self._scales = {
            root: self._read[root] if root in alone else scale_of(root, seen[root], found) for root in roots
        }
        share_with_concats(self._scales, found)
        self._codes: dict[ir.Value, Quantized] = {}
        """By the value that is dequantized, or by the float that is read: its codes."""
        self._floats: dict[ir.Value, ir.Value] = {}
        self._narrow: dict[ir.Value, Quantized] = {}
        """By the value: the codes of fewer bits that layers read of it."""
        self._scale_of_codes: dict[ir.Value, Scale] = {}
        self._last: ir.Value | None = None
        self._constants: dict[Scale, tuple[ir.Value, ir.Value]] = {}

    def write(self, layers: dict[ir.Node, Layer]) -> None:
        """Write all nodes of the region, the layers among them with these weights."""
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

    # ---- nodes

    def _convolution(self, node: ir.Node, layer: Layer) -> None:
        edit = self._edit
        edit.at(node)
        x = data_inputs(node)[0]
        codes = self._given(x)
        step = self._scale_of_codes[codes.codes].step
        numbers = self._bias(node, layer).astype(np.float64)
        least = np.abs(numbers) / (_LARGEST_BIAS * step)
        rounded = self._rounded.get(node)
        weight = (
            quantized_kernels(layer.weight, self._grid, least) if rounded is None else rounded.kernels(layer, least)
        )
        inputs = [self._restored(codes, x), self._constant(weight.codes, weight.scales, "weight")]
        if numbers.any():
            steps = weight.scales * np.float32(step)
            whole = np.rint(numbers / steps).astype(np.int32)
            inputs.append(self._constant(ir.tensor(whole), steps, "bias"))
        self._replace(node, inputs)
        nearest = "; rounded to nearest: its patches aren't rows" if self._rounded and rounded is None else ""
        self._report.applied(node, f"int{self._grid.bits}, with a scale for each output channel{nearest}")

    def _product(self, node: ir.Node, layer: Layer) -> None:
        edit = self._edit
        edit.at(node)
        quantized = self._given(data_inputs(node)[0])
        edit.at(layer.add or node)
        rounded = self._rounded.get(node)
        turned = is_op(node, "Gemm") and attribute_int(node, "transB", 0) == 1
        weight = quantized_matrix(layer.weight, turned, self._grid) if rounded is None else rounded.matrix()
        alpha = node.attributes.get("alpha")
        scales = weight.scales if alpha is None else weight.scales * np.float32(alpha.as_float())
        shift = self._bias(node, layer).astype(np.float32)
        y = quantized.product(
            self._codes_of(weight.codes, "weight"),
            edit.constant(scales, "scales"),
            edit.constant(shift, "bias") if shift.any() else None,
            edit,
            like=layer.output,
        )
        self._model.graph.opset_imports.setdefault(CONTRIB, 1)
        self._report.applied(node, f"int{self._grid.bits}, with a scale for each output")
        if layer.output in self._root:
            self._root[y] = self._root[layer.output]
        edit.replace(layer.output, y)

    def _bias(self, node: ir.Node, layer: Layer) -> npt.NDArray[np.float64]:
        bias = layer.bias()
        assert not isinstance(bias, str)
        numbers = np.broadcast_to(bias, (layer.outputs,)).astype(np.float64)
        return numbers + self._rounded[node].shift if node in self._rounded else numbers

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
            self._root[dequantized] = self._root[old]
            edit.replace(old, dequantized)

    # ---- values

    def _given(self, value: ir.Value) -> Quantized:
        """The codes of what a layer reads."""
        wide = self._quantized(value)
        root = self._root.get(value)
        scale = self._read.get(root) if root is not None else None
        if scale is None or self._scale_of_codes[wide.codes] == scale:
            return wide
        if value not in self._narrow:
            self._narrow[value] = self._round(self._dequantized(value), scale)
        return self._narrow[value]

    def _restored(self, quantized: Quantized, value: ir.Value) -> ir.Value:
        if quantized is self._codes.get(value):
            return self._dequantized(value)
        return self._restore(quantized, like=value)

    def _quantized(self, value: ir.Value) -> Quantized:
        if value not in self._codes:
            x, scale = value, self._scales[self._root[value]]
            if self._rearranged(value):
                x = self._edit.op("Max", [value, self._edit.constant(_LOWEST, "lowest")], like=value)
            self._codes[value] = self._round(x, scale)
        return self._codes[value]

    def _rearranged(self, value: ir.Value) -> bool:
        """Whether ONNX Runtime, left alone, would move the rounding of a float before what makes it, or round that.

        It rounds before a pooling, whose kernel for bytes is slow in the layout of floats, and gives a layer between
        two roundings a weight of 8 bits with one scale for all channels, although it was to stay in floats.
        """
        node = producer(value, *FUSED)
        made_by = value.producer() if node is None or node.inputs[0] is None else node.inputs[0].producer()
        if made_by is None or is_op(made_by, "MaxPool"):
            return made_by is not None
        return is_op(made_by, *LAYERS, "ConvTranspose") and made_by.inputs[0] in self._floats.values()

    def _dequantized(self, value: ir.Value) -> ir.Value:
        if value not in self._floats:
            self._floats[value] = self._restore(self._quantized(value), like=value)
        return self._floats[value]

    def _round(self, value: ir.Value, scale: Scale) -> Quantized:
        if scale not in self._constants:
            step = self._edit.constant(np.array(scale.step, np.float32), "step")
            self._constants[scale] = step, self._edit.constant(np.array(scale.zero_point, np.uint8), "zero_point")
        step, zero_point = self._constants[scale]
        codes = self._edit.op("QuantizeLinear", [value, step, zero_point])
        codes.type = ir.TensorType(ir.DataType.UINT8)
        codes.shape = None if value.shape is None else ir.Shape(value.shape)
        if scale.top < 255:
            # The kernels' codes are bytes, of which the larger ones aren't used; below 0 they end anyway.
            codes = self._edit.op("Clip", [codes, None, self._top(scale.top)], like=codes)
        self._scale_of_codes[codes] = scale
        return Quantized(codes, step, zero_point, by_token=False)

    def _top(self, top: int) -> ir.Value:
        if self._last is None:
            self._last = self._edit.constant(np.array(top, np.uint8), "top")
        return self._last

    def _restore(self, quantized: Quantized, like: ir.Value) -> ir.Value:
        return self._edit.op("DequantizeLinear", [quantized.codes, quantized.scale, quantized.zero_point], like=like)

    def _constant(self, codes: ir.TensorProtocol, steps: npt.NDArray[np.float32], name: str) -> ir.Value:
        """A constant with one step for each entry of its first axis."""
        edit = self._edit
        four = codes.dtype == ir.DataType.INT8 and self._grid.bits <= 4
        zeros = np.zeros(len(steps), codes.dtype.numpy())
        inputs = [
            self._codes_of(codes, name) if four else edit.constant(codes, name),
            edit.constant(steps, "steps"),
            edit.constant(zeros, "zero_points"),
        ]
        return edit.op("DequantizeLinear", inputs, {"axis": 0})

    def _codes_of(self, codes: ir.TensorProtocol, name: str) -> ir.Value:
        """int8 codes of a weight; those of 4 bits are stored as such, and widened as the model is loaded."""
        if self._grid.bits > 4:
            return self._edit.constant(codes, name)
        return self._edit.op("Cast", [self._edit.constant(as_int4(codes), name)], {"to": ir.DataType.INT8})
