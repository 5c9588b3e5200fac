"""A folder with all that a program needs to run a model: `graphopt package`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir

import graphopt
from graphopt.errors import ModelError, UsageError
from graphopt.export.genai import FILE as GENAI
from graphopt.export.packaging import copy_companions, describe_layers
from graphopt.export.serving_readme import Served, readme
from graphopt.graph.assumptions import listed
from graphopt.graph.assumptions import read as read_assumptions
from graphopt.graph.load import load
from graphopt.graph.save import save
from graphopt.graph.session_settings import read as read_settings
from graphopt.runtime_ops.folder import model_file
from graphopt.runtime_ops.library import kernels, library_path, without_kernel
from graphopt.runtime_ops.operator import uses

MODEL = "model.onnx"
DESCRIPTION = "graphopt.json"
"""The file that says what is in the folder, and marks it as one that graphopt made."""
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


@dataclasses.dataclass(frozen=True)
class Package:
    """A packaged model.

    Attributes:
        folder: Where it is.
        files: Its files, relative to the folder.
        library: The file of the library with graphopt's kernels; None: it isn't there.
        note: Why the library isn't there, or an empty string.
        left: A sentence for each file beside the model that isn't in the folder, though it might be expected.
    """

    folder: Path
    files: tuple[str, ...]
    library: str | None
    note: str
    left: tuple[str, ...] = ()


def package(path: str | os.PathLike[str], folder: str | os.PathLike[str], *, force: bool = False) -> Package:
    """Put a model, its weights, what lies beside it, and the library with its operators' kernels into one folder.

    A README.md in the folder has the lines of Python, C++ and C# that open the model with ONNX Runtime alone, and
    graphopt.json says the same for programs. The folder appears whole or not at all.

    Args:
        path: The .onnx file, or a folder with one; it stays as it is.
        folder: What is made; it must not exist, or be empty.
        force: Replace a folder that an earlier package made.

    Raises:
        UsageError: The folder exists, or the model lies in it.
        ModelError: The model can't be read, the folder can't be written, or the library can't be loaded.
    """
    source, target = model_file(Path(path)), Path(folder)
    model = load(source)
    _require_free(target, source, force)
    library, note = _library(model)
    try:
        with _made_beside(target) as made:
            left = _fill(made, model, source, library)
            files = sorted(file.name for file in made.iterdir())
            _describe(made, model, source, library, note, [*files, "README.md", DESCRIPTION])
    except OSError as error:
        raise ModelError(f"{target} couldn't be written: {error.strerror or error}; nothing was changed.") from error
    names = tuple(sorted(file.name for file in target.iterdir()))
    return Package(target, names, None if library is None else library.name, note, left)


def _require_free(target: Path, source: Path, force: bool) -> None:
    """See `package`."""
    if not target.exists():
        return
    if not target.is_dir():
        raise UsageError(f"{target} is a file; give the name of a folder.")
    if target.resolve() in source.resolve().parents:
        raise UsageError(f"{source} lies in {target}; give another folder.")
    there = {file.name for file in target.iterdir()}
    if there and not force:
        raise UsageError(f"{target} exists; give another folder, or --force to replace a package.")
    try:
        known = set(json.loads((target / DESCRIPTION).read_text(encoding="utf-8"))["files"]) if there else set()
    except (OSError, ValueError, LookupError, TypeError):
        known = set()
    if strange := sorted(there - known):
        raise UsageError(f"{target} holds {strange[0]}, which is of no package; give another folder.")


def _library(model: ir.Model) -> tuple[Path | None, str]:
    """The library, if it is of use to the model, or why it isn't."""
    if not uses(model):
        return None, "the model has no operators of graphopt's"
    library = library_path()
    if library is None:
        return None, "the library with graphopt's kernels wasn't built"
    try:
        if (node := without_kernel(model, library, [CPU, CUDA])) is not None:
            return None, f"it has no kernel for {node.op_type} {node.name!r} with its types"
    except OSError as error:
        raise ModelError(f"{library} can't be loaded: {error}") from error
    return library, ""


def _fill(made: Path, model: ir.Model, source: Path, library: Path | None) -> tuple[str, ...]:
    """Everything but what describes it; returns `Package.left`."""
    save(model, made / MODEL)
    copy_companions(source.parent, made)
    describe_layers(made, model)
    if library is not None:
        shutil.copyfile(library, made / library.name)
    if (described := source.parent / GENAI).is_file():
        try:
            genai = _genai(json.loads(described.read_text(encoding="utf-8")), source.name, library)
        except ValueError as error:
            raise ModelError(f"{described} can't be read: {error}") from error
        if genai is None:
            return (f"{described} is of another file than {source.name}, and isn't in the package",)
        (made / GENAI).write_text(json.dumps(genai, indent=2) + "\n", encoding="utf-8")
    return ()


def _genai(described: Any, name: str, library: Path | None) -> Any:
    """genai_config.json of the packaged model; None: the one at hand is of another model."""
    try:
        decoder = described["model"]["decoder"]
        if decoder["filename"] != name:
            return None
        decoder["filename"] = MODEL
        if library is not None:
            decoder.setdefault("session_options", {})["custom_ops_library"] = library.name
    except (LookupError, TypeError, AttributeError):
        return None
    return described


def _describe(made: Path, model: ir.Model, source: Path, library: Path | None, note: str, files: list[str]) -> None:
    settings, relied = read_settings(model), listed(read_assumptions(model))
    nodes = Counter(node.op_type for node in uses(model))
    cuda = library is not None and set(nodes) <= {name for name, provider, _ in kernels(library) if provider == CUDA}
    served = Served(
        title=source.stem,
        model=model,
        file=MODEL,
        library=None if library is None else library.name,
        note=note,
        built_for=f"{platform.system()} {platform.machine()}",
        cuda=cuda,
        settings=settings,
        relied=relied,
        operators=nodes,
    )
    data = {
        "graphopt": graphopt.__version__,
        "model": MODEL,
        "library": None if library is None else {"file": library.name, "built_for": served.built_for, "cuda": cuda},
        "operators": dict(sorted(nodes.items())),
        "session": dataclasses.asdict(settings),
        "assumptions": relied,
        "files": sorted({*files}),
    }
    (made / "README.md").write_text(readme(served), encoding="utf-8")
    (made / DESCRIPTION).write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _made_beside(target: Path) -> Iterator[Path]:
    """A folder beside `target` that takes its place in the end, or leaves nothing behind."""
    parent = target.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".graphopt-", dir=parent, ignore_cleanup_errors=True) as temporary:
        made = Path(temporary) / "new"
        made.mkdir()
        yield made
        if not target.exists():
            os.replace(made, target)
            return
        old = Path(temporary) / "old"
        os.replace(target, old)
        try:
            os.replace(made, target)
        except OSError:
            os.replace(old, target)
            raise
