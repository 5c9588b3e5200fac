"""What a verdict and a benchmark say, as plain rows and sentences.

Functions take the dictionaries of `Verdict.to_dict()` and `BenchResult.to_dict()` and bear missing parts.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from graphopt.report import units

Data = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Margin:
    """One output on one probe in one mode of ONNX Runtime.

    Attributes:
        output: Its name.
        probe: The probe's name.
        mode: "all" or "none": ONNX Runtime's own optimizations.
        error: The largest absolute difference; None where there is no number for it.
        used: The error as a share of the tolerance (1 is the limit); None where nothing would have been enough.
        ok: Whether it passed.
        note: What is wrong, or "".
    """

    output: str
    probe: str
    mode: str
    error: float | None
    used: float | None
    ok: bool
    note: str


@dataclasses.dataclass(frozen=True)
class TimingRow:
    """One model of a benchmark.

    Attributes:
        label: The model.
        cpu: Median CPU time of a run over all threads, in seconds.
        wall: Median wall-clock time of a run, in seconds.
        load: Time to make the session, in seconds.
        ratio: Median CPU time over that of the reference.
        wall_ratio: The same of the wall-clock time.
        interval: The smallest and the largest CPU ratio of all rounds, in words.
        kind: "reference", "model", or "control" (the reference once more).
        uncertainty: Half the width of the confidence interval of `ratio`.
    """

    label: str
    cpu: float | None
    wall: float | None
    load: float | None
    ratio: float | None
    wall_ratio: float | None
    interval: str
    kind: str
    uncertainty: float = 0.0


# ---- verdicts


def margins(verdict: Data | None) -> list[Margin]:
    """Every comparison of a verdict: failures first, then the largest share of the tolerance."""
    found = [
        Margin(
            str(output.get("name") or "?"),
            str(output.get("probe") or "?"),
            str(output.get("optimizations") or ""),
            output.get("max_abs"),
            output.get("margin"),
            bool(output.get("ok")),
            str(output.get("reason") or ""),
        )
        for output in (verdict or {}).get("outputs") or []
    ]
    return sorted(found, key=lambda m: (m.ok, -_share(m), m.output, m.probe, m.mode))


def failures(verdict: Data | None) -> list[str]:
    """What failed other than a comparison: the result doesn't load, doesn't run, lacks an output."""
    return [str(f) for f in (verdict or {}).get("failures") or []]


def notes(verdict: Data | None) -> list[str]:
    """What was not compared, or with a wider tolerance, and why."""
    return [str(n) for n in (verdict or {}).get("notes") or []]


def worst_by_output(found: list[Margin]) -> list[Margin]:
    """The worst comparison of each output, in the order of `margins`."""
    worst: dict[str, Margin] = {}
    for margin in found:
        worst.setdefault(margin.output, margin)
    return list(worst.values())


def used_words(margin: Margin) -> str:
    """The share of the tolerance in words: "3.1 %", "no error", or "beyond" where no tolerance would do."""
    if margin.used is None:
        return "beyond"
    return "no error" if margin.used == 0 else units.percent(margin.used)


def verdict_sentence(verdict: Data) -> str:
    """A verdict as part of a sentence: "equal on 12 probes (worst error 3 % of the tolerance)"."""
    found = margins(verdict)
    probes = len({m.probe for m in found})
    if not verdict.get("ok"):
        if failed := failures(verdict):
            return f"NOT equal: {failed[0].rstrip('.')}"
        bad = {m.output for m in found if not m.ok}
        if bad:
            return f"NOT equal: {units.plural(len(bad), 'output')} beyond the tolerance"
        return f"NOT shown equal: {str(verdict.get('summary') or 'no reason given').rstrip('.')}"
    if not found:
        return str(verdict.get("summary") or "equal").rstrip(".")
    on = f"on {units.plural(probes, 'probe')}"
    if all(m.used == 0 for m in found):
        return f"the same numbers {on}"
    return f"equal {on} (worst error {units.percent(_share(found[0]))} of the tolerance)"


SHORT_KEY = "worst error as a share of the tolerance; same: no difference; empty: checked with a later pass"
"""What `short_verdict` means, for the legend of a table."""


def short_verdict(verdict: Data) -> str:
    """A verdict in a word or a number: "same", "3.1 %" (of the tolerance), "failed"."""
    found = margins(verdict)
    if not verdict.get("ok"):
        return "failed"
    if not found:
        return "equal"
    return "same" if all(m.used == 0 for m in found) else units.percent(_share(found[0]))


def method(verdict: Data) -> str:
    """How was compared, in a sentence or two."""
    found = margins(verdict)
    modes = {m.mode for m in found}
    sentences = []
    if len(modes) > 1:
        sentences.append("Both models ran in ONNX Runtime with all of its optimizations and with none.")
    elif modes == {"all"}:
        sentences.append("Both models ran in ONNX Runtime with all of its optimizations.")
    elif modes == {"none"}:
        sentences.append("Both models ran in ONNX Runtime with its optimizations off.")
    if words := tolerance_words(verdict):
        sentences.append(words)
    return " ".join(sentences)


def tolerance_words(verdict: Data) -> str:
    """The tolerances that were in force, in one sentence, or ""."""
    used = {
        (float(t.get("absolute") or 0), float(t.get("relative") or 0))
        for output in verdict.get("outputs") or []
        if (t := output.get("tolerance"))
    }
    if not used:
        return ""
    absolute, relative = max(used)
    least = "" if len(used) == 1 else "up to "
    return (
        f"Allowed at each element: {least}{absolute:.0e} of the output's largest magnitude + {relative:.0e} of its own."
    )


def _share(margin: Margin) -> float:
    return math.inf if margin.used is None else margin.used


# ---- benchmarks


def timing_rows(timing: Data | None) -> list[TimingRow]:
    """The models of a benchmark, the reference first, and the control last."""
    timing = timing or {}
    models = list(timing.get("models") or [])
    names = _short([str(model.get("name") or "?") for model in models])
    rows = [
        _timing_row(m, n, "model" if i else "reference") for i, (m, n) in enumerate(zip(models, names, strict=True))
    ]
    if control := timing.get("control"):
        rows.append(_timing_row(control, f"{names[0] if names else 'the original'} again (control)", "control"))
    return rows


def speed(timing: Data | None) -> str:
    """The CPU time of the last model over that of the reference, "0.93× CPU time", or "" where nothing was timed.

    Of a decoder that of a token that it writes and of one that it reads.
    """
    if generation := (timing or {}).get("generation"):
        last = generation["models"][-1]
        written, read = (units.ratio(last[f"{phase}_cpu_ratio"]["median"]) for phase in ("decode", "prefill"))
        return f"{written} CPU time of a token written, {read} of one read"
    rows = timing_rows(timing)
    measured = [row for row in rows if row.kind == "model" and row.ratio is not None]
    if not measured:
        return ""
    ratio = measured[-1].ratio
    assert ratio is not None
    return f"{units.ratio(ratio)} CPU time{' (within noise)' if abs(ratio - 1) <= _noise(rows) else ''}"


def timing_notes(timing: Data | None) -> list[str]:
    """How a benchmark was made, and how far its ratios can be trusted, in sentences."""
    timing = timing or {}
    found = []
    rows = timing_rows(timing)
    control = next((row for row in rows if row.kind == "control"), None)
    if control is not None and control.ratio is not None:
        found.append(
            f"Control: the original against itself measures {units.ratio(control.ratio)}; "
            f"a ratio within {units.percent(_noise(rows))} of 1 says nothing."
        )
    if timing.get("runs"):
        threads = timing.get("threads")
        calls = timing.get("calls") or 1
        each = f" of {units.plural(calls, 'run')} each" if calls > 1 else ""
        found.append(
            f"Medians of {units.plural(timing['runs'], 'round')}{each} after {timing.get('warmup') or 0} to warm up, "
            f"the models in turn in every round; threads: {threads or 'as ONNX Runtime chooses'}; "
            "ratio and range: over the rounds."
        )
    if feeds := timing.get("feeds"):
        found.append(f"Inputs: {_inputs(feeds)}.")
    return found


def generation_table(data: Data) -> tuple[list[str], list[list[str]]]:
    """Headers and cells of a benchmark of decoders, a row each, the control last."""
    rows = []
    names = [row.label for row in timing_rows(data)]
    for index, timing in enumerate([*data["models"], data["control"]]):
        row = [names[index], str(timing["cache"])]
        for phase in ("prefill", "decode"):
            ratio = timing[f"{phase}_ratio"]
            spread = f"{units.ratio(ratio['median'])} ± {ratio['uncertainty']:.2f}" if index else units.ratio(1.0)
            row += [f"{timing[f'{phase}_tokens_s']:,.1f}", spread, units.ratio(timing[f"{phase}_cpu_ratio"]["median"])]
        rows.append(row)
    return ["model", "cache", "read/s", "time", "CPU", "written/s", "time", "CPU"], rows


def generation_note(data: Data) -> str:
    """How decoders were timed."""
    batch, threads = units.plural(data["batch"], "row"), data["threads"] or "all"
    return (
        f"Tokens read per second (prefill) and written (decode), medians of {data['runs']} rounds in turn; {batch} of "
        f"{data['prompt_tokens']} prompt tokens and {data['new_tokens']} new ones, threads: {threads}. Time and CPU "
        "time are ratios to the first model: below 1 is faster, and none closer to 1 than the control's says anything."
    )


def _inputs(feeds: dict[str, list[int]]) -> str:
    """Names with shapes; those that differ in their numbers alone, such as a cache's, as one."""
    alike: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name, shape in feeds.items():
        alike.setdefault((re.sub(r"\d+", "*", name), tuple(shape)), []).append(name)
    return ", ".join(
        f"{names[0]} {list(shape)}" if len(names) == 1 else f"{pattern} {list(shape)} ({len(names)} times)"
        for (pattern, shape), names in alike.items()
    )


