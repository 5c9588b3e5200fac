"""Channel folds, awq-scales and smooth-quant: the same function, factors where they belong, and smaller errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from exactness import op_types, parse_weighted, random_feeds, reference_outputs
from graphopt.calibration.calibration import Calibration
from graphopt.calibration.data import ArrayDataset
from graphopt.calibration.request import Request
from graphopt.calibration.statistics import AbsMax
from hypothesis import given, settings
from hypothesis import strategies as st
from smollm2_layers import calibration, first_layers, token_ids
from tiny_decoders import decoder
from tiny_transformers import exported, feeds

from graphopt import api
from graphopt.analysis.dims import Dim
from graphopt.analysis.shapes import infer
from graphopt.graph.edits import Editor
from graphopt.graph.load import load
from graphopt.passes.quantize.awq_scales import AwqScales, output_error
from graphopt.passes.quantize.channel_folds import ChannelFold, ChannelFolds, ReaderGroup, scale
from graphopt.passes.quantize.factor_numbers import regrouped
from graphopt.passes.quantize.grids import UniformGrid
from graphopt.passes.quantize.roundings import round_to_nearest
from graphopt.passes.quantize.smooth_quant import SmoothQuant
from graphopt.verification.session import make_session

HEAD = '<ir_version: 10, opset_import: ["": 23]>\n'


def gated(activation: str = "s = Sigmoid(a)\n  act = Mul(a, s)") -> str:
    """A gated MLP behind a norm, in float64."""
    return f"""{HEAD}g (double[batch, seq, 16] x) => (double[batch, seq, 16] y)
