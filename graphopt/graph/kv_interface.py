"""The interface of a decoder, read off its graph: tokens, mask, positions, logits, and the key/value cache.

A cache input is one that an attention reads, after what is new was joined to it; its output is where the joined rows
leave the graph. Both are found by dataflow, past → Concat, TensorScatter or an attention operator (also inside an If) →
present, so that the names of an exporter don't matter. Names decide only where dataflow leaves two readings.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import onnx_ir as ir

from graphopt.errors import ModelError
from graphopt.graph.cache_flow import FUSED, IN_PLACE, QUANTIZED, CacheFlow, Join, Part, qualified
from graphopt.graph.constants import is_constant, scalar
from graphopt.graph.input_roles import InputRoles

_LAYOUTS = {(4, 2): "BHSD", (4, 1): "BSHD", (4, 3): "BHDS", (5, 3): "2BHSD"}
"""Layout by rank and axis of length: batch, heads, sequence, dimension of a head (stacked: keys and values first)."""
_QUANTIZED_LAYOUTS: dict[Part, str] = {"codes": "BCHN", "scales": "BCHN", "recent": "BH2ND"}
"""Those of a quantized cache: C blocks of tokens, N of a fixed size."""
_FEW, _MANY = 1024, 5120
"""Lengths of a cache, between which its growth a token is told."""
_ORDER: tuple[Part, ...] = ("key", "value", "both", "codes", "scales", "recent")


@dataclasses.dataclass(frozen=True)
class CachePair:
    """One cache tensor of one layer.

    Attributes:
        layer: Number of the layer, in the order in which the attentions run.
        part: "key", "value", or "both" in one tensor; of a quantized cache "codes", "scales" and "recent".
        past: Name of the input.
        present: Name of the output that takes its place in the next step; None: the cache stays as it is.
        axis: Axis of length; None where it can't be told, or where the length is fixed ("recent").
        layout: "BHSD", "BSHD", "BHDS", "2BHSD"; "BCHN" and "BH2ND" of a quantized cache; "" for any other.
        dtype: The element type, as in "FLOAT16".
        shape: Sizes of the input; names for dynamic ones, None for those without a name.
        heads: KV heads, None where neither the declared shapes nor the operator tell.
        head_size: Elements of one head, None where neither the declared shapes nor the operator tell.
        operator: What joins past and new: "Concat", "GroupQueryAttention", ...; "" where nothing is joined.
        node: Name of that node.
        in_place: Whether past and present may be one buffer that is longer than what is in it.
        grows: Whether the present is longer than the past by what is new.
        windowed: Whether the present is cut to the last rows of a window. It may stand beside another cache of the same
            part, which holds features of all tokens (low-rank-kv).
        cross: Whether nothing is joined: keys or values of another sequence, such as an encoder's.
        block_size: Tokens for which there is one place along `axis`.
        beside: Tokens that the cache has room for besides.
        readers: Operators of later layers that read the present, and have no cache of their own.
    """

    layer: int
    part: Part
    past: str
    present: str | None
    axis: int | None
    layout: str
    dtype: str
    shape: tuple[int | str | None, ...]
    heads: int | None
    head_size: int | None
    operator: str
    node: str
    in_place: bool
    grows: bool
    windowed: bool
    cross: bool
    block_size: int = 1
    beside: int = 0
    readers: tuple[str, ...] = ()

    def places(self, tokens: int) -> int:
        """Places along `axis` of a cache with room for `tokens` tokens."""
        return -(-max(tokens - self.beside, 0) // self.block_size)

    def sizes_at(self, tokens: int, batch: int = 1) -> list[int]:
        """The shape of a cache with room for so many tokens a row.

        Raises:
            ModelError: Its sizes can't be told.
        """
        known = {"B": batch, "2": 2, "H": self.heads, "S": tokens, "D": self.head_size, "C": self.places(tokens)}
        sizes = [known.get(letter, size) for letter, size in zip(self.layout, self.shape, strict=False)]
        if not sizes or not all(isinstance(size, int) for size in sizes):
            raise ModelError(
                f"The sizes of an empty cache {self.past!r} can't be told; declare its KV heads and head size in the "
                "file."
            )
        return [size for size in sizes if isinstance(size, int)]


@dataclasses.dataclass(frozen=True)
class KVInterface:
    """The inputs and outputs of a decoder by what they are; names, or None where there is no such one.

    Attributes:
        token_ids: Rows of an embedding are gathered with it.
        attention_mask: 1 for tokens that count, over past and new.
        position_ids: Position of each token.
        positions_from_mask: Whether the graph counts positions in the mask.
        mask_values: Whether the graph reads what is in the mask; else it takes its length, or nothing, from it.
        logits: The output over the vocabulary.
        vocabulary: Rows of the embedding, None where there is no token_ids.
        use_cache: A flag that chooses between a branch with and one without a past.
        pairs: The cache, by layer, keys before values; without those of another sequence.
        cross: Cache inputs of another sequence (an encoder's): read as they are.
        others: Inputs that are none of these.
        problems: Why a cache, or a part of it, wasn't understood.
    """

    token_ids: str | None
    attention_mask: str | None
    position_ids: str | None
    positions_from_mask: bool
    mask_values: bool
    logits: str | None
    vocabulary: int | None
    use_cache: str | None
    pairs: tuple[CachePair, ...]
    cross: tuple[CachePair, ...]
    others: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def layers(self) -> int:
        """The number of layers with a cache."""
        return len({pair.layer for pair in self.pairs})

    @property
    def layout(self) -> str:
        """The layout that all pairs have, or ""."""
        return _only(pair.layout for pair in self.pairs) or ""

    @property
    def shared_buffer(self) -> bool:
        """Whether past and present of every layer may be one buffer."""
        return bool(self.pairs) and all(pair.in_place for pair in self.pairs)

    def bytes_at(self, tokens: int) -> int:
        """Bytes of the caches of one row with room for so many tokens, without those of a window, which don't grow.

        Raises:
            ModelError: Their sizes can't be told.
        """
        pairs = [pair for pair in self.pairs if not pair.windowed]
        return sum(math.prod(pair.sizes_at(tokens)) * int(ir.DataType[pair.dtype].itemsize) for pair in pairs)

    @property
    def bytes_a_token(self) -> float | None:
        """Bytes by which the caches of one row grow a token, on the whole; None where their sizes can't be told."""
        try:
            return (self.bytes_at(_MANY) - self.bytes_at(_FEW)) / (_MANY - _FEW)
        except ModelError:
            return None

    @property
    def encoder_decoder(self) -> bool:
        """Whether keys or values come from another sequence."""
        return bool(self.cross) or any("encoder" in name.lower() for name in self.others)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types, with what the pairs have in common told once."""
        data = dataclasses.asdict(self)
        data |= {key: list(data[key]) for key in ("pairs", "cross", "others", "problems")}
        return data | {
            "layers": self.layers,
            "layout": self.layout,
            "dtype": _only(pair.dtype for pair in self.pairs),
            "heads": _only(pair.heads for pair in self.pairs),
            "head_size": _only(pair.head_size for pair in self.pairs if "D" in pair.layout),
            "operators": sorted({pair.operator for pair in self.pairs}),
            "shared_buffer": self.shared_buffer,
            "encoder_decoder": self.encoder_decoder,
        }


def kv_interface(model: ir.Model) -> KVInterface | None:
    """The interface of the decoder `model`; None where no input is a key/value cache."""
    flow = CacheFlow(model)
    found = [(value, join) for value in _candidates(model) if (join := flow.join(value)) is not None]
    if not any(join.node is not None for _, join in found):
        return None
    layers = _layers(flow, [join for _, join in found])
    pairs = sorted((_pair(value, join, layers) for value, join in found), key=lambda p: (p.layer, _ORDER.index(p.part)))
    own = _counted([pair for pair in pairs if not pair.cross])
    cross = tuple(pair for pair in pairs if pair.cross)
    taken = {pair.past for pair in pairs}
    rest = [v for v in model.graph.inputs if not v.is_initializer() and v.name not in taken]
    presents = {pair.present for pair in pairs}
    widths = {_width(v) for v in model.graph.outputs if v.name not in presents}
    roles = InputRoles.read(rest, [width for width in widths if width is not None])
    return KVInterface(
        token_ids=roles.token_ids,
        attention_mask=roles.attention_mask,
        position_ids=roles.position_ids,
        positions_from_mask=roles.positions_from_mask,
        mask_values=roles.mask_values,
        logits=_logits(model, presents, roles.vocabulary),
        vocabulary=roles.vocabulary,
        use_cache=roles.use_cache,
        pairs=own,
        cross=cross,
        others=roles.others,
        problems=tuple(_problems(own)),
    )


def _candidates(model: ir.Model) -> list[ir.Value]:
    """The inputs that may be a cache: of rank 3 to 5, and no whole numbers but quantised ones."""
    integers = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL, ir.DataType.STRING)
    return [
        value
        for value in model.graph.inputs
        if not value.is_initializer()
        and value.name
        and value.dtype is not None
        and value.dtype not in integers
        and (value.shape is None or 3 <= len(value.shape) <= 5)
    ]


def _layers(flow: CacheFlow, joins: list[Join]) -> dict[ir.Node, int]:
    """The number of each attention that reads a cache of its own, in the order of the nodes; then of the others."""
    own = [join.attention for join in joins if join.node is not None and join.attention is not None]
    other = [join.attention for join in joins if join.node is None and join.attention is not None]
    numbers: dict[ir.Node, int] = {}
    # What is in one If stands at one place; there the order of the inputs holds, as `sorted` is stable.
    for group in (own, other):
        for index, node in enumerate(sorted(dict.fromkeys(group), key=lambda n: flow.order.get(n, 0))):
            numbers.setdefault(node, index)
    return numbers


def _pair(value: ir.Value, join: Join, layers: dict[ir.Node, int]) -> CachePair:
    shape = tuple(
        size if isinstance(size, int) else (None if size.value is None else str(size.value))
        for size in value.shape or ()
    )
    operator = qualified(join.node) if join.node is not None else ""
    assert join.part is not None
    layout = _QUANTIZED_LAYOUTS.get(join.part) or _LAYOUTS.get((len(shape), -1 if join.axis is None else join.axis), "")
    quantized = join.node is not None and operator == QUANTIZED
    block = (_int(join.node, "block_size") or 1) if quantized else 1
    assert value.name is not None
    return CachePair(
        layer=layers[join.attention] if join.attention is not None else 0,
        part=join.part,
        past=value.name,
        present=None if join.present is None else join.present.name,
        axis=None if join.part == "recent" else join.axis,
        layout=layout,
        dtype=value.dtype.name if value.dtype is not None else "",
        shape=shape,
        heads=_size(shape, join, layout, "H"),
        head_size=_size(shape, join, layout, "D"),
        operator=operator.split("::")[-1],
        node="" if join.node is None else join.node.name or "",
        in_place=_in_place(value, join, operator),
        grows=join.node is not None and operator not in ("TensorScatter", QUANTIZED),
        windowed=join.windowed,
        cross=join.node is None,
        block_size=block,
        beside=(_int(join.node, "window") or 0) + block - 1 if quantized else 0,
        readers=tuple(
            sorted({n.op_type for n, _ in join.joined.uses() if n is not join.node and qualified(n) in FUSED})
        ),
    )


def _size(shape: tuple[int | str | None, ...], join: Join, layout: str, letter: str) -> int | None:
    if letter not in layout:
        return None
    axis = layout.index(letter)
    present = join.present.shape if join.present is not None else None
    for sizes in (shape, present if present is not None and len(present) == len(shape) else ()):
        if len(sizes) > axis and isinstance(size := sizes[axis], int) and size > 0:
            return size
    if join.node is None or qualified(join.node) not in IN_PLACE:
        return None
    heads, kv_heads = (_int(join.node, name) for name in ("num_heads", "kv_num_heads"))
    if letter == "H":
        return kv_heads
    keys = join.node.inputs[1] if len(join.node.inputs) > 1 else None
    # Keys that stand beside the queries are left out, or an empty constant takes their place.
    packed = keys is None or (is_constant(keys) and keys.shape is not None and 0 in keys.shape)
    width = _width(join.node.inputs[0])
    return None if not heads or not kv_heads or not width else width // (heads + 2 * kv_heads * packed)


def _int(node: ir.Node | None, name: str) -> int | None:
    attribute = node.attributes.get(name) if node is not None else None
    return None if attribute is None or attribute.is_ref() else attribute.as_int()


def _width(value: ir.Value | None) -> int | None:
    """The last dimension of `value`: of the weight that it is a product with, or as declared."""
    for _ in range(4):
        if value is None:
            return None
        node = value.producer()
        operands = [] if node is None else [v for v in node.inputs if is_constant(v)]
        for weight in operands if node is not None and node.op_type in ("MatMul", "Add") else []:
            size = weight.shape[-1] if weight is not None and weight.shape is not None and len(weight.shape) else None
            if isinstance(size, int) and size > 1:
                return size
        declared = value.shape[-1] if value.shape is not None and len(value.shape) else None
        if isinstance(declared, int):
            return declared
        value = node.inputs[0] if node is not None and node.op_type in ("Add", "Identity", "Cast") else None
    return None


def _in_place(past: ir.Value, join: Join, operator: str) -> bool:
    """Nothing else may read what is in past or present, or how long they are: it would be told of the whole buffer."""
    if operator not in IN_PLACE or join.present is not join.joined:
        return False
    places = [node for node, _ in past.uses() if node is join.node]
    others = [node for value in (past, join.joined) for node, _ in value.uses() if node is not join.node]
    return len(places) == 1 and all(asks_for_another_axis(node, join.axis) or _counts(node, join) for node in others)


def _is_later(node: ir.Node, join: Join) -> bool:
    """Whether `node` is the attention of a later layer."""
    return node is not join.node and qualified(node) in FUSED


def _counts(node: ir.Node, join: Join) -> bool:
    """Whether `node` is the attention of a later layer that reads the joined rows, and is told how many there are."""
    if qualified(node) not in IN_PLACE:
        return False
    slots = [slot for slot, value in enumerate(node.inputs) if value is join.joined]
    return all(slot in FUSED[qualified(node)] for slot in slots)


def asks_for_another_axis(node: ir.Node, axis: int | None) -> bool:
    """Whether `node` is a Shape of a cache of which the size along `axis` isn't read, as of the batch alone."""
    if node.op_type != "Shape" or axis is None or any(a.is_ref() for a in node.attributes.values()):
        return False
    if node.outputs[0].is_graph_output():
        return False
    # A cache that is written in place has four axes.
    axes = range(4)[_int(node, "start") or 0 : _int(node, "end")]
    return axis not in axes or all(
        user.op_type == "Gather"
        and slot == 0
        and (index := scalar(user.inputs[1])) is not None
        and axes[int(index)] != axis
        for user, slot in node.outputs[0].uses()
    )


def _counted(pairs: list[CachePair]) -> tuple[CachePair, ...]:
    """The pairs with layers counted from 0 without a gap."""
    numbers = {layer: index for index, layer in enumerate(dict.fromkeys(pair.layer for pair in pairs))}
    return tuple(dataclasses.replace(pair, layer=numbers[pair.layer]) for pair in pairs)


def _problems(pairs: tuple[CachePair, ...]) -> list[str]:
    problems = [f"what {p.past!r} holds after a step is no output of the graph" for p in pairs if p.present is None]
    unknown = [p for p in pairs if p.axis is None and p.part != "recent"]
    problems += [f"the axis of length of {p.past!r} can't be told" for p in unknown]
    by_layer: dict[int, list[str]] = {}
    for pair in pairs:
        beside = pair.windowed and any((o.layer, o.part) == (pair.layer, pair.part) and not o.windowed for o in pairs)
        if not beside:  # the last tokens exact, beside a cache of all (low-rank-kv)
            by_layer.setdefault(pair.layer, []).append(pair.part)
    problems += [
        f"layer {layer} has the caches {', '.join(parts)}"
        for layer, parts in by_layer.items()
        if parts not in (["key", "value"], ["key"], ["value"], ["both"], ["codes", "scales", "recent"])
    ]
    return problems


def _logits(model: ir.Model, presents: set[str | None], vocabulary: int | None) -> str | None:
    """The output over the vocabulary."""
    others = [v for v in model.graph.outputs if v.name not in presents and v.dtype is not None]
    floats = [v for v in others if v.dtype is not None and v.dtype.is_floating_point()]
    sized = [v for v in floats if v.shape is not None and len(v.shape) in (2, 3) and v.shape[-1] == vocabulary]
    named = [v for v in floats if re.search("logits", v.name or "", re.IGNORECASE)]
    choice = named or sized or (floats if len(floats) == 1 else [])
    return choice[0].name if choice else None


def _only(values: Any) -> Any:
    """The value that all are, or None."""
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else None
