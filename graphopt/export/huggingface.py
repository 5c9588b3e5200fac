"""Hugging Face models as sources of an export: folders, or names on the hub."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.errors import ModelError, UsageError, first_line
from graphopt.export.dependencies import quiet, require
from graphopt.export.source import Input, Source, wrap

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

DECODER = "{} is a decoder with a KV cache; export of decoders isn't supported yet"


def from_pretrained(name: str, *, attention: str, dtype: str) -> Source:
    """A Hugging Face encoder or feed-forward model, from a folder or by its name on the hub.

    Which inputs it has is read from the signature of its forward and from its configuration.

    Raises:
        UsageError: Not a model folder, not reachable, a decoder, or of a kind whose inputs aren't known.
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
    forward = inspect.signature(model_class.forward).parameters
    if "decoder_input_ids" in forward:
        raise UsageError(f"{name} is an encoder-decoder; export of encoder-decoders isn't supported yet")
    if model_class.can_generate():
        raise UsageError(DECODER.format(name))
    model, notes = _load(name, folder, model_class, config, attention, dtype)
    inputs, sample, probes = _inputs(name, config, folder, list(forward), model.dtype)
    names = [item.name for item in inputs]

    def run(*tensors: Any) -> dict[str, Any]:
        torch = require("torch")
        result = model(**dict(zip(names, tensors, strict=True)), return_dict=True)
        return {key: value for key, value in result.items() if isinstance(value, torch.Tensor)}

    source = Source(name, None, inputs, None, sample, [probes], _companions(folder), notes)
    try:
        with require("torch").no_grad(), quiet():
            source.outputs = list(run(*source.tensors(sample, 0)))
    except Exception as error:
        raise UsageError(
            f"{name} ({model_class.__name__}) doesn't run on the inputs {', '.join(names)}: {first_line(error)}; "
            "write a function that returns the model and its example inputs, and export module:function"
        ) from error
    source.module = wrap(lambda *tensors: tuple(run(*tensors).values()), model)
    return source


def _folder(name: str) -> Path:
    """The local folder of a model; one of the hub is downloaded to the hub's cache first."""
    folder = Path(name).expanduser()
    if folder.is_file():
        if folder.suffix == ".gguf":
            raise UsageError(DECODER.format(name))
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


def _load(name: str, folder: Path, model_class: Any, config: Any, attention: str, dtype: str) -> tuple[Any, list[str]]:
    torch = require("torch")
    notes: list[str] = []

    def load(**more: Any) -> tuple[Any, set[str]]:
        try:
            with quiet():
                model, info = model_class.from_pretrained(
                    folder,
                    config=config,
                    attn_implementation=attention,
                    dtype=getattr(torch, dtype),
                    use_safetensors=True,
                    output_loading_info=True,
                    **more,
                )
        except Exception as error:
            raise ModelError(f"the weights of {name} can't be loaded: {first_line(error)}") from error
        return model, set(info["missing_keys"])

    if hasattr(config, "use_cache"):
        config.use_cache = False
    model, missing = load()
    # A sentence encoder is often saved without BERT's pooler, which nothing but its second output needs.
    has_option = "add_pooling_layer" in inspect.signature(model_class.__init__).parameters
    if missing and has_option and all("pooler." in key for key in missing):
        model, missing = load(add_pooling_layer=False)
        notes.append("the weights have no pooler, so the model is exported without pooler_output")
    if missing:
        some = ", ".join(sorted(missing)[:3])
        raise ModelError(
            f"{name} has no weights for {len(missing)} parameters of {model_class.__name__} ({some}); "
            "they would be random numbers"
        )
    return model.eval(), notes


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
    found = [Input("input_ids", dims, _integers(config.vocab_size))]
    if "attention_mask" in parameters:
        found.append(Input("attention_mask", dims, _padding_mask))
    types = getattr(config, "type_vocab_size", 0) or 0
    told = _json(folder / "tokenizer_config.json").get("model_input_names")
    if "token_type_ids" in parameters and types > 1 and (told is None or "token_type_ids" in told):
        found.append(Input("token_type_ids", dims, _integers(types)))
    return found


def _image_input(name: str, config: Any, folder: Path, dtype: Any) -> Input:
    vision = getattr(config, "vision_config", config)
    processor = _json(folder / "preprocessor_config.json")
    candidates = (getattr(vision, "image_size", None), processor.get("crop_size"), processor.get("size"))
    for candidate in candidates:
        size = _height_width(candidate)
        if size is not None:
            channels = getattr(vision, "num_channels", None) or 3
            return Input("pixel_values", ("batch", channels, *size), _floats(dtype))
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
        found = [Input(main, ("batch", "samples"), _floats(dtype))]
        if "attention_mask" in parameters and _json(folder / "preprocessor_config.json").get("return_attention_mask"):
            found.append(Input("attention_mask", ("batch", "samples"), _padding_mask))
        return found
    if bins and frames and main == "input_values":
        return [Input(main, ("batch", frames, bins), _floats(dtype))]
    positions = getattr(config, "max_source_positions", None)
    if bins and positions:
        # The encoders of this kind halve the number of frames before they add positions.
        return [Input(main, ("batch", bins, 2 * positions), _floats(dtype))]
    raise UsageError(f"{name}: config.json doesn't tell the number of mel bins and frames of {main}")


def _integers(below: int) -> Any:
    def make(shape: tuple[int, ...], generator: np.random.Generator) -> Any:
        return require("torch").from_numpy(generator.integers(0, below, size=shape))

    return make


def _floats(dtype: Any) -> Any:
    def make(shape: tuple[int, ...], generator: np.random.Generator) -> Any:
        return require("torch").from_numpy(generator.normal(size=shape).astype(np.float32)).to(dtype)

    return make


def _padding_mask(shape: tuple[int, ...], generator: np.random.Generator) -> Any:
    """Ones, with a third padded on the right in the first row, on the left in the third, none in the second."""
    mask = np.ones(shape, dtype=np.int64)
    padded = max(1, shape[1] // 3)
    mask[0::3, -padded:] = 0
    mask[2::3] = 1
    mask[2::3, :padded] = 0
    return require("torch").from_numpy(mask)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
