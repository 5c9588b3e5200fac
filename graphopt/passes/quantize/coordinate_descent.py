"""Coordinate descent: one code and one scale after the other gets its best value with all others held."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt.passes.quantize.gptq import check_hessian, check_scalar
from graphopt.passes.quantize.grids import Fit, Grid, mixed, stored
from graphopt.passes.quantize.outliers import Floats, Mask, with_outliers
from graphopt.passes.quantize.quantized_weight import QuantizedWeight

Array = npt.NDArray[Any]

_BLOCK = 64
"""Columns whose slopes are computed in one product."""


def coordinate_descent(
    weight: Floats,
    grid: Grid,
    group_size: int,
    hessian: Array,
    start: QuantizedWeight,
    *,
    sweeps: int = 3,
    refit: bool = True,
) -> QuantizedWeight:
    """Give one weight after the other, and one scale after the other, its best value with all others held.

    COMQ: A Backpropagation-Free Algorithm for Post-Training Quantization. With E = W - Q and G = E H, the objective has
    its minimum in the weight q_j alone at q_j + G_j / H_jj; being a parabola, the number of the grid nearest to that is
    the best one. For the scale s of a group, Q = s V + m there, the best step is (G · V) / (V H V) over the group's
    columns; a float offset m is found with it from two equations. Rows don't touch each other and are done at once,
    columns by falling ‖w_j‖² H_jj as in the paper (its greedy order, one for all rows). No step raises the objective:
    one that doesn't lower it isn't made.

    Args:
        weight: float32 [N, K].
        grid: What to round to, with one code a weight.
        group_size: Columns of a group; the last one may have fewer.
        hessian: [K, K], symmetric, positive semidefinite. Columns that are all zero there are rounded to
            nearest.
        start: Where to begin, a rounding to the same grid and groups: to nearest, or GPTQ's. Its outliers take part
            as weights that may be any number.
        sweeps: How often every weight, and then every scale, is visited; it ends earlier if no code changes.
        refit: Move scales and float offsets too; zero points stay. Not for grids whose scales aren't free.

    Raises:
        ValueError: As `gptq`; or `start` doesn't fit the weight.
    """
    check_scalar(grid)
    check_hessian(hessian, weight.shape[1])
    rows, columns = weight.shape
    if (start.rows, start.columns, start.bits, start.group_size) != (rows, columns, grid.bits, group_size):
        raise ValueError("what coordinate descent starts from was rounded to another grid or of another weight")
    mean = float(np.diagonal(hessian).mean())
    if not mean:
        return start
    square = np.asarray(hessian / mean, np.float32)
    fits = _fits(start)
    codes = np.ascontiguousarray(start.codes.T)
    error = np.ascontiguousarray((weight - start.numbers()).T)
    fixed = np.zeros((columns, 1), np.bool_)
    if start.outliers is not None:
        fixed = np.zeros((columns, rows), np.bool_)
        fixed[start.outliers.columns, start.outliers.rows] = True
    energy = np.diagonal(square) * np.square(weight).mean(axis=0)
    visits = np.argsort(-energy, kind="stable")
    visits = visits[np.diagonal(square)[visits] > 0]
    for _ in range(sweeps):
        changed = _sweep_codes(grid, group_size, square, visits, fits, codes, error, fixed)
        if refit:
            _sweep_scales(grid, group_size, square, fits, codes, error, fixed)
        if not changed:
            break
    for column in np.flatnonzero(np.diagonal(square) == 0):
        codes[column] = grid.nearest(weight[:, column, None], fits[column // group_size])[:, 0]
    made = grid.assemble(np.ascontiguousarray(codes.T), fits, group_size, columns)
    if start.outliers is not None:
        made = with_outliers(made, weight - error.T - made.numbers(), fixed.T)
    return dataclasses.replace(made, hadamard=start.hadamard)


def _sweep_codes(
    grid: Grid,
    group_size: int,
    square: Floats,
    visits: Array,
    fits: Sequence[Fit],
    codes: Array,
    error: Floats,
    fixed: Mask,
) -> int:
    """Visit every column once; codes and error, both [K, N], change in place. Returns how many codes changed."""
    changed = 0
    for start in range(0, len(visits), _BLOCK):
        block = visits[start : start + _BLOCK]
        slopes = square[block] @ error
        local = square[np.ix_(block, block)]
        for index, column in enumerate(block):
            pivot, slope, fit = local[index, index], slopes[index], fits[column // group_size]
            now = grid.values(codes[column][:, None], fit)[:, 0]
            code = grid.nearest((now + slope / pivot)[:, None], fit)
            step = np.where(fixed[column], -slope / pivot, now - grid.values(code, fit)[:, 0])
            better = step * (pivot * step + 2 * slope) < 0
            if not better.any():
                continue
            step = np.where(better, step, 0)
            error[column] += step
            moved = better & ~fixed[column]
            changed += int(np.count_nonzero(moved))
            codes[column] = np.where(moved, code[:, 0], codes[column])
            slopes[index + 1 :] += local[index + 1 :, index, None] * step
    return changed


def _sweep_scales(
    grid: Grid, group_size: int, square: Floats, fits: list[Fit], codes: Array, error: Floats, fixed: Mask
) -> None:
    """Move the scale, and the float offset, of every group; fits and error [K, N] change in place."""
    for group, fit in enumerate(fits):
        own = slice(group * group_size, min((group + 1) * group_size, len(codes)))
        slope, local = square[own] @ error, square[own, own]
        unit = dataclasses.replace(
            fit, scale=np.ones_like(fit.scale), offset=None if fit.offset is None else np.zeros_like(fit.offset)
        )
        level = np.where(fixed[own], 0, grid.values(codes[own].T, unit).T)
        curved = local @ level
        a, p = (level * curved).sum(axis=0), (level * slope).sum(axis=0)
        # Where the two directions are nearly one, the scale moves alone.
        by, shift = p / np.where(a > 0, a, 1), np.zeros_like(p)
        if fit.offset is not None:
            ones = np.where(fixed[own], 0, np.ones_like(level))
            b, c, q = (ones * curved).sum(axis=0), (ones * (local @ ones)).sum(axis=0), (ones * slope).sum(axis=0)
            det = a * c - b * b
            apart = det > 1e-4 * a * c
            det = np.where(apart, det, 1)
            by = np.where(apart, (c * p - b * q) / det, by)
            shift = np.where(apart, (a * q - b * p) / det, shift)
        scale = fit.scale + by
        scale = np.where((np.abs(scale) > np.finfo(np.float32).tiny) & (a > 0), scale, fit.scale)
        moved = dataclasses.replace(fit, scale=stored(scale, grid.half))
        if fit.offset is not None:
            moved = dataclasses.replace(moved, offset=stored(fit.offset + shift, grid.half))
        step = np.where(fixed[own], 0, (grid.values(codes[own].T, fit) - grid.values(codes[own].T, moved)).T)
        better = (step * (local @ step + 2 * slope)).sum(axis=0) < 0
        fits[group] = mixed(moved, fit, better)
        error[own] += np.where(better, step, 0)


def _fits(quantized: QuantizedWeight) -> list[Fit]:
    """The parameters of each group of a weight."""

    def column(values: Array | None, group: int) -> Any:
        return None if values is None else values[:, group].copy()

    parts = (quantized.scales, quantized.zero_points, quantized.offsets, quantized.selectors)
    return [Fit(*(column(part, group) for part in parts)) for group in range(quantized.scales.shape[1])]
