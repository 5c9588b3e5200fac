"""What a token's products take with each candidate of each group of weights."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphopt.analysis.linear_sites import LinearSite
from graphopt.analysis.profile import Profile
from graphopt.calibration.calibration import Calibration
from graphopt.passes.quantize.activation_level import AUTO, ActivationLevels, fastest_inputs
from graphopt.passes.quantize.packing import block_in_contrib
from graphopt.passes.quantize.product_times import Product, nearest, product_seconds
from graphopt.passes.quantize.setting import Setting
from graphopt.passes.quantize.site_weights import weight_rows
from graphopt.runtime_ops.block_products import Inputs

ROWS = 96
"""Rows of a weight by which errors are told."""


@dataclasses.dataclass(frozen=True)
class Latency:
    """Seconds of products at one token.

    Attributes:
        seconds: Of the products of each group with each of its candidates.
        floats: Of all products with float weights.
        kinds: How many products that differ by shape or kind were timed.
    """

    seconds: list[list[float]]
    floats: float
    kinds: int


def latency(
    model: ir.Model,
    groups: Sequence[Sequence[LinearSite]],
    candidates: Sequence[Sequence[Setting]],
    calibration: Calibration,
    profile: Profile | None,
) -> Latency:
    """Time the products of groups of sites, each with its candidates.

    What a product makes of its inputs is what `quantize-weights` will choose, by the rows that the float model's own
    products read.

    Args:
        model: The model.
        groups: Sites that get one candidate together; those of one group that read one value are one product.
        candidates: What each group may get.
        calibration: Data, the threads that count, and where times are kept.
        profile: What was measured of the target.
    """
    levels = ActivationLevels(AUTO, profile)
    requests = [request for sites in groups for site in sites for request in levels.requests(site)]
    for stage in calibration.stages(model, requests):
        levels.see(stage)
    written = [_products(sites) for sites in groups]
    floats = [[_product(sites) for sites in products] for products in written]
    kinds = [
        [[_quantized(sites, setting, levels, profile) for sites in products] for setting in settings]
        for products, settings in zip(written, candidates, strict=True)
    ]
    counts = Counter(one.shape for of_group in floats for one in of_group)
    every = [one for of_group in floats for one in of_group]
    every += [one for of_group in kinds for of_setting in of_group for one in of_setting]
    times = product_seconds({one: counts[one.shape] for one in every}, calibration.threads, calibration.cache)
    return Latency(
        [[math.fsum(times[one] for one in of_setting) for of_setting in of_group] for of_group in kinds],
        math.fsum(times[one] for of_group in floats for one in of_group),
        len(times),
    )


def _products(sites: Sequence[LinearSite]) -> list[list[LinearSite]]:
    """Sites that are written as one product. Rows of a table that are looked up take no time beside products."""
    found: dict[object, list[LinearSite]] = {}
    for site in sites:
        if site.role != "embed":
            found.setdefault(site.node if site.role == "head" or site.shared else site.x, []).append(site)
    return list(found.values())


def _product(sites: Sequence[LinearSite]) -> Product:
    dtype = sites[0].weight.dtype or ir.DataType.FLOAT
    return Product(sites[0].inputs, sum(site.outputs for site in sites), dtype=dtype)


def _quantized(
    sites: Sequence[LinearSite], setting: Setting, levels: ActivationLevels, profile: Profile | None
) -> Product:
    level = _level(sites, setting, levels, profile)
    return dataclasses.replace(_product(sites), setting=nearest(setting), level=level)


def _level(sites: Sequence[LinearSite], setting: Setting, levels: ActivationLevels, profile: Profile | None) -> Inputs:
    """What the product with the weights of some sites makes of its inputs."""
    errors, block = [], None
    for site in sites:
        rows = weight_rows(site)
        some = np.ascontiguousarray(rows[:: max(1, len(rows) // ROWS)])
        rounded = nearest(setting).round(some)
        block = block_in_contrib(rounded.weight)
        if block is None:
            return "int8"
        if (found := levels.errors(site, some, rounded.dequantized(), block)) is not None:
            errors.append(found)
    assert block is not None
    columns, outputs = sites[0].inputs, sum(site.outputs for site in sites)
    worst = max(errors, key=lambda one: one.excess, default=None)
    return fastest_inputs(worst, setting.bits, columns % block == 0, round(math.sqrt(columns * outputs)), profile)
