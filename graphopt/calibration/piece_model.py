"""A piece of a model as a model of its own, and what is put into it to see how much attention each token receives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.analysis.algebra import attribute_int
from graphopt.calibration.pieces import Piece, reads
from graphopt.errors import ModelError
from graphopt.graph.edits import opset

VALID = "graphopt.valid_share"
"""The input [batch, 1, queries] of a piece that shows attention: 1 / (number of queries that count) for each."""
RECEIVED = "graphopt.received."
"""Beginning of the names of the outputs [batch, 1, keys] that show it."""
_AFTER_SOFTMAX = 3


def piece_model(
    model: ir.Model,
    piece: Piece,
    outputs: Iterable[ir.Value],
    shown: Sequence[ir.Node] = (),
    tensors: Mapping[ir.Value, ir.TensorProtocol] | None = None,
    *,
    padded: bool = True,
) -> ir.Model:
    """The nodes that make some outputs from what enters a piece, as a model that shares tensors with the whole one.

    Args:
        model: The whole model.
        piece: The piece.
        outputs: What is wanted: values that it makes, or that are computed from the inputs alone.
        shown: Attentions whose probabilities are reduced to what each key receives; outputs `RECEIVED` + name.
        tensors: Initializers by value, instead of those that the model holds now.
        padded: Whether some queries may not count: then `VALID` is an input of what is shown.

    Raises:
        ModelError: An attention can't be shown.
    """
    own = [value for value in outputs if value not in piece.entering and not value.is_graph_input()]
    wanted = list(dict.fromkeys([*own, *(node.outputs[0] for node in shown)]))
    inputs, initializers, chosen = bounded(wanted, set(piece.entering))
    nodes = [node for node in model.graph if node in chosen]
    view = ir.GraphView(
        inputs, wanted, nodes=nodes, initializers=initializers, opset_imports=model.graph.opset_imports, name="piece"
    )
    graph = view.clone()
    for value in graph.inputs:
        value.const_value = None
    for value in initializers if tensors is not None else ():
        assert tensors is not None
        if value in tensors:
            graph.initializers[value.name or ""].const_value = tensors[value]
    made = {value.name: node for node in graph for value in node.outputs}
    for node in shown:
        _show(graph, made[node.outputs[0].name], f"{RECEIVED}{node.name}", opset(model), padded)
    if shown:
        kept = {value.name for value in own}
        for index in reversed([i for i, value in enumerate(graph.outputs) if not _stays(value, kept)]):
            del graph.outputs[index]
    return ir.Model(
        graph,
        ir_version=model.ir_version,
        functions=list(model.functions.values()),
        metadata_props=dict(model.metadata_props),
    )


def _stays(value: ir.Value, kept: set[str | None]) -> bool:
    return value.name in kept or (value.name or "").startswith(RECEIVED)


def bounded(wanted: Sequence[ir.Value], entering: set[ir.Value]) -> tuple[list[ir.Value], list[ir.Value], set[ir.Node]]:
    """Inputs, initializers and nodes of what makes `wanted` from the values `entering` and the model's inputs."""
    inputs: dict[ir.Value, None] = {}
    initializers: dict[ir.Value, None] = {}
    chosen: set[ir.Node] = set()
    seen: set[ir.Value] = set()
    pending = list(reversed(wanted))
    while pending:
        value = pending.pop()
        if value in seen:
            continue
        seen.add(value)
        node = value.producer()
        if value.is_initializer():
            initializers[value] = None
        elif value in entering or node is None:
            inputs[value] = None
        elif node not in chosen:
            chosen.add(node)
            pending += reversed(reads(node))
    return list(inputs), list(initializers), chosen


def _show(graph: ir.Graph, node: ir.Node, name: str, version: int, padded: bool) -> None:
    """Reduce the probabilities of an attention [batch, heads, queries, keys] to what each key receives, on average over
    the heads and the queries that count: an output [batch, 1, keys]."""
    probabilities = _probabilities(node, name)
    cast = ir.node("Cast", [probabilities], {"to": int(ir.DataType.FLOAT)}, name=f"{name}.cast")
    over = [1] if padded else [1, 2]
    axes = ir.Value(name=f"{name}.axes", const_value=ir.tensor(np.asarray(over, np.int64), name=f"{name}.axes"))
    if version >= 18:
        graph.register_initializer(axes)
    inputs, attributes = ([axes], {}) if version >= 18 else ([], {"axes": over})
    mean = ir.node(
        "ReduceMean", [cast.outputs[0], *inputs], {"keepdims": int(not padded), **attributes}, name=f"{name}.mean"
    )
    made = [cast, mean]
    if padded:
        valid = next((value for value in graph.inputs if value.name == VALID), None)
        if valid is None:
            valid = ir.Value(name=VALID, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([None, 1, None]))
            graph.inputs.append(valid)
        made.append(ir.node("MatMul", [valid, mean.outputs[0]], name=f"{name}.product"))
    else:
        first = ir.Value(name=f"{name}.first", const_value=ir.tensor(np.asarray([1], np.int64), name=f"{name}.first"))
        graph.register_initializer(first)
        made.append(ir.node("Squeeze", [mean.outputs[0], first], name=f"{name}.squeeze"))
    for one in made:
        one.outputs[0].name = f"{one.name}.output"
    result = made[-1].outputs[0]
    result.name, result.type = name, ir.TensorType(ir.DataType.FLOAT)
    graph.extend(made)
    graph.outputs.append(result)


def _probabilities(node: ir.Node, name: str) -> ir.Value:
    if node.op_type == "Softmax":
        return node.outputs[0]
    if node.op_type != "Attention" or node.domain != "":
        raise ModelError(
            f"How much attention tokens receive in {node.name!r} can't be seen: {node.op_type} doesn't give its "
            "probabilities; calibrate before it is lowered."
        )
    mode = attribute_int(node, "qk_matmul_output_mode", 0)
    if len(node.outputs) > 3 and node.outputs[3].uses() and mode != _AFTER_SOFTMAX:
        raise ModelError(f"How much attention tokens receive in {node.name!r} can't be seen: its scores are an output.")
    if len(node.outputs) < 4:
        missing = range(len(node.outputs), 4)
        node.resize_outputs(4)
        for index in missing:
            node.outputs[index].name = ""
    node.attributes["qk_matmul_output_mode"] = ir.AttrInt64("qk_matmul_output_mode", _AFTER_SOFTMAX)
    node.outputs[3].name = f"{name}.probabilities"
    return node.outputs[3]
