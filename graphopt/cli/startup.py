"""What makes the command quick to start and to end; for a process of ours alone, so never done by `import graphopt`."""

from __future__ import annotations

import atexit
import gc
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

POSTPONED = frozenset({"sympy", "onnx_ir._symbolic_shapes"})
"""Imported by onnx_ir (1.1) for arithmetic on its symbolic dimensions, of which graphopt uses none: 0.25 s of CPU time
and 20 MB. The second is the module of onnx_ir's that looks into the first as soon as it is imported."""
NEW_OBJECTS = 50_000
"""How many objects are made between two garbage collections. A graph is many objects that all live on, and looking
through them every 700 objects, as Python does, takes an eighth of the time of a run."""


class _Postponing(importlib.abc.MetaPathFinder):
    """Finds the postponed modules as ones that load at the first look inside."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in POSTPONED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = importlib.util.LazyLoader(spec.loader)
        return spec


def prepare() -> None:
    """Postpone what is seldom needed, and collect garbage less often, and not at the end."""
    if any(isinstance(finder, _Postponing) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Postponing())
    gc.set_threshold(NEW_OBJECTS, 20, 20)
    atexit.register(gc.freeze)  # a process that ends needn't look through its graphs for garbage: 0.1 s