<double[16] gain, double[16, 24] gate, double[16, 24] up, double[24, 16] down> {{
  n = RMSNormalization<axis = -1>(x, gain)
  a = MatMul(n, gate)
  {activation}
  b = MatMul(n, up)
  h = Mul(act, b)
  z = MatMul(h, down)
  y = Add(x, z)
}}"""


ATTENTION = f"""{HEAD}g (double[batch, seq, 16] x) => (double[batch, seq, 16] y)
<double[16] gain, double[16] shift, double[16, 16] wq, double[16, 8] wk, double[16, 8] wv, double[8] bv, double[16, 16] wo> {{
  n = LayerNormalization<axis = -1>(x, gain, shift)
  q = MatMul(n, wq)
  k = MatMul(n, wk)
  v0 = MatMul(n, wv)
  v = Add(v0, bv)
  a = Attention<q_num_heads = 4, kv_num_heads = 2>(q, k, v)
  y = MatMul(a, wo)
}}"""

SPELLED_OUT = f"""{HEAD}g (double[2, seq, 16] x) => (double[2, seq, 16] y)
<double[16, 24] packed, double[24] bias, double[16, 16] wo> {{
  all0 = MatMul(x, packed)
  all = Add(all0, bias)
  sizes = Constant<value_ints = [16, 4, 4]>()
  q, k, v = Split<axis = -1>(all, sizes)
  qs = Constant<value_ints = [0, 0, 4, 4]>()
  ks = Constant<value_ints = [0, 0, 1, 4]>()
  q4 = Reshape(q, qs)
  k4 = Reshape(k, ks)
  v4 = Reshape(v, ks)
  qt = Transpose<perm = [0, 2, 1, 3]>(q4)
  kt = Transpose<perm = [0, 2, 3, 1]>(k4)
  vt = Transpose<perm = [0, 2, 1, 3]>(v4)
  times = Constant<value_ints = [1, 4, 1, 1]>()
  kr = Tile(kt, times)
  vr = Tile(vt, times)
  scores = MatMul(qt, kr)
  p = Softmax(scores)
  o4 = MatMul(p, vr)
  ot = Transpose<perm = [0, 2, 1, 3]>(o4)
  os = Constant<value_ints = [0, 0, 16]>()
  o = Reshape(ot, os)
  y = MatMul(o, wo)
}}"""


def folds_of(model: ir.Model) -> dict[str, tuple[ReaderGroup, ChannelFold]]:
    found = ChannelFolds(model, infer(model))
    groups = [group for group in found.groups() if isinstance(group, ReaderGroup)]
    return {g.label: (g, fold) for g in groups if isinstance(fold := found.fold(g), ChannelFold)}


def reasons_of(model: ir.Model) -> dict[str, str]:
    found = ChannelFolds(model, infer(model))
    result = {}
    for group in found.groups():
        if not isinstance(group, ReaderGroup):
            result[group[0].role] = group[1]
        elif isinstance(fold := found.fold(group), str):
            result[group.label] = fold
    return result


def scaled(model: ir.Model, seed: int = 0) -> tuple[ir.Model, list[str]]:
    """A copy whose groups are scaled at random, and what was scaled."""
    copy = model.clone()
    facts, edit, rng, done = infer(copy), Editor(copy), np.random.default_rng(seed), []
    for label, (group, fold) in folds_of(copy).items():
        assert scale(group, fold, np.exp(rng.normal(size=fold.count)), facts, edit) is None
        done.append(label)
    return copy, done


def assert_same(before: ir.Model, after: ir.Model, rtol: float = 1e-12) -> None:
    for seed in range(2):
        inputs = random_feeds(before, seed)
        for a, b in zip(reference_outputs(before, inputs), reference_outputs(after, inputs), strict=True):
            assert np.abs(a - b).max() <= rtol * np.abs(a).max()
    assert op_types(before) == op_types(after)


# ---- folds


@pytest.mark.parametrize(
    ("text", "labels"),
    [(gated(), ["gate, up", "down"]), (ATTENTION, ["q, k, v", "o"]), (SPELLED_OUT, ["o"])],
    ids=["gated", "attention", "packed"],
)
def test_scaling_at_random_changes_nothing(text: str, labels: list[str]) -> None:
    before = parse_weighted(text)
    after, done = scaled(before)
    assert done == labels
    assert_same(before, after)
    changed = [
        k
        for k, v in before.graph.initializers.items()
        if not np.array_equal(_numbers(v), _numbers(after.graph.initializers[k]))
    ]
    assert len(changed) == len(before.graph.initializers) - (text is gated())


def _numbers(value: ir.Value) -> Any:
    assert value.const_value is not None
    return value.const_value.numpy()


def test_query_heads_share_the_factors_of_their_values() -> None:
    _, fold = folds_of(parse_weighted(ATTENTION))["o"]
    assert fold.count == 8
    assert fold.depth == 4
    heads = fold.numbers.reshape(4, 4)
    assert (heads[0] == heads[1]).all()
    assert (heads[2] == heads[3]).all()
    assert (np.sort(np.unique(fold.numbers)) == np.arange(8)).all()
    assert fold.linear


def test_of_packed_queries_keys_and_values_the_values_alone_are_scaled() -> None:
    before = parse_weighted(SPELLED_OUT)
    _, fold = folds_of(before)["o"]
    assert fold.count == 4
    (taker,) = fold.takers
    assert (taker.numbers[:20] == fold.count).all()
    after, _ = scaled(before)
    old, new = (_numbers(m.graph.initializers["packed"]) for m in (before, after))
    assert np.array_equal(old[:, :20], new[:, :20])
    assert not np.isclose(old[:, 20:], new[:, 20:]).any()


def test_a_relu_passes_factors_on_and_a_gelu_does_not() -> None:
    text = f"""{HEAD}g (double[batch, 8] x) => (double[batch, 8] y)
