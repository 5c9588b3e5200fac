"""A model and its quantized twin in one graph, so that one run sees what a layer reads in both.

Where nothing is asked of the original's activations, the twin stands alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.analysis.algebra import is_op
from graphopt.calibration.calibration import Calibration
from graphopt.calibration.patches import Patches
from graphopt.calibration.piece_model import bounded
from graphopt.calibration.request import Request
from graphopt.calibration.statistics import MeanVariance, SecondMoment
from graphopt.graph.edits import Editor, subgraphs_of
from graphopt.passes.fold.layers import Layer
from graphopt.passes.quantize.integer_weights import SignedGrid
from graphopt.passes.quantize.layer_rounding import (
    Correction,
    PairMoments,
    RoundedLayer,
    round_alone,
    round_layer,
)
from graphopt.passes.quantize.region_scales import Scale
from graphopt.passes.quantize.roundings import Rounding


@dataclasses.dataclass(frozen=True)
class _Half:
    """A layer of the quantized half: what is asked of what it reads, and the constants that it computes with.

    Attributes:
        second: The second moment of the pair that it reads, or of its own half alone.
        mean: The mean of the pair; None: of no use.
        weight: What it multiplies by.
        shift: What is added to its output; None where `mean` is.
    """

    second: Request
    mean: Request | None
    weight: ir.Value
    shift: ir.Value | None

    def requests(self) -> list[Request]:
        return [self.second] if self.mean is None else [self.second, self.mean]


def round_layers(
    model: ir.Model,
    layers: Mapping[ir.Node, Layer],
    scales: Mapping[ir.Node, Scale],
    calibration: Calibration,
    grid: SignedGrid,
    rounding: Rounding,
    correction: Correction,
) -> dict[ir.Node, RoundedLayer]:
    """Round the weights of layers one after the other, each with what it reads once those before it are rounded.

    Args:
        model: The model, unchanged.
        layers: Nodes of the main graph with their weights; those that `moments_known` refuses are rounded to nearest
            and left out of the result.
        scales: How what each of them reads is rounded.
        calibration: The data.
        grid: The integers.
        rounding: See `round_layer`.
        correction: See `round_layer`.

    Raises:
        InputDataError: The data doesn't fit the model.
    """
    twin = model.clone()
    nodes = dict(zip(model.graph, twin.graph, strict=True))
    writer = _Writer(twin, alone=correction == "none")
    halves = writer.write({nodes[n]: (n, layer, scales[n]) for n, layer in layers.items() if moments_known(n)})
    wanted: dict[Request, list[ir.Node]] = {}
    for node, half in halves.items():
        wanted.setdefault(half.second, []).append(node)
    done: dict[ir.Node, RoundedLayer] = {}
    requests = list(dict.fromkeys(request for half in halves.values() for request in half.requests()))
    # What no request hangs on isn't run: of a twin that stands alone, the original's layers.
    asked = list(dict.fromkeys(request.value for request in requests))
    twin.graph.outputs[:] = asked
    needed = bounded(asked, set())[2]
    twin.graph.remove([node for node in twin.graph if node not in needed], safe=True)
    for stage in calibration.stages(twin, requests, sequential=True, grain="site"):
        for request in stage.summaries:
            for node in wanted.get(request, ()):
                half, layer = halves[node], layers[node]
                weight, second = layer_rows(layer), stage[half.second].array
                if half.mean is None or half.shift is None:
                    rounded = round_alone(weight, grid, rounding, second)
                else:
                    pair = PairMoments(stage[half.mean]["mean"], second)
                    rounded = round_layer(weight, grid, rounding, correction, pair)
                    shift = rounded.shift.astype(np.float32)
                    shift = shift.reshape(half.shift.shape.numpy())  # type: ignore[union-attr]
                    half.shift.const_value = ir.tensor(shift, name=half.shift.name)
                done[node] = rounded
                half.weight.const_value = ir.tensor(_placed(rounded.numbers(), layer), name=half.weight.name)
    return done


def moments_known(node: ir.Node) -> bool:
    """Whether what a layer multiplies can be seen as rows: products, and convolutions of images without groups."""
    return not is_op(node, "Conv") or Patches.of_node(node) is not None


def layer_rows(layer: Layer) -> Any:
    """The weight of a layer as float32 [N, K], without the factor of a Gemm."""
    array = np.asarray(layer.weight.numpy(), np.float32)
    if layer.node.op_type == "Conv":
        return array.reshape(len(array), -1)
    return np.ascontiguousarray(array if _turned(layer) else array.T)


def _placed(rows: Any, layer: Layer) -> Any:
    """Rows [N, K] in the form of the layer's weight."""
    if layer.node.op_type == "Conv":
        return rows.reshape(layer.weight.shape.numpy())
    return rows if _turned(layer) else np.ascontiguousarray(rows.T)


