"""Codebooks and the grids made of them: their numbers, what is nearest, and errors on real weights."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from smollm2_matrices import Floats, mean_error, some_rows

from graphopt.passes.quantize.codebook_grids import (
    EXPONENTS,
    CodebookGrid,
    bitmod_grid,
    gaussian_grid,
    minifloat_grid,
    normal_float_grid,
    power_grid,
)
from graphopt.passes.quantize.codebooks import bitmod, minifloat, normal_float, power
from graphopt.passes.quantize.grids import Fit, Grid, UniformGrid
from graphopt.passes.quantize.roundings import round_to_nearest

PUBLISHED_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class TestNumbers:
    def test_nf4_is_the_published_table(self) -> None:
        # The published ones come of a δ that was rounded to seven digits.
        np.testing.assert_allclose(normal_float(4), PUBLISHED_NF4, atol=3e-7)

    @pytest.mark.parametrize("bits", range(2, 9))
    def test_normal_floats(self, bits: int) -> None:
        numbers = normal_float(bits)
        assert len(numbers) == 1 << bits
        assert (numbers[0], numbers[(1 << (bits - 1)) - 1], numbers[-1]) == (-1, 0, 1)
        assert list(numbers) == sorted(set(numbers))

    @pytest.mark.parametrize(
        ("exponent", "fraction", "dtype"),
        [
            (2, 1, ml_dtypes.float4_e2m1fn), (2, 3, ml_dtypes.float6_e2m3fn), (3, 2, ml_dtypes.float6_e3m2fn),
            (4, 3, ml_dtypes.float8_e4m3fn), (5, 2, ml_dtypes.float8_e5m2),
        ],
    )  # fmt: skip
    def test_small_floats_are_those_of_the_formats(self, exponent: int, fraction: int, dtype: Any) -> None:
        bits = 1 + exponent + fraction
        stored = np.arange(1 << bits, dtype=np.uint8).view(dtype).astype(np.float64)
        np.testing.assert_array_equal(minifloat(exponent, fraction), np.unique(stored[np.isfinite(stored)]))

    def test_other_small_floats(self) -> None:
        assert minifloat(1, 2) == tuple(q / 2 for q in range(-7, 8))
        assert minifloat(3, 0)[8:] == (0.25, 0.5, 1, 2, 4, 8, 16)
        assert minifloat(1, 0) == (-2, 0, 2)
        with pytest.raises(ValueError, match="E0M3 isn't a type here"):
            minifloat(0, 3)
        with pytest.raises(ValueError, match="E5M3 isn't a type here"):
            minifloat(5, 3)

    def test_powers(self) -> None:
        assert power(4, 1) == tuple(range(-8, 8))
        assert power(3, 0.5) == (-16, -9, -4, -1, 0, 1, 4, 9)
        with pytest.raises(ValueError, match="above 0 and at most 1, not 0"):
            power(4, 0)

    def test_bitmod(self) -> None:
        assert [len(book) for book in bitmod(4)] == [16] * 3
        assert [sorted(set(book) - {-4, -2, -1, 0, 1, 2, 4}) for book in bitmod(3)] == [[3], [-3], [6]]
        with pytest.raises(ValueError, match="3 to 4 bits here, not 2"):
            bitmod(2)

    def test_bits_out_of_range(self) -> None:
        with pytest.raises(ValueError, match="NormalFloat has 2 to 8 bits here, not 9"):
            normal_float(9)
        with pytest.raises(ValueError, match="2 to 4 ascending numbers"):
            CodebookGrid(((0.0, 2.0, 1.0),), 2)
        with pytest.raises(ValueError, match="1 to 8 bits here, not 9"):
            CodebookGrid(((0.0, 1.0),), 9)
        with pytest.raises(ValueError, match="1 to 256 codebooks, not 0"):
            CodebookGrid((), 4)


GRIDS: dict[str, CodebookGrid] = {
    "nf4": normal_float_grid(4),
    "nf3": normal_float_grid(3),
    "nf2": normal_float_grid(2),
    "nf8": normal_float_grid(8),
    "e2m1": minifloat_grid(2, 1),
    "e3m0": minifloat_grid(3, 0),
    "e4m3": minifloat_grid(4, 3),
    "a power": power_grid(4, 0.6),
    "powers": power_grid(4),
    "powers of 8 bits": dataclasses.replace(power_grid(8), books=power_grid(8).books[:3]),
    "bitmod 3": bitmod_grid(3),
    "bitmod 4": bitmod_grid(4),
    "gaussian": gaussian_grid(3),
}


def fits(grid: CodebookGrid, rows: int, rng: np.random.Generator) -> Fit:
    scale = (rng.random(rows) + 0.1) * rng.choice([-1, 1], rows)
    several = len(grid.books) > 1
    return Fit(
        scale.astype(np.float32),
        selector=rng.integers(0, len(grid.books), rows).astype(np.uint8) if several else None,
    )


@pytest.mark.parametrize("name", GRIDS)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 5), columns=st.integers(1, 9))
def test_what_is_nearest(name: str, seed: int, rows: int, columns: int) -> None:
    rng = np.random.default_rng(seed)
    grid = GRIDS[name]
    fit = fits(grid, rows, rng)
    reach = np.abs(grid.levels()).max()
    numbers = (rng.standard_normal((rows, columns)) * rng.choice([0.1, 1, 2]) * reach / 2).astype(np.float32)
    codes = grid.nearest(numbers, fit)
    found = grid.values(codes, fit)
    for row in range(rows):
        book = np.array(grid.books[0 if fit.selector is None else fit.selector[row]])
        assert codes[row].max() < len(book)
        distances = np.abs(numbers[row][:, None] - book * fit.scale[row])
        np.testing.assert_allclose(np.abs(numbers[row] - found[row]), distances.min(axis=1), atol=1e-6 * reach)
    np.testing.assert_array_equal(grid.values(grid.nearest(found, fit), fit), found)


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("name", GRIDS)
def test_groups(name: str, search: bool) -> None:
    grid = dataclasses.replace(GRIDS[name], search=search)
    weight = np.random.default_rng(0).standard_normal((6, 50)).astype(np.float32)
    weight[2] = 0
    weight[3, :16] *= 1000
    rounded = round_to_nearest(weight, grid, 16)
    assert rounded.scales.shape == (6, 4)
    np.testing.assert_array_equal(rounded.scales, rounded.scales.astype(np.float16))
    assert rounded.levels is not None
    assert rounded.levels.shape == (len(grid.books), 1 << grid.bits, 1)
    assert (rounded.selectors is None) == (len(grid.books) == 1)
    found = rounded.dequantized()
    if name != "gaussian":  # an even number of levels has none at 0
        np.testing.assert_array_equal(found[2], 0)
    # Twice the weight has the same codes and twice the scales.
    twice = round_to_nearest(2 * weight, grid, 16)
    np.testing.assert_array_equal(twice.dequantized()[[0, 1, 3, 4, 5]], 2 * found[[0, 1, 3, 4, 5]])


def test_the_largest_number_is_met() -> None:
    weight = np.random.default_rng(0).standard_normal((40, 32)).astype(np.float32)
    at = np.abs(weight).argmax(axis=1)[:, None]
    for name in ("nf4", "e2m1", "a power", "bitmod 4"):
        grid = dataclasses.replace(GRIDS[name], half=False)
        found = grid.values(grid.nearest(weight, fit := grid.fit(weight)), fit)
        far = np.take_along_axis(weight, at, axis=1)
        np.testing.assert_allclose(np.take_along_axis(found, at, axis=1), far, rtol=1e-6)


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("name", [name for name in GRIDS if name != "gaussian"])
def test_a_search_loses_nothing(name: str, weighed: bool) -> None:
    rng = np.random.default_rng(1)
    block = rng.standard_t(4, (30, 64)).astype(np.float32)
    importance = rng.random(64).astype(np.float32) ** 4 if weighed else None

    def error(grid: CodebookGrid) -> Any:
        fit = grid.fit(block, importance)
        square = (grid.values(grid.nearest(block, fit), fit) - block) ** 2
        return square.sum(axis=1) if importance is None else square @ importance

    assert (error(dataclasses.replace(GRIDS[name], search=True)) <= error(GRIDS[name]) * (1 + 1e-5)).all()


def test_a_matrix_has_one_exponent() -> None:
    rng = np.random.default_rng(2)
    even = rng.uniform(-1, 1, (50, 96)).astype(np.float32)
    grid = power_grid(4).for_weight(even, 32)
    assert isinstance(grid, CodebookGrid)
    assert grid.books == (power(4, 1.0),)
    peaked = rng.laplace(size=(600, 100)).astype(np.float32)
    chosen = power_grid(4).for_weight(peaked, 32, np.ones(100, np.float32))
    assert chosen == power_grid(4).for_weight(peaked, 32)
    assert isinstance(chosen, CodebookGrid)
    (book,) = chosen.books
    assert book in [power(4, a) for a in EXPONENTS[4:]]
    assert bitmod_grid(4).for_weight(peaked, 32) == bitmod_grid(4)


def test_importance_moves_the_choice() -> None:
    """The codebook with 3 for columns that need it, the one with -3 where these hardly count."""
    block = np.array([[4.0, 3.0, 3.0, -3.0, -4.0]], np.float32)
    grid = CodebookGrid(bitmod(3)[:2], 3)
    assert grid.fit(block, np.array([1, 1, 1, 1, 1], np.float32)).selector == [0]
    assert grid.fit(block, np.array([1, 0.1, 0.1, 1, 1], np.float32)).selector == [1]


def rounded_error(weights: dict[str, Floats], grid: Grid, group_size: int) -> float:
    return mean_error(
        weights,
        {
            name: round_to_nearest(weight, grid.for_weight(weight, group_size), group_size).dequantized()
            for name, weight in weights.items()
        },
    )


@pytest.mark.real
class TestOnRealWeights:
    @pytest.mark.parametrize("group_size", [32, 128])
    @pytest.mark.parametrize("search", [False, True])
    def test_nf4_is_better_than_integers(self, group_size: int, search: bool) -> None:
        weights = some_rows()
        integers = rounded_error(weights, UniformGrid(4, search=search), group_size)
        assert rounded_error(weights, normal_float_grid(4, search=search), group_size) < 0.9 * integers

    @pytest.mark.parametrize("bits", [2, 3])
    def test_narrow_normal_floats_with_a_search(self, bits: int) -> None:
        weights = some_rows()
        searched = rounded_error(weights, normal_float_grid(bits, search=True), 128)
        assert searched < 0.8 * rounded_error(weights, normal_float_grid(bits), 128)
        assert searched < {3: 0.9, 2: 1.1}[bits] * rounded_error(weights, UniformGrid(bits, search=True), 128)

    def test_fp4_is_better_than_integers_in_large_groups_and_than_other_floats(self) -> None:
        weights = some_rows()
        fp4 = rounded_error(weights, minifloat_grid(2, 1), 128)
        assert fp4 < rounded_error(weights, UniformGrid(4), 128)
        assert fp4 < rounded_error(weights, minifloat_grid(3, 0), 128)
        assert fp4 < rounded_error(weights, minifloat_grid(1, 2), 128)

    def test_fp8(self) -> None:
        """Half a unit in the last place, evenly spread: 2^-(2y + 2) / 12 of the square, less for what lies in between."""
        weights = some_rows()
        for exponent, fraction in ((4, 3), (5, 2)):
            error = rounded_error(weights, minifloat_grid(exponent, fraction), 128)
            assert 0.3 * 4.0**-fraction / 12 / 2 < error < 4.0**-fraction / 12

    @pytest.mark.parametrize("bits", [3, 4])
    @pytest.mark.parametrize("group_size", [32, 128])
    def test_bitmod_is_no_worse_than_any_of_its_types(self, bits: int, group_size: int) -> None:
        weights = some_rows()
        mixed = rounded_error(weights, bitmod_grid(bits), group_size)
        assert mixed < min(rounded_error(weights, CodebookGrid((book,), bits), group_size) for book in bitmod(bits))
        assert mixed < 0.85 * rounded_error(weights, UniformGrid(bits), group_size)

    @pytest.mark.parametrize(("bits", "group_size"), itertools.product([2, 3, 4, 8], [128]))
    def test_nupes_is_no_worse_than_an_exponent_of_1(self, bits: int, group_size: int) -> None:
        weights = some_rows()
        searched = rounded_error(weights, power_grid(bits), group_size)
        assert searched <= rounded_error(weights, power_grid(bits, 1.0), group_size)
        if bits in (3, 4):
            assert searched < 0.8 * rounded_error(weights, UniformGrid(bits), group_size)
        assert rounded_error(weights, power_grid(bits, 1.0), group_size) == pytest.approx(
            rounded_error(weights, UniformGrid(bits), group_size), rel=0.02
        )
