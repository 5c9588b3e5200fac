"""Grids by name."""

from __future__ import annotations

from graphopt.passes.quantize.grids import Grid, UniformGrid


def make_grid(name: str, bits: int, symmetric: bool, floats: bool, search: bool) -> Grid:
    """The grid called `name`.

    Raises:
        ValueError: There is none, or it has no such form.
    """
    if name != "int":
        raise ValueError(f"there is no grid {name!r}; there is int")
    return UniformGrid(bits, symmetric, floats, search)
