"""Evolutionary search over sets of one size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.search.evolutionary import evolve as batched
from graphopt.search.greedy import Found


def evolve(
    candidates: Sequence[Any], loss: Callable[[tuple[Any, ...], int], float], start: Sequence[Any], **options: Any
) -> Found[Any]:
    """The search with a loss of one set."""
    return batched(candidates, lambda sets, samples: (loss(chosen, samples) for chosen in sets), start, **options)


WEIGHTS = np.random.default_rng(3).permutation(24).astype(float)


def exact(chosen: tuple[int, ...], samples: int) -> float:
    """With few samples an estimate that is wrong by a little."""
    noise = np.random.default_rng([*chosen, samples]).normal() / samples
    return float(WEIGHTS[list(chosen)].sum() + (noise if samples < 8 else 0))


def test_it_finds_the_best_of_an_additive_loss() -> None:
    best = tuple(sorted(np.argsort(WEIGHTS)[:6]))
    found = evolve(range(24), exact, range(6), generations=120, rounds=((3, 2), (1, 8)), seed=1)
    assert found.chosen == best
    assert found.loss == WEIGHTS[list(best)].sum()


@given(st.integers(0, 10_000), st.integers(1, 23))
@settings(max_examples=25, deadline=None)
def test_the_number_stays_and_the_loss_never_grows(seed: int, size: int) -> None:
    last = exact(tuple(range(size)), 8)
    for generations in (0, 3, 6):
        found = evolve(range(24), exact, range(size), generations=generations, rounds=((2, 1), (1, 8)), seed=seed)
        assert len(set(found.chosen)) == size
        assert found.loss <= last
        last = found.loss


def test_one_seed_gives_one_result_and_nothing_is_asked_twice() -> None:
    asked: list[tuple[tuple[int, ...], int]] = []

    def loss(chosen: tuple[int, ...], samples: int) -> float:
        asked.append((chosen, samples))
        return exact(chosen, samples)

    first = evolve(range(24), loss, range(4), generations=10, seed=5)
    assert len(asked) == len(set(asked))
    assert evolve(range(24), exact, range(4), generations=10, seed=5) == first


def test_what_cant_be() -> None:
    with pytest.raises(ValueError, match="must leave one"):
        evolve("abc", lambda *_: 0.0, "a", rounds=((2, 1),))
    with pytest.raises(ValueError, match="set of candidates"):
        evolve("abc", lambda *_: 0.0, "ad")
