"""Weights made of other weights: computed at once where small, else when they are saved or read, one at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

LAZY_BYTES = 1 << 20


def transposed(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """A matrix with its axes exchanged."""
    rows, columns = tensor.shape.numpy()
    return made((columns, rows), tensor.dtype, lambda: np.ascontiguousarray(tensor.numpy().T))


def concatenated(tensors: Sequence[ir.TensorProtocol], axis: int) -> ir.TensorProtocol:
    """Tensors of one type, one behind the other along `axis`."""
    first, kept = tensors[0], tuple(tensors)
    dims = list(first.shape.numpy())
    dims[axis] = sum(int(tensor.shape.numpy()[axis]) for tensor in kept)
    return made(dims, first.dtype, lambda: np.concatenate([tensor.numpy() for tensor in kept], axis=axis))


def made(dims: Sequence[int], dtype: ir.DataType, compute: Callable[[], npt.NDArray[Any]]) -> ir.TensorProtocol:
    """The tensor that `compute` makes."""

    def tensor() -> ir.TensorProtocol:
        return ir.tensor(compute(), dtype=dtype)

    if math.prod(dims) * dtype.bitwidth / 8 < LAZY_BYTES:
        return tensor()
    return ir.LazyTensor(tensor, dtype=dtype, shape=ir.Shape(dims))
