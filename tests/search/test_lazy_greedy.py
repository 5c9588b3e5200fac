"""lazy_greedy: the plain greedy choice where losses add up, with fewer trials; exclusions; and its limits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.errors import UsageError
from graphopt.search.lazy_greedy import lazy_greedy


def free(one: object, other: object) -> bool:
    return False


@given(st.dictionaries(st.integers(0, 30), st.integers(0, 1000), min_size=1), st.integers(1, 10), st.integers(1, 4))
def test_where_losses_add_up_the_cheapest_are_chosen(costs: dict[int, int], count: int, looks: int) -> None:
    candidates = sorted(costs)
    found = lazy_greedy(candidates, count, lambda items: sum(costs[item] for item in items), free, looks)
    cheapest = sorted(costs.values())[:count]
    assert sorted(costs[item] for item in found.items) == cheapest
    assert list(found.losses) == [sum(cheapest[: n + 1]) for n in range(len(cheapest))]
    assert found.trials <= len(costs) + (count - 1) * looks


def test_a_later_step_sees_what_the_earlier_ones_did() -> None:
    """The second best alone is worthless beside the best one."""

    def loss(items: tuple[str, ...]) -> float:
        return {"a": 1.0, "b": 1.5, "c": 2.0}[items[0]] if len(items) == 1 else 9.0 if "b" in items else 3.0

    assert lazy_greedy(["a", "b", "c"], 2, loss, free, looks=2).items == ("a", "c")
    assert lazy_greedy(["a", "b", "c"], 2, loss, free, looks=1).items == ("a", "b")


def test_what_is_excluded_isnt_chosen_and_ties_go_to_the_first() -> None:
    pairs = [(1, 0), (2, 1), (2, 0), (3, 2)]
    found = lazy_greedy(pairs, 4, lambda items: float(len(items)), lambda one, other: one[0] == other[0])
    assert found.items == ((1, 0), (2, 1), (3, 2))


def test_progress_is_told() -> None:
    seen: list[tuple[int, int]] = []
    lazy_greedy([1, 2, 3], 2, lambda items: float(sum(items)), free, 2, lambda done, total: seen.append((done, total)))
    assert seen == [(n, 5) for n in range(5)]


@pytest.mark.parametrize(("candidates", "count", "looks"), [([], 1, 1), ([1], 0, 1), ([1], 1, 0)])
def test_what_is_refused(candidates: list[int], count: int, looks: int) -> None:
    with pytest.raises(UsageError):
        lazy_greedy(candidates, count, lambda items: 0.0, free, looks)
