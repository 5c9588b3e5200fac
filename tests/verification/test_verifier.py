from __future__ import annotations

import json

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphopt.errors import InputDataError, VerificationError
from graphopt.verification.equivalence import verify
from graphopt.verification.verifier import Verifier, coarsest_type


def mlp(seed: int = 0) -> ir.Model:
    proto = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
g (float[batch, 16] x) => (float[batch, 4] y, int64[batch] best) {
  h = MatMul(x, w1) r = Relu(h) y = MatMul(r, w2) best = ArgMax<axis = 1, keepdims = 0>(y)
}""")
    rng = np.random.default_rng(seed)
    for name, shape in (("w1", (16, 32)), ("w2", (32, 4))):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name))
    return ir.from_proto(proto)


def parse(text: str) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(text))


def scaled(model: ir.Model, name: str, factor: float) -> ir.Model:
    copy = model.clone()
    value = copy.graph.initializers[name]
    value.const_value = ir.tensor(value.const_value.numpy() * np.float32(factor), name=name)
    return copy


def test_same_model_is_equal_bit_for_bit() -> None:
    model = mlp()
    verdict = Verifier(model).check(model.clone(), bitwise=True)
    assert verdict.ok
    assert verdict.margin == 0
    assert verdict.summary == "Equal: 2 outputs on 3 probes, no difference at all."
    assert {c.optimizations for c in verdict.checked} == {"all", "none"}


def test_a_weight_off_by_one_percent_is_rejected_and_named() -> None:
    model = mlp()
    verdict = Verifier(model).check(scaled(model, "w2", 1.01))
    assert not verdict.ok
    assert verdict.margin == pytest.approx(0.01 / (1e-4 + 1e-4), rel=0.01)  # at the largest element
    assert verdict.summary.startswith("Output 'y' is off by ")
    assert "on probe " in verdict.summary


def test_reordering_passes_but_not_bit_for_bit() -> None:
    model = mlp()
    other = scaled(model, "w1", 1 + 3e-7)
    verifier = Verifier(model)
    assert verifier.check(other).ok
    strict = verifier.check(other, bitwise=True)
    assert not strict.ok
    assert "must be equal (without" in strict.summary or "but must be equal on probe" in strict.summary


def test_candidate_that_does_not_load_or_run() -> None:
    model = mlp()
    verifier = Verifier(model)
    broken = model.clone()
    broken.graph.node(0).op_type = "Matmul"
    verdict = verifier.check(broken)
    assert not verdict.ok
    assert "Matmul" in verdict.summary
    assert verdict.margin == float("inf")

    one_row = parse("""<ir_version: 8, opset_import: ["": 17]>
g (float[batch, 16] x) => (float[batch, 4] y, int64[batch] best) <int64[2] s = {1, 16}> {
  f = Reshape(x, s) h = MatMul(f, w1) r = Relu(h) y = MatMul(r, w2) best = ArgMax<axis = 1, keepdims = 0>(y) }""")
    for name in ("w1", "w2"):
        value = next(v for n in one_row.graph for v in n.inputs if v is not None and v.name == name)
        value.const_value = model.graph.initializers[name].const_value
        one_row.graph.register_initializer(value)
    verdict = verifier.check(one_row)
    assert not verdict.ok
    assert "doesn't run on probe 'batch, noise'" in verdict.summary


def test_candidate_with_another_signature() -> None:
    model = mlp()
    verifier = Verifier(model)
    fewer = model.clone()
    del fewer.graph.outputs[1]
    assert "lacks the output 'best'" in verifier.check(fewer).summary
    more = model.clone()
    more.graph.inputs.append(ir.Value(name="z", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1])))
    assert "needs an input 'z'" in verifier.check(more).summary


def test_outputs_in_another_order_are_matched_by_name() -> None:
    model = mlp()
    other = model.clone()
    outputs = list(other.graph.outputs)[::-1]
    del other.graph.outputs[:]
    other.graph.outputs.extend(outputs)
    assert Verifier(model).check(other, bitwise=True).ok


def test_random_outputs_are_reported_not_compared() -> None:
    model = parse("""<ir_version: 8, opset_import: ["": 17]>
g (float[n, 4] x) => (float[n, 4] noisy, float[n, 4] y) { r = RandomNormalLike(x) noisy = Add(x, r) y = Relu(x) }""")
    verdict = Verifier(model).check(model.clone())
    assert verdict.ok
    assert {c.output.name for c in verdict.checked} == {"y"}
    assert any("'noisy' is not deterministic" in note for note in verdict.notes)


def test_nothing_to_compare_is_not_ok() -> None:
    model = parse("""<ir_version: 8, opset_import: ["": 17]>
