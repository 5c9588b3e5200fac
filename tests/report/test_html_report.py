"""The HTML report: one file, well formed, complete, safe, accessible."""

from __future__ import annotations

import html.parser
import re

import pytest
import sample

from graphopt.report.html import render_html
from graphopt.report.markup import text

VOID = {"meta", "input", "br", "wbr", "rect", "link", "img"}


class Checker(html.parser.HTMLParser):
    """Every tag closed in order; what a browser would load; ids; the text a reader sees."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.scripts = 0
        self.tables = 0
        self.captions = 0
        self.headings: list[int] = []
        self.words: list[str] = []
        self.feed(page)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.loads += [v or "" for k, v in attrs if k in ("src", "data", "poster") or (k == "href" and tag == "link")]
        assert not [k for k, _ in attrs if k.startswith("on")], "a handler in an attribute"
        if "id" in values:
            self.ids.append(values["id"] or "")
        if (href := values.get("href") or "").startswith("#"):
            self.targets.append(href[1:])
        self.targets += [values[k] or "" for k in ("aria-labelledby", "aria-controls", "for") if k in values]
        self.scripts += tag == "script"
        self.tables += tag == "table"
        self.captions += tag == "caption"
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


def test_one_file_that_loads_nothing() -> None:
    page = render_html(sample.report())
    found = Checker(page)
    assert found.loads == []
    assert found.scripts == 1
    assert not re.search(r"https?://|url\(|@import|fetch\(|XMLHttp", page)


def test_it_is_accessible() -> None:
    page = render_html(sample.report())
    found = Checker(page)
    assert found.tables == found.captions
    assert len(found.ids) == len(set(found.ids))
    assert set(found.targets) <= set(found.ids)
    assert found.headings[0] == 1
    assert found.headings.count(1) == 1
    assert all(b - a <= 1 for a, b in zip(found.headings, found.headings[1:], strict=False))
    assert '<html lang="en">' in page
    assert 'aria-hidden="true"' in page
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page


def test_it_holds_everything() -> None:
    data = sample.report()
    words = Checker(render_html(data)).text
    assert "302 → 171 nodes, 0.92× CPU time, equal on 6 probes (worst error 3.1 % of the tolerance)" in words
    for site in data["left_alone"]:
        assert f"{site['op_type']} {site['node']}" in words
    for effect in data["passes"]:
        assert effect["name"] in words
    for operator in data["operators"]:
        assert operator in words
    assert "Rolled back: last_hidden_state is off by 0.31" in words
    assert "All 24 comparisons" in words
    assert "Valid only for no-left-padding" in words
    assert "group-query-attention: the kernel takes lengths" in words
    assert "Given but not needed: batch=1." in words
    assert "graphopt optimize minilm/model.onnx -o minilm/model.opt.onnx --recipe exact --target cpu --seed 0" in words
    assert "- simplify-shapes: max_elements: 64" in words
    assert 'options.AddConfigEntry("session.qdq_matmulnbits_accuracy_level", "4");' in words
    assert "disabled_optimizers=['SkipLayerNormFusion']" in words
    assert "onnxruntime 1.31.1" in words or "onnxruntime1.31.1" in words


def test_names_from_a_model_are_text() -> None:
    data = sample.report()
    data["source"]["path"] = '"><img src=x onerror=alert(1)>'
    data["output"]["path"] = "</script><script>alert(2)</script>"
    data["graphopt"] = "<b>"
    data["recipe"]["name"] = "</style>"
    for entry in (*data["probes"], *data["skipped_probes"], *data["session_settings"]):
        for key in entry:
            entry[key] = sample.EVIL
    page = render_html(data)
    found = Checker(page)
    assert found.scripts == 1
    assert found.loads == []
    assert "<img" not in page
    assert "<script>alert" not in page
    assert sample.EVIL in found.text


def test_characters_that_html_has_no_place_for() -> None:
    assert text("a\x00b\x1bc\ud800<&>'\"") == "a\ufffdb\ufffdc?&lt;&amp;&gt;&#x27;&quot;"
    data = sample.report()
    data["left_alone"][0]["node"] = "\x00\ud800"
    render_html(data).encode("utf-8")


def test_missing_parts() -> None:
    full = sample.report()
    for key in full:
        for less in ({k: v for k, v in full.items() if k != key}, {**full, key: None}):
            Checker(render_html(less))
    Checker(render_html({}))
    Checker(render_html({"passes": [{}], "left_alone": [{}], "verification": {}, "timing": {}, "operators": {}}))


@pytest.mark.parametrize("verdict", [sample.failing_verdict(), sample.broken_verdict(), sample.verdict(0.0)])
def test_verdicts(verdict: dict) -> None:
    words = Checker(render_html({**sample.report(), "verification": verdict})).text
    if verdict["ok"]:
        assert "The same numbers on 6 probes." in words
        assert "Verified against the original" in words
    else:
        assert "NOT equal" in words
        assert "Verification failed" in words
        assert "Verified against the original" not in words


def test_many_outputs_stay_readable() -> None:
    data = sample.report()
    data["verification"]["outputs"] = [
        sample.output(f"present.{i}", "small", mode, 1e-6, 0.001 * i) for i in range(61) for mode in ("all", "none")
    ]
    words = Checker(render_html(data)).text
    assert "49 more outputs" in words
    assert "All 122 comparisons" in words


def test_deterministic() -> None:
    assert render_html(sample.report()) == render_html(sample.report())


def test_choices_and_steps() -> None:
    report = {
        "passes": [
            {"name": "allocate-bits", "status": "applied",
             "options": {"frontier": [[6e7, 0.9], [8e7, 0.2], [9e7, 0.1], [8.2e7, 0.15]]}},
        ],
        "steps": [
            {"pass": "", "bytes": 540e6, "cache_bytes": 46080, "metrics": None, "ratio": 1.0},
            {"pass": "quantize-kv", "bytes": 540e6, "cache_bytes": 7000,
             "metrics": [{"name": "ppl", "value": 18.2, "reference": 18.1, "scale": "number"}], "ratio": 0.9},
        ],
    }  # fmt: skip
    page = render_html(report)
    assert "80 MB" in page
    assert "expected loss, nats" in page
    for cell in ("the original", "540 MB", "46.1 kB", "18.10", "18.20", "0.90×"):
        assert cell in page
    Checker(page)
