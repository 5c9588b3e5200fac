"""Measuring a target profile: small models of each choice, timed in turn in ONNX Runtime with its defaults.

What is timed is what ONNX Runtime makes of an alternative and its neighbours by default, its own fusions included; the
profile records the operators that it really executed. Waiting threads sleep, rounds are interleaved in random order,
and every alternative runs in two sessions, so that the noise is known.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import math
import re
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from graphopt.analysis.choices import CHOICES, NARROW, Choice
from graphopt.analysis.interleaved import NO_SPINNING, Interleaved, Ratio, seconds
from graphopt.analysis.profile import Entry, Executed, Measured, Profile
from graphopt.analysis.profile_cache import this_machine
from graphopt.analysis.target import highest_opset
from graphopt.errors import UsageError

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, steps done, steps in all)."""

DEFAULT_SECONDS = 60.0
QUICK_SECONDS = 15.0
ROUND_SECONDS = 0.8e-3
"""An alternative runs several times in a round where one run takes less than this."""
MIN_ROUNDS, MAX_ROUNDS = 5, 60
NEWEST_OPSET = 23
"""The operators of the choices need no newer one; an older ONNX Runtime gets the newest that it loads."""
IR_VERSION = 10


def measure(
    choices: Sequence[str] | None = None,
    *,
    budget_seconds: float = DEFAULT_SECONDS,
    rows: Sequence[int] | None = None,
    widths: Sequence[int] | None = None,
    threads: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> Profile:
    """Measure a profile of this machine and the installed ONNX Runtime.

    Args:
        choices: Names of the choices; None: all.
        budget_seconds: About how long it may take.
        rows: Rows in place of those of each choice.
        widths: Widths in place of those of each choice.
        threads: Thread counts; None: 1 and all processors.
        progress: Called before each point.

    Raises:
        UsageError: There is no ONNX Runtime, no such choice, or nothing could be measured.
    """
    try:
        runtime, cpu, cores = this_machine()
    except ImportError as error:
        raise UsageError("ONNX Runtime is missing; install graphopt[cpu] or graphopt[gpu].") from error
    if unknown := sorted(set(choices or ()) - CHOICES.keys()):
        raise UsageError(f"There is no choice {unknown[0]!r}; the choices are {', '.join(CHOICES)}.")
    chosen = [CHOICES[name] for name in choices or CHOICES]
    counts = tuple(threads or sorted({1, cores}))
    executed = {c.name: {a: execute(c, a) for a in c.alternatives} for c in chosen}
    # An operator that this ONNX Runtime doesn't have is no alternative, and of equal graphs one is enough.
    distinct = {name: _distinct(by) for name, by in executed.items()}
    plan = [(c, w, t) for c in chosen if len(distinct[c.name]) > 1 for w in widths or c.widths for t in counts]
    # Dear models first: what their least number of rounds takes beyond their share is saved on the others.
    plan.sort(key=lambda item: item[0].blocks)
    steps = sum(len(rows or c.rows) for c, _, _ in plan)
    begin, done = time.perf_counter(), 0
    entries: list[Entry] = []
    for choice, width, count in plan:
        names = distinct[choice.name]
        sessions = [_session(micro_model(choice, a, width), count) for a in [*names, *names]]
        for number in rows or choice.rows:
            if progress is not None:
                progress(f"{choice.name} {number} × {width}", done, steps)
            spent = time.perf_counter() - begin
            share = max(0.0, budget_seconds - spent) / (steps - done)
            done += 1
            entries.append(_point(choice, names, sessions, number, width, count, share))
    if not any(distinct.values()):
        raise UsageError("Nothing could be measured: ONNX Runtime runs no alternative of any choice.")
    if progress is not None:
        progress("measured", steps, steps)
    return Profile(
        runtime, cpu, cores, counts, datetime.date.today().isoformat(), round(time.perf_counter() - begin, 1),
        tuple(entries), executed,
    )  # fmt: skip


def _distinct(executed: Mapping[str, Executed]) -> list[str]:
    """The first alternative of each graph that runs."""
    first: dict[str, str] = {}
    for alternative, found in executed.items():
        if found.operators:
            first.setdefault(found.graph, alternative)
    return list(first.values())


def micro_model(choice: Choice, alternative: str, width: int) -> onnx.ModelProto:
    """The model in which an alternative is timed: `choice.blocks` blocks in a row, all with weights of their own.

    The weights are the same for every alternative, so that all of them compute the same.
    """
    text = choice.alternatives[alternative].replace("{heads}", str(choice.heads)).replace("{width}", str(width))
    lines: list[str] = []
    previous = "x"
    for block in range(choice.blocks):
        lines.append(re.sub(r"\$(\w+)", functools.partial(_name, choice, block, previous), text))
        previous = f"y_{block}"
    dims = {"tokens": f"b, s, {width}", "matrix": f"s, {width}", "image": f"1, {width}, s, t"}[choice.layout]
    inputs = f"float[{dims}] x"
    if "$e" in text:
        inputs += f", float[{dims.rsplit(' ', 1)[0]} {NARROW}] e"
    source = (
        f'<ir_version: {IR_VERSION}, opset_import: ["": {_opset()}, "com.microsoft": 1]>\n'
        f"{re.sub(r'[^a-z]', '_', choice.name)} ({inputs}) => (float[{dims}] {previous}) {{\n"
        + "\n".join(lines)
        + "\n}"
    )
    model = onnx.parser.parse_model(source)
    used = {name for node in model.graph.node for name in node.input}
    for name, array in _weights(choice, width):
        if name in used:
            model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return model


def _opset() -> int:
    return min(NEWEST_OPSET, highest_opset())


def _name(choice: Choice, block: int, previous: str, match: re.Match[str]) -> str:
    name = match.group(1)
    if name == "x":
        return previous
    if name == "e" or name in _constants(choice, 1):
        return name
    return f"{name}_{block}"


def _constants(choice: Choice, width: int) -> dict[str, npt.NDArray[Any]]:
    made: dict[str, Any] = dict(choice.constants)
    made |= {"flat": [-1, width], "none": [0.0] * width, "unit": [1.0] * width}
    if choice.heads:
        size = max(1, width // choice.heads)
        made |= {"heads": [0, 0, choice.heads, size], "joined": [0, 0, width], "scale": size**-0.5}
    arrays = {name: np.asarray(value) for name, value in made.items()}
    return {n: a.astype(np.float32) if a.dtype.kind == "f" else a.astype(np.int64) for n, a in arrays.items()}


def _weights(choice: Choice, width: int) -> list[tuple[str, npt.NDArray[Any]]]:
    """Initializers by name, deterministic."""
    found = list(_constants(choice, width).items())
    for block in range(choice.blocks):
        made: dict[str, npt.NDArray[Any]] = {}
        for name, symbols in choice.weights.items():
            shape = [_size(symbol, width) for symbol in symbols]
            if sources := choice.derived.get(name):
                made[name] = np.concatenate([made[s] for s in sources], axis=-1).reshape(shape)
                continue
            rng = np.random.default_rng(zlib.crc32(f"{choice.name} {name} {block}".encode()))
            inputs = shape[0] if choice.layout != "image" else math.prod(shape[1:])
            numbers = rng.normal(size=shape) / math.sqrt(inputs) if len(shape) > 1 else rng.uniform(0.5, 1.5, shape)
            made[name] = numbers.astype(np.float32)
        found += [(f"{name}_{block}", array) for name, array in made.items()]
    return found


def _size(symbol: int | str, width: int) -> int:
    if isinstance(symbol, int):
        return symbol
    if symbol.startswith("W/"):
        return width // int(symbol.removeprefix("W/"))
    factor, _, _ = symbol.rpartition("*W")
    return int(factor or 1) * width


def feeds(choice: Choice, rows: int, width: int) -> dict[str, npt.NDArray[Any]]:
    """Inputs of a micro-model."""
    rng = np.random.default_rng(0)
    if choice.layout == "image":
        height = math.isqrt(rows)
        return {"x": rng.normal(size=(1, width, height, rows // height)).astype(np.float32)}
    # More than 128 tokens are several sequences of 64, as encoders get them.
    lead = (rows,) if choice.layout == "matrix" else (1, rows) if rows <= 128 or rows % 64 else (rows // 64, 64)
    made = {"x": rng.normal(size=(*lead, width)).astype(np.float32)}
    made["e"] = rng.normal(size=(*lead, NARROW)).astype(np.float32)
    return made


def execute(choice: Choice, alternative: str) -> Executed:
    """What ONNX Runtime executes for an alternative with its default optimizations."""
    width = choice.widths[0]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "executed.onnx"
        try:
            session = _session(micro_model(choice, alternative, width), 1, path)
            _run(session, feeds(choice, 64 if choice.layout == "image" else 2, width))
        except Exception:  # ONNX Runtime has a class of exception for each reason; every one means "doesn't run"
            return Executed((), "")
        graph = onnx.load(path).graph
    return Executed(tuple(dict.fromkeys(node.op_type for node in graph.node)), _fingerprint(graph))


def _fingerprint(graph: onnx.GraphProto) -> str:
    """Equal for graphs that differ in names, in the order of factors or summands, or in defaults written out, alone."""
    numbers: dict[str, str] = {"": ""}
    weights = {t.name: hashlib.sha256(onnx.numpy_helper.to_array(t).tobytes()).hexdigest() for t in graph.initializer}
    digest = hashlib.sha256()
    for node in graph.node:
        inputs = [weights.get(name) or numbers.setdefault(name, str(len(numbers))) for name in node.input]
        if node.op_type in ("Add", "Mul"):
            inputs.sort()
        outputs = [numbers.setdefault(name, str(len(numbers))) for name in node.output]
        attributes = sorted(_attributes(node))
        digest.update(repr((node.domain, node.op_type, inputs, outputs, attributes)).encode())
    return digest.hexdigest()[:12]


def _attributes(node: onnx.NodeProto) -> list[tuple[str, str]]:
    """Attributes that aren't the operator's defaults."""
    defaults = {}
    if node.domain == "" and onnx.defs.has(node.op_type):
        defaults = {n: a.default_value for n, a in onnx.defs.get_schema(node.op_type, _opset()).attributes.items()}
    values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    return [
        (name, str(value))
        for name, value in values.items()
        if name not in defaults
        or defaults[name].type == onnx.AttributeProto.UNDEFINED
        or onnx.helper.get_attribute_value(defaults[name]) != value
    ]


def _session(model: onnx.ModelProto, threads: int, optimized: Path | None = None) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    for key, value in NO_SPINNING.items():
        options.add_session_config_entry(key, value)
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _run(session: Any, inputs: dict[str, npt.NDArray[Any]]) -> Any:
    return session.run(None, {i.name: inputs[i.name] for i in session.get_inputs()})


def _point(
    choice: Choice, names: list[str], sessions: list[Any], rows: int, width: int, threads: int, budget_seconds: float
) -> Entry:
    """Time the alternatives at one shape, each in two sessions."""
    begin = time.perf_counter()
    inputs = feeds(choice, rows, width)
    runs = [
        functools.partial(s.run, None, {i.name: inputs[i.name] for i in s.get_inputs()}) for s in sessions
    ]  # fmt: skip
    for run in runs:
        run()
    single = min(seconds(runs[0])[0] for _ in range(2))
    timed = Interleaved(runs, max(1, min(2000, round(ROUND_SECONDS / max(single, 1e-7)))))
    while len(timed.cpu[0]) < MAX_ROUNDS:
        if len(timed.cpu[0]) >= MIN_ROUNDS and time.perf_counter() - begin > budget_seconds:
            break
        timed.round()
    count = len(names)
    found = [_measured(timed, (index, index + count), (0, count), choice.blocks) for index in range(count)]
    control = _measured(timed, (count,), (0,), choice.blocks)
    return Entry(choice.name, rows, width, threads, dict(zip(names, found, strict=True)), control)


def _measured(timed: Interleaved, sessions: Sequence[int], over: Sequence[int], blocks: int) -> Measured:
    """The mean of some sessions' times in each round, over that of others."""
    numbers = [statistics.median(_mean(series, sessions)) / blocks * 1e6 for series in (timed.cpu, timed.wall)]
    noise = []
    for series in (timed.cpu, timed.wall):
        base = _mean(series, over)
        ratio = Ratio.of(_mean(series, sessions), base)
        numbers.append(ratio.median)
        # Sessions of one model differ by where their memory lies, which more rounds don't mend.
        each = [Ratio.of(series[index], base).median for index in sessions]
        noise.append(max(ratio.uncertainty, (max(each) - min(each)) / 2))
    return Measured(*(float(f"{number:.4g}") for number in (*numbers, *noise)))


def _mean(series: Sequence[Sequence[float]], sessions: Sequence[int]) -> list[float]:
    return [statistics.fmean(times) for times in zip(*(series[index] for index in sessions), strict=True)]
