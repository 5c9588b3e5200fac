"""GGUF's blocks as what ONNX Runtime's integer operators take.

Every type here is an affine grid on blocks along the last dimension: w = s·(q - z) + o with unsigned q, the middle z
of their range, a scale s and, in some types, an offset o for each block. The first term is a symmetric `MatMulNBits`,
whose integers need no zero points; the second is the sums of the input's blocks times the matrix of offsets.

| type | bits | block | s | q - z | o |
|---|---|---|---|---|---|
| Q4_0 | 4 | 32 | d | stored - 8 | – |
| Q4_1 | 4 | 32 | d | stored - 8 | 8·d + m |
| Q5_0 | 8 | 32 | d | stored - 16 | – |
| Q5_1 | 8 | 32 | d | stored - 16 | 16·d + m |
| Q8_0 | 8 | 32 | d | stored | – |
| Q4_K | 4 | 32 | d·scale | stored - 8 | 8·d·scale - dmin·min |
| Q5_K | 8 | 32 | d·scale | stored - 16 | 16·d·scale - dmin·min |
| Q6_K | 8 | 16 | d·scale | stored - 32 | – |

q, s and the terms of o are the stored ones, so that nothing is rounded but the sums.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.export.gguf.reader import CHUNK_BYTES, StoredTensor

Bytes = npt.NDArray[Any]
"""Of uint8; arithmetic on it doesn't say so to the type checker."""
Floats = npt.NDArray[Any]
"""Of float16 or float32."""


@dataclass(frozen=True)
class Grid:
    """The grid of a type.

    Attributes:
        bits: Of the integers that the operator stores.
        block: Weights along the last dimension that share a scale.
        middle: z; of the stored q, which `integers` moves by what the operator's own middle is higher.
        half: Whether the parts of the scales and offsets are float16; else float32.
        integers: The unsigned integers of stored blocks [n, bytes of a block]: [n, weights of a block], q as stored.
        scales: Their scales: [n, blocks of the grid in a stored one].
        minimums: What is added to s·q, or None: float16 where `half`, [n, blocks of the grid in a stored one].
    """

    bits: int
    block: int
    middle: int
    half: bool
    integers: Callable[[Bytes], Bytes]
    scales: Callable[[Bytes], Floats]
    minimums: Callable[[Bytes], Floats] | None = None


def _half(blocks: Bytes, at: int) -> Floats:
    return blocks[:, at : at + 2].copy().view(np.float16)


def _nibbles(packed: Bytes) -> Bytes:
    """The low halves of some bytes, then the high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def _fifth_bits(blocks: Bytes, at: int) -> Bytes:
    return np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little") << 4


def _signed(blocks: Bytes) -> Bytes:
    return blocks[:, 2:] ^ 128


def _k_parts(blocks: Bytes) -> tuple[Bytes, Bytes]:
    """The 6-bit scales and minimums of the eight sub-blocks of Q4_K and Q5_K."""
    low, middle, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([low & 63, (high & 15) | (low >> 6 << 4)], axis=1)
    minimums = np.concatenate([middle & 63, (high >> 4) | (middle >> 6 << 4)], axis=1)
    return scales, minimums


def _k_scales(blocks: Bytes) -> Floats:
    return _half(blocks, 0).astype(np.float32) * _k_parts(blocks)[0]


def _k_minimums(blocks: Bytes) -> Floats:
    return -_half(blocks, 2).astype(np.float32) * _k_parts(blocks)[1]


def _k_nibbles(packed: Bytes) -> Bytes:
    """128 bytes as 256 numbers: of each 32 bytes the low halves, then the high ones."""
    runs = packed.reshape(-1, 4, 1, 32)
    return np.concatenate([runs & 15, runs >> 4], axis=2).reshape(-1, 256)


def _q5_k(blocks: Bytes) -> Bytes:
    bits = np.arange(8, dtype=np.uint8).reshape(1, 8, 1)
    fifth: Bytes = (blocks[:, 16:48].reshape(-1, 1, 32) >> bits & 1) << 4
    whole: Bytes = _k_nibbles(blocks[:, 48:176]) | fifth.reshape(-1, 256)
    return whole


def _q6_k(blocks: Bytes) -> Bytes:
    low = blocks[:, :128].reshape(-1, 2, 1, 64)
    low = np.concatenate([low & 15, low >> 4], axis=2).reshape(-1, 2, 4, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    whole: Bytes = low | (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts & 3) << 4
    return whole.reshape(-1, 256)


def _q6_k_scales(blocks: Bytes) -> Floats:
    return _half(blocks, 208).astype(np.float32) * blocks[:, 192:208].view(np.int8)


GRIDS = {
    "Q4_0": Grid(4, 32, 8, True, lambda b: _nibbles(b[:, 2:]), lambda b: _half(b, 0)),
    "Q4_1": Grid(4, 32, 8, True, lambda b: _nibbles(b[:, 4:]), lambda b: _half(b, 0), lambda b: _half(b, 2)),
    "Q5_0": Grid(8, 32, 16, True, lambda b: _nibbles(b[:, 6:]) | _fifth_bits(b, 2), lambda b: _half(b, 0)),
    "Q5_1": Grid(
        8, 32, 16, True, lambda b: _nibbles(b[:, 8:]) | _fifth_bits(b, 4), lambda b: _half(b, 0), lambda b: _half(b, 2)
    ),
    "Q8_0": Grid(8, 32, 128, True, _signed, lambda b: _half(b, 0)),
    "Q4_K": Grid(4, 32, 8, False, lambda b: _k_nibbles(b[:, 16:]), _k_scales, _k_minimums),
    "Q5_K": Grid(8, 32, 16, False, _q5_k, _k_scales, _k_minimums),
    "Q6_K": Grid(8, 16, 32, False, _q6_k, _q6_k_scales),
}
"""By the name of the type; what isn't here is of no use to the integer operators and stays float."""


