"""Hugging Face models as sources of an export: folders, or names on the hub."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graphopt.errors import ModelError, UsageError, first_line
from graphopt.export.attention import usable
from graphopt.export.decoder import causal_lm
from graphopt.export.dependencies import quiet, require
from graphopt.export.dry_run import dry_run
from graphopt.export.loaded import Loaded
from graphopt.export.modules import without_weights
from graphopt.export.sample_inputs import floats, integers, padding_mask
from graphopt.export.source import Input, Source, wrap
from graphopt.export.weights import CheckpointWeights, checkpoint_weights

COMPANIONS = (
    "config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "preprocessor_config.json",
    "processor_config.json",
)
"""Files of a model's folder that a program needs beside the ONNX model, as glob patterns."""


def from_pretrained(
    name: str, *, attention: str | None, exporter: str, dtype: str, last_logits: bool = False
) -> Loaded:
    """A Hugging Face model, from a folder or by its name on the hub.

    Which inputs it has is read off the signature of its forward, its configuration, and runs without numbers.

    Args:
        name: A folder, or a name on the hub.
        attention: The attention implementation; None: the best that the model takes.
        exporter: What traces it: "torchscript" has no operator for attention.
        dtype: Type of the weights, "float32" or "float16".
        last_logits: A decoder gives the logits of the last position only.

    Raises:
        UsageError: Not a model folder, not reachable, or of a kind whose inputs aren't known.
        ModelError: The weights are missing, incomplete or unreadable.
    """
    transformers = require("transformers")
    folder = _folder(name)
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(folder)
    except Exception as error:
        raise ModelError(f"{folder / 'config.json'} can't be used: {first_line(error)}") from error
    model_class = _model_class(name, config)
    implementations = (attention,) if attention is not None else usable(model_class, exporter)
    module, weights, notes = _load(name, folder, model_class, config, implementations[0], dtype)
    forward = inspect.signature(model_class.forward).parameters
    if "decoder_input_ids" in forward:
        raise UsageError(f"{name} is an encoder-decoder; export of encoder-decoders isn't supported yet")
    if "past_key_values" in forward and model_class.can_generate():
        source = causal_lm(name, module, last_logits=last_logits)
    else:
        source = _feed_forward(name, module, folder, list(forward))
    return Loaded(name, {"model": source}, module, weights, implementations, _companions(folder), notes)


def _feed_forward(name: str, model: Any, folder: Path, forward: list[str]) -> Source:
    """A model without a cache: text, images or sound in, whatever it returns out."""
    inputs, sample, probes = _inputs(name, model.config, folder, forward, model.dtype)
    names = [item.name for item in inputs]

    def run(*tensors: Any) -> dict[str, Any]:
        torch = require("torch")
        more = {"use_cache": False} if "use_cache" in forward else {}
        result = model(**dict(zip(names, tensors, strict=True)), **more, return_dict=True)
        return {key: value for key, value in result.items() if isinstance(value, torch.Tensor)}

    source = Source(name, None, inputs, None, sample, [probes])
    try:
        source.outputs = list(dry_run(model, run, source.tensors(sample, 0)))
    except Exception as error:
        raise UsageError(
            f"{name} ({type(model).__name__}) doesn't run on the inputs {', '.join(names)}: {first_line(error)}; "
            "write a function that returns the model and its example inputs, and export module:function"
        ) from error
    source.module = wrap(lambda *tensors: tuple(run(*tensors).values()), model)
    source.again = lambda: source
    return source


def _folder(name: str) -> Path:
    """The local folder of a model; one of the hub is downloaded to the hub's cache first."""
    folder = Path(name).expanduser()
    if folder.is_file():
        if folder.suffix == ".gguf":
            raise UsageError(f"{name}: GGUF files can't be exported yet")
        raise UsageError(f"{name} is a file; give the folder with config.json, or module:factory")
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UsageError(f"{name} has no config.json; give the folder of a Hugging Face model")
    elif re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not name.startswith("."):
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
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"{name} has no .safetensors file; convert its weights with save_pretrained first")
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


def _load(
    name: str, folder: Path, model_class: Any, config: Any, attention: str, dtype: str
) -> tuple[Any, CheckpointWeights, list[str]]:
    """The module without its weights, the weights, and what to say of them."""
    notes: list[str] = []

    def make(**more: Any) -> tuple[Any, CheckpointWeights, list[str]]:
        try:
            module = without_weights(
                lambda: model_class._from_config(config, attn_implementation=attention, **more), dtype
            )
        except Exception as error:
            raise ModelError(f"{name}: {model_class.__name__} can't be made: {first_line(error)}") from error
        if getattr(module, "_can_set_experts_implementation", lambda: False)():
            # The usual one counts tokens by expert with an operator that no exporter has.
            module.set_experts_implementation("batched_mm")
        weights = checkpoint_weights(folder, module)
        return module, weights, weights.missing(module)

    module, weights, missing = make()
    # A sentence encoder is often saved without BERT's pooler, which nothing but its second output needs.
    has_option = "add_pooling_layer" in inspect.signature(model_class.__init__).parameters
    if missing and has_option and all("pooler." in key for key in missing):
        module, weights, missing = make(add_pooling_layer=False)
        notes.append("the weights have no pooler, so the model is exported without pooler_output")
    if missing:
        some = ", ".join(sorted(missing)[:3])
        raise ModelError(
            f"{name} has no weights for {len(missing)} parameters of {model_class.__name__} ({some}); "
            "they would be random numbers"
        )
    return module, weights, notes


