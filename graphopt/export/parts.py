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


def without(module: Any, part: Any) -> Any:
    """A module that holds all of `module` but `part`; the module itself where that would be nothing.

    The holders along the way to the part are new and can't be called: a caller calls the module, and gives the result
    of this to those who look for parameters.
    """
    torch = require("torch")
    path = path_of(module, part)
    if not path:
        return module
    root = holder = torch.nn.Module()
    names = path.split(".")
    for place, name in enumerate(names):
        for table in ("_modules", "_parameters", "_buffers"):
            getattr(holder, table).update({key: held for key, held in getattr(module, table).items() if key != name})
        if place < len(names) - 1:
            module = module._modules[name]
            inner = torch.nn.Module()
            holder.add_module(name, inner)
            holder = inner
    return root.eval()
