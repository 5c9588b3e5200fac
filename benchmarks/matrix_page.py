"""The attention matrix as a table and as a page."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from matrix_judge import TOLERANCE, Outcome
from rich.table import Table
from rich.text import Text

_NOT_EXPORTED = "–"


def _row(outcome: Outcome) -> str:
    return outcome.model + (" + cache" if outcome.variant.endswith("-cache") else "")


def _column(outcome: Outcome) -> str:
    return " ".join(outcome.variant.split("-")[:2])


def _cell(outcome: Outcome) -> str:
    if not outcome.exported:
        return _NOT_EXPORTED
    if outcome.fault:
        return "failed"
    text = f"{outcome.raised}/{sum(outcome.left.values())}/{outcome.missed}"
    return text + (" off" if outcome.wrong else "")


def _grid(outcomes: Iterable[Outcome]) -> tuple[list[str], dict[str, dict[str, list[Outcome]]]]:
    columns: list[str] = []
    rows: dict[str, dict[str, list[Outcome]]] = {}
    for outcome in outcomes:
        column = _column(outcome)
        if column not in columns:
            columns.append(column)
        rows.setdefault(_row(outcome), {}).setdefault(column, []).append(outcome)
    return sorted(columns, key=lambda name: (name.split()[0], int(name.split()[-1]) if name[-1].isdigit() else 0)), rows


def _cells(outcomes: Sequence[Outcome]) -> str:
    return ", ".join(dict.fromkeys(map(_cell, outcomes)))


def totals(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """Sums over everything that was exported."""
    there = [o for o in outcomes if o.exported]
    return {
        "models": len({o.model for o in there}),
        "exports": len(there),
        "not exported": len(outcomes) - len(there),
        "attentions": sum(o.sites + o.others for o in there),
        "raised": sum(o.raised for o in there),
        "left": sum(sum(o.left.values()) for o in there),
        "missed": sum(o.missed for o in there),
        "of another kind, not seen": sum(o.unseen for o in there),
        "numbers off": sum(bool(o.wrong) for o in there),
        "failed": sum(bool(o.fault) for o in there),
    }


def table(outcomes: Sequence[Outcome]) -> Iterator[Table | Text]:
    """What the terminal shows."""
    columns, rows = _grid(outcomes)
    grid = Table(title="attentions raised / left with a reason / missed")
    grid.add_column("model")
    grid.add_column("true", justify="right")
    for column in columns:
        grid.add_column(column, justify="center")
    for name, cells in rows.items():
        first = next(iter(cells.values()))[0]
        shown = [_coloured(cells.get(column, [])) for column in columns]
        grid.add_row(name, _true(first), *shown)
    yield grid
    for title, entries in _lists(outcomes):
        if entries:
            part = Table(title=title, title_justify="left")
            part.add_column("times", justify="right")
            part.add_column("what", overflow="fold")
            part.add_column("where", overflow="fold")
            for text, places in entries:
                part.add_row(str(len(places)), Text(text), Text(_some(places)))
            yield part
    yield Text(", ".join(f"{value} {key}" for key, value in totals(outcomes).items()))


def _true(outcome: Outcome) -> str:
    return f"{outcome.sites}" + (f" + {outcome.others} other" if outcome.others else "")


def _coloured(outcomes: Sequence[Outcome]) -> Text:
    if not outcomes:
        return Text("")
    bad = any(o.bad for o in outcomes)
    left = any(o.left for o in outcomes)
    return Text(
        _cells(outcomes),
        style="red" if bad else "yellow" if left else "" if _cells(outcomes) == _NOT_EXPORTED else "green",
    )


def _some(places: Sequence[str], most: int = 6) -> str:
    return ", ".join(places[:most]) + (f" and {len(places) - most} more" if len(places) > most else "")


def _lists(outcomes: Sequence[Outcome]) -> Iterator[tuple[str, list[tuple[str, list[str]]]]]:
    def gathered(pairs: Iterable[tuple[str, Outcome]]) -> list[tuple[str, list[str]]]:
        found: dict[str, list[str]] = {}
        for text, outcome in pairs:
            places = found.setdefault(text, [])
            if (place := f"{outcome.model} {outcome.variant}") not in places:
                places.append(place)
        return sorted(found.items(), key=lambda item: -len(item[1]))

    yield "Missed", gathered(("softmax(q·kᵀ)·v that nothing found", o) for o in outcomes if o.missed)
    yield "Wrong", gathered((_general(text), o) for o in outcomes for text in o.wrong)
    yield "Failed", gathered((o.fault, o) for o in outcomes if o.exported and o.fault)
    yield "Left, with the reason", gathered((_general(text), o) for o in outcomes for text in o.left)
    yield "Of another kind, not seen", gathered(("not seen as an attention", o) for o in outcomes if o.unseen)
    yield "The original itself doesn't run", gathered((_general(text), o) for o in outcomes for text in o.unusable)
    refused = ((_general(o.fault.removeprefix("not exported: ")), o) for o in outcomes if not o.exported)
    yield "Not exported", gathered(refused)


def _general(text: str) -> str:
    """A reason without the names of nodes and values, so that equal ones are counted together."""
    text = text.removeprefix("attention isn't raised: ").partition("  [Caused by")[0]
    # A quoted name, and not what lies between two apostrophes of words.
    text = re.sub(r"(Name:)?(?<!\w)'(?!aten::)[^']*'(?!\w) ?", "", text)
    return re.sub(r"/\S+", "…", re.sub(r"\?\w+_\d+|\bval_\d+", "?", text)).strip()


def page(outcomes: Sequence[Outcome], forms: Mapping[str, str]) -> str:
    """The page as Markdown."""
    return "\n".join(_page(outcomes, forms)) + "\n"


def _page(outcomes: Sequence[Outcome], forms: Mapping[str, str]) -> Iterator[str]:
    count = totals(outcomes)
    yield "# Attention matrix"
    yield ""
    yield (
        "Tiny models with random weights from the transformers library, and small PyTorch modules for forms that it "
        "doesn't hold, by every exporter: what becomes of their attentions. Made by `make attention-matrix`."
    )
    yield ""
    yield "| " + " | ".join(count) + " |"
    yield "|" + "---|" * len(count)
    yield "| " + " | ".join(str(value) for value in count.values()) + " |"
    yield ""
    yield (
        "How many attentions a model has is counted while PyTorch runs it, and follows from its configuration. "
        "`export` is torch.export, `script` TorchScript, the number the opset; `+ cache` has past_key_values.* inputs "
        "and present.* outputs. A cell is *raised / left with a reason / missed*, counted before lowering; `–` is a "
        "model that the exporter doesn't export. Every export was optimized by the default recipe and compared in "
        f"ONNX Runtime with the original (batch 1 and 3, padded at either end, with and without a past): equal to "
        f"{TOLERANCE:g} of each output's largest magnitude, else the cell says `off`. Largest difference of all: "
        f"{max((o.error for o in outcomes), default=0.0):.1e}."
    )
    yield ""
    columns, rows = _grid(outcomes)
    yield "| model | form | true | " + " | ".join(columns) + " |"
    yield "|---|---|---|" + "---|" * len(columns)
    for name, cells in rows.items():
        first = next(iter(cells.values()))[0]
        shown = [_cells(cells.get(column, [])) for column in columns]
        form = forms.get(first.model, "") if not name.endswith("cache") else ""
        yield f"| {name} | {form} | {_true(first)} | " + " | ".join(shown) + " |"
    for title, entries in _lists(outcomes):
        if not entries:
            continue
        yield ""
        yield f"## {title}"
        yield ""
        for text, places in entries:
            yield f"- {_escaped(text)} ({len(places)}): {_some(places)}"
    operators = Counter[str]()
    for outcome in outcomes:
        operators.update(outcome.operators)
    yield ""
    yield "## What runs"
    yield ""
    yield (
        "Operators of the optimized models, all together: "
        + ", ".join(f"{n} {name}" for name, n in operators.most_common())
        + "."
    )


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "\\<").replace("_", "\\_").replace("*", "\\*")
