"""One `Attention` of the standard, read for lowering: its operands, attributes and lengths."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analysis.algebra import attribute_int, is_op, users
from graphopt.analysis.bounds import Bounds
from graphopt.analysis.shapes import ShapeFacts
from graphopt.graph.constants import constant_array
from graphopt.passes.fold.layers import sole_reader

HEADS_LAST = (0, 2, 1, 3)
"""The order of axes between [batch, sequence, head, depth] and [batch, head, sequence, depth]; it undoes itself."""
_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
_ATTRIBUTES = frozenset(
    {"is_causal", "kv_num_heads", "q_num_heads", "qk_matmul_output_mode", "scale", "softcap", "softmax_precision"}
)
_MAX_MASK = 1 << 22


class NotLowered(Exception):
    """Why an `Attention` is left as it is."""


@dataclasses.dataclass(frozen=True)
class Site:
    """One `Attention`.

    Attributes:
        node: The operator.
        dtype: The type that it computes in.
        merged: Whether queries, keys and values come as [batch, sequence, heads · depth], and the result goes so.
        heads: Heads of the queries; None where that isn't known.
        kv_heads: Heads of the keys and values.
        depth: Elements of a head of queries and keys.
        value_depth: The same of the values.
        scale: The number that the scores are multiplied by.
        softcap: The cap, 0 for none.
        causal: Whether a query sees the past and the keys up to its own place alone.
        precision: The type of the softmax where it is another than `dtype`.
    """

    node: ir.Node
    dtype: ir.DataType
    merged: bool
    heads: int | None
    kv_heads: int | None
    depth: int | None
    value_depth: int | None
    scale: float
    softcap: float
    causal: bool
    precision: ir.DataType | None

    places: ClassVar[tuple[str, ...]] = ("q", "k", "v", "mask", "past_k", "past_v")

    def input(self, name: str) -> ir.Value | None:
        """An operand by its name in `places`."""
        index = self.places.index(name)
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    def operand(self, name: str) -> ir.Value:
        """An operand that is always there."""
        value = self.input(name)
        assert value is not None
        return value

    @property
    def width(self) -> int | None:
        """Features of the queries of all heads."""
        return None if self.heads is None or self.depth is None else self.heads * self.depth

    @property
    def groups(self) -> int | None:
        """Query heads that share one head of keys and values; None where it isn't known."""
        if self.heads is None or self.kv_heads is None:
            return None
        return self.heads // self.kv_heads

    @property
    def cached(self) -> bool:
        """Whether the keys and values of earlier tokens come in."""
        return self.input("past_k") is not None

    def output(self, index: int) -> ir.Value | None:
        """An output that is read or given out; None where nothing wants it."""
        if index >= len(self.node.outputs):
            return None
        value = self.node.outputs[index]
        return value if value.uses() or value.is_graph_output() else None


