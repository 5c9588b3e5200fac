"""How a product with a weight in blocks rounds what it reads: by the error that this adds, and by measured speed."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.choices import TOKEN_ROWS
from graphopt.analysis.linear_sites import LinearSite
from graphopt.analysis.profile import MARGIN, Profile
from graphopt.calibration.extreme_rows import ExtremeRows
from graphopt.calibration.request import Request
from graphopt.calibration.stages import Stage
from graphopt.calibration.statistics import Rows
from graphopt.passes.quantize.quantized_weight import QuantizedWeight
from graphopt.passes.quantize.setting import Rounded
from graphopt.passes.quantize.site_weights import weight_rows
from graphopt.runtime_ops.block_products import Inputs

Floats = npt.NDArray[np.float32]

AUTO = "auto"
LEVELS = (AUTO, 4, 0)
CHOICE = "nbits-inputs"
"""What a target profile knows of it."""
SMALL, RARE = 0.05, 0.25
"""Relative errors that rounding inputs to 8 bits may have whatever the weight's own is: on a sample of rows, and on
those with the largest outliers. On a decoder of 135 M parameters with weights of 8 bits, whose products had up to
these, level 4 gave a perplexity of 23.03 and inputs in 8 bits twice 23.05."""
SAMPLED, EXTREME = 64, 16
"""Rows that are looked at: a sample, and those whose largest number stands out most."""
OUTPUTS = 2048
"""Outputs of a weight by which its errors are told, at most about so many."""
_TOP = 127
_SAID: dict[Inputs, str] = {
    "int8": "inputs in 8 bits", "int8x2": "inputs in 8 bits twice", "float32": "inputs in float32",
}  # fmt: skip
_LEVEL_BITS = 4
"""Bits of the weights that have a kernel of usable speed for inputs in float32."""


@dataclasses.dataclass(frozen=True)
class ActivationErrors:
    """Relative errors of a product [rows, N] by its roots of mean squares over rows.

    Attributes:
        inputs: Of rounding inputs to 8 bits in blocks: |(Q(x) − x) Ŵᵀ| / |x Ŵᵀ| for each row x.
        weight: Of rounding the weight: |x (Ŵ − W)ᵀ| / |x Wᵀ|.
        limit: What `inputs` may be whatever `weight` is.
    """

    inputs: float
    weight: float

    limit: float = SMALL

    @property
    def excess(self) -> float:
        """The error of 8 bits over what they may have: as much as the weight's, and up to `limit` in any case."""
        return self.inputs / max(self.weight, self.limit)

    @property
    def acceptable(self) -> bool:
        """Whether 8 bits are accurate enough."""
        return self.excess <= 1


def rounded_inputs(rows: Floats, block: int) -> Floats:
    """Rows [R, K] as `MatMulNBits` reads them with `accuracy_level` 4: signed 8 bits with a scale for each block."""
    padded = np.pad(rows, ((0, 0), (0, -rows.shape[1] % block)))
    blocks = padded.reshape(len(rows), -1, block)
    scales = np.abs(blocks).max(axis=2, keepdims=True) / _TOP
    codes = np.rint(np.divide(blocks, scales, out=np.zeros_like(blocks), where=scales > 0))
    made: Floats = (codes * scales).reshape(padded.shape)[:, : rows.shape[1]]
    return made


def activation_errors(
    rows: Floats, weight: Floats, rounded: Floats, block: int, limit: float = SMALL
) -> ActivationErrors:
    """The errors on some rows.

    Args:
        rows: [R, K].
        weight: [N, K], before it was rounded.
        rounded: [N, K], after it.
        block: Neighbouring inputs that share a scale.
        limit: See `ActivationErrors`.
    """
    inputs = _relative((rounded_inputs(rows, block) - rows) @ rounded.T, rows @ rounded.T)
    return ActivationErrors(inputs, _relative(rows @ (rounded - weight).T, rows @ weight.T), limit)


