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
_OF_DECODERS = ("num_decoder_layers", "decoder_layers")
_BESIDE_ENCODERS = (*_OF_DECODERS, "encoder_layers", "num_encoder_layers")
_OTHER_PARTS = ("vision", "audio", "encoder")
"""What the names of configurations of other graphs contain."""


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
    """A configuration for as many layers as the decoder has left: counts, and lists with an entry a layer.

    What is said of an encoder, of images or of sound stays. Where a configuration counts an encoder's layers too, its
    plain count is the encoder's, as in Whisper's and T5's.
    """
    counts = _OF_DECODERS if any(key in config for key in _BESIDE_ENCODERS) else _COUNTS
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found[key] = value if any(part in key for part in _OTHER_PARTS) else shortened(value, layers)
        elif key in counts and value == layers.of:
            found[key] = len(layers.kept)
        elif key == "attention_types" and len(kinds := _kinds(value)) == layers.of:
            found[key] = [[[kinds[layer]], 1] for layer in layers.kept]
        elif isinstance(value, list) and len(value) == layers.of and "layer" in key and "encoder" not in key:
            found[key] = [value[layer] for layer in layers.kept]
        else:
            found[key] = value
    return found


def _kinds(value: Any) -> list[Any]:
    """The kind of each layer in GPT-Neo's notation, [[[kinds], repetitions], ...]; none where it is no such list."""
    try:
        return [kind for kinds, times in value for _ in range(times) for kind in kinds]
    except (TypeError, ValueError):
        return []
