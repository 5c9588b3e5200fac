"""An `Attention` over a key/value cache, with what is around it in the layout of the projections."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

import numpy as np
import onnx_ir as ir

from graphopt.analysis.algebra import attribute_int, is_op, producer
from graphopt.analysis.dims import Dim
from graphopt.analysis.shapes import Shape, ShapeFacts
from graphopt.graph.cache_flow import qualified
from graphopt.graph.constants import is_constant
from graphopt.graph.edits import Editor
from graphopt.passes.fold.layers import Layer, layer_of, sole_reader

TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
_SWAPPED = [0, 2, 1, 3]
_CACHE_RANK = 4
_FURTHEST = 24
"""Nodes between a cache of features and the keys that are rebuilt from it, at most."""
_REBUILDING = ("Add", "Cast", "Concat", "Gather", "MatMul", "Mul", "Reshape", "RotaryEmbedding", "Slice", "Squeeze",
               "Transpose")  # fmt: skip
"""Operators that rebuild keys and values."""


class NotTaken(Exception):
    """Raised where a site can't be written as the operator; the message is the reason, as a phrase."""


@dataclasses.dataclass
class Operand:
    """Queries, keys or values.

    Attributes:
        value: What they are made of, before the rotation.
        layout: Its axes: "tokens" [B, S, H·D], "split" [B, S, H, D] or "heads" [B, H, S, D].
        heads: Their number H.
        rotation: The RotaryEmbedding that they go through, or None.
        between: The values from `value` to the attention, `value` included.
    """

    value: ir.Value
    layout: Literal["tokens", "split", "heads"]
    heads: int
    rotation: ir.Node | None
    between: list[ir.Value]


@dataclasses.dataclass
class CachedSite:
    """An attention over a cache.

    Attributes:
        node: The Attention.
        q: Queries.
        k: New keys.
        v: New values.
        mask: Its mask, or None.
        past_key: Cached keys [B, H, P, D].
        past_value: Cached values.
        causal: Whether it is causal by attribute.
        scale: Factor of the scores; None: 1/√D.
        softcap: Cap of the scores, 0 for none.
        depth: D.
        batch: B.
        tokens: S.
        total: P + S.
        joined: Whether operands and result are [B, S, H·D].
        shared: Keys and values of past and new tokens, the present ones of an earlier attention, whose past is
            `past_key` and `past_value` then; None where the attention has a cache of its own.
    """

    node: ir.Node
    q: Operand
    k: Operand
    v: Operand
    mask: ir.Value | None
    past_key: ir.Value
    past_value: ir.Value
    causal: bool
    scale: float | None
    softcap: float
    depth: int
    batch: Dim
    tokens: Dim
    total: Dim
    joined: bool
    shared: tuple[ir.Value, ir.Value] | None = None

    @property
    def heads(self) -> int:
        """Heads of the queries."""
        return self.q.heads

    @property
    def kv_heads(self) -> int:
        """Heads of the keys and values."""
        return self.k.heads

    @property
    def rotation(self) -> ir.Node | None:
        """The rotation of the queries, where that of the keys is the same one."""
        if self.shared is not None:
            return self.q.rotation
        a, b = self.q.rotation, self.k.rotation
        if a is None or b is None or list(a.inputs[1:]) != list(b.inputs[1:]):
            return None
        names = ("interleaved", "rotary_embedding_dim")
        return a if all(attribute_int(a, n, 0) == attribute_int(b, n, 0) is not None for n in names) else None


