"""Random block-quantized weights for tests, and what they stand for."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass
class Weight:
    """A weight as an operator's four inputs.

    Attributes:
        packed: uint8 [rows, blocks, bytes].
        scales: [rows, blocks].
        zero_points: Packed [rows, bytes], or empty.
        minimums: [rows, blocks], or empty.
        bits: Of a number.
    """

    packed: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray
    minimums: np.ndarray
    bits: int

    @property
    def inputs(self) -> list[Any]:
        """As a node takes them."""
        return [self.packed, self.scales, self.zero_points, self.minimums]

    def dense(self) -> np.ndarray:
        """The weight as float64 [rows, columns]."""
        rows, blocks, _ = self.packed.shape
        numbers = unpacked(self.packed.reshape(rows, -1), self.bits).reshape(rows, blocks, -1).astype(np.float64)
        zeros = np.full((rows, blocks), 0 if self.minimums.size else 2 ** (self.bits - 1))
        if self.zero_points.size:
            zeros = unpacked(self.zero_points, self.bits)[:, :blocks]
        added = self.minimums if self.minimums.size else np.zeros((rows, blocks))
        made = (numbers - zeros[..., None]) * self.scales[..., None].astype(np.float64) + added[..., None]
        return made.reshape(rows, -1)


def unpacked(packed: np.ndarray, bits: int) -> np.ndarray:
    """The numbers of rows of bytes, from the lowest bits up."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return (packed[..., None] >> shifts & (2**bits - 1)).reshape(packed.shape[0], -1)


def weight(
    rng: np.random.Generator,
    rows: int,
    columns: int,
    bits: int = 4,
    block_size: int = 32,
    *,
    zero_points: bool = False,
    minimums: bool = False,
    half: bool = False,
) -> Weight:
    """A random weight whose numbers are about as large as those of a trained one."""
    blocks = columns // block_size
    kind = np.float16 if half else np.float32
    zeros = rng.integers(0, 256, (rows, (blocks * bits + 7) // 8), dtype=np.uint8)
    return Weight(
        rng.integers(0, 256, (rows, blocks, block_size * bits // 8), dtype=np.uint8),
        (rng.uniform(0.5, 1.5, (rows, blocks)) * 0.3 / 2**bits).astype(kind),
        zeros if zero_points else np.zeros(0, np.uint8),
        rng.normal(0, 0.1, (rows, blocks)).astype(kind) if minimums else np.zeros(0, kind),
        bits,
    )


def rounded(x: np.ndarray, block_size: int, activation_bits: int) -> tuple[np.ndarray, float]:
    """Activations as a product takes them, and the largest step between two of their values."""
    most = np.float32(127 if activation_bits == 8 else 32512)
    blocks = x.astype(np.float32).reshape(*x.shape[:-1], -1, block_size)
    peaks = np.abs(blocks).max(-1, keepdims=True)
    inverse = np.divide(most, peaks, out=np.zeros_like(peaks), where=peaks > 0)
    made = np.rint(blocks * inverse) * (peaks / most).astype(np.float64)
    return made.reshape(x.shape), float((peaks / most).max(initial=0))
