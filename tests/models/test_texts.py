"""Text out of MediaWiki markup, and the two splits that share no article."""

from __future__ import annotations

import pytest

from graphopt.models.texts import LENGTHS, articles, plain_text, wikipedia

LONG = "This sentence is long enough to count as a paragraph of an article."


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        (f"'''Bold''' and ''italic''. {LONG}", f"Bold and italic. {LONG}"),
        (f"[[Target|shown]] and [[plain]]. {LONG}", f"shown and plain. {LONG}"),
        (f"a {{{{template|with {{{{another}}}} inside}}}}b. {LONG}", f"a b. {LONG}"),
        (f"[[File:x.jpg|thumb|A [[link]] in a caption]]{LONG}", LONG),
        (f"{LONG}<ref name=a>told by [[someone]]</ref><ref name=b /><!-- note -->", LONG),
        (f"[http://example.org/a named] {LONG}", f"named {LONG}"),
        (f"== Heading ==\n{LONG}\n* item\n{{| table\n| cell\n|}}\n[[de:Seite]]\n{LONG}", f"{LONG}\n\n{LONG}"),
        ("Too short.", ""),
    ],
)
def test_plain_text(markup: str, text: str) -> None:
    assert plain_text(markup) == text


def test_short_articles_are_left_out_and_long_ones_cut() -> None:
    def page(lines: int) -> str:
        return f"<page><text xml:space='preserve'>{(LONG + chr(10)) * lines}</text></page>"

    found = list(articles(page(10) + page(100) + page(1000)))
    assert [len(a) for a in found] == [100 * len(LONG) + 99 * 2, 12_000]


@pytest.mark.real
def test_splits_share_no_paragraph() -> None:
    evaluation, calibration = wikipedia("evaluation"), wikipedia("calibration")
    assert (len(evaluation), len(calibration)) == (LENGTHS["evaluation"], LENGTHS["calibration"])
    assert not {p for p in evaluation.split("\n\n") if len(p) > 80} & set(calibration.split("\n\n"))
    assert evaluation.startswith("Anarchism is a political philosophy")
    assert "{{" not in evaluation + calibration
    assert "[[" not in evaluation + calibration
