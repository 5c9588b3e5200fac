"""AdaDim: groups along inputs or outputs."""

from __future__ import annotations

import numpy as np
import pytest
from smollm2_matrices import some_rows

from graphopt.passes.quantize.adadim import round_along_better_axis
from graphopt.passes.quantize.grid_names import make_grid
from graphopt.passes.quantize.grids import UniformGrid
from graphopt.passes.quantize.roundings import round_to_nearest


def random_weight(rows: int = 64, columns: int = 96) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)


def uneven(axis: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Each output's weights, or each input's, of a size of its own."""
    sizes = np.exp(np.random.default_rng(1).standard_normal(96 if axis else 64)).astype(np.float32)
    return random_weight() * (sizes if axis else sizes[:, None])


def test_inputs_of_different_sizes_have_groups_of_their_own() -> None:
    weight = uneven(1)
    rounded = round_along_better_axis(weight, UniformGrid(4), 32)
    assert rounded.transposed
    assert rounded.scales.shape == (96, 2)
    found = rounded.dequantized()
    assert found.shape == weight.shape
    along = round_to_nearest(weight, UniformGrid(4), 32).dequantized()
    assert np.sum((found - weight) ** 2) < 0.6 * np.sum((along - weight) ** 2)


def test_outputs_of_different_sizes() -> None:
    weight = uneven(0)
    rounded = round_along_better_axis(weight, UniformGrid(4), 32)
    assert not rounded.transposed
    np.testing.assert_array_equal(rounded.codes, round_to_nearest(weight, UniformGrid(4), 32).codes)


def test_the_error_of_the_output_decides() -> None:
    """In the even half of the inputs groups along these are better; their features say which half counts."""
    weight = uneven(0)
    weight[:, 48:] = uneven(1)[:, 48:] * 0.2
    for first, second, transposed in ((1.0, 1e-6, False), (1e-6, 1.0, True)):
        importance = np.repeat(np.array([first, second], np.float32), 48)
        for options in ({"importance": importance}, {"second_moments": np.diag(importance)}):
            assert round_along_better_axis(weight, UniformGrid(4), 16, **options).transposed == transposed


@pytest.mark.real
@pytest.mark.parametrize(("name", "bits"), [("int", 3), ("int", 4), ("nf4", 4), ("bitmod", 3)])
def test_real_weights_lose_no_more_than_along_the_inputs(name: str, bits: int) -> None:
    grid = make_grid(name, bits)
    ways = set()
    for weight in some_rows().values():
        along = round_to_nearest(weight, grid, 64)
        better = round_along_better_axis(weight, grid, 64)
        ways.add(better.transposed)
        assert np.sum((better.dequantized() - weight) ** 2) <= np.sum((along.dequantized() - weight) ** 2)
    assert True in ways
