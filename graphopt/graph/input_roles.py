"""Which inputs of a language model are token ids, attention mask and position ids: by where they go in the graph."""

from __future__ import annotations

import dataclasses
import re
from collections import deque
from collections.abc import Collection, Sequence

import onnx_ir as ir

from graphopt.graph.cache_flow import FUSED, QUANTIZED, qualified
from graphopt.graph.constants import constant_array, stored_weight

_INDEX_MOVES = frozenset({"Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Clip", "Expand"})
_FURTHEST = 4000
_STOPS = frozenset({"Softmax", "LayerNormalization", "RMSNormalization", "Shape", "Size"})
_MASK_SLOTS = {
    "Attention": (3, 6),
    "com.microsoft::Attention": (3, 5),
    "com.microsoft::GroupQueryAttention": (5, 6, 10),
    "com.microsoft::SparseAttention": (5, 6, 7, 8),
    "ai.graphopt::CachedAttention": (5, 6),
    "com.microsoft::MultiHeadAttention": (4, 5),
    "com.microsoft::DecoderMaskedMultiHeadAttention": (3, 4),
    "com.microsoft::DecoderMaskedSelfAttention": (3, 5),
    QUANTIZED: (6,),
}
_POSITION_SLOTS = {
    "Cos": (0,),
    "Sin": (0,),
    "RotaryEmbedding": (1, 2, 3),
    "com.microsoft::RotaryEmbedding": (1, 2, 3),
    "com.microsoft::GroupQueryAttention": (7, 8, 9),
    "ai.graphopt::CachedAttention": (7, 8),
    QUANTIZED: (7, 8),
}


@dataclasses.dataclass(frozen=True)
class InputRoles:
    """Names of the inputs by role; None where there is none.

    Attributes:
        token_ids: What gathers rows of the largest embedding.
        attention_mask: What reaches the scores of an attention.
        position_ids: What reaches a rotation, or gathers rows of a table of positions.
        use_cache: A flag that an If reads.
        others: All other inputs.
        vocabulary: Rows of the embedding that the token ids index.
        positions_from_mask: Whether the mask also reaches a rotation or a table: positions are counted in it.
        mask_values: Whether what is in the mask is read, and not its length alone.
    """

    token_ids: str | None
    attention_mask: str | None
    position_ids: str | None
    use_cache: str | None
    others: tuple[str, ...]
    vocabulary: int | None
    positions_from_mask: bool
    mask_values: bool

    @classmethod
    def read(cls, inputs: Sequence[ir.Value], widths: Collection[int] = ()) -> InputRoles:
        """The roles of `inputs`, the caches left out; `widths` are those of the outputs, of which the logits' is the
        vocabulary."""
        rest = [v for v in inputs if v.name]
        tables = {v: rows for v in rest if (rows := _table_rows(v))}
        tokens = max(
            tables,
            key=lambda v: (not _named(v, "pos", "type", "segment"), tables[v] in widths, tables[v]),
            default=None,
        )
        if tokens is not None and _named(tokens, "pos", "type", "segment"):
            tokens = None  # a model that is fed with embeddings
        rest = [v for v in rest if v is not tokens]
        flag = next((v for v in rest if v.dtype == ir.DataType.BOOL and _only_conditions(v)), None)
        rest = [v for v in rest if v is not flag and v.dtype is not None]
        reached = {v: _reached(v) for v in rest}
        masks = [v for v in rest if "mask" in reached[v]]
        positions = [v for v in rest if "position" in reached[v] and _whole(v)]
        # A mask of which positions are counted reaches both, as do positions of which a mask is made.
        mask = _choose(masks, positions, "mask", same_length=False, tokens=tokens)
        position = _choose([v for v in positions if v is not mask], [], "pos", same_length=True, tokens=tokens)
        # What an optimizer has made superfluous stays an input: of a mask the length may still be read, or nothing.
        left = [v for v in rest if v not in (mask, position) and not reached[v] and _plain(v)]
        if mask is None:
            lengths = [v for v in left if "mask" in _reached(v, shapes=True) and not _named(v, "pos")]
            mask = next(iter(lengths or [v for v in left if _named(v, "mask")]), None)
        if position is None:
            position = next((v for v in left if v is not mask and _named(v, "pos")), None)
        roles = [tokens, mask, position, flag]
        token_name, mask_name, position_name, flag_name = (None if v is None else v.name for v in roles)
        return cls(
            token_name,
            mask_name,
            position_name,
            flag_name,
            others=tuple(v.name or "" for v in inputs if v not in roles),
            vocabulary=None if tokens is None else tables[tokens],
            positions_from_mask=mask is not None and "position" in reached[mask],
            mask_values=mask is not None and bool(reached[mask]),
        )


