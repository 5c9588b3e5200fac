"""A model as protobuf without its weights: what checkers and sessions need, and cheap to serialize."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import onnx
import onnx_ir as ir

from graphopt.errors import ModelError
from graphopt.graph.edits import inner_graphs

INLINE_BYTES = 1024
"""Initializers up to this size stay in the protobuf: shapes, axes and scalars, whose numbers shape inference reads."""

_MARK = "graphopt:"


@dataclasses.dataclass(frozen=True)
class Weight:
    """An initializer that was left out of a skeleton.

    Attributes:
        name: Name of the value.
        tensor: Its numbers, wherever they lie.
        proto: The place holder in the skeleton: name, dtype and shape, marked as external data with no location yet.
        graph: The graph of the skeleton that lists `proto`.
    """

    name: str
    tensor: ir.TensorProtocol
    proto: onnx.TensorProto
    graph: onnx.GraphProto


def skeleton(model: ir.Model) -> tuple[onnx.ModelProto, list[Weight]]:
    """Serialize `model` without initializers larger than `INLINE_BYTES`, metadata and documentation.

    Large initializers of subgraphs are moved to the main graph, where ONNX Runtime accepts external data (it doesn't
    in subgraphs); a subgraph sees outer values, so nothing else changes. Where a name is in use twice, and inside
    functions, they stay inline. Weights in attributes of Constant nodes stay inline.

    Returns:
        The protobuf and what was left out of it. `model` is as it was before.

    Raises:
        ModelError: What has to stay inline is larger than protobuf's limit of 2 GB.
    """
    movable = _movable(model)
    swapped: list[tuple[ir.Value, ir.TensorProtocol]] = []
    try:
        for index, (value, tensor) in enumerate(movable):
            assert value.name is not None
            swapped.append((value, tensor))
            value.const_value = ir.ExternalTensor(
                f"{_MARK}{index}", 0, tensor.nbytes, tensor.dtype, shape=static_shape(tensor), name=value.name
            )
        for value, tensor in _small_external(model):
            swapped.append((value, tensor))
            value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=value.name)
        try:
            proto = ir.to_proto(model)
        except Exception as error:
            raise ModelError(f"The model can't be serialized: {first_line(error)}") from error
    finally:
        for value, tensor in swapped:
            value.const_value = tensor

    weights = []
    for graph in _graphs(proto):
        moved = []
        for position, initializer in enumerate(graph.initializer):
            if initializer.data_location != onnx.TensorProto.EXTERNAL or not initializer.external_data:
                continue
            location = initializer.external_data[0].value
            if not location.startswith(_MARK):
                continue
            place_holder = initializer
            if graph is not proto.graph:
                place_holder = proto.graph.initializer.add()
                place_holder.CopyFrom(initializer)
                moved.append(position)
            tensor = movable[int(location.removeprefix(_MARK))][1]
            weights.append(Weight(place_holder.name, tensor, place_holder, proto.graph))
        for position in reversed(moved):
            del graph.initializer[position]
    return proto, weights


def serialized(proto: onnx.ModelProto) -> bytes:
    """The bytes of `proto`.

    Raises:
        ModelError: They would be more than protobuf's limit of 2 GB.
    """
    try:
        return bytes(proto.SerializeToString())
    except Exception as error:
        raise ModelError(
            "The model keeps more than 2 GB inside nodes or subgraphs; make initializers of its Constant nodes "
            f"before it is verified ({first_line(error)})."
        ) from error


def static_shape(tensor: ir.TensorProtocol) -> ir.Shape:
    """The shape of a tensor, whose dimensions are all known."""
    return ir.Shape([int(d) for d in tensor.shape])  # type: ignore[arg-type]


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without ONNX Runtime's prefix."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    line = lines[0]
    if line.startswith("[ONNXRuntimeError] : "):
        line = line.split(" : ", 3)[-1]
    return line.strip()[:400]


def _initializers(model: ir.Model) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
    for graph in (model.graph, *inner_graphs(model.graph)):
        for value in graph.initializers.values():
            if value.const_value is not None and value.const_value.dtype != ir.DataType.STRING:
                yield value, value.const_value


def _movable(model: ir.Model) -> list[tuple[ir.Value, ir.TensorProtocol]]:
    """The large initializers, those of subgraphs only where their name is used once in the model."""
    counts: dict[str | None, int] = {}
    subgraphs = list(inner_graphs(model.graph))
    if subgraphs:
        for graph in (model.graph, *subgraphs):
            made = {v.name for v in graph.inputs} | set(graph.initializers)
            for name in [*made, *(v.name for node in graph for v in node.outputs)]:
                counts[name] = counts.get(name, 0) + 1
    return [
        (value, tensor)
        for value, tensor in _initializers(model)
        if tensor.nbytes > INLINE_BYTES and (value.graph is model.graph or counts.get(value.name) == 1)
    ]


def _small_external(model: ir.Model) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
    for value, tensor in list(_initializers(model)):
        if isinstance(tensor, ir.ExternalTensor) and not str(tensor.location).startswith(_MARK):
            yield value, tensor


def _graphs(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """All graphs that may hold initializers; metadata, which nobody downstream reads, is dropped on the way."""
    pending = [proto.graph]
    while pending:
        graph = pending.pop()
        yield graph
        for node in graph.node:
            node.ClearField("metadata_props")
            node.ClearField("doc_string")
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    pending.append(attribute.g)
                elif attribute.type == onnx.AttributeProto.GRAPHS:
                    pending.extend(attribute.graphs)
