"""The page of the zoo, from its results."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

FLOOR = 0.01
"""Two ratios that are nearer than this count as the same, however quiet the machine was."""

_PACKED = "one operator for Q, K, V and the attention (`com.microsoft.Attention`), which graphopt doesn't write yet"
_BLOCKED = "a file for one processor, its weights in the blocked layout that ONNX Runtime makes of any file at load"
REASONS: dict[str, str] = {
    "minilm-torch-export-sdpa": _PACKED,
    "minilm-torch-export-eager": _PACKED,
    "minilm-torchscript-sdpa": _PACKED,
    "minilm-torchscript-eager": _PACKED,
    "openwakeword-embedding": _BLOCKED,
}
"""Why a peer's file of a model is faster, where it is: by model, or by model and workload."""

Results = dict[str, Any]


def ratio(values: list[float]) -> float:
    """One ratio of those of the sittings: their geometric mean."""
    return math.exp(sum(map(math.log, values)) / len(values))


def noise(timing: Results, name: str | None = None) -> float:
    """How far a ratio may be from the truth, by what is more: how far the original seems to be from itself, how far
    the sittings are apart, or the uncertainty of the medians."""
    control = max(abs(value - 1) for value in timing["control"])
    values = timing["ratios"][name] if name else timing["control"]
    spread = timing["uncertainty"].get(name, 0.0) if name else 0.0
    return max(FLOOR, control, (max(values) - min(values)) / 2, spread)


def rows(data: Results) -> Iterator[tuple[str, Results, Results]]:
    """The label, the model and the timing of every workload."""
    for model in data["models"]:
        for timing in model["timings"]:
            yield " ".join(filter(None, (model["model"], timing["workload"]))), model, timing


def slower(timing: Results, name: str = "graphopt") -> bool:
    """Whether a tool's file is slower than the original beyond the noise."""
    return name in timing["ratios"] and ratio(timing["ratios"][name]) > 1 + noise(timing, name)


def best_peer(model: Results, timing: Results) -> str | None:
    """The peer with the fastest file that is equal."""
    equal = [n for n in timing["ratios"] if not n.startswith("graphopt") and model["tools"][n].get("equal")]
    return min(equal, key=lambda n: ratio(timing["ratios"][n]), default=None)


def behind(model: Results, timing: Results, name: str = "graphopt") -> str | None:
    """The best peer where its file is faster than graphopt's beyond the noise of both."""
    best = best_peer(model, timing)
    if best is None or name not in timing["ratios"]:
        return best
    both = max(noise(timing, best), noise(timing, name))
    return best if ratio(timing["ratios"][name]) - ratio(timing["ratios"][best]) > both else None


def page(data: Results) -> str:
    """The whole page as Markdown."""
    return "\n".join([*_head(data), *_summary(data), *times(data), *_sizes(data), *_costs(data), *faults(data)])


def _head(data: Results) -> Iterator[str]:
    where = data["environment"]
    versions = {
        name: f"{name} {version}" if version else f"{name} (not installed)"
        for name, version in data["versions"].items()
    }
    yield "# The zoo"
    yield ""
    yield (
        "Real models through graphopt's default recipe and through its peers, each with its defaults. `make zoo` "
        "installs the peers, measures everything and writes this page and `zoo.json` beside it."
    )
    yield ""
    yield (
        f"Measured on {where['date']} with ONNX Runtime {where['onnxruntime']}, {where['threads']} thread"
        f"{'s' * (where['threads'] != 1)} of {where['processor']}; {', '.join(versions.values())}. "
        "onnxscript: its optimizer; onnxscript for ORT: `optimize_for_ort`; ORT transformers: "
        "`onnxruntime.transformers.optimizer`; ORT offline: the graph that ONNX Runtime writes after all of its own "
        "optimizations, good for this processor only."
    )
    yield ""


def _summary(data: Results) -> Iterator[str]:
    models, every = data["models"], list(rows(data))
    equal = sum(bool(m["tools"]["graphopt"].get("equal")) for m in models)
    slow = [label for label, _, t in every if slower(t)]
    fast = [label for label, _, t in every if "graphopt" in t["ratios"] and _faster(t)]
    back = [f"{label} ({peer})" for label, m, t in every if (peer := behind(m, t))]
    yield f"- graphopt: equal {equal} of {len(models)}."
    if missing := data.get("not_measured"):
        yield f"- Not measured in this run: {', '.join(missing)}."
    yield f"- Slower than the original beyond the noise: {', '.join(slow) or 'none'} of {len(every)} workloads."
    yield f"- Faster beyond the noise: {len(fast)} of {len(every)}: {', '.join(fast) or 'none'}."
    yield f"- The best peer is faster than graphopt beyond the noise on: {', '.join(back) or 'none'}."
    for name in data["versions"]:
        found = [m["tools"][name] for m in models if name in m["tools"]]
        failed = sum(1 for t in found if t.get("error") or not t.get("loads"))
        differs = sum(1 for t in found if t.get("loads") and not t.get("equal"))
        late = sum(slower(t, name) for _, _, t in every)
        if name != "graphopt":
            yield f"- {name}: fails on {failed}, not equal on {differs}, slower than the original on {late}."
    yield ""


