"""The export matrix as a table and as a page."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from decoder_domain import TOLERANCE
from rich.table import Table
from rich.text import Text

Result = dict[str, Any]
OTHER = "other numbers"
_NAMES = {
    "graphopt": "graphopt",
    "torch": "torch.onnx.export",
    "transformers": "transformers' exporter",
    "optimum": "optimum-onnx",
}


def alike(result: Result) -> int:
    """The calls that the files answer as PyTorch."""
    return sum(isinstance(error, float) and error <= TOLERANCE for error in (result["calls"] or {}).values())


def right(result: Result) -> bool:
    """Exported, and every call answered as PyTorch."""
    return bool(result["calls"]) and not result["error"] and alike(result) == len(result["calls"])


def largest(result: Result) -> float:
    """The largest error of the calls that are alike."""
    good = [e for e in (result["calls"] or {}).values() if isinstance(e, float) and e <= TOLERANCE]
    return max(good, default=0.0)


def memory(result: Result) -> float:
    """Private memory that the export took, beside the libraries', in MB."""
    return float(result["peak_mb"] - result["base_mb"])


def troubles(result: Result) -> dict[str, list[str]]:
    """What is wrong, and in which calls; the calls are empty where there is no export."""
    if result["error"]:
        return {_general(result["error"]): []}
    found: dict[str, list[str]] = {}
    for label, error in (result["calls"] or {}).items():
        if isinstance(error, str):
            found.setdefault(_general(error), []).append(label)
        elif error > TOLERANCE:
            found.setdefault(OTHER, []).append(label)
    return found


