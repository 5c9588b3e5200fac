"""A GGUF file as the source of an export: configuration, weights, and the files that belong beside the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphopt.errors import first_line
from graphopt.export.dependencies import quiet, require
from graphopt.export.gguf.config import configuration
from graphopt.export.gguf.names import model_class
from graphopt.export.gguf.reader import GGUFFile, read
from graphopt.export.gguf.weights import GGUFWeights


@dataclass(frozen=True)
class GGUFModel:
    """A model in a GGUF file.

    Attributes:
        config: The transformers configuration; its `architectures` names the class.
        model_class: The transformers class.
        weights: Its parameters.
        write_companions: Writes config.json, generation_config.json and the tokenizer's files into an existing folder;
            returns them, and what a user should know of them.
    """

    config: Any
    model_class: Any
    weights: GGUFWeights
    write_companions: Callable[[Path], tuple[list[Path], list[str]]]


def from_gguf(path: str | Path) -> GGUFModel:
    """The model in a GGUF file, of which nothing but the header is read.

    Raises:
        UsageError: No file, a part of a split one, or a type or an architecture that can't be exported.
        ModelError: Not GGUF, damaged, truncated, or without all of the model's parameters.
    """
    require("torch")
    file = read(Path(path).expanduser())
    config = configuration(file)
    found = model_class(file, config)
    config.architectures = [found.__name__]
    return GGUFModel(config, found, GGUFWeights(file, config, found), lambda folder: _write(file, config, folder))


def _write(file: GGUFFile, config: Any, folder: Path) -> tuple[list[Path], list[str]]:
    transformers = require("transformers")
    notes: list[str] = []
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    with quiet():
        config.save_pretrained(folder)
        ids = {f"{kind}_token_id": getattr(config, f"{kind}_token_id", None) for kind in ("bos", "eos", "pad")}
        transformers.GenerationConfig(**ids).save_pretrained(folder)
        if "tokenizer.ggml.model" not in file.metadata:
            notes.append(f"{file.path.name} holds no tokenizer, so none is beside the model")
        else:
            try:
                tokenizer = transformers.AutoTokenizer.from_pretrained(file.path.parent, gguf_file=file.path.name)
                tokenizer.save_pretrained(folder)
            except Exception as error:
                notes.append(f"the tokenizer of {file.path.name} can't be written: {first_line(error)}")
    return sorted(p for p in folder.iterdir() if before.get(p) != p.stat().st_mtime_ns), notes
