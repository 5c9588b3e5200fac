"""A module with some of its parts only, each under the name that it has in the whole.

A graph made of a part has weights called as the checkpoint calls them, and a search for layers finds those that run.
"""

from __future__ import annotations

from typing import Any

from graphopt.export.dependencies import require


def path_of(module: Any, part: Any) -> str:
    """The name of a part in a module; empty: it's the module itself.

    Raises:
        ValueError: It's no part of it.
    """
    for name, found in module.named_modules():
        if found is part:
            return str(name)
    raise ValueError(f"{type(part).__name__} is no part of {type(module).__name__}")


def only(module: Any, part: Any) -> Any:
    """A module that holds nothing but `part`, in its place; the module itself where it is all of it."""
    torch = require("torch")
    path = path_of(module, part)
    if not path:
        return module
    for name in reversed(path.split(".")):
        holder = torch.nn.Module()
        holder.add_module(name, part)
        part = holder
    return part.eval()


def without(module: Any, *parts: Any) -> Any:
    """A module that holds all of `module` but these parts; the module itself where that would be nothing.

    The holders along the way to a part are new and can't be called: a caller calls the module, and gives the result of
    this to those who look for parameters.
    """
    paths = [path_of(module, part) for part in parts]
    return _without(module, set(paths), "") if all(paths) and paths else module


def _without(module: Any, paths: set[str], here: str) -> Any:
    holder = require("torch").nn.Module().eval()
    holder._parameters.update(module._parameters)
    holder._buffers.update(module._buffers)
    for name, part in module._modules.items():
        path = f"{here}{name}"
        if path in paths:
            continue
        on_the_way = any(other.startswith(f"{path}.") for other in paths)
        holder._modules[name] = _without(part, paths, f"{path}.") if on_the_way else part
    return holder
