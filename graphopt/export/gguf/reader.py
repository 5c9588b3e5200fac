"""A GGUF file: its metadata and its table of tensors, whose data stay in the file until they are asked for.

The header is read by 60 lines of our own and not by `gguf.GGUFReader`, which makes a view of every token (3 s for a
vocabulary of 49,152 against 0.1 s), maps the file for good, and loops nearly for ever over the counts of a damaged one.
Types, block sizes and dequantization are the gguf package's.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt.errors import ModelError, UsageError
from graphopt.export.dependencies import require

VERSIONS = (2, 3)
CHUNK_BYTES = 16 << 20
"""Bytes of float32 values that are dequantized at a time, the intermediate arrays being a few times as large."""

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Metadata value types of fixed size, as struct calls them; 8 is a string and 9 an array."""
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a GGUF file holds it.

    Attributes:
        path: The file.
        name: Its name in the file.
        type: Its type (`gguf.GGMLQuantizationType`).
        shape: Its dimensions, the contiguous one last.
        offset: Where its data begin in the file, in bytes.
    """

    path: Path
    name: str
    type: Any
    shape: tuple[int, ...]
    offset: int

    @cached_property
    def rows(self) -> int:
        """Product of all dimensions but the last."""
        return prod(self.shape[:-1])

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of one row, which holds whole blocks."""
        block, size = require("gguf").GGML_QUANT_SIZES[self.type]
        return int(self.shape[-1] // block * size)

    @property
    def nbytes(self) -> int:
        """Bytes of all data."""
        return self.rows * self.row_bytes

    def blocks(self, start: int = 0, stop: int | None = None) -> npt.NDArray[np.uint8]:
        """The stored bytes of some rows: [rows, bytes of a row].

        Raises:
            ModelError: The file can't be read, or has become shorter.
        """
        count = (self.rows if stop is None else stop) - start
        try:
            data = np.fromfile(self.path, np.uint8, count * self.row_bytes, offset=self.offset + start * self.row_bytes)
        except OSError as error:
            raise ModelError(f"{self.path} can't be read: {error.strerror or error}.") from error
        if data.size != count * self.row_bytes:
            raise ModelError(f"{self.path} ends within {self.name}: it was changed while it was read.")
        return data.reshape(count, self.row_bytes)

    def run(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """The values of some rows, dequantized: [rows, last dimension]."""
        values: npt.NDArray[np.float32] = require("gguf.quants").dequantize(self.blocks(start, stop), self.type)
        return values

    def chunks(self) -> Iterator[npt.NDArray[np.float32]]:
        """The values, dequantized, as runs of rows [n, last dimension] of about `CHUNK_BYTES`."""
        step = max(1, CHUNK_BYTES // (4 * self.shape[-1]))
        for start in range(0, self.rows, step):
            yield self.run(start, min(self.rows, start + step))

    def values(self) -> npt.NDArray[np.float32]:
        """The values, dequantized: float32 of this tensor's shape."""
        values = np.empty((self.rows, self.shape[-1]), np.float32)
        start = 0
        for chunk in self.chunks():
            values[start : start + len(chunk)] = chunk
            start += len(chunk)
        return values.reshape(self.shape)


@dataclass(frozen=True)
class GGUFFile:
    """The header of a GGUF file.

    Attributes:
        path: The file.
        metadata: Its key-value pairs, without the arrays of strings, which are the tokenizer's.
        tensors: Its tensors by their names in the file.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]

    @property
    def architecture(self) -> str:
        """What llama.cpp calls the model's architecture."""
        return str(self.metadata["general.architecture"])

    def of_architecture(self, key: str) -> Any:
        """The value of a key that has the architecture as its prefix; None where there is none."""
        return self.metadata.get(f"{self.architecture}.{key}")


def read(path: Path) -> GGUFFile:
    """Read the header, and check that the file holds the data of every tensor.

    Raises:
        UsageError: No file, a part of a split model, or a tensor of a type that can't be dequantized.
        ModelError: Not GGUF, of an unknown version, damaged or truncated.
    """
    if not path.is_file():
        raise UsageError(f"there is no file {path}; give a .gguf file")
    if re.search(r"-\d{5}-of-\d{5}\.gguf$", path.name):
        raise _split(path)
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ModelError(f"{path} isn't a GGUF file: it doesn't begin with GGUF; download the model itself")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                cursor = _Cursor(mapped)
                try:
                    version, metadata, table = _header(cursor)
                except (struct.error, _EndError) as error:
                    raise ModelError(f"{path} is truncated within its header; download it again") from error
                except (UnicodeDecodeError, KeyError) as error:
                    raise ModelError(f"{path} has a damaged header; download it again") from error
                if version not in VERSIONS:
                    raise ModelError(
                        f"{path} is GGUF version {version}, where little-endian versions 2 and 3 are known; "
                        "convert it again with a present llama.cpp"
                    )
                header_bytes, size = cursor.at, len(mapped)
    except OSError as error:
        raise ModelError(f"{path} can't be read: {error.strerror or error}") from error
    if not isinstance(metadata.get("general.architecture"), str):
        raise ModelError(f"{path} doesn't say which architecture it holds (general.architecture)")
    if int(metadata.get("split.count", 0)) > 1:
        raise _split(path)
    alignment = int(metadata.get("general.alignment", 32)) or 32
    data = -(-header_bytes // alignment) * alignment
    tensors: dict[str, StoredTensor] = {}
    for name, dims, type_number, offset in table:
        tensor = StoredTensor(path, name, _type(path, name, type_number, dims), dims, data + offset)
        if tensor.offset + tensor.nbytes > size:
            raise ModelError(
                f"{path} is truncated: {name} takes the bytes {tensor.offset} to {tensor.offset + tensor.nbytes} of "
                f"{size}; download it again"
            )
        tensors[name] = tensor
    return GGUFFile(path, metadata, tensors)


def _split(path: Path) -> UsageError:
    return UsageError(f"{path} is one part of a split model; join them first with `llama-gguf-split --merge`")


def _type(path: Path, name: str, number: int, dims: tuple[int, ...]) -> Any:
    """The type of a tensor, of which one block is dequantized to see whether it can be."""
    gguf = require("gguf")
    try:
        kind = gguf.GGMLQuantizationType(number)
        block, size = gguf.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise UsageError(
            f"{path}: {name} is of the GGUF type {number}, which the installed gguf package doesn't know; update it"
        ) from None
    if kind not in _can_be_read:
        try:
            gguf.quants.dequantize(np.zeros((1, size), np.uint8), kind)
        except NotImplementedError:
            raise UsageError(
                f"{path}: {name} is of the type {kind.name}, which can't be dequantized; convert the model to another"
            ) from None
        _can_be_read.add(kind)
    if not dims or dims[-1] % block:
        raise ModelError(f"{path}: {name} has the dimensions {list(dims)}, which aren't whole blocks of {kind.name}")
    return kind


_can_be_read: set[Any] = set()


class _EndError(Exception):
    """The file ends where more was announced."""


class _Cursor:
    """Reads one thing after the other."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 4

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.data, self.at)
        self.at += struct.calcsize(f"<{code}")
        return value

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise _EndError
        taken = self.data[self.at : self.at + count]
        self.at += count
        return taken

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        """One value of the metadata; None for an array of strings, which is passed over."""
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.number(_SCALARS[kind])
        kind, count = self.number("I"), self.number("Q")
        if kind in _SCALARS:
            dtype = np.dtype(f"<{_SCALARS[kind]}") if kind != 7 else np.dtype(bool)
            return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
        for _ in range(count):
            if kind == _STRING:
                self.take(self.number("Q"))
            else:
                self.value(kind)
        return None


def _header(cursor: _Cursor) -> tuple[int, dict[str, Any], list[tuple[str, tuple[int, ...], int, int]]]:
    """The version, the metadata, and of each tensor its name, dimensions, type and offset in the data."""
    version = cursor.number("I")
    if version not in VERSIONS:
        return version, {}, []
    tensors, pairs = cursor.number("Q"), cursor.number("Q")
    metadata = {}
    for _ in range(pairs):
        key = cursor.text()
        value = cursor.value(cursor.number("I"))
        if value is not None:
            metadata[key] = value
    table = []
    for _ in range(tensors):
        name = cursor.text()
        dims = tuple(reversed([cursor.number("Q") for _ in range(cursor.number("I"))]))
        table.append((name, dims, cursor.number("I"), cursor.number("Q")))
    return version, metadata, table