def _turned(layer: Layer) -> bool:
    attribute = layer.node.attributes.get("transB")
    return layer.node.op_type == "Gemm" and attribute is not None and attribute.as_int() == 1


class _Writer:
    """Writes the quantized half beside a graph: every node behind a rounded layer a second time.

    Args:
        twin: The model.
        alone: Only what the half reads is asked for, not what the original does.
    """

    def __init__(self, twin: ir.Model, *, alone: bool) -> None:
        self._graph, self._edit, self._alone = twin.graph, Editor(twin), alone
        self._half: dict[ir.Value, ir.Value] = {}
        self._read: dict[tuple[ir.Value, Scale, int], tuple[ir.Value, ir.Value]] = {}

    def write(self, layers: Mapping[ir.Node, tuple[ir.Node, Layer, Scale]]) -> dict[ir.Node, _Half]:
        found: dict[ir.Node, _Half] = {}
        for node in list(self._graph):
            self._edit.at(node)
            if node in layers:
                original, layer, scale = layers[node]
                found[original] = self._layer(node, layer, scale)
            elif any(v in self._half for v in node.inputs if v is not None) and not list(subgraphs_of(node)):
                self._again(node, [None if v is None else self._half.get(v, v) for v in node.inputs])
        return found

    def _layer(self, node: ir.Node, layer: Layer, scale: Scale) -> _Half:
        x, edit = node.inputs[0], self._edit
        assert x is not None
        conv = is_op(node, "Conv")
        axis = 1 if conv else -1
        if (x, scale, axis) not in self._read:
            step = edit.constant(np.array(scale.step, np.float32), "step")
            zero = edit.constant(np.array(scale.zero_point, np.uint8), "zero")
            codes = edit.op("QuantizeLinear", [self._half.get(x, x), step, zero])
            if scale.top < 255:
                codes = edit.op("Clip", [codes, None, edit.constant(np.array(scale.top, np.uint8), "top")])
            codes.type = ir.TensorType(ir.DataType.UINT8)
            rounded = edit.op("DequantizeLinear", [codes, step, zero], like=x)
            self._read[x, scale, axis] = rounded, rounded if self._alone else self._pair(x, rounded, axis, layer)
        rounded, seen = self._read[x, scale, axis]
        weight = edit.constant(ir.tensor(np.array(layer.weight.numpy(), np.float32)), "half")
        old = node.outputs[0]
        y = self._again(
            node, [rounded, weight, *(None if v is None else self._half.get(v, v) for v in node.inputs[2:])]
        )
        patches = Patches.of_node(node) if conv else None
        second = Request(seen, SecondMoment(), None, axis, patches)
        if self._alone:
            return _Half(second, None, weight, None)
        shape = (1, layer.outputs, *[1] * (layer.rank - 2)) if conv else (layer.outputs,)
        shift = edit.constant(np.zeros(shape, np.float32), "shift")
        self._half[old] = edit.op("Add", [y, shift], like=old)
        return _Half(second, Request(seen, MeanVariance(), None, axis, patches), weight, shift)

    def _pair(self, x: ir.Value, rounded: ir.Value, axis: int, layer: Layer) -> ir.Value:
        """What a layer reads in both halves, along its channels."""
        pair = self._edit.op("Concat", [x, rounded], {"axis": axis})
        pair.type = ir.TensorType(ir.DataType.FLOAT)
        if x.shape is not None:
            sizes = list(x.shape)
            sizes[axis] = 2 * layer.inputs
            pair.shape = ir.Shape(sizes)
        return pair

    def _again(self, node: ir.Node, inputs: list[ir.Value | None]) -> ir.Value:
        """Write a node a second time, with other inputs; what it gives stands for its outputs in this half."""
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        y = self._edit.op(
            node.op_type, inputs, attributes, domain=node.domain, outputs=len(node.outputs), like=node.outputs[0]
        )
        made = y.producer()
        assert made is not None
        for old, new in zip(node.outputs, made.outputs, strict=True):
            if new is not y:
                new.type, new.shape = old.type, None if old.shape is None else ir.Shape(old.shape)
            self._half[old] = new
        return y
