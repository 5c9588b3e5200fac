"""Where in a GGUF file the rows of a graph's weight come from, found by name or by content."""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.export.gguf.quantized import GRIDS, Rows
from graphopt.export.gguf.reader import StoredTensor
from graphopt.export.gguf.weights import GGUFWeights

_TOGETHER = 1 << 12
"""Rows that are compared at a time."""


class Origins:
    """Finds the stored rows that a weight of a graph is made of.

    A weight that is the parameter's own tensor under its name is taken for it; one that only goes by the name is
    compared. Any other, say one that an exporter has transposed and named anew or a pass has joined with its
    neighbours, is looked for by content: each of its rows must be a stored row, in all bits.

    Args:
        weights: The file's parameters.
    """

    def __init__(self, weights: GGUFWeights) -> None:
        self._weights = weights
        self._index: dict[int, dict[bytes, tuple[int, int]]] = {}
        self._stored: list[tuple[str, StoredTensor]] = []

    def find(self, value: ir.Value, transposed: bool) -> Rows | str:
        """The rows that a constant [N, K], or [K, N] where `transposed`, is made of; or why it is none of the file's.

        The parts of the result are of one type that has a grid, with whole blocks along K.
        """
        tensor = value.const_value
        assert tensor is not None
        shape = tuple(tensor.shape.numpy())
        named = self._by_name(value, shape, transposed)
        if named is not None:
            return named
        if tensor.dtype != ir.DataType.FLOAT:
            return f"it is {tensor.dtype.name.lower()}, where the file's values are compared as float32"
        array = tensor.numpy()
        return self._by_content(np.ascontiguousarray(array.T if transposed else array))

    def _by_name(self, value: ir.Value, shape: tuple[int, ...], transposed: bool) -> Rows | str | None:
        name = value.name or ""
        if transposed or name not in self._weights.names():
            return None
        tensor, parameter = value.const_value, self._weights.parameter(name)
        assert tensor is not None
        found = self._weights.stored(name)
        if found is None or shape != parameter.shape:
            return None
        stored, rows = found
        if stored.type.name not in GRIDS:
            return _no_grid(stored)
        if tensor is not self._weights.tensor(name) and not _equal(tensor, stored, rows):
            return None
        return Rows(((stored, rows),))

    def _by_content(self, array: npt.NDArray[Any]) -> Rows | str:
        """Match every row; runs of rows of one stored tensor become one part."""
        index = self._rows_of_length(array.shape[1])
        places = [index.get(_digest(row)) for row in array]
        if any(place is None for place in places):
            lost = sum(place is None for place in places)
            return (
                "it isn't in the file"
                if lost == len(places)
                else f"{lost} of its {len(places)} rows aren't in the file"
            )
        numbers = np.array(places, dtype=np.int64)
        cuts = np.flatnonzero(np.diff(numbers[:, 0])) + 1
        parts = [(self._stored[part[0, 0]][1], part[:, 1]) for part in np.split(numbers, cuts)]
        kinds = {stored.type.name for stored, _ in parts}
        for stored, _ in parts:
            if stored.type.name not in GRIDS:
                return _no_grid(stored)
        if len(kinds) > 1:
            return f"it is joined from rows of different types ({', '.join(sorted(kinds))})"
        return Rows(tuple(parts))

    def _rows_of_length(self, length: int) -> dict[bytes, tuple[int, int]]:
        """By its digest, the tensor (a number in `_stored`) and the row, of all rows of one length."""
        if length not in self._index:
            index: dict[bytes, tuple[int, int]] = {}
            for name in self._weights.names():
                for stored in self._weights.parameter(name).stored:
                    if len(stored.shape) != 2 or stored.shape[1] != length:
                        continue
                    self._stored.append((name, stored))
                    number, row = len(self._stored) - 1, 0
                    for chunk in stored.chunks():
                        for values in chunk:
                            index.setdefault(_digest(values), (number, row))
                            row += 1
            self._index[length] = index
        return self._index[length]


def _equal(tensor: ir.TensorProtocol, stored: StoredTensor, rows: npt.NDArray[np.int64]) -> bool:
    """Whether a weight consists of these stored rows, in all bits."""
    array = tensor.numpy()
    ordered = bool((np.diff(rows) == 1).all())
    values = None if ordered else stored.values()
    for start in range(0, len(rows), _TOGETHER):
        taken = rows[start : start + _TOGETHER]
        expected = stored.run(int(taken[0]), int(taken[-1]) + 1) if values is None else values[taken]
        if array[start : start + _TOGETHER].tobytes() != expected.tobytes():
            return False
    return True


def _no_grid(stored: StoredTensor) -> str:
    return f"it is stored as {stored.type.name}, which no integer operator takes without loss"


def _digest(row: npt.NDArray[Any]) -> bytes:
    return blake2b(row.tobytes(), digest_size=16).digest()
