"""Indices of a few bits as bytes and back: a row of them is one stream of bits, the lowest bit of each first."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

WIDEST = 16
"""Bits of the widest index."""


def packed_size(count: int, bits: int) -> int:
    """Bytes of a row of `count` indices."""
    return (count * bits + 7) // 8


def pack_indices(indices: npt.ArrayLike, bits: int) -> npt.NDArray[np.uint8]:
    """Pack rows of indices without gaps: index i of a row lies in bits [i · bits, (i + 1) · bits) of its bytes.

    Args:
        indices: [..., Q], each at least 0 and below 2^bits.
        bits: 1 to 16.

    Returns:
        [..., ceil(Q · bits / 8)]; the bits left over at the end of a row are 0.

    Raises:
        ValueError: Bits out of range, or an index that doesn't fit.
    """
    _check(bits)
    array = np.asarray(indices)
    if array.size and (array.min() < 0 or array.max() >> bits):
        raise ValueError(f"indices from {array.min()} to {array.max()} don't fit {bits} bits")
    spread = (array.astype(np.uint16)[..., None] >> np.arange(bits, dtype=np.uint16)) & np.uint16(1)
    rows = spread.astype(np.uint8).reshape(*array.shape[:-1], array.shape[-1] * bits)
    return np.packbits(rows, axis=-1, bitorder="little")


def unpack_indices(packed: npt.NDArray[np.uint8], bits: int, count: int) -> npt.NDArray[np.uint16]:
    """The `count` indices of each row, [..., count], of what `pack_indices` made.

    Raises:
        ValueError: Bits out of range, or rows of another size than `count` indices take.
    """
    _check(bits)
    if packed.shape[-1] != packed_size(count, bits):
        raise ValueError(
            f"{count} indices of {bits} bits take {packed_size(count, bits)} bytes, not {packed.shape[-1]}"
        )
    spread = np.unpackbits(packed, axis=-1, count=count * bits, bitorder="little")
    digits: npt.NDArray[Any] = spread.reshape(*packed.shape[:-1], count, bits).astype(np.uint16)
    found: npt.NDArray[np.uint16] = np.bitwise_or.reduce(digits << np.arange(bits, dtype=np.uint16), axis=-1)
    return found


def _check(bits: int) -> None:
    if not 1 <= bits <= WIDEST:
        raise ValueError(f"indices have 1 to {WIDEST} bits, not {bits}")
