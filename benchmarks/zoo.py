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
import json
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import zoo_page
from tools import PEERS, Tool, graphopt_tool, measure
from zoo_models import ENTRIES, Entry

ROOT = Path(__file__).resolve().parent.parent


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
    results = []
    for entry in entries:
        key = entry.key
        kept = arguments.folder / "results" / f"{key}.json"
        if not (arguments.resume and kept.exists()):
            begin = time.perf_counter()
            result = judge(entry, peers, arguments)
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(result, indent=1))
            print(f"{key}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
        results.append(json.loads(kept.read_text()))
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


def judge(entry: Entry, peers: list[Tool], arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the tools on one model, and judge what they wrote."""
    folder = arguments.folder / entry.key
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (arguments.folder / "exports").mkdir(exist_ok=True)
    source = entry.path(arguments.folder / "exports")
    tools: dict[str, dict[str, Any]] = {}
    candidates: dict[str, str] = {}
    unverified = measure(
        graphopt_tool("none", arguments.recipe).command(source, folder / "unverified.onnx"),
        folder / "log",
        arguments.timeout,
    )
    for tool in [graphopt_tool(recipe=arguments.recipe), *peers]:
        place = folder / tool.name.replace(" ", "-")
        place.mkdir()
        if tool.version is None:
            tools[tool.name] = {"error": f"not installed ({tool.package})"}
            continue
        cost = measure(tool.command(source, place / "model.onnx"), place / "log", arguments.timeout)
        tools[tool.name] = dataclasses.asdict(cost)
        if cost.status == 0 and (place / "model.onnx").exists():
            candidates[tool.name] = str(place / "model.onnx")
        else:
            tools[tool.name]["error"] = cost.error or "wrote nothing"
    tools["graphopt"]["unverified_wall_s"] = unverified.wall_s
    tools["graphopt"]["unverified_peak_mb"] = unverified.peak_mb
    request, answer = folder / "request.json", folder / "result.json"
    request.write_text(
        json.dumps(
            {
                "source": str(source),
                "candidates": candidates,
                "workloads": entry.workloads,
                "seconds": arguments.seconds,
                "threads": arguments.threads,
            }
        )
    )
    judge_command = [sys.executable, str(Path(__file__).with_name("zoo_judge.py")), str(request), str(answer)]
    with (folder / "judge.log").open("w") as log:
        status = subprocess.run(judge_command, stdout=log, stderr=subprocess.STDOUT).returncode
    if status:
        # One file that brings the judge down costs its model's row, not the run.
        last = (folder / "judge.log").read_text(errors="replace").strip().splitlines()[-1:]
        for name in candidates:
            tools[name]["error"] = f"can't be judged (exit status {status}): {' '.join(last)}"
        judged: dict[str, Any] = {"original": {}, "tools": {}, "timings": []}
    else:
        judged = json.loads(answer.read_text())
    for name, found in judged["tools"].items():
        tools[name] |= found
    if not arguments.keep:
        shutil.rmtree(folder)
    return {"model": entry.key, "use": entry.use, **judged, "tools": tools}


def environment(threads: int) -> dict[str, Any]:
    """What the figures depend on."""
    import onnxruntime

    processor = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    return {
        "date": time.strftime("%Y-%m-%d"),
        "onnxruntime": onnxruntime.__version__,
        "python": platform.python_version(),
        "processor": processor,
        "threads": threads,
    }


if __name__ == "__main__":
    main()
