"""Calibration data: what a data set is, and the one made of arrays (from an .npz file, or given)."""

from __future__ import annotations

import abc
import hashlib
import itertools
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.errors import InputDataError, UsageError

Array = npt.NDArray[Any]
Feeds: TypeAlias = dict[str, Array]
"""One array for each input of a model, by name."""


class Dataset(abc.ABC):
    """Samples that a model is run on, one after the other."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of samples (of feeds)."""

    @abc.abstractmethod
    def feeds(self, model: ir.Model) -> Iterator[Feeds]:
        """The inputs of `model` for each sample, in order, the same each time.

        Raises:
            InputDataError: The data doesn't fit the model; the message names the input and what it takes.
        """

    @property
    @abc.abstractmethod
    def fingerprint(self) -> str:
        """A digest of the contents, in hexadecimal: equal for equal data."""

    @property
    def description(self) -> str:
        """What it is, in a few words."""
        return counted(len(self), "sample")


class ArrayDataset(Dataset):
    """Arrays by the names of inputs, a set of them for each sample."""

    def __init__(self, feeds: Iterable[Mapping[str, Any]], name: str = "the calibration data") -> None:
        """Take them.

        Args:
            feeds: The samples, each with an array for every input; any iterable, which is read once and kept.
            name: What messages call it.

        Raises:
            UsageError: There is none, or one is no mapping.
        """
        self._name = name
        self._feeds: list[Feeds] = []
        for given in feeds:
            if not isinstance(given, Mapping):
                raise UsageError(
                    f"A sample of {name} must be a mapping from the names of inputs to arrays, not a "
                    f"{type(given).__name__}."
                )
            self._feeds.append({key: np.asarray(array) for key, array in given.items()})
        if not self._feeds:
            raise UsageError(f"There is no sample in {name}.")

    def __len__(self) -> int:
        """See the base."""
        return len(self._feeds)

    @property
    def fingerprint(self) -> str:
        """See the base."""
        parts = [part for feeds in self._feeds for key in sorted(feeds) for part in (key, feeds[key])]
        return digest("arrays", *parts)

    def feeds(self, model: ir.Model) -> Iterator[Feeds]:
        """See the base."""
        for feeds in self._feeds:
            yield checked(feeds, model, self._name)


class FirstSamples(Dataset):
    """The first feeds of another data set."""

    def __init__(self, data: Dataset, limit: int) -> None:
        """Take them: at most `limit` of `data`, at least one."""
        self._data, self._limit = data, max(limit, 1)

    def __len__(self) -> int:
        """See the base."""
        return min(len(self._data), self._limit)

    @property
    def fingerprint(self) -> str:
        """See the base."""
        return digest("first", str(self._limit), self._data.fingerprint)

    def feeds(self, model: ir.Model) -> Iterator[Feeds]:
        """See the base."""
        return itertools.islice(self._data.feeds(model), self._limit)


class BatchedDataset(Dataset):
    """Arrays by the names of inputs, each with all samples along its first axis, cut into batches."""

    def __init__(
        self,
        arrays: Mapping[str, Any],
        batch: int | None = None,
        limit: int | None = None,
        name: str = "the calibration data",
    ) -> None:
        """Take them.

        Args:
            arrays: An array [samples, ...] for each input.
            batch: Samples that are fed together; None: as many as the model's inputs declare, else 8.
            limit: Samples that are used at most; None: all.
            name: What messages call it.

        Raises:
            InputDataError: The numbers of samples differ, or there is none.
        """
        self._arrays = {key: np.asarray(array) for key, array in arrays.items()}
        self._name, self._batch = name, batch
        counts = {key: array.shape[0] if array.ndim else 0 for key, array in self._arrays.items()}
        if not counts or 0 in counts.values() or len(set(counts.values())) > 1:
            told = ", ".join(f"{key!r} {list(array.shape)}" for key, array in self._arrays.items()) or "nothing"
            raise InputDataError(f"In {name} the first axis of every array counts the samples, but it holds {told}.")
        self._samples = min(counts.values()) if limit is None else min(*counts.values(), limit)
        if limit is not None:
            self._arrays = {key: array[: self._samples] for key, array in self._arrays.items()}

    def __len__(self) -> int:
        """Number of samples (batches hold several)."""
        return self._samples

    @property
    def fingerprint(self) -> str:
        """See the base."""
        return digest("batched", str(self._batch), *(part for key in sorted(self._arrays) for part in self._of(key)))

    def _of(self, key: str) -> tuple[str, Array]:
        return key, self._arrays[key]

    def feeds(self, model: ir.Model) -> Iterator[Feeds]:
        """See the base; samples that fill no batch of a fixed size are left out."""
        fixed = {
            value.shape[0]
            for value in model.graph.inputs
            if value.name in self._arrays and value.shape is not None and len(value.shape) > 0
        }
        sizes = {size for size in fixed if isinstance(size, int) and size > 0}
        size = self._batch or (min(sizes) if sizes else 8)
        whole = self._samples - self._samples % size if sizes else self._samples
        if whole == 0:
            raise InputDataError(f"The model takes {size} samples at once, and {self._name} holds {self._samples}.")
        for begin in range(0, whole, size):
            yield checked({key: a[begin : begin + size] for key, a in self._arrays.items()}, model, self._name)


