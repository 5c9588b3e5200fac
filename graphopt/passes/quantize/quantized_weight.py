"""A weight matrix in a few bits: what every grid and rounding makes, and what every packing writes."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt.passes.quantize.rotations import hadamard

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Outliers:
    """Single weights that keep their precision, as a sparse matrix.

    Attributes:
        rows: Row of each, ascending, int32.
        columns: Column of each, ascending within a row, int32.
        values: What is *added* to what the codes stand for at that place, float32.
    """

    rows: npt.NDArray[np.int32]
    columns: npt.NDArray[np.int32]
    values: npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """A weight [N, K] of N outputs and K inputs. With g = k // group_size,

        w[n, k] = scales[n, g] · level(codes[n, k]) + offsets[n, g]

    where level(c) is c itself, or an entry of the codebook that the group selects. Vectors of `width` numbers share a
    code where the entries of `levels` are vectors.

    Attributes:
        codes: uint8 (uint16 above 8 bits) [N, ceil(K / width)], from 0 to 2^bits - 1.
        bits: Bits of a code.
        group_size: Columns that share a scale; K or more: one scale for each row.
        columns: K.
        scales: float32 [N, G], G = ceil(K / group_size).
        zero_points: uint8 [N, G], or None. Where there are such, offsets are -scales · zero_points.
        offsets: float32 [N, G], or None: none but those of the zero points. Never both.
        levels: None: a code is its own level. Else float32 [C, 2^bits, width].
        selectors: uint8 [N, G], which of the C codebooks a group has; None: all have the first.
        outliers: What is added to single weights.
        hadamard: 0, or the number of neighbouring columns that were rotated by an orthonormal Hadamard matrix H before
            they were rounded, so that x must be rotated alike: W xᵀ = (W Hᵀ)(H xᵀ).
        transposed: All of the above is of Wᵀ, whose rows are the inputs: groups lie within an input and go along the
            outputs. `dequantized` alone gives W.
    """

    codes: Array
    bits: int
    group_size: int
    columns: int
    scales: npt.NDArray[np.float32]
    zero_points: npt.NDArray[np.uint8] | None = None
    offsets: npt.NDArray[np.float32] | None = None
    levels: npt.NDArray[np.float32] | None = None
    selectors: npt.NDArray[np.uint8] | None = None
    outliers: Outliers | None = None
    hadamard: int = 0
    transposed: bool = False

    @property
    def rows(self) -> int:
        """N."""
        return int(self.codes.shape[0])

    @property
    def width(self) -> int:
        """Numbers that one code stands for."""
        return 1 if self.levels is None else int(self.levels.shape[-1])

    @property
    def symmetric(self) -> bool:
        """Whether all groups are integers around the middle of the range: no offsets, or zero points of 2^(bits-1)."""
        middle = 1 << (self.bits - 1)
        return self.levels is None and self.zero_points is not None and bool((self.zero_points == middle).all())

    def group_of_columns(self) -> npt.NDArray[np.int64]:
        """The group of each column, [K]."""
        return np.arange(self.columns) // self.group_size

    def numbers(self) -> npt.NDArray[np.float32]:
        """What the codes stand for, float32 [N, K], without the rotation taken back."""
        group = self.group_of_columns()
        if self.levels is None:
            level = self.codes.astype(np.float32)
        elif self.selectors is None:
            level = self.levels[0][self.codes].reshape(self.rows, -1)[:, : self.columns]
        else:
            chosen = self.selectors[:, group[:: self.width]]
            level = self.levels[chosen, self.codes].reshape(self.rows, -1)[:, : self.columns]
        offsets = self.offsets
        if self.zero_points is not None:
            offsets = -self.scales * self.zero_points.astype(np.float32)
        found = level * self.scales[:, group]
        if offsets is not None:
            found += offsets[:, group]
        if self.outliers is not None:
            np.add.at(found, (self.outliers.rows, self.outliers.columns), self.outliers.values)
        return found.astype(np.float32, copy=False)

    def dequantized(self) -> npt.NDArray[np.float32]:
        """The weight that the model computes with, float32 [N, K], in the basis of the original one.

        Where it is `transposed`, N is the number of columns here and K that of rows.
        """
        found = self.numbers()
        if self.hadamard:
            blocks = found.reshape(self.rows, -1, self.hadamard)
            found = np.asarray((blocks @ hadamard(self.hadamard)).reshape(found.shape), np.float32)
        return found.T if self.transposed else found
