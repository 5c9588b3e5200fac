"""Constants that are computed when they are asked for: one at a time is in memory, and equal computations are known.

An `ir.LazyTensor` says nothing about its contents before they are computed, so two equal ones would be stored twice.
`computed` notes what was done and to which tensors: two tensors with the same note have the same contents.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.graph import streamed

_ORIGIN = "graphopt.origin"
LAZY_BYTES = 1 << 20
"""Weights of at least so many bytes are computed when they are saved (or read), so that one at a time is in memory."""
SMALL_BYTES = 1 << 16
"""Tensors up to this size are known by their contents, larger ones by where they are."""


def computed(
    compute: Callable[[], ir.TensorProtocol],
    dtype: ir.DataType,
    shape: Sequence[int],
    name: str | None = None,
    origin: tuple[Hashable, ...] | None = None,
) -> ir.LazyTensor:
    """A tensor that `compute` gives each time that it is asked for; nothing is kept.

    Args:
        compute: Makes the contents. What it reads must not change.
        dtype: The element type of the result.
        shape: The sizes of the result.
        name: The name of the tensor.
        origin: All that decides the contents: what is computed, and `identity` of each tensor that is read. None where
            the result isn't to be compared with others.
    """
    tensor = ir.LazyTensor(compute, dtype=dtype, shape=ir.Shape(shape), cache=False, name=name)
    if origin is not None:
        note_origin(tensor, origin)
    return tensor


def note_origin(tensor: ir.LazyTensor, origin: tuple[Hashable, ...]) -> None:
    """Note all that decides the contents of a tensor, as for `computed`."""
    tensor.meta[_ORIGIN] = origin


def weight(
    compute: Callable[[], ir.TensorProtocol],
    dtype: ir.DataType,
    shape: Sequence[int],
    name: str | None = None,
    origin: tuple[Hashable, ...] | None = None,
) -> ir.TensorProtocol:
    """What `compute` gives: now where it is small, else as `computed`, with the same arguments."""
    if math.prod(shape) * dtype.bitwidth / 8 < LAZY_BYTES:
        return compute()
    return computed(compute, dtype, shape, name, origin)


def transposed(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """A matrix with its axes exchanged."""

    def compute() -> ir.TensorProtocol:
        if tensor.nbytes >= LAZY_BYTES:
            return streamed.transposed(tensor, (1, 0))
        return ir.tensor(np.ascontiguousarray(tensor.numpy().T), dtype=tensor.dtype)

    return weight(compute, tensor.dtype, tensor.shape.numpy()[::-1], origin=("transposed", identity(tensor)))


def concatenated(tensors: Sequence[ir.TensorProtocol], axis: int) -> ir.TensorProtocol:
    """Tensors of one type, one behind the other along `axis`."""
    kept = tuple(tensors)
    shape = list(kept[0].shape.numpy())
    shape[axis] = sum(int(tensor.shape.numpy()[axis]) for tensor in kept)

    def compute() -> ir.TensorProtocol:
        array = np.concatenate([tensor.numpy() for tensor in kept], axis=axis)
        return ir.tensor(np.ascontiguousarray(array), dtype=kept[0].dtype)

    return weight(compute, kept[0].dtype, shape, origin=("concatenated", axis, *map(identity, kept)))


def columns(tensor: ir.TensorProtocol, start: int, stop: int) -> ir.TensorProtocol:
    """The part of a tensor from `start` to `stop` of its last axis."""

    def compute() -> ir.TensorProtocol:
        return ir.tensor(np.ascontiguousarray(tensor.numpy()[..., start:stop]), dtype=tensor.dtype)

    shape = [*tensor.shape.numpy()[:-1], stop - start]
    return weight(compute, tensor.dtype, shape, origin=("columns", start, stop, identity(tensor)))


def origin_of(tensor: ir.TensorProtocol) -> tuple[Hashable, ...] | None:
    """What a computed tensor was computed from: equal origins mean equal contents. None where it isn't known."""
    if not isinstance(tensor, ir.LazyTensor):
        return None
    origin: tuple[Hashable, ...] | None = tensor.meta.get(_ORIGIN)
    return origin


def identity(tensor: ir.TensorProtocol) -> tuple[Hashable, ...]:
    """What two tensors have in common only if their contents are equal, without reading large ones.

    Of tensors in memory it is the object, which therefore must be kept alive as long as the identity.
    """
    origin = origin_of(tensor)
    if origin is not None:
        return origin
    form = (tensor.dtype, tuple(tensor.shape.numpy()))
    if isinstance(tensor, ir.ExternalTensor):
        return ("file", tensor.path, tensor.offset, *form)
    if isinstance(tensor, ir.LazyTensor) or tensor.dtype == ir.DataType.STRING or tensor.nbytes > SMALL_BYTES:
        return ("object", id(tensor), *form)
    return ("bytes", hashlib.blake2b(np.ascontiguousarray(tensor.numpy()).tobytes()).digest(), *form)
