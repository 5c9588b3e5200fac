"""Writing reports to a terminal: lines, lists and tables that any width, colour and encoding can take."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from graphopt.report import units

NAME_COLUMNS = 12
"""What a column with names has at least; a table that needs more than the terminal's width is wider than that."""

_ASCII = str.maketrans({"→": "->", "−": "-", "×": "x", "–": "-", "…": "...", "µ": "u", "·": "-", "“": '"', "”": '"'})


class Printer:
    """Writes to a console without its markup, so that names from a model are printed as they are."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._ascii = console.options.ascii_only

    def text(self, words: str, style: str = "") -> Text:
        """Text that the console's encoding can hold; control characters, which could steer the terminal, are shown."""
        if self._ascii:
            words = words.translate(_ASCII)
        words = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)
        encoding = "ascii" if self._ascii else "utf-8"
        return Text(words.encode(encoding, "backslashreplace").decode(encoding), style=style)

    def line(self, words: str = "", style: str = "") -> None:
        """A line, which wraps where the console is narrow."""
        self._console.print(self.text(words, style), soft_wrap=False)

    def title(self, words: str) -> None:
        """The first line."""
        self.line(words, style="bold")

    def heading(self, words: str, style: str = "bold") -> None:
        """A heading after an empty line."""
        self.line()
        self.line(words, style)

    def bullet(self, words: str, style: str = "") -> None:
        """An entry of a list."""
        self.item("-", words, style=style)

    def item(self, mark: str, words: str, example: str = "", style: str = "") -> None:
        """A line with a mark before it; what doesn't fit goes on under the words."""
        grid = Table.grid(padding=(0, 1, 0, 0))
        grid.add_column(justify="right", min_width=4 if example else 1, no_wrap=True)
        grid.add_column(overflow="fold")
        grid.add_row(self.text(mark), self.text(words, style))
        if example:
            grid.add_row("", self.text(example, "dim"))
        self._console.print(grid)

    def more(self, number: int, where: str) -> None:
        """Say how much isn't shown."""
        if number > 0:
            self.line(f"and {units.count(number)} more: {where}", style="dim")

    def table(
        self,
        headers: Sequence[str],
        rows: Sequence[Sequence[str]],
        *,
        right: Sequence[int] = (),
        styles: Sequence[str] = (),
    ) -> None:
        """A table; columns in `right` hold numbers, the others wrap where the console is narrow."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False, header_style="")
        for index, header in enumerate(headers):
            numeric = index in right
            table.add_column(
                self.text(header, "dim"),
                justify="right" if numeric else "left",
                no_wrap=numeric,
                overflow="fold",
            )
        for index, row in enumerate(rows):
            table.add_row(*[self.text(cell) for cell in row], style=styles[index] if index < len(styles) else None)
        widest = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
        needed = sum(2 + (w if i in right else min(w, NAME_COLUMNS)) for i, w in enumerate(widest))
        if needed > self._console.width:
            table.width = needed
        self._console.print(table, crop=False)