def _short(paths: list[str]) -> list[str]:
    """The last parts of the paths, as many as set them apart."""
    parts = [path.replace("\\", "/").split("/") for path in paths]
    for count in range(1, max(map(len, parts), default=1)):
        shown = ["/".join(p[-count:]) for p in parts]
        if len(set(shown)) == len(set(paths)):
            return shown
    return paths


def _timing_row(model: Data, label: str, kind: str) -> TimingRow:
    ratio = model.get("cpu_ratio") or {}
    low, high = ratio.get("low"), ratio.get("high")
    interval = (
        "" if low is None or high is None or kind == "reference" else f"{units.ratio(low)} to {units.ratio(high)}"
    )
    cpu, wall = model.get("cpu_ms"), model.get("wall_ms")
    return TimingRow(
        label,
        None if cpu is None else cpu / 1e3,
        None if wall is None else wall / 1e3,
        model.get("load_s"),
        ratio.get("median"),
        (model.get("wall_ratio") or {}).get("median"),
        interval,
        kind,
        float(ratio.get("uncertainty") or 0.0),
    )


def _noise(rows: list[TimingRow]) -> float:
    """How far from 1 a ratio must be to say something: beyond the control and the uncertainty of both, at least 1 %."""
    control = [abs(row.ratio - 1) + row.uncertainty for row in rows if row.kind == "control" and row.ratio is not None]
    return max([0.01, *control, *(row.uncertainty for row in rows)])