def _choose(
    candidates: list[ir.Value], ambiguous: list[ir.Value], name: str, *, same_length: bool, tokens: ir.Value | None
) -> ir.Value | None:
    def rank(value: ir.Value) -> tuple[bool, bool, bool]:
        equal = tokens is not None and tokens.shape is not None and value.shape == tokens.shape
        return _named(value, name), value not in ambiguous, equal == same_length

    chosen = max(candidates, key=rank, default=None)
    if chosen is None or not (name == "mask" and _named(chosen, "pos")):
        return chosen
    return None  # the positions, of which the causal mask is made


def _named(value: ir.Value, *parts: str) -> bool:
    return any(re.search(part, value.name or "", re.IGNORECASE) for part in parts)


def _plain(value: ir.Value) -> bool:
    whole = _whole(value) or value.dtype == ir.DataType.BOOL
    return whole and (value.shape is None or len(value.shape) == 2)


def _whole(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_integer()


def _table_rows(value: ir.Value) -> int:
    """Rows of the largest constant table that `value` gathers from as it is; 0 where there is none."""
    if not _whole(value):
        return 0
    pending, seen, rows = deque([value]), {value}, 0
    while pending and len(seen) <= _FURTHEST:
        for node, slot in pending.popleft().uses():
            if node.op_type in ("Gather", "GatherBlockQuantized") and slot == 1:
                # A row of integers may be cut into its blocks.
                rows = max(rows, _rows(node.inputs[0], 3 if node.op_type == "GatherBlockQuantized" else 2))
            elif node.op_type in _INDEX_MOVES and slot == 0 and node.outputs[0] not in seen:
                seen.add(node.outputs[0])
                pending.append(node.outputs[0])
    return rows


def _rows(table: ir.Value | None, rank: int) -> int:
    """Rows of a constant of 2 to `rank` dimensions, which may be stored transposed (as the head's weight); else 0."""
    axis = 0
    for _ in range(4):
        weight = stored_weight(table)
        if weight is not None:
            sizes = weight.shape
            size = sizes[axis] if sizes is not None and 2 <= len(sizes) <= rank else 0
            return size if isinstance(size, int) else 0
        node = table.producer() if table is not None else None
        if node is not None and node.op_type == "Reshape":  # of integers that a head has in blocks
            target = constant_array(node.inputs[1])
            return max(0, int(target[0])) if target is not None and 2 <= target.size <= rank else 0
        if node is None or node.op_type not in ("Transpose", "Cast", "Identity"):
            return 0
        axis ^= node.op_type == "Transpose"
        table = node.inputs[0]
    return 0


def _only_conditions(value: ir.Value) -> bool:
    pending, conditions = deque([value]), 0
    for _ in range(16):
        if not pending:
            break
        for node, _slot in pending.popleft().uses():
            if node.op_type == "If":
                conditions += 1
            elif node.op_type in ("Squeeze", "Reshape", "Identity", "Not"):
                pending.append(node.outputs[0])
            else:
                return False
    return conditions > 0


def _reached(value: ir.Value, shapes: bool = False) -> set[str]:
    """ "mask" where `value` reaches scores, or the mask of an attention; "position" where a rotation or a table.

    With `shapes` also where only its shape does.
    """
    stops = _STOPS - ({"Shape"} if shapes else set())
    pending, seen, found = deque([value]), {value}, set()
    while pending and len(seen) <= _FURTHEST:
        for node, slot in pending.popleft().uses():
            name = qualified(node)
            if slot in _POSITION_SLOTS.get(name, ()):
                found.add("position")
            elif slot in _MASK_SLOTS.get(name, ()) or name == "Softmax":
                found.add("mask")
            elif node.op_type == "Gather" and slot == 1:
                found.add("position")
            elif name not in FUSED and node.op_type not in stops and not _product(node) and not _chooses_a_row(node):
                for output in node.outputs:
                    if output not in seen:
                        seen.add(output)
                        pending.append(output)
    return found


def _chooses_a_row(node: ir.Node) -> bool:
    """Whether a row of the batch is picked by this, such as the longest one, and nothing else."""
    axis = node.attributes.get("axis")
    return node.op_type == "ArgMax" and (axis is None or (not axis.is_ref() and axis.as_int() == 0))


def _product(node: ir.Node) -> bool:
    """Whether a matrix product mixes this with activations: further on everything depends on everything."""
    return node.op_type in ("MatMul", "Gemm", "Einsum", "Conv", "FusedMatMul", "MatMulNBits") and not any(
        stored_weight(v) is not None for v in node.inputs
    )
