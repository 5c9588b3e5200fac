"""Roundings: which code of a grid each weight gets."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt.passes.quantize.grids import Grid
from graphopt.passes.quantize.quantized_weight import QuantizedWeight

Array = npt.NDArray[Any]


def round_to_nearest(
    weight: npt.NDArray[np.float32],
    grid: Grid,
    group_size: int,
    importance: npt.NDArray[np.float32] | None = None,
) -> QuantizedWeight:
    """Give every weight the nearest number of its group's grid.

    Args:
        weight: [N, K].
        grid: What to round to.
        group_size: Columns of a group; the last one may have fewer.
        importance: [K], what a squared error in each column counts when a grid is fitted; None: all the same.
    """
    columns = weight.shape[1]
    codes, fits = [], []
    for start in range(0, columns, group_size):
        block = weight[:, start : start + group_size]
        fit = grid.fit(block, None if importance is None else importance[start : start + group_size])
        fits.append(fit)
        codes.append(grid.nearest(block, fit))
    return grid.assemble(np.concatenate(codes, axis=1), fits, group_size, columns)
