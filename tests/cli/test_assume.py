"""`--assume` on the command line: from the help to the report, the result, and what is told of both afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from narrowing import decoder

import graphopt
from tests.cli.conftest import Run


@pytest.fixture
def model(tmp_path: Path) -> Path:
    graphopt.save(decoder(), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text("passes:\n  - narrowing:Narrow: {right_for: no-left-padding}\n")
    return path


def words(text: str) -> str:
    return " ".join(text.split())


def test_help_explains_each(run: Run) -> None:
    for command in ("optimize", "inspect"):
        text = words(run(command, "--help")[1])
        assert "batch=1: the batch is 1; e.g. a chat program." in text
        assert "max-length=N: past and new tokens together are at most N; e.g. max-length=2048 for" in text
        assert "no-left-padding: each row of the attention mask is ones, then zeros" in text


def test_from_the_option_to_the_result(run: Run, model: Path, recipe: Path, tmp_path: Path) -> None:
    out_file, page = tmp_path / "o.onnx", tmp_path / "r.html"
    options = ("--recipe", recipe, "--assume", "no-left-padding", "--assume", "batch=1", "--report", page)
    code, out, _ = run("optimize", model, "-o", out_file, *options)
    assert code == 0
    text = words(out)
    assert "valid only for no-left-padding" in text
    assert "needed by narrow: a quicker formula" in text
    assert "Given but not needed: batch=1." in text
    assert "--assume no-left-padding --assume batch=1" in page.read_text()
    code, out, _ = run("inspect", out_file)
    assert code == 0
    assert "Valid only for (graphopt.session checks it) - no-left-padding: each row" in words(out)
    code, out, _ = run("verify", model, out_file)
    assert code == 0
    assert "Compared only where the result is valid (no-left-padding)" in words(out)
    code, out, _ = run("optimize", model, "-o", tmp_path / "p.onnx", *options[:-2], "--json")
    data = json.loads(out)["assumptions"]
    assert data["given"] == ["no-left-padding", "batch=1"]
    assert data["unneeded"] == ["batch=1"]
    assert [entry["pass"] for entry in data["relied"]] == ["narrow"]
    assert (tmp_path / "p.onnx").read_bytes() == out_file.read_bytes()


def test_mistakes(run: Run, model: Path) -> None:
    code, _, err = run("optimize", model, "--assume", "left-padding")
    assert code == 2
    assert "There is no assumption 'left-padding'; did you mean no-left-padding? There are no-padding, " in err
    code, _, err = run("inspect", model, "--assume", "batch=1")
    assert code == 2
    assert "give both" in err
    assert run("inspect", model, "--why", "--assume", "batch=1", "--json")[0] == 0
