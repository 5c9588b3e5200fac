"""Exact passes are exact and idempotent, on random graphs, in float64."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from exactness import reference_outputs, to_float64
from hypothesis import HealthCheck, given, settings
from random_graphs import WIDTH, models

from graphopt.pass_manager import PassManager
from graphopt.passes import registry
from graphopt.passes.base import Guarantee
from graphopt.recipe import load
from graphopt.verification.structure import check_structure

SIZES = ((1, 1), (3, 2), (2, 5), (0, 3), (2, 0))
# Constants are rounded to float32 in the graph, and folding them rounds once more where float64 would not: so folded
# arithmetic and weights are compared at float32's precision, everything else at float64's.
ROUNDED = {
    "fold-constants", "fold-weight-subgraphs", "merge-linears", "raise-gelu", "raise-hard-swish", "raise-dynamic-tanh",
    "fold-affine", "fold-batch-norm", "fold-norm-affine", "fold-rep-norm", "prune-zero-edges",
}  # fmt: skip


def agree(before: ir.Model, after: ir.Model, rtol: float) -> None:
    first, second = to_float64(before), to_float64(after)
    for batch, sequence in SIZES:
        feeds = {"x": np.random.default_rng(batch).normal(size=(batch, sequence, WIDTH))}
        with np.errstate(all="ignore"):
            try:
                expected = reference_outputs(first, feeds)
            except (ValueError, IndexError):
                assert 0 in (batch, sequence)  # a computed size 0 in the target of a Reshape means "copy"
                continue
            got = reference_outputs(second, feeds)
        for e, g in zip(expected, got, strict=True):
            assert e.shape == g.shape
            np.testing.assert_array_equal(np.isfinite(e), np.isfinite(g))
            finite = np.isfinite(e)
            scale = np.max(np.abs(e[finite]), initial=1e-30)
            assert np.max(np.abs(e[finite] - g[finite]), initial=0.0) <= rtol * scale


def written(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString(deterministic=True)


def exact_passes() -> list[str]:
    return [name for name, cls in registry.builtin().items() if cls.guarantee is Guarantee.EXACT]


@pytest.mark.parametrize("name", exact_passes())
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(model=models())
def test_each_pass(name: str, model: ir.Model) -> None:
    after = model.clone()
    before = written(after)
    if not registry.make(name)(after).modified:
        assert written(after) == before
        return
    for graph in (after.graph, *after.graph.subgraphs()):
        graph.sort()
    assert check_structure(after) == []
    onnx.checker.check_model(ir.to_proto(after), full_check=True)
    agree(model, after, 2e-5 if name in ROUNDED else 1e-12)
    again = after.clone()
    assert not registry.make(name)(again).modified, "not idempotent"


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(model=models(max_steps=24))
def test_the_whole_pipeline(model: ir.Model) -> None:
    after = model.clone()
    report = PassManager(load().passes(), verifier_of=None)(after)
    assert not report.rolled_back, report.rolled_back[0].detail
    agree(model, after, 2e-5)
    again = after.clone()
    second = PassManager(load().passes(), verifier_of=None)(again)
    assert not second.modified, [r.name for r in second.records if r.status == "applied"]
    assert written(again) == written(after)
