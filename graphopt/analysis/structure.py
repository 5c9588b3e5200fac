"""What a model is made of: the structural analyses together, as JSON data for `graphopt inspect`."""

from __future__ import annotations

from collections import Counter
from typing import Any

import onnx_ir as ir

from graphopt.analysis.attention_sites import attention_sites
from graphopt.analysis.branches import long_skips
from graphopt.analysis.conv_structures import conv_structures
from graphopt.analysis.elementwise_norms import elementwise_norms
from graphopt.analysis.layers import stacks, tied_layers
from graphopt.analysis.linear_sites import linear_sites, roles
from graphopt.analysis.residual import residual_streams
from graphopt.analysis.shapes import infer

WHY_NONE = "no addition whose one operand is computed from the other through weights"


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
    kinds = Counter((a.operator, a.heads, a.head_size, a.masked) for a in attention)
    return {
        "convolutions": [found.to_dict() for found in conv_structures(model)],
        "elementwise_norms": dict(Counter(norm.kind for norm in elementwise_norms(model))),
        "layers": [stack.to_dict() for stack in stacks(model)],
        "tied_layers": [tied.to_dict() for tied in tied_layers(model)],
        "residual_streams": [stream.to_dict() for stream in streams],
        "no_residual_stream": None if streams else WHY_NONE,
        "long_skips": [{"concat": s.concat.name, "skip": s.skip.name, "nodes": s.length} for s in long_skips(model)],
        "attention": {
            "summary": [
                {"count": n, "operator": operator, "heads": heads, "head_size": size, "masked": masked}
                for (operator, heads, size, masked), n in kinds.most_common()
            ],
            "sites": [site.to_dict() for site in attention],
        },
        "linear": {
            "roles": roles(linear),
            "groups": len({site.group for site in linear}),
            "shared": sorted({str(site.weight.name) for site in linear if site.shared}),
            "sites": [site.to_dict() for site in linear],
        },
    }
