"""Which integers a graph can take: what every integer or Boolean input is used for, by forward dataflow.

A value is followed through operators that move or retype integers without changing them, into subgraphs and function
bodies, up to the operators that say what the numbers mean: an index into a table, a comparison with a constant,
a mask, a position, a size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from graphopt.graph.constants import constant_array, scalar
from graphopt.graph.edits import subgraphs_of
from graphopt.graph.skeleton import static_shape

# Input slots through which an operator hands numbers on unchanged; None stands for all of them.
_CARRIERS: dict[str, tuple[int, ...] | None] = {
    "Cast": (0,), "CastLike": (0,), "Identity": (0,), "Reshape": (0,), "Unsqueeze": (0,), "Squeeze": (0,),
    "Flatten": (0,), "Transpose": (0,), "Slice": (0,), "Split": (0,), "Expand": (0,), "Tile": (0,), "Concat": None,
    "Gather": (0,), "GatherElements": (0,), "GatherND": (0,), "Where": (1, 2), "Pad": (0,), "Compress": (0,),
    "SequenceConstruct": None, "Dropout": (0,), "ReduceMax": (0,), "ReduceMin": (0,),
}  # fmt: skip
_COMPARISONS = {"Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"}
_MASKING = {"Mul", "Sub", "And", "Or", "Not", "Xor", "ReduceSum", "CumSum", "Neg", "ReduceMean"}
_SCALING = {"Mul", "Div", "MatMul", "Einsum", "Gemm"}
# Input slots that take shapes, counts and axes.
_SIZES: dict[str, tuple[int, ...]] = {
    "Reshape": (1,), "Expand": (1,), "ConstantOfShape": (0,), "Range": (0, 1, 2), "Slice": (1, 2, 3, 4), "Tile": (1,),
    "TopK": (1,), "Resize": (3,), "Split": (1,), "Pad": (1,), "Unsqueeze": (1,), "Squeeze": (1,), "OneHot": (1,),
}  # fmt: skip


@dataclasses.dataclass
class IntegerUse:
    """What the graph does with one integer or Boolean input.

    Attributes:
        limit: The input must stay below this number (a table's length), or None.
        compared: Constants that it is compared with, ascending.
        masks: It selects or weighs: multiplied, subtracted, negated, summed, or a condition.
        positions: It is turned into angles, or indexes a table of them.
        sizes: It is a shape, a count or an axis.
    """

    limit: int | None = None
    compared: tuple[float, ...] = ()
    masks: bool = False
    positions: bool = False
    sizes: bool = False


def integer_uses(model: ir.Model) -> dict[str, IntegerUse]:
    """The use of every integer or Boolean tensor input of the main graph, by name."""
    owners = _owners(model)
    uses = {}
    for value in model.graph.inputs:
        dtype = value.dtype
        if dtype is None or not (dtype.is_integer() or dtype == ir.DataType.BOOL) or value.is_initializer():
            continue
        uses[value.name or ""] = _follow(model, value, owners)
    return uses


def _owners(model: ir.Model) -> dict[ir.Graph, ir.Node]:
    """The node to which each subgraph belongs."""
    graphs = [model.graph, *model.graph.subgraphs()]
    for function in model.functions.values():
        graphs += [function.graph, *function.subgraphs()]
    return {inner: node for graph in graphs for node in graph for inner in subgraphs_of(node)}


def _follow(model: ir.Model, start: ir.Value, owners: dict[ir.Graph, ir.Node]) -> IntegerUse:
    """Follow one input; with each value goes what has been added to it since."""
    use = IntegerUse()
    compared: set[float] = set()
    calls: dict[ir.Value, list[ir.Value]] = {}  # outputs of a function body -> outputs of the nodes that call it
    seen: set[tuple[ir.Value, float]] = set()
    pending: list[tuple[ir.Value, float]] = [(start, 0.0)]
    while pending:
        value, offset = pending.pop()
        if (value, offset) in seen or abs(offset) > 1 << 40:
            continue
        seen.add((value, offset))
        for caller in calls.get(value, ()):
            pending.append((caller, offset))
        if value.is_graph_output() and value.graph in owners:
            pending += [(v, offset) for v in _leaves_through(value, owners[value.graph])]
        for node, slot in value.uses():
            op = node.op_type
            function = model.functions.get(node.op_identifier())
            if function is not None:
                if slot < len(function.inputs):
                    pending.append((function.inputs[slot], offset))
                for inner, outer in zip(function.outputs, node.outputs, strict=False):
                    calls.setdefault(inner, []).append(outer)
                continue
            limit = index_limit(node, slot)
            if limit is not None:
                use.limit = min(limit - int(offset), use.limit if use.limit is not None else limit - int(offset))
                use.positions |= "RotaryEmbedding" in op
                continue
            if slot in _SIZES.get(op, ()):
                use.sizes = True
                continue
            if op in _COMPARISONS and len(node.inputs) == 2:
                other = node.inputs[1 - slot]
                if (number := scalar(other)) is not None:
                    compared.add(number - offset)
                elif (limit := _classes(other)) is not None:  # a one-hot encoding spelled as Equal with 0, 1, 2, ...
                    use.limit = min(limit - int(offset), use.limit or limit - int(offset))
                continue
            if op in ("If", "Loop", "Scan"):
                pending += [(v, offset) for v in _enters(node, slot)]
                use.masks |= op == "If"
                continue
            if op in ("Add", "Sub") and slot == 0 and (number := scalar(node.inputs[1])) is not None:
                pending.append((node.outputs[0], offset + (number if op == "Add" else -number)))
            elif op == "Add" and (number := scalar(node.inputs[0])) is not None:
                pending.append((node.outputs[0], offset + number))
            slots = _CARRIERS.get(op, ())
            if slots is None or slot in slots:
                pending += [(v, offset) for v in node.outputs]
            use.masks |= op in _MASKING or (op == "Where" and slot == 0)
            use.positions |= "RotaryEmbedding" in op or (op in _SCALING and _becomes_angle(node))
    use.compared = tuple(sorted(compared))
    if use.limit is not None and use.limit <= 0:
        use.limit = None
    return use


def index_limit(node: ir.Node, slot: int) -> int | None:
    """The length of the table that input `slot` of `node` indexes, where it is an index and the length is known."""
    op = node.op_type
    if op == "Gather" and slot == 1:
        return _length(node, 0, node.attributes.get_int("axis", 0))
    if op in ("GatherElements", "ScatterElements") and slot == 1:
        return _length(node, 0, node.attributes.get_int("axis", 0))
    if op == "GatherBlockQuantized" and slot == 1:
        return _length(node, 0, node.attributes.get_int("gather_axis", 0))
    if op in ("GatherND", "ScatterND") and slot == 1:
        batch = node.attributes.get_int("batch_dims", 0)
        depth = _last_dimension(node.inputs[1])
        lengths = [_length(node, 0, axis) for axis in range(batch, batch + (depth or 1))]
        known = [n for n in lengths if n is not None]
        return min(known) if known else None
    if op == "OneHot" and slot == 0:
        depth_value = scalar(node.inputs[1])
        return None if depth_value is None else int(depth_value)
    if op == "ArrayFeatureExtractor" and slot == 1:
        return _length(node, 0, -1)
    if op == "EmbedLayerNormalization":
        table = {0: 2, 1: 4, 8: 3}.get(slot)
        return None if table is None else _length(node, table, 0)
    if op == "RotaryEmbedding":
        contributed = node.domain == "com.microsoft"
        if slot == (1 if contributed else 3):
            return _length(node, 2 if contributed else 1, 0)
    return None


def _length(node: ir.Node, slot: int, axis: int) -> int | None:
    value = node.inputs[slot] if slot < len(node.inputs) else None
    shape = None if value is None else value.shape
    if shape is None and value is not None and (tensor := ir.convenience.get_const_tensor(value)) is not None:
        shape = static_shape(tensor)
    if shape is None or not -len(shape) <= axis < len(shape):
        return None
    length = shape[axis]
    return length if isinstance(length, int) else None


def _classes(value: ir.Value | None) -> int | None:
    """The n of a constant that counts 0, 1, ..., n - 1."""
    array = constant_array(value)
    if array is None or array.size < 2 or array.dtype.kind not in "iuf":
        return None
    return array.size if np.array_equal(array.ravel(), np.arange(array.size)) else None


def _becomes_angle(node: ir.Node, depth: int = 4) -> bool:
    """Whether the output of `node` goes to a sine or cosine within a few operators."""
    if node.op_type in ("Sin", "Cos"):
        return True
    if depth == 0:
        return False
    return any(_becomes_angle(user, depth - 1) for out in node.outputs for user in dict.fromkeys(out.consumers()))


def _last_dimension(value: ir.Value | None) -> int | None:
    if value is None or value.shape is None or not len(value.shape):
        return None
    length = value.shape[-1]
    return length if isinstance(length, int) else None


def _enters(node: ir.Node, slot: int) -> Iterator[ir.Value]:
    """The inputs of a body that stand for input `slot` of a Loop or Scan (an If captures, so has none)."""
    if node.op_type == "If" or (node.op_type == "Loop" and slot < 2):
        return
    for graph in subgraphs_of(node):
        if slot < len(graph.inputs):
            yield graph.inputs[slot]


def _leaves_through(value: ir.Value, owner: ir.Node) -> Iterator[ir.Value]:
    """The outputs of an If, Loop or Scan that stand for an output of its body."""
    assert value.graph is not None
    shift = 1 if owner.op_type == "Loop" else 0
    for index, output in enumerate(value.graph.outputs):
        if output is value and 0 <= index - shift < len(owner.outputs):
            yield owner.outputs[index - shift]
