"""Compensation: branches, biases and scales that bring a rounded layer nearer to the original."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from exactness import parse_weighted, reference_outputs
from hypothesis import given, settings
from hypothesis import strategies as st
from smollm2_layers import calibration, first_layers

from graphopt.calibration.request import Request
from graphopt.calibration.statistics import MeanVariance, SecondMoment
from graphopt.graph.edits import Editor
from graphopt.passes.quantize.compensation import (
    LowRank,
    Moments,
    bias_correction,
    low_rank,
    output_moments,
    rescaled,
    restoring,
    with_branch,
)
from graphopt.passes.quantize.grids import UniformGrid
from graphopt.passes.quantize.quantized_weight import Outliers
from graphopt.passes.quantize.roundings import round_to_nearest


def weighed(error: Any, hessian: Any) -> float:
    """tr(E H Eᵀ)."""
    return float(np.einsum("nk,nk->", error @ hessian, error))


def problem(rows: int, columns: int, seed: int, samples: int = 100) -> tuple[Any, Any]:
    """An error, and second moments of unequal channels (of a lower rank where there are few samples)."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(samples, columns)) * np.exp(rng.normal(size=columns))
    return rng.normal(size=(rows, columns)), x.T @ x / samples


@given(
    rows=st.integers(2, 20), columns=st.integers(2, 20), rank=st.integers(1, 6), seed=st.integers(0, 99),
    samples=st.sampled_from([3, 100]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_each_branch_is_the_best_by_its_own_measure(
    rows: int, columns: int, rank: int, seed: int, samples: int
) -> None:
    error, hessian = problem(rows, columns, seed, samples)
    plain, eigenspace = low_rank(error, rank), low_rank(error, rank, hessian)
    slack = 1e-5 * weighed(error, hessian) + 1e-12
    assert weighed(error - eigenspace.matrix, hessian) <= weighed(error - plain.matrix, hessian) + slack
    assert weighed(error - eigenspace.matrix, hessian) <= weighed(error, hessian) + slack
    length = np.square(error).sum()
    assert np.square(error - plain.matrix).sum() <= np.square(error - eigenspace.matrix).sum() + 1e-5 * length
    # Eckart and Young: what is left are the other singular values.
    root = np.linalg.cholesky(hessian + 1e-12 * np.trace(hessian) * np.eye(columns))
    left = np.linalg.svd(error @ root, compute_uv=False)[rank:]
    assert weighed(error - eigenspace.matrix, hessian) == pytest.approx(np.square(left).sum(), rel=1e-3, abs=10 * slack)


def test_errors_fall_with_the_rank_to_nothing() -> None:
    for rows, columns in ((12, 20), (20, 12)):
        error, hessian = problem(rows, columns, 0)
        for given_ in (None, hessian):
            measure = np.eye(columns) if given_ is None else hessian
            errors = [weighed(error - low_rank(error, rank, given_).matrix, measure) for rank in (1, 2, 4, 8, 12)]
            assert all(a > b for a, b in itertools.pairwise(errors))
            assert errors[-1] < 1e-9 * weighed(error, measure)


def test_both_factors_of_a_branch_have_rows_of_one_length() -> None:
    branch = low_rank(*[problem(12, 20, 0)[0]], rank=4)
    np.testing.assert_allclose(np.linalg.norm(branch.b, axis=0), np.linalg.norm(branch.a, axis=1), rtol=1e-5)


def test_a_branch_has_no_more_columns_than_the_error_has_rank() -> None:
    rng = np.random.default_rng(0)
    error = rng.normal(size=(9, 2)) @ rng.normal(size=(2, 7))
    assert low_rank(error, 5).b.shape == (9, 2)
    assert low_rank(np.zeros((4, 3)), 2).matrix.shape == (4, 3)
    with pytest.raises(ValueError, match="rank"):
        low_rank(error, 0)


def test_a_bias_takes_the_mean_of_the_error() -> None:
    rng = np.random.default_rng(0)
    x, w, rounded = rng.normal(size=(50, 6)) + 1, rng.normal(size=(4, 6)), rng.normal(size=(4, 6))
    bias = bias_correction(w - rounded, x.mean(axis=0))
    np.testing.assert_allclose((x @ rounded.T + bias).mean(axis=0), (x @ w.T).mean(axis=0), rtol=1e-5)


def test_moments_of_outputs_follow_from_those_of_inputs() -> None:
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(50, 6)) + 1, rng.normal(size=(4, 6))
    moments = output_moments(w, x.mean(axis=0), x.T @ x / len(x))
    np.testing.assert_allclose(moments.mean, (x @ w.T).mean(axis=0))
    np.testing.assert_allclose(moments.variance, (x @ w.T).var(axis=0))


def test_restored_channels_have_the_moments_that_they_had() -> None:
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(200, 32)).astype(np.float32), rng.normal(size=(8, 32)).astype(np.float32)
    weight = round_to_nearest(w, UniformGrid(3, symmetric=False), 16)
    y, now = x @ w.T, x @ weight.dequantized().T
    affine = restoring(Moments(y.mean(axis=0), y.var(axis=0)), Moments(now.mean(axis=0), now.var(axis=0)))
    found = x @ rescaled(weight, affine.scale).dequantized().T + affine.shift
    np.testing.assert_allclose(found.mean(axis=0), y.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(found.std(axis=0), y.std(axis=0), rtol=1e-4)


def test_channels_that_are_always_the_same_keep_their_scale() -> None:
    zeros, ones = np.zeros(3), np.ones(3)
    affine = restoring(Moments(ones, zeros), Moments(zeros, zeros))
    assert (affine.scale == 1).all()
    assert (affine.shift == 1).all()
    assert restoring(Moments(zeros, ones * 100), Moments(zeros, ones)).scale.max() == 2


@pytest.mark.parametrize("grid", [UniformGrid(4), UniformGrid(4, symmetric=False), UniformGrid(4, False, floats=True)])
def test_rescaling_multiplies_rows_and_keeps_codes(grid: UniformGrid) -> None:
    rng = np.random.default_rng(0)
    weight = round_to_nearest(rng.normal(size=(6, 40)).astype(np.float32), grid, 16)
    places = np.array([0, 3], np.int32), np.array([5, 7], np.int32)
    weight = type(weight)(**{**vars(weight), "outliers": Outliers(*places, np.array([3, 4], np.float32))})
    scale = rng.uniform(0.5, 2, 6)
    found = rescaled(weight, scale)
    assert found.codes is weight.codes
    np.testing.assert_allclose(
        found.dequantized(), weight.dequantized() * scale[:, None].astype(np.float32), rtol=1e-5, atol=1e-6
    )


def test_a_branch_is_written_behind_a_layer() -> None:
    model = parse_weighted(
        """<ir_version: 10, opset_import: ["": 21]>
g (float[batch, 6] x) => (float[batch, 4] z) <float[6, 4] w> {
  y = MatMul(x, w)
  z = Relu(y)
}"""
    )
    rng = np.random.default_rng(0)
    branch = LowRank(rng.normal(size=(4, 2)).astype(np.float32), rng.normal(size=(2, 6)).astype(np.float32))
    x = rng.normal(size=(3, 6)).astype(np.float32)
    w = model.graph.initializers["w"].const_value
    assert w is not None
    edit, relu = Editor(model), next(n for n in model.graph if n.op_type == "Relu")
    edit.at(relu)
    read, made = relu.inputs[0], model.graph.inputs[0]
    assert isinstance(read, ir.Value)
    edit.set_input(relu, 0, with_branch(made, read, branch, edit))
    expected = np.maximum(x @ w.numpy() + x @ branch.matrix.T, 0)
    np.testing.assert_allclose(reference_outputs(model, {"x": x})[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.real
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_on_real_weights(bits: int) -> None:
    """Each part against its own objective, on what a layer of SmolLM2 reads."""
    model = first_layers(1)
    x = next(n for n in model.graph if n.outputs[0].name == "h0").outputs[0]
    moment, spread = Request(x, SecondMoment()), Request(x, MeanVariance())
    gathered = calibration().gather(model, [moment, spread])
    hessian, mean = gathered[moment].array.astype(np.float64), gathered[spread]["mean"]
    tensor = model.graph.initializers["ffn_down0"].const_value
    assert tensor is not None
    w = np.ascontiguousarray(tensor.numpy().T[:256])
    weight = round_to_nearest(w, UniformGrid(bits, symmetric=False), 64)
    error = w - weight.dequantized()
    before = weighed(error, hessian)
    plain, eigenspace = (weighed(error - low_rank(error, 16, h).matrix, hessian) for h in (None, hessian))
    assert eigenspace < plain < before
    assert weighed(error - low_rank(error, 32, hessian).matrix, hessian) < eigenspace
    # tr(E H Eᵀ) splits into the variance and the squared mean, which a bias takes away.
    bias = bias_correction(error, mean)
    assert before - np.square(bias).sum() == pytest.approx(weighed(error, hessian - np.outer(mean, mean)), rel=1e-3)
    original, now = (output_moments(rows, mean, hessian) for rows in (w, weight.dequantized()))
    affine = restoring(original, now, limit=10)
    again = output_moments(rescaled(weight, affine.scale).dequantized(), mean, hessian)
    np.testing.assert_allclose(again.variance, original.variance, rtol=1e-3)
