"""Which layers of the original a model still has, so that the configuration beside it can say the same."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from typing import Any

import onnx_ir as ir

KEPT_KEY = "graphopt.kept_layers"
"""Metadata key: JSON {"of": layers of the original, "kept": the numbers of those that are left, from 0}."""
_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "decoder_layers")
"""What configurations call the number of layers."""
_OTHERS = ("vision", "audio", "image", "encoder")
"""In the names of configurations within one that are of other models than the decoder."""


@dataclasses.dataclass(frozen=True)
class KeptLayers:
    """The layers that are left. Of a decoder those count that have a cache: a runtime makes as many.

    Attributes:
        of: How many the original had.
        kept: The numbers of those that are left, from 0.
    """

    of: int
    kept: tuple[int, ...]


def kept_layers(model: ir.Model, since: ir.Model | None = None) -> KeptLayers | None:
    """What `note_kept` noted; None where all layers are there, or the metadata isn't what it writes.

    Args:
        model: The model.
        since: What it was made from, where that lacked layers already: those that it had are counted then.
    """
    before = None if since is None else kept_layers(since)
    try:
        data = json.loads(model.metadata_props.get(KEPT_KEY, "null"))
        found = KeptLayers(int(data["of"]), tuple(int(layer) for layer in data["kept"]))
    except (ValueError, LookupError, TypeError):
        return None
    if not all(0 <= layer < found.of for layer in found.kept):
        return None
    if before is None:
        return found
    places = {layer: place for place, layer in enumerate(before.kept)}
    kept = tuple(places[layer] for layer in found.kept if layer in places)
    return KeptLayers(len(before.kept), kept) if len(kept) < len(before.kept) else None


def note_kept(model: ir.Model, layers: Iterable[int], kept: Iterable[int]) -> None:
    """Note in a model which of its layers are left.

    Args:
        model: The model.
        layers: The numbers of those that it had, in whatever order, each as often as may be.
        kept: Those of them that are left.
    """
    had, left = sorted(set(layers)), set(kept)
    before = kept_layers(model)
    names = list(range(len(had)))
    of = len(had)
    if before is not None and len(before.kept) == of:
        of, names = before.of, list(before.kept)
    found = [name for name, layer in zip(names, had, strict=True) if layer in left]
    if len(found) < of:
        model.metadata_props[KEPT_KEY] = json.dumps({"of": of, "kept": found})


def shortened(config: dict[str, Any], layers: KeptLayers) -> dict[str, Any]:
    """A configuration, and those within it, for as many layers as are left: counts, and lists with an entry a layer.

    One that counts other layers than the original had stays as it is, as do those of encoders.
    """
    found: dict[str, Any] = {}
    # Whisper's num_hidden_layers are those of its encoder.
    counts = [key for key in _COUNTS if key.startswith("decoder") or "decoder_layers" not in config]
    for key, value in config.items():
        if isinstance(value, dict):
            found[key] = value if any(other in key for other in _OTHERS) else shortened(value, layers)
        elif key in counts and value == layers.of:
            found[key] = len(layers.kept)
        elif isinstance(value, list) and len(value) == layers.of and "layer" in key:
            found[key] = [value[layer] for layer in layers.kept]
        else:
            found[key] = value
    return found
