"""Modules whose parameters take no memory: for tracing, which reads shapes and types of parameters but no numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from graphopt.export.dependencies import quiet, require
from graphopt.export.weights import Weights


def without_weights(make: Callable[[Any], Any], dtype: str = "float32") -> Any:
    """The torch module that `make` makes for this torch dtype, in eval mode, its parameters not filled.

    A parameter's memory is asked of the system but never touched, so it isn't given: a module of 70 billion parameters
    takes a few megabytes. Buffers, such as the frequencies of a rotary embedding, are computed as ever.
    """
    with quiet(), _nothing_filled():
        module = make(getattr(require("torch"), dtype))
    return module.eval().requires_grad_(False)


def untie(module: Any, names: Iterable[str]) -> None:
    """Give each of these parameters numbers of its own, where the module has one object for several names."""
    torch = require("torch")
    for name in names:
        holder, _, leaf = name.rpartition(".")
        part = module.get_submodule(holder)
        setattr(part, leaf, torch.nn.Parameter(torch.empty_like(getattr(part, leaf)), requires_grad=False))


def compute(module: Any, weights: Weights) -> frozenset[str]:
    """Fill the parameters that no checkpoint holds because the module's class computes them (sinusoids of positions).

    These are the ones that transformers neither saves nor misses.

    Returns:
        Their names.
    """
    unsaved = getattr(module, "_keys_to_ignore_on_save", None) or ()
    given = set(weights.names())
    found = frozenset(name for name, _ in module.named_parameters() if name in set(unsaved) and name not in given)
    with require("torch").no_grad():
        for name in found:
            module._init_weights(module.get_submodule(name.rpartition(".")[0]))
    return found


@contextlib.contextmanager
def _nothing_filled() -> Iterator[None]:
    """Without the functions that fill parameters: torch's, and those that a transformers model calls at the end."""
    torch, transformers = require("torch"), require("transformers")
    init = torch.nn.init
    saved = {name: getattr(init, name) for name in dir(init) if name.endswith("_") and not name.startswith("_")}
    weights = transformers.PreTrainedModel.init_weights
    for name in saved:
        setattr(init, name, lambda tensor, *_, **__: tensor)
    transformers.PreTrainedModel.init_weights = lambda self: self.tie_weights()
    try:
        yield
    finally:
        for name, function in saved.items():
            setattr(init, name, function)
        transformers.PreTrainedModel.init_weights = weights