class ActivationLevels:
    """What the products of a pass make of their inputs.

    Args:
        level: "auto", or 4 (8 bits) or 0 (float32) for all.
        profile: What was measured of the target.
    """

    def __init__(self, level: int | str, profile: Profile | None) -> None:
        self._level, self._profile = level, profile
        self._rows: dict[ir.Value, list[tuple[Floats, float]]] = {}
        self._errors: dict[ir.Node, ActivationErrors] = {}
        self._kept: set[ir.Value] = set()

    def requests(self, site: LinearSite) -> list[Request]:
        """What is to be seen of what a site reads."""
        if self._level != AUTO or site.x is None or site.role == "embed":
            return []
        if site.role == "head":
            self._kept.add(site.x)
        return [Request(site.x, Rows(SAMPLED)), Request(site.x, ExtremeRows(EXTREME))]

    def see(self, stage: Stage) -> None:
        """Take the rows that a stage has."""
        for request, summary in stage.summaries.items():
            if isinstance(request.statistic, Rows | ExtremeRows):
                limit = SMALL if isinstance(request.statistic, Rows) else RARE
                self._rows.setdefault(request.value, []).extend((rows, limit) for rows in summary.arrays.values())

    def forget(self) -> None:
        """Forget the rows of the stage, but for heads, which may be rounded later."""
        self._rows = {value: rows for value, rows in self._rows.items() if value in self._kept}

    def waiting(self, site: LinearSite) -> bool:
        """Whether rows of a site were seen, but not yet what it is rounded to."""
        return site.x is not None and bool(self._rows.get(site.x)) and site.node not in self._errors

    def measure(self, site: LinearSite, rounded: Rounded, block: int | None) -> None:
        """Find the errors of a site whose rows were seen, while its weight is still the original one."""
        if block is None or not self.waiting(site):
            return
        step = -(-rounded.weight.rows // OUTPUTS)
        numbers = some_rows(rounded.weight, step).dequantized()
        if rounded.branch is not None:
            numbers = numbers + rounded.branch.b[::step] @ rounded.branch.a
        errors = self.errors(site, weight_rows(site)[::step], numbers, block)
        if errors is not None:
            self._errors[site.node] = errors

    def errors(self, site: LinearSite, weight: Floats, rounded: Floats, block: int) -> ActivationErrors | None:
        """The largest errors on the rows that were seen of what a site reads; None: none were.

        Args:
            site: The site.
            weight: Its weight, or some outputs of it, [N, K].
            rounded: The same after rounding.
            block: Neighbouring inputs that share a scale.
        """
        rows_seen = () if site.x is None else self._rows.get(site.x, ())
        found = [activation_errors(rows, weight, rounded, block, limit) for rows, limit in rows_seen]
        return max(found, key=lambda one: one.excess, default=None)

    def chosen(self, sites: Sequence[LinearSite], bits: int, block: int | None) -> tuple[Inputs, str]:
        """What the product with the weights of some sites makes of its inputs, and what the report says of it."""
        if self._level != AUTO or block is None:
            return ("float32" if self._level == 0 else "int8"), ""
        columns, outputs = sites[0].inputs, sum(site.outputs for site in sites)
        found = [self._errors[site.node] for site in sites if site.node in self._errors]
        errors = max(found, key=lambda one: one.excess, default=None)
        inputs = fastest_inputs(errors, bits, columns % block == 0, round(math.sqrt(columns * outputs)), self._profile)
        if inputs == "int8" and (errors is None or errors.acceptable):
            return inputs, ""
        if errors is None or errors.acceptable:
            return inputs, f"; {_SAID[inputs]}, which is faster on this target"
        lost = f"8 bits would lose {errors.inputs:.2%} where the weight loses {errors.weight:.2%}"
        return inputs, f"; {_SAID[inputs]}: {lost}"


def fastest_inputs(
    errors: ActivationErrors | None, bits: int, whole: bool, width: int, profile: Profile | None
) -> Inputs:
    """What a product makes of its inputs: the fastest that is accurate enough.

    8 bits are the fastest where nothing was measured. Twice 8 bits, or float32 with weights of 4 bits, are accurate; of
    these the one is taken that takes less time, the mean over usual numbers of tokens; without a profile float32, which
    isn't slower than 8 bits twice from 16 tokens on.

    Args:
        errors: What 8 bits lose; None: not known.
        bits: Of the weight.
        whole: Whether its rows end with a block, which 8 bits twice need.
        width: The root of inputs times outputs.
        profile: What was measured of the target.
    """
    possible: dict[Inputs, bool] = {"float32": bits == _LEVEL_BITS, "int8x2": whole and bits > 2}
    exact = [name for name, can in possible.items() if can]
    if not exact:
        return "int8"
    # The profile is of weights of 4 bits.
    known = profile if bits == _LEVEL_BITS else None
    best = min(exact, key=lambda name: _time(known, name, exact[0], width))
    if errors is not None and not errors.acceptable:
        return best
    return best if _time(known, best, "int8", width) < 1 - MARGIN else "int8"


def some_rows(weight: QuantizedWeight, step: int) -> QuantizedWeight:
    """Every `step`-th output of a weight of integers."""
    arrays = {name: getattr(weight, name) for name in ("codes", "scales", "zero_points", "offsets")}
    return dataclasses.replace(weight, **{name: a[::step] for name, a in arrays.items() if a is not None})


def _time(profile: Profile | None, name: str, over: str, width: int) -> float:
    """CPU time over that of another one, the mean over usual numbers of tokens; as listed where it isn't known."""
    if name == over or profile is None:
        return 1.0
    points = itertools.product(TOKEN_ROWS, profile.threads)
    ratios = [profile.ratio(CHOICE, name, over, rows, width, threads) for rows, threads in points]
    known = [ratio for ratio in ratios if ratio is not None]
    return math.exp(sum(map(math.log, known)) / len(known)) if known else 1.0


def _relative(error: npt.NDArray[Any], product: npt.NDArray[Any]) -> float:
    squares = np.square(product, dtype=np.float64).sum(axis=1)
    lost = np.square(error, dtype=np.float64).sum(axis=1)
    return float(np.sqrt(np.mean(lost[squares > 0] / squares[squares > 0]))) if (squares > 0).any() else 0.0
