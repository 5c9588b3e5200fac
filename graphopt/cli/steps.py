"""`--bench` and `--steps`: what a result, and each lossy pass of its recipe, gives and costs."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.errors import GraphoptError
from graphopt.passes import registry
from graphopt.passes.base import Guarantee, Pass

if TYPE_CHECKING:
    from graphopt.cli.judging import Judge
    from graphopt.recipe import Recipe
    from graphopt.report.report import Report
    from graphopt.run_report import RunReport


def partial_recipes(recipe: Recipe, run: RunReport) -> list[tuple[str, Recipe]]:
    """For each lossy pass that changed the model its name, and the recipe without the lossy ones behind it.

    Passes get what their searches found as options, so that nothing is searched again.

    Args:
        recipe: What was run.
        run: What it did.
    """
    records = [r for r in run.records if r.round == 1 and r.guarantee == Guarantee.LOSSY.value]
    steps, lossy = [], []
    for step in recipe.steps:
        cls = registry.find(step.name)
        if not issubclass(cls, Pass) or cls.guarantee is not Guarantee.LOSSY:
            steps.append(step)
            continue
        place = next((i for i, record in enumerate(records) if record.name == step.name), None)
        record = None if place is None else records.pop(place)
        if record is None or record.status != "applied":
            continue
        lossy.append(len(steps))
        found = {name: value for name, value in record.options.items() if name in cls.options()}
        steps.append(dataclasses.replace(step, options={**step.options, **found}))
    parts = []
    for count in range(1, len(lossy) + 1):
        gone = set(lossy[count:])
        kept = tuple(step for index, step in enumerate(steps) if index not in gone)
        parts.append((steps[lossy[count - 1]].name, dataclasses.replace(recipe, steps=kept)))
    return parts


def measure(
    report: Report,
    model: Path,
    destination: Path,
    write: Callable[[Recipe, Path], None],
    judge: Judge | None,
    *,
    bench: bool,
    steps: bool,
    inputs: Path | None,
    seed: int,
    progress: Callable[[str, int, int], None],
) -> None:
    """Time a result against the original, and make and judge what it was on the way; both into its report.

    Args:
        report: Of the result.
        model: The original's file.
        destination: The result's.
        write: Optimizes the original by another recipe and writes the result into a file.
        judge: What judges; None: nothing does.
        bench: Whether anything is timed.
        steps: Whether the models behind each lossy pass are made, by the recipe without the lossy ones that follow.
        inputs: Inputs to time with; None: usual ones, and of a decoder a prompt and what it writes behind it.
        seed: Of these.
        progress: Called as the work goes on.

    Raises:
        GraphoptError: One of the models can't be made, judged or timed.
    """
    with tempfile.TemporaryDirectory(prefix=".steps-", dir=destination.parent) as folder:
        parts = partial_recipes(report.recipe, report.run) if steps else []
        files = [model]
        for number, (_, part) in enumerate(parts[:-1], 1):
            files.append(Path(folder) / f"step{number}" / destination.name)
            files[-1].parent.mkdir()
            write(part, files[-1])
        files.append(destination)
        timing = _timed(report, files, inputs, seed, progress) if bench else None
        if parts:
            report.steps = _told(["", *(name for name, _ in parts)], files, judge, report.quality, timing, progress)


def _timed(
    report: Report, files: Sequence[Path], inputs: Path | None, seed: int, progress: Callable[[str, int, int], None]
) -> dict[str, Any]:
    """A benchmark of all of them; the report gets that of the first and the last."""
    from graphopt.cli.bench_generation import bench_writing
    from graphopt.verification.workload import benchmark_models

    progress("timing", 0, 1)
    timing: dict[str, Any] = benchmark_models(files, inputs=inputs, seed=seed).to_dict()
    writing = None
    try:
        writing = bench_writing(files, seed, progress) if inputs is None else None
    except GraphoptError as error:  # The prompt is timed, and the note says what isn't.
        report.notes.append(f"How fast it writes wasn't timed: {error}")
    report.timing = {**_ends(timing), "generation": None if writing is None else _ends(writing)}
    return {**timing, "generation": writing}


def _ends(benchmark: dict[str, Any]) -> dict[str, Any]:
    """A benchmark with the first and the last of its models alone."""
    return {**benchmark, "models": [benchmark["models"][0], benchmark["models"][-1]]}


def _told(
    names: Sequence[str],
    files: Sequence[Path],
    judge: Judge | None,
    quality: dict[str, Any] | None,
    timing: dict[str, Any] | None,
    progress: Callable[[str, int, int], None] | None,
) -> list[dict[str, Any]]:
    """What the report has of each step: the original first, the result last.

    Args:
        names: "", and the passes.
        files: Their models.
        judge: What judges; None: nothing does.
        quality: What it said of the result.
        timing: A benchmark of all of them, in order; None: there was none.
        progress: Called while they are judged.
    """
    from graphopt.cli.judging import bytes_on_disk

    metrics: list[Any] = [None] * len(files)
    if judge is not None and quality is not None:
        metrics[1:-1] = [found.to_dict()["metrics"] for found in judge.evaluation.judge(files[1:-1], progress)]
        metrics[-1] = quality["metrics"]
    models = [None] * len(files) if timing is None else timing["models"]
    writing = None if timing is None else timing["generation"]
    writers = [None] * len(files) if writing is None else writing["models"]
    return [
        {
            "pass": name,
            "bytes": bytes_on_disk(file),
            "cache_bytes": _growth(file),
            "metrics": own,
            "ratio": None if model is None else model["cpu_ratio"]["median"],
            "token_ratio": None if writer is None else writer["decode_cpu_ratio"]["median"],
        }
        for name, file, own, model, writer in zip(names, files, metrics, models, writers, strict=True)
    ]


def _growth(file: Path) -> float | None:
    """Bytes by which the cache of a decoder grows a token; None where there is none, or its sizes can't be told."""
    from graphopt.graph.kv_interface import kv_interface
    from graphopt.graph.load import load

    interface = kv_interface(load(file))
    return None if interface is None else interface.bytes_a_token
