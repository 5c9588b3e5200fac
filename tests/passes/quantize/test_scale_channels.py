"""awq-scales and smooth-quant: the same function, and smaller errors of what is rounded."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from exactness import parse_weighted
from scaled_graphs import ATTENTION, HEAD, gated, numbers_of
from smollm2_layers import calibration, first_layers, token_ids

from graphopt.calibration.calibration import Calibration
from graphopt.calibration.data import ArrayDataset
from graphopt.calibration.request import Request
from graphopt.calibration.statistics import AbsMax
from graphopt.passes.quantize.awq_scales import AwqScales, output_error
from graphopt.passes.quantize.balance_columns import BalanceColumns
from graphopt.passes.quantize.grids import UniformGrid
from graphopt.passes.quantize.higgs import round_higgs
from graphopt.passes.quantize.roundings import round_to_nearest
from graphopt.passes.quantize.smooth_quant import SmoothQuant
from graphopt.runtime_ops.memory_session import make_session

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
        rows = np.ascontiguousarray(numbers_of(value).T)
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
        assert np.array_equal(*(numbers_of(m.graph.initializers[name]) for m in (after, bare)))
    expected = outputs(before, data)
    errors = []
    for model in (after, bare):
        errors.append(np.square(outputs(rounded(model, ("wv", "wo"), 2, 8), data) - expected).mean())
    assert errors[0] < errors[1]
    clipped, whole = (np.abs(numbers_of(m.graph.initializers["wo"])) for m in (after, bare))
    assert (clipped <= whole).all()
    assert (clipped < whole).any()


def test_balanced_columns_are_of_one_size_and_the_function_stays() -> None:
    before, data = with_outliers(gated())
    weights = ("gate", "up")
    size = np.exp(2 * np.random.default_rng(5).normal(size=(16, 1))).astype(np.float32)
    for name in weights:
        value = before.graph.initializers[name]
        value.const_value = ir.tensor(numbers_of(value) * size, name=name)
    after, half = before.clone(), before.clone()
    rule = BalanceColumns()
    assert rule(after).modified
    assert not rule(after).modified
    BalanceColumns(alpha=0.5)(half)
    expected = outputs(before, data)
    np.testing.assert_allclose(outputs(after, data), expected, rtol=0, atol=1e-5 * np.abs(expected).max())

    def spread(model: ir.Model) -> float:
        column = np.square(numbers_of(model.graph.initializers["up"])).sum(axis=1)
        return float(np.sqrt(column.max() / column.min()))

    assert spread(before) > 10
    assert spread(after) < 1.001
    assert spread(after) < spread(half) < spread(before)
    by_both = before.clone()
    BalanceColumns(deciding=["gate", "up"])(by_both)
    assert spread(after) < spread(by_both) < spread(before)
    with pytest.raises(ValueError, match="alpha"):
        BalanceColumns(alpha=2)


@pytest.mark.real
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_behind_balanced_columns_higgs_errs_in_each_by_its_own_size(bits: int) -> None:
    """On real layers, with the norm's gain in the weights, as folding leaves it."""
    before = first_layers(1)
    names = ("attn_q0", "attn_k0", "attn_v0")
    judged = names[2:]
    gain = numbers_of(before.graph.initializers["attn_norm0"])
    before.graph.initializers["attn_norm0"].const_value = ir.tensor(np.ones_like(gain), name="attn_norm0")
    for name in names:
        value = before.graph.initializers[name]
        value.const_value = ir.tensor(numbers_of(value) * gain[:, None], name=name)
    after = before.clone()
    assert BalanceColumns().call(after).modified
    first, second = (make_session(m).run(None, token_ids(0))[0] for m in (before, after))
    assert np.abs(second - first).max() <= 1e-4 * np.abs(first).max()
    worst = []
    for model in (before, after):
        weights = [np.ascontiguousarray(numbers_of(model.graph.initializers[name]).T) for name in judged]
        errors = [np.square(w - round_higgs(w, bits, 2).dequantized()).sum(axis=0) for w in weights]
        worst.append(max(float((e / np.square(w).sum(axis=0)).max()) for e, w in zip(errors, weights, strict=True)))
    assert worst[1] < 0.2 * worst[0]


def test_smooth_quant_moves_outliers_into_the_weights() -> None:
    before, data = with_outliers(gated())
    after = before.clone()
    rule = SmoothQuant()
    rule.calibration = data
    rule(after)
    expected = outputs(before, data)
    np.testing.assert_allclose(outputs(after, data), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    gains = [numbers_of(m.graph.initializers["gain"]) for m in (before, after)]
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
    weights = np.abs(numbers_of(model.graph.initializers["w"])).max(axis=1)
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
    assert np.square(found - expected).mean() < (0.9 if bits < 8 else 1) * np.square(plain - expected).mean()


@pytest.mark.real
def test_tokens_count_by_the_attention_that_they_receive() -> None:
    said = []
    for tokens in ("all", "received"):
        model = first_layers(1)
        rule = AwqScales(3, 64, steps=10, rows=128, clip=False, tokens=tokens)
        rule.calibration = calibration(1)
        rule(model)
        said.append([site.detail for site in rule.sites if site.outcome == "applied"])
    assert said[0][0] != said[1][0], "of k and v"
    assert said[0][1:] == said[1][1:], "of the others"


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