<double[8, 12] w1, double[12] b1, double[12, 8] w2> {{
  a = MatMul(x, w1)
  b = Add(a, b1)
  c = ACT(b)
  y = MatMul(c, w2)
}}"""
    before = parse_weighted(text.replace("ACT", "Relu"))
    after, done = scaled(before)
    assert done == ["fc2"]
    assert_same(before, after)
    assert "doesn't commute" in reasons_of(parse_weighted(text.replace("ACT", "Gelu")))["fc2"]


def test_the_gate_takes_factors_where_its_activation_lets_them_through() -> None:
    text = gated("act = Relu(a)").replace("b = MatMul(n, up)", "b0 = MatMul(n, up)\n  b = Tanh(b0)")
    before = parse_weighted(text)
    _, fold = folds_of(before)["down"]
    assert [taker.node.outputs[0].name for taker in fold.takers] == ["a"]
    assert_same(before, scaled(before)[0])


def test_two_terms_of_a_sum_take_the_same_factors() -> None:
    before = parse_weighted(
        f"""{HEAD}g (double[batch, 8] x) => (double[batch, 4] y)
<double[8, 6] w, double[8, 2] a, double[2, 6] b, double[6, 4] w2> {{
  first = MatMul(x, w)
  low = MatMul(x, a)
  second = MatMul(low, b)
  both = Add(first, second)
  act = Relu(both)
  y = MatMul(act, w2)
}}"""
    )
    _, fold = next(pair for label, pair in folds_of(before).items() if len(pair[1].takers) == 2)
    assert len(fold.takers) == 2
    assert_same(before, scaled(before)[0])


def test_what_else_reads_the_value_stands_in_the_way() -> None:
    post = f"""{HEAD}g (double[batch, seq, 8] x) => (double[batch, seq, 8] y)
