"""Activations that are carried from one piece of a model to the next, in memory or, above a budget, in files."""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt.errors import InputDataError

Array = npt.NDArray[Any]


class Carried:
    """Arrays by sample and name.

    Args:
        budget_bytes: What they may take in memory; further ones are written to a temporary folder and mapped.

    Attributes:
        peak_bytes: The most bytes that were held at once, in memory and in files together.
    """

    def __init__(self, budget_bytes: int) -> None:
        self._budget = budget_bytes
        self._held: dict[int, dict[str, Array | _Filed]] = {}
        self._in_memory = 0
        self._all = 0
        self.peak_bytes = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._files = 0

    def put(self, sample: int, name: str, array: Array) -> None:
        """Keep an array, in place of the one of this sample and name if there is one.

        Raises:
            InputDataError: The disk is full.
        """
        self.drop(sample, name)
        self._all += array.nbytes
        self.peak_bytes = max(self.peak_bytes, self._all)
        if self._in_memory + array.nbytes <= self._budget or array.dtype == object or array.size == 0:
            self._in_memory += array.nbytes
            self._held.setdefault(sample, {})[name] = array
        else:
            self._held.setdefault(sample, {})[name] = self._write(array)

    def get(self, sample: int, name: str) -> Array:
        """The array; don't write into it."""
        held = self._held[sample][name]
        return held.array() if isinstance(held, _Filed) else held

    def names(self, sample: int) -> list[str]:
        """What is kept of a sample."""
        return list(self._held.get(sample, ()))

    def drop(self, sample: int, name: str) -> None:
        """Forget an array, if it is kept."""
        held = self._held.get(sample, {}).pop(name, None)
        if held is None:
            return
        self._all -= held.nbytes
        if isinstance(held, _Filed):
            held.path.unlink(missing_ok=True)
        else:
            self._in_memory -= held.nbytes

    def keep(self, sample: int, names: Collection[str]) -> None:
        """Forget everything of a sample but these."""
        for name in self.names(sample):
            if name not in names:
                self.drop(sample, name)

    def close(self) -> None:
        """Forget everything and remove the files."""
        self._held.clear()
        self._in_memory = self._all = 0
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _write(self, array: Array) -> _Filed:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="graphopt-", ignore_cleanup_errors=True)
        self._files += 1
        path = Path(self._folder.name) / str(self._files)
        try:
            np.ascontiguousarray(array).reshape(-1).view(np.uint8).tofile(path)
        except OSError as error:
            raise InputDataError(
                f"Activations can't be kept in {path.parent} ({error.strerror}); free disk space there, set TMPDIR to "
                "another folder, or calibrate with fewer samples."
            ) from error
        return _Filed(path, array.dtype, array.shape, array.nbytes)


class _Filed:
    """An array in a file of its own."""

    def __init__(self, path: Path, dtype: np.dtype[Any], shape: tuple[int, ...], nbytes: int) -> None:
        self.path, self.dtype, self.shape, self.nbytes = path, dtype, shape, nbytes

    def array(self) -> Array:
        """The array, mapped."""
        mapped = np.memmap(self.path, dtype=np.uint8, mode="r")
        return np.asarray(mapped).view(self.dtype).reshape(self.shape)
