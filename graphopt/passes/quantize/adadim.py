"""AdaDim: groups along the inputs or along the outputs of a weight, whichever loses less."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from graphopt.passes.quantize.grids import Grid
from graphopt.passes.quantize.quantized_weight import QuantizedWeight
from graphopt.passes.quantize.roundings import round_to_nearest

Floats = npt.NDArray[np.float32]
Rounding = Callable[[Floats, Grid, int, Floats | None], QuantizedWeight]
"""A weight, a grid, the size of its groups and the importance of its columns; such as `round_to_nearest`."""


def round_along_better_axis(
    weight: Floats,
    grid: Grid,
    group_size: int,
    importance: Floats | None = None,
    second_moments: Floats | None = None,
    rounding: Rounding = round_to_nearest,
) -> QuantizedWeight:
    """Round a weight with groups in its rows and with groups in its columns, and keep what has the smaller error.

    An input whose weights are large widens the range of all groups along the inputs that it lies in; with groups along
    the outputs each input has groups of its own. Paper: "Rethinking Channel
    Dimensions to Isolate Outliers for Low-bit Weight Quantization of Large Language Models". There the error is that of
    a layer's output on a few texts, which is what `second_moments` gives.

    Args:
        weight: [N, K].
        grid: What to round to.
        group_size: Columns of a group, or rows.
        importance: [K], what a squared error in each column counts. Groups along the outputs lie in one column each.
        second_moments: [K, K], XᵀX of the inputs: the error is that of X Wᵀ. None: the weight's own, with importance.
        rounding: Which code each weight gets.

    Returns:
        `transposed` where groups along the outputs are better.
    """
    along_inputs = rounding(weight, grid, group_size, importance)
    turned = np.ascontiguousarray(weight.T)
    along_outputs = dataclasses.replace(rounding(turned, grid, group_size, None), transposed=True)

    def error(rounded: QuantizedWeight) -> float:
        off = rounded.dequantized() - weight
        if second_moments is not None:
            return float(np.sum((off @ second_moments) * off, dtype=np.float64))
        return float(np.sum(off**2 if importance is None else off**2 * importance, dtype=np.float64))

    return along_outputs if error(along_outputs) < error(along_inputs) else along_inputs
