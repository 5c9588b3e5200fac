"""The attention operators of com.microsoft: their rules, and why the others stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_ir as ir

from graphopt.passes.raise_.contrib_attention_rules import AttentionCall, multi_head, packed_attention
from graphopt.passes.raise_.contrib_query_groups import query_groups
from graphopt.passes.raise_.contrib_rules import Formulas

RULES: Mapping[str, Callable[[AttentionCall], Formulas]] = {
    "Attention": packed_attention,
    "MultiHeadAttention": multi_head,
    "GroupQueryAttention": query_groups,
}
"""By operator of the domain com.microsoft."""

_PARTS = ("Attention", "RelativePositionBias", "RemovePadding", "RestorePadding")
_SHARED_BUFFER = "takes one step over a buffer that past and present share"
_NO_PADDING = "works on tokens packed without padding, a form that the standard hasn't"
_SPARSE = "attends to a sparse choice of keys, made inside"
_REASONS: Mapping[str, str] = {
    "DecoderMaskedMultiHeadAttention": _SHARED_BUFFER,
    "DecoderMaskedSelfAttention": _SHARED_BUFFER,
    "DecoderAttention": "chooses at run time between its own keys and a cache",
    "PackedAttention": _NO_PADDING,
    "PackedMultiHeadAttention": _NO_PADDING,
    "RemovePadding": _NO_PADDING,
    "RestorePadding": _NO_PADDING,
    "PagedAttention": "has its cache in pages, which the standard hasn't",
    "LongformerAttention": _SPARSE,
    "SparseAttention": _SPARSE,
    "DynamicSparseAttention": _SPARSE,
    "LinearAttention": "is a recurrence without a softmax",
    "LinearAttentionGate": "is a recurrence without a softmax",
}


def is_attention(node: ir.Node) -> bool:
    """Whether an operator of com.microsoft is attention, or belongs to one that is."""
    return any(part in node.op_type for part in _PARTS)


def why_it_stays(node: ir.Node) -> str | None:
    """The reason for attention without a rule; None where it has one, and for what isn't attention."""
    if node.domain != "com.microsoft" or not is_attention(node) or node.op_type in RULES:
        return None
    if node.op_type.startswith("Q"):
        return f"{node.op_type} is quantized arithmetic, which stays as it is"
    return f"{node.op_type} {_REASONS.get(node.op_type, 'has no counterpart among the standard operators')}"
