"""Greedy search with look-ahead."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.search.greedy import Found, trials_at_most
from graphopt.search.greedy import greedy as batched


def greedy(
    candidates: Sequence[Any], loss: Callable[[tuple[Any, ...]], float], count: int, **options: Any
) -> list[Found[Any]]:
    """The search with a loss of one set."""
    return batched(candidates, lambda sets: map(loss, sets), count, **options)


def pairwise(seed: int, size: int) -> np.ndarray:
    """A loss with a cost for each member, and one for each pair."""
    return np.random.default_rng(seed).random((size, size))


@given(st.integers(0, 1000), st.integers(1, 7), st.data())
@settings(max_examples=40, deadline=None)
def test_a_beam_that_holds_all_finds_the_best(seed: int, size: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, size))
    costs = pairwise(seed, size)
    found = greedy(range(size), lambda s: float(costs[np.ix_(s, s)].sum()), count, beam=64)
    assert len(found) == count
    for number, one in enumerate(found, 1):
        best = min(costs[np.ix_(s, s)].sum() for s in map(list, itertools.combinations(range(size), number)))
        assert one.loss == pytest.approx(best)
        assert len(set(one.chosen)) == number


def test_looking_ahead_helps_where_the_first_choice_misleads() -> None:
    # "a" is best alone, but "b" and "c" together cost nothing.
    costs = {"a": 1.0, "b": 2.0, "c": 2.0, "bc": 0.0, "ab": 3.0, "ac": 3.0}
    tried: list[str] = []

    def loss(chosen: tuple[str, ...]) -> float:
        tried.append("".join(chosen))
        return costs[tried[-1]]

    assert greedy("abc", loss, 2)[-1].loss == 3.0
    assert greedy("abc", loss, 2, beam=2)[-1].chosen == ("b", "c")
    assert len(tried) == len(set(tried[:5])) + len(set(tried[5:]))


def test_a_shortlist_saves_trials() -> None:
    weights = np.arange(1.0, 21)
    tried: list[tuple[int, ...]] = []
    told: list[tuple[str, int, int]] = []

    def loss(chosen: tuple[int, ...]) -> float:
        tried.append(chosen)
        return float(weights[list(chosen)].sum())

    found = greedy(range(20), loss, 5, shortlist=3, progress=lambda *a: told.append(a))
    assert found[-1].chosen == (0, 1, 2, 3, 4)
    assert len(tried) == trials_at_most(20, 5, 1, 3) == 20 + 4 * 3
    assert told[-1] == ("greedy search", len(tried) - 1, len(tried))


@given(st.dictionaries(st.integers(0, 30), st.integers(0, 1000), min_size=1), st.integers(1, 10), st.integers(1, 4))
def test_where_losses_add_up_a_shortlist_finds_the_cheapest(costs: dict[int, int], count: int, shortlist: int) -> None:
    candidates, count = sorted(costs), min(count, len(costs))
    found = greedy(candidates, lambda items: float(sum(costs[item] for item in items)), count, shortlist=shortlist)
    cheapest = sorted(costs.values())[:count]
    assert [costs[item] for item in found[-1].order] == cheapest
    assert [one.loss for one in found] == [sum(cheapest[: n + 1]) for n in range(count)]


def test_what_is_excluded_isnt_chosen_and_ties_go_to_the_first() -> None:
    pairs = [(3, 2), (1, 0), (2, 1), (2, 0)]
    found = greedy(pairs, lambda items: -max(items)[0] * 9.0 + len(items), 4, excludes=lambda a, b: a[0] == b[0])
    assert len(found) == 3
    assert found[-1].chosen == found[-1].order == ((3, 2), (1, 0), (2, 1))


def test_the_order_is_that_of_choosing() -> None:
    costs = {"a": 2.0, "b": 3.0, "c": 1.0}
    found = greedy("abc", lambda items: sum(costs[item] for item in items), 2)
    assert (found[-1].chosen, found[-1].order) == (("a", "c"), ("c", "a"))


@pytest.mark.parametrize(("count", "options"), [(4, {}), (1, {"beam": 0}), (1, {"shortlist": 0})])
def test_what_cant_be(count: int, options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"must be at least 1|can't be chosen"):
        greedy("abc", lambda _: 0.0, count, **options)


def test_all_sets_of_a_size_are_asked_for_together_and_read_one_after_the_other() -> None:
    asked: list[list[tuple[str, ...]]] = []
    told: list[tuple[int, int]] = []

    def losses(sets: Sequence[tuple[str, ...]]) -> Iterator[float]:
        asked.append(list(sets))
        for number, chosen in enumerate(sets):
            assert told[-1][0] == sum(map(len, asked[:-1])) + number
            yield float(sum(map(ord, chosen)))

    found = batched("abcd", losses, 2, beam=2, progress=lambda what, *numbers: told.append(numbers), what="choosing")
    assert [len(sets) for sets in asked] == [4, 5]
    assert all(len(set(sets)) == len(sets) for sets in asked)
    assert found[-1].chosen == ("a", "b")
