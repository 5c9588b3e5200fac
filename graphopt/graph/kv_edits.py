"""Caches taken out of a decoder: inputs and outputs that nothing needs any more go, and the others move up."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator

import onnx_ir as ir

from graphopt.graph.assumptions import ASSUMPTIONS_KEY
from graphopt.graph.kv_interface import CachePair, KVInterface
from graphopt.graph.kv_names import RENAMED_KEY, original_names


def remove_pairs(model: ir.Model, interface: KVInterface, gone: Collection[CachePair]) -> dict[str, str]:
    """Remove caches that no attention reads or writes any more, and close the gaps in the names of the others.

    The names are the exporter's: the first of them, in the order of the layers, go to the caches that are left, so
    that numbers count up as before. Whoever asks for the shape of a removed cache is told that of one that is left.

    Args:
        model: The decoder, in which the attentions of `gone` have been rewritten.
        interface: Its interface before that.
        gone: The pairs of it that go.

    Returns:
        Name before → name now, of the inputs and outputs that got another.

    Raises:
        ValueError: A removed cache is still read, or a removed present is still needed within the graph.
    """
    graph = model.graph
    inputs = {value.name: value for value in graph.inputs}
    outputs = {value.name: value for value in graph.outputs}
    kept = [pair for pair in interface.pairs if pair not in gone]
    for pair in gone:
        past = inputs[pair.past]
        if past.uses():
            _answer_by_another(past, (inputs[other.past] for other in kept if other.part == pair.part))
        graph.inputs.remove(past)
        present = outputs.get(pair.present)
        if present is not None:
            graph.outputs.remove(present)
    renamed: dict[str, str] = {}
    lost: dict[str, str] = {}
    for part in dict.fromkeys(pair.part for pair in gone):
        before = [pair for pair in interface.pairs if pair.part == part]
        after = [pair for pair in kept if pair.part == part]
        for names, now, ends in (
            ([p.past for p in before], [p.past for p in after], inputs),
            ([p.present for p in before], [p.present for p in after], outputs),
        ):
            moved = {ends[old]: new for old, new in zip(now, names, strict=False) if old != new and old in ends}
            for value, new in moved.items():
                renamed[value.name or ""] = new or ""
            # Removed values may have the name still.
            for name in names:
                if name in ends and ends[name] not in moved and name not in now:
                    ends[name].name = None
            for value, new in moved.items():
                value.name = new
            lost |= {name: names[0] for name in names[len(now) :] if name and names[0] and now}
    _forget(model, lost)
    return renamed


def _answer_by_another(past: ir.Value, others: Iterator[ir.Value]) -> None:
    """Let another cache of the same sizes tell what is asked of the shape of `past`.

    Raises:
        ValueError: Something reads more of it than its shape, or no other cache has its sizes.
    """
    users = [user for user, _ in past.uses()]
    if any(user.op_type != "Shape" for user in users):
        raise ValueError(f"{past.name!r} is still read")
    other = next((value for value in others if value.shape == past.shape), None)
    if other is None:
        raise ValueError(f"the length of {past.name!r} is read, and no other cache has its sizes")
    for user in users:
        user.replace_input_with(0, other)


def _forget(model: ir.Model, lost: dict[str, str]) -> None:
    """Put names that are there in place of lost ones, in what the metadata says of names."""
    names = original_names(model)
    if names:
        model.metadata_props[RENAMED_KEY] = json.dumps({now: old for now, old in names.items() if now not in lost})
    text = model.metadata_props.get(ASSUMPTIONS_KEY)
    try:
        entries = json.loads(text) if text is not None else []
    except ValueError:
        return  # whoever reads it will say so
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, dict) and isinstance(roles := entry.get("inputs"), dict):
            entry["inputs"] = {role: lost.get(name, name) for role, name in roles.items()}
    if entries:
        model.metadata_props[ASSUMPTIONS_KEY] = json.dumps(entries)
