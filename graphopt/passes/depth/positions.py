"""Orders in which branches go by their position alone: the baseline that every score must beat."""

from __future__ import annotations

from typing import Literal

Position = Literal["last", "first", "uniform", "alternate", "symmetric"]


def by_position(position: Position, size: int, count: int) -> list[int]:
    """Which of `size` places in a row go where `count` do, in order.

    - "last": the last ones (Reassessing Layer Pruning in LLMs: New Insights and Methods).
    - "first": the first ones, as a check: the lower layers are the ones to keep.
    - "uniform": spread evenly, the first and last place spared (Accelerating Inference in Large Language Models with a
      Unified Layer Skipping Strategy).
    - "alternate": every other one, from the last place down, and then those between, from there too.
    - "symmetric": the middle, so that as many stay at the bottom as at the top.

    The last two are of On the Effect of Dropping Layers of Pre-trained Transformer Models.

    Raises:
        ValueError: There are fewer than `count`.
    """
    if not 0 <= count <= size:
        raise ValueError(f"{count} can't go of {size}")
    match position:
        case "last":
            chosen = range(size - count, size)
        case "first":
            chosen = range(count)
        case "symmetric":
            start = (size - count + 1) // 2
            chosen = range(start, start + count)
        case "alternate":
            down = list(range(size - 2, -1, -2))
            return sorted([*down, *(p for p in range(size - 1, -1, -1) if p not in down)][:count])
        case "uniform":
            inner = max(size - 2, count)
            offset = (size - inner) // 2
            return [offset + (2 * k + 1) * inner // (2 * count) for k in range(count)]
    return list(chosen)
