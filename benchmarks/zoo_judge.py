"""Judge what the tools made of one model: is it equal, how large is it, how fast is it?

    python benchmarks/zoo_judge.py request.json result.json

A process of its own beside `zoo.py`: a file that brings ONNX Runtime down takes nothing else with it. The request:
`source` (the original), `candidates` (files by tool), `workloads` (sizes of dynamic dimensions by label), `seconds` (of
timing for each model and workload), `threads`.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import onnx_ir as ir
from tools import model_files

from graphopt.errors import GraphoptError, first_line
from graphopt.graph.edits import nodes
from graphopt.verification.session import make_session, run
from graphopt.verification.timing import NO_SPINNING, benchmark
from graphopt.verification.verifier import Verifier
from graphopt.verification.workload import typical_feeds

SITTINGS = 2
"""The rounds are split over so many sets of fresh sessions: where memory comes to lie differs from session to session,
and that moves a ratio more than rounds do."""
ROUNDS = (16, 400)
"""At least and at most so many rounds, all sittings together."""


def main() -> None:
    """Read the request, write the result."""
    request = json.loads(Path(sys.argv[1]).read_text())
    source = Path(request["source"])
    verifier = Verifier(source)
    judged: dict[str, dict[str, Any]] = {}
    loadable: dict[str, Path] = {}
    for name, file in request["candidates"].items():
        path = Path(file)
        judged[name] = {**size(path), **equality(verifier, path)}
        if judged[name]["loads"]:
            loadable[name] = path
    verifier.close()
    timings = [
        {"workload": label, **time_all(source, loadable, dims, request["seconds"], request["threads"])}
        for label, dims in request["workloads"].items()
    ]
    result = {"original": size(source), "tools": judged, "timings": timings, "probes": len(verifier.probes)}
    Path(sys.argv[2]).write_text(json.dumps(result))


def size(path: Path) -> dict[str, Any]:
    """Nodes over all graphs and function bodies, and bytes on disk with external data."""
    try:
        return {
            "nodes": sum(1 for _ in nodes(ir.load(path))),
            "bytes": sum(file.stat().st_size for file in model_files(path)),
        }
    except Exception as error:
        return {"nodes": None, "bytes": None, "unreadable": first_line(error)}


def equality(verifier: Verifier, path: Path) -> dict[str, Any]:
    """Whether ONNX Runtime loads the file, whether it is equal, and the verifier's sentence."""
    try:
        make_session(path)
    except GraphoptError as error:
        # Without the folder, which says nothing of the model.
        return {"loads": False, "equal": False, "verdict": first_line(error).replace(str(path), path.name)}
    verdict = verifier.check(path)
    return {"loads": True, "equal": verdict.ok, "verdict": verdict.summary, "margin": verdict.to_dict()["margin"]}


def time_all(
    source: Path, candidates: dict[str, Path], dims: dict[str, int], seconds: float, threads: int
) -> dict[str, Any]:
    """CPU-time ratios to the original, one for each sitting, of every candidate and of the original against itself."""
    feeds = typical_feeds(source, dims)
    runnable = {"original": source}
    for name, path in candidates.items():
        try:
            run(make_session(path), feeds)
        except Exception:  # already named by the verdict
            continue
        runnable[name] = path
    session = make_session(source, threads=threads, settings=NO_SPINNING)
    run(session, feeds)
    single = math.inf
    for _ in range(3):
        begin = time.process_time()
        run(session, feeds)
        single = min(single, time.process_time() - begin)
    single = max(single, 2e-3)
    del session
    rounds = int(min(max(seconds / single, ROUNDS[0]), ROUNDS[1])) // SITTINGS
    ratios: dict[str, list[float]] = {name: [] for name in runnable if name != "original"}
    spread = dict.fromkeys(ratios, 0.0)
    control, milliseconds = [], []
    for sitting in range(SITTINGS):
        result = benchmark(
            list(runnable.values()), feeds, runs=rounds, warmup=3, threads=threads, last_first=sitting % 2 == 1
        )
        control.append(result.control.cpu_ratio.median)
        milliseconds.append(result.models[0].cpu_ms)
        for name, timing in zip(ratios, result.models[1:], strict=True):
            ratios[name].append(timing.cpu_ratio.median)
            spread[name] = max(spread[name], timing.cpu_ratio.uncertainty / math.sqrt(SITTINGS))
    shapes = {name: list(array.shape) for name, array in feeds.items()}
    return {
        "feeds": shapes,
        "rounds": rounds * SITTINGS,
        "original_ms": min(milliseconds),
        "control": control,
        "ratios": ratios,
        "uncertainty": spread,
    }


if __name__ == "__main__":
    main()