def load_arrays(path: str | os.PathLike[str], batch: int | None = None, limit: int | None = None) -> BatchedDataset:
    """Read an .npz file with an array [samples, ...] for each input, as `numpy.savez(path, **arrays)` writes it.

    Args:
        path: The file.
        batch: As for `BatchedDataset`.
        limit: Samples that are used at most; None: all.

    Raises:
        InputDataError: The file can't be read, or its arrays count different numbers of samples.
    """
    return BatchedDataset(read_arrays(path), batch, limit, str(path))


def read_arrays(path: str | os.PathLike[str]) -> Feeds:
    """The arrays of an .npz file by name.

    Raises:
        InputDataError: The file can't be read, or is none.
    """
    file = Path(path)
    try:
        if not zipfile.is_zipfile(file):  # numpy.load takes other files for pickled objects
            with file.open("rb"):
                raise InputDataError(f"{file} is not an .npz file; write it with numpy.savez.")
        with np.load(file, allow_pickle=False) as held:
            return {name: held[name] for name in held.files}
    except OSError as error:
        raise InputDataError(f"{file} can't be read: {error.strerror or error}.") from error
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputDataError(f"{file} can't be read as an .npz file of arrays ({error}).") from error


def checked(feeds: Mapping[str, Array], model: ir.Model, source: str) -> Feeds:
    """The feeds, which fit the model: names, element types, ranks and fixed sizes.

    Types that NumPy lacks (bfloat16, float8) may come as float32.

    Raises:
        InputDataError: They don't; the message names the input and what it takes.
    """
    inputs = {value.name or "": value for value in model.graph.inputs}
    if unknown := sorted(set(feeds) - set(inputs)):
        raise InputDataError(f"There is no input {unknown[0]!r}, which {source} holds; there are {_listed(inputs)}.")
    needed = [name for name, value in inputs.items() if not value.is_initializer()]
    if missing := sorted(set(needed) - set(feeds)):
        raise InputDataError(f"The input {missing[0]!r} is missing in {source}; the model needs {_listed(needed)}.")
    return {name: _fitting(inputs[name], array, source) for name, array in feeds.items()}


def _fitting(value: ir.Value, array: Array, source: str) -> Array:
    dtype = value.dtype
    if dtype is not None and dtype != ir.DataType.STRING and array.dtype != dtype.numpy():
        foreign = dtype.numpy().kind not in "fiub"
        if not (foreign and array.dtype == np.float32):
            raise InputDataError(
                f"The input {value.name!r} takes {dtype.numpy()}, but {source} holds {array.dtype}; convert the array."
            )
        array = array.astype(dtype.numpy())
    if value.shape is not None and not fits(value.shape, array.shape):
        takes = ", ".join(str(size) if isinstance(size, int) else "any" for size in value.shape)
        raise InputDataError(
            f"The input {value.name!r} takes the shape [{takes}], but {source} holds {list(array.shape)}."
        )
    return array


def fits(declared: ir.Shape, shape: Sequence[int]) -> bool:
    """Whether an array may have this shape."""
    return len(declared) == len(shape) and all(
        not isinstance(size, int) or size < 0 or size == found for size, found in zip(declared, shape, strict=True)
    )


def counted(number: int, what: str) -> str:
    """A number of things, in words."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def digest(*parts: str | bytes | Array) -> str:
    """A digest of texts and arrays (their types, shapes and contents) in this order."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, np.ndarray):
            head, body = f"{part.dtype.str} {part.dtype.name} {part.shape}".encode(), np.ascontiguousarray(part)
            if part.dtype == object:
                body = np.frombuffer(repr(part.tolist()).encode(), np.uint8)
            data = body.reshape(-1).view(np.uint8).tobytes()
        else:
            head, data = b"text", part.encode() if isinstance(part, str) else part
        found.update(f"{len(head)} {len(data)} ".encode() + head)
        found.update(data)
    return found.hexdigest()


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)
