"""Feed-forward models of transformers as sources of an export: text, images or sound in, whatever they return out."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graphopt.errors import UsageError, first_line
from graphopt.export.dependencies import require
from graphopt.export.dry_run import dry_run
from graphopt.export.sample_inputs import floats, integers, padded_tokens, padding_mask
from graphopt.export.source import Input, Source, wrap


def feed_forward(name: str, model: Any, folder: Path) -> Source:
    """A model without a cache, such as an encoder or a classifier.

    Which inputs it has is read off the signature of its forward and its configuration.

    Args:
        name: How messages call it.
        model: The transformers module, in eval mode; its weights may be missing.
        folder: Its folder, whose tokenizer and preprocessor tell what the configuration doesn't.

    Raises:
        UsageError: Its inputs aren't known.
    """
    forward = list(inspect.signature(model.forward).parameters)
    inputs, sample, probes = _inputs(name, model.config, folder, ["self", *forward], model.dtype)
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
    padding = getattr(config, "pad_token_id", None)
    if "attention_mask" not in parameters:
        found = [Input("input_ids", dims, integers(config.vocab_size))]
    else:
        found = [Input("input_ids", dims, padded_tokens(config.vocab_size, padding if isinstance(padding, int) else 0))]
        found.append(Input("attention_mask", dims, padding_mask))
    types = getattr(config, "type_vocab_size", 0) or 0
    told = _json(folder / "tokenizer_config.json").get("model_input_names")
    if "token_type_ids" in parameters and types > 1 and (told is None or "token_type_ids" in told):
        found.append(Input("token_type_ids", dims, integers(types)))
    return found


def image_size(folder: Path) -> tuple[int, int] | None:
    """Height and width of the images that a model's preprocessor makes; None: its files don't tell."""
    processor = _json(folder / "preprocessor_config.json")
    return _height_width(processor.get("crop_size")) or _height_width(processor.get("size"))


def _image_input(name: str, config: Any, folder: Path, dtype: Any) -> Input:
    vision = getattr(config, "vision_config", config)
    size = _height_width(getattr(vision, "image_size", None)) or image_size(folder)
    if size is None:
        raise UsageError(f"{name}: neither config.json nor preprocessor_config.json tells the size of its images")
    channels = getattr(vision, "num_channels", None) or 3
    return Input("pixel_values", ("batch", channels, *size), floats(dtype))


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
