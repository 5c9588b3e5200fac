"""Hugging Face models as sources of an export: folders, or names on the hub."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graphopt.errors import ModelError, UsageError, first_line
from graphopt.export.adapters import AdaptedWeights
from graphopt.export.attention import usable
from graphopt.export.decoder import causal_lm
from graphopt.export.dependencies import quiet, require
from graphopt.export.encoder_decoder import encoder_decoder_sources, is_encoder_decoder
from graphopt.export.feed_forward import feed_forward, image_size
from graphopt.export.gguf import from_gguf
from graphopt.export.loaded import Loaded
from graphopt.export.modules import compute, untie, without_weights
from graphopt.export.packaging import COMPANIONS, copy_companions
from graphopt.export.source import Source
from graphopt.export.vision_language import is_vision_language, vision_language_sources
from graphopt.export.weights import CheckpointWeights, Weights, checkpoint_weights

TOKEN = re.compile(r"[\w.-]+(/[\w.-]+)?")
"""A name on the hub."""


def from_pretrained(
    name: str,
    *,
    attention: str | None = None,
    dtype: str = "float32",
    adapters: Sequence[str | Path] = (),
) -> Loaded:
    """A Hugging Face model, from a folder, by its name on the hub, or from a GGUF file.

    What it takes and gives is read off the signature of its forward, its configuration, and runs without numbers.

    Args:
        name: A folder, a name on the hub, or a .gguf file.
        attention: The attention implementation; None: the best that the model takes.
        dtype: Type of the weights, "float32" or "float16".
        adapters: peft folders to merge into the weights.

    Raises:
        UsageError: Not a model, not reachable, or of a kind whose inputs aren't known.
        ModelError: The weights are missing, incomplete or unreadable.
    """
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        made = from_gguf(path)
        model_class, config, folder, write = made.model_class, made.config, path.parent, made.write_companions
    else:
        folder = _folder(name)
        config = _config(folder)
        model_class = _model_class(name, config)
        write = functools.partial(_copy_companions, folder, dtype)
    implementations = (attention,) if attention is not None else usable(model_class)
    weights: Weights
    notes: list[str] = []
    if path.suffix == ".gguf":
        module, weights = _make(name, model_class, config, implementations[0], dtype), made.weights
        computed = compute(module, weights)
    else:
        module, weights, computed, notes = _load(name, folder, model_class, config, implementations[0], dtype)
    loaded = Loaded(name, {}, module, weights, implementations, computed, write, notes)
    if adapters:
        loaded.weights = merged = AdaptedWeights(weights, list(adapters), turned=_turned(module))
        notes += merged.notes
        untie(module, (other for _, other in merged.untied))
    loaded.sources = _sources(name, module, folder)
    return loaded


def _sources(name: str, module: Any, folder: Path) -> dict[str, Source]:
    """What the module becomes: one file, or one for each part that runs by itself."""
    if is_encoder_decoder(module) and module.can_generate():
        sources = encoder_decoder_sources(module, module.config, label=name, image=image_size(folder))
    elif is_vision_language(module) and module.can_generate():
        sources = vision_language_sources(module, module.config, label=name, image=image_size(folder))
    elif "past_key_values" in inspect.signature(module.forward).parameters and module.can_generate():
        sources = {"model": causal_lm(name, module)}
    else:
        sources = {"model": feed_forward(name, module, folder)}
    return sources


def _turned(module: Any) -> list[str]:
    """Weights that are stored as [in, out]: those of transformers' Conv1D."""
    return [f"{name}.weight" for name, part in module.named_modules() if type(part).__name__ == "Conv1D"]


def _copy_companions(folder: Path, dtype: str, target: Path) -> tuple[list[Path], list[str]]:
    return copy_companions(folder, target, dtype=dtype), []


def _config(folder: Path) -> Any:
    try:
        with quiet():
            return require("transformers").AutoConfig.from_pretrained(folder)
    except Exception as error:
        raise ModelError(f"{folder / 'config.json'} can't be used: {first_line(error)}") from error


def _folder(name: str) -> Path:
    """The local folder of a model; one of the hub is downloaded to the hub's cache first."""
    folder = Path(name).expanduser()
    if folder.is_file():
        raise UsageError(f"{name} is a file; give the folder with config.json, a .gguf file, or module:factory")
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UsageError(f"{name} has no config.json; give the folder of a Hugging Face model")
    elif TOKEN.fullmatch(name) and not name.startswith("."):
        hub = require("huggingface_hub")
        try:
            with quiet():
                folder = Path(hub.snapshot_download(name, allow_patterns=["*.safetensors*", *COMPANIONS]))
        except Exception as error:
            raise UsageError(
                f"{name} is no folder here, and the Hugging Face hub doesn't give it ({first_line(error)}); "
                "download the model and give its folder"
            ) from error
    else:
        raise UsageError(f"there is no folder {name}; give a model's folder, its name on the hub, or module:factory")
    return folder


def _model_class(name: str, config: Any) -> Any:
    transformers = require("transformers")
    architectures = getattr(config, "architectures", None) or []
    if architectures:
        found = getattr(transformers, architectures[0], None)
        if found is None:
            raise UsageError(
                f"transformers {transformers.__version__} doesn't know the architecture {architectures[0]} of {name}; "
                "write a function that returns the model and its example inputs, and export module:function"
            )
        return found
    try:
        return transformers.MODEL_MAPPING[type(config)]
    except KeyError as error:
        raise UsageError(f"{name}: config.json names no architecture that transformers has a model for") from error


def _make(name: str, model_class: Any, config: Any, attention: str, dtype: str, **more: Any) -> Any:
    """The module without its weights."""
    try:
        module = without_weights(
            lambda kind: model_class._from_config(config, attn_implementation=attention, dtype=kind, **more), dtype
        )
    except Exception as error:
        raise ModelError(f"{name}: {model_class.__name__} can't be made: {first_line(error)}") from error
    if getattr(module, "_can_set_experts_implementation", lambda: False)():
        # The usual one counts tokens by expert with an operator that no exporter has.
        module.set_experts_implementation("batched_mm")
    return module


def _load(
    name: str, folder: Path, model_class: Any, config: Any, attention: str, dtype: str
) -> tuple[Any, CheckpointWeights, frozenset[str], list[str]]:
    """The module without its weights, the weights, the names of those that it computes, and what to say of them."""
    notes: list[str] = []
    module = _make(name, model_class, config, attention, dtype)
    weights = checkpoint_weights(folder, module)
    untie(module, (other for _, other in weights.untied))
    missing = weights.missing(module)
    # A sentence encoder is often saved without BERT's pooler, which nothing but its second output needs.
    has_option = "add_pooling_layer" in inspect.signature(model_class.__init__).parameters
    if missing and has_option and all("pooler." in key for key in missing):
        module = _make(name, model_class, config, attention, dtype, add_pooling_layer=False)
        weights = checkpoint_weights(folder, module)
        untie(module, (other for _, other in weights.untied))
        missing = weights.missing(module)
        notes.append("the weights have no pooler, so the model is exported without pooler_output")
    computed = compute(module, weights)
    missing = [key for key in missing if key not in computed]
    if missing:
        some = ", ".join(sorted(missing)[:3])
        raise ModelError(
            f"{name} has no weights for {len(missing)} parameters of {model_class.__name__} ({some}); "
            "they would be random numbers"
        )
    return module, weights, computed, notes
