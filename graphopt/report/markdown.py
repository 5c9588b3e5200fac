"""Parts of generated Markdown pages, and how a folder of such pages is kept up to date."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

MARK = "<!-- Generated from {source} by `make docs`: change the docstring there, not this page. -->"
"""The first line of every generated page."""


def capital(text: str) -> str:
    """The text with a capital at its beginning."""
    return text[:1].upper() + text[1:]


def cell(text: str) -> str:
    """Text for one cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    ruled = [f"| {' | '.join(line)} |" for line in lines]
    ruled[1] = f"|{'---|' * len(head)}"
    return "\n".join(ruled)


def write_pages(folder: str | Path, wanted: Mapping[str, str]) -> list[Path]:
    """Write pages into `folder` and remove generated ones that aren't wanted; returns the files that changed.

    Args:
        folder: The folder, which is made where it is missing.
        wanted: The text of each page by file name.
    """
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    changed = []
    for name, text in wanted.items():
        path = root / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            changed.append(path)
    for path in _orphans(root, wanted):
        path.unlink()
        changed.append(path)
    return changed


def check_pages(folder: str | Path, wanted: Mapping[str, str]) -> list[str]:
    """One line for each page of `folder` that is missing, out of date, or left of something that is gone."""
    root = Path(folder)
    problems = []
    for name, text in wanted.items():
        path = root / name
        if not path.is_file():
            problems.append(f"{path} is missing")
        elif path.read_text(encoding="utf-8") != text:
            problems.append(f"{path} is out of date")
    return problems + [f"{path} belongs to nothing" for path in _orphans(root, wanted)]


def _orphans(root: Path, wanted: Mapping[str, str]) -> list[Path]:
    prefix = MARK.partition("{")[0]
    return [
        path
        for path in sorted(root.glob("*.md"))
        if path.name not in wanted and path.read_text(encoding="utf-8").startswith(prefix)
    ]
