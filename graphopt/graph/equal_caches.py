"""Caches that a model keeps once: which of them stood for others of the model that it was made from.

A result with fewer caches is another model to whoever runs it, and equal to the original where this one is fed with
equal caches. `as_if_equal` makes of the original, and `with_copies` of the result, models of the same inputs and
outputs.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping

import onnx_ir as ir

from graphopt.graph.edits import Names, nodes
from graphopt.graph.metadata import noted_names

EQUAL_KEY = "graphopt.equal_caches"
"""Metadata key: JSON, the name of an input or output that is gone to the name of the one that is equal to it."""


def note_equal(model: ir.Model, equal: Mapping[str, str]) -> None:
    """Note in a model which inputs and outputs are gone (name → name of the one that stays)."""
    known = equal_caches(model)
    found = {gone: equal.get(kept, kept) for gone, kept in known.items()} | dict(equal)
    model.metadata_props[EQUAL_KEY] = json.dumps(found, sort_keys=True)


def equal_caches(model: ir.Model) -> dict[str, str]:
    """What `note_equal` noted; empty where nothing is.

    Raises:
        ModelError: The metadata isn't what graphopt writes.
    """
    return noted_names(model, EQUAL_KEY)


def rename_equal(model: ir.Model, names: Mapping[str, str]) -> None:
    """Let what is noted speak of inputs and outputs by other names, those that are gone too: name before → name now."""
    if known := equal_caches(model):
        found = {names.get(gone, gone): names.get(kept, kept) for gone, kept in known.items()}
        model.metadata_props[EQUAL_KEY] = json.dumps(found, sort_keys=True)


def merged_since(model: ir.Model, before: Collection[str | None]) -> dict[str, str]:
    """Inputs and outputs that a model lacks of those that there were `before`, by name, with the names of those of the
    model that are equal to them."""
    equal = equal_caches(model)
    ends = {value.name for value in (*model.graph.inputs, *model.graph.outputs)}
    return {gone: kept for gone, kept in equal.items() if gone in before and gone not in ends and kept in ends}


def as_if_equal(original: ir.Model, equal: Mapping[str, str]) -> ir.Model:
    """A copy of a model that reads one of its inputs where it read others that are equal to it."""
    copy = original.clone()
    inputs = {value.name: value for value in copy.graph.inputs}
    for gone, kept in equal.items():
        if gone in inputs and kept in inputs:
            inputs[gone].replace_all_uses_with(inputs[kept])
            copy.graph.inputs.remove(inputs[gone])
    return copy


def with_copies(model: ir.Model, equal: Mapping[str, str]) -> ir.Model:
    """A copy of a model that gives out again, as copies, the outputs that are gone."""
    copy = model.clone()
    outputs = {value.name: value for value in copy.graph.outputs}
    wanted = {gone: outputs[kept] for gone, kept in equal.items() if kept in outputs and gone not in outputs}
    names = Names(copy)
    for value in (value for node in nodes(copy) for value in node.outputs):
        if value.name in wanted:
            value.name = names.fresh(value.name)
    for gone, source in wanted.items():
        made = ir.Value(name=gone, type=source.type, shape=source.shape)
        copy.graph.append(ir.node("Identity", [source], outputs=[made], name=names.fresh(f"{gone}/copy")))
        copy.graph.outputs.append(made)
    return copy
