"""What `graphopt optimize` does to real models: nodes, bytes, equality, and CPU time against the original.

    python benchmarks/measure.py                      the models of the README's table, as Markdown
    python benchmarks/measure.py yolov8n layout       some of them
    python benchmarks/measure.py --threads 1 --runs 50 --smollm2 smollm2/model.onnx

MiniLM is exported first (torch.export); SmolLM2 takes minutes to export and is included where `--smollm2` names the
file that `benchmarks/export_smollm2.py` wrote. CPU-time ratios are medians over interleaved rounds with spinning off;
`control` is the original against itself in the same rounds, and a ratio no further from 1 than that says nothing.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import graphopt
from graphopt.models.catalogue import fetch
from graphopt.verification.workload import benchmark_models

DEFAULT = (
    "minilm", "paraphrase-minilm", "silero-vad", "silero-vad-16k", "yolov8n", "layout", "orientation", "open-nsfw",
    "ppocr-v4-rec", "ppocr-v6-det", "ppocr-v6-rec", "magika", "smart-turn",
)  # fmt: skip


def main() -> None:
    """Print one row a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=DEFAULT)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smollm2", type=Path)
    arguments = parser.parse_args()
    print("| model | nodes | bytes of weights | equal | worst error, of the tolerance | CPU time | control | tool s |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        sources: dict[str, Path] = {}
        for key in arguments.models:
            if key == "minilm":
                sources["MiniLM-L6 (torch.export)"] = graphopt.export_model(fetch(key), Path(folder) / "minilm.onnx")
            else:
                sources[key] = fetch(key)
        if arguments.smollm2:
            sources["SmolLM2-135M (torch.export)"] = arguments.smollm2
        for name, source in sources.items():
            row(name, source, Path(folder) / "out.onnx", arguments.runs, arguments.threads)


def row(name: str, source: Path, target: Path, runs: int, threads: int) -> None:
    """Optimize, save, time; print the row."""
    start = time.perf_counter()
    result = graphopt.optimize(source)
    run = result.report.run
    seconds = time.perf_counter() - start
    result.save(target)
    timing = benchmark_models([source, target], runs=runs, threads=threads)
    verdict = run.verdict
    print(
        f"| {name} | {run.before.nodes} → {run.after.nodes} "
        f"| {run.before.weight_bytes / 1e6:.1f} → {run.after.weight_bytes / 1e6:.1f} MB "
        f"| {'yes' if verdict is not None and verdict.ok and result.report.ok else 'NO'} "
        f"| {0.0 if verdict is None else verdict.margin:.1%} "
        f"| {timing.models[1].cpu_ratio.median:.2f} | {timing.control.cpu_ratio.median:.2f} | {seconds:.1f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
