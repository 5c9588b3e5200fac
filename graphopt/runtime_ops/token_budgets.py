"""How many tokens each layer's cache keeps of a budget, and which: by the attention that they got.

Every rule is the same choice. What a layer would lose next has a value, that grows along the layer; of the values of
all layers the smallest are kept, as many as the budget has. With T tokens in a layer, the k-th of them (from 0) in the
order in which they'd be kept, first those that always stay, then by falling attention a:

    uniform      k                              as many in every layer
    prefix       Σ_{i<k} a_i / Σ a              up to one share of its attention in every layer
    uncertainty  (k + 1/2 − minimum) / n        n: the fewest tokens that hold `share` of the layer's attention
    dynamic      −a_k / Σ a                     the tokens of most attention, whichever layer they are of

Attention is pooled over the rows of a batch and the heads of a layer after each was put in its order, as each keeps
tokens of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

Allocation = Literal["uniform", "prefix", "uncertainty", "dynamic"]
Array: TypeAlias = npt.NDArray[Any]


def budgets(
    scores: Sequence[Array],
    total: int,
    allocation: Allocation = "uniform",
    *,
    sinks: int = 0,
    recent: int = 0,
    minimum: int = 0,
    share: float = 0.9,
    most: float = 2.0,
) -> list[int]:
    """How many tokens each layer keeps.

    Args:
        scores: The attention that tokens got, of each layer [batch, heads, tokens]; none negative.
        total: Tokens of all layers together. What always stays isn't cut where it is more than that.
        allocation: The rule.
        sinks: The first tokens of a layer, which always stay.
        recent: The last tokens of a layer, which always stay.
        minimum: "uncertainty": tokens that a layer keeps at least, as far as the budget goes.
        share: "uncertainty": part of the attention.
        most: "dynamic": what a layer may keep at most, in parts of an even share of the budget.

    Returns:
        For each layer a number between its tokens that always stay and all of its tokens; together `total`, or as many
        as there may be.
    """
    lengths = [array.shape[-1] for array in scores]
    stay = [min(length, sinks + recent) for length in lengths]
    values = []
    for array, length, first in zip(scores, lengths, stay, strict=True):
        held, free = _ordered(array, sinks, recent)
        places = np.arange(first, length)
        whole = max(held + float(free.sum()), np.finfo(np.float64).tiny)
        if allocation == "uniform":
            value: Array = places.astype(np.float64)
        elif allocation == "prefix":
            value = (held + np.cumsum(free) - free) / whole
        elif allocation == "uncertainty":
            value = (places + 0.5 - minimum) / _needed(array, share)
        else:
            value = np.where(places < most * total / len(scores), -free / whole, np.inf)
        values.append(value)
    return [first + count for first, count in zip(stay, _smallest(values, total - sum(stay)), strict=True)]


def places(scores: Array, count: int, *, sinks: int = 0, recent: int = 0) -> npt.NDArray[np.int64]:
    """The places of the tokens that are kept [batch, heads, count], rising: of each row and head its first and last
    ones, and those of most attention.

    Args:
        scores: The attention that each token got, [batch, heads, tokens].
        count: How many are kept, `sinks` + `recent` at least where there are as many.
        sinks: First tokens that stay.
        recent: Last tokens that stay.
    """
    wanted = np.array(scores, dtype=np.float64)
    wanted[..., :sinks] = np.inf
    wanted[..., max(wanted.shape[-1] - recent, 0) :] = np.inf
    order = np.argsort(-wanted, axis=-1, kind="stable")[..., :count]
    return np.sort(order, axis=-1).astype(np.int64)


def by_chunks(scores: Array, chunk: int, *, sinks: int = 0, recent: int = 0) -> Array:
    """`scores` [batch, heads, tokens] with that of each token the mean of its chunk.

    A chunk is `chunk` tokens in a row, counted from behind the sinks, which then go or stay together (but for one that
    a budget cuts). The last one, before the recent tokens, may be shorter, which is why it is a mean and not a sum.
    """
    stop = scores.shape[-1] - recent
    starts = np.arange(sinks, max(stop, sinks), chunk)
    if chunk <= 1 or not len(starts):
        return scores
    sizes = np.diff(np.append(starts, stop))
    # Of equal sums each chunk stays whole: what comes first goes first.
    means = np.add.reduceat(scores[..., sinks:stop], starts - sinks, axis=-1) / sizes
    return np.concatenate([scores[..., :sinks], np.repeat(means, sizes, axis=-1), scores[..., stop:]], axis=-1)


def _ordered(scores: Array, sinks: int, recent: int) -> tuple[float, Array]:
    """The attention of the tokens that always stay, and that of the others in falling order, means over rows and
    heads."""
    stop = max(scores.shape[-1] - recent, min(sinks, scores.shape[-1]))
    free = -np.sort(-scores[..., sinks:stop].astype(np.float64), axis=-1)
    held = scores[..., :sinks].sum(-1, dtype=np.float64) + scores[..., stop:].sum(-1, dtype=np.float64)
    return float(held.mean()), free.mean(axis=(0, 1))


def _needed(scores: Array, share: float) -> int:
    """The fewest tokens that hold a share of the attention."""
    sums = np.cumsum(_ordered(scores, 0, 0)[1])
    return min(int(np.searchsorted(sums, share * sums[-1])), len(sums) - 1) + 1


def _smallest(values: Sequence[Array], count: int) -> list[int]:
    """How many of each row belong to the `count` smallest values of all rows, infinite ones left out; of equal ones the
    first. Rows rise."""
    joined = np.concatenate([np.asarray(row, dtype=np.float64) for row in values])
    owners = np.repeat(np.arange(len(values)), [len(row) for row in values])
    count = min(max(count, 0), int(np.isfinite(joined).sum()))
    chosen = np.argsort(joined, kind="stable")[:count]
    return [int(count) for count in np.bincount(owners[chosen], minlength=len(values))]
