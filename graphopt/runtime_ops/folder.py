"""A folder that holds a decoder: which file is the model, and which tokens end a text."""

from __future__ import annotations

import json
from pathlib import Path

from graphopt.errors import ModelError

_SOURCES = ("generation_config.json", "config.json")


def model_file(path: Path) -> Path:
    """The model of a folder, model.onnx or the only .onnx file in it; `path` itself where it is no folder.

    Raises:
        ModelError: The folder holds no model, or several of which none is called model.onnx.
    """
    if not path.is_dir():
        return path
    if (named := path / "model.onnx").is_file():
        return named
    found = sorted(path.glob("*.onnx"))
    if len(found) != 1:
        what = ", ".join(file.name for file in found[:3]) + ", ..." if found else "no .onnx file"
        raise ModelError(f"{path} holds {what} and no model.onnx; give the file.")
    return found[0]


def stop_tokens(model: Path) -> tuple[int, ...]:
    """The tokens that end a text, as generation_config.json or else config.json beside a model says; empty where
    neither does.

    Raises:
        ModelError: One of them isn't JSON.
    """
    for name in _SOURCES:
        path = model.parent / name
        if not path.is_file():
            continue
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(f"{path}, which says where a text ends, can't be read: {error}.") from error
        value = data.get("eos_token_id") if isinstance(data, dict) else None
        ids = value if isinstance(value, list) else [value]
        if found := tuple(token for token in ids if isinstance(token, int)):
            return found
    return ()
