"""`RotaryEmbedding` of com.microsoft as the standard's."""

from __future__ import annotations

import onnx_ir as ir

from graphopt.analysis.algebra import attribute_int
from graphopt.graph.edits import Editor
from graphopt.passes.raise_.root_mean_square import NotRaised
from graphopt.passes.raise_.rotary_tables import Sizes
from graphopt.passes.raise_.shape_rules import ShapeRulePass

CONTRIB = "com.microsoft::RotaryEmbedding"


def sizes_of(rank: int | None) -> tuple[int, int] | None:
    """The axes of batch and positions of an X of this rank."""
    return {3: (0, 1), 4: (0, 2)}.get(rank or 0)


def from_contrib(node: ir.Node, facts: ShapeRulePass, sizes: Sizes, edit: Editor) -> ir.Value:
    """The standard's operator for the site's, whose positions may be one offset for the whole batch.

    positions[b, s] = offset + s        where they are one number
    """
    x, positions, cos, sin = (node.inputs[i] if i < len(node.inputs) else None for i in range(4))
    if x is None or positions is None or cos is None or sin is None:
        raise NotRaised("an input of it isn't given")
    if any(attribute.is_ref() for attribute in node.attributes.values()):
        raise NotRaised("the caller of its function sets an attribute of it: inline functions first")
    if edit.opset < 23:
        raise NotRaised(f"needs opset 23, the model has {edit.opset}: run convert-opset first")
    scale = node.attributes.get("scale")
    if scale is not None and scale.as_float() != 1.0:
        raise NotRaised("its scale, which ONNX Runtime's CPU kernel doesn't apply, isn't 1")
    if attribute_int(node, "is_packed_batching", 0):
        raise NotRaised("its batch is packed")
    shape, cache = facts.shape(x), facts.shape(cos)
    axes = sizes_of(None if shape is None else len(shape))
    rank = facts.rank(positions)
    if shape is None or axes is None or cache is None or len(cache) != 2 or rank is None:
        raise NotRaised("the ranks of its inputs aren't known")
    if rank != 2 and any(size != 1 for size in facts.shape(positions) or ()):
        raise NotRaised("its positions are neither one number nor [batch, positions]")
    size = attribute_int(node, "rotary_embedding_dim", 0) or 0
    heads = attribute_int(node, "num_heads", 0) or 0
    attributes = {"interleaved": attribute_int(node, "interleaved", 0) or None}
    width = None if cache[1] is None else 2 * cache[1]
    if size:
        if not heads:
            raise NotRaised("it has rotary_embedding_dim without num_heads")
        head = shape[-1] if len(shape) == 4 else None if shape[-1] is None else shape[-1] // heads
        attributes["rotary_embedding_dim"] = None if head == size else size
    elif width is None or shape[-1] is None:
        raise NotRaised("the size of its heads isn't known")
    elif len(shape) == 4 and shape[-1] != width:
        raise NotRaised(f"its heads are of {shape[-1]} elements, its tables for {width}")
    if len(shape) == 3:
        if not size and shape[-1] is not None and width is not None:
            if shape[-1] % width or heads not in (0, shape[-1] // width):
                raise NotRaised(f"{shape[-1]} elements aren't {heads or 'whole'} heads of {width}")
            heads = shape[-1] // width
        attributes["num_heads"] = heads
    # What ONNX Runtime's own operator wants as large as x already.
    positions = sizes.fitted(positions, x, axes, edit) if rank == 2 else sizes.counted(positions, x, axes, edit)
    return edit.op("RotaryEmbedding", [x, cos, sin, positions], attributes, like=node.outputs[0])
