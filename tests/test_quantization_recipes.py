"""The recipes that quantize: each on a small decoder as torch.export writes it, from end to end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from tiny_transformers import exported_cached

import graphopt
from graphopt.calibration.text import TextDataset
from graphopt.recipe import load
from graphopt.runtime_ops.generation import Generator
from graphopt.runtime_ops.scoring import scores

WEIGHTS = (
    "rtn", "finequant", "nf4", "nupes", "bitmod", "higgs", "adadim", "easyquant", "lorc", "eora", "gptq", "gptq2", "comq",
    "rsq", "awq", "rotate+gptq",
)  # fmt: skip
VOCABULARY = 64


def tokens(seed: int, count: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, VOCABULARY, count)


@pytest.mark.parametrize("name", ["rtn8+decode", "rtn+kv4+decode", "nf4"])
def test_what_comes_behind_is_verified_against_the_quantized_model(name: str) -> None:
    """Products that round what they read hide nothing and cost no pass: all of the lowering stays, and closely."""
    assumed = ("no-left-padding", "no-batched-chunks", "counted-positions", "max-length=64")
    report = graphopt.optimize(exported_cached("llama"), name, assume=assumed, verify="phase").report
    assert report.ok
    assert not [(r.name, r.detail) for r in report.run.records if r.status == "rolled back"]
    assert {r.name for r in report.run.records if r.status == "applied"} & {"group-query-attention", "quantize-kv"}
    assert not {name for name, _ in report.run.left()} & {"fold-constants", "raise-contrib"}  # of what was just made


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_result_answers_nearly_as_the_original(name: str, tmp_path: Path) -> None:
    path = exported_cached("llama")
    recipe = load(name).with_options(["quantize-weights.bits=8"] if name in ("rtn", "gptq") else [])
    needs = any(getattr(pass_, "needs", ()) for pass_ in recipe.passes())
    data = TextDataset(tokens(1, 256), 32) if needs else None
    result = graphopt.optimize(path, recipe, calibration=data, verify="none")
    quantized = [r for r in result.report.run.records if r.name == "quantize-weights"]
    assert quantized[0].status == "applied", quantized[0].detail
    assert any(site.outcome == "applied" for record in quantized for site in record.sites)
    ids = tokens(2, 48)
    result.save(tmp_path / "model.onnx")
    before, after = (scores(Generator(model), ids) for model in (path, tmp_path / "model.onnx"))
    assert np.abs(before - after).mean() < 0.25 * before.std(), (np.abs(before - after).mean(), before.std())
