"""What a rounding that looks at data leaves of the error of rounding to nearest, from a few rows of each weight."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphopt.analysis.linear_sites import LinearSite
from graphopt.calibration.calibration import Calibration
from graphopt.calibration.request import Request
from graphopt.calibration.statistics import SecondMoment
from graphopt.passes.quantize.product_times import nearest
from graphopt.passes.quantize.roundings import objective
from graphopt.passes.quantize.setting import Setting
from graphopt.passes.quantize.site_weights import weight_rows
from graphopt.passes.quantize.token_weights import TokensOf

ROWS = 64
"""Rows of a weight that are rounded: each is rounded by itself, so that they are what the whole weight would have."""


def rounding_gains(
    model: ir.Model,
    sites: Sequence[LinearSite],
    setting: Setting,
    calibration: Calibration,
    weights: TokensOf,
) -> dict[str, float]:
    """tr(E H Eᵀ) of a rounding over that of rounding to nearest, by name of the weight; H: second moments of inputs.

    Args:
        model: The model.
        sites: Those that may be rounded with data.
        setting: The rounding, in bits and groups that stand for all.
        calibration: The data.
        weights: Of the tokens.
    """
    requests: dict[Request, list[LinearSite]] = {}
    for site in sites:
        if site.x is not None:
            requests.setdefault(Request(site.x, SecondMoment(), weights.of(site)), []).append(site)
    found: dict[str, float] = {}
    for stage in calibration.stages(model, list(requests), grain="site"):
        for request, summary in stage.summaries.items():
            for site in requests[request]:
                rows = weight_rows(site)
                some = np.ascontiguousarray(rows[:: max(1, len(rows) // ROWS)])
                plain = objective(some, nearest(setting).round(some).weight, summary.array)
                better = objective(some, setting.round(some, summary.array).weight, summary.array)
                found[site.weight.name or ""] = better / plain if plain > 0 else 1.0
    return found