g (float[n, 4] x) => (float[n, 4] y) { y = RandomNormalLike(x) }""")
    verdict = Verifier(model).check(model.clone())
    assert not verdict.ok
    assert verdict.summary.startswith("Nothing was compared: Output 'y' is not deterministic")


def test_tiny_outputs_are_pointed_out() -> None:
    model = parse("""<ir_version: 8, opset_import: ["": 17]>
g (float[n, 4] x) => (float[n, 4] y) <float k = {1e-9}> { y = Mul(x, k) }""")
    notes = Verifier(model).check(model.clone()).notes
    assert any("says little" in note for note in notes)


def test_what_onnxruntime_itself_changes_widens_the_tolerance() -> None:
    model = mlp()
    verifier = Verifier(model)
    name = verifier.probes[0].name
    kept = verifier._kept["all", name]
    kept[0] = kept[0] + np.float32(5e-4) * np.abs(kept[0]).max()
    verifier.notes.clear()
    tolerance = verifier._allow_spread()["y"]
    assert tolerance.absolute == pytest.approx(2e-3, rel=1e-2)
    assert "may be off by up to 2.0e-03" in verifier.notes[0]
    kept[0] = kept[0] * 2
    assert verifier._allow_spread()["y"].absolute == 1e-2


def test_the_type_that_the_graph_computes_in() -> None:
    text = """<ir_version: 8, opset_import: ["": 17]>
g (float[n] x) => (float[n] y) { h = Cast<to = %d>(x) s = Sqrt(h) y = Cast<to = 1>(s) }"""
    assert coarsest_type(parse(text % 10)) == "float16"
    assert coarsest_type(parse(text % 16)) == "bfloat16"
    assert coarsest_type(parse(text % 11)) is None
    assert any("compared as float16" in note for note in Verifier(parse(text % 10)).notes)


def test_cost_and_json() -> None:
    model = mlp()
    verifier = Verifier(model)
    assert 0 < verifier.cost_seconds < 5
    data = json.loads(json.dumps(verifier.check(model).to_dict(), allow_nan=False))
    assert data["ok"] is True
    assert len(data["outputs"]) == 12


def test_original_that_runs_on_nothing() -> None:
    model = parse("""<ir_version: 8, opset_import: ["": 17]>
g (float[a, b, c] x) => (float[m] y) <int64[1] s = {12347}> { y = Reshape(x, s) }""")
    with pytest.raises(VerificationError, match=r"--inputs FILE\.npz"):
        Verifier(model)


class TestVerify:
    def save(self, path, model):
        onnx.save(ir.to_proto(model), path)
        return path

    def test_equal_and_different(self, tmp_path) -> None:
        a = self.save(tmp_path / "a.onnx", mlp())
        b = self.save(tmp_path / "b.onnx", scaled(mlp(), "w1", 1.01))
        assert verify(a, a, bitwise=True).ok
        assert not verify(a, b).ok

    def test_own_inputs(self, tmp_path) -> None:
        a = self.save(tmp_path / "a.onnx", mlp())
        np.savez(tmp_path / "x.npz", x=np.ones((7, 16), np.float32))
        verdict = verify(a, a, tmp_path / "x.npz")
        assert verdict.ok
        assert {c.probe for c in verdict.checked} == {"x.npz"}
        np.savez(tmp_path / "bad.npz", x=np.ones((7, 15), np.float32))
        with pytest.raises(InputDataError):
            verify(a, a, tmp_path / "bad.npz")

    def test_signatures_that_differ(self, tmp_path) -> None:
        a = self.save(tmp_path / "a.onnx", mlp())
        other = mlp()
        other.graph.inputs[0].name = "z"
        b = self.save(tmp_path / "b.onnx", other)
        with pytest.raises(VerificationError, match=r"b.onnx has no input 'x', which a.onnx has"):
            verify(a, b)
        other = mlp()
        other.graph.outputs[1].type = ir.TensorType(ir.DataType.INT32)
        b = self.save(tmp_path / "b.onnx", other)
        with pytest.raises(VerificationError, match=r"output 'best' is .*INT64.* in a.onnx and .*INT32.* in b.onnx"):
            verify(a, b)
