"""HIGGS: its grids, its rotation, and errors on real weights."""

from __future__ import annotations

import functools
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from smollm2_matrices import Floats, mean_error, some_rows

from graphopt.passes.quantize.codebook_grids import gaussian_grid, normal_float_grid
from graphopt.passes.quantize.codebook_packing import codebook_inputs
from graphopt.passes.quantize.gaussian_grids import (
    STORED,
    gaussian_vectors,
    lloyd_max,
    nearest_vectors,
    optimal_vectors,
)
from graphopt.passes.quantize.gptq import gptq
from graphopt.passes.quantize.grids import UniformGrid
from graphopt.passes.quantize.higgs import GaussianVectorGrid, rotated, rotation_size, round_higgs
from graphopt.passes.quantize.quantized_weight import QuantizedWeight
from graphopt.passes.quantize.rotations import hadamard
from graphopt.passes.quantize.roundings import round_to_nearest

# Of a number, as the best quantizers of normal ones have it: of 2, 4, 8 and 16 numbers from "Quantizing for Minimum
# Distortion".
KNOWN = {2: 0.3634, 4: 0.1175, 8: 0.03454, 16: 0.009497}


def gaussian_error(width: int, bits: int) -> float:
    grid = gaussian_vectors(width, 1 << bits * width)
    sample = np.random.default_rng(7).standard_normal((200_000, width)).astype(np.float32)
    return float(np.mean((sample - grid[nearest_vectors(sample, grid)]) ** 2))


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8, 16, 100, 256])
def test_single_numbers(count: int) -> None:
    numbers = np.array(lloyd_max(count))
    assert (np.diff(numbers) > 0).all()
    np.testing.assert_allclose(numbers, -numbers[::-1])
    ends = (numbers[1:] + numbers[:-1]) / 2
    normal = statistics.NormalDist()
    mass = np.diff([0, *map(normal.cdf, ends), 1])
    # Each is the mean of what is nearest to it.
    np.testing.assert_allclose(numbers * mass, -np.diff([0, *map(normal.pdf, ends), 0]), atol=1e-11)
    if count in KNOWN:
        assert 1 - np.sum(mass * numbers**2) == pytest.approx(KNOWN[count], rel=1e-3)


@pytest.mark.parametrize(("width", "count"), STORED)
def test_vectors(width: int, count: int) -> None:
    """As good as they are said to be, better than single numbers, and hardly moved by another step of Lloyd's."""
    grid, bits = gaussian_vectors(width, count), STORED[width, count]
    assert grid.shape == (count, width)
    assert 1 << bits * width == count
    error = gaussian_error(width, bits)
    assert 0.7 < error / KNOWN[1 << bits] < {2: 0.93, 4: 0.88}[width]
    each = min(400, 400_000 // count)
    sample = np.random.default_rng(8).standard_normal((each * count, width)).astype(np.float32)
    nearest = nearest_vectors(sample, grid)
    sums = np.stack([np.bincount(nearest, sample[:, i], count) for i in range(width)], 1)
    held = np.bincount(nearest, minlength=count)
    means = sums / np.maximum(held, 1)[:, None]
    moved = np.average(np.mean((means - grid) ** 2, axis=1), weights=held)
    # The mean of so many vectors is off by a part of that by itself, more in the large cells far out.
    assert moved < 4 * error / each


def test_vectors_are_made_anew() -> None:
    grid, error = optimal_vectors(2, 8)
    assert error == pytest.approx(0.2, abs=0.02)
    assert np.abs(grid.mean(axis=0)).max() < 0.02
    np.testing.assert_array_equal(grid, optimal_vectors(2, 8)[0])


def test_no_such_grid() -> None:
    with pytest.raises(ValueError, match="no grid of 32 vectors of 2 normal numbers; there are 16 of 2, 64 of 2"):
        gaussian_vectors(2, 32)
    with pytest.raises(
        ValueError, match=r"HIGGS of 4 bits with 4 weights to a code has no grid; there are 2 bits with"
    ):
        round_higgs(np.ones((2, 64), np.float32), 4, 4)
    with pytest.raises(ValueError, match="96 columns can't be rotated 64 at a time"):
        round_higgs(np.ones((2, 96), np.float32), rotation=64)
    with pytest.raises(ValueError, match="a group of 33 columns isn't a multiple of 2"):
        round_higgs(np.ones((2, 96), np.float32), group_size=33)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3000))
