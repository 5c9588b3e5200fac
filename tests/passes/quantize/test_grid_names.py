"""Grids by name."""

from __future__ import annotations

import pytest

from graphopt.passes.quantize.codebook_grids import (
    bitmod_grid,
    gaussian_grid,
    minifloat_grid,
    normal_float_grid,
    power_grid,
)
from graphopt.passes.quantize.grid_names import GRIDS, make_grid
from graphopt.passes.quantize.grids import Grid, UniformGrid


@pytest.mark.parametrize(
    ("name", "bits", "grid"),
    [
        ("int", None, UniformGrid(4)), ("int", 3, UniformGrid(3)), ("nf4", None, normal_float_grid(4)),
        ("NF3", 3, normal_float_grid(3)), ("fp4", 4, minifloat_grid(2, 1)), ("fp8", None, minifloat_grid(4, 3)),
        ("e5m2", None, minifloat_grid(5, 2)), ("e3m0", None, minifloat_grid(3, 0)), ("nupes", 3, power_grid(3)),
        ("bitmod", None, bitmod_grid(4)), ("gaussian", 2, gaussian_grid(2)),
    ],
)  # fmt: skip
def test_names(name: str, bits: int | None, grid: Grid) -> None:
    assert make_grid(name, bits) == grid


def test_every_name_that_is_told_makes_a_grid() -> None:
    for name in GRIDS:
        assert make_grid(name).bits in (4, 8)


def test_options() -> None:
    assert make_grid("int", 4, symmetric=False, floats=True) == UniformGrid(4, False, True)
    assert make_grid("nf4", search=True, half=False) == normal_float_grid(4, search=True, half=False)


def test_what_there_is_not() -> None:
    with pytest.raises(ValueError, match=r"there is no grid 'nf'. There are: int: .*; nf4: .*; bitmod: 3 or 4 bits"):
        make_grid("nf")
    with pytest.raises(ValueError, match="the grid 'nf4' has 4 bits, not 3"):
        make_grid("nf4", 3)
    with pytest.raises(ValueError, match="the grid 'fp8' has 8 bits, not 4"):
        make_grid("fp8", 4)
    with pytest.raises(ValueError, match="'bitmod' has neither zero points nor offsets"):
        make_grid("bitmod", symmetric=False)
    with pytest.raises(ValueError, match="BitMoD has 3 to 4 bits here, not 2"):
        make_grid("bitmod", 2)
    with pytest.raises(ValueError, match="integers have 2 to 8 bits here, not 9"):
        make_grid("int", 9)
    with pytest.raises(ValueError, match="2 to 256 of them here, not 512"):
        make_grid("gaussian", 9)
    with pytest.raises(ValueError, match="E9M9"):
        make_grid("e9m9")
