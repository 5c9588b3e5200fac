"""Measuring how long models take, against each other, on a machine that is never quiet."""

from __future__ import annotations

import dataclasses
import functools
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt.analysis.interleaved import NO_SPINNING, Interleaved, Ratio, seconds
from graphopt.errors import ModelError, UsageError, VerificationError
from graphopt.graph.load import load
from graphopt.graph.session_settings import SessionSettings
from graphopt.graph.session_settings import read as read_settings
from graphopt.graph.skeleton import first_line
from graphopt.runtime_ops.memory_session import make_session, release_memory, run

if TYPE_CHECKING:
    import onnxruntime


@dataclasses.dataclass(frozen=True)
class Timing:
    """How long one model takes.

    Attributes:
        name: The model.
        wall_ms: Median wall-clock time of a run in milliseconds.
        cpu_ms: Median CPU time of a run over all threads, in milliseconds.
        wall_ratio: Wall-clock time over that of the first model.
        cpu_ratio: CPU time over that of the first model. The steadier one where other programs run.
        load_s: Time to make the session, in seconds.
    """

    name: str
    wall_ms: float
    cpu_ms: float
    wall_ratio: Ratio
    cpu_ratio: Ratio
    load_s: float


@dataclasses.dataclass(frozen=True)
class BenchResult:
    """What `benchmark` measured.

    Attributes:
        models: The models in the order given.
        control: The first model once more, in a session of its own, measured like the others: how far its ratios are
            from 1 is how far two equal models seem apart here.
        runs: Rounds that were measured.
        warmup: Rounds before them that weren't.
        calls: Runs of a model within a round (more than one where a single run is too short for the clock).
        threads: Threads within an operator; None: ONNX Runtime's choice.
        feeds: Shapes of the inputs by name.
    """

    models: list[Timing]
    control: Timing
    runs: int
    warmup: int
    calls: int
    threads: int | None
    feeds: dict[str, list[int]]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types."""
        return dataclasses.asdict(self)


def benchmark(
    paths: Sequence[str | os.PathLike[str]],
    feeds: Mapping[str, Any],
    runs: int = 30,
    warmup: int = 5,
    threads: int | None = None,
    settings: Mapping[str, str] | None = None,
    *,
    min_round_ms: float = 2.0,
    last_first: bool = False,
    own: Mapping[str, Mapping[str, Any]] | None = None,
) -> BenchResult:
    """Time models against each other: in every round each of them runs once, so that noise meets all alike.

    Sessions are made as `graphopt.session` makes them, with the settings that a model asks for.

    Args:
        paths: Model files; ratios are to the first.
        feeds: Inputs by name, the same for all.
        runs: Rounds that count.
        warmup: Rounds before them that don't.
        threads: Threads within an operator; None leaves it to ONNX Runtime.
        settings: Session config entries; spinning is off unless they say otherwise.
        min_round_ms: A model runs several times in a round where one run of the first takes less than this.
        last_first: Make the sessions in the other order. The first ones made in a process find other memory than the
            later ones, and are a few percent slower at times.
        own: Inputs that other models don't have, by the model's path and the input's name.

    Raises:
        UsageError: No models, or no rounds.
        VerificationError: A model doesn't load or run.
    """
    if not paths or runs < 1 or warmup < 0:
        raise UsageError("A benchmark needs at least one model, at least one round and no negative number of warmups.")
    settings = {**NO_SPINNING, **(settings or {})}
    names = [os.fspath(p) for p in paths]
    sessions: list[onnxruntime.InferenceSession] = []
    loads: list[float] = []
    places = [*paths, paths[0]]
    for path in places[::-1] if last_first else places:
        asked = _asked(path)
        begin = time.perf_counter()
        sessions.append(make_session(path, "all", threads=threads, settings=settings, requested=asked))
        loads.append(time.perf_counter() - begin)
    if last_first:
        sessions.reverse()
        loads.reverse()
    runs_of = []
    for name, session in zip([*names, names[0]], sessions, strict=True):
        given = {**feeds, **(own or {}).get(name, {})}
        runs_of.append(functools.partial(run, session, given))
        try:
            run(session, given)
        except Exception as error:
            raise VerificationError(f"{name} doesn't run on the given inputs: {first_line(error)}") from error

    single = min(seconds(runs_of[0])[0] for _ in range(3))
    calls = max(1, min(1000, round(min_round_ms / 1e3 / max(single, 1e-7))))
    measured = Interleaved(runs_of, calls)
    for number in range(warmup + runs):
        measured.round(keep=number >= warmup)
    wall, cpu = measured.wall, measured.cpu
    timings = [
        Timing(
            name,
            statistics.median(wall[i]) * 1e3,
            statistics.median(cpu[i]) * 1e3,
            Ratio.of(wall[i], wall[0]),
            Ratio.of(cpu[i], cpu[0]),
            loads[i],
        )
        for i, name in enumerate([*names, f"{names[0]} (control)"])
    ]
    sessions.clear()
    runs_of.clear()
    del measured  # holds the sessions too
    release_memory()
    shapes = {name: list(np.shape(array)) for name, array in feeds.items()}
    return BenchResult(timings[:-1], timings[-1], runs, warmup, calls, threads, shapes)


def _asked(path: str | os.PathLike[str]) -> SessionSettings | None:
    """What the model asks of its session; None where it can't be read, which the session will say better."""
    try:
        return read_settings(load(path))
    except ModelError:
        return None
