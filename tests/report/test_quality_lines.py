"""What reports say of quality, in the terminal, on the HTML page and in the headline."""

from __future__ import annotations

import sample
from test_terminal_report import printed

from graphopt.report import summary, terminal
from graphopt.report.html import render_html
from graphopt.report.quality_lines import missed_floors, quality_headline, quality_notes, quality_rows


def test_rows() -> None:
    rows = [row.cells for row in quality_rows(sample.quality(), sample.timing())]
    assert rows == [
        ["Perplexity (ppl)", "18.31", "19.06", "+4.1 %", "ppl=+5%"],
        ["Divergence from the original, nats (kl)", "–", "0.04280", "", ""],
        ["Same most probable token (top1)", "–", "87.20 %", "", ""],
        ["Accuracy (accuracy)", "75.24 %", "75.12 %", "−0.12 points", ""],
        ["Bytes on disk", "90.9 MB", "23.0 MB", "−75 %", ""],
        ["CPU time of one inference", "12.3 ms", "11.3 ms", "−8.3 %", ""],
    ]
    assert quality_rows(None) == []
    assert [row.missed for row in quality_rows(sample.quality(missed=True))] == [False, False, True, False, False]


def test_what_is_no_number() -> None:
    data = sample.quality()
    data["metrics"][0]["value"] = None
    assert quality_rows(data)[0].cells == ["Perplexity (ppl)", "18.31", "no number", "", "ppl=+5%"]
    assert quality_headline(data) == "perplexity 18.31 → no number"


def test_notes_and_headline() -> None:
    assert quality_notes(sample.quality())[0].startswith("On held-out.txt: 8,176 tokens in 16 windows of 512")
    assert quality_notes(None) == missed_floors(None) == []
    assert quality_headline(None) == ""
    data = {**sample.report(), "quality": sample.quality()}
    assert "perplexity 18.31 → 19.06" in summary.headline(data)
    data["quality"] = sample.quality(missed=True)
    assert "a floor was missed and nothing written" in summary.headline(data)
    assert summary.checks(data)[0] == ("bad", "Floor missed: top1 is 87.20 %, 2.80 % below the floor top1>=0.9")


def test_terminal() -> None:
    judged = {**sample.report(), "quality": sample.quality()}
    flat = " ".join(printed(terminal.print_report, judged, width=120).split())
    assert "Quality, size and speed" in flat
    assert "Perplexity (ppl) 18.31 19.06 +4.1 % ppl=+5%" in flat
    data = {**sample.report(), "quality": sample.quality(missed=True), "timing": None}
    flat = " ".join(printed(terminal.print_report, data, width=120).split())
    assert "Quality and size" in flat
    assert "top1>=0.9 MISSED" in flat
    assert "- Floor missed: top1 is 87.20 %" in flat
    alone = printed(terminal.print_quality, sample.quality())
    assert "Bytes on disk" in alone


def test_html() -> None:
    page = render_html({**sample.report(), "quality": sample.quality(missed=True)})
    assert '<h2 id="quality">Quality</h2>' in page
    assert "A note with &lt;angles&gt;." in page
    assert '<p class="bad-text">Floor missed: top1 is 87.20 %, 2.80 % below the floor top1&gt;=0.9.</p>' in page
    assert '<h2 id="quality">' not in render_html(sample.report())
