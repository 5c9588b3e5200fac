"""ONNX Runtime's own `Attention`, which computes queries, keys and values itself from weights that lie side by side."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from graphopt.analysis.bounds import Bounds
from graphopt.analysis.shapes import ShapeFacts
from graphopt.graph.computed import concatenated
from graphopt.graph.constants import is_constant
from graphopt.graph.edits import Editor
from graphopt.passes.fold.layers import Layer, Numbers, layer_of, sole_reader
from graphopt.passes.lower.attention_site import Merged, NotLowered, Site

DOMAIN = "com.microsoft"


@dataclasses.dataclass(frozen=True)
class Packed:
    """What one operator computes from its input on.

    Attributes:
        x: The input of the three layers.
        layers: Those of queries, keys and values.
    """

    x: ir.Value
    layers: tuple[Layer, ...]


def packed(site: Site, merged: Merged, facts: ShapeFacts, bounds: Bounds) -> Packed:
    """The layers before the heads, and that the operator does what the site does.

    Raises:
        NotLowered: It doesn't, or the layers aren't its.
    """
    if site.dtype != ir.DataType.FLOAT or site.precision is not None:
        raise NotLowered("ONNX Runtime's own operator computes in float32")
    if site.cached or site.causal or site.softcap or site.output(1) is not None or site.output(2) is not None:
        raise NotLowered("it has a cache, a cap, or is causal")
    if site.groups != 1 or site.depth is None or site.depth != site.value_depth:
        raise NotLowered("its heads of queries, keys and values aren't known to be equally many and large")
    mask = site.input("mask")
    if mask is not None and not _adds(mask, site, merged, facts, bounds):
        raise NotLowered("its mask isn't known to be finite numbers for all queries and keys")
    layers = tuple(_layer(value) for value in (merged.q, merged.k, merged.v))
    x = layers[0].node.inputs[0]
    shape = None if x is None else facts.shape(x)
    if x is None or shape is None or len(shape) != 3 or any(layer.node.inputs[0] is not x for layer in layers):
        raise NotLowered("queries, keys and values aren't made of one value")
    return Packed(x, layers)


def write(site: Site, merged: Merged, found: Packed, edit: Editor) -> ir.Node:
    """The operator in place of layers, heads and attention; returns it."""
    weight = edit.constant(concatenated([layer.weight for layer in found.layers], 1), "weights")
    parts = [np.broadcast_to(_bias(layer), (layer.outputs,)) for layer in found.layers]
    bias = edit.constant(np.concatenate(parts).astype(np.float32), "biases")
    mask = site.input("mask")
    inputs = [found.x, weight, bias, *((None, None, mask) if mask is not None else ())]
    attributes = {"num_heads": site.heads, "scale": site.scale}
    result = edit.op("Attention", inputs, attributes, domain=DOMAIN, like=merged.output)
    node = result.producer()
    assert node is not None
    edit.model.graph.opset_imports.setdefault(DOMAIN, 1)
    for function in edit.model.functions.values():
        function.opset_imports.setdefault(DOMAIN, 1)
    edit.replace(merged.output, result)
    return node


def _adds(mask: ir.Value, site: Site, merged: Merged, facts: ShapeFacts, bounds: Bounds) -> bool:
    """Whether the operator adds `mask` to the scores: its softmax gives NaN for a query that sees no key."""
    shape, q, k = facts.shape(mask), facts.shape(merged.q), facts.shape(merged.k)
    if (facts.dtype(mask) or mask.dtype) != ir.DataType.FLOAT or shape is None or len(shape) != 4:
        return False
    if q is None or k is None or bounds.of(mask) is None:
        return False
    return shape[0] in (1, q[0]) and shape[1].value in (1, site.heads) and shape[2] == q[1] and shape[3] == k[1]


def _layer(value: ir.Value) -> Layer:
    node = value.producer()
    layer = None if node is None else layer_of(node)
    if not isinstance(layer, Layer) or layer.node.op_type != "MatMul":
        raise NotLowered(f"{value.name!r} isn't the result of a layer")
    bias = layer.bias()
    if isinstance(bias, str):
        raise NotLowered(bias)
    weight = layer.node.inputs[1]
    if weight is None or len(weight.uses()) > 1 or weight.is_graph_output() or not is_constant(weight):
        raise NotLowered(f"the weights of {layer.name} are read elsewhere too")
    if layer.add is not None and (why := sole_reader(layer.node.outputs[0])) is not None:
        raise NotLowered(why)
    if (why := sole_reader(value)) is not None:
        raise NotLowered(why)
    return layer


def _bias(layer: Layer) -> Numbers:
    bias = layer.bias()
    assert not isinstance(bias, str)
    return bias.reshape(-1)
