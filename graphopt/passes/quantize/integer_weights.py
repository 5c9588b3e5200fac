"""Weights as int8 for the integer kernels of the runtime: one scale for each output, zero point 0."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.graph.computed import identity, weight
from graphopt.passes.quantize.grids import Array, Fit, UniformGrid

_ROWS_BYTES = 1 << 24
"""Bytes of float32 that are quantized at once."""


@dataclasses.dataclass(frozen=True)
class SignedGrid(UniformGrid):
    """Integers from -(2^(bits-1) - 1) to 2^(bits-1) - 1 with a positive step: what integer kernels take as int8.

    The symmetric grid of the base reaches one step further on one side, with a negative step where that is the upper
    one; kernels that requantize their result want positive steps.
    """

    bits: int = 8

    def _ends(self, block: npt.NDArray[np.float32]) -> tuple[Array, Array]:
        far = np.abs(block).max(axis=1, initial=0)
        return far, far

    def _of_range(self, ends: tuple[Array, Array], below: float, above: float) -> Fit:
        middle = 1 << (self.bits - 1)
        wide = ends[1] * below / (middle - 1)
        step = np.where(wide > np.finfo(np.float32).tiny, wide, 1).astype(np.float32)
        return Fit(step, np.full(len(step), middle, np.uint8))

    def signed(self, numbers: npt.NDArray[np.float32], fit: Fit) -> npt.NDArray[np.int8]:
        """The nearest integers around 0."""
        last = (1 << (self.bits - 1)) - 1
        found: npt.NDArray[np.int8] = np.clip(np.rint(numbers / fit.scale[:, None]), -last, last).astype(np.int8)
        return found


@dataclasses.dataclass(frozen=True)
class IntegerWeight:
    """A weight in int8: w = codes · scales along the axis of the outputs.

    Attributes:
        codes: int8, of the shape that the kernel takes.
        scales: float32 [N], positive.
    """

    codes: ir.TensorProtocol
    scales: npt.NDArray[np.float32]


def quantized_matrix(
    tensor: ir.TensorProtocol,
    transposed: bool,
    grid: SignedGrid,
    factor: npt.NDArray[np.float32] | None = None,
) -> IntegerWeight:
    """A matrix as int8 [K, N] with a scale for each of the N outputs.

    Args:
        tensor: float32 [K, N], or [N, K] where `transposed`.
        transposed: Which of both it is.
        grid: The integers.
        factor: float32 [K], what the weights of each input are multiplied by first; 0 leaves an input out. None: ones.
    """
    shape = tensor.shape.numpy()
    outputs, inputs = (shape[0], shape[1]) if transposed else (shape[1], shape[0])
    scales = np.concatenate([grid.fit(rows).scale for _, rows in _rows(tensor, transposed, factor)])

    def compute() -> ir.TensorProtocol:
        codes = np.empty((inputs, outputs), np.int8)
        for start, rows in _rows(tensor, transposed, factor):
            stop = start + len(rows)
            codes[:, start:stop] = grid.signed(rows, Fit(scales[start:stop])).T
        return ir.tensor(codes)

    origin = ("int8 matrix", grid, transposed, None if factor is None else factor.tobytes(), identity(tensor))
    return IntegerWeight(weight(compute, ir.DataType.INT8, (inputs, outputs), origin=origin), scales)


def quantized_kernels(
    tensor: ir.TensorProtocol, grid: SignedGrid, least: npt.NDArray[np.float64] | None = None
) -> IntegerWeight:
    """The weight of a convolution, float32 [M, C / groups, ...], as int8 of the same shape, a scale for each of M.

    Args:
        tensor: The weight.
        grid: The integers.
        least: [M], what a scale must not be below, so that a bias in steps of it stays an int32.
    """
    shape = tensor.shape.numpy()

    def rows() -> npt.NDArray[np.float32]:
        return np.asarray(tensor.numpy(), np.float32).reshape(shape[0], -1)

    scales = grid.fit(rows()).scale
    if least is not None:
        scales = np.maximum(scales, least.astype(np.float32))

    def compute() -> ir.TensorProtocol:
        return ir.tensor(grid.signed(rows(), Fit(scales)).reshape(shape))

    origin = ("int8 kernels", grid, scales.tobytes(), identity(tensor))
    return IntegerWeight(weight(compute, ir.DataType.INT8, shape, origin=origin), scales)


def as_int4(codes: ir.TensorProtocol) -> ir.TensorProtocol:
    """int8 codes from -8 to 7 as int4, two to a byte where they are stored."""

    def compute() -> ir.TensorProtocol:
        return ir.tensor(codes.numpy().astype(ir.DataType.INT4.numpy()), dtype=ir.DataType.INT4)

    return weight(compute, ir.DataType.INT4, codes.shape.numpy(), origin=("int4", identity(codes)))


def quantized_rows(tensor: ir.TensorProtocol) -> tuple[ir.TensorProtocol, npt.NDArray[np.float32]]:
    """A table of embeddings, float32 [V, D], as uint8 around 128 and a scale for each row, float32 [V, 1]."""
    grid = SignedGrid(8)
    shape = tensor.shape.numpy()
    scales = np.concatenate([grid.fit(rows).scale for _, rows in _rows(tensor, True, None)])

    def compute() -> ir.TensorProtocol:
        codes = np.empty(shape, np.uint8)
        for start, rows in _rows(tensor, True, None):
            fit = Fit(scales[start : start + len(rows)])
            codes[start : start + len(rows)] = grid.signed(rows, fit).astype(np.int16) + 128
        return ir.tensor(codes)

    origin = ("uint8 rows", identity(tensor))
    return weight(compute, ir.DataType.UINT8, shape, origin=origin), scales[:, None]


def finite(tensor: ir.TensorProtocol) -> bool:
    """Whether all numbers of a weight are finite, so that a scale can be found."""
    array = tensor.numpy()
    return bool(np.isfinite(array).all()) if array.size else True


def _rows(
    tensor: ir.TensorProtocol, transposed: bool, factor: npt.NDArray[np.float32] | None
) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
    """Some outputs at a time: the number of the first one, and float32 [outputs, K]."""
    array = tensor.numpy() if transposed else tensor.numpy().T
    step = max(1, _ROWS_BYTES // max(1, 4 * array.shape[1]))
    for start in range(0, len(array), step):
        rows = np.ascontiguousarray(array[start : start + step], np.float32)
        yield start, rows if factor is None else rows * factor