def read(node: ir.Node, facts: ShapeFacts) -> CachedSite | None:
    """The site at an `Attention`; None where it has no cache.

    Raises:
        NotTaken: It has one, and can't be what the operator computes.
    """
    inputs = [*node.inputs, *[None] * (6 - len(node.inputs))]
    q, k, v, mask, past_key, past_value = inputs[:6]
    if q is None or k is None or v is None:
        return None
    shared = shared_cache(k, v) if past_key is None and past_value is None else None
    if shared is not None:
        past_key, past_value = shared
    if past_key is None and past_value is None and _from_features(k) and _from_features(v):
        raise NotTaken("its keys and values are rebuilt from features, and the operator caches them as they are")
    if past_key is None or past_value is None:
        return None
    if any(attribute.is_ref() for attribute in node.attributes.values()):
        raise NotTaken("an attribute is set by the caller of its function: inline functions first")
    if len(node.inputs) > 6 and node.inputs[6] is not None:
        raise NotTaken("it reads the lengths of its keys from an input")
    if len(node.outputs) > 3 and (node.outputs[3].uses() or node.outputs[3].is_graph_output()):
        raise NotTaken("its scores are read")
    dtype = facts.dtype(q)
    if dtype not in TYPES:
        raise NotTaken(f"it computes in {'an unknown type' if dtype is None else dtype.name}")
    precision = attribute_int(node, "softmax_precision", 0)
    if precision not in (0, ir.DataType.FLOAT.value, dtype.value):
        raise NotTaken("its softmax has a type of its own")
    cache, values = facts.shape(past_key), facts.shape(past_value)
    shape, new, new_values = facts.shape(q), facts.shape(k), facts.shape(v)
    if cache is None or values is None or shape is None or new is None or len(cache) != 4 or len(values) != 4:
        raise NotTaken("the ranks of its operands aren't certain")
    # What is put behind a cache that doesn't declare its sizes has them.
    kv_heads = cache[1].value or (new[1].value if len(new) == 4 else None)
    depth = cache[3].value or (new[3].value if len(new) == 4 else None)
    value_depth = values[3].value or (new_values[3].value if new_values is not None and len(new_values) == 4 else None)
    if kv_heads is None or depth is None or value_depth is None:
        raise NotTaken("heads or depth of its cache aren't certain")
    if depth != value_depth or depth % 8:
        raise NotTaken(f"keys {depth} and values {value_depth} deep: the operator takes equal multiples of 8")
    joined = len(shape) == 3
    heads = attribute_int(node, "q_num_heads", 0) if joined else shape[1].value
    if not heads or heads % kv_heads:
        raise NotTaken("the number of heads isn't certain")
    batch, tokens = shape[0], shape[1 if joined else 2]
    if shared is None and (new[0] != batch or new[1 if joined else 2] != tokens):
        raise NotTaken("it isn't certain that there are as many new keys as queries")
    rows = (batch, tokens)
    new_k, new_v = (
        _operand(value, kv_heads, depth, rows, facts)
        if shared is None
        else Operand(value, "heads", kv_heads, None, [value])
        for value in (k, v)
    )
    return CachedSite(
        node,
        _operand(q, heads, depth, rows, facts),
        new_k,
        new_v,
        mask,
        past_key,
        past_value,
        bool(attribute_int(node, "is_causal", 0)),
        node.attributes.get_float("scale"),
        node.attributes.get_float("softcap") or 0.0,
        depth,
        batch,
        tokens,
        cache[2] + tokens,
        joined,
        None if shared is None else (k, v),
    )


_PASTS = {"Attention": 4, "com.microsoft::GroupQueryAttention": 3, "ai.graphopt::CachedAttention": 3}
"""Operators that give out past and new keys and values as they are, with the place of the past keys."""


