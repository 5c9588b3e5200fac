"""Who reads the cache of an attention, whether another one reads it in the same way, and what its length is told as."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from graphopt.analysis.algebra import attribute_int
from graphopt.graph.edits import Editor
from graphopt.passes.kv.position_tables import PositionTable
from graphopt.passes.lower.cached_site import CachedSite, NotTaken

_TOKENS = 2


def cache_readers(site: CachedSite) -> tuple[list[ir.Node], list[ir.Node]]:
    """The nodes that ask for the shape of a site's cache, and the later attentions that read it; nothing else may.

    Raises:
        NotTaken: Something does, or it isn't given in and out.
    """
    if len(site.node.outputs) < 3 or site.past_key is site.past_value:
        raise NotTaken("its keys and values aren't given in and out each by itself")
    shapes: dict[ir.Node, None] = {}
    later: dict[ir.Node, None] = {}
    for past, present in zip((site.past_key, site.past_value), site.node.outputs[1:3], strict=True):
        if not past.is_graph_input() or past.is_initializer() or not present.is_graph_output():
            raise NotTaken("its cache isn't an input and an output of the model")
        for user, _ in present.uses():
            if user.op_type != "Attention":
                raise NotTaken(f"{present.name!r} is read by a {user.op_type}")
            if list(user.inputs[1:3]) != list(site.node.outputs[1:3]):
                raise NotTaken(f"{present.name!r} is read by an Attention with other keys or values beside it")
            later[user] = None
        for user, _ in past.uses():
            if user is site.node:
                continue
            if user.op_type != "Shape" or user.graph is not site.node.graph:
                raise NotTaken(f"{past.name!r} is read by a {user.op_type} too")
            shapes[user] = None
    return list(shapes), list(later)


def tell_tokens(
    reader: ir.Node,
    mask: ir.Value,
    ids: ir.Value,
    other_size: Callable[[int], ir.Value],
    edit: Editor,
    *,
    present: bool = False,
) -> None:
    """Let a Shape of a cache [B, H, tokens, D] give the tokens that there were, whatever the cache holds now.

    Args:
        reader: The Shape.
        mask: The attention mask [B, past and new tokens].
        ids: The new tokens [B, S].
        other_size: Writes the size along one of the other axes, int64 [1].
        edit: The editor, which stands at the Shape afterwards.
        present: Whether the cache is the one with the new tokens.
    """
    edit.at(reader)

    def size(axis: int) -> ir.Value:
        if axis != _TOKENS:
            return other_size(axis)
        length = edit.op("Shape", [mask], {"start": 1, "end": 2})
        return length if present else edit.op("Sub", [length, edit.op("Shape", [ids], {"start": 1, "end": 2})])

    asked = [size(axis) for axis in range(4)[attribute_int(reader, "start", 0) : attribute_int(reader, "end", 4)]]
    edit.replace(reader.outputs[0], edit.op("Concat", asked, {"axis": 0}) if len(asked) > 1 else asked[0])


def same_rotation(site: CachedSite, table: PositionTable, other: CachedSite, of_other: PositionTable) -> bool:
    """Whether what two sites rotate by their tables is rotated alike."""
    a, b = site.rotation, other.rotation
    if a is None or b is None:
        return False
    names = ("interleaved", "rotary_embedding_dim")
    same = all(attribute_int(a, name, 0) == attribute_int(b, name, 0) is not None for name in names)
    return same and (table.sources, table.positions) == (of_other.sources, of_other.positions)
