"""Tiny transformers of many architectures by every exporter of them: does the file answer as PyTorch does?

    python benchmarks/export_matrix.py                                     what isn't there yet, and all of the page
    python benchmarks/export_matrix.py --models llama t5 --tools graphopt   a part
    python benchmarks/export_matrix.py --again graphopt                    one exporter anew
    python benchmarks/export_matrix.py --optimum venv/bin/python           the interpreter that has optimum-onnx

The models are those of the attention matrix, each saved as a Hugging Face folder. Every export runs in a process of its
own. Folders, exports and results are kept in a folder. The whole takes about an hour on one core. Exit status 1 where
an export of graphopt doesn't answer as PyTorch in every call.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from export_matrix_models import library_models
from export_matrix_page import Result, page, right, table
from export_matrix_tools import TOOLS
from export_matrix_worker import Outcome
from matrix_models import MODELS
from rich.console import Console

FOLDER = Path("build/export-matrix")
LIMIT_SECONDS = 300.0


def main() -> int:
    """Parse the command line, save, export, judge, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", help="keys of the models (default: all)")
    parser.add_argument("--tools", nargs="*", choices=TOOLS, default=list(TOOLS), help="exporters (default: all)")
    parser.add_argument("--again", nargs="*", choices=TOOLS, default=[], help="exporters whose exports are made anew")
    parser.add_argument("--rejudge", action="store_true", help="judge exports that were judged before too")
    parser.add_argument("--optimum", type=Path, help="the Python interpreter that has optimum-onnx")
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"where everything is kept ({FOLDER})")
    parser.add_argument("--limit", type=float, default=LIMIT_SECONDS, help="seconds of one export")
    parser.add_argument("--json", type=Path, help="write all results to this file")
    parser.add_argument("--page", type=Path, help="write the page to this file")
    parser.add_argument("--list", action="store_true", help="list the models, and stop")
    options = parser.parse_args()
    models = options.models or [model.key for model in library_models()]
    for key in models:
        if key not in MODELS:
            raise SystemExit(f"There is no model {key!r}; --list lists them.")
    if options.list:
        print("\n".join(models))
        return 0
    pythons = dict.fromkeys(TOOLS, sys.executable) | {"optimum": str(options.optimum) if options.optimum else ""}
    export(models, options.tools, options.again, options.folder, pythons, options.limit)
    judge(models, options.tools, options.folder, pythons, options.limit, options.rejudge)
    results = list(read(models, options.tools, options.folder))
    if options.json:
        options.json.write_text(listed(versions(pythons), results))
    if options.page:
        options.page.write_text(page(results, {key: MODELS[key].form for key in models}, versions(pythons)))
    console = Console(width=None if sys.stdout.isatty() else 160)
    for part in table(results):
        console.print(part)
    return int(any(not right(result) for result in results if result["tool"] == "graphopt"))


def place(folder: Path, key: str, tool: str) -> Path:
    """The folder of an export; its records lie beside it."""
    return folder / "exports" / key / tool


def export(
    models: Sequence[str],
    tools: Sequence[str],
    again: Sequence[str],
    folder: Path,
    pythons: Mapping[str, str],
    limit: float,
) -> None:
    """Make the folders and the exports that aren't there, or are wanted anew."""
    saved = [key for key in models if not (folder / "models" / key / "probe.npz").exists()]
    jobs = [
        {
            "record": str(folder / "models" / f"{key}.json"),
            "limit": limit,
            "arguments": {"key": key, "folder": str(folder / "models" / key)},
        }
        for key in saved
    ]
    run(sys.executable, "export_matrix_models:save", jobs)
    for tool in tools:
        jobs = []
        for key in models:
            output = place(folder, key, tool)
            if tool in again:
                shutil.rmtree(output, ignore_errors=True)
                for record in output.parent.glob(f"{tool}.*.json"):
                    record.unlink()
            if record_of(output, "export").exists() or not (folder / "models" / key).exists():
                continue
            arguments = {"key": key, "folder": str(folder / "models" / key), "output": str(output)}
            jobs.append({"record": str(record_of(output, "export")), "arguments": arguments, "limit": limit})
        if pythons[tool]:
            run(pythons[tool], f"export_matrix_tools:{tool}", jobs)


