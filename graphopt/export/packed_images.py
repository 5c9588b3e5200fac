"""Images of any sizes in one row of patches: what a vision tower needs to know of each patch, computed from the grids.

transformers computes these with loops over images, whose number of steps no trace holds, and takes them ready-made
under the names used here. Grids are int64 [images, 3]: frames, rows and columns of patches. Patches lie image after
image, in square blocks of `merge` × `merge`, as the tower merges them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from graphopt.export.dependencies import require

ATTENTION = "packed_flash"
"""Name of the attention implementation that `attending` chooses. With "flash" in it towers hand the whole row over
at once, together with where each image begins."""


def patch_facts(grid: Any, patches: Any, merge: int, window: int | None = None) -> dict[str, Any]:
    """The ready-made arguments of a vision tower for images (of one frame, unlike videos).

    Args:
        grid: int64 [images, 3].
        patches: Number of patches: the sum over images of rows · columns.
        merge: Side of the blocks, in patches.
        window: Side of the windows that some layers attend in, in blocks; None: they attend to whole images.

    Returns:
        position_ids: int64 [patches, 2], row and column of each patch.
        cu_seqlens: int32 [images + 1], where each image begins, and the end.
        max_seqlen: 1, which nothing reads.
        window_index: int64 [blocks], the blocks in the order of their windows.
        cu_window_seqlens: int32 [blocks + 1], for each block in this order the patch with which its window begins, and
            the end. Where windows begin, that is, often repeated: how many there are only a run knows.
    """
    torch = require("torch")
    place = torch.arange(patches, device=grid.device)
    ends = (grid[:, 1] * grid[:, 2]).cumsum(0)
    begins = torch.nn.functional.pad(ends, (1, 0))
    image = (place[:, None] >= ends[None, :]).sum(-1)
    within = place - begins[image]
    across = grid[image, 2] // merge
    block, inner = within // merge**2, within % merge**2
    row = block // across * merge + inner // merge
    column = block % across * merge + inner % merge
    facts = {
        "position_ids": torch.stack([row, column], -1),
        "cu_seqlens": begins.to(torch.int32),
        "max_seqlen": 1,
    }
    return facts if window is None else facts | _windows(grid, image, row, column, merge, window)


def _windows(grid: Any, image: Any, row: Any, column: Any, merge: int, window: int) -> dict[str, Any]:
    torch = require("torch")
    first = slice(None, None, merge**2)  # Of each block its first patch.
    image, row, column = image[first], row[first] // merge, column[first] // merge
    across = -(-(grid[:, 2] // merge) // window)
    windows = across * -(-(grid[:, 1] // merge) // window)
    before = torch.nn.functional.pad(windows.cumsum(0), (1, 0))
    number = before[image] + row // window * across[image] + column // window
    # Within a window blocks keep their order; no two have the same key.
    place = torch.arange(number.shape[0], device=grid.device)
    order = torch.argsort(number * number.shape[0] + place)
    ordered = number[order]
    begins = (ordered[None, :] < ordered[:, None]).sum(-1)
    end = torch.full_like(begins[:1], 0) + number.shape[0]
    return {
        "window_index": order,
        "cu_window_seqlens": (torch.cat([begins, end]) * merge**2).to(torch.int32),
        "max_window_seqlen": 1,
    }


@contextlib.contextmanager
def attending(config: Any) -> Iterator[None]:
    """While it lasts a vision tower with this configuration attends within each image, or window, by a mask."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _attention)
    before = config._attn_implementation
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before


def _attention(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Any = None,
    **_: Any,
) -> tuple[Any, None]:
    """softmax(scaling · query keyᵀ) value within each stretch.

    Args:
        module: Not used.
        query: [1, heads, patches, head size]; key and value likewise, with as many or fewer heads.
        key: See query.
        value: See query.
        attention_mask: Not used.
        scaling: Factor of the scores; None: 1 / √(head size).
        dropout: Not used.
        cu_seq_lens_q: Where stretches begin, in rising order, possibly repeated; first 0, last the end.

    Returns:
        [1, patches, heads, head size], and None in place of the weights.
    """
    torch = require("torch")
    mask = None
    if cu_seq_lens_q is not None:
        place = torch.arange(query.shape[2], device=query.device)
        # Two patches are in one stretch where as many have begun at the one as at the other.
        begun = (place[:, None] >= cu_seq_lens_q[None, :]).sum(-1)
        mask = (begun[:, None] == begun[None, :])[None, None]
    grouped = key.shape[1] != query.shape[1]
    result = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, mask, scale=scaling, enable_gqa=grouped
    )
    return result.transpose(1, 2), None
