"""One convention for the inputs and outputs of a decoder (docs/generation.md), whatever its exporter called them."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence

import onnx_ir as ir

from graphopt.errors import ModelError, UsageError
from graphopt.graph.assumptions import ASSUMPTIONS_KEY
from graphopt.graph.edits import Names, walk
from graphopt.graph.kv_interface import KVInterface, kv_interface

RENAMED_KEY = "graphopt.renamed"
"""Metadata key under which a renamed model keeps the names that it had: JSON, its name now to its name before."""


def convention(interface: KVInterface) -> tuple[dict[str, str], dict[str, str]]:
    """Name now → name by the convention, of inputs and of outputs, in the order of the convention."""
    given = {
        interface.token_ids: "input_ids",
        interface.attention_mask: "attention_mask",
        interface.position_ids: "position_ids",
    }
    inputs = {name: new for name, new in given.items() if name is not None}
    outputs = {} if interface.logits is None else {interface.logits: "logits"}
    for pair in interface.pairs:
        suffix = f"{pair.layer}" if pair.part == "both" else f"{pair.layer}.{pair.part}"
        inputs[pair.past] = f"past_key_values.{suffix}"
        if pair.present is not None:
            outputs[pair.present] = f"present.{suffix}"
    return inputs, outputs


def rename_kv_cache(model: ir.Model) -> dict[str, str]:
    """Rename and order the inputs and outputs of a decoder by the convention; what is unknown keeps its name and
    comes last.

    Returns:
        Name before → name now, of those that changed. The model remembers them, so that it can still be compared with
        what it was made from.

    Raises:
        UsageError: Not a decoder with a KV cache, or one whose cache isn't understood.
    """
    interface = kv_interface(model)
    if interface is None:
        raise UsageError("The model has no KV cache that could be renamed: no attention joins an input to new keys.")
    if interface.problems:
        raise UsageError(f"The KV cache can't be renamed: {'; '.join(interface.problems)}.")
    inputs, outputs = convention(interface)
    graph = model.graph
    order = {name: index for index, name in enumerate(inputs)}
    graph.inputs[:] = sorted(graph.inputs, key=lambda v: order.get(v.name or "", len(order)))
    order = {name: index for index, name in enumerate(outputs)}
    graph.outputs[:] = sorted(graph.outputs, key=lambda v: order.get(v.name or "", len(order)))
    changed = {old: new for old, new in (inputs | outputs).items() if old != new}
    _rename(model, changed)
    if changed:
        before = {new: original_names(model).get(old, old) for old, new in changed.items()}
        model.metadata_props[RENAMED_KEY] = json.dumps({**original_names(model), **before})
    return changed


def original_names(model: ir.Model) -> dict[str, str]:
    """Name now → name before the renaming; empty where nothing was renamed.

    Raises:
        ModelError: The metadata isn't what graphopt writes.
    """
    text = model.metadata_props.get(RENAMED_KEY)
    if text is None:
        return {}
    try:
        names = json.loads(text)
    except ValueError:
        names = None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ModelError(f"The metadata {RENAMED_KEY!r} of the model isn't an object of names.")
    return names


def restore_names(model: ir.Model) -> None:
    """Give inputs and outputs the names again that they had before `rename_kv_cache`."""
    _rename(model, original_names(model))
    model.metadata_props.pop(RENAMED_KEY, None)


def _rename(model: ir.Model, names: dict[str, str]) -> None:
    graph = model.graph
    ends = {v.name: v for v in (*graph.inputs, *graph.outputs)}
    renamed = {ends[old]: new for old, new in names.items() if old in ends and old != new}
    if not renamed:
        return
    fresh, taken = Names(model), set(renamed.values())
    for inner in walk(model):
        values = [*inner.inputs, *inner.initializers.values(), *(v for node in inner for v in node.outputs)]
        for value in values:
            if value.name in taken and value not in renamed:
                if value in ends.values():
                    raise ModelError(f"An input or output is called {value.name!r} already, but isn't what that says.")
                value.name = fresh.fresh(f"{value.name}/inner")
    for value, new in renamed.items():
        value.name = new
    rename_in_assumptions(model, names)


def rename_in_assumptions(model: ir.Model, names: dict[str, str]) -> None:
    """Let what the model takes for granted speak of inputs by other names."""
    text = model.metadata_props.get(ASSUMPTIONS_KEY)
    try:
        entries = json.loads(text) if text is not None else []
    except ValueError:
        return  # whoever reads it will say so
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, dict) and isinstance(inputs := entry.get("inputs"), dict):
            entry["inputs"] = {role: names.get(name, name) for role, name in inputs.items()}
    if entries:
        model.metadata_props[ASSUMPTIONS_KEY] = json.dumps(entries)


def close_gaps(model: ir.Model, before: KVInterface, gone: Collection[str]) -> dict[str, str]:
    """Renumber the inputs and outputs of a cache after some of them were removed, in the exporter's own pattern.

    Where the numbers of a name differ between layers in one place, that is the layer's; it is lowered by as many as
    there were removed below it. So `past_key_values.7.key` becomes `past_key_values.6.key` where one below was removed,
    and numbers that had gaps before keep those. Names that hold no such number stay.

    Args:
        model: The model, without what was removed.
        before: Its interface before.
        gone: Names of the inputs and outputs that were removed.

    Returns:
        Name before → name now, of those that changed. The model remembers them, as `rename_kv_cache` does.
    """
    changed: dict[str, str] = {}
    pairs = [*before.pairs, *before.cross]
    for names in ([p.past for p in pairs], [p.present for p in pairs]):
        numbered = [(pair.part, *_parts(name)) for pair, name in zip(pairs, names, strict=True) if name is not None]
        alike: dict[tuple[str, tuple[str, ...]], list[tuple[str, ...]]] = {}
        for part, words, numbers in numbered:
            alike.setdefault((part, words), []).append(numbers)
        lost = [(words, numbers) for _, words, numbers in numbered if _joined(words, numbers) in gone]
        for part, words, numbers in numbered:
            place = _varying(alike[part, words])
            if place is None or _joined(words, numbers) in gone:
                continue
            rest, own = _without(numbers, place), int(numbers[place])
            below = sum(1 for w, n in lost if w == words and _without(n, place) == rest and int(n[place]) < own)
            if below:
                now = f"{own - below:0{len(numbers[place])}d}" if numbers[place][0] == "0" else f"{own - below}"
                new = (*numbers[:place], now, *numbers[place + 1 :])
                changed[_joined(words, numbers)] = _joined(words, new)
    _rename(model, changed)
    if changed:
        known = original_names(model)
        ends = {v.name for v in (*model.graph.inputs, *model.graph.outputs)}
        before_it = {new: known.get(old, old) for old, new in changed.items()}
        kept = {name: old for name, old in known.items() if name in ends and name not in changed.values()}
        model.metadata_props[RENAMED_KEY] = json.dumps({**kept, **before_it})
    return changed


def _parts(name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The words and the numbers of a name, in turns, words first and last."""
    pieces = re.split(r"(\d+)", name)
    return tuple(pieces[::2]), tuple(pieces[1::2])


def _joined(words: Sequence[str], numbers: Sequence[str]) -> str:
    return "".join(w + n for w, n in zip(words, (*numbers, ""), strict=True))


def _without(numbers: tuple[str, ...], place: int) -> tuple[str, ...]:
    return (*numbers[:place], *numbers[place + 1 :])


def _varying(numbers: Sequence[tuple[str, ...]]) -> int | None:
    """The one place in which numbers of equally many digits groups differ; None where there is none, or more."""
    places = [place for place, column in enumerate(zip(*numbers, strict=True)) if len(set(column)) > 1]
    return places[0] if len(places) == 1 else None
