"""rotate-residual: the same function in another basis, and no outliers in it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from exactness import op_types, parse_weighted, random_feeds, reference_outputs
from hypothesis import given, settings
from hypothesis import strategies as st
from smollm2_layers import first_layers, token_ids
from tiny_decoders import decoder
from tiny_transformers import exported, feeds

from graphopt import api
from graphopt.graph.load import load
from graphopt.passes.fold.layer_norm_to_rms_norm import LayerNormToRmsNorm
from graphopt.passes.fold.norm_affine import FoldNormAffine
from graphopt.passes.quantize.rotate_residual import RotateResidual
from graphopt.passes.quantize.rotations import hadamard, random_rotation, rotated
from graphopt.runtime_ops.memory_session import make_session
from graphopt.runtime_ops.operator import uses

HEAD = '<ir_version: 10, opset_import: ["": 23]>\n'
STREAM = f"""{HEAD}g (int64[batch, seq] ids) => (double[batch, seq, 11] y)
<double[11, 24] table, double[24] ones, double[24, 36] gate, double[24, 36] up, double[36, 24] down, double[24] bias,
 double[24, 24] wq, double[24, 12] wk, double[24, 12] wv, double[12] bv, double[24, 24] wo, double[11, 24] head> {{
  x0 = Gather(table, ids)
  n = RMSNormalization<axis = -1>(x0, ones)
  q = MatMul(n, wq)
  k = MatMul(n, wk)
  v0 = MatMul(n, wv)
  v = Add(v0, bv)
  a = Attention<q_num_heads = 4, kv_num_heads = 2>(q, k, v)
  o = MatMul(a, wo)
  x1 = Add(x0, o)
  m = RMSNormalization<axis = -1>(x1, ones)
  g = MatMul(m, gate)
  s = Sigmoid(g)
  act = Mul(g, s)
  u = MatMul(m, up)
  h = Mul(act, u)
  d0 = MatMul(h, down)
  d = Add(d0, bias)
  x2 = Add(x1, d)
  last = RMSNormalization<axis = -1>(x2, ones)
  turned = Transpose<perm = [1, 0]>(head)
  y = MatMul(last, turned)
}}"""
TIED = STREAM.replace(", double[11, 24] head", "").replace("(head)", "(table)")


def stream(text: str = STREAM, gains: bool = False) -> ir.Model:
    model = parse_weighted(text)
    if not gains:
        model.graph.initializers["ones"].const_value = ir.tensor(np.ones(24), name="ones")
    return model


def rotate(model: ir.Model, **options: Any) -> tuple[ir.Model, list[tuple[str, str]]]:
    copy, rule = model.clone(), RotateResidual(**options)
    rule(copy)
    said = [(site.outcome, site.detail) for site in rule.sites]
    rule(copy)
    assert all(site.outcome == "left" for site in rule.sites), "a second run changed something"
    return copy, said


def assert_same(before: ir.Model, after: ir.Model, rtol: float = 1e-12) -> None:
    inputs = random_feeds(before)
    for a, b in zip(reference_outputs(before, inputs), reference_outputs(after, inputs), strict=True):
        assert np.abs(a - b).max() <= rtol * np.abs(a).max()


def numbers(model: ir.Model, name: str) -> Any:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


def matrix_of(features: int, kind: Any, seed: int = 0) -> Any:
    return random_rotation(features, kind, seed).matrix


# ---- matrices


@given(features=st.integers(1, 48), seed=st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_rotations_are_orthogonal(features: int, seed: int) -> None:
    for kind in ("hadamard", "orthogonal"):
        matrix = matrix_of(features, kind, seed)
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(features), atol=1e-13)
        assert np.array_equal(matrix, matrix_of(features, kind, seed))


def test_a_hadamard_rotation_is_one_of_random_signs() -> None:
    matrix = matrix_of(24, "hadamard", 3)
    np.testing.assert_allclose(np.abs(matrix), 24**-0.5)
    np.testing.assert_allclose(
        matrix / hadamard(24), np.broadcast_to(matrix[:, :1] / hadamard(24)[:, :1], (24, 24)), rtol=1e-6
    )
    assert not np.array_equal(matrix, matrix_of(24, "hadamard", 4))


def test_blocks_of_a_constant_are_rotated_alone() -> None:
    rng = np.random.default_rng(0)
    array, rotation = rng.normal(size=(5, 12)), random_rotation(4, "orthogonal", 0)
    matrix = rotation.matrix
    found = rotated(ir.tensor(array), -1, rotation, [0, 2]).numpy()
    np.testing.assert_allclose(found[:, :4], array[:, :4] @ matrix)
    assert np.array_equal(found[:, 4:8], array[:, 4:8])
    np.testing.assert_allclose(found[:, 8:], array[:, 8:] @ matrix)
    np.testing.assert_allclose(rotated(ir.tensor(array.T), -2, rotation, [0, 2]).numpy(), found.T)
    np.testing.assert_allclose(rotated(ir.tensor(np.array(2.0)), -1, rotation).numpy(), np.full(4, 2.0) @ matrix)


# ---- the stream


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
@pytest.mark.parametrize("text", [STREAM, TIED], ids=["untied", "tied"])
def test_a_stream_is_rotated_in_its_constants(text: str, kind: str) -> None:
    before = stream(text)
    after, said = rotate(before, kind=kind, seed=1)
    assert [outcome for outcome, _ in said] == ["applied", "applied"]
    assert_same(before, after)
    assert op_types(before) == op_types(after)
    assert len(after.graph.initializers) == len(before.graph.initializers)
    matrix = matrix_of(24, kind, 1)
    np.testing.assert_allclose(numbers(after, "table"), numbers(before, "table") @ matrix)
    np.testing.assert_allclose(numbers(after, "gate"), matrix.T @ numbers(before, "gate"))
    np.testing.assert_allclose(numbers(after, "bias"), numbers(before, "bias") @ matrix)


def test_each_part_can_be_left_out() -> None:
    before = stream()
    heads, said = rotate(before, residual=False)
    assert [detail for _, detail in said] == ["heads of 6 rotated"]
    assert_same(before, heads)
    changed = [
        name for name in before.graph.initializers if not np.array_equal(numbers(before, name), numbers(heads, name))
    ]
    assert changed == ["wv", "bv", "wo"]
    nothing, said = rotate(before, residual=False, heads=False)
    assert not said
    assert ir.to_proto(nothing) == ir.to_proto(before)


def test_every_head_is_rotated_by_itself() -> None:
    before = stream()
    after, _ = rotate(before, residual=False)
    matrix = matrix_of(6, "hadamard", 0)
    np.testing.assert_allclose(numbers(after, "wv"), numbers(before, "wv") @ np.kron(np.eye(2), matrix))
    np.testing.assert_allclose(numbers(after, "wo"), np.kron(np.eye(4), matrix.T) @ numbers(before, "wo"))


def test_what_a_nonlinear_function_makes_is_rotated_when_the_model_runs() -> None:
    before = stream(STREAM.replace("double", "float").replace("float[24] ones", "float[24] ones"))
    before.graph.initializers["ones"].const_value = ir.tensor(np.ones(24, np.float32), name="ones")
    after, said = rotate(before, online_down=True)
    assert "a Hadamard transform of 36 features before it" in [detail for _, detail in said]
    assert [node.op_type for node in uses(after)] == ["HadamardTransform"]
    inputs = random_feeds(before)
    first, second = (make_session(m).run(None, inputs)[0] for m in (before, after))
    np.testing.assert_allclose(first, second, rtol=0, atol=1e-5 * np.abs(first).max())


def test_gains_ask_for_a_fold_first() -> None:
    before = stream(gains=True)
    after, said = rotate(before, heads=False)
    assert said[0][0] == "left"
    assert "fold-norm-affine" in said[0][1]
    assert ir.to_proto(after) == ir.to_proto(before)
    FoldNormAffine()(before)
    assert rotate(before, heads=False)[1][0][0] == "applied"


def test_a_tied_table_with_a_gain_before_the_head_stays_and_is_rotated_at_run_time() -> None:
    before = stream(TIED.replace("[11, 24]", "[100, 24]").replace("seq, 11]", "seq, 100]"), gains=True)
    FoldNormAffine()(before)
    after, said = rotate(before, heads=False)
    assert "2 rotations at run time" in said[0][1]
    assert_same(before, after)
    assert np.array_equal(numbers(after, "table"), numbers(before, "table"))
    assert op_types(after).count("MatMul") == op_types(before).count("MatMul") + 2
    _, said = rotate(before, heads=False, online=1)
    assert said[0][0] == "left"
    assert "2 rotations would have to be computed" in said[0][1]


def test_who_else_sees_the_stream_stands_in_the_way() -> None:
    seen = STREAM.replace("(double[batch, seq, 11] y)", "(double[batch, seq, 11] y, double[batch, seq, 24] x1)")
    assert rotate(stream(seen), heads=False)[1][0] == ("left", "an output of the graph reads 'x1'")


def test_a_shared_bias_is_copied() -> None:
    lines = """d = Add(d0, bias)
  low = Constant<value_ints = [0]>()
  high = Constant<value_ints = [24]>()
  axis = Constant<value_ints = [2]>()
  part = Slice(u, low, high, axis)
  t = Add(part, bias)
  seen = Tanh(t)"""
    text = STREAM.replace("d = Add(d0, bias)", lines)
    before = stream(text.replace("seq, 11] y)", "seq, 11] y, double[batch, seq, 24] seen)"))
    after, said = rotate(before, heads=False)
    assert said[0][0] == "applied"
    assert_same(before, after)
    assert np.array_equal(numbers(before, "bias"), numbers(after, "bias"))


@pytest.mark.parametrize("kind", ["attention", "concat"])
def test_values_of_a_cache_are_rotated_with_the_new_ones(kind: Any) -> None:
    before = api.canonical(ir.from_proto(decoder(kind, layers=1)))
    after, said = rotate(before, residual=False)
    assert said == [("applied", "heads of 16 rotated, and its cache")]
    matrix = matrix_of(16, "hadamard", 0).astype(np.float32)
    inputs = random_feeds(before, dims={"batch": 2, "sequence": 2, "past": 3, "total": 5})
    inputs["attention_mask"] = np.ones_like(inputs["attention_mask"])
    turned = {k: v @ matrix if k.endswith(".value") else v for k, v in inputs.items()}
    first, second = make_session(before).run(None, inputs), make_session(after).run(None, turned)
    np.testing.assert_allclose(first[0], second[0], rtol=0, atol=1e-5 * np.abs(first[0]).max())
    np.testing.assert_allclose(first[2] @ matrix, second[2], rtol=0, atol=1e-5 * np.abs(first[2]).max())


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="hadamard"):
        RotateResidual(kind="givens")


# ---- exporters' forms, real weights


@pytest.mark.parametrize(("name", "outcome"), [("gpt2", "applied"), ("vit", "applied"), ("bert", "left")])
def test_exported_transformers(name: str, outcome: str) -> None:
    before = api.canonical(load(exported(name)))
    FoldNormAffine(untie=True)(before)
    LayerNormToRmsNorm()(before)
    after, said = rotate(before)
    assert said[0][0] == outcome
    assert [o for o, _ in said[-3:]] == ["applied"] * 3  # heads
    first, second = (make_session(m).run(None, feeds(name))[0] for m in (before, after))
    np.testing.assert_allclose(first, second, rtol=0, atol=1e-5 * np.abs(first).max())


@pytest.mark.real
@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
def test_real_weights(kind: str) -> None:
    """Tied, with a gain before the head: as SmolLM2 is exported."""
    before = first_layers(1)
    FoldNormAffine()(before)
    after, said = rotate(before, kind=kind, online_down=True)
    assert [outcome for outcome, _ in said] == ["applied"] * 3
    first, second = (make_session(m).run(None, token_ids(0))[0] for m in (before, after))
    np.testing.assert_allclose(first, second, rtol=0, atol=1e-4 * np.abs(first).max())
