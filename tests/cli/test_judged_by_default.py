"""A calibrated decoder is judged on what calibration left of its text, and timed, without being asked to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_transformers import exported_cached

from graphopt.errors import ModelError, VerificationError

from .conftest import Run

pytestmark = pytest.mark.export


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A decoder, its tokenizer of letters beside it, and a text of 1,600 of them as JSON lines."""
    from tokenizers import Tokenizer, models

    shutil.copy(exported_cached("llama", "torchscript"), tmp_path / "model.onnx")
    Tokenizer(models.BPE(vocab={chr(97 + i): i for i in range(26)}, merges=[])).save(str(tmp_path / "tokenizer.json"))
    letters = "".join(chr(97 + i) for i in np.random.default_rng(0).integers(0, 26, 1600))
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": letters}) + "\n")
    return tmp_path


def optimize(run: Run, folder: Path, *options: object) -> tuple[int, str, str]:
    return run(
        "optimize", folder / "model.onnx", "-o", folder / "result" / "model.onnx", "--recipe", "awq", "--calibration",
        folder / "text.jsonl", "--calibration-samples", 8, "--calibration-window", 64, *options,
    )  # fmt: skip


def test_quality_bytes_and_speed_are_told(run: Run, folder: Path) -> None:
    (folder / "result").mkdir()
    code, out, err = optimize(run, folder)
    assert code == 0, err
    told = " ".join(out.split())
    assert "Quality, size and speed" in told
    assert "CPU time of a token written" in told[: told.index("Nodes")]
    for row in ("Perplexity (ppl)", "Bytes on disk", "CPU time of one inference", "Tokens written a second"):
        assert row in told
    assert f"On what calibration left of {folder}"[:30] in told
    assert "in 2 windows of 512" in told


def test_what_cant_be_generated_with_is_timed_by_a_prompt(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise ModelError("one input is unknown")

    monkeypatch.setattr("graphopt.cli.bench_generation.bench_generation", refuse)
    (folder / "result").mkdir()
    code, out, err = optimize(run, folder, "--quality", "none", "--bench", "--json")
    assert code == 0, err
    data = json.loads(out)
    assert len(data["timing"]["models"]) == 2
    assert data["timing"]["generation"] is None
    assert data["notes"] == ["How fast it writes wasn't timed: one input is unknown"]


def test_what_nobody_asked_for_fails_nothing(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise VerificationError("it has another cache")

    monkeypatch.setattr("graphopt.verification.workload.benchmark_models", refuse)
    (folder / "result").mkdir()
    code, out, err = optimize(run, folder, "--json")
    assert code == 0, err
    assert json.loads(out)["notes"] == ["What it gives and costs wasn't all measured: it has another cache"]
    code, _, err = optimize(run, folder, "--bench", "--force")
    assert code == 5
    assert "it has another cache" in err


def test_a_floor_needs_no_data_of_its_own(run: Run, folder: Path) -> None:
    (folder / "result").mkdir()
    code, _, err = optimize(run, folder, "--floor", "kl<=0", "--json")
    assert code == 7
    assert "kl" in err
    assert not (folder / "result" / "model.onnx").exists()


def test_none_is_judged_or_timed_where_nobody_wants_it(run: Run, folder: Path) -> None:
    (folder / "result").mkdir()
    code, out, err = optimize(run, folder, "--quality", "none", "--json")
    assert code == 0, err
    data = json.loads(out)
    assert data["quality"] is None
    assert data["timing"] is None
    code, out, err = optimize(run, folder, "--no-bench", "--force", "--json")
    assert code == 0, err
    data = json.loads(out)
    assert [metric["name"] for metric in data["quality"]["metrics"]] == ["ppl", "kl", "top1"]
    assert data["timing"] is None
    assert "--quality" not in data["arguments"]
    code, _, err = optimize(run, folder, "--quality", "none", "--floor", "kl<=1", "--force")
    assert code == 2
    assert "--floor is for judging on data" in err


def test_a_text_that_repeats_itself_holds_nothing_out(run: Run, folder: Path) -> None:
    (folder / "result").mkdir()
    (folder / "text.jsonl").write_text(json.dumps({"text": "abcdefgh" * 200}) + "\n")
    code, out, err = optimize(run, folder)
    assert code == 0, err
    assert "--quality held-out.txt does it" in " ".join(out.split())
    code, _, err = optimize(run, folder, "--floor", "kl<=1", "--force")
    assert code == 4
    assert "shares" in err
