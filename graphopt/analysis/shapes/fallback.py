"""Operators without a rule of ours: onnx's own inference of a single node, where all inputs are static and small."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from graphopt.analysis.dims import Dim
from graphopt.analysis.shapes.rule import Fact, Op, UnknownShapeError
from graphopt.graph.edits import subgraphs_of

MAX_BYTES = 4096
"""Of the tensors in a node's attributes; larger ones would be copied to protobuf for one shape."""


def infer(op: Op, version: int) -> list[Fact]:
    """What onnx says of the outputs of the node.

    Raises:
        UnknownShapeError: the operator isn't onnx's, or the shape of an input isn't constant.
    """
    node = op.node
    domain = "" if node.domain == "ai.onnx" else node.domain
    if domain not in ("", "ai.onnx.ml") or any(True for _ in subgraphs_of(node)):
        raise UnknownShapeError
    imports = 5 if domain else version
    if not onnx.defs.has(node.op_type, imports, domain):
        raise UnknownShapeError
    for attribute in node.attributes.values():
        if attribute.is_ref() or attribute.type in (ir.AttributeType.TENSORS, ir.AttributeType.SPARSE_TENSOR):
            raise UnknownShapeError
        if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().nbytes > MAX_BYTES:
            raise UnknownShapeError
    types, names = {}, []
    for i in range(len(op.facts)):
        fact = op.fact(i)
        sizes = [d.value for d in fact.shape or ()]
        if op.has(i) and (fact.dtype is None or fact.shape is None or None in sizes):
            raise UnknownShapeError
        names.append(f"i{i}" if op.has(i) else "")
        if op.has(i) and fact.dtype is not None:
            types[f"i{i}"] = onnx.helper.make_tensor_type_proto(int(fact.dtype), sizes)
    outputs = [f"o{i}" for i in range(len(node.outputs))]
    proto = onnx.helper.make_node(node.op_type, names, outputs, domain=domain)
    proto.attribute.extend(ir.to_proto(a) for a in node.attributes.values())
    schema = onnx.defs.get_schema(node.op_type, imports, domain)
    imported = [onnx.helper.make_opsetid(domain, imports)]
    try:
        inferred = onnx.shape_inference.infer_node_outputs(schema, proto, types, opset_imports=imported)
    except onnx.shape_inference.InferenceError as error:
        raise UnknownShapeError from error
    return [_from_type(inferred.get(name), op) for name in outputs]


def _from_type(given: onnx.TypeProto | None, op: Op) -> Fact:
    if given is None or not given.HasField("tensor_type"):
        return Fact()
    tensor = given.tensor_type
    dtype = ir.DataType(tensor.elem_type) if tensor.elem_type else None
    if not tensor.HasField("shape"):
        return Fact(dtype)
    dims = [Dim.of(d.dim_value) if d.HasField("dim_value") else op.unknown() for d in tensor.shape.dim]
    return Fact(dtype, tuple(dims))
