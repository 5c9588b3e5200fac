"""graphopt and its peers on every model of the zoo: nodes, bytes, cost of the tool, equality, and CPU time.

    python benchmarks/zoo.py                            all of it, into docs/zoo.md and docs/zoo.json (`make zoo`)
    python benchmarks/zoo.py --models yolov8n magika    some of it, printed only
    python benchmarks/zoo.py --resume                   models that have no result yet, then everything written

Each tool runs in a process of its own. What it wrote is compared with the original by graphopt's verification, and all
outputs that load are timed against the original in one process, round by round. Peers that aren't installed say so
(`pip install 'graphopt[zoo]'`). Takes about half an hour on two cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import zoo_page
from measured_page import processor
from tools import PEERS, Tool, graphopt_tool, measure
from zoo_models import ENTRIES, Entry

from graphopt.cli.console import progress

ROOT = Path(__file__).resolve().parent.parent
Tell = Callable[[str], None]
"""Called with what is being done."""


def main() -> None:
    """Measure what is asked for, write the page, print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(ENTRIES), default=list(ENTRIES), metavar="MODEL")
    parser.add_argument(
        "--tools", nargs="+", choices=[t.name for t in PEERS], metavar="PEER", help="Peers; default all."
    )
    parser.add_argument("--file", type=Path, action="append", default=[], help="A model of your own, measured too.")
    parser.add_argument("--recipe", help="graphopt's recipe in place of its default one.")
    parser.add_argument("--resume", action="store_true", help="Keep the results that are there.")
    parser.add_argument("--keep", action="store_true", help="Keep the files that the tools wrote.")
    parser.add_argument("--seconds", type=float, default=2.5, help="Timing of each model and output. Default 2.5.")
    parser.add_argument("--threads", type=int, default=1, help="Threads of ONNX Runtime while timing. Default 1.")
    parser.add_argument("--timeout", type=float, default=300.0, help="Seconds after which a tool is stopped.")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "zoo", help="Where results are kept.")
    parser.add_argument("--docs", type=Path, help="Folder of zoo.md and zoo.json; default docs/ where all models run.")
    arguments = parser.parse_args()
    peers = [t for t in PEERS if arguments.tools is None or t.name in arguments.tools]
    entries = [ENTRIES[key] for key in arguments.models]
    entries += [Entry(path.stem, f"the file {path.name}", {"": {}}, path) for path in arguments.file]
    tools = [graphopt_tool(recipe=arguments.recipe), *peers]

    def measured(entry: Entry, tell: Tell) -> dict[str, Any]:
        result = judge(entry, tools, arguments, tell)
        source, target = entry.path(arguments.folder / "exports"), arguments.folder / "unverified.onnx"
        command = graphopt_tool("none", arguments.recipe).command(source, target)
        cost = measure(command, arguments.folder / "log", arguments.timeout)
        result["tools"]["graphopt"] |= {"unverified_wall_s": cost.wall_s, "unverified_peak_mb": cost.peak_mb}
        for file in arguments.folder.glob("unverified.onnx*"):
            file.unlink()
        return result

    parts = {entry.key: functools.partial(measured, entry) for entry in entries}
    results = collect(parts, arguments.folder / "results", arguments.resume)
    versions = {tool.name: tool.version for tool in [graphopt_tool(), *peers]}
    missing = sorted(set(ENTRIES) - {entry.key for entry in entries})
    where = environment(arguments.threads)
    data = {"environment": where, "versions": versions, "not_measured": missing, "models": results}
    page = zoo_page.page(data)
    complete = entries == list(ENTRIES.values()) and arguments.tools is None and arguments.recipe is None
    if folder := arguments.docs or (ROOT / "docs" if complete else None):
        (folder / "zoo.md").write_text(page)
        (folder / "zoo.json").write_text(json.dumps(data, indent=1) + "\n")
    print(page)


