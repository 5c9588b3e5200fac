"""Attention sites: softmax(q·kᵀ · scale + mask) · v, spelled out or as one operator.

A spelled-out site is found from its Softmax: down to the product of q and k, through whatever scales, masks or caps the
scores, and up to the product with v. What q, k and v are made of is read off the shapes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import onnx_ir as ir

from graphopt.analysis.algebra import attribute_int, is_op
from graphopt.analysis.shapes import ShapeFacts
from graphopt.graph.constants import is_constant
from graphopt.graph.edits import nodes

FUSED = {
    "Attention": (0, 1, 2),
    "com.microsoft::MultiHeadAttention": (0, 1, 2),
    "com.microsoft::GroupQueryAttention": (0, 1, 2),
    "com.microsoft::DecoderMaskedMultiHeadAttention": (0, 1, 2),
}
"""Operators that compute attention, with the places of q, k and v among their inputs."""

_PLAIN = ("Cast", "Identity", "Dropout", "Where", "Reshape", "Mul", "QuantizeLinear", "DequantizeLinear")
_ON_SCORES = (*_PLAIN, "Add", "Div", "Sub", "Tanh", "Clip", "Max")
_MAX_STEPS = 12


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
        operator: "Softmax" or the fused operator.
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

    def to_dict(self) -> dict[str, Any]:
        """What `inspect` tells of it."""
        return {
            "node": self.node.name,
            "operator": self.operator,
            "heads": self.heads,
            "head_size": self.head_size,
            "masked": self.masked,
        }


def attention_sites(model: ir.Model, facts: ShapeFacts) -> list[AttentionSite]:
    """The attention sites of all graphs, in the order of their nodes."""
    sites = []
    for node in nodes(model):
        name = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"
        site = _spelled_out(node, facts) if name == "Softmax" else _fused(node, FUSED.get(name), facts)
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
    shape = facts.shape(q)
    heads = attribute_int(node, "q_num_heads", 0) or attribute_int(node, "num_heads", 0) or None
    size = None
    if shape is not None and len(shape) == 4:
        heads, size = shape[1].value, shape[3].value
    elif shape is not None and heads and shape[-1].value is not None:
        size = shape[-1].value // heads
    masked = len(node.inputs) > 3 and node.inputs[3] is not None
    return AttentionSite(node, q, k, v, node.outputs[0], masked, heads, size, node.op_type)


def _spelled_out(node: ir.Node, facts: ShapeFacts) -> AttentionSite | None:
    scores = node.inputs[0]
    found = None if scores is None else _scores(scores)
    if found is None:
        return None
    product, masked = found
    weighted = _weighted(node.outputs[0])
    if weighted is None:
        return None
    q, k = product.inputs[:2]
    v = weighted.inputs[1]
    assert q is not None
    assert k is not None
    assert v is not None
    shape = facts.shape(q)
    heads = shape[-3].value if shape is not None and len(shape) >= 4 else None
    size = shape[-1].value if shape is not None else None
    return AttentionSite(node, q, k, v, weighted.outputs[0], masked, heads, size, "Softmax")


def _scores(value: ir.Value) -> tuple[ir.Node, bool] | None:
    """The product of q and k below the scores, and whether something else enters on the way."""
    level, masked = [value], False
    for _ in range(_MAX_STEPS):
        found: list[ir.Value] = []
        for current in level:
            node = current.producer()
            if node is None:
                continue
            if is_op(node, "MatMul", "Einsum") or node.op_type == "FusedMatMul":
                if any(is_constant(v) for v in node.inputs) or len(node.inputs) != 2:
                    continue
                return node, masked
            if is_op(node, *_ON_SCORES):
                operands = [v for v in node.inputs if v is not None and not is_constant(v)]
                masked |= is_op(node, "Add", "Sub", "Where") and len(operands) > 1
                found.extend(operands)
        if not found:
            return None
        level = found
    return None


def _weighted(value: ir.Value) -> ir.Node | None:
    """The product of the probabilities with v."""
    current = value
    for _ in range(_MAX_STEPS):
        readers = [(user, index) for user, index in current.uses()]
        for user, index in readers:
            if index == 0 and (is_op(user, "MatMul") or user.op_type == "FusedMatMul"):
                return user if not is_constant(user.inputs[1]) else None
        onward = [user for user, _ in readers if is_op(user, *_PLAIN)]
        if not onward:
            return None
        current = onward[0].outputs[0]
    return None
