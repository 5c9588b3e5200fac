"""The scales of groups that give the least squared error, for grids that are multiples of codebooks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from graphopt.passes.quantize.grids import Array, Fit, Grid, mixed, step_size

_REFINEMENTS = 2
"""Least-squares steps behind the trials; more of them take less than 1 % of the error."""


def best_fit(grid: Grid, block: npt.NDArray[np.float32], trials: Iterable[Fit], importance: Array | None) -> Fit:
    """The fit with the least error in each row.

    Args:
        grid: What the fits are of.
        block: [N, m], each row a group.
        trials: At least one.
        importance: [m] or [N, m], what a squared error counts; None: all the same.
    """
    best: Fit | None = None
    least = np.full(len(block), np.inf)
    for fit in trials:
        total = row_errors(grid, block, fit, importance)
        better = total < least
        best, least = fit if best is None else mixed(fit, best, better), np.where(better, total, least)
    assert best is not None
    return best


def searched_fit(
    grid: Grid, block: npt.NDArray[np.float32], trials: Iterable[Fit], importance: Array | None, half: bool
) -> Fit:
    """The best of some fits, then the scale that suits its codes best, by least squares, and the codes of that scale.

    Args:
        grid: A grid whose numbers are multiples of the scale.
        block: [N, m], each row a group.
        trials: At least one.
        importance: [m] or [N, m], what a squared error counts; None: all the same.
        half: Scales are numbers of float16.
    """
    best = best_fit(grid, block, trials, importance)
    for _ in range(_REFINEMENTS):
        unit = dataclasses.replace(best, scale=np.ones_like(best.scale))
        level = grid.values(grid.nearest(block, best), unit)[:, : block.shape[1]]
        weighed = level if importance is None else level * importance
        square = np.einsum("nm,nm->n", weighed, level)
        scale = np.einsum("nm,nm->n", weighed, block) / np.where(square > 0, square, 1)
        refined = dataclasses.replace(best, scale=np.where(square > 0, step_size(scale, half), best.scale))
        best = best_fit(grid, block, (best, refined), importance)
    return best


def row_errors(grid: Grid, block: npt.NDArray[np.float32], fit: Fit, importance: Array | None) -> Array:
    """The squared error of each row, [N], with the arguments of `best_fit`."""
    error = grid.values(grid.nearest(block, fit), fit)[:, : block.shape[1]] - block
    total: Array = np.einsum("nm,nm->n", error, error if importance is None else error * importance)
    return total
