"""Whether two constants hold the same bytes, without reading more of them than needed and never all at once."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.graph.computed import origin_of

SAMPLE_BYTES = 4096
_PLACES = 8
_BLOCK_BYTES = 1 << 20


def sample(tensor: ir.TensorProtocol) -> Hashable:
    """What equal contents have in common: a digest of some of the bytes; of a computed tensor, what it is made of."""
    if isinstance(tensor, ir.LazyTensor):
        return origin_of(tensor) or id(tensor)
    data = _bytes(tensor)
    if data.size <= 2 * SAMPLE_BYTES:
        return hashlib.blake2b(data.tobytes()).digest()
    digest = hashlib.blake2b()
    piece = SAMPLE_BYTES // _PLACES
    # Equal layers differ in the middle where they differ at all: padding and zeros stand at the ends.
    for start in np.linspace(0, data.size - piece, 2 * _PLACES).astype(np.int64):
        digest.update(data[start : start + piece].tobytes())
    return digest.digest()


def same_content(a: ir.TensorProtocol, b: ir.TensorProtocol) -> bool:
    """Whether two tensors hold the same bytes; tensors computed later are equal if they are made of the same.

    Types and shapes aren't compared. Bytes are compared block by block, so that a comparison needs no memory.
    """
    if a is b:
        return True
    if isinstance(a, ir.LazyTensor) or isinstance(b, ir.LazyTensor):
        return origin_of(a) is not None and origin_of(a) == origin_of(b)
    if a.nbytes != b.nbytes:
        return False
    place = _place(a)
    if place is not None and place == _place(b):
        return True
    left, right = _bytes(a), _bytes(b)
    return left.size == right.size and all(
        np.array_equal(left[start : start + _BLOCK_BYTES], right[start : start + _BLOCK_BYTES])
        for start in range(0, left.size, _BLOCK_BYTES)
    )


def digest_of(tensor: ir.TensorProtocol) -> bytes:
    """A digest of the type, shape and contents of a tensor, read block by block."""
    found = hashlib.blake2b(f"{tensor.dtype.name} {tensor.shape.numpy()}".encode(), digest_size=16)
    data = _bytes(tensor)
    for start in range(0, data.size, _BLOCK_BYTES):
        found.update(data[start : start + _BLOCK_BYTES].data)
    return found.digest()


def _place(tensor: ir.TensorProtocol) -> tuple[str, int | None] | None:
    """Where a tensor lies on disk, if it does."""
    return (tensor.path, tensor.offset) if isinstance(tensor, ir.ExternalTensor) else None


def _bytes(tensor: ir.TensorProtocol) -> npt.NDArray[np.uint8]:
    """The contents as bytes; a view, where the tensor is mapped from a file."""
    return np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)
