"""FineQuant: how fine the groups of a weight must be, told from its numbers alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

GROUP_SIZES = (32, 64, 128, 256, 512, 1024)


def group_size_by_range(
    weight: npt.NDArray[np.float32], sizes: Sequence[int] = GROUP_SIZES, scale_bits: float = 16
) -> int:
    """The size of groups from which on finer ones cost more bits for scales than their smaller ranges save.

    Rounding errors are proportional to a group's range, so a range that is half as wide saves a bit of each weight: of
    all sizes, and whole rows, the one with the least

        log₂ sqrt(mean over weights of (range of its group)²) + scale_bits / size

    is taken. Normal weights get groups of 64; matrices with outliers finer ones, in which those are alone; even ones
    get whole rows. Paper: "FineQuant: Unlocking Efficiency with Fine-Grained Weight-Only Quantization for LLMs", whose
    heuristic likewise refines each matrix by its ranges alone; that they are weighed as bits is of this file.

    Args:
        weight: [N, K].
        sizes: What may be chosen besides K.
        scale_bits: Bits that a group takes beside its codes: 16 of a scale in half precision, and those of zero points.

    Returns:
        One of `sizes` below K, or K.
    """
    columns = int(weight.shape[1])
    best, least = columns, np.inf
    for size in sorted({*(size for size in sizes if size < columns), columns}, reverse=True):
        starts = np.arange(0, columns, size)
        ranges = np.maximum.reduceat(weight, starts, axis=1) - np.minimum.reduceat(weight, starts, axis=1)
        square = float(np.mean(np.square(ranges, dtype=np.float64) @ np.diff(np.append(starts, columns))) / columns)
        bits = 0.5 * np.log2(square) + scale_bits * len(starts) / columns if square > 0 else -np.inf
        if bits < least:
            best, least = size, float(bits)
    return best
