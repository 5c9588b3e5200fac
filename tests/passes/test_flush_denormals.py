"""flush-denormals: denormal weights become zero where they are only multiplied."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from exactness import assert_exact, parse_weighted

import graphopt
from graphopt.models.catalogue import fetch
from graphopt.passes.fold import flush_denormals
from graphopt.passes.fold.flush_denormals import FlushDenormals

TINY = np.float32(2.0**-126)


def model(body: str = "y = MatMul(x, w)", dtype: type = np.float32) -> ir.Model:
    kind = "float" if dtype is np.float32 else "float16"
    found = parse_weighted(
        f'<ir_version: 10, opset_import: ["": 21]> g ({kind}[2, 4] x) => ({kind}[2, 3] y) <{kind}[4, 3] w> {{ {body} }}'
    )
    array = found.graph.initializers["w"].const_value.numpy().copy()
    array[0] = [TINY / 2, -TINY / 4, TINY] if dtype is np.float32 else [1e-7, -1e-7, 1]
    found.graph.initializers["w"].const_value = ir.tensor(array, name="w")
    return found


@pytest.mark.parametrize("lazy", [False, True])
def test_denormal_weights(lazy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if lazy:
        monkeypatch.setattr("graphopt.graph.computed.LAZY_BYTES", 0)
    before = model()
    after = before.clone()
    assert FlushDenormals()(after).modified
    array = after.graph.initializers["w"].const_value.numpy()
    assert array[0].tolist() == [0, 0, TINY]
    np.testing.assert_array_equal(array[1:], before.graph.initializers["w"].const_value.numpy()[1:])
    assert not FlushDenormals()(after).modified
    assert_exact(before, FlushDenormals())


def test_samples_of_a_large_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flush_denormals, "_SAMPLES", 2)
    monkeypatch.setattr(flush_denormals, "_SAMPLE", 2)
    assert FlushDenormals()(model()).modified
    later = model()
    array = np.roll(later.graph.initializers["w"].const_value.numpy(), 2, axis=0)
    later.graph.initializers["w"].const_value = ir.tensor(np.ascontiguousarray(array), name="w")
    assert not FlushDenormals()(later).modified  # neither the first two nor the last two numbers


def test_half_precision_is_meant() -> None:
    assert not FlushDenormals()(model(dtype=np.float16)).modified


def test_other_readers() -> None:
    found = model("w1 = ReduceSum <keepdims = 0> (w) m = MatMul(x, w) y = Div(m, w1)")
    rule = FlushDenormals()
    assert not rule(found).modified
    assert "read by ReduceSum" in rule.sites[0].detail


@pytest.mark.real
def test_a_detector() -> None:
    result = graphopt.optimize(fetch("ppocr-v6-det"), recipe={"passes": ["lift-constants", "flush-denormals"]})
    assert result.report.ok
    (record,) = [r for r in result.report.run.records if r.name == "flush-denormals" and r.round == 1]
    assert len([s for s in record.sites if s.outcome == "applied"]) == 4
