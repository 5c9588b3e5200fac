"""Element types and ranks as they follow from a model's inputs and initializers alone.

Real files declare shapes of intermediate values and outputs that are false, so those are not read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import onnx
import onnx_ir as ir

_SMALL = 128
"""Bytes: shapes, axes and the like, whose numbers inference reads; larger initializers go in by shape only."""


_ROUNDS = 16
"""How often inference is run again after a computed shape gave a rank; more only in very deep chains of reshapes."""


class Known:
    """What is known of the values of a model before anything of it was rewritten.

    Args:
        model: The model to infer from; None to know only what the values say themselves (in functions).
    """

    def __init__(self, model: ir.Model | None = None) -> None:
        self._by_name = {} if model is None else _infer(model)
        self._original: dict[ir.Value, str | None] = {}

    def dtype(self, value: ir.Value | None) -> ir.DataType | None:
        """The element type of `value`, None where it isn't known or `value` is omitted."""
        if value is None:
            return None
        return value.dtype if value.dtype is not None else self._inferred(value)[0]

    def rank(self, value: ir.Value | None) -> int | None:
        """The rank of `value`, None where it isn't known or `value` is omitted."""
        if value is None:
            return None
        if value.is_initializer() and value.const_value is not None:
            return len(value.const_value.shape)
        return self._inferred(value)[1]

    def same(self, value: ir.Value, original: ir.Value) -> None:
        """Note that `value` is about to take the place of `original`, with its type and rank."""
        self._original[value] = self._original.get(original, original.name)

    def _inferred(self, value: ir.Value) -> tuple[ir.DataType | None, int | None]:
        return self._by_name.get(self._original.get(value, value.name) or "", (None, None))


def _infer(model: ir.Model) -> dict[str, tuple[ir.DataType | None, int | None]]:
    skeleton = _skeleton(model)
    for _ in range(_ROUNDS):
        try:
            proto = onnx.shape_inference.infer_shapes(skeleton, data_prop=True)
        except Exception:  # inference raises bare C++ errors on what it can't read; then nothing is known
            return {}
        if not _add_reshaped(skeleton, proto):
            break
    # Two branches may use one name for different things.
    count = Counter(value.name for graph in _graphs(model) for value in _defined(graph))
    known: dict[str, tuple[ir.DataType | None, int | None]] = {}
    for info in _value_infos(proto.graph):
        tensor = info.type.tensor_type
        if count[info.name] == 1:
            dtype = ir.DataType(tensor.elem_type) if tensor.elem_type else None
            known[info.name] = (dtype, len(tensor.shape.dim) if tensor.HasField("shape") else None)
    return known


def _add_reshaped(skeleton: onnx.ModelProto, inferred: onnx.ModelProto) -> bool:
    """Tell the skeleton the ranks of reshaped values, which onnx leaves open where the shape is computed.

    The length of the shape is the rank. Exporters compute shapes all the time (a batch size taken from the input).
    """
    tensors = {info.name: info.type.tensor_type for info in _value_infos(inferred.graph)}
    lengths = {t.name: t.dims[0] for t in inferred.graph.initializer if len(t.dims) == 1}
    for name, tensor in tensors.items():
        if len(tensor.shape.dim) == 1 and tensor.shape.dim[0].HasField("dim_value"):
            lengths[name] = tensor.shape.dim[0].dim_value
    added = False
    for node in skeleton.graph.node:
        shape = {"Reshape": node.input[1:2], "ConstantOfShape": node.input[:1]}.get(node.op_type, [])
        output = tensors.get(node.output[0]) if shape else None
        if output is None or output.HasField("shape") or shape[0] not in lengths:
            continue
        new = [None] * lengths[shape[0]]
        skeleton.graph.value_info.append(onnx.helper.make_tensor_value_info(node.output[0], output.elem_type, new))
        added = True
    return added


def _graphs(model: ir.Model) -> Iterator[ir.Graph]:
    yield model.graph
    yield from model.graph.subgraphs()


def _defined(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from dict.fromkeys([*graph.inputs, *graph.initializers.values()])
    for node in graph:
        yield from node.outputs


def _skeleton(model: ir.Model) -> onnx.ModelProto:
    """The model without its weights and without the types that it declares for what its nodes compute."""
    graph = onnx.GraphProto(name=model.graph.name or "graph")
    for value in model.graph.inputs:
        graph.input.append(ir.to_proto(value))
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or value in model.graph.inputs:
            continue
        if tensor.nbytes <= _SMALL:
            graph.initializer.append(ir.to_proto(tensor))
            graph.initializer[-1].name = name
        else:
            shape = [d for d in tensor.shape if isinstance(d, int)]
            graph.input.append(onnx.helper.make_tensor_value_info(name, int(tensor.dtype), shape))
    graph.node.extend(ir.to_proto(node) for node in model.graph)
    for inner in _subgraphs(graph):
        del inner.value_info[:]
        for output in inner.output:
            output.ClearField("type")
    for output in model.graph.outputs:
        graph.output.append(onnx.ValueInfoProto(name=output.name))
    proto = onnx.ModelProto(ir_version=model.ir_version, graph=graph)
    proto.functions.extend(ir.to_proto(function) for function in model.functions.values())
    for domain, version in model.opset_imports.items():
        proto.opset_import.add(domain=domain, version=version)
    return proto


def _subgraphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield inner
                yield from _subgraphs(inner)


def _value_infos(graph: onnx.GraphProto) -> Iterator[onnx.ValueInfoProto]:
    for part in (graph, *_subgraphs(graph)):
        yield from part.input
        yield from part.value_info
        yield from part.output
