"""How a key/value cache runs through a graph: from the input of the past to the output of the present."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from typing import Literal

import onnx_ir as ir

from graphopt.graph.constants import is_constant
from graphopt.graph.edits import inner_graphs, subgraphs_of

Part = Literal["key", "value", "both", "codes", "scales", "recent"]
"""What a cache holds: keys, values, both, or of a quantized one its codes, scales and unquantized newest tokens."""

QUANTIZED = "ai.graphopt::QuantizedKVAttention"
"""The operator whose cache is quantized in blocks of tokens."""

FUSED: dict[str, dict[int, tuple[int, Part]]] = {
    "Attention": {4: (1, "key"), 5: (2, "value")},
    "com.microsoft::GroupQueryAttention": {3: (1, "key"), 4: (2, "value")},
    "com.microsoft::SparseAttention": {3: (1, "key"), 4: (2, "value")},
    "ai.graphopt::CachedAttention": {3: (1, "key"), 4: (2, "value")},
    "com.microsoft::MultiHeadAttention": {6: (1, "key"), 7: (2, "value")},
    "com.microsoft::DecoderMaskedMultiHeadAttention": {5: (1, "key"), 6: (2, "value")},
    "com.microsoft::Attention": {4: (1, "both")},
    "com.microsoft::DecoderMaskedSelfAttention": {4: (1, "both")},
    QUANTIZED: {3: (1, "codes"), 4: (2, "scales"), 5: (3, "recent")},
}
"""Operators that take a past and give a present: the place of the past to that of the present, and what it holds."""
IN_PLACE = (
    "com.microsoft::GroupQueryAttention", "com.microsoft::SparseAttention", "ai.graphopt::CachedAttention", QUANTIZED,
)  # fmt: skip
"""Operators that write the new rows into the past where past and present are one buffer, longer than what is in it."""

MOVES = frozenset({"Cast", "CastLike", "DequantizeLinear", "Dropout", "Identity", "QuantizeLinear", "Reshape", "Slice",
                   "Squeeze", "Transpose", "Unsqueeze"})  # fmt: skip
"""Operators through which a cache stays a cache, whatever its layout or type."""
_ON_KEYS = MOVES | {"Add", "Concat", "Div", "Expand", "Gather", "Mul", "Neg", "RotaryEmbedding", "Split", "Sub", "Tile"}
_AS_IT_IS = _ON_KEYS - {"Concat"}
_ON_SCORES = frozenset({"Add", "Cast", "Clip", "Concat", "Div", "Identity", "Max", "Mul", "Reshape", "Sub", "Tanh",
                        "Transpose", "Where"})  # fmt: skip
_ON_WEIGHTS = frozenset({"Cast", "Div", "Dropout", "Identity", "Mul", "Reshape", "Slice", "Transpose", "Where"})
_FURTHEST = 96
"""Nodes that one walk looks at."""


def qualified(node: ir.Node) -> str:
    """The operator with its domain, the default one left out."""
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"


@dataclasses.dataclass(frozen=True)
class Join:
    """Where the past meets what is new.

    Attributes:
        node: Concat, TensorScatter or an attention operator; None where the cache is read as it is.
        joined: Past and new; the past itself where nothing is new.
        present: The graph output that gives it back, or None.
        axis: The axis of the past along which rows are added, None where it can't be told.
        part: What the cache holds, None where no attention reads it.
        attention: The Softmax, or the attention operator, that reads it.
        windowed: Whether the present is cut to the last rows.
    """

    node: ir.Node | None
    joined: ir.Value
    present: ir.Value | None
    axis: int | None
    part: Part | None
    attention: ir.Node | None
    windowed: bool


class CacheFlow:
    """Follows caches through the main graph and the branches of its Ifs (not into functions: inline them first)."""

    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph
        self.order: dict[ir.Node, int] = {}
        """The place of every node in the order in which they run; what is in a branch stands at its If."""
        self._owners: dict[ir.Graph, ir.Node] = {}
        for index, node in enumerate(model.graph):
            self.order[node] = index
            for body in subgraphs_of(node):
                self._owners[body] = node
                for inner in (body, *inner_graphs(body)):
                    for nested in inner:
                        self.order[nested] = index
                        self._owners.update(dict.fromkeys(subgraphs_of(nested), nested))
        self._outputs = {id(value): None for value in model.graph.outputs}

    def join(self, past: ir.Value) -> Join | None:
        """Where `past` meets what is new; None where it isn't the cache of an attention."""
        unjoined: Join | None = None
        for value, axes, _ in self._moved(past):
            for node, slot in value.uses():
                name = qualified(node)
                if name in FUSED:
                    found = self._fused(node, slot, name, axes)
                    if found is not None:
                        return found
                elif name in ("Concat", "TensorScatter") and slot == 0 and len(node.inputs) > 1:
                    found = self._spelled_out(node, axes)
                    if found is not None:
                        return found
        beside = self._joined_beside(past)
        if beside is not None:
            return beside
        part, attention = self.reader(past, _AS_IT_IS)
        if part is not None:
            unjoined = Join(None, past, self.present(past)[0], None, part, attention, False)
        return unjoined

    def _fused(self, node: ir.Node, slot: int, name: str, axes: tuple[int, ...] | None) -> Join | None:
        places = FUSED[name]
        if slot not in places:
            return None
        index, part = places[slot]
        output = node.outputs[index] if index < len(node.outputs) else None
        present, windowed = self.present(output) if output is not None else (None, False)
        joined = output if output is not None else node.outputs[0]
        length = {"both": 3, "codes": 1, "scales": 1}.get(part, 2)
        axis = axes[length] if axes is not None and len(axes) > length else length if axes is None else None
        return Join(node, joined, present, axis, part, node, windowed)

    def _spelled_out(self, node: ir.Node, axes: tuple[int, ...] | None) -> Join | None:
        part, attention = self.reader(node.outputs[0])
        present, windowed = self.present(node.outputs[0])
        if part is None and present is not None:
            part, attention = self.reader(node.outputs[0], products=True)
        if part is None:
            return None
        return self._concatenated(node, axes, present, windowed, part, attention)

    def _joined_beside(self, past: ir.Value) -> Join | None:
        """Where new rows are put behind `past` for the next step alone, and an attention reads the past without them,
        as where layers share features of low rank (see `low-rank-kv`)."""
        for node, slot in past.uses():
            if qualified(node) != "Concat" or slot or len(node.inputs) < 2 or not node.outputs[0].is_graph_output():
                continue
            part, attention = self.reader(past, products=True)
            if part is not None:
                axes = None if past.shape is None else tuple(range(len(past.shape)))
                return self._concatenated(node, axes, node.outputs[0], False, part, attention)
        return None

    @staticmethod
    def _concatenated(
        node: ir.Node,
        axes: tuple[int, ...] | None,
        present: ir.Value | None,
        windowed: bool,
        part: Part,
        attention: ir.Node | None,
    ) -> Join:
        attribute = node.attributes.get("axis")
        axis = None if attribute is not None and attribute.is_ref() else attribute.as_int() if attribute else -2
        rank = len(axes) if axes is not None else None
        place = None if axis is None or rank is None or axes is None else axes[axis % rank]
        return Join(node, node.outputs[0], present, place, part, attention, windowed)

    def present(self, joined: ir.Value) -> tuple[ir.Value | None, bool]:
        """The graph output that gives `joined` back, and whether only its last rows."""
        for value, _, cut in self._moved(joined):
            if id(value) in self._outputs:
                return value, cut
        return None, False

    def _moved(self, start: ir.Value) -> Iterator[tuple[ir.Value, tuple[int, ...] | None, bool]]:
        """`start` and all that is the same numbers in another layout, nearest first; with the axis of `start` that each
        axis came from (None: lost by a Reshape), and whether a Slice is on the way."""
        rank = len(start.shape) if start.shape is not None else None
        axes = tuple(range(rank)) if rank is not None else None
        pending: deque[tuple[ir.Value, tuple[int, ...] | None, bool]] = deque([(start, axes, False)])
        seen = {start}
        while pending and len(seen) <= _FURTHEST:
            value, axes, cut = pending.popleft()
            yield value, axes, cut
            onward = []
            for node, slot in value.uses():
                if slot == 0 and _moves(node):
                    onward.append((node.outputs[0], _permuted(axes, node), cut or node.op_type == "Slice"))
            onward.extend((outer, axes, cut) for outer in self._given_out(value))
            for item in onward:
                if item[0] not in seen:
                    seen.add(item[0])
                    pending.append(item)

    def _given_out(self, value: ir.Value) -> Iterator[ir.Value]:
        """Outputs of Ifs whose branch gives `value` out."""
        owner = self._owners.get(value.graph) if value.graph is not None and value.is_graph_output() else None
        bodies = [] if owner is None or owner.op_type != "If" else list(subgraphs_of(owner))
        if owner is not None:
            for body in bodies:
                yield from (owner.outputs[i] for i, output in enumerate(body.outputs) if output is value)

    def reader(
        self, value: ir.Value, through: AbstractSet[str] = _ON_KEYS, *, products: bool = False
    ) -> tuple[Part | None, ir.Node | None]:
        """As what an attention reads `value`, `through` some operators, and that attention: its Softmax, or the
        operator. With `products` through products with constants and tables of constants too, which rebuild keys from
        features of lower rank and from codes.
        """
        pending, seen = deque([value]), {value}
        while pending and len(seen) <= _FURTHEST:
            current = pending.popleft()
            for node, slot in current.uses():
                name = qualified(node)
                if name in FUSED and slot in (1, 2):
                    return ("key" if slot == 1 else "value"), node
                if node.op_type in ("MatMul", "Einsum", "FusedMatMul", "Gemm"):
                    other = node.inputs[1 - slot] if slot < 2 <= len(node.inputs) else None
                    if (weights := _softmax_above(other)) is not None:
                        return "value", weights
                    # The left operand of the scores is the queries; an Einsum may name its operands in any order.
                    left = slot == 0 and node.op_type != "Einsum"
                    if not left and (scores := _softmax_below(node)) is not None:
                        return "key", scores
                    rebuilds = products and left and node.op_type == "MatMul" and is_constant(node.inputs[1])
                    if rebuilds and node.outputs[0] not in seen:
                        seen.add(node.outputs[0])
                        pending.append(node.outputs[0])
                elif ((slot == 0 or node.op_type in ("Concat", "Mul", "Add")) and node.op_type in through) or (
                    products and _looks_up(node, slot)
                ):
                    for output in node.outputs:
                        if output not in seen:
                            seen.add(output)
                            pending.append(output)
            for outer in self._given_out(current):
                if outer not in seen:
                    seen.add(outer)
                    pending.append(outer)
        return None, None