@dataclass(frozen=True)
class Rows:
    """Some rows of stored tensors of one type, in order: the output channels of a matrix, or an embedding.

    Attributes:
        parts: Stored tensors and which of their rows, one after the other.
    """

    parts: tuple[tuple[StoredTensor, npt.NDArray[np.int64]], ...]

    @property
    def grid(self) -> Grid:
        """The grid of their type."""
        return GRIDS[self.parts[0][0].type.name]

    @property
    def count(self) -> int:
        """How many rows."""
        return sum(len(rows) for _, rows in self.parts)

    @property
    def length(self) -> int:
        """Weights of a row."""
        return self.parts[0][0].shape[-1]

    def integers(self, name: str) -> ir.TensorProtocol:
        """The operator's integers: uint8 [rows, blocks, bytes of a block], of 4 bits the even ones in the low half."""
        grid, columns = self.grid, self.length // self.grid.block

        def packed(blocks: Bytes) -> Bytes:
            numbers: Bytes = grid.integers(blocks) + np.uint8(2 ** (grid.bits - 1) - grid.middle)
            if grid.bits == 4:
                numbers = numbers[:, 0::2] | numbers[:, 1::2] << 4
            return numbers

        return self._lazy(name, packed, ir.DataType.UINT8, (columns, grid.block * grid.bits // 8))

    def scales(self, name: str) -> ir.TensorProtocol:
        """s: [rows, blocks], float16 or float32."""
        kind = ir.DataType.FLOAT16 if self.grid.half else ir.DataType.FLOAT
        return self._lazy(name, self.grid.scales, kind, (self.length // self.grid.block,))

    def minimums(self, name: str) -> ir.TensorProtocol | None:
        """What is added to s·q: [rows, blocks], float16 or float32; None where the type has none."""
        if self.grid.minimums is None:
            return None
        kind = ir.DataType.FLOAT16 if self.grid.half else ir.DataType.FLOAT
        return self._lazy(name, self.grid.minimums, kind, (self.length // self.grid.block,))

    def _lazy(
        self, name: str, make: Callable[[Bytes], Any], dtype: ir.DataType, shape: tuple[int, ...]
    ) -> ir.TensorProtocol:
        def read() -> ir.TensorProtocol:
            made = np.empty((self.count, *shape), dtype.numpy())
            at = 0
            for stored, rows in self.parts:
                for taken in _runs(stored, rows):
                    blocks = taken.reshape(-1, stored.row_bytes * _weights(stored) // stored.shape[-1])
                    made[at : at + len(taken)] = make(blocks).reshape(len(taken), *shape)
                    at += len(taken)
            return ir.tensor(made, name=name)

        return ir.LazyTensor(read, dtype, ir.Shape((self.count, *shape)), name=name)


def _weights(stored: StoredTensor) -> int:
    """Weights of one stored block."""
    return 256 if stored.type.name.endswith("_K") else 32


def _runs(stored: StoredTensor, rows: npt.NDArray[np.int64]) -> Any:
    """The stored bytes of these rows, in runs of about `CHUNK_BYTES` of float32 values."""
    step = max(1, CHUNK_BYTES // (4 * stored.shape[-1]))
    ordered = bool((np.diff(rows) == 1).all())
    whole = None if ordered else stored.blocks()
    for start in range(0, len(rows), step):
        taken = rows[start : start + step]
        yield stored.blocks(int(taken[0]), int(taken[-1]) + 1) if whole is None else whole[taken]
