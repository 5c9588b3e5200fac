"""What a decoder says of its outputs for the importance of cached tokens, so that whoever runs it finds them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping

import onnx_ir as ir

IMPORTANCE_KEY = "graphopt.importance"
"""Metadata key: JSON {"asked": input, "window": queries, "outputs": {layer: output}}."""


@dataclasses.dataclass(frozen=True)
class Importance:
    """How a decoder gives out the importance of the tokens in its caches; such a cache may lose tokens.

    Attributes:
        asked: The boolean input that asks for it; false where it isn't fed.
        window: Queries of a run, the last ones, whose attention is summed.
        outputs: By layer, counted from 0 among those with a cache: the output [batch, KV heads, past + new], or
            [1, KV heads, 0] in a run that doesn't ask. A layer that isn't here must keep all its tokens.
    """

    asked: str
    window: int
    outputs: Mapping[int, str]


def note_importance(model: ir.Model, importance: Importance) -> None:
    """Write it into the metadata."""
    outputs = {str(layer): name for layer, name in sorted(importance.outputs.items())}
    data = {"asked": importance.asked, "window": importance.window, "outputs": outputs}
    model.metadata_props[IMPORTANCE_KEY] = json.dumps(data)


def read_importance(metadata: Mapping[str, str]) -> Importance | None:
    """What `note_importance` wrote; None where nothing is written, or not by it."""
    try:
        data = json.loads(metadata.get(IMPORTANCE_KEY, "null"))
        outputs = {int(layer): str(name) for layer, name in data["outputs"].items()}
        return Importance(str(data["asked"]), int(data["window"]), outputs)
    except (ValueError, LookupError, TypeError, AttributeError):
        return None


def importance_names(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """The input and the outputs that were added for it."""
    importance = read_importance(metadata)
    return () if importance is None else (importance.asked, *importance.outputs.values())
