"""FineQuant: the size of groups, told from the weights."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from smollm2_matrices import Floats, some_rows

from graphopt.passes.quantize.finequant import GROUP_SIZES, group_size_by_range
from graphopt.passes.quantize.grids import UniformGrid
from graphopt.passes.quantize.roundings import round_to_nearest


def normal(rows: int = 64, columns: int = 1024) -> Floats:
    return np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)


def test_normal_weights_have_groups_of_64() -> None:
    assert group_size_by_range(normal()) == 64


def test_outliers_make_groups_finer() -> None:
    weight = normal()
    weight[:, ::300] *= 30
    assert group_size_by_range(weight) == 32
    assert group_size_by_range(weight, sizes=(8, 16, *GROUP_SIZES), scale_bits=8) < 32


def test_even_weights_have_whole_rows() -> None:
    signs = np.sign(normal()).astype(np.float32)
    assert group_size_by_range(signs) == 1024
    assert group_size_by_range(np.zeros((4, 100), np.float32)) == 100


def test_dearer_scales_make_groups_larger() -> None:
    sizes = [group_size_by_range(normal(), scale_bits=bits) for bits in (4, 16, 24, 64, 1000)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1] == 1024


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 300), st.floats(1e-3, 1e3), st.integers(0, 2**32 - 1))
def test_what_is_chosen_does_not_depend_on_scale(rows: int, columns: int, factor: float, seed: int) -> None:
    weight = np.random.default_rng(seed).integers(-50, 51, (rows, columns)).astype(np.float32)
    size = group_size_by_range(weight)
    assert size in {*GROUP_SIZES, columns}
    assert size <= columns
    assert group_size_by_range(np.float32(2.0) ** round(np.log2(factor)) * weight) == size


@pytest.mark.real
def test_real_weights_gain_by_the_choice() -> None:
    """In bits: what finer groups take off the error of integers, less what their scales take of memory."""
    for weight in some_rows().values():

        def cost(size: int, weight: Floats = weight) -> float:
            error = np.mean((round_to_nearest(weight, UniformGrid(4), size).dequantized() - weight) ** 2)
            return float(0.5 * np.log2(error) + 16 * -(-weight.shape[1] // size) / weight.shape[1])

        chosen = cost(group_size_by_range(weight))
        assert chosen <= min(cost(size) for size in (*GROUP_SIZES, weight.shape[1])) + 0.06
        assert chosen < cost(weight.shape[1]) - 0.1
