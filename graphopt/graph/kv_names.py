"""One convention for the inputs and outputs of a decoder (docs/generation.md), whatever its exporter called them."""

from __future__ import annotations

import json

import onnx_ir as ir

from graphopt.errors import ModelError, UsageError
from graphopt.graph.assumptions import ASSUMPTIONS_KEY
from graphopt.graph.edits import Names, walk
from graphopt.graph.equal_caches import rename_equal
from graphopt.graph.kv_interface import KVInterface, kv_interface
from graphopt.graph.metadata import noted_names

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
        if f"past_key_values.{suffix}" in inputs.values():  # the last tokens, exact (low-rank-kv)
            suffix += ".recent"
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
    rename_ends(model, changed)
    if changed:
        before = {new: original_names(model).get(old, old) for old, new in changed.items()}
        model.metadata_props[RENAMED_KEY] = json.dumps({**original_names(model), **before})
    return changed


def original_names(model: ir.Model) -> dict[str, str]:
    """Name now → name before the renaming; empty where nothing was renamed.

    Raises:
        ModelError: The metadata isn't what graphopt writes.
    """
    return noted_names(model, RENAMED_KEY)


def restore_names(model: ir.Model) -> None:
    """Give inputs and outputs the names again that they had before `rename_kv_cache`."""
    rename_ends(model, original_names(model))
    model.metadata_props.pop(RENAMED_KEY, None)


def rename_ends(model: ir.Model, names: dict[str, str]) -> None:
    """Give inputs and outputs other names: name before → name now."""
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
    rename_equal(model, names)


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
