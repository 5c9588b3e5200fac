"""eliminate-common-subexpressions: the same computation once."""

from __future__ import annotations

from collections.abc import Hashable
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.graph.constants import constant_tensor
from graphopt.graph.edits import Editor, functions, opset, subgraphs_of
from graphopt.passes.base import Pass

RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
)
"""Operators that give other numbers at each call: two of them are never one, and none is a constant."""
SMALL_CONSTANT = 64
"""Elements up to which equal constants count as one value (larger ones: deduplicate-initializers)."""


def is_random(node: ir.Node, version: int) -> bool:
    """Whether the node draws random numbers (Dropout with a training mode does)."""
    if node.domain not in ("", "ai.onnx"):
        return False
    if node.op_type == "Dropout":
        return version < 7 or len(node.inputs) > 2
    return node.op_type in RANDOM


def attributes_of(node: ir.Node) -> tuple[Hashable, ...] | None:
    """What equal attributes of nodes have in common; None where this can't be told."""
    attributes: list[Hashable] = []
    for name, attribute in sorted(node.attributes.items()):
        if attribute.is_ref():
            attributes.append((name, "ref", attribute.ref_attr_name))
            continue
        value = attribute.value
        if attribute.type == ir.AttributeType.TENSOR:
            tensor = attribute.as_tensor()
            if tensor.size > SMALL_CONSTANT or tensor.dtype == ir.DataType.STRING:
                return None
            value = (tensor.dtype, tuple(tensor.shape.numpy()), tensor.tobytes())
        elif attribute.type in (ir.AttributeType.FLOAT, ir.AttributeType.FLOATS):
            value = np.asarray(value, dtype=np.float32).tobytes()  # 0.0 and -0.0 are equal and not the same
        elif isinstance(value, (list, tuple)):
            value = tuple(v.hex() if isinstance(v, float) else v for v in value)
        elif isinstance(value, float):
            value = value.hex()  # 0.0 and -0.0 are equal to each other, but not the same
        elif not isinstance(value, (int, str, bytes)):
            return None
        attributes.append((name, attribute.type, value))
    return tuple(attributes)


class EliminateCommonSubexpressions(Pass):
    """Compute equal expressions once: same operator, same inputs, same attributes.

    Works in the main graph and in subgraphs, where a value that an outer graph has already computed is used. Left
    alone: operators of other domains (they may have state), random ones (two draws are two draws), and those with
    subgraphs.

    **Needs:** nothing. **Guarantees:** the same numbers, bit for bit.

    **Why not onnx_ir's CommonSubexpressionEliminationPass:** it doesn't enter subgraphs, and merges operators of
    unknown domains and Bernoulli draws.

    **When not to use it:** never; a recomputed value is cheaper than a kept one only for operators that ONNX Runtime
    fuses into their consumers anyway.
    """

    name: ClassVar[str] = "eliminate-common-subexpressions"
    family: ClassVar[str] = "clean"
    bitwise: ClassVar[bool] = True

    def apply(self, model: ir.Model) -> bool:
        """See the class."""
        edit = Editor(model)
        known: dict[Hashable, ir.Node] = {}
        changed = self._visit(model.graph, known, edit, opset(model))
        for function in functions(model):
            changed |= self._visit(function.graph, {}, edit, function.opset_imports.get("", opset(model)))
        return changed

    def _visit(self, graph: ir.Graph, outer: dict[Hashable, ir.Node], edit: Editor, version: int) -> bool:
        known = dict(outer) if outer else {}
        changed = False
        for node in list(graph):
            if node.graph is None:
                continue
            inner = list(subgraphs_of(node))
            for subgraph in inner:
                changed |= self._visit(subgraph, known, edit, version)
            if inner or node.domain not in ("", "ai.onnx") or is_random(node, version) or node.op_type == "Constant":
                continue
            if node.op_type == "Identity" and node.outputs[0].is_graph_output():
                continue  # it could only become an Identity of another output
            key = self._key(node)
            if key is None:
                continue
            twin = known.get(key)
            if twin is None:
                known[key] = node
                continue
            edit.at(node)
            self.applied(node, f"the same as {twin.name!r}")
            for old, new in zip(list(node.outputs), twin.outputs, strict=True):
                edit.replace(old, new)
            if node.graph is not None:
                edit.remove_dead(node)
            changed = True
        return changed

    @staticmethod
    def _key(node: ir.Node) -> Hashable:
        """What makes two nodes equal; None where this can't be told."""
        attributes = attributes_of(node)
        if attributes is None:
            return None
        inputs: list[Hashable] = []
        for operand in node.inputs:
            tensor_or_none = constant_tensor(operand)
            if (
                tensor_or_none is not None
                and tensor_or_none.size <= SMALL_CONSTANT
                and tensor_or_none.dtype != ir.DataType.STRING
            ):
                inputs.append((tensor_or_none.dtype, tuple(tensor_or_none.shape.numpy()), tensor_or_none.tobytes()))
            else:
                inputs.append(operand)
        return (
            node.op_type,
            len(node.outputs),
            tuple(bool(o.name) for o in node.outputs),
            tuple(inputs),
            attributes,
        )
