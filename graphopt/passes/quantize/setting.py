"""How one weight is quantized: the options of `quantize-weights`, which a site may have of its own."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from graphopt.passes.quantize.adadim import round_along_better_axis
from graphopt.passes.quantize.compensation import LowRank, low_rank
from graphopt.passes.quantize.finequant import group_size_by_range
from graphopt.passes.quantize.gptq import Order
from graphopt.passes.quantize.grid_names import make_grid
from graphopt.passes.quantize.grids import Grid
from graphopt.passes.quantize.higgs import round_higgs
from graphopt.passes.quantize.quantized_weight import QuantizedWeight
from graphopt.passes.quantize.roundings import Rounding, quantize

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Groups = Literal["fixed", "range", "axis"]
Compensation = Literal["none", "lorc", "eora"]
HIGGS = "higgs"
"""The name of the grid of vectors on rotated weights, which has a rounding of its own."""


@dataclasses.dataclass(frozen=True)
class Rounded:
    """A quantized weight, and the branch of low rank that takes some of its error; None: there is none."""

    weight: QuantizedWeight
    branch: LowRank | None = None

    def dequantized(self) -> Floats:
        """The weight that the model computes with, float32 [N, K]."""
        found = self.weight.dequantized()
        return found if self.branch is None else found + self.branch.matrix


@dataclasses.dataclass(frozen=True)
class Setting:
    """See the options of `QuantizeWeights`, whose names these are."""

    bits: int = 4
    group_size: int = 32
    grid: str = "int"
    symmetric: bool = True
    floats: bool = False
    search: bool = True
    groups: Groups = "fixed"
    rounding: Rounding = "nearest"
    order: Order = "groups"
    damping: float = 0.01
    weighed: bool = False
    outliers: float = 0.0
    compensation: Compensation = "none"
    rank: int = 32
    scale_group: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"weights have 2 to 8 bits, not {self.bits}")
        if self.group_size < 0 or self.group_size % 8:
            raise ValueError(f"group_size must be a multiple of 8, or 0 for whole rows, not {self.group_size}")
        for name, kinds in (
            ("rounding", Rounding), ("order", Order), ("groups", Groups), ("compensation", Compensation),
        ):  # fmt: skip
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(f"{name} is one of {', '.join(get_args(kinds))}, not {getattr(self, name)!r}")
        if not 0 <= self.outliers < 0.05:
            raise ValueError(f"outliers are a share of the weights below 0.05, not {self.outliers}")
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, not {self.rank}")
        if self.grid == HIGGS and (self.rounding not in ("nearest", "gptq") or self.outliers or self.groups != "fixed"):
            raise ValueError(
                "the grid higgs has one code for several weights: rounding is nearest or gptq, without more"
            )
        if self.groups == "axis" and (self.rounding != "nearest" or self.outliers):
            raise ValueError("groups by axis are rounded to nearest, without outliers")
        if self.scale_group < 0 or self.scale_group % 8:
            raise ValueError(f"scale_group must be a multiple of 8, or 0, not {self.scale_group}")
        if self.scale_group and self.grid != HIGGS:
            raise ValueError("scale_group is for the grid higgs; others have group_size")
        if self.grid == HIGGS and self.order == "activation":
            raise ValueError("the grid higgs has one code for several weights, which order activation would part")
        if self.grid != HIGGS:
            self.made()

    def made(self) -> Grid:
        """The grid."""
        return make_grid(self.grid, self.bits, self.symmetric, self.floats, self.search)

    @property
    def calibrated(self) -> bool:
        """Whether it looks at data."""
        return self.rounding != "nearest" or self.compensation == "eora" or self.weighed

    def with_options(self, options: Mapping[str, Any]) -> Setting:
        """This setting with some options changed.

        Raises:
            ValueError: One isn't known, or makes no sense.
        """
        known = {field.name for field in dataclasses.fields(self)}
        if unknown := sorted(set(options) - known):
            raise ValueError(f"a site has no option {unknown[0]!r}; it has {', '.join(sorted(known))}")
        return dataclasses.replace(self, **options)

    def round(self, weight: Floats, hessian: Array | None = None) -> Rounded:
        """Round a weight.

        Args:
            weight: [N, K].
            hessian: [K, K], the second moments of its inputs, where the setting is `calibrated`.

        Raises:
            ValueError: The weight isn't finite, or the Hessian is missing or doesn't fit.
        """
        rounded = self._rounded(weight, hessian)
        if self.compensation == "none":
            return Rounded(rounded)
        by = hessian if self.compensation == "eora" else None
        return Rounded(rounded, low_rank(weight - rounded.dequantized(), self.rank, by))

    def _rounded(self, weight: Floats, hessian: Array | None) -> QuantizedWeight:
        group = self.group_size or weight.shape[1]
        if self.grid == HIGGS:
            if not np.isfinite(weight).all():
                raise ValueError("the weight has numbers that aren't finite")
            # Vectors of four numbers at 3 bits take half an hour for a small decoder, for 13 % of the error.
            width = {2: 4, 3: 2, 4: 2}.get(self.bits, 1)
            by = hessian if self.rounding == "gptq" else None
            return round_higgs(
                weight,
                self.bits,
                width,
                self.scale_group or None,
                search=bool(self.scale_group),
                hessian=by,
                damping=self.damping,
                order=self.order,
            )
        if self.groups == "range":
            group = group_size_by_range(weight)
        importance = None if hessian is None or not self.weighed else np.asarray(np.diag(hessian), np.float32)
        one = functools.partial(
            quantize,
            rounding=self.rounding,
            hessian=hessian,
            damping=self.damping,
            order=self.order,
            outliers=self.outliers,
        )
        if self.groups != "axis":
            return one(weight, self.made(), group, importance=importance)
        return round_along_better_axis(weight, self.made(), group, importance)
