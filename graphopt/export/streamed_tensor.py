"""The cast of weights, block by block while they are written."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import onnx_ir as ir

from graphopt.errors import ModelError
from graphopt.graph.computed import identity, note_origin
from graphopt.graph.streamed import Array, StreamedTensor, transposed

if TYPE_CHECKING:
    from graphopt.export.weights import Weights

BLOCK_ELEMENTS = 1 << 18
"""Elements that are cast at once: few enough to stay in the processor's cache, enough that the calls cost nothing."""
FLOATING = {
    ir.DataType.DOUBLE,
    ir.DataType.FLOAT,
    ir.DataType.FLOAT16,
    ir.DataType.BFLOAT16,
    ir.DataType.FLOAT8E4M3FN,
    ir.DataType.FLOAT8E4M3FNUZ,
    ir.DataType.FLOAT8E5M2,
    ir.DataType.FLOAT8E5M2FNUZ,
}
TARGETS = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "float64": ir.DataType.DOUBLE,
}


def blocks_of(tensor: ir.TensorProtocol) -> Iterator[Array]:
    """The elements of any tensor in flat arrays of at most `BLOCK_ELEMENTS`, in C order."""
    pieces = tensor.blocks() if isinstance(tensor, StreamedTensor) else iter((tensor.numpy(),))
    for piece in pieces:
        flat = piece.reshape(-1)
        for start in range(0, flat.size, BLOCK_ELEMENTS):
            yield flat[start : start + BLOCK_ELEMENTS]


def cast(weights: Weights, dtype: str) -> Weights:
    """The weights with their floating-point tensors in another type, each one cast when it is read.

    Rounding is to the nearest, ties to even. Integers and booleans stay as they are.

    Args:
        weights: Any weights.
        dtype: "float32", "float16", "bfloat16" or "float64".

    Raises:
        ModelError: When a tensor is read that has finite numbers too large for the type.
    """
    target = TARGETS[dtype]
    return CastWeights(weights, lambda _: target)


def cast_tensor(tensor: ir.TensorProtocol, dtype: ir.DataType) -> ir.TensorProtocol:
    """A floating-point tensor in another type, cast when it is read; the tensor itself where nothing changes."""
    if tensor.dtype == dtype or tensor.dtype not in FLOATING:
        return tensor
    name = tensor.name or "a tensor"
    result = StreamedTensor(
        lambda: (_rounded(block, dtype, name) for block in blocks_of(tensor)),
        dtype,
        ir.Shape(tensor.shape.numpy()),
        name,
        moved=lambda order: cast_tensor(transposed(tensor, order), dtype),
    )
    note_origin(result, ("cast", dtype, identity(tensor)))
    return result


class CastWeights:
    """Weights whose floating-point tensors have the types that a function gives for their names."""

    def __init__(self, weights: Weights, dtype: Callable[[str], ir.DataType]) -> None:
        self._weights, self._dtype = weights, dtype
        # One object for one tensor, so that what the checkpoint ties is written once.
        self._made: dict[tuple[int, ir.DataType], tuple[ir.TensorProtocol, ir.TensorProtocol]] = {}

    def names(self) -> Collection[str]:
        """The names of the weights."""
        return self._weights.names()

    def tensor(self, name: str) -> ir.TensorProtocol:
        """The weight of this name, cast when it is read."""
        source, dtype = self._weights.tensor(name), self._dtype(name)
        kept = self._made.get((id(source), dtype))
        if kept is None:
            kept = self._made[id(source), dtype] = (source, cast_tensor(source, dtype))
        return kept[1]


def _rounded(block: Array, dtype: ir.DataType, name: str) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
        result = block.astype(dtype.numpy())
    exponent = _EXPONENT.get(dtype)
    # All bits of the exponent are set in infinities and NaN only; asking for this is quicker than isfinite.
    if exponent is not None and result.size and ((result.view(np.uint16) & exponent) == exponent).any():
        beyond = np.isfinite(block) & ~np.isfinite(result)
        if beyond.any():
            largest = float(np.abs(block[beyond].astype(np.float64)).max())
            limit = float(ml_dtypes.finfo(dtype.numpy()).max)
            raise ModelError(
                f"the weight {name} has the value {largest:.6g}, and {dtype.name.lower()} ends at {limit:.6g}; "
                "export it in float32"
            )
    return result


_EXPONENT = {ir.DataType.FLOAT16: np.uint16(0x7C00), ir.DataType.BFLOAT16: np.uint16(0x7F80)}