def judge(
    models: Sequence[str], tools: Sequence[str], folder: Path, pythons: Mapping[str, str], limit: float, anew: bool
) -> None:
    """Judge the exports that aren't judged; and what optimum's own transformers makes of the folders."""
    jobs = []
    own = []
    for key in models:
        for tool in tools:
            output = place(folder, key, tool)
            arguments = {"key": key, "folder": str(folder / "models" / key)}
            if tool == "optimum" and pythons[tool] and not record_of(output, "own").exists():
                own.append({"record": str(record_of(output, "own")), "arguments": arguments, "limit": limit})
            made = told(record_of(output, "export"))
            if made is None or made["error"] or (record_of(output, "judged").exists() and not anew):
                continue
            jobs.append(
                {
                    "record": str(record_of(output, "judged")),
                    "arguments": {**arguments, "output": str(output)},
                    "limit": limit,
                }
            )
    run(sys.executable, "export_matrix_judge:judge", jobs)
    run(pythons["optimum"], "export_matrix_tools:own", own)


def record_of(output: Path, stage: str) -> Path:
    """The record of a stage: "export", "judged" or "own"."""
    return output.with_name(f"{output.name}.{stage}.json")


def told(record: Path) -> dict[str, Any] | None:
    """What a record holds."""
    return json.loads(record.read_text()) if record.exists() else None


def run(python: str, work: str, jobs: Sequence[Mapping[str, Any]]) -> None:
    """Do jobs with an interpreter, in forks of one process."""
    if not jobs:
        return
    here = Path(__file__).parent
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(jobs, file)
        file.flush()
        settings = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        if python != sys.executable:
            settings.pop("PYTHONPATH", None)  # Another interpreter finds its own packages.
        command = [python, str(here / "export_matrix_worker.py"), work, file.name]
        subprocess.run(command, env=settings, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)


def read(models: Sequence[str], tools: Sequence[str], folder: Path) -> Iterator[Result]:
    """A row for every model and exporter; without a record the exporter wasn't there."""
    for key in models:
        for tool in tools:
            output = place(folder, key, tool)
            made = told(record_of(output, "export")) or dataclasses.asdict(Outcome(error="not installed"))
            judged = told(record_of(output, "judged"))
            own = told(record_of(output, "own"))
            row: Result = {
                "model": key,
                "tool": tool,
                "error": made["error"],
                "cpu_seconds": made["cpu_seconds"],
                "seconds": made["seconds"],
                "base_mb": made["base_mb"],
                "peak_mb": made["peak_mb"],
                "own": own["error"] or own["value"] if own else None,
                "calls": {},
                "nodes": None,
                "bytes": None,
                "without": None,
            }
            if judged is not None:
                answer = judged["value"] or {}
                row["error"] = row["error"] or (f"the judge: {judged['error']}" if judged["error"] else "")
                row |= {name: answer.get(name) for name in ("calls", "nodes", "bytes", "without")}
            yield row


def listed(versions: Mapping[str, str], results: Sequence[Result]) -> str:
    """All results as JSON, a line each, errors with three digits."""
    rows = []
    for row in results:
        calls = {k: v if isinstance(v, str) else float(f"{v:.2e}") for k, v in (row["calls"] or {}).items()}
        rows.append(json.dumps({**row, "calls": calls}))
    return f'{{"versions": {json.dumps(versions)}, "results": [\n' + ",\n".join(rows) + "\n]}\n"


def versions(pythons: Mapping[str, str]) -> dict[str, str]:
    """The versions of the libraries."""
    names = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime")
    code = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    found: dict[str, str] = json.loads(subprocess.check_output([sys.executable, "-c", code, *names]))
    if pythons["optimum"]:
        theirs = json.loads(
            subprocess.check_output([pythons["optimum"], "-c", code, "optimum-onnx", "transformers", "torch"])
        )
        found |= {f"optimum's {name}" if name != "optimum-onnx" else name: text for name, text in theirs.items()}
    return found


if __name__ == "__main__":
    sys.exit(main())
