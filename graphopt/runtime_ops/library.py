"""The library with graphopt's kernels: where it is, and which nodes it runs."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import onnx_ir as ir

from graphopt.runtime_ops.operator import DOMAIN, uses

CUDA_ENTRY = "graphopt.cuda"
"""The session configuration entry that offers the CUDA kernels ("1")."""
REGISTERED_ENTRY = "graphopt.registered"
"""The entry by which the library says that session options hold it ("1")."""

_NAME = {"win32": "graphopt_ops.dll", "darwin": "libgraphopt_ops.dylib"}.get(sys.platform, "libgraphopt_ops.so")


def library_path() -> Path | None:
    """Where the library with the kernels is; None: it wasn't built, and portable bodies serve.

    The environment variable GRAPHOPT_LIBRARY names another one; empty: none.
    """
    if (given := os.environ.get("GRAPHOPT_LIBRARY")) is not None:
        return Path(given) if given else None
    # An editable installation has the sources in one place and what was built in another; the last build counts.
    import graphopt.runtime_ops as package

    found = [path for folder in package.__path__ if (path := Path(folder) / _NAME).is_file()]
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)


@functools.cache
def kernels(path: Path) -> frozenset[tuple[str, str, tuple[int, ...]]]:
    """The kernels of the library at `path`: operator, execution provider, ONNX types of the inputs.

    Raises:
        OSError: It can't be loaded.
    """
    library = ctypes.CDLL(os.fspath(path))
    library.graphopt_kernels.restype = ctypes.c_char_p
    found = set()
    for line in library.graphopt_kernels().decode().splitlines():
        name, provider, *types = line.split()
        found.add((name, provider, tuple(int(t) for t in types[: types.index(">")])))
    return frozenset(found)


def offered() -> dict[str, list[str]]:
    """The operators that the library has kernels for, by execution provider; empty where there is no library.

    Raises:
        OSError: It can't be loaded.
    """
    path = library_path()
    found: dict[str, set[str]] = {}
    for name, provider, _ in kernels(path) if path is not None else ():
        found.setdefault(provider, set()).add(name)
    return {provider: sorted(names) for provider, names in sorted(found.items())}


def described() -> str:
    """In one line, what the library has, or why there is none, for whoever wonders how fast a model runs."""
    path = library_path()
    if path is None:
        return (
            "own operators: portable bodies, which are slower than kernels, because the library with those wasn't "
            "built; it needs a C++ compiler when graphopt is installed (`pip install -v` shows what was missing)"
        )
    try:
        names = [f"{len(names)} on {p.removesuffix('ExecutionProvider')}" for p, names in offered().items()]
    except OSError as error:
        return f"own operators: portable bodies, because the library can't be loaded: {error}"
    return f"own operators: kernels for {', '.join(names)}, in {path}"


def mentioned(path: Path, what: str = DOMAIN) -> bool:
    """Whether a model file may use operators of graphopt's, or another one, found without loading it."""
    if path.stat().st_size == 0:
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.rfind(what.encode()) >= 0


def without_kernel(model: ir.Model, path: Path, providers: Iterable[str]) -> ir.Node | None:
    """The first node of a model that can't run where the library at `path` is registered; None: all can.

    With the library registered, ONNX Runtime no longer takes the body of an operator that the library has kernels for,
    so one node of other types than those of the kernels means that bodies must serve everywhere. An operator that the
    library doesn't know keeps its body. A type that the file doesn't tell counts as one that fits.
    """
    provided = set(providers) | {"CPUExecutionProvider"}
    known: dict[str, list[tuple[int, ...]]] = {}
    for name, provider, wanted in kernels(path):
        if provider in provided:
            known.setdefault(name, []).append(wanted)
    for node in uses(model):
        types = [int(v.dtype) if v is not None and v.dtype is not None else None for v in node.inputs]
        if node.op_type in known and not any(_fits(types, wanted) for wanted in known[node.op_type]):
            return node
    return None


def _fits(types: list[int | None], wanted: tuple[int, ...]) -> bool:
    return len(types) <= len(wanted) and all(t in (None, w) for t, w in zip(types, wanted, strict=False))
