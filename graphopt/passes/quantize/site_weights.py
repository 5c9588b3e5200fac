"""The weight of a linear site as rows of one output each, and the groups that divide them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt.analysis.linear_sites import LinearSite

Array = npt.NDArray[Any]


def table_group(group_size: int, site: LinearSite) -> int:
    """A group that divides rows, which a table's do since it is looked up by rows: this one, or the next power of two.

    Where none divides them, the group itself.
    """
    columns = site.outputs if site.role == "embed" else site.inputs
    if not group_size or columns % group_size == 0:
        return group_size
    power = 1 << (group_size.bit_length() - 1)
    while power > 8 and columns % power:
        power //= 2
    return power if power > 8 else group_size


def weight_rows(site: LinearSite) -> npt.NDArray[np.float32]:
    """The weight of a site [outputs, inputs]; of an embedding as it is."""
    assert site.weight.const_value is not None
    array = site.weight.const_value.numpy()
    return np.ascontiguousarray(array.T if _turned(site) else array, dtype=np.float32)


def as_stored(site: LinearSite, rows: npt.NDArray[np.float32], dtype: npt.DTypeLike) -> Array:
    """What `weight_rows` gives, in the weight's own orientation."""
    return np.ascontiguousarray(rows.T if _turned(site) else rows).astype(dtype)


def _turned(site: LinearSite) -> bool:
    return site.role != "embed" and site.orientation == "in,out"
