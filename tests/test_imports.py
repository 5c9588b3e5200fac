"""The import rule of docs/architecture.md: data flows one way, and heavy libraries come in only when they are used."""

from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "graphopt"

MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "errors": (),
    "cache": (),
    "graph": ("errors",),
    "runtime_ops": ("graph", "errors"),
    "analysis": ("runtime_ops", "graph", "cache", "errors"),
    "calibration": ("analysis", "runtime_ops", "graph", "cache", "errors"),
    "verification": ("analysis", "runtime_ops", "graph", "errors"),
    # Algorithms that know no models: what passes choose by.
    "search": ("errors",),
    "passes": ("search", "calibration", "verification", "analysis", "runtime_ops", "graph", "errors"),
    "run_report": ("passes", "calibration", "verification", "analysis", "runtime_ops", "graph", "errors"),
    "pass_manager": (
        "run_report",
        "passes",
        "calibration",
        "verification",
        "analysis",
        "runtime_ops",
        "graph",
        "errors",
    ),
    "recipe": ("passes", "errors", "graph"),
    "evaluation": ("calibration", "verification", "analysis", "runtime_ops", "graph", "errors"),
    "report": (
        "recipe",
        "pass_manager",
        "run_report",
        "passes",
        "calibration",
        "verification",
        "analysis",
        "runtime_ops",
        "graph",
        "errors",
    ),
    # An export is checked against torch by the same numerical comparison as everything else.
    "export": ("verification", "runtime_ops", "graph", "errors"),
    # A test model may be another one after some passes.
    "models": (
        "export",
        "recipe",
        "pass_manager",
        "run_report",
        "passes",
        "verification",
        "analysis",
        "runtime_ops",
        "graph",
        "cache",
        "errors",
    ),
}
"""What each part stands on. The whole package (`__init__`), `api` and `cli` stand on everything below them."""
ANYTHING = ("api", "cli", "__init__", "__main__")
NOT_BY = {"api": ("cli", "__init__", "__main__"), "cli": ("cli", "__main__")}
"""`api` is used by the CLI alone and the CLI by nobody (the package itself names `api` lazily)."""
VERSION = ("graphopt", "graphopt.__version__")
"""Allowed everywhere: the package's own module imports nothing and holds the version."""

ONLY_IN_EXPORT = ("torch", "transformers")
TRAINING = ("graphopt.models.fashion_training",)
"""Scripts that make models to test with."""
LATE = ("onnxruntime",)
"""Libraries that no module imports when it is itself imported."""


@dataclasses.dataclass(frozen=True)
class Import:
    """One import: the module that makes it, its line, what it names, whether it runs when the module is imported."""

    importer: str
    file: Path
    line: int
    imported: str
    at_import: bool

    def __str__(self) -> str:
        try:
            shown = self.file.relative_to(ROOT)
        except ValueError:
            shown = self.file
        return f"{shown}:{self.line}: {self.importer} imports {self.imported}"


