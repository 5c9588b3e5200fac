"""Modules whose parameters take no memory: for tracing, which reads shapes and types of parameters but no numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from graphopt.export.dependencies import quiet, require


def without_weights(make: Callable[[], Any], dtype: str = "float32") -> Any:
    """The torch module that `make` makes, in eval mode, its parameters of this type and not filled.

    A parameter's memory is asked of the system but never touched, so it isn't given: a module of 70 billion parameters
    takes a few megabytes. Buffers, such as the frequencies of a rotary embedding, are computed as ever.
    """
    torch = require("torch")
    before = torch.get_default_dtype()
    with quiet(), _nothing_filled():
        torch.set_default_dtype(getattr(torch, dtype))
        try:
            module = make()
        finally:
            torch.set_default_dtype(before)
    return module.eval().requires_grad_(False)


def untie(module: Any, names: Iterable[str]) -> None:
    """Give each of these parameters numbers of its own, where the module has one object for several names."""
    torch = require("torch")
    for name in names:
        holder, _, leaf = name.rpartition(".")
        part = module.get_submodule(holder)
        setattr(part, leaf, torch.nn.Parameter(torch.empty_like(getattr(part, leaf)), requires_grad=False))


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
