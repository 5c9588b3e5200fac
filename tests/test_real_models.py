"""Every real model goes through the exact recipe: equal on every probe, valid, loads, nothing taken back."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

import graphopt
from graphopt.models.catalogue import MODELS, fetch

pytestmark = pytest.mark.real

DEAR = ("layout", "smart-turn", "ppocr-v4-rec", "ppocr-v6-rec")
"""Those whose runs take seconds. What is saved of the others shows that files hold what was verified in memory."""
ONNX = [key for key, model in MODELS.items() if model.kind == "onnx"]


@pytest.mark.parametrize("key", ONNX)
def test_optimize(key: str, tmp_path: Path) -> None:
    source = fetch(key)
    result = graphopt.optimize(source, verify="phase")
    run = result.report.run
    assert not run.rolled_back, [(r.name, r.detail) for r in run.rolled_back]
    assert run.verdict is not None
    assert run.verdict.ok, run.verdict.summary
    assert len(result.report.probes) >= 2
    # A softmax over an inner axis is faster in a few operators more.
    assert run.after.nodes <= run.before.nodes + 5 * sum(r.name == "inner-softmax" for r in run.records)
    assert run.after.weight_bytes <= run.before.weight_bytes * 1.01 + 4096
    target = tmp_path / "model.onnx"
    result.save(target)
    onnx.checker.check_model(str(target), full_check=False)
    if key not in DEAR:
        assert graphopt.verify(source, target).ok
    again = graphopt.optimize(target, verify="none")
    assert not again.report.run.modified, [r.name for r in again.report.run.records if r.status == "applied"]
