"""Greedy choice of several things whose losses nearly add up: most candidates needn't be tried again at each step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

from graphopt.errors import UsageError

T = TypeVar("T", bound=Hashable)


@dataclasses.dataclass(frozen=True)
class Chosen(Generic[T]):
    """What was chosen, in the order in which it was.

    Attributes:
        items: The things.
        losses: The loss with the first of them, the first two, and so on.
        trials: How often a loss was asked for.
    """

    items: tuple[T, ...]
    losses: tuple[float, ...]
    trials: int


def lazy_greedy(
    candidates: Sequence[T],
    count: int,
    loss: Callable[[tuple[T, ...]], float],
    excludes: Callable[[T, T], bool],
    looks: int = 6,
    progress: Callable[[int, int], None] | None = None,
) -> Chosen[T]:
    """Choose `count` of the candidates, one after the other, each where the loss with those before it is least.

    The first step tries all of them. At a later one the loss with a candidate is expected to be that of the last step
    and what the candidate added when it was last tried; only the `looks` candidates of which least is expected are
    tried again, and the best of these is taken. With as many looks as candidates it is the plain greedy choice.

    Args:
        candidates: What there is to choose from, each once.
        count: How many to choose; fewer are where candidates exclude each other.
        loss: The loss with some of them, in the order in which they were chosen.
        excludes: Whether one that was chosen rules out another.
        looks: Candidates that are tried at each step but the first.
        progress: Called before each trial with how many are done, and how many there will be at most.

    Raises:
        UsageError: There is nothing to choose from, or a number that isn't positive.
    """
    if count < 1 or looks < 1:
        raise UsageError(f"At least one thing must be chosen, and one looked at, not {count} and {looks}.")
    if not candidates:
        raise UsageError("There is nothing to choose from.")
    total, trials = len(candidates) + (count - 1) * looks, 0

    def tried(items: tuple[T, ...]) -> float:
        nonlocal trials
        if progress is not None:
            progress(trials, total)
        trials += 1
        return loss(items)

    added = {item: tried((item,)) for item in candidates}
    chosen: list[T] = []
    losses: list[float] = []
    while len(chosen) < count:
        left = [item for item in candidates if item not in chosen and not any(excludes(one, item) for one in chosen)]
        if not left:
            break
        if not chosen:
            found = added
        else:
            nearest = sorted(left, key=lambda item: (added[item], candidates.index(item)))[:looks]
            found = {item: tried((*chosen, item)) for item in nearest}
            added |= {item: value - losses[-1] for item, value in found.items()}
        best = min(found, key=lambda item: (found[item], candidates.index(item)))
        chosen.append(best)
        losses.append(found[best])
    return Chosen(tuple(chosen), tuple(losses), trials)
