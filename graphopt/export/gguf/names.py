"""From the tensors of a GGUF file to the parameters of a transformers module, by transformers' own tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt.errors import ModelError, UsageError, first_line
from graphopt.export.dependencies import quiet, require
from graphopt.export.gguf.config import POSITIONS
from graphopt.export.gguf.reader import GGUFFile, StoredTensor

_UNUSED = ("rope_freqs", "rope_factors", "rot_embd", "nextn")
"""Parts of the names of tensors that a module needs not take: the configuration says them, or they are of a head that
predicts more than one token."""


@dataclass(frozen=True)
class Parameter:
    """A parameter and what it is made of.

    Attributes:
        name: Its name in the module.
        shape: Its dimensions there.
        stored: The tensors of the file that it is made of.
    """

    name: str
    shape: tuple[int, ...]
    stored: tuple[StoredTensor, ...]


class Processor:
    """Undoes what llama.cpp's converter does to tensors, by transformers' processor of the architecture.

    Args:
        file: The file.
        config: Its configuration.
    """

    def __init__(self, file: GGUFFile, config: Any) -> None:
        gguf = require("transformers.modeling_gguf_pytorch_utils")
        kind = gguf.TENSOR_PROCESSORS.get(file.architecture, gguf.TensorProcessor)
        # The processors read GGUF's own names of settings, which the attribute map of a configuration doesn't list.
        settings = {**config.to_dict(), **{k: getattr(config, k) for k in config.attribute_map}}
        self.inner = kind(config=settings)

    def apply(
        self, parameter: Parameter, values: list[npt.NDArray[np.float32]], names: dict[str, str]
    ) -> npt.NDArray[np.float32]:
        """The parameter, made of the values of its stored tensors."""
        parsed: dict[str, dict[str, Any]] = {"tensors": {}}
        result: npt.NDArray[np.float32] | None = None
        for stored, array in zip(parameter.stored, values, strict=True):
            made = self.inner.process(
                weights=array, name=stored.name, tensor_key_mapping=names, parsed_parameters=parsed
            )
            if made.name is not None:
                result = made.weights
        if result is None:  # The processor put it there itself, out of several tensors.
            result = parsed["tensors"][parameter.name].numpy()
        return np.ascontiguousarray(result, dtype=np.float32).reshape(parameter.shape)

    def rows(self, parameter: Parameter) -> npt.NDArray[np.int64] | None:
        """Which stored row each row of the parameter is; None where it isn't a stored tensor with its rows in an order.

        The processor is asked: it is given the number of each row in place of its values.
        """
        if len(parameter.stored) != 1 or len(parameter.shape) != 2 or parameter.stored[0].shape != parameter.shape:
            return None
        stored = parameter.stored[0]
        numbers = np.arange(stored.rows, dtype=np.int64)
        probe = np.stack([numbers, numbers], axis=1)
        try:
            with np.errstate(all="ignore"):
                made = self.inner.process(
                    weights=probe, name=stored.name, tensor_key_mapping={}, parsed_parameters={"tensors": {}}
                )
        except (ValueError, KeyError):
            return None
        found = np.asarray(made.weights)
        if made.name is None or found.shape != probe.shape or not np.array_equal(np.sort(found[:, 0]), numbers):
            return None
        return found[:, 0].astype(np.int64)


class _Names:
    """Stands in for a module where transformers only asks for its names.

    Its function walks down every submodule and makes the whole table for each (5 s for 30 layers); the names of the
    module itself, and of the one that its class is named after, are enough.
    """

    def __init__(self, module: Any, keys: list[str], below: bool) -> None:
        self.config = module.config
        self._module, self._keys, self._below = module, keys, below

    def state_dict(self) -> list[str]:
        return self._keys

    def named_children(self) -> list[tuple[str, _Names]]:
        prefix = self._module.base_model_prefix if self._below else ""
        keys = [k.removeprefix(f"{prefix}.") for k in self._keys if prefix and k.startswith(f"{prefix}.")]
        return [(prefix, _Names(self._module, keys, False))] if keys else []


def skeleton(model_class: Any, config: Any) -> Any:
    """The module without weights."""
    torch = require("torch")
    with torch.device("meta"), quiet():
        return model_class._from_config(config)


def names(module: Any, processor: Processor) -> dict[str, str]:
    """The module's name for each name of a tensor in a file."""
    gguf = require("transformers.modeling_gguf_pytorch_utils")
    found: dict[str, str] = gguf.get_gguf_hf_weights_map(
        _Names(module, list(module.state_dict()), True), processor.inner
    )
    return found


def parameters(file: GGUFFile, module: Any, processor: Processor, table: dict[str, str]) -> dict[str, Parameter]:
    """The parameters that the file gives, by name.

    Raises:
        ModelError: A parameter is missing, or has another size.
        UsageError: The file has tensors for which the module has no place.
    """
    label = type(module).__name__
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    sources: dict[str, list[StoredTensor]] = {}
    unplaced = []
    for stored in file.tensors.values():
        name = table.get(stored.name)
        if name is not None and name in shapes:
            sources.setdefault(name, []).append(stored)
        elif stored.name not in POSITIONS and not any(part in stored.name for part in _UNUSED):
            unplaced.append(stored.name)
    if unplaced:
        raise UsageError(
            f"{file.path} has {len(unplaced)} tensors for which {label} has no place ({', '.join(unplaced[:3])}); "
            "export the model's safetensors instead"
        )
    found = {name: Parameter(name, shapes[name], tuple(stored)) for name, stored in sources.items()}
    tied = set(_tied(module))
    missing = [name for name, _ in module.named_parameters() if name not in found and name not in tied]
    if missing:
        stored_as = {v: k for k, v in table.items()}
        some = ", ".join(f"{stored_as.get(name, '?')} for {name}" for name in missing[:3])
        raise ModelError(f"{file.path} has no tensor for {len(missing)} parameters of {label} ({some})")
    for parameter in found.values():
        size = sum(int(np.prod(s.shape)) for s in parameter.stored)
        if size != int(np.prod(parameter.shape)):
            stored = parameter.stored[0]
            raise ModelError(
                f"{file.path}: {stored.name} has the dimensions {list(stored.shape)}, where {parameter.name} of "
                f"{label} has {list(parameter.shape)}"
            )
    return found


def _tied(module: Any) -> list[str]:
    """Names of parameters that are another parameter: those that a module lists once have several names."""
    if not module.config.get_text_config().tie_word_embeddings:
        return []
    return list(getattr(module, "all_tied_weights_keys", None) or module._tied_weights_keys or [])


def model_class(file: GGUFFile, config: Any) -> Any:
    """The class of the model: what generates text where there is such a class for the configuration.

    Raises:
        UsageError: transformers has none.
    """
    auto = require("transformers.models.auto.modeling_auto")
    try:
        with quiet():
            for mapping in (auto.MODEL_FOR_CAUSAL_LM_MAPPING, auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING):
                if type(config) in mapping:
                    return mapping[type(config)]
            return auto.MODEL_MAPPING[type(config)]
    except Exception as error:
        raise UsageError(
            f"{file.path}: transformers has no model for {file.architecture}: {first_line(error)}"
        ) from error
