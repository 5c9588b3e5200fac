"""What a report says of quality, as plain rows and sentences: the terminal and the HTML page print the same ones."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from graphopt.report import measured, units
from graphopt.verification.quality.floors import shown
from graphopt.verification.quality.metrics import Scale

Data = Mapping[str, Any]

HEADERS = ("", "original", "result", "change", "floor")


@dataclasses.dataclass(frozen=True)
class QualityRow:
    """One figure of the original and of the result, in words.

    Attributes:
        label: What it is.
        before: The original's; a dash where the figure compares the two.
        after: The result's.
        change: How they differ.
        floor: What was asked for; "" for nothing.
        missed: Whether it wasn't reached.
    """

    label: str
    before: str
    after: str
    change: str
    floor: str = ""
    missed: bool = False

    @property
    def cells(self) -> list[str]:
        """As `HEADERS` has them."""
        return [self.label, self.before, self.after, self.change, f"{self.floor} MISSED" if self.missed else self.floor]


def quality_rows(quality: Data | None, timing: Data | None = None) -> list[QualityRow]:
    """The metrics, the bytes on disk, and the time of one inference where it was measured."""
    if not quality:
        return []
    missed = {entry.get("metric") for entry in quality.get("missed") or []}
    floors = quality.get("floors") or {}
    rows = []
    for metric in quality.get("metrics") or []:
        name = metric.get("name")
        label = f"{_capital(str(metric.get('title')))} ({name})"
        rows.append(QualityRow(label, *_figures(metric), str(floors.get(name, "")), name in missed))
    before, after = quality.get("bytes") or (None, None)
    rows.append(QualityRow("Bytes on disk", units.size(before), units.size(after), units.change(before, after)))
    times = {row.kind: row.cpu for row in measured.timing_rows(timing)}
    first, second = times.get("reference"), times.get("model")
    if first is not None and second is not None:
        rows.append(
            QualityRow("CPU time of one inference", units.seconds(first), units.seconds(second),
                       units.change(first, second))
        )  # fmt: skip
    if generation := (timing or {}).get("generation"):
        for label, phase in (("Tokens read a second", "prefill"), ("Tokens written a second", "decode")):
            first, *_, last = (float(model[f"{phase}_tokens_s"]) for model in generation["models"])
            rows.append(QualityRow(label, f"{first:,.1f}", f"{last:,.1f}", units.change(first, last)))
    return rows


def quality_notes(quality: Data | None) -> list[str]:
    """On what it was judged, and what a reader must know besides."""
    if not quality:
        return []
    on = f"On {quality.get('data')}: {quality.get('samples')}; a dash where a number compares the two models."
    return [on, *(str(note) for note in quality.get("notes") or [])]


def quality_headline(quality: Data | None) -> str:
    """The first metric of a result, for a headline; "" without one."""
    metric = next(iter((quality or {}).get("metrics") or []), None)
    if metric is None:
        return ""
    before, after, _ = _figures(metric)
    between = f"{before} {units.ARROW} {after}" if metric.get("reference") is not None else after
    return f"{metric.get('title')} {between}"


def missed_floors(quality: Data | None) -> list[str]:
    """A sentence without a full stop for each floor that wasn't reached."""
    return [str(entry.get("reason")) for entry in (quality or {}).get("missed") or []]


def _figures(metric: Data) -> tuple[str, str, str]:
    """(original, result, change) of a metric in words."""
    scale: Scale = "share" if metric.get("scale") == "share" else "number"
    value, reference = metric.get("value"), metric.get("reference")
    after = shown(math.nan if value is None else float(value), scale)
    if reference is None:
        return units.MISSING, after, ""
    before = shown(float(reference), scale)
    if value is None:
        return before, after, ""
    if scale == "number":
        return before, after, units.change(reference, value)
    points = 100 * (value - reference)
    sign = "+" if points > 0 else units.MINUS
    return before, after, "same" if points == 0 else f"{sign}{abs(points):.2g} points"


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]