def _faster(timing: Results) -> bool:
    return ratio(timing["ratios"]["graphopt"]) < 1 - noise(timing, "graphopt")


def times(data: Results, clock: str = "CPU") -> Iterator[str]:
    """The table of ratios of one clock: "CPU" or "wall-clock"."""
    names = list(data["versions"])
    yield f"## {clock[0].upper()}{clock[1:]} time"
    yield ""
    yield (
        f"{clock[0].upper()}{clock[1:]} time of a run over that of the original under ONNX Runtime's defaults: medians "
        "over interleaved rounds in "
        "two sittings of fresh sessions, spinning off. Noise: the largest difference from 1 of the original against "
        f"itself in the same rounds, at least {FLOOR}. Bold: within the noise of the fastest that is equal, where that "
        "is faster than the original. ≠: not equal to the original; –: fails (see below)."
    )
    yield ""
    yield f"| model | original, ms | noise | {' | '.join(names)} | why |"
    yield "|---|---|---|" + "---|" * len(names) + "---|"
    for label, model, timing in rows(data):
        equal = [n for n in timing["ratios"] if model["tools"][n].get("equal")]
        best = min((ratio(timing["ratios"][n]) for n in equal), default=1.0)
        cells = []
        for name in names:
            if name not in timing["ratios"]:
                cells.append("–")
                continue
            value = ratio(timing["ratios"][name])
            text = f"{value:.2f}" + ("" if name in equal else " ≠")
            gain = best < 1 - noise(timing) and name in equal and value <= best + noise(timing)
            cells.append(f"**{text}**" if gain else text)
        why = REASONS.get(label, REASONS.get(model["model"], "")) if behind(model, timing) or slower(timing) else ""
        yield f"| {label} | {timing['original_ms']:.3g} | {noise(timing):.3f} | {' | '.join(cells)} | {why} |"
    yield ""


def by_wall_clock(data: Results) -> Results:
    """The same results with wall-clock time in place of CPU time."""
    models = [
        {**model, "timings": [{"workload": t["workload"], **t["wall"]} for t in model["timings"]]}
        for model in data["models"]
    ]
    return {**data, "models": models}


def table(
    data: Results, title: str, text: str, original: Callable[[Results], str], cell: Callable[[Results], str]
) -> Iterator[str]:
    """A table of what was found of the files: a row for each model, a column for each tool."""
    names = list(data["versions"])
    yield f"## {title}"
    yield ""
    yield text
    yield ""
    yield f"| model | original | {' | '.join(names)} |"
    yield "|---|---|" + "---|" * len(names)
    for model in data["models"]:
        cells = [cell(model["tools"].get(name, {})) for name in names]
        yield f"| {model['model']} | {original(model['original'])} | {' | '.join(cells)} |"
    yield ""


def _sizes(data: Results) -> Iterator[str]:
    def nodes(found: Results) -> str:
        return "–" if found.get("nodes") is None else f"{found['nodes']}{'' if found.get('equal', True) else ' ≠'}"

    def megabytes(found: Results) -> str:
        return "–" if found.get("bytes") is None else f"{found['bytes'] / 1e6:.2f}"

    yield from table(data, "Nodes", "Of all graphs, with branches and function bodies.", nodes, nodes)
    yield from table(data, "Bytes", "MB on disk, external data included.", megabytes, megabytes)


def _costs(data: Results) -> Iterator[str]:
    def cost(found: Results) -> str:
        if found.get("error") or "wall_s" not in found:
            return "–"
        text = f"{found['wall_s']:.1f} s, {found['peak_mb']:.0f} MB"
        if "unverified_wall_s" in found:
            text += f" ({found['unverified_wall_s']:.1f} s, {found['unverified_peak_mb']:.0f} MB)"
        return text

    yield from table(
        data,
        "Cost of the tool",
        "Wall-clock seconds and peak resident memory of the whole process. graphopt verifies what it does; in "
        "parentheses without that, as its peers work.",
        lambda _: "",
        cost,
    )


def faults(data: Results) -> Iterator[str]:
    """What fails, and how."""
    yield "## What fails or isn't equal"
    yield ""
    found = False
    for model in data["models"]:
        for name, tool in model["tools"].items():
            what = tool.get("error") or ("" if tool.get("equal") else tool.get("verdict", ""))
            if what and not what.startswith("not installed"):
                found = True
                yield f"- {model['model']}, {name}: {_plain(what)}"
    if not found:
        yield "Nothing."
    yield ""


def _plain(text: str) -> str:
    """One line that Markdown shows as it is, without this machine's folders."""
    words = [w.rsplit("/", 1)[-1] if w.count("/") > 1 else w for w in text.replace("|", "\\|").split()]
    line = " ".join(words).replace("<", "&lt;").replace("*", "\\*")
    return line if len(line) <= 300 else line[:297] + "..."
