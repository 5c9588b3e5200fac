"""quantize-dynamic: products with int8 weights, and activations that are rounded as the model runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from exactness import op_types, parse, parse_weighted
from hypothesis import given, settings
from hypothesis import strategies as st

import graphopt
from graphopt.calibration.text import TextDataset
from graphopt.errors import UsageError
from graphopt.graph.edits import sort
from graphopt.models import catalogue
from graphopt.pass_manager import PassManager
from graphopt.passes.quantize.dynamic import QuantizeDynamic
from graphopt.recipe import load
from graphopt.runtime_ops.memory_session import make_session, run
from graphopt.verification.structure import check_structure

HEAD = '<ir_version: 10, opset_import: ["": 21]>'
ONE = f"""{HEAD} g (float[b, s, 96] x) => (float[b, s, 64] y)
<float[96, 64] w, float[64] c> {{
  p = MatMul(x, w)
  y = Add(p, c)
}}"""
THREE = f"""{HEAD} g (float[b, s, 96] x) => (float[b, s, 64] q, float[b, s, 44] k, float[b, s, 48] v)
<float[96, 64] wq, float[96, 44] wk, float[96, 48] wv, float[44] c> {{
  q = MatMul(x, wq)
  kk = MatMul(x, wk)
  k = Add(c, kk)
  v = MatMul(x, wv)
}}"""
HIDDEN = f"""{HEAD} g (float[b, s, 64] x) => (float[b, s, 64] y)
<float[64, 128] w, float[128] c, float[128, 64] w2> {{
  p = MatMul(x, w)
  q = Add(p, c)
  h = %s(q)
  y = MatMul(h, w2)
}}"""


def outputs(model: ir.Model, feeds: dict[str, Any]) -> list[np.ndarray[Any, Any]]:
    return run(make_session(model, threads=1), feeds)


def written(before: ir.Model, **options: Any) -> tuple[ir.Model, QuantizeDynamic]:
    after = before.clone()
    rule = QuantizeDynamic(**options)
    assert rule(after).modified
    sort(after)
    assert check_structure(after) == []
    return after, rule


def error(before: ir.Model, after: ir.Model, feeds: dict[str, Any]) -> float:
    """The largest relative error of the outputs' norms."""
    return max(
        float(np.linalg.norm(b - a) / np.linalg.norm(a))
        for a, b in zip(outputs(before, feeds), outputs(after, feeds), strict=True)
    )


def tokens(*shape: int, seed: int = 0) -> dict[str, Any]:
    return {"x": np.random.default_rng(seed).normal(size=shape).astype(np.float32)}


def test_one_product_with_its_bias() -> None:
    before = parse_weighted(ONE)
    after, rule = written(before, token_scales="none")
    assert op_types(after) == ["DynamicQuantizeMatMul"]
    assert [s.outcome for s in rule.sites] == ["applied"]
    assert error(before, after, tokens(2, 5, 96)) < 0.02
    node = next(iter(after.graph))
    codes, scales = node.inputs[1].const_value, node.inputs[2].const_value
    assert (codes.dtype, scales.shape.numpy()) == (ir.DataType.INT8, (64,))
    weight = before.graph.initializers["w"].const_value.numpy()
    assert np.abs(codes.numpy() * scales.numpy() - weight).max() <= scales.numpy().max() / 2 * 1.001
    assert not rule(after).modified


def test_products_of_one_value_share_what_rounds_it() -> None:
    before = parse_weighted(THREE)
    after, _ = written(before, token_scales="none")
    assert op_types(after).count("DynamicQuantizeLinear") == 1
    assert op_types(after).count("MatMulIntegerToFloat") == 3
    assert "MatMul" not in op_types(after)
    assert [v.name for v in after.graph.outputs] == ["q", "k", "v"]
    assert error(before, after, tokens(1, 7, 96)) < 0.02


