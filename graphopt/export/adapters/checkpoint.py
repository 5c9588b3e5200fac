"""An adapter as peft saves it: a folder with adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from graphopt.errors import ModelError, UsageError, first_line
from graphopt.export.adapters.formulas import Method, method_of
from graphopt.export.adapters.site import Array
from graphopt.export.dependencies import require

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
TOKENS = "trainable_tokens_delta"
"""Rows of an embedding, which stand beside every method."""
WRAPPED = "#"
"""Stands before the depth of a wrapper that isn't the outermost one of its module."""
_INSIDE = ("base_layer", "token_adapter", "modules_to_save", "original_module")
"""Parts of a key that peft's wrappers put between the module and its parameter."""


class Named(dict[str, Any]):
    """A dictionary that says in a sentence what it lacks."""

    def __init__(self, found: Mapping[str, Any], lacks: str, of: str = "") -> None:
        super().__init__(found)
        self._lacks, self._of = lacks, of

    def __missing__(self, key: str) -> Any:
        raise UsageError(f"{self._lacks} {key}{self._of}")


class Adapter:
    """One adapter, read lazily: opening it reads the configuration and the names and shapes of the tensors.

    Attributes:
        folder: Where it lies.
        config: adapter_config.json.
        method: What its tensors mean.
        modules: For each module that it changes the keys of its tensors by their name in the method.
        replaced: Keys of whole parameters (modules that were trained in full, biases) by the parameter's name.
        common: Keys of the tensors that all modules share, by name.
        shapes: Shape of every tensor by key.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open the adapter in `folder`.

        Raises:
            UsageError: No adapter folder, or one that can't be merged; the message says why.
            ModelError: A broken file.
        """
        self.folder = Path(folder)
        self.config = _config(self.folder)
        self.method: Method = method_of(self.config, self.folder)
        self.path = self.folder / WEIGHTS
        if not self.path.is_file():
            hint = (
                f" (it has {PICKLED}, which can run any code when it is read; save the adapter again with "
                "safe_serialization=True)"
                if (self.folder / PICKLED).is_file()
                else ""
            )
            raise UsageError(f"{self.folder} has no {WEIGHTS}{hint}")
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._types: dict[str, str] = {}
        try:
            with require("safetensors").safe_open(str(self.path), framework="numpy") as file:
                for key in file.keys():  # noqa: SIM118 (the file isn't a mapping)
                    part = file.get_slice(key)
                    self.shapes[key], self._types[key] = tuple(part.get_shape()), part.get_dtype()
        except UsageError:
            raise
        except Exception as error:
            raise ModelError(f"{self.path} is truncated or no safetensors file: {first_line(error)}") from error
        self.modules: dict[str, dict[str, str]] = {}
        self.replaced: dict[str, str] = {}
        self.common: dict[str, str] = {}
        for key in self.shapes:
            self._place(key)
        if not self.modules and not self.replaced:
            raise UsageError(f"{self.path} holds no tensor of a {self.config['peft_type']} adapter")

    def array(self, key: str) -> Array:
        """The numbers of a tensor: float32 where they are floating-point, otherwise as they are stored.

        Raises:
            ModelError: They can't be read, or some are NaN or infinite.
        """
        stored = self._types[key]
        try:
            if stored in _NATIVE:
                with require("safetensors").safe_open(str(self.path), framework="numpy") as file:
                    found = file.get_tensor(key)
            else:  # NumPy's own types are all that safetensors gives without torch.
                with require("safetensors").safe_open(str(self.path), framework="pt") as file:
                    tensor = file.get_tensor(key)
                if stored == "BF16":
                    found = tensor.view(require("torch").int16).numpy().view(ml_dtypes.bfloat16)
                else:
                    found = tensor.float().numpy()
        except UsageError:
            raise
        except Exception as error:
            raise ModelError(f"{self.path}: {key} can't be read: {first_line(error)}") from error
        if stored not in _FLOATING:
            return np.asarray(found)
        array = np.asarray(found, np.float32)
        if not np.isfinite(array).all() and not self.method.infinite:
            raise ModelError(f"{self.path}: {key} has values that are NaN or infinite, so the adapter is broken")
        return array

    @functools.lru_cache(maxsize=8)  # noqa: B019 (an adapter lives as long as the export that reads it)
    def shared(self, name: str) -> Array:
        """The numbers of a tensor that all modules share.

        Raises:
            UsageError: The adapter was saved without it.
        """
        if name not in self.common:
            raise UsageError(
                f"{self.path} has no {name}, which all modules share; save the adapter again with everything in it "
                "(save_projection=True, save_indices=True)"
            )
        return self.array(self.common[name])

    def _place(self, key: str) -> None:
        inner = key.removeprefix("base_model.model.")
        parts = inner.split(".")
        marked = [i for i, part in enumerate(parts) if part.startswith((*self.method.markers, TOKENS))]
        if not marked:
            kept = [part for part in parts if part not in _INSIDE]
            self.replaced[".".join(kept)] = key
            return
        first = marked[-1] if parts[marked[-1]].startswith(TOKENS) else marked[0]
        name = ".".join(parts[first:])
        if inner == key and key.startswith("base_model."):
            self.common[".".join(parts[1:])] = key
            return
        module = ".".join(part for part in parts[:first] if part not in _INSIDE)
        if name.startswith("ln_tuning_layers."):  # a norm's parameters, whole
            self.replaced[f"{module}.{parts[-1]}"] = key
            return
        depth = 0
        while self.config.get("target_parameters") and depth < first and parts[first - 1 - depth] == "base_layer":
            depth += 1
        module += f"{WRAPPED}{depth}" if depth else ""
        name = name.removesuffix(".weight").replace("bone_block", "miss_block")  # as MiSS was called first
        self.modules.setdefault(module, {})[name] = key


_NATIVE = {"F64", "F32", "F16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"}
_FLOATING = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}


def _config(folder: Path) -> Named:
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder} with an adapter")
    path = folder / CONFIG
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"{folder} is no adapter: it has no {CONFIG}") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} can't be read: {first_line(error)}") from error
    if not isinstance(found, dict) or not isinstance(found.get("peft_type"), str):
        raise ModelError(f"{path} doesn't say the adapter's peft_type")
    return Named(found, f"{path} lacks")
