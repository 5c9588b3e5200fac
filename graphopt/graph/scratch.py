"""A file for tensors that are dear to make and together too large for memory."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import mmap
import os
import tempfile
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

SMALL_BYTES = 1 << 14
"""Tensors of fewer bytes stay in memory."""


_MAPPINGS: weakref.WeakValueDictionary[str, mmap.mmap] = weakref.WeakValueDictionary()
"""The newest mapping of each file, as long as an array needs it."""


@dataclasses.dataclass(frozen=True)
class Mapped:
    """An array in the file of a `Scratch`: what another process needs to read it there, as long as that file lives.

    Attributes:
        path: The file.
        offset: Where it begins, in bytes.
        length: How long it is, in bytes.
        dtype: Its element type.
        shape: Its shape.
    """

    path: str
    offset: int
    length: int
    dtype: ir.DataType
    shape: tuple[int, ...]

    def array(self) -> npt.NDArray[Any]:
        """The array, memory-mapped, by one mapping of the file with others: each takes one of the files that a process
        may have open."""
        if self.dtype.bitwidth < 8:
            folder, name = os.path.split(self.path)
            place = (name, self.offset, self.length, self.dtype)
            return ir.ExternalTensor(*place, shape=ir.Shape(self.shape), name="", base_dir=folder).numpy()
        mapping = _MAPPINGS.get(self.path)
        if mapping is None or len(mapping) < self.offset + self.length:
            with open(self.path, "rb") as file:
                mapping = _MAPPINGS[self.path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        numbers = np.frombuffer(mapping, self.dtype.numpy(), math.prod(self.shape), self.offset)
        return numbers.reshape(self.shape)


class Scratch:
    """Puts tensors into one temporary file and gives them back memory-mapped.

    The file lies where `tempfile` puts such files (`TMPDIR`) and lives as long as one of its tensors.
    """

    def __init__(self) -> None:
        self._path = ""
        self._size = 0

    def keep(self, array: npt.NDArray[Any], name: str, dtype: ir.DataType | None = None) -> ir.TensorProtocol:
        """The array as a tensor.

        Args:
            array: In C order; not needed any longer.
            name: The tensor's name.
            dtype: Its element type where NumPy's doesn't tell.
        """
        tensor = ir.Tensor(np.ascontiguousarray(array), dtype=dtype, name=name)
        return tensor if tensor.nbytes < SMALL_BYTES else self._written(tensor)

    def array(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The array, memory-mapped where it is large."""
        found = self.shared(array)
        return found.array() if isinstance(found, Mapped) else found

    def shared(self, array: npt.NDArray[Any]) -> Mapped | npt.NDArray[Any]:
        """Where the array lies, for other processes too; itself where it is small, or of strings."""
        if array.nbytes < SMALL_BYTES or array.dtype.kind in "OSU":
            return array
        kept = self._written(ir.Tensor(np.ascontiguousarray(array)))
        return Mapped(str(kept.path), kept.offset or 0, kept.nbytes, kept.dtype, tuple(array.shape))

    def _written(self, tensor: ir.Tensor[Any]) -> ir.ExternalTensor:
        if not self._path:
            handle, self._path = tempfile.mkstemp(prefix="graphopt-", suffix=".data")
            os.close(handle)
            weakref.finalize(self, _remove, self._path)
        self._size += -self._size % 64
        with open(self._path, "r+b") as file:
            file.seek(self._size)
            tensor.tofile(file)
        kept = ir.ExternalTensor(
            os.path.basename(self._path),
            self._size,
            tensor.nbytes,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=tensor.name or "",
            base_dir=os.path.dirname(self._path),
        )
        kept.meta["graphopt.scratch"] = self
        self._size += tensor.nbytes
        return kept


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)
