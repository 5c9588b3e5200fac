"""The terminal's report: complete, plain, and hard to break."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import sample
from rich.console import Console

from graphopt.report import measured, terminal


def printed(show: Callable[[Any, Console], None], data: Any, width: int = 80, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, newline="\n")
    show(data, Console(file=file, width=width, force_terminal=False))
    file.flush()
    return raw.getvalue().decode(encoding)


def test_the_report_says_what_matters() -> None:
    text = printed(terminal.print_report, sample.report())
    flat = " ".join(text.split())
    assert "302 → 171 nodes, 0.92× CPU time, equal on 6 probes" in flat
    assert "1 pass rolled back" in flat
    assert "ROLLED BACK fold-batch-norm: last_hidden_state is off by 0.31" in flat
    assert "Skipped raise-silu" in flat
    assert "6 runs of 5 passes changed nothing" in flat
    assert "Worst: last_hidden_state on probe 'right'" in flat
    assert "18× simplify-shapes: kept: the target shape depends on the data" in flat
    assert "ReduceMean '/encoder/layer.0/output/LayerNorm/ReduceMean' and 4 more" in flat
    assert "session.qdq_matmulnbits_accuracy_level = 4" in flat
    assert "Control: the original against itself measures 0.99×" in flat
    assert "1 probe left out" in flat
    assert "Valid only for (graphopt.session checks it)" in flat
    assert "no-left-padding: each row of the attention mask is ones, then zeros (input 'attention_mask')" in flat
    assert "Given but not needed: batch=1." in flat


def test_it_fits_80_columns_without_colour() -> None:
    text = printed(terminal.print_report, sample.report())
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text


@pytest.mark.parametrize("width", [30, 60, 200])
def test_any_width(width: int) -> None:
    assert "fold-constants" in printed(terminal.print_report, sample.report(), width).replace("\n", "")


def test_no_column_vanishes_where_the_terminal_is_narrow() -> None:
    lines = printed(terminal.print_timing, sample.report()["timing"], 40).splitlines()
    assert lines[0].split() == ["model", "CPU", "time", "ratio", "range", "wall", "time"]
    assert all(len(line) <= 40 for line in lines if "Medians" in line)


def test_where_only_ascii_can_be_printed() -> None:
    data = sample.report()
    data["left_alone"][0]["node"] = "größe→"
    text = printed(terminal.print_report, data, encoding="ascii")
    assert "302 -> 171 nodes" in text


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1"])
def test_old_encodings(encoding: str) -> None:
    printed(terminal.print_report, sample.report(), encoding=encoding)


def test_names_are_neither_markup_nor_terminal_codes() -> None:
    data = sample.report()
    data["left_alone"] = [{"pass": "p", "node": "[red]x[/red]\x1b[2J", "op_type": "[bold]", "detail": "[/]\ud800"}]
    text = printed(terminal.print_report, data)
    assert "[red]x[/red]" in text
    assert "\x1b" not in text


def test_missing_parts() -> None:
    full = sample.report()
    for key in full:
        for empty in ({k: v for k, v in full.items() if k != key}, {**full, key: None}):
            assert printed(terminal.print_report, empty)
    assert printed(terminal.print_report, {})
    assert printed(terminal.print_report, {"passes": [{}], "left_alone": [{}], "verification": {}, "timing": {}})


def test_long_lists_are_cut_and_say_so() -> None:
    data = sample.report()
    data["left_alone"] = [
        {"pass": f"pass-{chr(97 + i)}", "node": "n", "op_type": "Add", "detail": "no"} for i in range(22)
    ]
    assert "and 12 more reasons at 12 sites: --json or the HTML report has all" in printed(terminal.print_report, data)


def test_what_a_search_chose_is_told() -> None:
    data = sample.report()
    record = next(record for record in data["passes"] if record["status"] == "applied")
    assert "Chosen by a search" not in printed(terminal.print_report, data)
    record["options"] = {"expected_divergence": 0.01234}
    record["sites"] = [
        {"node": "add", "op_type": "Add", "outcome": "applied", "detail": "attention.2 removed: 64 bytes of weights"}
    ]
    text = printed(terminal.print_report, data)
    assert "attention.2 removed: 64 bytes of weights" in text
    assert "0.0123" in text


def test_nothing_to_do() -> None:
    data = {**sample.report(), "verification": None, "timing": None, "left_alone": []}
    data["after"] = data["before"]
    data["passes"] = [p for p in data["passes"] if p["status"] == "unchanged"]
    text = printed(terminal.print_report, data)
    assert "Nothing to change: 302 nodes stay as they are" in text
    assert "Nothing changed, nothing to compare." in text


def test_unverified_is_said() -> None:
    data = {**sample.report(), "verification": None}
    assert "not verified" in printed(terminal.print_report, data)


def test_a_good_verdict() -> None:
    text = printed(terminal.print_verdict, sample.verdict())
    assert text.startswith("Equal on 6 probes (worst error 3.1 % of the tolerance).")
    assert "with all of its optimizations and with none" in text
    assert "The same numbers on 6 probes." in printed(terminal.print_verdict, sample.verdict(0.0))


def test_a_bad_verdict() -> None:
    text = " ".join(printed(terminal.print_verdict, sample.failing_verdict()).split())
    assert text.startswith("NOT equal: 2 outputs beyond the tolerance.")
    assert "3,750 %" in text
    assert "pooler_output on batch: has shape [3, 384] instead of [3, 16, 384]" in text
    broken = " ".join(printed(terminal.print_verdict, sample.broken_verdict()).split())
    assert "NOT equal: ONNX Runtime doesn't load the result: node 'MatMul_3' has no input" in broken
    assert "Output 'r' is random." in broken


def test_timing() -> None:
    text = " ".join(printed(terminal.print_timing, sample.timing()).split())
    assert "model.opt.onnx 11.3 ms 0.92× 0.86× to 1.01×" in text
    assert "minilm/" not in text
    assert "model.onnx again (control)" in text


def test_inspection() -> None:
    data = {
        "path": "a.onnx",
        "bytes": 90_912_004,
        "external_data": True,
        "ir_version": 10,
        "opsets": {"": 21, "com.microsoft": 1},
        "producer": "pytorch 2.13",
        "inputs": [
            {"name": "ids", "dtype": "INT64", "shape": ["batch", 128]},
            {"name": "s", "dtype": "SEQ", "shape": None},
        ],
        "overridable": [],
        "outputs": [{"name": f"out{i}", "dtype": "FLOAT", "shape": []} for i in range(20)],
        "nodes": 254,
        "parameters": 22_713_216,
        "weight_bytes": 90_852_864,
        "flops": 5_642_000_000,
        "flops_dims": {"batch": 1, "ids[0]": 1},
        "unknown_flops": 2,
        "operators": {"MatMul": 48, "com.x::Foo": 1},
        "functions": ["f:g"],
        "structures": {"LayerNormalization": 13},
        "residual_streams": [
            {
                "origin": "e",
                "final": "s",
                "features": 384,
                "placement": "post",
                "layers": 6,
                "shortcuts": 1,
                "branches": {"attention": 6, "mlp": 6},
                "writers": {"norm": 1},
                "readers": {"linear": 1},
            }
        ],
        "no_residual_stream": None,
        "attention": {
            "summary": [{"count": 6, "operator": "Softmax", "heads": 12, "head_size": None, "masked": True}],
            "sites": [],
        },
        "linear": {"roles": {"q": 6, "o": 6}, "groups": 8, "shared": ["wte"], "sites": []},
        "convolutions": [{"kind": "separable", "nodes": ["a", "b"], "detail": ""}] * 3,
        "elementwise_norms": {"tanh": 2},
        "problems": ["node 'x' reads 'y', which nothing makes"],
        "why": [{"pass": "raise-gelu", "node": "Erf_1", "op_type": "Erf", "detail": "the factor isn't 0.5"}],
    }
    text = " ".join(printed(terminal.print_inspection, data).split())
    assert "opset ai.onnx 21, com.microsoft 1, by pytorch 2.13, 90.9 MB on disk with external data" in text
    assert "5.64 G FLOPs at batch = 1 (without 2 nodes of unknown shape)" in text
    assert "1 problem - node 'x' reads 'y'" in text
    assert "[batch, 128]" in text
    assert "and 8 more: --json has all" in text
    assert (
        "residual stream: 6 layers of 384 features, normalised after each addition; branches: 6 attention, 6 mlp, "
        "1 shortcut through a layer; written by 1 norm; read by 1 linear" in text
    )
    assert "attention: 6 × 12 heads of ?, masked (Softmax)" in text
    assert "linear layers: 6 q, 6 o, reading 8 inputs; used in several places: wte" in text
    assert "1× raise-gelu: the factor isn't 0.5" in text
    for key in data:
        assert printed(terminal.print_inspection, {**data, key: None})
    assert "convolutional blocks: 3 separable norms without a reduction: 2 tanh" in text
    none = {**data, "residual_streams": [], "no_residual_stream": "no addition", "linear": {}, "attention": {}}
    assert "residual stream: none (no addition)" in printed(terminal.print_inspection, none)
    assert "left no site alone" in printed(terminal.print_inspection, {**data, "why": []})


def test_inputs_that_differ_in_their_numbers_are_told_as_one() -> None:
    shapes = {"ids": [1, 4], **{f"past.{n}.key": [1, 2, 0, 8] for n in range(30)}, "past.30.key": [1, 1, 0, 8]}
    told = measured.timing_notes({"feeds": shapes})[-1]
    assert told == "Inputs: ids [1, 4], past.*.key [1, 2, 0, 8] (30 times), past.30.key [1, 1, 0, 8]."
