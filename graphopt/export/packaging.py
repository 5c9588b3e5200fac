"""What lies beside an exported model: configuration, generation configuration, tokenizer, chat template, preprocessor.

The files are those of the model's own folder, but that what transformers 5 writes in another way than transformers 4 is
written in both, so that programs on either read the same: optimum's `ORTModelForCausalLM`, for one, needs version 4.

| file | what transformers 5 writes | what is added or put in its place |
|---|---|---|
| config.json | `dtype` | `torch_dtype`, the same |
| | `rope_parameters` with one `rope_theta` | `rope_theta`, and `rope_scaling` where the kind of it isn't the default |
| tokenizer_config.json | `tokenizer_class` "TokenizersBackend" | "PreTrainedTokenizerFast", its name in both |
| | `model_input_names` left out, if ids and mask | `model_input_names` |
| | `extra_special_tokens`, a list | `additional_special_tokens`, the same list |
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir

from graphopt.errors import ModelError
from graphopt.export.genai import FILE, update_genai_config
from graphopt.graph.kept_layers import kept_layers, shortened
from graphopt.graph.load import load

CONFIG = "config.json"
COMPANIONS = (
    CONFIG,
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "normalizer.json",
    "chat_template.*",
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
)
"""Files of a model's folder that a program needs beside the ONNX model, as glob patterns."""


def companions(folder: Path) -> list[Path]:
    """The files of a model's folder that belong beside the exported model."""
    return sorted({path for pattern in COMPANIONS for path in folder.glob(pattern) if path.is_file()})


def copy_companions(folder: Path, target: Path, *, dtype: str | None = None) -> list[Path]:
    """Copy what belongs beside the model into another folder, readable to transformers 4 and 5.

    Args:
        folder: The model's folder.
        target: Where the files go; a folder that exists. It may be the model's own.
        dtype: The element type of the exported weights, as "float16"; None: what config.json says.

    Returns:
        The files in `target`.

    Raises:
        ModelError: A file can't be read or written, or isn't the JSON that its name promises.
    """
    copied = []
    for path in companions(folder):
        place = target / path.name
        try:
            if not (place.exists() and os.path.samefile(path, place)):
                shutil.copyfile(path, place)
        except OSError as error:
            raise ModelError(f"{path} can't be copied to {target}: {error.strerror or error}") from error
        copied.append(place)
    make_readable(target, dtype=dtype)
    return copied


def carry(old: Path, new: Path) -> list[Path]:
    """Bring what lies beside a model to another one that was made from it, so that its folder can be loaded as well.

    genai_config.json is written anew for the other graph, where there is one, and config.json counts the layers that
    the other one has left.

    Args:
        old: The model's file, as `graphopt export` wrote it.
        new: The other's file, in another folder, as `graphopt optimize` wrote it.

    Returns:
        The files beside the other one.

    Raises:
        ModelError: A file can't be read or written, or onnxruntime-genai can't run the other model.
    """
    files = copy_companions(old.parent, new.parent)
    described = old.parent / FILE
    made = load(new)
    describe_layers(new.parent, made, since=load(old))
    if described.is_file():
        files.append(update_genai_config(new.parent, made, new.name, described))
    return files


def describe_layers(folder: Path, model: ir.Model, since: ir.Model | None = None) -> None:
    """Let a folder's config.json, where there is one, count the layers that a model has left.

    Args:
        folder: The folder.
        model: The model.
        since: What it was made from, whose layers config.json counts; None: those of the original, or the model's own.

    Raises:
        ModelError: The file can't be read or written, or isn't JSON.
    """
    if (layers := kept_layers(model, since)) is not None:
        _rewrite(folder / CONFIG, lambda config: shortened(config, layers))


def recount(path: Path, since: ir.Model) -> None:
    """Let config.json and genai_config.json say the same as the model beside them, which replaced the one they are of.

    Args:
        path: The model's file.
        since: The model that was there.

    Raises:
        ModelError: A file can't be read or written, or onnxruntime-genai can't run the model.
    """
    made, described = load(path), path.parent / FILE
    describe_layers(path.parent, made, since)
    if described.is_file() and kept_layers(made, since) is not None:
        update_genai_config(path.parent, made, path.name, described)