def shared_cache(keys: ir.Value, values: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """Past keys and values of the earlier attention whose present ones `keys` and `values` are; None where they aren't
    those of one."""
    node = keys.producer()
    place = None if node is None else _PASTS.get(qualified(node))
    if node is None or place is None or values.producer() is not node or len(node.inputs) < place + 2:
        return None
    past_key, past_value = node.inputs[place : place + 2]
    if keys.index() != 1 or values.index() != 2 or past_key is None or past_value is None:
        return None
    return past_key, past_value


def _from_features(value: ir.Value) -> bool:
    """Whether keys or values are made of what is cached by products with constants and tables, as `low-rank-kv`,
    `predict-kv` and `couple-kv` write them."""
    current: ir.Value | None = value
    rebuilt = joined = False
    for _ in range(_FURTHEST):
        node = None if current is None else current.producer()
        if node is None or not is_op(node, *_REBUILDING):
            break
        table = node.op_type == "Gather" and is_constant(node.inputs[0])
        rebuilt |= table or (node.op_type == "MatMul" and is_constant(node.inputs[1]))
        joined |= node.op_type == "Concat"
        # What is added to a prediction stands behind it.
        residual = node.op_type == "Add" and rebuilt and not is_constant(node.inputs[1])
        current = node.inputs[1 if table or residual else 0]
    if current is None or not current.is_graph_input() or current.shape is None:
        return False
    return rebuilt and joined and len(current.shape) == _CACHE_RANK


def _operand(value: ir.Value, heads: int, depth: int, rows: tuple[Dim, Dim], facts: ShapeFacts) -> Operand:
    between = [value]
    rotation = producer(value, "RotaryEmbedding")
    if rotation is not None and not any(a.is_ref() for a in rotation.attributes.values()):
        source = rotation.inputs[0]
        assert source is not None
        if len(facts.shape(source) or ()) == len(facts.shape(value) or ()):
            value = source
            between.append(value)
    else:
        rotation = None
    if len(facts.shape(value) or ()) == 3:
        return Operand(value, "tokens", heads, rotation, between)
    transpose = producer(value, "Transpose")
    if transpose is None or not swaps(transpose):
        return Operand(value, "heads", heads, rotation, between)
    split = transpose.inputs[0]
    assert split is not None
    between.append(split)
    reshape = producer(split, "Reshape")
    source = None if reshape is None else reshape.inputs[0]
    if source is None or not is_joined(facts.shape(source), rows, heads * depth):
        return Operand(split, "split", heads, rotation, between)
    between.append(source)
    return Operand(source, "tokens", heads, rotation, between)


def swaps(transpose: ir.Node) -> bool:
    """Whether a Transpose exchanges heads and tokens."""
    perm = transpose.attributes.get("perm")
    return perm is not None and not perm.is_ref() and list(perm.as_ints()) == _SWAPPED


def is_joined(shape: Shape | None, rows: tuple[Dim, Dim], width: int) -> bool:
    """Whether a shape is [batch, tokens, heads · depth]."""
    return shape is not None and len(shape) == 3 and tuple(shape[:2]) == rows and shape[2] == width


def as_tokens(operand: Operand, depth: int, edit: Editor) -> ir.Value:
    """An operand, before its rotation, as [batch, tokens, heads · depth]; written at the editor's site."""
    value = operand.value
    if operand.layout == "heads":
        value = edit.op("Transpose", [value], {"perm": _SWAPPED})
    if operand.layout != "tokens":
        value = edit.op("Reshape", [value, edit.constant(np.array([0, 0, operand.heads * depth]), "joined")])
    return value


def whole_mask(model: ir.Model, site: CachedSite, facts: ShapeFacts) -> ir.Value | None:
    """An input [B, past and new tokens], whose length tells how many tokens there are; None: there is none."""
    for value in model.graph.inputs:
        shape = facts.shape(value)
        if shape is not None and tuple(shape) == (site.batch, site.total) and not value.is_initializer():
            return value
    return None


def token_outputs(result: ir.Value, site: CachedSite, facts: ShapeFacts) -> Iterator[ir.Value]:
    """The values that hold `result`, [B, H, S, D], as [B, S, H·D]."""
    found = []
    for transpose in {user: None for user, _ in result.uses() if is_op(user, "Transpose")}:
        if not swaps(transpose) or transpose.graph is not site.node.graph:
            continue
        for reshape in {user: None for user, _ in transpose.outputs[0].uses() if is_op(user, "Reshape")}:
            joined = reshape.outputs[0]
            same = reshape.graph is site.node.graph and reshape.inputs[0] is transpose.outputs[0]
            if same and is_joined(facts.shape(joined), (site.batch, site.tokens), site.heads * site.depth):
                found.append(joined)
    yield from found


def projection(operand: Operand) -> Layer | None:
    """The product with a constant weight that an operand is, where nothing else needs it or its weight."""
    if operand.layout != "tokens" or any(sole_reader(value) is not None for value in operand.between):
        return None
    node = operand.value.producer()
    layer = layer_of(node) if node is not None else ""
    if not isinstance(layer, Layer) or layer.node.op_type != "MatMul" or isinstance(layer.bias(), str):
        return None
    weight = layer.node.inputs[1]
    while weight is not None:
        if len(weight.uses()) != 1 or weight.is_graph_output():
            return None
        transpose = producer(weight, "Transpose")
        weight = transpose.inputs[0] if transpose is not None else None
    bias = layer.bias()
    assert not isinstance(bias, str)
    return layer if bias.ndim == 1 else None
