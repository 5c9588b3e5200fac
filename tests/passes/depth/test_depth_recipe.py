"""The recipe depth, alone and before others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_transformers import exported_cached

import graphopt
from graphopt.calibration.calibration import Calibration
from graphopt.calibration.text import TextDataset
from graphopt.graph.kv_interface import kv_interface
from graphopt.graph.save import save


@pytest.mark.export
@pytest.mark.parametrize("recipe", ["depth"])
def test_the_result_is_judged_and_generates(recipe: str, tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(3, 100, size=64)
    result = graphopt.optimize(
        exported_cached("llama", "torchscript"), recipe, options=["fraction=0.34"], assume=["no-left-padding"],
        calibration=Calibration(TextDataset(tokens, window=16), threads=1),
    )  # fmt: skip
    assert result.report.ok
    record = next(r for r in result.report.run.records if r.name == "drop-layers")
    assert (record.status, record.guarantee) == ("applied", "lossy")
    assert record.options["search"] == "greedy"
    assert len(record.options["branches"]) == 1
    assert record.options["expected_divergence"] > 0
    assert set(record.options["scores"]) == {f"attention.{i}" for i in range(3)}
    interface = kv_interface(result.model)
    assert interface is not None
    assert (interface.layers, interface.problems) == (2, ())
    save(result.model, tmp_path / "model.onnx")
    texts = graphopt.Generator(tmp_path / "model.onnx", threads=1).generate([[5, 6, 7]], max_new_tokens=4)
    assert len(texts[0]) == 4
