"""The pages of passes: what they are made of, and that those of this package are complete."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import onnx_ir as ir
import pytest

from graphopt.passes import registry
from graphopt.passes.base import Guarantee, Pass
from graphopt.report import pages
from graphopt.report.markdown import check_pages, write_pages


class Prune(Pass):
    """Remove the smallest weights | of each layer.

    Keeps what matters.

    **Options:** `ratio` (share of weights, default 0.5): how many go. `by` (default row): one of
    row and column; the `ratio` holds for each.

    **When not to use it:** never.
    """

    name: ClassVar[str] = "prune"
    family: ClassVar[str] = "width"
    guarantee: ClassVar[Guarantee] = Guarantee.LOSSY
    paper: ClassVar[str] = "Learning both Weights and Connections"

    def __init__(self, ratio: float = 0.5, by: str = "row", *, undocumented: tuple[int, ...] = (1, 2)) -> None:
        super().__init__()

    def apply(self, model: ir.Model) -> bool:
        """See the class."""
        return False


class Listed(Prune):
    """Remove.

    Options:
        ratio: How many go,
            in all.
        by: Row or column.
    """


def test_a_page_has_all_parts() -> None:
    text = pages.page(Prune)
    assert "# prune\n" in text
    assert "| width | lossy | Learning both Weights and Connections |" in text
    assert "Keeps what matters." in text
    assert "**Options:**" not in text
    assert "**When not to use it:** never." in text
    assert "| `ratio` | `float` | `0.5` | how many go (share of weights) |" in text
    assert "| `by` | `str` | `row` | one of row and column; the `ratio` holds for each |" in text
    assert "| `undocumented` | `tuple[int, ...]` | `[1, 2]` |  |" in text
    assert "  - prune: {ratio: 0.5, by: row, undocumented: [1, 2]}" in text


def test_the_other_style_of_options() -> None:
    assert pages.option_texts(Listed) == {"ratio": "How many go, in all", "by": "Row or column"}


class Silent(Prune):
    """Remove.

    **Options:** none of the names that it has.
    """


def test_options_that_are_not_described() -> None:
    assert pages.option_texts(Silent) == {}


def test_tables_survive_what_the_docstring_holds() -> None:
    assert "Remove the smallest weights \\| of each layer" in pages.index([Prune])


@pytest.mark.parametrize("cls", registry.builtin().values(), ids=lambda cls: cls.name)
def test_every_pass_is_documented(cls: type[Pass]) -> None:
    text = pages.page(cls)
    assert "When not to use it" in text, f"{cls.name} doesn't say when not to use it"
    missing = set(cls.options()) - {name for name, words in pages.option_texts(cls).items() if words}
    assert not missing, f"{cls.name} doesn't describe its option {missing}"
    assert pages.summary(cls)


def test_write_check_and_clear(tmp_path: Path) -> None:
    assert pages.main([str(tmp_path), "--check"]) == 1
    assert pages.main([str(tmp_path)]) == 0
    folder, wanted = tmp_path / "passes", pages.pages()
    assert {p.name for p in folder.iterdir()} == {"README.md", *(f"{n}.md" for n in registry.builtin())}
    assert write_pages(folder, wanted) == []
    assert check_pages(folder, wanted) == []
    page = folder / "fold-constants.md"
    (folder / "gone.md").write_text(page.read_text())
    (folder / "by-hand.md").write_text("# mine")
    page.write_text("changed")
    assert [p.split()[-3:] for p in check_pages(folder, wanted)] == [
        ["out", "of", "date"],
        ["belongs", "to", "nothing"],
    ]
    assert pages.main([str(tmp_path), "--check"]) == 1
    assert pages.main([str(tmp_path)]) == 0
    assert pages.main([str(tmp_path), "--check"]) == 0
    assert (folder / "by-hand.md").exists()
    assert not (folder / "gone.md").exists()