def test_rotation_sizes(columns: int) -> None:
    size = rotation_size(columns)
    if size == 0:
        # Nothing but large primes, or 1.
        assert all(columns % divisor for divisor in range(2, 257))
    else:
        assert columns % size == 0
        assert 2 <= size <= 1024
    for power in (256, 512, 1024):
        if columns % power == 0:
            assert size >= power


def test_sizes_of_rotations_of_models() -> None:
    of = {576: 576, 768: 256, 1024: 1024, 1536: 512, 2048: 1024, 4096: 1024, 11008: 256, 384: 384, 100: 100}
    assert {columns: rotation_size(columns) for columns in of} == of


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([4, 12, 64, 96, 100]), st.integers(0, 2**32 - 1))
def test_a_rotation_keeps_the_product(columns: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight, x = (rng.standard_normal((5, columns)).astype(np.float32) for _ in range(2))
    turned = hadamard(columns) @ x.T
    np.testing.assert_allclose(rotated(weight, columns) @ turned, weight @ x.T, atol=1e-4)
    np.testing.assert_allclose(
        np.linalg.norm(rotated(weight, columns), axis=1), np.linalg.norm(weight, axis=1), rtol=1e-5
    )


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 21),
    st.sampled_from([(2, 4), (2, 6), (2, 8), (4, 8), (4, 12)]),
    st.integers(0, 2**32 - 1),
)
def test_nearest_vectors(rows: int, columns: int, kind: tuple[int, int], seed: int) -> None:
    width, bits = kind
    grid = GaussianVectorGrid(bits, width)
    block = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    fit = grid.fit(block)
    codes = grid.nearest(block, fit)
    assert codes.shape == (rows, -(-columns // width))
    found = grid.values(codes, fit)
    vectors = gaussian_vectors(width, 1 << bits)
    padded = np.pad(block, ((0, 0), (0, -columns % width))).reshape(rows, -1, 1, width)
    least = ((padded - vectors * fit.scale[:, None, None, None]) ** 2).sum(-1).min(-1)
    reached = ((padded[:, :, 0] - found.reshape(rows, -1, width)) ** 2).sum(-1)
    np.testing.assert_allclose(reached, least, rtol=1e-4, atol=1e-6)


def test_groups_of_zeros() -> None:
    weight = np.zeros((3, 128), np.float32)
    weight[1] = 1e-3
    assert np.isfinite(round_higgs(weight).dequantized()).all()


def all_rounded(weights: dict[str, Floats], **options: int) -> dict[str, QuantizedWeight]:
    return {name: round_higgs(weight, **options) for name, weight in weights.items()}


def error_and_bits(weights: dict[str, Floats], rounded: dict[str, QuantizedWeight]) -> tuple[float, float]:
    """The mean relative squared error, and bits of a weight, with scales and without the codebook."""
    packed = [codebook_inputs(one) for one in rounded.values()]
    size = sum(one.nbytes - one.codebooks.nbytes for one in packed)
    error = mean_error(weights, {name: one.dequantized() for name, one in rounded.items()})
    return error, 8 * size / sum(weight.size for weight in weights.values())


@pytest.mark.real
class TestOnRealWeights:
    @pytest.mark.parametrize("bits", [2, 3, 4])
    def test_pairs_are_better_than_single_numbers_and_these_than_nf(self, bits: int) -> None:
        weights = some_rows()
        normal, searched = (
            {n: round_to_nearest(w, normal_float_grid(bits, search=search), 128) for n, w in weights.items()}
            for search in (False, True)
        )
        nf, nf_bits = error_and_bits(weights, normal)
        single, single_bits = error_and_bits(weights, all_rounded(weights, bits=bits, width=1))
        pairs, pair_bits = error_and_bits(weights, all_rounded(weights, bits=bits))
        assert pair_bits == single_bits < nf_bits
        assert pairs < 0.95 * single
        assert single < nf
        assert pairs < error_and_bits(weights, searched)[0]
        integers = {n: round_to_nearest(w, UniformGrid(bits, search=True), 128) for n, w in weights.items()}
        assert pairs < 0.75 * error_and_bits(weights, integers)[0]

    @pytest.mark.parametrize("bits", [2, 3])
    def test_fours_are_better_than_pairs(self, bits: int) -> None:
        weights = some_rows()
        fours, four_bits = error_and_bits(weights, all_rounded(weights, bits=bits, width=4))
        pairs, pair_bits = error_and_bits(weights, all_rounded(weights, bits=bits))
        assert fours < 0.93 * pairs
        assert four_bits == pair_bits

    @pytest.mark.parametrize(("width", "bits"), [(1, 2), (1, 3), (1, 4), (2, 2), (2, 3), (2, 4), (4, 2), (4, 3)])
    def test_the_error_is_that_of_normal_numbers(self, width: int, bits: int) -> None:
        """What the linearity theorem stands on: after the rotation every matrix has the grid's own error."""
        weights = some_rows()
        expected = gaussian_error(width, bits)
        for name, weight in weights.items():
            found = round_higgs(weight, bits=bits, width=width).dequantized()
            assert mean_error({name: weight}, {name: found}) == pytest.approx(expected, rel=0.06)

    def test_without_the_rotation_it_is_not(self) -> None:
        weights = some_rows()
        expected = gaussian_error(1, 4)
        plain = {name: round_higgs(w, width=1, rotation=0).dequantized() for name, w in weights.items()}
        assert mean_error(weights, plain) > 1.5 * expected

    @pytest.mark.parametrize("width", [1, 2])
    def test_a_search_takes_more_off_the_error(self, width: int) -> None:
        weights = some_rows()
        plain = {name: round_higgs(w, width=width, group_size=64).dequantized() for name, w in weights.items()}
        found = {
            name: round_higgs(w, width=width, group_size=64, search=True).dequantized() for name, w in weights.items()
        }
        assert mean_error(weights, found) < mean_error(weights, plain)


@functools.cache
def spread_inputs(columns: int, seed: int = 0) -> Floats:
    """Second moments of inputs of which few directions have most."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2 * columns, columns)) * np.exp(rng.standard_normal(columns))
    x = x @ (np.eye(columns) + 0.1 * rng.standard_normal((columns, columns)))
    return np.asarray(x.T @ x / columns, np.float32)


@pytest.mark.real
@pytest.mark.parametrize(("bits", "width"), [(2, 1), (3, 1), (4, 1), (2, 2), (3, 2), (4, 2), (2, 4)])
def test_gptq_of_vectors_has_the_smaller_error_of_outputs(bits: int, width: int) -> None:
    for name in ("q", "down"):
        weight = some_rows(16)[name]
        moments = spread_inputs(weight.shape[1])
        errors = []
        for hessian in (None, moments):
            error = weight - round_higgs(weight, bits, width, hessian=hessian).dequantized()
            errors.append(float(np.sum((error @ moments) * error)))
        assert errors[1] < 0.7 * errors[0]


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(0, 99))
def test_nearest_under_a_metric(rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((4, 4))
    metric = np.asarray(root @ root.T + np.eye(4), np.float32)
    grid, x = gaussian_vectors(4, 256), rng.standard_normal((rows, 4)).astype(np.float32)
    away = x[:, None] - grid
    distance = np.einsum("mnp,pq,mnq->mn", away, metric, away)
    found = distance[np.arange(rows), nearest_vectors(x, grid, metric)]
    np.testing.assert_allclose(found, distance.min(axis=1), rtol=1e-4, atol=1e-5)


def test_vectors_that_gptq_refuses() -> None:
    weight = np.ones((4, 64), np.float32)
    with pytest.raises(ValueError, match="vectors of 2"):
        gptq(weight, GaussianVectorGrid(8, 2), 64, np.eye(64, dtype=np.float32), order="activation")


def test_the_scalar_grid_has_the_mean_square_as_scale() -> None:
    block = np.random.default_rng(0).standard_normal((4, 256)).astype(np.float32)
    fit = gaussian_grid(4, half=False).fit(block)
    np.testing.assert_allclose(fit.scale, np.sqrt(np.mean(block**2, axis=1)), rtol=1e-6)