<double[8] gain, double[8, 8] w> {{
  n = RMSNormalization<axis = -1>(x, gain)
  z = MatMul(n, w)
  y = Add(n, z)
}}"""
    assert "addition" in next(iter(reasons_of(parse_weighted(post)).values()))
    seen = gated().replace("(double[batch, seq, 16] y)", "(double[batch, seq, 16] y, double[batch, seq, 24] b)")
    assert "graph output" in reasons_of(parse_weighted(seen))["down"]


def test_shared_weights_and_inputs_are_left() -> None:
    shared = gated().replace("b = MatMul(n, up)", "b = MatMul(n, gate)")
    assert "shared" in reasons_of(parse_weighted(shared))["gate, up"]
    assert "input of the graph" in reasons_of(parse_weighted(SPELLED_OUT))["qkv"]


@pytest.mark.parametrize("kind", ["attention", "concat"])
def test_the_values_of_a_cache_are_scaled_with_the_new_ones(kind: Any) -> None:
    before = api.canonical(ir.from_proto(decoder(kind, layers=2)))
    after, done = scaled(before)
    assert done.count("o") == 1  # by label: both layers
    assert folds_of(before)["o"][1].cached
    # Two steps, each model on its own cache.
    logits = []
    for model in (before, after):
        session = make_session(model)
        names = [o.name for o in session.get_outputs()]
        state = {i.name: np.zeros((2, 2, 0, 16), np.float32) for i in session.get_inputs() if "past" in i.name}
        for total in (3, 5):
            ids = np.random.default_rng(total).integers(0, 41, (2, 3 if total == 3 else 2))
            given_ = {"input_ids": ids, "attention_mask": np.ones((2, total), np.int64), **state}
            found = dict(zip(names, session.run(None, given_), strict=True))
            state = {k: found[k.replace("past_key_values", "present")] for k in state}
        logits.append(found["logits"])
    np.testing.assert_allclose(logits[0], logits[1], rtol=0, atol=1e-4 * np.abs(logits[0]).max())


@given(
    sizes=st.lists(st.sampled_from([1, 2, 3, 4]), min_size=2, max_size=4),
    split=st.integers(0, 3),
    seed=st.integers(0, 9),
)
@settings(max_examples=50, deadline=None)
def test_numbers_follow_a_reshape_as_elements_do(sizes: list[int], split: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    varies = rng.integers(0, 2, len(sizes)).astype(bool)
    shape = [n if v else 1 for n, v in zip(sizes, varies, strict=True)]
    numbers = rng.permutation(int(np.prod(shape))).reshape(shape)
    at = min(split, len(sizes) - 1)
    target = [*sizes[:at], int(np.prod(sizes[at:]))]
    found = regrouped(numbers, [Dim.of(n) for n in sizes], [Dim.of(n) for n in target])
    assert found is not None
    expected = np.broadcast_to(numbers, sizes).reshape(target)
    assert np.array_equal(np.broadcast_to(found, target), expected)
    back = regrouped(found, [Dim.of(n) for n in target], [Dim.of(n) for n in sizes])
    assert back is not None
    assert np.array_equal(np.broadcast_to(back, sizes), np.broadcast_to(numbers, sizes))


# ---- real forms of exporters


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", {"q, k, v", "o", "gate, up", "down", "head"}),
        ("bert", {"o"}),
    ],
)
def test_exported_transformers(name: str, expected: set[str]) -> None:
    before = api.canonical(load(exported(name)))
    after, done = scaled(before)
    assert set(done) == expected
    first, second = (make_session(m).run(None, feeds(name))[0] for m in (before, after))
    np.testing.assert_allclose(first, second, rtol=0, atol=1e-5 * np.abs(first).max())


# ---- the passes


def with_outliers(text: str, seed: int = 0) -> tuple[ir.Model, Calibration]:
    """A model of float32 and data in which few channels are large."""
    model = parse_weighted(text.replace("double", "float"), seed)
    rng = np.random.default_rng(seed)
    gain = model.graph.initializers["gain"]
    size = np.exp(rng.normal(size=16) * 1.5).astype(np.float32)
    gain.const_value = ir.tensor(size, name="gain")
    data = [{"x": rng.normal(size=(2, 32, 16)).astype(np.float32)} for _ in range(3)]
    return model, Calibration(ArrayDataset(data))


def outputs(model: ir.Model, data: Calibration) -> Any:
    session = make_session(model)
    return np.concatenate([session.run(None, one)[0] for one in data.data.feeds(model)])


def rounded(model: ir.Model, names: tuple[str, ...], bits: int, group_size: int) -> ir.Model:
    copy = model.clone()
    for name in names:
        value = copy.graph.initializers[name]
        rows = np.ascontiguousarray(_numbers(value).T)
        grid = UniformGrid(bits, symmetric=False)
        value.const_value = ir.tensor(round_to_nearest(rows, grid, group_size).dequantized().T.copy(), name=name)
    return copy


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_awq_lowers_the_error_of_the_rounded_model(bits: int) -> None:
    before, data = with_outliers(gated())
    names = ("gate", "up", "down")
    expected = outputs(before, data)
    plain = outputs(rounded(before, names, bits, 8), data)
    after = before.clone()
    rule = AwqScales(bits, 8, symmetric=False, clip=False)
    rule.calibration = data
    assert rule(after).modified
    np.testing.assert_allclose(outputs(after, data), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    found = outputs(rounded(after, names, bits, 8), data)
    assert np.square(found - expected).mean() < np.square(plain - expected).mean()
    assert not rule(after).modified
    assert all(site.outcome == "left" for site in rule.sites)


def test_awq_never_chooses_more_error_than_no_scale() -> None:
    before, data = with_outliers(gated())
    rule = AwqScales(3, 8, symmetric=False, clip=False, rows=0)
    rule.calibration = data
    rule(before)
    shares = [float(site.detail.split(", ")[-1].split()[0]) for site in rule.sites if site.outcome == "applied"]
    assert len(shares) == 2
    assert all(share <= 1 for share in shares)


def test_clipping_lowers_the_error_further_and_leaves_queries_and_keys() -> None:
    before, data = with_outliers(ATTENTION)
    rule = AwqScales(2, 8, symmetric=False, clip=True)
    rule.calibration = data
    after, bare = before.clone(), before.clone()
    rule(after)
    without = AwqScales(2, 8, symmetric=False, clip=False)
    without.calibration = data
    without(bare)
    for name in ("wq", "wk"):
        assert np.array_equal(*(_numbers(m.graph.initializers[name]) for m in (after, bare)))
    expected = outputs(before, data)
    errors = []
    for model in (after, bare):
        errors.append(np.square(outputs(rounded(model, ("wv", "wo"), 2, 8), data) - expected).mean())
    assert errors[0] < errors[1]
    clipped, whole = (np.abs(_numbers(m.graph.initializers["wo"])) for m in (after, bare))
    assert (clipped <= whole).all()
    assert (clipped < whole).any()


def test_smooth_quant_moves_outliers_into_the_weights() -> None:
    before, data = with_outliers(gated())
    after = before.clone()
    rule = SmoothQuant()
    rule.calibration = data
    rule(after)
    expected = outputs(before, data)
    np.testing.assert_allclose(outputs(after, data), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    gains = [_numbers(m.graph.initializers["gain"]) for m in (before, after)]
    assert gains[1].max() / gains[1].min() < gains[0].max() / gains[0].min()


def test_activations_and_weights_share_the_difficulty() -> None:
    """With α = 0.5 what a channel holds at most and what it is multiplied by at most become the same."""
    text = f"""{HEAD}g (float[batch, seq, 16] x) => (float[batch, seq, 24] y)