def read(node: ir.Node, facts: ShapeFacts) -> Site:
    """What `node` computes.

    Raises:
        NotLowered: It isn't known, or is something that no other form computes.
    """
    attributes = node.attributes
    if any(a.is_ref() for a in attributes.values()):
        raise NotLowered("an attribute is set by the caller of its function")
    if other := sorted(attributes.keys() - _ATTRIBUTES):
        raise NotLowered(f"it has the attribute {other[0]}")
    if len(node.inputs) > len(Site.places) and any(v is not None for v in node.inputs[len(Site.places) :]):
        raise NotLowered("it has lengths of the keys of each sequence")
    given = [node.inputs[i] if i < len(node.inputs) else None for i in range(6)]
    if any(value is None for value in given[:3]) or (given[4] is None) != (given[5] is None):
        raise NotLowered("an operand is missing")
    if len(node.outputs) > 3 and (node.outputs[3].uses() or node.outputs[3].is_graph_output()):
        raise NotLowered("its scores are read")
    q, k, v = given[:3]
    assert q is not None
    assert k is not None
    assert v is not None
    dtype = facts.dtype(q) or q.dtype
    if dtype not in _TYPES:
        raise NotLowered(f"it computes in {'an unknown type' if dtype is None else dtype.name}")
    shapes = [facts.shape(value) for value in (q, k, v)]
    ranks = {len(shape) for shape in shapes if shape is not None}
    if None in shapes or len(ranks) != 1 or not ranks <= {3, 4}:
        raise NotLowered("the ranks of its operands aren't known")
    sizes = [[dim.value for dim in shape] for shape in shapes if shape is not None]
    merged = ranks == {3}
    heads = attribute_int(node, "q_num_heads", 0) if merged else sizes[0][1]
    kv_heads = attribute_int(node, "kv_num_heads", 0) if merged else sizes[1][1]
    if merged and (not heads or not kv_heads):
        raise NotLowered("the number of its heads isn't known")
    depths = [size[-1] for size in sizes]
    if merged:
        counts = (heads, kv_heads, kv_heads)
        depths = [d // n if d is not None and n else None for d, n in zip(depths, counts, strict=True)]
    if heads is not None and kv_heads is not None and heads % kv_heads:
        raise NotLowered("the heads aren't a multiple of those of the keys")
    depth = depths[0] if depths[0] is not None else depths[1]
    scale = attributes["scale"].as_float() if "scale" in attributes else None
    if scale is None:
        if depth is None:
            raise NotLowered("the scale comes from the length of a head, which isn't known")
        scale = 1 / math.sqrt(depth)
    if not scale > 0 or not math.isfinite(scale):
        raise NotLowered(f"its scale is {scale:g}")
    softcap = attributes["softcap"].as_float() if "softcap" in attributes else 0.0
    number = attribute_int(node, "softmax_precision", 0)
    precision = ir.DataType(number) if number and number != dtype.value else None
    return Site(
        node, dtype, merged, heads or None, kv_heads or None, depth, depths[2], scale, max(softcap, 0.0),
        bool(attribute_int(node, "is_causal", 0)), precision,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Merged:
    """A site whose operands are heads split off, and whose result is merged again at once.

    Attributes:
        q: The queries as [batch, sequence, heads · depth].
        k: The keys so.
        v: The values so.
        output: The result so.
        q_rotation: The RotaryEmbedding between the heads of the queries and the operator.
        k_rotation: That of the keys.
    """

    q: ir.Value
    k: ir.Value
    v: ir.Value
    output: ir.Value
    q_rotation: ir.Node | None = None
    k_rotation: ir.Node | None = None


def merged(site: Site, facts: ShapeFacts) -> Merged | None:
    """The operands and the result before the heads are split off and after they are merged; None where there is more
    to it, or something else reads the result of the operator."""
    if site.merged:
        return Merged(site.operand("q"), site.operand("k"), site.operand("v"), site.node.outputs[0])
    q_rotation, queries = _rotated(site.operand("q"))
    k_rotation, keys = _rotated(site.operand("k"))
    sources = [_joined(value, facts) for value in (queries, keys, site.operand("v"))]
    q, k, v = sources
    if q is None or k is None or v is None:
        return None
    output = site.node.outputs[0]
    if sole_reader(output) is not None or not output.uses():
        return None
    (use,) = output.uses()
    while is_op(use.node, "Reshape", "Identity") and _keeps_shape(use.node, facts):
        output = use.node.outputs[0]
        if sole_reader(output) is not None or not output.uses():
            return None
        (use,) = output.uses()
    if _permutation(use.node) != HEADS_LAST or use.node.graph is not site.node.graph:
        return None
    exchanged = use.node.outputs[0]
    if sole_reader(exchanged) is not None or not exchanged.uses():
        return None
    (use,) = exchanged.uses()
    if not is_op(use.node, "Reshape") or use.idx != 0 or use.node.graph is not site.node.graph:
        return None
    result = use.node.outputs[0]
    if not _joins(facts, exchanged, result, use.node):
        return None
    return Merged(q, k, v, result, q_rotation, k_rotation)


def _rotated(value: ir.Value) -> tuple[ir.Node | None, ir.Value]:
    """(RotaryEmbedding, what it rotates) where nothing but the operator reads `value`, else (None, `value`)."""
    node = value.producer()
    if node is None or not is_op(node, "RotaryEmbedding") or node.inputs[0] is None or sole_reader(value) is not None:
        return None, value
    if len(value.uses()) != 1 or any(attribute.is_ref() for attribute in node.attributes.values()):
        return None, value
    return node, node.inputs[0]


def _joined(value: ir.Value, facts: ShapeFacts) -> ir.Value | None:
    """[batch, sequence, heads · depth] of which `value` is the heads."""
    node = value.producer()
    if node is None or _permutation(node) != HEADS_LAST or node.inputs[0] is None:
        return None
    apart = node.inputs[0]
    reshape = apart.producer()
    if reshape is None or not is_op(reshape, "Reshape"):
        return None
    source = reshape.inputs[0]
    return source if source is not None and _joins(facts, apart, source, None) else None


def _joins(facts: ShapeFacts, apart: ir.Value, joined: ir.Value, reshape: ir.Node | None) -> bool:
    """Whether `joined` has the shape of `apart`, [batch, sequence, head, depth], with the last two axes as one."""
    long = facts.shape(apart)
    if long is None or len(long) != 4:
        return False
    heads, depth = long[2].value, long[3].value
    if heads is None or depth is None:
        return False
    if reshape is not None:
        target = constant_array(reshape.inputs[1], 3)
        copies = target is not None and target.tolist() in ([0, 0, heads * depth], [0, 0, -1])
        if copies and attribute_int(reshape, "allowzero", 0) == 0:
            return True
    short = facts.shape(joined)
    return (
        short is not None
        and len(short) == 3
        and short[0] == long[0]
        and short[1] == long[1]
        and short[2].value == heads * depth
    )


def _keeps_shape(node: ir.Node, facts: ShapeFacts) -> bool:
    source = node.inputs[0]
    shape = None if source is None else facts.shape(source)
    return shape is not None and shape == facts.shape(node.outputs[0])


def _permutation(node: ir.Node) -> tuple[int, ...] | None:
    perm = node.attributes.get("perm")
    if not is_op(node, "Transpose") or perm is None or perm.is_ref():
        return None
    return tuple(perm.as_ints())


def source_of_transpose(value: ir.Value) -> tuple[ir.Value, tuple[int, ...]] | None:
    """(x, p) of a `value` that is Transpose(x, p) and read once."""
    node = value.producer()
    if node is None or len(users(value)) != 1 or sole_reader(value) is not None:
        return None
    perm = _permutation(node)
    source = node.inputs[0]
    return None if perm is None or source is None else (source, perm)


def may_hide_all(site: Site, facts: ShapeFacts, bounds: Bounds) -> bool:
    """Whether a query may see no key at all, so that its result is 0 and not that of a softmax.

    Where the operator is causal every query sees the first key, unless a mask hides it.
    """
    mask = site.input("mask")
    if mask is None:
        return False
    array = constant_array(mask, _MAX_MASK)
    if array is not None and array.ndim and array.size:
        seen = array if array.dtype.kind == "b" else np.asarray(array, dtype=np.float64) > -np.inf
        return not bool((seen[..., 0] if site.causal else seen.any(axis=-1)).all())
    # The bound of a boolean mask is 1, which says nothing of where it is false.
    return (facts.dtype(mask) or mask.dtype) in (ir.DataType.BOOL, None) or bounds.of(mask) is None