def follow(old: Path, new: Path, *, replaced: ir.Model | None = None, force: bool = False) -> list[str]:
    """Let what lies beside an optimized model say the same as it, where that overwrites nothing of anybody's.

    Args:
        old: The model's file.
        new: The optimized model's file, in whatever folder.
        replaced: What lay at `new` and was replaced, where the model was optimized in place.
        force: Replace a config.json that is there already.

    Returns:
        A sentence for each configuration that is left and may be of another model.

    Raises:
        ModelError: As of `carry`.
    """
    beside = new.parent / CONFIG
    if replaced is not None:
        recount(new, since=replaced)
    elif not (old.parent / CONFIG).is_file():
        return []
    elif new.parent.resolve() == old.parent.resolve():
        if (layers := kept_layers(load(new), load(old))) is not None:
            return [
                f"{beside} counts the {layers.of} layers of {old.name}, {new.name} has {len(layers.kept)}: give an "
                "output in a folder of its own, which gets a configuration that says so."
            ]
    elif force or not beside.exists():
        carry(old, new)  # An exported folder stays one that other runtimes can load.
    else:
        return [
            f"{beside} was there and is left as it is, and so are the other files beside it; --force replaces them."
        ]
    return []


def make_readable(folder: Path, *, dtype: str | None = None) -> None:
    """Let transformers 4 and 5 read alike what one of them wrote into a folder: config.json and tokenizer_config.json.

    A file that needs nothing keeps its bytes.

    Raises:
        ModelError: One of them can't be read or written, or isn't JSON.
    """
    _rewrite(folder / CONFIG, lambda config: readable_config(config, dtype))
    _rewrite(folder / "tokenizer_config.json", readable_tokenizer_config)


def readable_config(config: dict[str, Any], dtype: str | None = None) -> dict[str, Any]:
    """A config.json, of a model and the models within it, with the names of transformers 4 beside those of 5."""
    found = {key: readable_config(value, dtype) if _is_config(key, value) else value for key, value in config.items()}
    kind = dtype or found.get("dtype") or found.get("torch_dtype")
    if kind is not None and ("dtype" in found or "torch_dtype" in found or dtype is not None):
        found |= {name: kind for name in ("dtype", "torch_dtype") if name in found or name == "torch_dtype"}
    rope = found.get("rope_parameters")
    # Where every kind of layer has a rotation of its own, version 4 has no common name for them.
    if isinstance(rope, dict) and isinstance(rope.get("rope_theta"), int | float):
        found.setdefault("rope_theta", rope["rope_theta"])
        if rope.get("rope_type", "default") != "default":
            found.setdefault("rope_scaling", {key: value for key, value in rope.items() if key != "rope_theta"})
        if "partial_rotary_factor" in rope:
            found.setdefault("partial_rotary_factor", rope["partial_rotary_factor"])
    return found


def readable_tokenizer_config(config: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json in the names that transformers 4 and 5 have in common."""
    found = dict(config)
    if found.get("tokenizer_class") == "TokenizersBackend":
        found["tokenizer_class"] = "PreTrainedTokenizerFast"
        # Else version 4 gives token_type_ids too, which decoders don't take.
        found.setdefault("model_input_names", ["input_ids", "attention_mask"])
    if isinstance(found.get("extra_special_tokens"), list):
        extra = found.pop("extra_special_tokens")
        found.setdefault("additional_special_tokens", extra)
    return found


def _is_config(key: str, value: Any) -> bool:
    return key.endswith("_config") and isinstance(value, dict) and "model_type" in value


def _rewrite(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    if not path.is_file():
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} can't be read: {error}") from error
    if not isinstance(before, dict):
        raise ModelError(f"{path} holds no JSON object")
    after = change(before)
    if after == before:
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(after, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ModelError(f"{path} can't be written: {error.strerror or error}") from error
