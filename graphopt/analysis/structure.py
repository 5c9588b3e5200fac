"""What a model is made of: the structural analyses together, as JSON data for `graphopt inspect`."""

from __future__ import annotations

from collections import Counter
from typing import Any

import onnx_ir as ir

from graphopt.analysis.attention_sites import AttentionSite, attention_sites
from graphopt.analysis.branches import long_skips
from graphopt.analysis.conv_structures import conv_structures
from graphopt.analysis.elementwise_norms import elementwise_norms
from graphopt.analysis.layers import stacks, tied_layers
from graphopt.analysis.linear_sites import linear_sites, roles
from graphopt.analysis.masks import MaskForm, Masks
from graphopt.analysis.residual import residual_streams
from graphopt.analysis.shapes import infer

WHY_NONE = "no addition whose one operand is computed from the other through weights"


KIND = ("operator", "heads", "kv_heads", "head_size", "masked", "rotary", "cached", "mask")
"""What attentions that are counted together have in common."""


def _described(site: AttentionSite, masks: Masks) -> str | None:
    """What the mask of a site lets through, in words; None where there is none, or it isn't understood."""
    form = None if site.mask is None else masks.form(site.mask)
    return form.describe() if isinstance(form, MaskForm) else None


def structure(model: ir.Model) -> dict[str, Any]:
    """The structures of a canonical model (raised and folded, not yet lowered).

    Returns:
        "layers" (stacks of equal layers), "tied_layers" (equal in every weight), "residual_streams",
        "no_residual_stream" (why there is none, or None), "long_skips" (concatenated ones), "attention" and "linear"
        (each: a summary, and the sites one by one), "convolutions" (blocks of convolutional networks),
        "elementwise_norms" (Dynamic Tanh and its root form, counted).
    """
    # The names of sizes may be believed: nothing is rewritten by what is found here.
    facts = infer(model, believe_names=True)
    streams = residual_streams(model, facts)
    attention = attention_sites(model, facts)
    linear = linear_sites(model, attention)
    masks = Masks(facts)
    kinds = Counter(
        (a.operator, a.heads, a.kv_heads, a.head_size, a.masked, a.rotary, a.cached, _described(a, masks))
        for a in attention
    )
    return {
        "convolutions": [found.to_dict() for found in conv_structures(model)],
        "elementwise_norms": dict(Counter(norm.kind for norm in elementwise_norms(model))),
        "layers": [stack.to_dict() for stack in stacks(model)],
        "tied_layers": [tied.to_dict() for tied in tied_layers(model)],
        "residual_streams": [stream.to_dict() for stream in streams],
        "no_residual_stream": None if streams else WHY_NONE,
        "long_skips": [{"concat": s.concat.name, "skip": s.skip.name, "nodes": s.length} for s in long_skips(model)],
        "attention": {
            "summary": [{"count": n, **dict(zip(KIND, kind, strict=True))} for kind, n in kinds.most_common()],
            "sites": [site.to_dict() for site in attention],
        },
        "linear": {
            "roles": roles(linear),
            "groups": len({site.group for site in linear}),
            "shared": sorted({str(site.weight.name) for site in linear if site.shared}),
            "sites": [site.to_dict() for site in linear],
        },
    }