<float[16] gain, float[16, 24] w> {{
  n = RMSNormalization<axis = -1>(x, gain)
  y = MatMul(n, w)
}}"""
    model, data = with_outliers(text)
    rule = SmoothQuant(head=True)
    rule.calibration = data
    rule(model)
    request = Request(next(iter(model.graph)).outputs[0], AbsMax(per_channel=True))
    weights = np.abs(_numbers(model.graph.initializers["w"])).max(axis=1)
    np.testing.assert_allclose(data.gather(model, [request])[request].array, weights, rtol=1e-4)


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="alpha"):
        SmoothQuant(alpha=2)
    with pytest.raises(ValueError, match="steps"):
        AwqScales(steps=0)


def test_output_error_is_the_mean_squared_error_of_outputs() -> None:
    rng = np.random.default_rng(0)
    x, e = rng.normal(size=(50, 6)).astype(np.float32), rng.normal(size=(4, 6)).astype(np.float32)
    assert output_error(e, (x.T @ x / 50).astype(np.float32)) == pytest.approx(np.square(x @ e.T).sum() / 50, rel=1e-5)


# ---- real weights


LINEAR = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


@pytest.mark.real
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_awq_on_real_weights(bits: int) -> None:
    before = first_layers(1)
    names = tuple(f"{name}0" for name in LINEAR)
    rule = AwqScales(bits, 64, symmetric=False, steps=10, rows=128)
    rule.calibration = calibration()
    after = before.clone()
    rule(after)
    labels = [site.detail.split(":")[0] for site in rule.sites if site.outcome == "applied"]
    assert labels == ["q, k, v", "o", "gate, up", "down"]
    expected, plain, found = (
        make_session(m).run(None, token_ids(0))[0]
        for m in (before, rounded(before, names, bits, 64), rounded(after, names, bits, 64))
    )
    assert np.square(found - expected).mean() < 0.9 * np.square(plain - expected).mean()


@pytest.mark.real
def test_smooth_quant_on_real_weights() -> None:
    before = first_layers(1)
    after = before.clone()
    rule = SmoothQuant()
    rule.calibration = calibration()
    rule(after)
    assert sum(site.outcome == "applied" for site in rule.sites) == 4
    first, second = (make_session(m).run(None, token_ids(0))[0] for m in (before, after))
    np.testing.assert_allclose(first, second, rtol=0, atol=1e-4 * np.abs(first).max())