def test_a_scale_for_each_token() -> None:
    before = parse_weighted(THREE)
    after, _ = written(before)
    feeds = tokens(2, 8, 96)
    feeds["x"][0, 3] *= 1000  # one scale for all would leave nothing of the others
    coarse, _ = written(before, token_scales="none")
    small = [np.delete(y, 3, axis=1) for y in outputs(before, feeds)]
    fine, lost = ([np.delete(y, 3, axis=1) for y in outputs(m, feeds)] for m in (after, coarse))
    for a, b, c in zip(small, fine, lost, strict=True):
        assert np.linalg.norm(b - a) / np.linalg.norm(a) < 0.02
        assert np.linalg.norm(c - a) / np.linalg.norm(a) > 0.5


@pytest.mark.parametrize("activation", ["Gelu", "Relu", "Tanh", "Sigmoid"])
def test_behind_an_activation(activation: str) -> None:
    before = parse_weighted(HIDDEN % activation)
    after, _ = written(before, token_scales="hidden")
    assert [n.op_type for n in after.graph if n.op_type == "DynamicQuantizeMatMul"] != []
    assert "Div" in op_types(after)
    assert error(before, after, tokens(2, 9, 64)) < 0.03


@pytest.mark.parametrize("scales", ["all", "none"])
def test_tokens_of_zeros_and_no_tokens(scales: str) -> None:
    before = parse_weighted(ONE)
    after, _ = written(before, token_scales=scales)
    zeros = {"x": np.zeros((1, 3, 96), np.float32)}
    np.testing.assert_allclose(outputs(after, zeros)[0], outputs(before, zeros)[0], atol=1e-6)
    assert outputs(after, {"x": np.zeros((1, 0, 96), np.float32)})[0].shape == (1, 0, 64)


@pytest.mark.parametrize("attributes", ["", "<transB = 1>", "<alpha = 0.5, beta = 2.0>", "<transB = 1, alpha = 3.0>"])
@pytest.mark.parametrize("scales", ["all", "none"])
def test_gemm(attributes: str, scales: str) -> None:
    shape = "64, 96" if "transB" in attributes else "96, 64"
    before = parse_weighted(f"""{HEAD} g (float[n, 96] x) => (float[n, 64] y)
    <float[{shape}] w, float[64] c> {{ y = Gemm {attributes} (x, w, c) }}""")
    after, _ = written(before, token_scales=scales)
    assert "Gemm" not in op_types(after)
    assert error(before, after, tokens(6, 96)) < 0.02


def test_older_opsets_and_odd_sizes() -> None:
    before = parse_weighted("""<ir_version: 7, opset_import: ["": 11]> g (float[3, 77] x) => (float[3, 91] y)
    <float[77, 91] w> { y = MatMul(x, w) }""")
    for scales in ("all", "none"):
        after, _ = written(before, token_scales=scales)
        assert error(before, after, tokens(3, 77)) < 0.02


EMBEDDING = f"""{HEAD} g (int64[b, s] i) => (float[b, s, 1000] y)
<float[1000, 96] table> {{
  x = Gather(table, i)
  t = Transpose <perm = [1, 0]> (table)
  y = MatMul(x, t)
}}"""


def test_an_embedding_tied_with_the_last_product() -> None:
    before = parse_weighted(EMBEDDING)
    feeds = {"i": np.arange(12).reshape(3, 4)}
    after, _ = written(before)
    assert "GatherBlockQuantized" in op_types(after)
    assert not any(t.dtype == ir.DataType.FLOAT and t.size > 1000 for t in _weights(after))
    assert error(before, after, feeds) < 0.02


def test_a_table_that_stays_keeps_the_product_in_floats() -> None:
    before = parse_weighted(EMBEDDING)
    rule = QuantizeDynamic(embeddings=False)
    assert not rule(before.clone()).modified
    assert any("is read by Gather" in s.detail for s in rule.sites)


def _weights(model: ir.Model) -> list[ir.TensorProtocol]:
    return [v.const_value for v in model.graph.initializers.values()]


