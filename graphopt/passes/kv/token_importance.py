"""Outputs that say how much attention each cached token gets, computed only in runs that ask for it."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from graphopt.analysis.algebra import is_op
from graphopt.analysis.shapes import ShapeFacts
from graphopt.graph.edits import Editor
from graphopt.passes.kv.cached_layers import CachedLayer

_LATE = ("Identity", "Reshape", "RotaryEmbedding", "Transpose")
"""What stands between the projection of queries and the attention. It is computed again for the importance: so nothing
but the projection itself has to be kept for it when the attention is lowered."""


class ImportanceOutputs:
    """Adds the outputs of layers, and one input that asks for all of them.

    Args:
        model: The decoder.
        edit: Its editor.
        window: Queries, the last of a run, whose attention is summed.

    Attributes:
        asked: The input.
    """

    def __init__(self, model: ir.Model, edit: Editor, window: int) -> None:
        self._graph, self._edit = model.graph, edit
        no = ir.tensor(np.array(False), name=edit.names.fresh("importance"))
        self.asked = ir.Value(name=no.name, type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]), const_value=no)
        self._graph.inputs.append(self.asked)
        self._graph.register_initializer(self.asked)
        self._window = window
        self._numbers: dict[tuple[object, ...], ir.Value] = {}

    def add(self, layer: CachedLayer, facts: ShapeFacts) -> ir.Value:
        """The output of a layer, [batch, KV heads, past + new], or [1, KV heads, 0] where it isn't asked for."""
        edit, node = self._edit, layer.node
        query = node.inputs[0]
        assert query is not None
        dtype = facts.dtype(query) or ir.DataType.FLOAT
        told = ir.DataType.DOUBLE if dtype == ir.DataType.DOUBLE else ir.DataType.FLOAT
        output = ir.Value(
            name=edit.names.fresh(f"importance.{layer.number}"),
            type=ir.TensorType(told),
            shape=ir.Shape([None, layer.kv_heads, None]),
        )
        edit.at(node)
        nothing = self._constant(np.zeros((1, layer.kv_heads, 0), told.numpy()), "nothing")
        branches = {}
        for name in ("then_branch", "else_branch"):
            result = ir.Value(name=edit.names.fresh(f"{output.name}/{name}"), type=ir.TensorType(told))
            last = ir.node("Identity", [nothing], outputs=[result], name=edit.names.fresh(f"{output.name}/Identity"))
            branches[name] = ir.Graph([], [result], nodes=[last], name=edit.names.fresh(f"{output.name}/graph"))
            if name == "then_branch":
                made = self._written(layer, query, dtype, told, last)
                last.replace_input_with(0, made)
        chosen = ir.node(
            "If", [self.asked], branches,
            outputs=[output], name=edit.names.fresh(f"{output.name}/If"),
        )  # fmt: skip
        self._graph.insert_after(node, chosen)
        self._graph.outputs.append(output)
        return output

    def _written(
        self, layer: CachedLayer, query: ir.Value, dtype: ir.DataType, told: ir.DataType, last: ir.Node
    ) -> ir.Value:
        """The importance, written before the node `last` of a branch."""
        edit, groups = self._edit, layer.heads // layer.kv_heads
        whole = np.iinfo(np.int64).max
        constant, number = self._constant, told.numpy()
        heads = constant(np.array([0, 0, layer.heads, layer.depth]), "heads")
        grouped = constant(np.array([0, layer.kv_heads, groups, -1, layer.depth]), "grouped")
        start, end, axis = (constant(np.array([n]), "place") for n in (-self._window, whole, 2))
        zero, one = constant(np.array(0), "zero"), constant(np.array(1), "one")
        first, column = constant(np.array([0]), "first"), constant(np.array([1]), "column")
        scale = constant(np.array(_scale(layer), number), "scale")
        hidden = constant(np.array(-np.inf, number), "hidden")
        pooled = constant(np.array([2, 3]), "pooled")
        share = constant(np.array(1 / groups, number), "share")
        cap = layer.node.attributes.get_float("softcap") or 0.0
        limit = constant(np.array(cap or 1.0, number), "cap") if cap else scale
        edit.at(last)
        q = self._again(query)
        if layer.joined:
            q = edit.op("Transpose", [edit.op("Reshape", [q, heads])], {"perm": [0, 2, 1, 3]})
        q = edit.op("Slice", [q, start, end, axis])
        k = edit.op("Unsqueeze", [edit.op("Transpose", [layer.presents[0]], {"perm": [0, 1, 3, 2]}), axis])
        queries = edit.op("Squeeze", [edit.op("Shape", [q], {"start": 2, "end": 3}), first])
        q = edit.op("Reshape", [q, grouped])
        if dtype != told:
            q, k = (edit.op("Cast", [value], {"to": told.value}) for value in (q, k))
        scores = edit.op("MatMul", [edit.op("Mul", [q, scale]), k])
        if cap:
            scores = edit.op("Mul", [edit.op("Tanh", [edit.op("Div", [scores, limit])]), limit])
        total = edit.op("Squeeze", [edit.op("Shape", [layer.presents[0]], {"start": 2, "end": 3}), first])
        rows = edit.op("Range", [edit.op("Sub", [total, queries]), total, one])
        seen = edit.op("LessOrEqual", [edit.op("Range", [zero, total, one]), edit.op("Unsqueeze", [rows, column])])
        weights = edit.op("Softmax", [edit.op("Where", [seen, scores, hidden])], {"axis": -1})
        return edit.op("Mul", [edit.op("ReduceSum", [weights, pooled], {"keepdims": 0}), share])

    def _again(self, value: ir.Value) -> ir.Value:
        """`value`, computed anew from what the projection gives."""
        chain = []
        node = value.producer()
        while node is not None and is_op(node, *_LATE) and node.graph is self._graph and node.inputs[0] is not None:
            chain.append(node)
            value = node.inputs[0]
            node = value.producer()
        for node in reversed(chain):
            attributes = {name: attribute.value for name, attribute in node.attributes.items()}
            value = self._edit.op(node.op_type, [value, *node.inputs[1:]], attributes)
        return value

    def _constant(self, array: np.ndarray, name: str) -> ir.Value:
        """A constant of the main graph, which branches read, made once."""
        key = (name, array.dtype.str, array.shape, array.tobytes())
        if key not in self._numbers:
            self._numbers[key] = self._edit.constant(array, name)
        return self._numbers[key]


def _scale(layer: CachedLayer) -> float:
    return layer.node.attributes.get_float("scale") or 1 / math.sqrt(layer.depth)