def _general(text: str) -> str:
    """A reason without the names of nodes and files, so that equal ones are counted together."""
    text = re.sub(r"[\w.+-]*(?:/[\w.+-]+){2,}", "…", text)
    text = re.sub(r"Name:'[^']*' ?", "", text)
    text = re.sub(
        r"(?<=export a )\w+(?= model, that is).*", "… model, that is a custom or unsupported architecture", text
    )
    text = re.sub(r"\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    return re.sub(r"\b(val|node\w*|s|u)_?\d+\b", "?", text).strip()


def summary(results: Sequence[Result]) -> list[dict[str, str]]:
    """One row an exporter."""
    rows = []
    for tool in _tools(results):
        ours = [r for r in results if r["tool"] == tool]
        made = [r for r in ours if not r["error"]]
        asked = sum(len(r["calls"] or {}) for r in made)
        rows.append(
            {
                "exporter": _NAMES[tool],
                "models": str(len(ours)),
                "exported": str(len(made)),
                "right in every call": str(sum(map(right, ours))),
                "calls alike, of the exported": f"{sum(map(alike, made))} of {asked}",
                "median seconds": _median([r["cpu_seconds"] for r in made], "{:.1f}"),
                "median MB": _median([memory(r) for r in made], "{:.0f}"),
                "median nodes": _median([r["nodes"] for r in made if r["nodes"]], "{:.0f}"),
            }
        )
    return rows


def _tools(results: Sequence[Result]) -> list[str]:
    return [tool for tool in _NAMES if any(r["tool"] == tool for r in results)]


def _median(values: Sequence[float], form: str) -> str:
    return form.format(statistics.median(values)) if values else ""


def _cell(result: Result | None) -> str:
    if result is None:
        return ""
    if result["error"]:
        return "–"
    return f"{alike(result)}/{len(result['calls'])} · {result['cpu_seconds']:.1f} s · {memory(result):.0f} MB"


def _rows(results: Sequence[Result]) -> dict[str, dict[str, Result]]:
    rows: dict[str, dict[str, Result]] = {}
    for result in results:
        rows.setdefault(result["model"], {})[result["tool"]] = result
    return rows


def table(results: Sequence[Result]) -> Iterator[Table]:
    """What the terminal shows."""
    grid = Table(title="calls alike · CPU seconds · MB beside the libraries")
    tools = _tools(results)
    grid.add_column("model")
    for tool in tools:
        grid.add_column(_NAMES[tool], justify="right")
    for key, cells in _rows(results).items():
        grid.add_row(key, *(_coloured(cells.get(tool)) for tool in tools))
    yield grid
    for tool in tools:
        entries = _gathered([r for r in results if r["tool"] == tool])
        if entries:
            part = Table(title=f"{_NAMES[tool]}: what isn't right", title_justify="left")
            part.add_column("what", overflow="fold")
            part.add_column("where", overflow="fold")
            for text, places in entries.items():
                part.add_row(Text(text), Text("; ".join(places)))
            yield part
    rows = summary(results)
    total = Table()
    for name in rows[0] if rows else ():
        total.add_column(name)
    for row in rows:
        total.add_row(*row.values())
    yield total


def _coloured(result: Result | None) -> Text:
    good = result is not None and right(result)
    return Text(_cell(result), style="" if result is None else "green" if good else "red")


def _gathered(results: Sequence[Result]) -> dict[str, list[str]]:
    """Models by what is wrong, those with most models first."""
    found: dict[str, list[str]] = {}
    for result in results:
        for text, labels in troubles(result).items():
            found.setdefault(text, []).append(result["model"] + _where(result, text, labels))
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def _where(result: Result, text: str, labels: Sequence[str]) -> str:
    """How far off, in which calls, and what is known of why."""
    own = result["own"]
    if not labels:
        return " (its transformers doesn't load it)" if isinstance(own, str) and own else ""
    some = "; ".join(labels[:2]) + (f" and {len(labels) - 2} more" if len(labels) > 2 else "")
    told = f" ({some if len(labels) < len(result['calls']) else 'all calls'})"
    if text != OTHER:
        return told
    worst = max(error for label, error in result["calls"].items() if label in labels)
    told = f" by {worst:.1g}{told}"
    if isinstance(own, float) and own > TOLERANCE:
        return f"{told}, as its transformers in PyTorch"
    return told + (f", without {', '.join(result['without'])}" if result["without"] else "")


def page(results: Sequence[Result], forms: Mapping[str, str], versions: Mapping[str, str]) -> str:
    """The page as Markdown."""
    return "\n".join(_page(results, forms, versions)) + "\n"


def _page(results: Sequence[Result], forms: Mapping[str, str], versions: Mapping[str, str]) -> Iterator[str]:
    yield "# Export matrix"
    yield ""
    yield (
        "Tiny models with random weights from the transformers library, saved as Hugging Face folders and exported by "
        "each exporter: do the files answer as PyTorch does? Made by `make export-matrix`; every number is in "
        "`export-matrix.json`."
    )
    yield ""
    rows = summary(results)
    if rows:
        yield "| " + " | ".join(rows[0]) + " |"
        yield "|" + "---|" * len(rows[0])
        for row in rows:
            yield "| " + " | ".join(row.values()) + " |"
        yield ""
    yield (
        "A decoder is asked 18 calls: batch 1 and 3, a prompt, one token after a cache, several tokens after a cache, "
        "unpadded and padded at either end. An encoder-decoder the same, where its encoder's input is padded; other "
        f"models batch 1 and 3, two lengths, padded at either end. Alike is a difference of at most {TOLERANCE:g} of "
        "the largest number, at tokens that aren't padding. Each file fills its own cache."
    )
    yield ""
    yield (
        "A cell is *calls alike / calls · seconds · MB*: seconds of one core without the imports of libraries, and the "
        "most private memory of the process beyond that of the imported libraries; `–` is a model that isn't exported. "
        "graphopt's seconds hold its verification against PyTorch, and optimum's its validation."
    )
    yield ""
    yield (
        "torch.onnx.export (torch.export) is given the module with its cache as tensors that a DynamicCache is made "
        "of, and an encoder-decoder without a cache. transformers' exporter is `OnnxExporter` with dynamic shapes, a "
        "decode of several tokens, and the encoder beside. optimum-onnx needs an older transformers, so it is given a "
        "config.json in that one's spelling; where that one answers otherwise in PyTorch already, the list says so."
    )
    yield ""
    yield "Versions: " + ", ".join(f"{name} {text}" for name, text in versions.items()) + "."
    yield ""
    worst = max((largest(r) for r in results if r["tool"] == "graphopt"), default=0.0)
    yield f"Largest difference of graphopt's calls that are alike: {worst:.1e}."
    yield ""
    tools = _tools(results)
    yield "| model | form | " + " | ".join(_NAMES[tool] for tool in tools) + " |"
    yield "|---|---|" + "---|" * len(tools)
    for key, cells in _rows(results).items():
        yield f"| {key} | {forms.get(key, '')} | " + " | ".join(_cell(cells.get(tool)) for tool in tools) + " |"
    for tool in tools:
        entries = _gathered([r for r in results if r["tool"] == tool])
        yield ""
        yield f"## {_NAMES[tool]}: what isn't right"
        yield ""
        if not entries:
            yield "Nothing."
        for text, places in entries.items():
            yield f"- {_escaped(text)} ({len(places)}): {'; '.join(places)}"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "\\<").replace("_", "\\_").replace("*", "\\*")
