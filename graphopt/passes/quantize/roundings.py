"""Roundings: which code of a grid each weight gets.

All of them take a weight W [N, K] and give a `QuantizedWeight` Q of it. Nearest looks at each number alone; the others
minimise what the outputs of the layer lose over calibration data, with one input of the layer a token, x_t [K]:

    Σ_t r_t² ‖W x_t - Q x_t‖² = tr((W - Q) H (W - Q)ᵀ),     H = Σ_t r_t² x_t x_tᵀ

H is the Hessian (of half of it, for each row), float [K, K]: a second moment that calibration streams. The weights r_t
of the tokens are 1 in GPTQ; the attention that a token receives in RSQ; large for the first token (the attention sink)
in the Hessians of keys and values. They enter nowhere else, so every rounding here takes them through H.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from graphopt.passes.quantize.grids import Fit, Grid, mixed
from graphopt.passes.quantize.quantized_weight import Outliers, QuantizedWeight

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Rounding = Literal["nearest", "gptq", "comq", "gptq+comq"]
Order = Literal["activation", "groups", "natural"]

_BLOCK = 64
"""Columns whose errors are gathered before they are carried to all later ones in one product."""
_LEAST_PIVOT = 1e-9
"""What a column must keep of its diagonal element once all later columns may make up for it: less is singular."""
_MOST_DAMPING = 1e6


def quantize(
    weight: Floats,
    grid: Grid,
    group_size: int,
    rounding: Rounding = "nearest",
    *,
    hessian: Array | None = None,
    importance: Floats | None = None,
    damping: float = 0.01,
    order: Order = "activation",
    sweeps: int = 3,
    outliers: float = 0.0,
) -> QuantizedWeight:
    """Round a weight to a grid.

    Args:
        weight: float32 [N, K], finite.
        grid: What to round to.
        group_size: Columns of a group; the last one may have fewer; K or more: one group a row.
        rounding: "nearest" (`round_to_nearest`), "gptq" (`gptq`), "comq" (`coordinate_descent` from nearest), or
            "gptq+comq" (`coordinate_descent` from GPTQ's result).
        hessian: [K, K]; needed by all but "nearest".
        importance: [K], what a squared error in each column counts when a grid is fitted. None: all the same.
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
    if rounding == "nearest":
        return round_to_nearest(weight, grid, group_size, importance, kept=kept)
    if hessian is None:
        raise ValueError(f'the rounding "{rounding}" needs a Hessian, which calibration gathers')
    start = None
    if rounding != "comq":
        start = gptq(weight, grid, group_size, hessian, damping=damping, order=order, importance=importance, kept=kept)
        if rounding == "gptq":
            return start
    return coordinate_descent(
        weight, grid, group_size, hessian, sweeps=sweeps, start=start, importance=importance, kept=kept
    )


def objective(weight: Floats, quantized: QuantizedWeight, hessian: Array) -> float:
    """tr((W - Q) H (W - Q)ᵀ) with Q in the basis that it was rounded in, computed in float64."""
    error = weight.astype(np.float64) - quantized.numbers()
    return float(np.sum((error @ hessian.astype(np.float64)) * error))


def largest(weight: Floats, fraction: float) -> Mask:
    """Which weights to keep in full, bool [N, K]: the given fraction of all, those largest in magnitude.

    EasyQuant: An Efficient Data-free Quantization Algorithm for LLMs. The paper keeps less than 1 % of the entries,
    those beyond n standard deviations; one threshold for the whole weight is that rule with n set by the fraction.

    Raises:
        ValueError: The fraction isn't within 0 and 0.5.
    """
    if not 0 <= fraction <= 0.5:
        raise ValueError(f"the share of outliers must lie between 0 and 0.5, not at {fraction}")
    count = round(fraction * weight.size)
    found = np.zeros(weight.size, np.bool_)
    if count:
        found[np.argpartition(np.abs(weight).ravel(), -count)[-count:]] = True
    return found.reshape(weight.shape)


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
    filled = weight if kept is None else _without(weight, kept, group_size)
    codes, fits = [], []
    for start in range(0, columns, group_size):
        block = filled[:, start : start + group_size]
        fit = grid.fit(block, None if importance is None else importance[start : start + group_size])
        fits.append(fit)
        codes.append(grid.nearest(block, fit))
    found = grid.assemble(np.concatenate(codes, axis=1), fits, group_size, columns)
    return found if kept is None else _with_outliers(found, weight - found.numbers(), kept)


def gptq(
    weight: Floats,
    grid: Grid,
    group_size: int,
    hessian: Array,
    *,
    damping: float = 0.01,
    order: Order = "activation",
    importance: Floats | None = None,
    kept: Mask | None = None,
) -> QuantizedWeight:
    """Round column after column, each time moving the columns not yet rounded so that they make up for the errors.

    GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers. With H = R D Rᵀ, R unit upper
    triangular and D diagonal, the objective is Σ_j D_jj ‖Σ_{i≤j} e_i R_ij‖² for the errors e_j = w_j - q_j of the
    columns. So in the order of the columns each q_j is the number of the grid nearest to

        t_j = w_j + Σ_{i<j} e_i R_ij

    which is where GPTQ's updates, made with a Cholesky factor of H⁻¹, put the weight; D_jj is what is left of H_jj when
    all later columns are free. R comes of a Cholesky factor of H with its rows and columns reversed, and no inverse is
    needed. Sums over earlier blocks of columns are made in one product a block.

    Args:
        weight: float32 [N, K].
        grid: What to round to, with one code a weight.
        group_size: Columns of a group; the last one may have fewer.
        hessian: [K, K], symmetric, positive semidefinite. Columns that are all zero there (inputs that never fire) are
            rounded to nearest.
        damping: What is added to the diagonal, as a share of its mean. It is raised, tenfold each time, until no
            pivot D_jj vanishes beside H_jj: a Hessian of few tokens, or of inputs that depend on each other linearly,
            is singular.
        order: "activation": columns by falling H_jj; groups stay where they are, and their grids are fitted to the
            original weights beforehand. "groups": groups by falling mean of H_jj, columns of a group alike. "natural":
            from the first to the last. In the latter two a grid is fitted when its group is reached, to the weights as
            the errors of all earlier groups have moved them.
        importance: [K], what a squared error in each column counts when a grid is fitted; None: all the same.
        kept: [N, K], weights that keep their precision as outliers; each absorbs what the earlier errors would have it
            make up for.

    Raises:
        ValueError: The Hessian's shape is wrong, it has numbers that aren't finite, isn't symmetric, or can't be made
            positive definite; or the grid has vectors.
    """
    _check_scalar(grid)
    rows, columns = weight.shape
    gram = _checked(hessian, columns)
    visits = _visits(np.diagonal(gram), order, group_size)
    factor = _unit_factor(gram[np.ix_(visits, visits)], damping)
    filled = weight if kept is None else _without(weight, kept, group_size)
    fits: list[Fit | None] = [None] * -(-columns // group_size)

    def fit(columns_of_group: Array, numbers: Floats) -> None:
        cares = None if importance is None else importance[columns_of_group]
        if kept is not None:
            numbers = np.where(kept[:, columns_of_group], filled[:, columns_of_group], numbers)
        fits[columns_of_group[0] // group_size] = grid.fit(np.ascontiguousarray(numbers), cares)

    if order == "activation":
        for start in range(0, columns, group_size):
            group = np.arange(start, min(start + group_size, columns))
            fit(group, weight[:, group])
    codes = np.empty((columns, rows), np.uint16 if grid.bits > 8 else np.uint8)
    extra = np.zeros((columns, rows), np.float32) if kept is not None else None
    target = np.ascontiguousarray(weight[:, visits].T)
    original = target.copy()
    for start, stop in _blocks(visits, group_size, whole_groups=order != "activation"):
        own = visits[start] // group_size
        if fits[own] is None:
            end = start + int(np.count_nonzero(visits // group_size == own))
            # What the free columns of the group would be: the shift of their targets, solved for in the group itself.
            shift = (target[start:end] - original[start:end]).astype(np.float64)
            moved = original[start:end] + np.linalg.solve(factor[start:end, start:end].T.astype(np.float64), shift)
            by_place = np.argsort(visits[start:end])
            fit(visits[start:end][by_place], moved[by_place].T.astype(np.float32))
        errors = np.empty((stop - start, rows), np.float32)
        for index, place in enumerate(range(start, stop)):
            column = visits[place]
            aim = target[place] + factor[start:place, place] @ errors[:index]
            chosen = fits[column // group_size]
            assert chosen is not None
            code = grid.nearest(aim[:, None], chosen)
            found = grid.values(code, chosen)[:, 0]
            codes[column] = code[:, 0]
            if kept is not None and extra is not None:
                np.subtract(aim, found, out=extra[column], where=kept[:, column])
                found = found + extra[column]
            errors[index] = original[place] - found
        target[stop:] += factor[start:stop, stop:].T @ errors
    done = grid.assemble(np.ascontiguousarray(codes.T), [f for f in fits if f is not None], group_size, columns)
    return done if kept is None or extra is None else _with_outliers(done, extra.T, kept)


def coordinate_descent(
    weight: Floats,
    grid: Grid,
    group_size: int,
    hessian: Array,
    *,
    sweeps: int = 3,
    start: QuantizedWeight | None = None,
    refit: bool = True,
    importance: Floats | None = None,
    kept: Mask | None = None,
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
        hessian: [K, K], symmetric, positive semidefinite. Columns that are all zero there keep their code.
        sweeps: How often every weight, and then every scale, is visited; it ends earlier if no code changes.
        start: Where to begin, of the same grid and groups, GPTQ's result say; None: `round_to_nearest`.
        refit: Move scales and float offsets too; zero points stay. Not for grids whose scales aren't free.
        importance: [K], for the fit of the grid where `start` is None.
        kept: [N, K], weights that keep their precision as outliers, for the same case.

    Raises:
        ValueError: As `gptq`; or `start` doesn't fit the weight.
    """
    _check_scalar(grid)
    rows, columns = weight.shape
    gram = _checked(hessian, columns)
    mean = float(np.diagonal(gram).mean())
    if start is None:
        start = round_to_nearest(weight, grid, group_size, importance, kept=kept)
    if (start.rows, start.columns, start.bits) != (rows, columns, grid.bits) or start.group_size != group_size:
        raise ValueError("what coordinate descent starts from was rounded to another grid or of another weight")
    if not mean:
        return start
    square = (gram / mean).astype(np.float32)
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
    made = grid.assemble(np.ascontiguousarray(codes.T), fits, group_size, columns)
    if start.outliers is not None:
        made = _with_outliers(made, weight - error.T - made.numbers(), fixed.T)
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
        scale = np.where((np.abs(scale) > np.finfo(np.float32).tiny) & (a > 0), scale, fit.scale).astype(np.float32)
        moved = dataclasses.replace(fit, scale=scale)
        if fit.offset is not None:
            moved = dataclasses.replace(moved, offset=(fit.offset + shift).astype(np.float32))
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


def _visits(diagonal: Array, order: Order, group_size: int) -> Array:
    """The columns in the order in which they are rounded."""
    columns = np.arange(len(diagonal))
    if order == "natural":
        return columns
    if order == "activation":
        return np.argsort(-diagonal, kind="stable")
    if order != "groups":
        raise ValueError(f"there is no order {order!r}; there are {', '.join(get_args(Order))}")
    group = columns // group_size
    mean = np.bincount(group, diagonal) / np.bincount(group)
    return np.lexsort((-diagonal, group, -mean[group]))


def _blocks(visits: Array, group_size: int, *, whole_groups: bool) -> Iterator[tuple[int, int]]:
    """Stretches of at most `_BLOCK` visits, which don't cross the border of a group where groups come whole."""
    start = 0
    while start < len(visits):
        stop = min(start + _BLOCK, len(visits))
        if whole_groups:
            stop = start + int(np.count_nonzero(visits[start:stop] // group_size == visits[start] // group_size))
        yield start, stop
        start = stop


def _unit_factor(gram: Array, damping: float) -> Floats:
    """R, unit upper triangular, of gram + λ = R D Rᵀ; λ starts at `damping` times the diagonal's mean."""
    diagonal = np.diagonal(gram)
    mean = float(diagonal.mean()) or 1.0
    bare = gram + np.diag(np.where(diagonal > 0, 0, mean))
    # Reversed, the lower factor that LAPACK gives is the upper one.
    reverse = bare[::-1, ::-1]
    while damping < _MOST_DAMPING:
        reverse = bare[::-1, ::-1] + np.diag(np.full(len(gram), damping * mean))
        try:
            upper = np.linalg.cholesky(reverse)[::-1, ::-1]
        except np.linalg.LinAlgError:
            upper = np.zeros_like(reverse)
        pivots = np.diagonal(upper)
        if (pivots**2 > _LEAST_PIVOT * np.diagonal(reverse)[::-1]).all():
            return np.asarray(upper / pivots, np.float32)
        damping = max(10 * damping, 1e-6)
    raise ValueError("the Hessian can't be made positive definite: it isn't a sum of squares")


def _checked(hessian: Array, columns: int) -> npt.NDArray[np.float64]:
    if hessian.shape != (columns, columns):
        raise ValueError(f"a Hessian of shape {list(hessian.shape)} was given for a weight of {columns} columns")
    if not np.isfinite(hessian).all():
        raise ValueError("the Hessian has numbers that aren't finite")
    gram = hessian.astype(np.float64)
    diagonal = np.diagonal(gram)
    if (diagonal < 0).any() or np.abs(gram - gram.T).max() > 1e-3 * diagonal.max():
        raise ValueError("the Hessian isn't symmetric with a diagonal of squares")
    return gram


def _check_scalar(grid: Grid) -> None:
    if grid.width != 1:
        raise ValueError(f"this rounding gives every weight a code of its own; the grid has one for {grid.width}")


def _without(weight: Floats, kept: Mask, group_size: int) -> Floats:
    """The weight with the mean of the rest of its group, in its row, where a number is kept."""
    starts = np.arange(0, weight.shape[1], group_size)
    total = np.add.reduceat(np.where(kept, 0, weight), starts, axis=1)
    count = np.add.reduceat((~kept).astype(np.float32), starts, axis=1)
    mean = total / np.maximum(count, 1)
    return np.where(kept, mean[:, np.arange(weight.shape[1]) // group_size], weight).astype(np.float32)


def _with_outliers(quantized: QuantizedWeight, rest: Floats, kept: Mask) -> QuantizedWeight:
    """The numbers of `rest` [N, K] added where they are kept."""
    rows, columns = np.nonzero(kept)
    found = Outliers(rows.astype(np.int32), columns.astype(np.int32), rest[rows, columns].astype(np.float32))
    return dataclasses.replace(quantized, outliers=found)
