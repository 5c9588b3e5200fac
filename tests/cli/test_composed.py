"""A recipe of several lossy parts on a decoder, as a user runs it: step by step, then verified, timed and packaged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from tiny_decoders import decoder
from tiny_transformers import exported_cached

import graphopt

from .conftest import Run

PARTS = ["drop-layers", "quantize-kv", "quantize-weights"]


@pytest.fixture
def texts(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A tokenizer of letters, and texts to calibrate and to judge with."""
    from tokenizers import Tokenizer, models

    folder = tmp_path / "tokenizer"
    folder.mkdir()
    Tokenizer(models.BPE(vocab={chr(97 + i): i for i in range(26)}, merges=[])).save(str(folder / "tokenizer.json"))
    files = tmp_path / "calibration.txt", tmp_path / "held-out.txt"
    for seed, file in enumerate(files):
        file.write_text("".join(chr(97 + i) for i in np.random.default_rng(seed).integers(0, 26, 600)))
    return folder, *files


@pytest.mark.export
def test_depth_kv4_and_awq4(run: Run, texts: tuple[Path, Path, Path], tmp_path: Path) -> None:
    tokenizer, calibration, held_out = texts
    model, result, report = exported_cached("llama", "torchscript"), tmp_path / "out" / "m.onnx", tmp_path / "r.html"
    result.parent.mkdir()
    code, out, err = run(
        "optimize", model, "-o", result, "--recipe", "depth+kv4+awq4", "--set", "drop-layers.count=1",
        "--assume", "no-left-padding", "--calibration", calibration, "--calibration-window", 16, "--tokenizer", tokenizer,
        "--quality", held_out, "--quality-samples", 1, "--report", report, "--json",
    )  # fmt: skip
    assert code == 0, err
    data = json.loads(out)
    steps = data["steps"]
    lossy = [
        record["name"] for record in data["passes"] if record["guarantee"] == "lossy" and record["status"] == "applied"
    ]
    assert [step["pass"] for step in steps] == ["", *lossy]
    assert [name for name in lossy if name in PARTS] == PARTS
    by = {step["pass"]: step for step in steps}
    # A third of the caches go with a third of the attentions, then most bytes of those that stay, then of the weights.
    assert by["drop-layers"]["cache_bytes"] * 3 == by[""]["cache_bytes"] * 2
    assert by["quantize-kv"]["cache_bytes"] < by["drop-layers"]["cache_bytes"] / 2
    assert by["quantize-weights"]["cache_bytes"] == by["quantize-kv"]["cache_bytes"]
    assert by["quantize-weights"]["bytes"] < by["drop-layers"]["bytes"] < by[""]["bytes"]
    assert steps[0]["metrics"] is None
    losses = [next(m["value"] for m in step["metrics"] if m["name"] == "kl") for step in steps[1:]]
    assert 0 < losses[0] <= losses[-1]
    judged = next(m["value"] for m in data["quality"]["metrics"] if m["name"] == "kl")
    assert losses[-1] == pytest.approx(judged)
    assert steps[0]["ratio"] == 1
    assert all(step["ratio"] > 0 and step["token_ratio"] > 0 for step in steps)
    assert len(data["timing"]["generation"]["models"]) == 2
    assert "A decoder reading and writing" in report.read_text(encoding="utf-8")
    assert len(data["timing"]["models"]) == 2
    assert "Step by step" in report.read_text(encoding="utf-8")
    assert [path.name for path in result.parent.iterdir() if path.name.startswith(".")] == []

    assert len(graphopt.Generator(result, threads=1).generate([[5, 6, 7]], max_new_tokens=4)[0]) == 4
    code, out, _ = run("verify", model, result, "--quality", held_out, "--tokenizer", tokenizer, "--quality-samples", 1)
    assert code == 0
    assert "kl" in out
    code, out, _ = run("bench", result, "--generate", "--prompt-tokens", 8, "--new-tokens", 4, "--runs", 3)
    assert code == 0
    code, out, err = run("package", result, "-o", tmp_path / "served")
    assert code == 0, err
    packed = next((tmp_path / "served").rglob("*.onnx"))
    assert len(graphopt.Generator(packed, threads=1).generate([[5, 6, 7]], max_new_tokens=4)[0]) == 4


@pytest.mark.export
def test_steps_in_the_terminal(run: Run, texts: tuple[Path, Path, Path], tmp_path: Path) -> None:
    model = exported_cached("llama", "torchscript")
    code, out, _ = run("optimize", model, "-o", tmp_path / "m.onnx", "--recipe", "kv4+rtn", "--steps")
    assert code == 0
    assert "--quality held-out.txt does it" in out
    shown = out[out.index("Step by step") :].split("\n\n")[0]
    assert "cache a token" in shown
    assert "Cache a token" in out[: out.index("Step by step")]
    assert [line.split()[0] for line in shown.splitlines() if line.split() and line.split()[0] in PARTS] == PARTS[1:]
    code, _, err = run("optimize", model, "--in-place", "--recipe", "rtn", "--steps")
    assert code == 2
    assert "--steps compares with the original" in err


def test_the_configuration_follows_the_model(run: Run, tmp_path: Path) -> None:
    """By a second run into the same folder, by a package of a result beside its original, and in place."""
    source, folder = tmp_path / "source" / "model.onnx", tmp_path / "made"
    for path in (source.parent, folder):
        path.mkdir()
    onnx.save(decoder("attention", layers=4), source)
    (source.parent / "config.json").write_text(json.dumps({"num_hidden_layers": 4}))

    def layers(path: Path) -> int:
        found: int = json.loads((path / "config.json").read_text())["num_hidden_layers"]
        return found

    common = ("--recipe", "depth", "--set", "drop-layers.count=null", "--verify", "none")
    for names, left in ((["attention.1"], 3), (["attention.0", "attention.2"], 2)):
        branches = f"drop-layers.branches={json.dumps(names)}"
        code, _, err = run("optimize", source, "-o", folder / "model.onnx", *common, "--set", branches, "--force")
        assert code == 0, err
        assert layers(folder) == left
    code, out, err = run("optimize", source, *common, "--set", branches, "--json")
    assert code == 0, err
    assert layers(source.parent) == 4
    (note,) = json.loads(out)["notes"]
    assert "counts the 4 layers of model.onnx, model.opt.onnx has 2" in note
    code, _, err = run("package", source.parent / "model.opt.onnx", "-o", tmp_path / "served")
    assert code == 0, err
    assert layers(tmp_path / "served") == 2
    branches = 'drop-layers.branches=["attention.1"]'
    code, _, err = run("optimize", folder / "model.onnx", "--in-place", *common, "--set", branches)
    assert code == 0, err
    assert layers(folder) == 1
