"""Which passes there are: those of this package, and those that other packages offer.

A pass of this package is found because its file lies in a family's folder; another package offers its passes as entry
points of the group `graphopt.passes` (name = "module:Class"). Any `onnx_ir` pass can be named as "module:Class".
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.metadata
import pkgutil
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

import graphopt.passes
from graphopt.errors import UsageError
from graphopt.passes.base import Pass

ENTRY_POINTS = "graphopt.passes"


@functools.cache
def builtin() -> dict[str, type[Pass]]:
    """The passes of this package by name, sorted."""
    found: dict[str, type[Pass]] = {}
    for info in pkgutil.walk_packages(graphopt.passes.__path__, "graphopt.passes."):
        module = importlib.import_module(info.name)
        for thing in vars(module).values():
            if isinstance(thing, type) and issubclass(thing, Pass) and thing.__module__ == module.__name__:
                name = getattr(thing, "name", None)
                if isinstance(name, str):
                    found[name] = thing
    return dict(sorted(found.items()))


@functools.cache
def offered() -> dict[str, importlib.metadata.EntryPoint]:
    """The passes that other packages offer, by name."""
    return {entry.name: entry for entry in importlib.metadata.entry_points(group=ENTRY_POINTS)}


def names() -> list[str]:
    """All names that `make` knows."""
    return sorted({*builtin(), *offered()})


def find(name: str) -> type[ir.passes.PassBase]:
    """The class of the pass called `name`.

    Raises:
        UsageError: There is none; the message suggests near names.
    """
    if name in builtin():
        return builtin()[name]
    try:
        if name in offered():
            loaded = offered()[name].load()
        elif ":" in name:
            module, _, attribute = name.partition(":")
            loaded = getattr(importlib.import_module(module), attribute)
        else:
            near = difflib.get_close_matches(name, names(), n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else "; `graphopt passes` lists them."
            raise UsageError(f"There is no pass {name!r}{hint}")
    except (ImportError, AttributeError) as error:
        raise UsageError(f"The pass {name!r} can't be loaded: {error}.") from error
    if not (isinstance(loaded, type) and issubclass(loaded, ir.passes.PassBase)):
        raise UsageError(f"{name!r} is not an onnx_ir pass.")
    return loaded


def make(name: str, options: Mapping[str, Any] | None = None) -> ir.passes.PassBase:
    """An instance of the pass called `name` with these options.

    Raises:
        UsageError: No such pass, no such option, or a value that the pass refuses.
    """
    cls = find(name)
    options = {key.replace("-", "_"): value for key, value in (options or {}).items()}
    if issubclass(cls, Pass):
        known = cls.options()
        for key in options:
            if key not in known:
                raise UsageError(
                    f"The pass {name!r} has no option {key!r}; it has {', '.join(known) if known else 'none'}."
                )
            if not _fits(options[key], str(known[key].annotation)):
                kind = str(known[key].annotation).replace(" | ", " or ")
                raise UsageError(f"The option {key!r} of the pass {name!r} must be {kind}, not {options[key]!r}.")
    try:
        return cls(**options)
    except (TypeError, ValueError) as error:
        raise UsageError(f"The pass {name!r} can't be made with these options: {error}.") from error


def _fits(value: Any, annotation: str) -> bool:
    """Whether a value from YAML is of an option's type; where the type is none of YAML's, the pass itself judges."""
    kinds: dict[str, tuple[type, ...]] = {
        "int": (int,), "float": (int, float), "bool": (bool,), "str": (str,), "None": (type(None),)
    }  # fmt: skip
    allowed = [kind.strip() for kind in annotation.split("|")]
    if not set(allowed) <= set(kinds):
        return True
    if isinstance(value, bool):  # which Python counts among the integers
        return "bool" in allowed
    return any(isinstance(value, kinds[kind]) for kind in allowed)