@pytest.mark.parametrize(
    ("text", "options", "reason"),
    [
        (ONE, {"min_weights": 10000}, "6144 numbers"),
        (ONE, {"exclude": ["*MatMul*", "p*", "head", "other", "MatMul"]}, "excluded"),
        (ONE.replace("float[", "double["), {}, "computes in double"),
        (ONE.replace('"": 21', '"": 9'), {}, "needs opset 11"),
        (f"{HEAD} g (float[96, n] x) => (float[n, 64] y) <float[96, 64] w> {{ y = Gemm <transA = 1> (x, w) }}", {},
         "transposes"),
        (f"{HEAD} g (float[n, 96] x, float[64] c) => (float[n, 64] y) <float[96, 64] w> {{ y = Gemm(x, w, c) }}", {},
         "isn't constant"),
    ],
)  # fmt: skip
def test_left_with_the_reason(text: str, options: dict[str, Any], reason: str) -> None:
    model = parse_weighted(text)
    rule = QuantizeDynamic(**options)
    assert not rule(model).modified
    assert any(reason in site.detail for site in rule.sites), [s.detail for s in rule.sites]


def test_weights_that_are_not_finite_stay() -> None:
    model = parse_weighted(ONE)
    model.graph.initializers["w"].const_value = ir.tensor(np.full((96, 64), np.nan, np.float32))
    rule = QuantizeDynamic()
    assert not rule(model).modified
    assert "NaN" in rule.sites[0].detail


def test_what_is_no_constant_is_not_looked_at() -> None:
    model = parse(f"{HEAD} g (float[2, 3] x, float[3, 4] w) => (float[2, 4] y) {{ y = MatMul(x, w) }}")
    rule = QuantizeDynamic()
    assert not rule(model).modified
    assert rule.sites == []


@pytest.mark.parametrize(
    "options",
    [{"token_scales": "some"}, {"outliers": -1.0}, {"outliers": 6.0, "token_scales": "none"}, {"exclude": "head"}],
)
def test_options_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"token_scales|outliers|exclude"):
        QuantizeDynamic(**options)


@given(st.integers(2, 40), st.integers(2, 40), st.integers(1, 6), st.booleans(), st.integers(0, 2**31))
@settings(max_examples=15, deadline=None)
def test_any_size(inputs: int, outputs_: int, rows: int, by_token: bool, seed: int) -> None:
    before = parse_weighted(
        f"""{HEAD} g (float[n, {inputs}] x) => (float[n, {outputs_}] y)
        <float[{inputs}, {outputs_}] w> {{ y = MatMul(x, w) }}""",
        seed,
    )
    after, _ = written(before, min_weights=1, token_scales="all" if by_token else "none")
    feeds = tokens(rows, inputs, seed=seed)
    weight = before.graph.initializers["w"].const_value.numpy()
    # Half a step of the activation on each weight, half a step of the weight on each activation.
    limit = (np.abs(feeds["x"]).max() / 127 * np.abs(weight).sum(axis=0)).max()
    limit += (np.abs(weight).max() / 127 * np.abs(feeds["x"]).sum(axis=1)).max()
    assert np.abs(outputs(after, feeds)[0] - outputs(before, feeds)[0]).max() <= limit


# ---- outlier features


def with_outliers() -> tuple[ir.Model, dict[str, Any], list[dict[str, Any]]]:
    before = parse_weighted(f"""{HEAD} g (float[b, s, 96] x) => (float[b, s, 64] y)
    <float[96, 64] w, float[64] c> {{
      a = Neg(x)
      p = MatMul(a, w)
      y = Add(p, c)
    }}""")
    samples = [tokens(1, 20, 96, seed=seed) for seed in range(1, 4)]
    feeds = tokens(2, 20, 96, seed=9)
    for one in (*samples, feeds):
        one["x"][..., [5, 70]] *= 200
    return before, feeds, samples