def _companions(folder: Path) -> list[Path]:
    return sorted({path for pattern in COMPANIONS for path in folder.glob(pattern) if path.is_file()})


# ---- inputs


def _inputs(
    name: str, config: Any, folder: Path, parameters: list[str], dtype: Any
) -> tuple[list[Input], dict[str, int], list[dict[str, int]]]:
    """Inputs from the names of the parameters and the configuration, with sizes to export and to verify with."""
    sizes: dict[str, tuple[int, int, int]] = {"batch": (2, 1, 3)}
    found: list[Input] = []
    if "input_ids" in parameters:
        text = config.get_text_config()
        longest = getattr(text, "max_position_embeddings", None) or 512
        # Room for models whose positions start behind the padding index.
        sizes["sequence"] = tuple(max(2, min(n, longest - 2)) for n in (8, 16, 7))  # type: ignore[assignment]
        found += _text_inputs(text, folder, parameters)
    if "pixel_values" in parameters:
        found.append(_image_input(name, config, folder, dtype))
    if "input_values" in parameters or "input_features" in parameters:
        found += _audio_inputs(name, config, folder, parameters, dtype, sizes)
    if not found:
        raise UsageError(
            f"{name}: the parameters {', '.join(parameters[1:6])} of its forward aren't text, images or sound; "
            "write a function that returns the model and its example inputs, and export module:function"
        )
    used = {d for item in found for d in item.dims if isinstance(d, str)}
    columns = [{s: n[i] for s, n in sizes.items() if s in used} for i in range(3)]
    return found, columns[0], columns[1:]


def _text_inputs(config: Any, folder: Path, parameters: list[str]) -> list[Input]:
    dims = ("batch", "sequence")
    found = [Input("input_ids", dims, integers(config.vocab_size))]
    if "attention_mask" in parameters:
        found.append(Input("attention_mask", dims, padding_mask))
    types = getattr(config, "type_vocab_size", 0) or 0
    told = _json(folder / "tokenizer_config.json").get("model_input_names")
    if "token_type_ids" in parameters and types > 1 and (told is None or "token_type_ids" in told):
        found.append(Input("token_type_ids", dims, integers(types)))
    return found


def _image_input(name: str, config: Any, folder: Path, dtype: Any) -> Input:
    vision = getattr(config, "vision_config", config)
    processor = _json(folder / "preprocessor_config.json")
    candidates = (getattr(vision, "image_size", None), processor.get("crop_size"), processor.get("size"))
    for candidate in candidates:
        size = _height_width(candidate)
        if size is not None:
            channels = getattr(vision, "num_channels", None) or 3
            return Input("pixel_values", ("batch", channels, *size), floats(dtype))
    raise UsageError(f"{name}: neither config.json nor preprocessor_config.json tells the size of its images")


def _height_width(size: Any) -> tuple[int, int] | None:
    """Height and width out of the forms in which configurations write an image size."""
    if isinstance(size, int):
        return size, size
    if isinstance(size, list | tuple) and len(size) == 2:
        return int(size[0]), int(size[1])
    if isinstance(size, Mapping):
        if "height" in size and "width" in size:
            return int(size["height"]), int(size["width"])
        if "shortest_edge" in size:
            return int(size["shortest_edge"]), int(size["shortest_edge"])
    return None


def _audio_inputs(
    name: str, config: Any, folder: Path, parameters: list[str], dtype: Any, sizes: dict[str, tuple[int, int, int]]
) -> list[Input]:
    main = "input_values" if "input_values" in parameters else "input_features"
    bins, frames = getattr(config, "num_mel_bins", None), getattr(config, "max_length", None)
    if main == "input_values" and bins is None:
        sizes["samples"] = (8000, 16000, 12000)
        found = [Input(main, ("batch", "samples"), floats(dtype))]
        if "attention_mask" in parameters and _json(folder / "preprocessor_config.json").get("return_attention_mask"):
            found.append(Input("attention_mask", ("batch", "samples"), padding_mask))
        return found
    if bins and frames and main == "input_values":
        return [Input(main, ("batch", frames, bins), floats(dtype))]
    positions = getattr(config, "max_source_positions", None)
    if bins and positions:
        # The encoders of this kind halve the number of frames before they add positions.
        return [Input(main, ("batch", bins, 2 * positions), floats(dtype))]
    raise UsageError(f"{name}: config.json doesn't tell the number of mel bins and frames of {main}")


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
