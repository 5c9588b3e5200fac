"""The recipes that quantize: each on a small decoder as torch.export writes it, from end to end."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_transformers import exported_cached

import graphopt
from graphopt.calibration.text import TextDataset
from graphopt.recipe import load
from graphopt.runtime_ops.generation import Generator
from graphopt.runtime_ops.scoring import scores

WEIGHTS = (
    "rtn", "finequant", "nf4", "nupes", "bitmod", "higgs", "adadim", "easyquant", "lorc", "eora", "gptq", "comq", "rsq",
    "awq", "rotate+gptq",
)  # fmt: skip
VOCABULARY = 64


def tokens(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, count)


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_result_answers_nearly_as_the_original(name: str, tmp_path: object) -> None:
    path = exported_cached("llama")
    recipe = load(name).with_options(["quantize-weights.bits=8"] if name in ("rtn", "gptq") else [])
    needs = any(getattr(pass_, "needs", ()) for pass_ in recipe.passes())
    data = TextDataset(tokens(1, 256), 32) if needs else None
    result = graphopt.optimize(path, recipe, calibration=data)
    assert result.report.ok, result.report.run
    quantized = [r for r in result.report.run.records if r.name == "quantize-weights"]
    assert any(site.outcome == "applied" for record in quantized for site in record.sites)
    ids = tokens(2, 48)
    before, after = (scores(Generator(model), ids) for model in (graphopt.load(path), result.model))
    assert np.abs(before - after).mean() < 0.2