def collect(parts: Mapping[str, Callable[[Tell], dict[str, Any]]], folder: Path, resume: bool) -> list[dict[str, Any]]:
    """The results of the parts; each is kept in a file as soon as it is there, and taken from it on `resume`.

    A part is called with a function that it may tell what it is at.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    with progress(quiet=False) as show:
        for index, (key, part) in enumerate(parts.items()):
            tell = functools.partial(_told, show, key, index, len(parts))
            tell("")
            kept = folder / f"{key}.json"
            if not (resume and kept.exists()):
                begin = time.perf_counter()
                kept.write_text(json.dumps(part(tell), indent=1))
                print(f"{key}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
            results.append(json.loads(kept.read_text()))
    return results


def _told(show: Callable[[str, int, int], None], key: str, done: int, total: int, what: str) -> None:
    show(f"{key} {what}".strip(), done, total)


def judge(entry: Entry, tools: Sequence[Tool], arguments: argparse.Namespace, tell: Tell) -> dict[str, Any]:
    """Run the tools on one model, and judge what they wrote."""
    folder = arguments.folder / entry.key
    exports = arguments.folder / "exports"
    exports.mkdir(parents=True, exist_ok=True)
    source = entry.path(exports)
    found, candidates = write_all(tools, source, folder, arguments.timeout, tell)
    request = {
        "source": str(source),
        "candidates": candidates,
        "workloads": entry.workloads,
        "seconds": arguments.seconds,
        "threads": arguments.threads,
    }
    judged = ask("zoo_judge.py", request, folder, found, tell)
    if not arguments.keep:
        shutil.rmtree(folder)
    return {"model": entry.key, "use": entry.use, **judged, "tools": found}


def write_all(
    tools: Sequence[Tool], source: Path, folder: Path, timeout_s: float, tell: Tell
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Let every tool write its file of a model into `folder`: what that cost, and the files, by tool."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    costs: dict[str, dict[str, Any]] = {}
    files: dict[str, str] = {}
    for tool in tools:
        tell(tool.name)
        place = folder / tool.name.replace(" ", "-")
        place.mkdir()
        if tool.version is None:
            costs[tool.name] = {"error": f"not installed ({tool.package})"}
            continue
        cost = measure(tool.command(source, place / "model.onnx"), place / "log", timeout_s)
        costs[tool.name] = dataclasses.asdict(cost)
        if cost.status == 0 and (place / "model.onnx").exists():
            files[tool.name] = str(place / "model.onnx")
        else:
            costs[tool.name]["error"] = cost.error or "wrote nothing"
    return costs, files


def ask(
    script: str, request: dict[str, Any], folder: Path, tools: dict[str, dict[str, Any]], tell: Tell
) -> dict[str, Any]:
    """The answer of a judge, which runs in a process of its own; what it found of each tool goes into `tools`."""
    tell("judging")
    question, answer = folder / "request.json", folder / "result.json"
    question.write_text(json.dumps(request))
    command = [sys.executable, str(Path(__file__).with_name(script)), str(question), str(answer)]
    with (
        (folder / "judge.log").open("w") as log,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            tell(line.strip())
    if status := process.returncode:
        # One file that brings the judge down costs its model's row, not the run.
        last = (folder / "judge.log").read_text(errors="replace").strip().splitlines()[-1:]
        for name in request["candidates"]:
            tools[name]["error"] = f"can't be judged (exit status {status}): {' '.join(last)}"
        return {"original": {}, "timings": []}
    judged: dict[str, Any] = json.loads(answer.read_text())
    for name, found in judged.pop("tools").items():
        tools[name] |= found
    return judged


def environment(threads: int) -> dict[str, Any]:
    """What the figures depend on."""
    import onnxruntime

    return {
        "date": time.strftime("%Y-%m-%d"),
        "onnxruntime": onnxruntime.__version__,
        "python": platform.python_version(),
        "processor": processor(),
        "threads": threads,
    }


if __name__ == "__main__":
    main()
