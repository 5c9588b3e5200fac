"""Tensors that are computed piece by piece while they are written, so that not even one of them need be in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[Any]
Blocks = Callable[[], Iterator[Array]]

PIECE_ELEMENTS = 1 << 22
"""Elements of a transposed tensor that are made at once: enough that more than a few bytes are read of each row."""

TILE = 128
"""Rows and columns that are transposed at once."""


class StreamedTensor(ir.LazyTensor):
    """A tensor of which a function gives the consecutive pieces, in C order, each time that it is read.

    Written to a file (`tofile`) it needs the memory of one piece; `numpy` puts the pieces into one array.

    Attributes:
        blocks: Gives the pieces: arrays of any shape that make up the tensor when laid end to end.
        moved: Gives the tensor transposed, from the permutation of its axes; None where no way is better than to put
            the tensor together first.
    """

    __slots__ = ("blocks", "moved")

    def __init__(
        self,
        blocks: Blocks,
        dtype: ir.DataType,
        shape: ir.Shape,
        name: str | None = None,
        *,
        moved: Callable[[Sequence[int]], ir.TensorProtocol] | None = None,
    ) -> None:
        """Make it of the arrays, all of the type `dtype`, that `blocks` gives; `shape` is known in full."""
        super().__init__(self._whole, dtype, shape, name=name)
        self.blocks, self.moved = blocks, moved

    def _whole(self) -> ir.TensorProtocol:
        array: Array | None = None
        filled = 0
        for block in self.blocks():
            if block.size == self.size:  # The only one.
                array = block.reshape(self.shape.numpy())
                break
            if array is None:
                array = np.empty(self.size, dtype=self.dtype.numpy())
            array[filled : filled + block.size] = block.reshape(-1)
            filled += block.size
        if array is None:
            array = np.empty(self.size, dtype=self.dtype.numpy())
        return ir.Tensor(array.reshape(self.shape.numpy()), dtype=self.dtype, name=self.name)

    def tofile(self, file: Any) -> None:
        """Write the bytes, little-endian, to an open file, piece by piece."""
        for block in self.blocks():
            ir.Tensor(contiguous(block), dtype=self.dtype).tofile(file)


def transposed(tensor: ir.TensorProtocol, permutation: Sequence[int]) -> ir.TensorProtocol:
    """A tensor with its axes in another order, as `numpy.transpose` orders them.

    Reading it takes no memory where the tensor lies in a file, and that of the tensor itself where it is computed.
    """
    order = tuple(permutation)
    if isinstance(tensor, StreamedTensor) and tensor.moved is not None:
        return tensor.moved(order)
    sizes = tensor.shape.numpy()
    shape = ir.Shape([sizes[axis] for axis in order])

    def blocks() -> Iterator[Array]:
        view = tensor.numpy().transpose(order)
        # Several elements in a byte can't be cut anywhere.
        yield from strips(view) if tensor.dtype.bitwidth >= 8 else (contiguous(view),)

    return StreamedTensor(blocks, tensor.dtype, shape, tensor.name)


def strips(array: Array) -> Iterator[Array]:
    """An array, which may be a view of any layout, cut along its first axis into contiguous pieces."""
    if array.ndim == 0:
        yield array
        return
    step = max(1, PIECE_ELEMENTS // max(1, math.prod(array.shape[1:])))
    for start in range(0, array.shape[0], step):
        yield contiguous(array[start : start + step])


def contiguous(array: Array) -> Array:
    """An array in C order, as `numpy.ascontiguousarray` makes it, three times as fast where it was transposed.

    It goes tile by tile, so that what is read of one row is still in the cache when its neighbours are wanted.
    """
    if array.ndim < 2:
        return np.ascontiguousarray(array).reshape(array.shape)
    last = array.ndim - 1
    near = min(range(array.ndim), key=lambda axis: abs(array.strides[axis]) if array.shape[axis] > 1 else math.inf)
    if array.flags.c_contiguous or near == last:
        return np.ascontiguousarray(array)
    made = np.empty(array.shape, array.dtype)
    # Types that NumPy doesn't know are copied one by one, whole numbers of their size at once.
    form = f"u{array.itemsize}" if array.itemsize in (1, 2, 4, 8) else array.dtype
    source, target = array.view(form), made.view(form)
    place = [slice(None)] * array.ndim
    for i in range(0, array.shape[near], TILE):
        for j in range(0, array.shape[last], TILE):
            place[near], place[last] = slice(i, i + TILE), slice(j, j + TILE)
            target[tuple(place)] = source[tuple(place)]
    return made
