"""How one weight is quantized: the options of `quantize-weights`, which a site may have of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, get_args

from graphopt.passes.quantize.gptq import Order
from graphopt.passes.quantize.grid_names import make_grid
from graphopt.passes.quantize.grids import Grid
from graphopt.passes.quantize.roundings import Rounding


@dataclasses.dataclass(frozen=True)
class Setting:
    """See the options of `QuantizeWeights`, whose names these are."""

    bits: int = 4
    group_size: int = 32
    grid: str = "int"
    symmetric: bool = True
    floats: bool = False
    search: bool = True
    rounding: Rounding = "nearest"
    order: Order = "activation"
    damping: float = 0.01
    outliers: float = 0.0

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"weights have 2 to 8 bits, not {self.bits}")
        if self.group_size < 0 or self.group_size % 8:
            raise ValueError(f"group_size must be a multiple of 8, or 0 for whole rows, not {self.group_size}")
        if self.rounding not in get_args(Rounding):
            raise ValueError(f"rounding is one of {', '.join(get_args(Rounding))}, not {self.rounding!r}")
        if self.order not in get_args(Order):
            raise ValueError(f"order is one of {', '.join(get_args(Order))}, not {self.order!r}")
        if not 0 <= self.outliers < 0.05:
            raise ValueError(f"outliers are a share of the weights below 0.05, not {self.outliers}")
        self.made()

    def made(self) -> Grid:
        """The grid."""
        return make_grid(self.grid, self.bits, self.symmetric, self.floats, self.search)

    @property
    def calibrated(self) -> bool:
        """Whether the rounding looks at data."""
        return self.rounding != "nearest"

    def with_options(self, options: Mapping[str, Any]) -> Setting:
        """This setting with some options changed.

        Raises:
            ValueError: One isn't known, or makes no sense.
        """
        known = {field.name for field in dataclasses.fields(self)}
        if unknown := sorted(set(options) - known):
            raise ValueError(f"a site has no option {unknown[0]!r}; it has {', '.join(sorted(known))}")
        return dataclasses.replace(self, **options)