def modules(package: Path = PACKAGE) -> dict[str, Path]:
    """Every module by its dotted name."""
    found = {}
    for file in sorted(package.rglob("*.py")):
        parts = list(file.relative_to(package.parent).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(name: str, file: Path, known: dict[str, Path]) -> Iterator[Import]:
    """The imports of one module; those under `if TYPE_CHECKING:` are for the type checker and don't run."""
    tree = ast.parse(file.read_text(), filename=str(file))

    def visit(node: ast.AST, at_import: bool, checking: bool) -> Iterator[Import]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for child in node.body:
                yield from visit(child, at_import, True)
            for child in node.orelse:
                yield from visit(child, at_import, checking)
            return
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            at_import = False
        now = at_import and not checking
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(name, file, node.lineno, alias.name, now)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
                package = package[: len(package) - node.level + 1]
                base = ".".join([*package, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield Import(name, file, node.lineno, inner if inner in known or base == "graphopt" else base, now)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, at_import, checking)

    yield from visit(tree, True, False)


def part(module: str) -> str:
    """The part of the package that a module belongs to."""
    pieces = module.split(".")
    return pieces[1] if len(pieces) > 1 else "__init__"


def all_imports(package: Path = PACKAGE) -> list[Import]:
    known = modules(package)
    return [i for name, file in known.items() for i in imports(name, file, known)]


def direction_faults(found: list[Import]) -> list[str]:
    faults = []
    for i in found:
        if i.imported.split(".")[0] != "graphopt" or i.imported in VERSION:
            continue
        importer, imported = part(i.importer), part(i.imported)
        if importer == imported:
            continue
        if importer in ANYTHING:
            if importer in NOT_BY.get(imported, ()) or imported not in NOT_BY:
                continue
            faults.append(f"{i}: {imported} stands above {importer}")
        elif importer not in MAY_IMPORT:
            faults.append(f"{i}: the part {importer!r} has no place in tests/test_imports.py yet")
        elif imported not in MAY_IMPORT[importer]:
            allowed = ", ".join(MAY_IMPORT[importer]) or "nothing of graphopt"
            faults.append(f"{i}: {importer} may import {allowed}")
    return faults


def library_faults(found: list[Import]) -> list[str]:
    faults = []
    for i in found:
        library = i.imported.split(".")[0]
        if library in ONLY_IN_EXPORT and part(i.importer) != "export" and i.importer not in TRAINING:
            faults.append(f"{i}: only export/ may")
        elif library in (*ONLY_IN_EXPORT, *LATE) and i.at_import:
            faults.append(f"{i} at import: import it inside the function that uses it")
    return faults


def cycles(found: list[Import]) -> list[list[str]]:
    """Circles among the modules, by the imports that run at import time."""
    edges: dict[str, set[str]] = {}
    for i in found:
        if i.at_import and i.imported.startswith("graphopt.") and i.imported != i.importer:
            edges.setdefault(i.importer, set()).add(i.imported)
    state: dict[str, int] = {}
    circles = []

    def visit(module: str, path: list[str]) -> None:
        state[module] = 1
        for target in sorted(edges.get(module, ())):
            if state.get(target) == 1:
                circles.append([*path[path.index(target) :], target])
            elif target not in state:
                visit(target, [*path, target])
        state[module] = 2

    for module in sorted(edges):
        if module not in state:
            visit(module, [module])
    return circles


def test_data_flows_one_way() -> None:
    faults = direction_faults(all_imports())
    assert not faults, "\n" + "\n".join(faults)


def test_heavy_libraries_are_imported_late_and_in_their_place() -> None:
    faults = library_faults(all_imports())
    assert not faults, "\n" + "\n".join(faults)


def test_no_circles() -> None:
    circles = [" -> ".join(c) for c in cycles(all_imports())]
    assert not circles, "\n" + "\n".join(circles)


@pytest.mark.parametrize(
    "statement", ["import graphopt", "import graphopt.cli", "import graphopt.passes.registry as r; r.builtin()"]
)
def test_heavy_libraries_are_not_loaded(statement: str) -> None:
    heavy = (*ONLY_IN_EXPORT, *LATE)
    code = f"{statement}\nimport sys\nprint(*[m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_the_package_itself_loads_nothing() -> None:
    """`import graphopt` is what every script pays for."""
    code = "import graphopt, sys; print(*[m for m in sys.modules if m.split('.')[0] in ('onnx', 'onnx_ir', 'numpy')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


# ---- the test itself can fail


def _package(folder: Path, files: dict[str, str]) -> Path:
    for path, text in files.items():
        file = folder / "graphopt" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder / "graphopt"


def test_an_import_upwards_is_found(tmp_path: Path) -> None:
    package = _package(
        tmp_path,
        {
            "__init__.py": "",
            "graph/__init__.py": "",
            "graph/load.py": "from __future__ import annotations\n\ndef f():\n    from graphopt.passes import base\n",
            "passes/__init__.py": "",
            "passes/base.py": (
                "from ..cli import main\nfrom graphopt import api\n"
                "from graphopt import optimize\nfrom graphopt import __version__\n"
            ),
            "api.py": "",
            "cli/__init__.py": "main = 1\nimport graphopt.api",
        },
    )
    faults = direction_faults(all_imports(package))
    places = [f.split(": ")[0].split("graphopt/")[-1] for f in faults]
    assert places == ["graph/load.py:4", "passes/base.py:1", "passes/base.py:2", "passes/base.py:3"]


def test_an_early_library_is_found_and_a_late_one_is_not(tmp_path: Path) -> None:
    package = _package(
        tmp_path,
        {
            "__init__.py": "",
            "graph.py": "def f():\n    import torch\n",
            "analysis.py": "try:\n    import onnxruntime.capi\nexcept ImportError:\n    pass\n",
            "verification.py": (
                "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import onnxruntime\n\n"
                "def f():\n    import onnxruntime\n"
            ),
        },
    )
    faults = library_faults(all_imports(package))
    assert len(faults) == 2
    assert "analysis.py:2" in faults[0]
    assert "graph.py:2" in faults[1]


def test_a_circle_is_found(tmp_path: Path) -> None:
    package = _package(
        tmp_path,
        {
            "__init__.py": "",
            "graph/__init__.py": "from graphopt.graph import load",
            "graph/load.py": "from graphopt.graph import save",
            "graph/save.py": "from graphopt.graph import load",
        },
    )
    assert cycles(all_imports(package)) == [["graphopt.graph.load", "graphopt.graph.save", "graphopt.graph.load"]]
