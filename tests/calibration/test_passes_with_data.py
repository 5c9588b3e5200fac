"""How data comes to a pass: through the pass manager, `graphopt.optimize` and the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from tiny_decoders import decoder

import graphopt
import graphopt.cli
from calibration.small_models import HIDDEN, Observed, activations, residual
from graphopt.calibration.calibration import Calibration
from graphopt.calibration.data import ArrayDataset
from graphopt.calibration.text import TextDataset
from graphopt.errors import InputDataError, UsageError
from graphopt.pass_manager import PassManager

RNG = np.random.default_rng(0)
FEEDS = [{"x": RNG.normal(size=(1, 4, HIDDEN)).astype(np.float32)} for _ in range(2)]
RECIPE = {"passes": ["calibration.small_models:Observed"]}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "calibration"


def largest(model: ir.Model, name: str) -> str:
    return f"up to {max(np.abs(a).max() for a in activations(model, FEEDS, [name])[name]):.4f}"


def test_a_pass_finds_its_data(cache: Path) -> None:
    model = residual(2)
    for data in (ArrayDataset(FEEDS), Calibration(ArrayDataset(FEEDS))):
        rule = Observed()
        PassManager([rule], verify="none", calibration=data)(model)
        assert [site.detail for site in rule.sites] == [largest(model, name) for name in ("x", "t0", "x1", "t1")]
    assert not cache.exists()


def test_data_that_does_not_fit_is_told_and_not_taken_for_a_fault_of_the_pass() -> None:
    wrong = ArrayDataset([{"x": np.ones((1, 4, HIDDEN), np.float64)}])
    with pytest.raises(InputDataError, match="'x' takes float32"):
        PassManager([Observed()], verify="none", calibration=wrong)(residual(1))


def test_optimize_keeps_stages_and_reports_the_fingerprint(cache: Path) -> None:
    data = ArrayDataset(FEEDS)
    result = graphopt.optimize(residual(2), RECIPE, calibration=data, verify="none")
    assert result.report.to_dict()["calibration"] == {"data": "2 samples", "fingerprint": data.fingerprint}
    assert len(list(cache.glob("*.npz"))) == 1
    other = graphopt.optimize(residual(2), RECIPE, calibration=Calibration(data), verify="none")
    assert other.report.to_dict()["calibration"]["fingerprint"] == data.fingerprint
    assert [s.detail for s in other.report.run.records[0].sites] == [
        s.detail for s in result.report.run.records[0].sites
    ]


def test_a_decoder_calibrates_on_what_it_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.calibration.sources.SAMPLES", 4)
    monkeypatch.setattr("graphopt.calibration.sources.GENERATED_WINDOW", 8)
    reports = [
        graphopt.optimize(
            ir.from_proto(decoder("attention")), RECIPE, calibration="self", verify="none", seed=seed
        ).report
        for seed in (0, 0, 1)
    ]
    told = [report.to_dict()["calibration"] for report in reports]
    assert told[0]["data"] == "2 windows of 8 tokens"
    assert told[0] == told[1] != told[2]
    with pytest.raises(UsageError, match='data set, or "self"'):
        graphopt.optimize(residual(1), RECIPE, calibration="text.jsonl", verify="none")  # type: ignore[arg-type]
    with pytest.raises(InputDataError, match="decoder with a KV cache"):
        graphopt.optimize(residual(1), RECIPE, calibration="self", verify="none")


def test_the_cache_of_a_quantized_decoder_needs_text() -> None:
    recipe = {"passes": [{"quantize-kv": {"operator": "contrib"}}]}
    model = ir.from_proto(decoder("group-query"))
    feeds = next(TextDataset(np.arange(20), 10).feeds(model))
    with pytest.raises(UsageError, match=r"give a \.txt or \.jsonl file"):
        graphopt.optimize(model, recipe, calibration=ArrayDataset([feeds]), verify="none")


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["graphopt", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        graphopt.cli.main()
    captured = capsys.readouterr()
    return int(end.value.code or 0), captured.out, captured.err


def test_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cache: Path
) -> None:
    path, data, recipe = tmp_path / "m.onnx", tmp_path / "d.npz", tmp_path / "r.yaml"
    onnx.save(ir.to_proto(residual(2)), path)
    np.savez(data, x=np.concatenate([feed["x"] for feed in FEEDS]))
    recipe.write_text('passes: ["calibration.small_models:Observed"]')
    common = ("optimize", path, "--recipe", recipe, "--verify", "none", "--force")
    code, out, _ = run(monkeypatch, capsys, *common, "--calibration", data, "--calibration-samples", 1, "--json")
    assert code == 0
    told = json.loads(out)
    assert told["calibration"]["data"] == "1 sample"
    assert "--calibration-samples 1" in " ".join(told["arguments"])
    code, out, _ = run(monkeypatch, capsys, *common, "--calibration", data)
    assert code == 0
    assert "Calibrated on 2 samples (fingerprint " in out
    for options, status, says in (
        (("--calibration", tmp_path / "none.npz"), 4, "no calibration data"),
        (("--calibration", data, "--calibration-window", 4), 2, "window of tokens is for text"),
        (("--calibration-window", 4), 2, "--calibration-window is for the data of --calibration"),
        (("--jobs", 2), 2, "--jobs is for searches, which need data"),
        (("--calibration", data, "--jobs", 0), 2, "0 is not in the range"),
        (("--calibration", "self"), 4, "Only a decoder with a KV cache"),
        ((), 2, "needs calibration data"),
    ):
        code, _, err = run(monkeypatch, capsys, *common, *options)
        assert (code, "Traceback" in err) == (status, False), err
        assert says in " ".join(err.split())