def test_outlier_features_are_multiplied_in_floats() -> None:
    before, feeds, samples = with_outliers()
    plain, _ = written(before)
    after = before.clone()
    rule = QuantizeDynamic(outliers=6.0)
    rule.calibration = samples  # type: ignore[assignment]
    assert rule(after).modified
    sort(after)
    assert check_structure(after) == []
    assert "2 features in floats" in rule.sites[0].detail
    picked = next(v for name, v in after.graph.initializers.items() if "outliers" in name)
    assert picked.const_value.numpy().tolist() == [5, 70]
    feeds["x"][..., [5, 70]] = 0  # what is left are the features that outliers would leave no codes for
    big = {"x": feeds["x"].copy()}
    big["x"][..., [5, 70]] = 200
    assert error(before, after, feeds) < 0.02
    exact, fine, coarse = (outputs(m, big)[0] for m in (before, after, plain))
    assert np.linalg.norm(fine - exact) < 0.1 * np.linalg.norm(coarse - exact)


def test_outliers_are_told_by_what_is_a_number() -> None:
    before, _, samples = with_outliers()
    samples[0]["x"][0, 3] = np.inf
    samples[1]["x"][0, 4, 11] = np.nan
    rule = QuantizeDynamic(outliers=6.0)
    rule.calibration = samples  # type: ignore[assignment]
    assert rule(before).modified
    picked = next(v for name, v in before.graph.initializers.items() if "outliers" in name)
    assert picked.const_value.numpy().tolist() == [5, 70]


def test_outliers_need_data() -> None:
    with pytest.raises(UsageError, match="needs calibration data"):
        PassManager([QuantizeDynamic(outliers=6.0)])
    assert QuantizeDynamic().needs == ()


def test_text_as_data() -> None:
    before = parse_weighted(f"""{HEAD} g (int64[b, s] input_ids, int64[b, s] attention_mask) => (float[b, s, 64] y)
    <float[1000, 96] table, float[96, 64] w> {{
      x = Gather(table, input_ids)
      m = Cast <to = 1> (attention_mask)
      axes = Constant <value_ints = [-1]> ()
      u = Unsqueeze(m, axes)
      z = Mul(x, u)
      y = MatMul(z, w)
    }}""")
    before.graph.initializers["table"].const_value = ir.tensor(
        np.random.default_rng(0).normal(size=(1000, 96)).astype(np.float32)
        * np.where(np.arange(96) == 7, 100, 1).astype(np.float32)
    )
    rule = QuantizeDynamic(outliers=6.0)
    rule.calibration = TextDataset(np.arange(64), 16)
    assert rule(before).modified
    assert any("1 features in floats" in s.detail for s in rule.sites)


# ---- a real model


@pytest.mark.real
def test_minilm_keeps_the_order_of_its_cosines() -> None:
    path = catalogue.fetch("paraphrase-minilm")
    exact, small = (graphopt.optimize(path, recipe, verify="none").model for recipe in ("exact", "int8-dynamic"))
    assert sum(t.nbytes for t in _weights(small)) < 0.27 * sum(t.nbytes for t in _weights(exact))
    # Six products a layer, and no float one is left but that of the last tokens' attention.
    assert sum(op_types(small).count(name) for name in ("MatMulIntegerToFloat", "DynamicQuantizeMatMul")) == 18
    vectors = []
    for model in (exact, small):
        session, rng, rows = make_session(model, threads=1), np.random.default_rng(0), []
        for _ in range(40):
            ids = rng.integers(1000, 30000, size=(1, int(rng.integers(4, 24))))
            given = {i.name: np.ones_like(ids) * ("mask" in i.name) for i in session.get_inputs()}
            found = run(session, {**given, "input_ids": ids})
            row = next(y for y in found if y.shape[-1] == 384).reshape(-1, 384).mean(axis=0)
            rows.append(row / np.linalg.norm(row))
        vectors.append(np.stack(rows))
    pairs = np.triu_indices(40, 1)
    ranks = [np.argsort(np.argsort((v @ v.T)[pairs])) for v in vectors]
    assert np.corrcoef(*ranks)[0, 1] > 0.99


def test_the_recipe() -> None:
    names = [getattr(p, "name", "") for p in load("int8-dynamic").passes("cpu")]
    assert "quantize-dynamic" in names
    with pytest.raises(UsageError, match="is for the target cpu, not for cuda"):
        load("int8-dynamic").passes("cuda")
    assert load("llm-int8").passes("cpu")[names.index("quantize-dynamic")].outliers == 3
