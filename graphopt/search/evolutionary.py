"""Evolutionary search over sets of one size, by a loss that is dear: few samples for many, many samples for few."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

import numpy as np

from graphopt.search.greedy import Found, Progress

T = TypeVar("T", bound=Hashable)


def evolve(
    candidates: Sequence[T],
    losses: Callable[[Sequence[tuple[T, ...]], int], Iterable[float]],
    start: Sequence[T],
    *,
    generations: int = 20,
    offspring: int = 8,
    rounds: Sequence[tuple[int, int]] = ((2, 1), (1, 4)),
    swaps: int = 3,
    seed: int = 0,
    progress: Progress | None = None,
) -> Found[T]:
    """A set of as many candidates as `start` has, bettered by exchanging members.

    EvoPress: Accurate Dynamic Model Compression via Evolutionary Search (Sieberling et al., 2024): each generation
    makes offspring of the one survivor by a few level switches, which here exchange a member for another candidate, so
    that their number stays; offspring go through rounds of selection, each with more samples than the one before, and
    the survivor itself stands in the last one.

    Args:
        candidates: What may be chosen; distinct.
        losses: What each of several sets costs on the first so many samples, their members given in the order of the
            candidates. What was asked once isn't asked again.
        start: The first survivor.
        generations: How many there are.
        offspring: Offspring of a generation.
        rounds: Of each round how many survive it and the samples that it looks at; the last leaves one.
        swaps: Exchanges in one offspring at most: the smaller of two draws of 1 to `swaps`.
        seed: Of the draws.
        progress: Called before each generation.

    Raises:
        ValueError: `rounds` don't end with one survivor, or `start` holds what is no candidate.
    """
    if not rounds or rounds[-1][0] != 1:
        raise ValueError("the last round of a selection must leave one")
    place = {candidate: index for index, candidate in enumerate(candidates)}
    if len(set(start)) != len(start) or any(member not in place for member in start):
        raise ValueError("the search must start from a set of candidates")
    rng = np.random.default_rng(seed)
    known: dict[tuple[tuple[T, ...], int], float] = {}

    def costs(sets: Sequence[tuple[T, ...]], samples: int) -> list[float]:
        new = [chosen for chosen in sets if (chosen, samples) not in known]
        if new:
            known.update(zip(((chosen, samples) for chosen in new), losses(new, samples), strict=True))
        return [known[chosen, samples] for chosen in sets]

    def mutated(chosen: tuple[T, ...]) -> tuple[T, ...]:
        members, others = list(chosen), [c for c in candidates if c not in chosen]
        for _ in range(int(rng.integers(1, swaps + 1, size=2).min())):
            i, j = int(rng.integers(len(members))), int(rng.integers(len(others)))
            members[i], others[j] = others[j], members[i]
        return tuple(sorted(members, key=place.__getitem__))

    survivor = tuple(sorted(start, key=place.__getitem__))
    if not survivor or len(survivor) == len(candidates):
        return Found(survivor, costs([survivor], rounds[-1][1])[0])
    for generation in range(generations):
        if progress is not None:
            progress("evolutionary search", generation, generations)
        group = list(dict.fromkeys(mutated(survivor) for _ in range(offspring)))
        for number, (survivors, samples) in enumerate(rounds):
            if number == len(rounds) - 1 and survivor not in group:
                group.append(survivor)
            cost = dict(zip(group, costs(group, samples), strict=True))
            group.sort(key=lambda chosen: (cost[chosen], [place[c] for c in chosen]))
            group = group[:survivors]
        survivor = group[0]
    return Found(survivor, costs([survivor], rounds[-1][1])[0])
