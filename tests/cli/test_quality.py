"""`--quality` and `--floor`: the table, the floors, and that a result which misses one is nowhere."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from test_pass_manager import Replace

from graphopt.passes.base import Guarantee
from tests.cli.conftest import Run

TEXT = """<ir_version: 8, opset_import: ["": 17]>
g (float[n, 3] x) => (float[n, 3] probabilities) {
  i = Identity(x)  t = Tanh(i)  probabilities = Softmax(t)
}"""


class TanhToNeg(Replace):
    """A lossy pass that turns classes around."""

    name = "tanh-to-neg"
    anchors = ("Tanh",)
    guarantee = Guarantee.LOSSY

    def __init__(self) -> None:
        super().__init__("Tanh", "Neg")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model, and beside it data with labels and a recipe that changes it."""
    path = tmp_path / "model.onnx"
    onnx.save(onnx.parser.parse_model(TEXT), path)
    rows = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=rows, labels=rows.argmax(axis=1))
    (tmp_path / "lossy.yaml").write_text("passes:\n  - eliminate-identities\n  - cli.test_quality:TanhToNeg\n")
    return path


def test_the_table(run: Run, model: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    floors = ["--floor", "accuracy=-0%", "--floor", "score>=0.999"]
    code, out, err = run("optimize", model, "--quality", tmp_path / "data.npz", *floors, "--report", report, "--bench")
    assert (code, err) == (0, "")
    flat = " ".join(out.split())
    assert "Quality, size and speed" in flat
    assert "Accuracy (accuracy) 100.00 % 100.00 % same accuracy=-0%" in flat
    assert "Score agreement (score) – 100.00 % score>=0.999" in flat
    assert "Bytes on disk" in flat
    assert "CPU time of one inference" in flat
    assert "20 samples; a dash where a number compares the two models" in flat
    assert "Task guessed: classification, because the model has one output of 3 scores ('probabilities')" in flat
    assert "accuracy 100.00 % → 100.00 %" in flat
    page = report.read_text()
    assert '<h2 id="quality">Quality</h2>' in page
    assert "Score agreement (score)" in page
    assert "--quality" in page
    assert "--floor &#x27;accuracy=-0%&#x27;" in page or "--floor accuracy=-0%" in page


def test_a_missed_floor(run: Run, model: Path, tmp_path: Path) -> None:
    report, older = tmp_path / "report.html", tmp_path / "older.onnx"
    before = sorted(tmp_path.iterdir())
    options = ["--recipe", tmp_path / "lossy.yaml", "--quality", tmp_path / "data.npz", "--verify", "none"]
    code, out, err = run("optimize", model, *options, "--floor", "top1>=98%", "--floor", "score>=0.1", "--bench")
    assert code == 7
    assert err.count("\n") == 1
    assert err.startswith("graphopt: Too little quality: top1 is ")
    assert f"below the floor top1>=98%; {tmp_path / 'model.opt.onnx'} was not written." in err
    flat = " ".join(out.split())
    assert "top1>=98% MISSED" in flat
    assert "a floor was missed and nothing written" in flat
    assert "→ not saved" in flat
    assert sorted(tmp_path.iterdir()) == before  # neither the result nor a part of it
    # An older output stays, and the report says that it isn't of this run.
    older.write_bytes(b"older")
    code, out, _ = run(
        "optimize", model, *options, "--floor", "top1>=98%", "-o", older, "--force", "--json", "--report", report
    )
    data = json.loads(out)
    assert code == 7
    assert older.read_bytes() == b"older"
    assert data["output"] is None
    assert [m["metric"] for m in data["quality"]["missed"]] == ["top1"]
    assert data["quality"]["bytes"][0] == model.stat().st_size
    assert data["quality"]["metrics"][0]["reference"] == 1
    assert "Floor missed: top1 is " in report.read_text()
    assert run("optimize", model, *options, "-o", tmp_path / "kept.onnx")[0] == 0
    assert (tmp_path / "kept.onnx").exists()


def test_in_place(run: Run, model: Path, tmp_path: Path) -> None:
    content = model.read_bytes()
    options = ["--in-place", "--quality", tmp_path / "data.npz", "--floor", "top1=1", "--verify", "none"]
    assert run("optimize", model, "--recipe", tmp_path / "lossy.yaml", *options)[0] == 7
    assert model.read_bytes() == content
    assert run("optimize", model, *options)[0] == 0
    assert model.read_bytes() != content


def test_verify(run: Run, model: Path, tmp_path: Path) -> None:
    run("optimize", model, "--recipe", tmp_path / "lossy.yaml", "--verify", "none")
    other, data = tmp_path / "model.opt.onnx", tmp_path / "data.npz"
    code, out, _ = run("verify", model, other, "--quality", data)
    assert code == 0
    assert "Accuracy (accuracy)" in out
    code, out, err = run("verify", model, other, "--quality", data, "--floor", "accuracy=-10%", "--json")
    assert code == 7
    assert json.loads(out)["missed"][0]["metric"] == "accuracy"
    assert "points" not in err
    assert err.count("\n") == 1
    assert run("verify", model, model, "--quality", data, "--floor", "top1=1", "--quality-samples", 5)[0] == 0
    assert (
        json.loads(run("verify", model, other, "--quality", data, "--task", "generic", "--json")[1])["task"]
        == "generic"
    )


@pytest.mark.parametrize(
    ("options", "code", "sentence"),
    [
        (["--floor", "top1=1"], 2, "--floor is for judging on data; give that with --quality."),
        (["--task", "generic"], 2, "--task is for judging"),
        (["--quality-samples", "3"], 2, "--quality-samples is for judging"),
        (["--score-threshold", "0"], 2, "--score-threshold is for judging"),
        (["--ignore-spaces"], 2, "--ignore-spaces is for judging"),
        (["--quality", "none.npz"], 4, "none.npz doesn't exist; --quality takes a file"),
        (["--quality", "data.npz", "--floor", "top1"], 2, "'top1' is no floor"),
        (["--quality", "data.npz", "--floor", "ppl=+5%"], 2, "ppl can't be told for this task from this data"),
        (["--quality", "data.npz", "--task", "language"], 2, "A language model is judged on text"),
        (["--quality", "model.onnx"], 4, "can't be read as text"),
    ],
)
def test_mistakes_are_told_before_the_work(
    run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], code: int, sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("graphopt.api.optimize", lambda *_args, **_options: pytest.fail("it was optimized"))
    for command in (["optimize", model], ["verify", model, model]):
        found, _, err = run(*command, *options)
        assert (found, err.count("\n")) == (code, 1)
        assert sentence in err


def test_what_goes_with_what(run: Run, model: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.npz"
    assert "--inputs doesn't go with it" in run("verify", model, model, "--quality", data, "--inputs", data)[2]
    assert "--tokenizer is for the data of --quality" in run("verify", model, model, "--tokenizer", tmp_path)[2]
    assert "--calibration or --quality" in run("optimize", model, "--tokenizer", tmp_path)[2]
    assert "--image-values is for the data of --quality" in run("verify", model, model, "--image-values", "raw")[2]
    assert "--calibration or --quality" in run("optimize", model, "--image-values", "raw")[2]