def _looks_up(node: ir.Node, slot: int) -> bool:
    """Whether a node reads rows of a constant table at the places that its input in `slot` holds."""
    return node.op_type == "Gather" and slot == 1 and is_constant(node.inputs[0])


def _moves(node: ir.Node) -> bool:
    """TorchScript leaves a Concat of one operand where a cache starts empty."""
    if node.domain not in ("", "ai.onnx", "com.microsoft"):
        return False
    return node.op_type in MOVES or (node.op_type == "Concat" and len(node.inputs) == 1)


def _permuted(axes: tuple[int, ...] | None, node: ir.Node) -> tuple[int, ...] | None:
    if axes is None or node.op_type in ("Reshape", "Squeeze", "Unsqueeze"):
        return None
    if node.op_type != "Transpose":
        return axes
    perm = node.attributes.get("perm")
    if perm is None:
        return axes[::-1]
    return None if perm.is_ref() or len(perm.as_ints()) != len(axes) else tuple(axes[i] for i in perm.as_ints())


def _softmax_above(value: ir.Value | None) -> ir.Node | None:
    """The Softmax that `value` comes from, as the weights of an attention do."""
    pending = deque([value])
    for _ in range(_FURTHEST):
        if not pending:
            break
        current = pending.popleft()
        node = current.producer() if current is not None else None
        if node is None:
            continue
        if node.op_type == "Softmax":
            return node
        if node.op_type in _ON_WEIGHTS:
            pending.extend(node.inputs)
    return None


def _softmax_below(node: ir.Node) -> ir.Node | None:
    """The Softmax that takes the scores which `node` computes."""
    pending, seen = deque([node]), {node}
    while pending and len(seen) <= _FURTHEST:
        for output in pending.popleft().outputs:
            for user, _ in output.uses():
                if user.op_type == "Softmax":
                    return user
                if user.op_type in _ON_SCORES and user not in seen:
                    seen.add(user)
                    pending.append(user)
    return None
