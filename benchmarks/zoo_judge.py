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
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
from tools import model_files

from graphopt.analysis.interleaved import Ratio
from graphopt.errors import GraphoptError, first_line
from graphopt.graph.edits import nodes
from graphopt.runtime_ops.memory_session import make_session, run
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
    """Nodes over all graphs and function bodies, attention among them, and bytes on disk with external data."""
    try:
        operators = Counter((node.domain, node.op_type) for node in nodes(ir.load(path)))
        attention = {key: count for key, count in operators.items() if _attends(key[1])}
        return {
            "nodes": operators.total(),
            "attention": {f"{domain}.{name}".lstrip("."): count for (domain, name), count in attention.items()},
            "bytes": sum(file.stat().st_size for file in model_files(path)),
        }
    except Exception as error:
        return {"nodes": None, "bytes": None, "unreadable": first_line(error)}


def _attends(operator: str) -> bool:
    """Whether it is an attention; one that is spelled out shows by its Softmax."""
    return operator.endswith("Attention") or operator == "Softmax"


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
    """Ratios to the original, one for each sitting, of every candidate and of the original against itself."""
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
    others = [name for name in runnable if name != "original"]
    cpu, wall = Ratios(others), Ratios(others)
    for sitting in range(SITTINGS):
        result = benchmark(
            list(runnable.values()), feeds, runs=rounds, warmup=3, threads=threads, last_first=sitting % 2 == 1
        )
        cpu.add(result.models[0].cpu_ms, result.control.cpu_ratio, [m.cpu_ratio for m in result.models[1:]])
        wall.add(result.models[0].wall_ms, result.control.wall_ratio, [m.wall_ratio for m in result.models[1:]])
    shapes = {name: list(array.shape) for name, array in feeds.items()}
    return {"feeds": shapes, "rounds": rounds * SITTINGS, **cpu.to_dict(), "wall": wall.to_dict()}


class Ratios:
    """Ratios of time to the original's, sitting by sitting."""

    def __init__(self, names: Sequence[str]) -> None:
        self.milliseconds: list[float] = []
        self.control: list[float] = []
        self.ratios: dict[str, list[float]] = {name: [] for name in names}
        self.uncertainty = dict.fromkeys(names, 0.0)

    def add(self, original_ms: float, control: Ratio, others: Sequence[Ratio]) -> None:
        """What one sitting found: the original's time, its ratio to itself, and the others' in the order of names."""
        self.milliseconds.append(original_ms)
        self.control.append(control.median)
        for name, found in zip(self.ratios, others, strict=True):
            self.ratios[name].append(found.median)
            self.uncertainty[name] = max(self.uncertainty[name], found.uncertainty / math.sqrt(SITTINGS))

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "original_ms": min(self.milliseconds),
            "control": self.control,
            "ratios": self.ratios,
            "uncertainty": self.uncertainty,
        }


if __name__ == "__main__":
    main()
