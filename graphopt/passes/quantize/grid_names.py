"""Grids by name, as options of passes and recipes give them."""

from __future__ import annotations

import re

from graphopt.passes.quantize.codebook_grids import (
    bitmod_grid,
    gaussian_grid,
    minifloat_grid,
    normal_float_grid,
    power_grid,
)
from graphopt.passes.quantize.grids import Grid, UniformGrid

GRIDS = {
    "int": "integers of 2 to 8 bits, symmetric or with zero points or float offsets",
    "nf4": "NormalFloat; nf2 to nf8: as many bits",
    "fp4": "E2M1, as e2m1",
    "fp8": "E4M3, as e4m3",
    "e3m0": "and every other ExMy of 2 to 8 bits: a sign, x bits of exponent, y bits of fraction",
    "nupes": "sign(q) |q|^(1/a) of integers q of 2 to 8 bits, with the exponent that suits the matrix best",
    "bitmod": "3 or 4 bits: FP3 or FP4 with a special value that each group chooses",
    "gaussian": "1 to 8 bits: numbers with the least squared error on normal ones, for rotated weights (HIGGS, p = 1)",
}
"""What `make_grid` knows, and what each is."""


def make_grid(
    name: str,
    bits: int | None = None,
    symmetric: bool = True,
    floats: bool = False,
    search: bool = False,
    half: bool = True,
) -> Grid:
    """The grid of a name.

    Args:
        name: A key of `GRIDS`, or a name that its text gives a rule for; case doesn't matter.
        bits: Of a code; None: those in the name, else 4.
        symmetric: Of integers: no zero points.
        floats: Of integers that aren't symmetric: float offsets instead of zero points.
        search: Fit scales by the least squared error, not by the largest magnitude.
        half: Scales and offsets are numbers of float16.

    Raises:
        ValueError: No such grid; or bits or options that it can't have.
    """
    key = name.lower()
    normal = re.fullmatch(r"nf(\d)", key)
    mini = re.fullmatch(r"e(\d)m(\d)", {"fp4": "e2m1", "fp8": "e4m3"}.get(key, key))
    if normal is None and mini is None and key not in GRIDS:
        known = "; ".join(f"{known}: {text}" for known, text in GRIDS.items())
        raise ValueError(f"there is no grid {name!r}. There are: {known}")
    if key != "int" and (floats or not symmetric):
        raise ValueError(f"the grid {name!r} has neither zero points nor offsets; only 'int' has")
    if normal:
        return normal_float_grid(_bits(name, int(normal[1]), bits), search=search, half=half)
    if mini:
        exponent, fraction = int(mini[1]), int(mini[2])
        _bits(name, 1 + exponent + fraction, bits)
        return minifloat_grid(exponent, fraction, search=search, half=half)
    if key == "int":
        return UniformGrid(4 if bits is None else bits, symmetric, floats, search, half)
    of_bits = {"gaussian": gaussian_grid, "bitmod": bitmod_grid, "nupes": power_grid}[key]
    return of_bits(4 if bits is None else bits, search=search, half=half)


def _bits(name: str, named: int, bits: int | None) -> int:
    if bits is not None and bits != named:
        raise ValueError(f"the grid {name!r} has {named} bits, not {bits}")
    return named
