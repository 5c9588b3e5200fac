"""Random nodes of CodebookMatMul, and the product that they stand for, in NumPy."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from graphopt.runtime_ops.codebook_matmul.packing import pack_indices

Arrays = dict[str, np.ndarray[Any, Any]]


@dataclasses.dataclass(frozen=True)
class Case:
    """The sizes of a node; `books` codebooks, selected by group where `select` says so, else by row of tiles."""

    rows: int
    columns: int
    bits: int = 4
    tile: tuple[int, int] = (1, 1)
    group_size: int = 32
    books: int = 1
    select: bool = False
    outliers: int = 0
    bias: bool = False
    activation_block: int = 0
    batch: tuple[int, ...] = (1,)
    dtype: type = np.float32
    scale_dtype: type = np.float32

    @property
    def attributes(self) -> dict[str, int]:
        """Of the node."""
        return {
            "columns": self.columns,
            "bits": self.bits,
            "group_size": self.group_size,
            "activation_block": self.activation_block,
        }

    def arrays(self, seed: int = 0) -> Arrays:
        """The inputs by name, in the operator's order, and beside them the indices before they are packed."""
        rng = np.random.default_rng(seed)
        r, c = self.tile
        tiles = (-(-self.rows // r), -(-self.columns // c))
        groups = -(-self.columns // self.group_size)
        loose = rng.integers(0, 1 << self.bits, tiles)
        books = tiles[0] if self.books < 0 else self.books
        pointers = np.sort(rng.integers(0, self.outliers + 1, self.rows + 1))
        pointers[0], pointers[-1] = 0, self.outliers
        none = np.zeros(0)
        return {
            "x": rng.standard_normal((*self.batch, self.columns)).astype(self.dtype),
            "indices": pack_indices(loose, self.bits),
            "codebooks": rng.standard_normal((books, 1 << self.bits, r, c)).astype(np.float32),
            "scales": (rng.random((self.rows, groups)) + 0.5).astype(self.scale_dtype),
            "selectors": (rng.integers(0, books, (tiles[0], groups)) if self.select else none).astype(np.uint8),
            "outlier_rows": (pointers if self.outliers else none).astype(np.int32),
            "outlier_columns": rng.integers(0, max(self.columns, 1), self.outliers).astype(np.int32),
            "outlier_values": rng.standard_normal(self.outliers).astype(np.float32),
            "bias": (rng.standard_normal(self.rows) if self.bias else none).astype(self.dtype),
            "loose": loose,
        }

    def inputs(self, seed: int = 0) -> list[np.ndarray[Any, Any]]:
        """The inputs of the node."""
        arrays = self.arrays(seed)
        return [array for name, array in arrays.items() if name != "loose"]

    def weights(self, arrays: Arrays) -> np.ndarray[Any, Any]:
        """The weights [rows, columns] in double precision."""
        tile_rows, tile_columns = arrays["loose"].shape
        column_of_tile = np.arange(tile_columns) * self.tile[1] // self.group_size
        if self.select:
            books = arrays["selectors"][:, column_of_tile].astype(np.int64)
        else:
            books = (np.arange(tile_rows) if len(arrays["codebooks"]) > 1 else np.zeros(tile_rows, np.int64))[:, None]
        tiles = arrays["codebooks"].astype(np.float64)[books, arrays["loose"]]
        whole = tiles.transpose(0, 2, 1, 3).reshape(tile_rows * self.tile[0], tile_columns * self.tile[1])
        found = whole[: self.rows, : self.columns]
        found = found * arrays["scales"].astype(np.float64)[:, np.arange(self.columns) // self.group_size]
        if self.outliers:
            of_row = np.repeat(np.arange(self.rows), np.diff(arrays["outlier_rows"]))
            np.add.at(found, (of_row, arrays["outlier_columns"]), arrays["outlier_values"])
        return found

    def product(self, arrays: Arrays) -> np.ndarray[Any, Any]:
        """What comes out, in double precision."""
        x = arrays["x"].astype(np.float64)
        if self.activation_block:
            x = quantized(arrays["x"].astype(np.float32), self.activation_block).astype(np.float64)
        made: np.ndarray[Any, Any] = x @ self.weights(arrays).T
        return made + arrays["bias"] if self.bias else made


def quantized(x: np.ndarray[Any, Any], block: int) -> np.ndarray[Any, Any]:
    """x with each `block` columns rounded to 8 bits."""
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % block)])
    blocks = padded.reshape(*x.shape[:-1], padded.shape[-1] // block, block)
    step = np.abs(blocks).max(-1, keepdims=True, initial=0) / np.float32(127)
    step[~np.isfinite(blocks).all(-1, keepdims=True)] = np.nan
    rounded = np.round(blocks / np.where(step == 0, np.float32(1), step)) * step
    made: np.ndarray[Any, Any] = rounded.reshape(padded.shape)[..., : x.shape[-1]]
    return made
