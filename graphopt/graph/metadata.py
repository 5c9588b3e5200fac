"""What graphopt notes in the metadata of a model."""

from __future__ import annotations

import json

import onnx_ir as ir

from graphopt.errors import ModelError


def noted_names(model: ir.Model, key: str) -> dict[str, str]:
    """An object of names in the metadata of a model; empty where there is none.

    Raises:
        ModelError: It is something else.
    """
    text = model.metadata_props.get(key)
    if text is None:
        return {}
    try:
        names = json.loads(text)
    except ValueError:
        names = None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ModelError(f"The metadata {key!r} of the model isn't an object of names.")
    return names
