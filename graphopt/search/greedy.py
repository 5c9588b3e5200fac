"""Greedy search with look-ahead: a set grown by one candidate after the other, several sets kept on the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)
Progress = Callable[[str, int, int], None]
"""What is done, how many trials are done, and how many there are at most."""


@dataclasses.dataclass(frozen=True)
class Found(Generic[T]):
    """A set and what it costs.

    Attributes:
        chosen: Its members, in the order of the candidates.
        loss: What it costs.
        order: Its members in the order in which they were added; empty where they came together.
    """

    chosen: tuple[T, ...]
    loss: float
    order: tuple[T, ...] = ()


def greedy(
    candidates: Sequence[T],
    losses: Callable[[Sequence[tuple[T, ...]]], Iterable[float]],
    count: int,
    *,
    beam: int = 1,
    shortlist: int | None = None,
    excludes: Callable[[T, T], bool] | None = None,
    progress: Progress | None = None,
    what: str = "greedy search",
) -> list[Found[T]]:
    """The best sets of 1, 2, ... `count` candidates that a beam search finds.

    BlockPruner: Fine-grained Pruning for Large Language Models (Zhong et al., 2024) removes one block after the other
    by the loss after its removal, which is a beam of 1; more sets on the way look ahead.

    Args:
        candidates: What may be chosen; distinct.
        losses: What each of several sets costs, their members given in the order of the candidates; called once for
            each size, with all sets of it that are to be tried. They are read one after the other.
        count: How many are chosen.
        beam: Sets kept of each size. Each is grown by every candidate.
        shortlist: How many candidates a set is grown by: those that cost least, by what they last added to a set. None:
            by all. Where what they add hangs little on the others, few are enough.
        excludes: Whether a member rules out a candidate; None: never.
        progress: Called before each loss is read.
        what: What is said to be done.

    Returns:
        The best set of each size, smallest first; fewer where candidates exclude each other.

    Raises:
        ValueError: There are fewer candidates than `count`, or `beam` or `shortlist` is below 1.
    """
    if beam < 1 or (shortlist is not None and shortlist < 1):
        raise ValueError("beam and shortlist must be at least 1")
    if not 0 <= count <= len(candidates):
        raise ValueError(f"{count} can't be chosen among {len(candidates)}")
    place = {candidate: index for index, candidate in enumerate(candidates)}
    added: dict[T, float] = {}
    kept: list[Found[T]] = [Found((), 0.0)]
    best: list[Found[T]] = []
    total = trials_at_most(len(candidates), count, beam, shortlist)
    done = 0
    for _ in range(count):
        steps: list[tuple[Found[T], T, tuple[T, ...]]] = []
        for start in kept:
            free = [c for c in candidates if c not in start.chosen]
            if excludes is not None:
                free = [c for c in free if not any(excludes(member, c) for member in start.chosen)]
            if shortlist is not None and added:
                free = sorted(free, key=lambda c: (added[c], place[c]))[:shortlist]
            steps += [(start, c, tuple(sorted((*start.chosen, c), key=place.__getitem__))) for c in free]
        if not steps:
            break
        orders: dict[tuple[T, ...], tuple[T, ...]] = {}
        for start, candidate, chosen in steps:
            orders.setdefault(chosen, (*start.order, candidate))
        grown: dict[tuple[T, ...], Found[T]] = {}
        found = iter(losses(list(orders)))
        for chosen, order in orders.items():
            if progress is not None:
                progress(what, done, total)
            done += 1
            grown[chosen] = Found(chosen, next(found), order)
        cost: dict[T, float] = {}
        for start, candidate, chosen in steps:
            more = grown[chosen].loss - start.loss
            cost[candidate] = min(more, cost.get(candidate, more))
        added.update(cost)
        kept = sorted(grown.values(), key=lambda one: (one.loss, [place[c] for c in one.chosen]))[:beam]
        best.append(kept[0])
    return best


def trials_at_most(candidates: int, count: int, beam: int = 1, shortlist: int | None = None) -> int:
    """How many trials `greedy` makes at most."""
    total = candidates if count else 0
    for size in range(1, count):
        each = candidates - size
        total += min(beam, candidates) * (each if shortlist is None else min(each, shortlist))
    return total
