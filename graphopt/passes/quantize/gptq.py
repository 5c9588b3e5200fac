"""GPTQ: rounding column by column, the columns not yet rounded making up for the errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from graphopt.passes.quantize.grids import Fit, Grid
from graphopt.passes.quantize.outliers import Floats, Mask, with_outliers, without
from graphopt.passes.quantize.quantized_weight import QuantizedWeight

Array = npt.NDArray[Any]
Order = Literal["activation", "groups", "natural"]

_BLOCK = 64
"""Columns whose errors are gathered before they are carried to all later ones in one product."""
_PANEL = 256
"""Columns of the Hessian that are factored at a time."""
_LEAST_PIVOT = 1e-9
"""What a column must keep of its diagonal element once all later columns may make up for it: less is singular."""
_MOST_DAMPING = 1e6


def gptq(
    weight: Floats,
    grid: Grid,
    group_size: int,
    hessian: Array,
    *,
    damping: float = 0.01,
    order: Order = "groups",
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

    Where a grid has one code for several neighbouring columns, these are rounded together, as in GPTVQ: The Blessing of
    Dimensionality for LLM Quantization and the block LDLQ of QuIP#: with R' the block of R that is theirs, D' that of D
    and X = Σ e_i R_i, over all earlier columns, to the vector q that makes (t - q) M (t - q)ᵀ least, where
    t = w + X R'⁻¹ and M = R' D' R'ᵀ.

    Args:
        weight: float32 [N, K].
        grid: What to round to; groups and rows are made of whole vectors of it.
        group_size: Columns of a group; the last one may have fewer.
        hessian: [K, K], symmetric, positive semidefinite. Columns that are all zero there (inputs that never fire) are
            rounded to nearest.
        damping: What is added to the diagonal, as a share of its mean. It is raised, tenfold each time, until no
            pivot D_jj vanishes beside H_jj: a Hessian of few tokens, or of inputs that depend on each other linearly,
            is singular.
        order: "activation": columns by falling H_jj; groups stay where they are, and their grids are fitted to the
            original weights beforehand. "groups": groups by falling mean of H_jj, columns of a group alike. "natural":
            from the first to the last. In the latter two a grid is fitted when its group is reached, to the weights as
            the errors of all earlier groups have moved them. For vectors: "groups", where the columns of a group come
            as they are, or "natural".
        importance: [K], what a squared error in each column counts when a grid is fitted; None: D_jj, which is what it
            adds to the objective here.
        kept: [N, K], weights that keep their precision as outliers; each absorbs what the earlier errors would have it
            make up for.

    Raises:
        ValueError: The Hessian's shape is wrong, it has numbers that aren't finite, isn't symmetric, or can't be made
            positive definite; or vectors don't fit the groups, the rows or the order.
    """
    check_hessian(hessian, weight.shape[1])
    rows, columns = weight.shape
    width = grid.width
    if width > 1 and (columns % width or order == "activation" or (group_size < columns and group_size % width)):
        raise ValueError(f"vectors of {width} columns need groups and rows that are made of them, in order")
    visits = _visits(np.diagonal(hessian), order, group_size, sort=width == 1)
    factor, pivots = _unit_factor(hessian, visits, damping)
    if importance is None:
        importance = np.empty(columns, np.float32)
        importance[visits] = pivots
    filled = weight if kept is None else without(weight, kept, group_size)
    fits: list[Fit | None] = [None] * -(-columns // group_size)

    def fit(group: int, numbers: Floats) -> None:
        own = slice(group * group_size, (group + 1) * group_size)
        if kept is not None:
            numbers = np.where(kept[:, own], filled[:, own], numbers)
        fits[group] = grid.fit(np.ascontiguousarray(numbers), importance[own])

    if order == "activation":
        for group in range(len(fits)):
            fit(group, weight[:, group * group_size : (group + 1) * group_size])
    codes = np.empty((columns // width, rows), np.uint16 if grid.bits > 8 else np.uint8)
    extra = None if kept is None else np.zeros((columns, rows), np.float32)
    target = np.ascontiguousarray(weight[:, visits].T)
    for start, stop in _blocks(visits, group_size, whole_groups=order != "activation"):
        entered = int(visits[start] // group_size)
        if fits[entered] is None:
            end = start + min(group_size, columns - entered * group_size)
            moved = target[start:end]
            if start:  # else there is no error yet, and nothing has moved
                moved = _free(weight[:, visits[start:end]].T, moved, factor[start:end, start:end])
            fit(entered, moved[np.argsort(visits[start:end])].T)
        errors = np.empty((stop - start, rows), np.float32)
        for index in range(0, stop - start, width):
            place, own = start + index, slice(start + index, start + index + width)
            column = visits[place]
            those = slice(column, column + width)
            aim = target[own] + factor[start:place, own].T @ errors[:index]
            chosen = fits[column // group_size]
            assert chosen is not None
            if width == 1:
                code = grid.nearest(aim.T, chosen)
            else:
                inner = factor[own, own]
                aim = _free(weight[:, those].T, aim, inner)
                metric = np.asarray((inner * pivots[own]) @ inner.T, np.float32)
                code = grid.nearest_under(np.ascontiguousarray(aim.T), chosen, metric)
            found = grid.values(code, chosen).T
            codes[column // width] = code[:, 0]
            if kept is not None and extra is not None:
                np.subtract(aim, found, out=extra[those], where=kept[:, those].T)
                found = found + extra[those]
            errors[index : index + width] = weight[:, those].T - found
        target[stop:] += factor[start:stop, stop:].T @ errors
    done = grid.assemble(np.ascontiguousarray(codes.T), [f for f in fits if f is not None], group_size, columns)
    return done if kept is None or extra is None else with_outliers(done, extra.T, kept)


def check_hessian(hessian: Array, columns: int) -> None:
    """Refuse what can't be the second moments of so many inputs.

    Raises:
        ValueError: The shape is wrong, or there are numbers that aren't finite, or it isn't symmetric with a diagonal
            that isn't negative.
    """
    if hessian.shape != (columns, columns):
        raise ValueError(f"a Hessian of shape {list(hessian.shape)} was given for a weight of {columns} columns")
    diagonal = np.diagonal(hessian)
    largest = float(diagonal.max())
    for start in range(0, columns, _PANEL):
        rows = hessian[start : start + _PANEL]
        if not np.isfinite(rows).all():
            raise ValueError("the Hessian has numbers that aren't finite")
        if np.abs(rows - hessian[:, start : start + _PANEL].T).max() > 1e-3 * largest:
            raise ValueError("the Hessian isn't symmetric")
    if diagonal.min() < 0:
        raise ValueError("the Hessian has a negative diagonal element, so it isn't a sum of squares")


def check_scalar(grid: Grid) -> None:
    """Refuse grids of vectors.

    Raises:
        ValueError: The grid has one code for several weights.
    """
    if grid.width != 1:
        raise ValueError(f"this rounding gives every weight a code of its own; the grid has one for {grid.width}")


def _free(original: Floats, target: Floats, factor: Floats) -> Floats:
    """Where the errors of earlier groups put the columns of a group [m, N] while none of them is rounded.

    Their targets are shifted from the original by X = (earlier errors) R. Free columns with errors e of their own have
    X + e R = 0 within the group, of which R is `factor` [m, m].
    """
    shift = np.linalg.solve(factor.T.astype(np.float64), (target - original).astype(np.float64))
    return np.asarray(original + shift, np.float32)


def _visits(diagonal: Array, order: Order, group_size: int, *, sort: bool) -> Array:
    """The columns in the order in which they are rounded; those of a group by falling H_jj only where they `sort`."""
    columns = np.arange(len(diagonal))
    if order == "natural":
        return columns
    if order == "activation":
        return np.argsort(-diagonal, kind="stable")
    if order != "groups":
        raise ValueError(f"there is no order {order!r}; there are {', '.join(get_args(Order))}")
    group = columns // group_size
    mean = np.bincount(group, diagonal) / np.bincount(group)
    return np.lexsort((-diagonal if sort else columns, group, -mean[group]))


def _blocks(visits: Array, group_size: int, *, whole_groups: bool) -> Iterator[tuple[int, int]]:
    """Stretches of at most `_BLOCK` visits, which don't cross the border of a group where groups come whole."""
    start = 0
    while start < len(visits):
        stop = min(start + _BLOCK, len(visits))
        if whole_groups:
            stop = start + int(np.count_nonzero(visits[start:stop] // group_size == visits[start] // group_size))
        yield start, stop
        start = stop


def _unit_factor(hessian: Array, visits: Array, damping: float) -> tuple[Floats, Floats]:
    """R, unit upper triangular, float32 [K, K], and D's diagonal over H's mean, float32 [K], of H + λ = R D Rᵀ.

    All in the order of the visits. λ starts at `damping` times the mean of the diagonal; columns that never fire get
    the mean there.
    """
    diagonal = np.diagonal(hessian).astype(np.float64)[visits]
    mean = float(diagonal.mean()) or 1.0
    while damping < _MOST_DAMPING:
        full = np.where(diagonal > 0, diagonal, mean) + damping * mean
        work = hessian[np.ix_(visits, visits)].astype(np.float64)
        np.fill_diagonal(work, full)
        if _factor_in_place(work, _LEAST_PIVOT * full):
            roots = np.diagonal(work).copy()
            work /= roots
            return np.triu(work.astype(np.float32)), np.asarray(roots**2 / mean, np.float32)
        damping = max(10 * damping, 1e-6)
    raise ValueError("the Hessian can't be made positive definite, so it isn't a sum of squares")


def _factor_in_place(work: npt.NDArray[np.float64], least: npt.NDArray[np.float64]) -> bool:
    """Replace the upper triangle of a matrix by U, U Uᵀ being the matrix; False where a pivot is below `least`.

    The last panel of columns first: each is freed of what later ones explain and divided by its own factor, which
    LAPACK's lower one is with rows and columns reversed.
    """
    for start in reversed(range(0, len(work), _PANEL)):
        stop = min(start + _PANEL, len(work))
        panel = work[:stop, start:stop]
        panel -= work[:stop, stop:] @ work[start:stop, stop:].T
        try:
            own = np.linalg.cholesky(panel[start:][::-1, ::-1])[::-1, ::-1]
        except np.linalg.LinAlgError:
            return False
        if not (np.diagonal(own) ** 2 > least[start:stop]).all():
            return False
        panel[:start] = panel[:start] @ np.linalg.inv(own).T
        panel[start:] = own
    return True
