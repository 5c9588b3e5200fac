"""What the HTML report says of quality."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graphopt.report.markup import label, number, table, text
from graphopt.report.quality_lines import HEADERS, missed_floors, quality_notes, quality_rows

Data = Mapping[str, Any]


def quality_section(report: Data) -> str:
    """The body of the section, or "" where nothing was judged."""
    quality = report.get("quality")
    found = quality_rows(quality, report.get("timing"))
    if not found:
        return ""
    rows = [[label(row.label), *(number(cell) for cell in row.cells[1:4]), label(row.cells[4])] for row in found]
    kinds = ["bad" if row.missed else "" for row in found]
    missed = "".join(f'<p class="bad-text">Floor missed: {text(s)}.</p>' for s in missed_floors(quality))
    caption = "The result beside the original at its task"
    notes = "".join(f'<p class="soft">{text(note)}</p>' for note in quality_notes(quality))
    return missed + table(caption, HEADERS, rows, row_kinds=kinds, sortable=False, kind="compact") + notes
