"""Attention sites: softmax(q·kᵀ · scale + mask) · v, spelled out or as one operator.

A spelled-out site is found from its Softmax: down to the product of q and k, through whatever scales, masks or caps the
scores, and up to the product with v. What q, k and v are made of is read off the shapes. Where another function makes
weights of the scores (softplus, a power of ReLU, sigmoid, a bare exponential), it is found from that in the same way.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import onnx_ir as ir

from graphopt.analysis.algebra import attribute_int, is_op, producer
from graphopt.analysis.attention_form import Bias, Keep, NotAttention, concatenated, read
from graphopt.analysis.layout import NotAView
from graphopt.analysis.shapes import ShapeFacts
from graphopt.graph.constants import is_constant, is_nothing
from graphopt.graph.edits import nodes

FUSED = {
    "Attention": (0, 1, 2),
    "com.microsoft::MultiHeadAttention": (0, 1, 2),
    "com.microsoft::GroupQueryAttention": (0, 1, 2),
    "com.microsoft::DecoderMaskedMultiHeadAttention": (0, 1, 2),
    "ai.graphopt::CachedAttention": (0, 1, 2),
    "ai.graphopt::QuantizedKVAttention": (0, 1, 2),
}
"""Operators that compute attention, with the places of q, k and v among their inputs."""

OTHERS = ("Softplus", "Relu", "Sigmoid", "Exp", "Elu", "Gelu", "LogSoftmax", "HardSigmoid")
"""Operators in place of a Softmax: each makes weights of scores, one by one but for the last division."""

_VIEWS = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Expand", "Slice", "Split")
_PLAIN = ("Cast", "Identity", "Dropout", "Where", "Mul", "QuantizeLinear", "DequantizeLinear", *_VIEWS)
_ON_SCORES = (
    *_PLAIN,
    "Add",
    "Div",
    "Sub",
    "Neg",
    "Tanh",
    "Clip",
    "Min",
    "Max",
    "Concat",
    "Gather",
    "ScatterND",
    "GatherElements",
    "Pad",
)
_ON_WEIGHTS = (*_PLAIN, "Div", "Pow", "Add", "Clip")
_PRODUCTS = ("MatMul", "Einsum")
_MAX_STEPS = 12
_MAX_WIDTH = 64


@dataclasses.dataclass(frozen=True)
class AttentionSite:
    """One attention.

    Attributes:
        node: The Softmax, or the fused operator.
        q: The queries: the left operand of the scores.
        k: The keys (transposed for the product where it is spelled out).
        v: The values.
        output: The weighted values, before the heads are merged.
        masked: Whether anything that isn't constant is added to or chosen among the scores.
        heads: The number of query heads, None where the shapes don't tell.
        head_size: Elements of one head, None where the shapes don't tell.
        operator: "Softmax", one of `OTHERS`, or the fused operator.
        kv_heads: The number of heads of keys and values, None where it isn't known.
        rotary: Whether queries or keys come from a rotation, or the operator rotates them.
        cached: Whether keys of earlier tokens come in.
        mask: What is added or chosen, where it is one value; None where there is none, or several.
    """

    node: ir.Node
    q: ir.Value
    k: ir.Value
    v: ir.Value
    output: ir.Value
    masked: bool
    heads: int | None
    head_size: int | None
    operator: str
    kv_heads: int | None = None
    rotary: bool = False
    cached: bool = False
    mask: ir.Value | None = None

    def to_dict(self) -> dict[str, Any]:
        """What `inspect` tells of it."""
        return {
            "node": self.node.name,
            "operator": self.operator,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_size": self.head_size,
            "masked": self.masked,
            "rotary": self.rotary,
            "cached": self.cached,
        }


def attention_sites(model: ir.Model, facts: ShapeFacts) -> list[AttentionSite]:
    """The attention sites of all graphs, in the order of their nodes."""
    sites = []
    for node in nodes(model):
        name = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"
        spelled_out = name == "Softmax" or name in OTHERS
        site = _spelled_out(node, facts) if spelled_out else _fused(node, FUSED.get(name), facts)
        if site is not None:
            sites.append(site)
    return sites


def _fused(node: ir.Node, places: tuple[int, ...] | None, facts: ShapeFacts) -> AttentionSite | None:
    if places is None or len(node.inputs) < 3 or any(node.inputs[i] is None for i in places):
        return None
    q, k, v = (node.inputs[i] for i in places)
    assert q is not None
    assert k is not None
    assert v is not None
    if is_nothing(k):  # queries, keys and values side by side
        return None
    shape = facts.shape(q)
    heads = attribute_int(node, "q_num_heads", 0) or attribute_int(node, "num_heads", 0) or None
    size = None
    if shape is not None and len(shape) == 4:
        heads, size = shape[1].value, shape[3].value
    elif shape is not None and heads and shape[-1].value is not None:
        size = shape[-1].value // heads
    counts = node.op_type in ("GroupQueryAttention", "CachedAttention", "QuantizedKVAttention")
    masked = counts or (len(node.inputs) > 3 and node.inputs[3] is not None)
    kv_heads = attribute_int(node, "kv_num_heads", 0) or None
    keys = facts.shape(k)
    if kv_heads is None and keys is not None and len(keys) == 4:
        kv_heads = keys[1].value
    past = 3 if counts else 4 if node.op_type == "Attention" else None
    cached = past is not None and len(node.inputs) > past and node.inputs[past] is not None
    rotary = any(producer(v, "RotaryEmbedding") is not None for v in (q, k)) or bool(
        attribute_int(node, "do_rotary", 0)
    )
    if node.op_type == "CachedAttention":
        rotary = not is_nothing(node.inputs[7])
    mask = node.inputs[3] if masked and node.op_type == "Attention" else None
    return AttentionSite(
        node, q, k, v, node.outputs[0], masked, heads, size, node.op_type, kv_heads, rotary, cached, mask
    )


def _spelled_out(node: ir.Node, facts: ShapeFacts) -> AttentionSite | None:
    scores = node.inputs[0]
    found = None if scores is None else _scores(scores, facts)
    if found is None:
        return None
    product, masked = found
    weighted = _weighted(node, facts)
    if weighted is None:
        return None
    last, place = weighted
    q, k = product.inputs[:2]
    v = last.inputs[1 - place]
    assert q is not None
    assert k is not None
    assert v is not None
    shape = facts.shape(q)
    heads = shape[-3].value if shape is not None and len(shape) >= 4 else None
    size = shape[-1].value if shape is not None and len(shape) else None
    site = AttentionSite(node, q, k, v, last.outputs[0], masked, heads, size, node.op_type)
    try:
        form = read(node, facts) if node.op_type == "Softmax" else None
    except (NotAttention, NotAView):
        form = None
    if form is None:
        return site
    masks = [term.value if isinstance(term, Bias) else term.condition for term in form.scores.terms
             if isinstance(term, Bias | Keep)]  # fmt: skip
    return dataclasses.replace(
        site,
        heads=form.heads,
        head_size=form.head_size,
        kv_heads=form.kv_heads,
        cached=any(concatenated(stage.value) is not None for stage in form.k.stages),
        mask=masks[0] if len(masks) == 1 else None,
    )


def of_another_kind(node: ir.Node, facts: ShapeFacts) -> bool:
    """Whether a node is what an attention has in place of a Softmax, for which there is no operator."""
    return is_op(node, *OTHERS) and _spelled_out(node, facts) is not None


def _is_product(node: ir.Node) -> bool:
    """Whether `node` multiplies two matrices neither of which is a weight."""
    if not is_op(node, *_PRODUCTS) and node.op_type != "FusedMatMul":
        return False
    return len(node.inputs) == 2 and not any(v is None or _is_weight(v) for v in node.inputs)


def _is_weight(value: ir.Value) -> bool:
    """Whether `value` is constant, or chosen from what is constant, as the weights of an expert are."""
    current: ir.Value | None = value
    for _ in range(_MAX_STEPS):
        if current is None or is_constant(current):
            return current is not None
        node = current.producer()
        if node is None or not is_op(node, "Gather", "GatherND", "Cast", "Identity", *_VIEWS):
            return False
        current = node.inputs[0]
    return False


def _mixes_heads(node: ir.Node, facts: ShapeFacts) -> bool:
    """Whether `node` maps the heads of scores or weights, in their last axis, linearly to as many."""
    if not is_op(node, "MatMul") or not is_constant(node.inputs[1]):
        return False
    source, weight = node.inputs[:2]
    assert source is not None
    assert weight is not None
    shape, sizes = facts.shape(source), facts.shape(weight)
    return shape is not None and len(shape) == 4 and sizes is not None and len(sizes) == 2 and sizes[0] == sizes[1]


def _scores(value: ir.Value, facts: ShapeFacts) -> tuple[ir.Node, bool] | None:
    """The product of q and k below the scores, and whether something else enters on the way."""
    level, masked = [value], False
    seen: set[ir.Value] = set()
    for _ in range(_MAX_STEPS):
        found: list[ir.Value] = []
        for current in level:
            node = current.producer()
            if node is None:
                continue
            if _is_product(node):
                return node, masked
            if is_op(node, *_ON_SCORES) or _mixes_heads(node, facts):
                # A view's or Gather's other inputs are numbers of places.
                inputs = node.inputs[:1] if is_op(node, *_VIEWS, "Gather", "GatherElements", "Pad") else node.inputs
                operands = [v for v in inputs if v is not None and not is_constant(v) and v not in seen]
                masked |= is_op(node, "Add", "Sub", "Where") and len(operands) > 1
                seen.update(operands)
                found.extend(operands)
        if not found or len(found) > _MAX_WIDTH:
            return None
        level = found
    return None


def _weighted(node: ir.Node, facts: ShapeFacts) -> tuple[ir.Node, int] | None:
    """The product of the weights with v, and the index of its input that holds the weights."""
    level = [node.outputs[0]]
    # Behind anything but a Softmax the weights are divided by their sum, or raised to a power.
    passing = _ON_WEIGHTS if node.op_type in OTHERS else _PLAIN
    seen: set[ir.Value] = set()
    for _ in range(_MAX_STEPS):
        found: list[ir.Value] = []
        for current in level:
            for user, index in current.uses():
                if _is_product(user):
                    return user, index
                if node.op_type == "LogSoftmax" and is_op(user, "Exp"):
                    found.append(user.outputs[0])
                shifted = is_op(user, "Add") and any(map(is_constant, user.inputs))
                passes = is_op(user, *passing) or shifted or _mixes_heads(user, facts)
                if passes and (index == 0 or not is_op(user, *_VIEWS)):
                    found.extend(v for v in user.outputs if v not in seen)
        if not found or len(found) > _MAX_WIDTH:
            return None
        seen.update(found)
        level = found
    return None
