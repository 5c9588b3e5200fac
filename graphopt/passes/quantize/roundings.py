"""Roundings: which code of a grid each weight gets.

All of them take a weight W [N, K] and give a `QuantizedWeight` Q of it. Nearest looks at each number alone; the others
minimise what the outputs of the layer lose over calibration data, with one input of the layer a token, x_t [K]:

    Σ_t r_t² ‖W x_t - Q x_t‖² = tr((W - Q) H (W - Q)ᵀ),     H = Σ_t r_t² x_t x_tᵀ

H is the Hessian (of half of it, for each row), float [K, K]: a second moment that calibration streams. The weights r_t
of the tokens are 1 in GPTQ; the attention that a token receives in RSQ; large for the first token (the attention sink)
in the Hessians of keys and values. They enter nowhere else, so every rounding here takes them through H.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from graphopt.passes.quantize.coordinate_descent import coordinate_descent
from graphopt.passes.quantize.gptq import Order, check_hessian, gptq
from graphopt.passes.quantize.grids import Grid
from graphopt.passes.quantize.outliers import Floats, Mask, largest, with_outliers, without
from graphopt.passes.quantize.quantized_weight import QuantizedWeight

Array = npt.NDArray[Any]
Rounding = Literal["nearest", "gptq", "comq", "gptq+comq"]


def quantize(
    weight: Floats,
    grid: Grid,
    group_size: int,
    rounding: Rounding = "nearest",
    *,
    hessian: Array | None = None,
    importance: Floats | None = None,
    damping: float = 0.01,
    order: Order = "groups",
    sweeps: int = 3,
    outliers: float = 0.0,
) -> QuantizedWeight:
    """Round a weight to a grid.

    Args:
        weight: float32 [N, K], finite.
        grid: What to round to; its `for_weight` is asked first.
        group_size: Columns of a group; the last one may have fewer; K or more: one group a row.
        rounding: "nearest" (`round_to_nearest`), "gptq" (`gptq`), "comq" (`coordinate_descent` from nearest), or
            "gptq+comq" (`coordinate_descent` from GPTQ's result).
        hessian: [K, K]; needed by all but "nearest".
        importance: [K], what a squared error in each column counts when a grid is fitted. None: as H's diagonal says
            for "comq", as `gptq` says for itself, and all the same for "nearest".
        damping: See `gptq`.
        order: See `gptq`.
        sweeps: See `coordinate_descent`.
        outliers: Share of the weights, those largest in magnitude, that keep their precision (`largest`).

    Raises:
        ValueError: A number isn't finite, a shape doesn't fit, the Hessian is missing, or the grid gives one code to
            several weights and the rounding isn't "nearest".
    """
    if rounding not in get_args(Rounding):
        raise ValueError(f"there is no rounding {rounding!r}; there are {', '.join(get_args(Rounding))}")
    if weight.ndim != 2 or not weight.size:
        raise ValueError(f"a weight of shape {list(weight.shape)} can't be quantized: it must be [N, K]")
    if group_size < 1:
        raise ValueError(f"a group of {group_size} columns can't be")
    if not np.isfinite(weight).all():
        raise ValueError("the weight has numbers that aren't finite")
    if importance is not None and importance.shape != (weight.shape[1],):
        raise ValueError(f"an importance of shape {list(importance.shape)} was given for {weight.shape[1]} columns")
    kept = largest(weight, outliers) if outliers else None
    grid = grid.for_weight(weight, group_size, importance)
    if rounding == "nearest":
        return round_to_nearest(weight, grid, group_size, importance, kept=kept)
    if hessian is None:
        raise ValueError(f'the rounding "{rounding}" needs a Hessian, which calibration gathers')
    if rounding == "comq":
        if importance is None:
            check_hessian(hessian, weight.shape[1])
            # Not 0 anywhere: what never fires here may fire elsewhere.
            diagonal = np.diagonal(hessian) / (float(np.diagonal(hessian).mean()) or 1.0)
            importance = np.maximum(diagonal, 1e-6).astype(np.float32)
        start = round_to_nearest(weight, grid, group_size, importance, kept=kept)
    else:
        start = gptq(weight, grid, group_size, hessian, damping=damping, order=order, importance=importance, kept=kept)
    if rounding == "gptq":
        return start
    return coordinate_descent(weight, grid, group_size, hessian, start, sweeps=sweeps)


def objective(weight: Floats, quantized: QuantizedWeight, hessian: Array) -> float:
    """tr((W - Q) H (W - Q)ᵀ) with Q in the basis that it was rounded in, computed in float64."""
    error = weight.astype(np.float64) - quantized.numbers()
    return float(np.sum((error @ hessian.astype(np.float64)) * error))


def round_to_nearest(
    weight: Floats,
    grid: Grid,
    group_size: int,
    importance: Floats | None = None,
    *,
    kept: Mask | None = None,
) -> QuantizedWeight:
    """Give every weight the nearest number of its group's grid.

    Args:
        weight: [N, K].
        grid: What to round to.
        group_size: Columns of a group; the last one may have fewer.
        importance: [K], what a squared error in each column counts when a grid is fitted; None: all the same.
        kept: [N, K], the weights that keep their precision as outliers; grids are fitted to the others alone.
    """
    columns = weight.shape[1]
    filled = weight if kept is None else without(weight, kept, group_size)
    codes, fits = [], []
    for start in range(0, columns, group_size):
        block = np.ascontiguousarray(filled[:, start : start + group_size])
        fit = grid.fit(block, None if importance is None else importance[start : start + group_size])
        fits.append(fit)
        codes.append(grid.nearest(block, fit))
    found = grid.assemble(np.concatenate(codes, axis=1), fits, group_size, columns)
    return found if kept is None else with_outliers(found, weight - found.numbers(), kept)
