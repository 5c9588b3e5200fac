"""Building blocks of the HTML report. Whatever comes from a model goes through `text`, which escapes it."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Iterable, Sequence


def text(value: object) -> str:
    """Escaped text. Control characters, which have no place in HTML, are shown as U+FFFD."""
    shown = "".join(c if c in "\n\t" or (ord(c) >= 32 and not 0x7F <= ord(c) < 0xA0) else "\ufffd" for c in str(value))
    shown = shown.encode("utf-8", "replace").decode("utf-8")  # lone surrogates
    return html.escape(shown, quote=True)


def name(value: object) -> str:
    """A name of the model, in fixed width, which breaks after slashes and underscores first."""
    shown = text(value).replace("/", "/<wbr>").replace("_", "_<wbr>")
    return f"<code>{shown}</code>"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One cell of a table: its HTML, the key it is sorted by, its class ("number" is aligned to the right)."""

    html: str
    key: float | str | None = None
    kind: str = ""


def number(shown: str, key: float | None = None, kind: str = "") -> Cell:
    """A cell that holds a number; a missing one is sorted last."""
    return Cell(text(shown), key if key is not None else float("-inf"), f"number {kind}".strip())


def label(shown: str, *, code: bool = False, kind: str = "") -> Cell:
    """A cell that holds words."""
    return Cell(name(shown) if code else text(shown), shown.lower(), kind)


def table(
    caption: str,
    headers: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    *,
    row_kinds: Sequence[str] = (),
    sortable: bool = True,
    kind: str = "",
) -> str:
    """A table. The first cell of each row is its header; headers of columns of numbers are aligned like these."""
    kinds = [cell.kind for cell in rows[0]] if rows else [""] * len(headers)
    heads = "".join(
        f'<th scope="col"{_class(" ".join(k for k in kind.split() if k in _HEAD_KINDS))}>{text(h)}</th>'
        for h, kind in zip(headers, kinds, strict=True)
    )
    lines = []
    for index, row in enumerate(rows):
        cells = "".join(_cell(cell, first=not i) for i, cell in enumerate(row))
        row_kind = row_kinds[index] if index < len(row_kinds) else ""
        lines.append(f"<tr{_class(row_kind)}>{cells}</tr>")
    classes = " ".join(filter(None, ["sortable" if sortable and len(rows) > 2 else "", kind]))
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{text(caption)}"><table{_class(classes)}>'
        f"<caption><span>{text(caption)}</span></caption><thead><tr>{heads}</tr></thead><tbody>\n"
        + "\n".join(lines)
        + "\n</tbody></table></div>"
    )


_HEAD_KINDS = ("number", "minor")
"""Classes of a cell that its column's header shares: alignment, and whether a narrow page leaves it out."""


def _cell(cell: Cell, *, first: bool) -> str:
    key = "" if cell.key is None else f' data-key="{text(cell.key)}"'
    tag = 'th scope="row"' if first else "td"
    return f"<{tag}{_class(cell.kind)}{key}>{cell.html}</{'th' if first else 'td'}>"


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""


def bars(shares: Iterable[tuple[float, str]], *, limit: bool = False) -> Cell:
    """Horizontal bars one under the other, each (share of the full width, class); with a line at the full width.

    The numbers stand in the other cells, so that the picture is hidden from screen readers.
    """
    entries = list(shares)
    height, most = 6, 100
    parts = [
        f'<rect class="{kind}" x="0" y="{i * (height + 1)}" width="{_within(most * share, most)}" height="{height}"/>'
        for i, (share, kind) in enumerate(entries)
    ]
    total = len(entries) * (height + 1) - 1
    if limit:
        parts.append(f'<rect class="limit" x="99.2" y="0" width="0.8" height="{total}"/>')
    svg = (
        f'<svg class="bar" viewBox="0 0 100 {total}" height="{total}" preserveAspectRatio="none" aria-hidden="true" '
        f'focusable="false"><rect class="track" x="0" y="0" width="100" height="{total}"/>{"".join(parts)}</svg>'
    )
    return Cell(svg, max((share for share, _ in entries), default=0.0), "chart")


def _within(width: float, most: float) -> str:
    return f"{min(max(width, 0.0), most):.2f}"


def details(summary_html: str, body: str, *, open_: bool = False, kind: str = "") -> str:
    """A part that opens on a click. `summary_html` is HTML."""
    return f"<details{_class(kind)}{' open' if open_ else ''}><summary>{summary_html}</summary>{body}</details>"


def code_block(title: str, code: str) -> str:
    """Lines to copy."""
    lines = f'<pre tabindex="0"><code>{text(code)}</code></pre>'
    return f'<figure class="code"><figcaption>{text(title)}</figcaption>{lines}</figure>'


def definitions(pairs: Iterable[tuple[str, str]]) -> str:
    """Terms and their values."""
    return "<dl>" + "".join(f"<dt>{text(k)}</dt><dd>{text(v)}</dd>" for k, v in pairs) + "</dl>"
