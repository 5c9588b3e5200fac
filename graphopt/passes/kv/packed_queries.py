"""A packed projection of queries, keys and values of which only the queries are wanted any more."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.analysis.algebra import attribute_int, is_op
from graphopt.analysis.shapes import ShapeFacts
from graphopt.graph.computed import columns
from graphopt.graph.constants import constant_array
from graphopt.graph.edits import Editor
from graphopt.passes.fold.layers import Layer, layer_of

_THROUGH = ("Concat", "Identity", "Reshape", "RotaryEmbedding", "Transpose")
_MAX_STEPS = 8


def narrow_queries(query: ir.Value, facts: ShapeFacts, edit: Editor) -> bool:
    """Let the product that `query` is a part of compute nothing but that part, where nothing reads the rest.

    Args:
        query: The queries of an attention, in any layout.
        facts: Shapes of the model.
        edit: Its editor.

    Returns:
        Whether the product was narrowed: it is a MatMul with a constant weight, bias or not, of which a Split or a
        Slice takes columns.
    """
    value: ir.Value | None = query
    node = None
    for _ in range(_MAX_STEPS):
        node = None if value is None else value.producer()
        if node is None or not is_op(node, *_THROUGH):
            break
        value = node.inputs[0]
    part = None if node is None or value is None else _part(node, value, facts)
    if node is None or value is None or part is None:
        return False
    source, (start, stop) = node.inputs[0], part
    maker = None if source is None else source.producer()
    layer = layer_of(maker) if maker is not None else ""
    if not isinstance(layer, Layer) or layer.node.op_type != "MatMul" or isinstance(bias := layer.bias(), str):
        return False
    if any(user is not node for made in (layer.node.outputs[0], layer.output) for user, _ in made.uses()
           if user is not layer.add):  # fmt: skip
        return False
    if stop - start >= layer.outputs:
        return False
    edit.at(node)
    made = edit.op("MatMul", [layer.node.inputs[0], edit.constant(columns(layer.weight, start, stop), "queries")])
    if layer.add is not None:
        whole = np.broadcast_to(bias, (layer.outputs,)).astype(layer.weight.dtype.numpy())
        made = edit.op("Add", [made, edit.constant(np.ascontiguousarray(whole[start:stop]), "bias")])
    edit.replace(value, made)
    return True


def _part(node: ir.Node, value: ir.Value, facts: ShapeFacts) -> tuple[int, int] | None:
    """The columns of its operand that an output of `node` is; None where it isn't some, or others are read."""
    source = node.inputs[0]
    shape = None if source is None else facts.shape(source)
    width = None if shape is None else shape[-1].value
    if shape is None or width is None:
        return None
    last = (-1, len(shape) - 1)
    if is_op(node, "Split"):
        sizes = constant_array(node.inputs[1]) if len(node.inputs) > 1 else None
        if sizes is None and width % len(node.outputs):
            return None
        each = sizes.tolist() if sizes is not None else [width // len(node.outputs)] * len(node.outputs)
        others = any(other.uses() or other.is_graph_output() for other in node.outputs if other is not value)
        place = list(node.outputs).index(value)
        start = sum(each[:place])
        return None if others or attribute_int(node, "axis", 0) not in last else (start, start + each[place])
    if not is_op(node, "Slice") or len(node.inputs) < 4:
        return None
    given = [None if v is None else constant_array(v) for v in node.inputs[1:5]]
    if any(array is None or array.size != 1 for array in given):
        return None
    start, stop, axis, *step = (int(array.reshape(-1)[0]) for array in given if array is not None)
    if axis not in last or step not in ([], [1]):
        return None
    start, stop, _ = slice(start, stop).indices(width)
    return (start, stop) if start < stop else None
