"""Allocation under a budget: as good as trying everything, and never beyond the budget."""

from __future__ import annotations

import itertools
import math
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.errors import UsageError
from graphopt.search.allocation import Allocation, Choice, Item, allocate, allocate_both, frontier

WHOLE = st.integers(0, 12)
CHOICES = st.lists(st.tuples(WHOLE, WHOLE), min_size=1, max_size=4)
ITEMS = st.lists(CHOICES, min_size=1, max_size=5)


def items_of(drawn: list[list[tuple[int, int]]]) -> list[Item]:
    return [
        Item(f"site{n}", tuple(Choice(f"{cost} for {loss}", cost, loss) for cost, loss in choices))
        for n, choices in enumerate(drawn)
    ]


def every(items: list[Item]) -> list[Allocation]:
    return [Allocation(chosen) for chosen in itertools.product(*(item.choices for item in items))]


@given(ITEMS, st.integers(0, 60))
@settings(deadline=None)
def test_it_is_the_best_there_is(drawn: list[list[tuple[int, int]]], budget: int) -> None:
    items = items_of(drawn)
    possible = [one for one in every(items) if one.cost <= budget]
    if not possible:
        with pytest.raises(UsageError, match="less than the"):
            allocate(items, budget)
        return
    # Whole costs are multiples of a part where there is a part for each.
    least = sum(min(choice.cost for choice in item.choices) for item in items)
    found = allocate(items, budget, units=max(1, round(budget - least)))
    assert found.cost <= budget
    assert found.loss == min(one.loss for one in possible)
    assert all(choice in item.choices for choice, item in zip(found.chosen, items, strict=True))


@given(ITEMS, st.floats(0, 60), st.integers(1, 50))
@settings(deadline=None)
def test_the_budget_always_holds(drawn: list[list[tuple[int, int]]], budget: float, units: int) -> None:
    items = items_of(drawn)
    try:
        found = allocate(items, budget, units=units)
    except UsageError:
        assert min(one.cost for one in every(items)) > budget
        return
    assert found.cost <= budget * (1 + 1e-9) + 1e-9
    cheapest = min(every(items), key=lambda one: (one.cost, one.loss))
    assert found.loss <= cheapest.loss or found.cost > cheapest.cost


@given(ITEMS)
@settings(deadline=None)
def test_the_frontier_is_of_the_best(drawn: list[list[tuple[int, int]]]) -> None:
    items = items_of(drawn)
    found = frontier(items)
    for earlier, later in itertools.pairwise(found):
        assert later.cost > earlier.cost
        assert later.loss < earlier.loss
    for one in found:
        assert one.loss == min(other.loss for other in every(items) if other.cost <= one.cost)
    assert found[-1].loss == min(one.loss for one in every(items))


def test_what_is_left_by_rounding_buys_nothing() -> None:
    items = items_of([[(0, 1), (3, 0)]])
    assert allocate(items, 5e-324).cost == 0
    assert allocate(items_of([[(0, 1)]]), 5e-324).loss == 1


def test_more_budget_is_never_worse() -> None:
    items = items_of([[(1, 9), (2, 5), (4, 1)], [(1, 7), (3, 2)], [(2, 4), (5, 0)]])
    losses = [allocate(items, budget).loss for budget in range(4, 13)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == 3


@pytest.mark.parametrize(
    ("items", "why"),
    [
        ([], "nothing to allocate"),
        ([Item("a", ())], "no choice for 'a'"),
        ([Item("a", (Choice("b", -1, 0),))], "no usable cost"),
        ([Item("a", (Choice("b", 1, math.nan),))], "no usable cost"),
    ],
)
def test_mistakes(items: list[Item], why: str) -> None:
    for function in (lambda: allocate(items, 1), lambda: frontier(items)):
        with pytest.raises(UsageError, match=why):
            function()


@given(ITEMS, st.integers(0, 60), st.integers(0, 60), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_two_budgets_hold_together(drawn: list[list[tuple[int, int]]], budget: int, other: int, random: Random) -> None:
    items = [Item(f"site{n}", tuple(Choice(str(c), *one) for c, one in enumerate(of))) for n, of in enumerate(drawn)]
    others = [[float(random.randint(0, 12)) for _ in item.choices] for item in items]

    def other_cost(found: Allocation) -> float:
        return sum(costs[int(choice.name)] for costs, choice in zip(others, found.chosen, strict=True))

    possible = [one for one in every(items) if one.cost <= budget and other_cost(one) <= other]
    try:
        found = allocate_both(items, budget, others, other)
    except UsageError:
        assert not possible
        return
    assert found.cost <= budget * (1 + 1e-9) + 1e-9
    assert other_cost(found) <= other
    assert all(choice in item.choices for choice, item in zip(found.chosen, items, strict=True))
    # What costs less of both and loses less would have been taken.
    better = [one for one in possible if one.loss < found.loss - 1e-9 and one.cost <= found.cost]
    assert not [one for one in better if other_cost(one) <= other_cost(found)]


def test_what_just_keeps_both_budgets_is_found() -> None:
    # Costs that are no multiples of a part: rounded up one by one, the choices would exceed the budget.
    rng = np.random.default_rng(0)
    for _ in range(40):
        costs, others, losses = rng.random((3, 5, 3))
        items = [
            Item(f"site{n}", tuple(Choice(str(c), cost, losses[n, c]) for c, cost in enumerate(row)))
            for n, row in enumerate(costs)
        ]
        chosen = rng.integers(3, size=5)
        budget, other = (math.fsum(each[range(5), chosen]) for each in (costs, others))
        assert allocate_both(items, budget, others.tolist(), other).cost <= budget * (1 + 1e-9)


def test_one_of_two_budgets_that_binds_decides() -> None:
    items = [
        Item("a", (Choice("small", 1, 4), Choice("large", 3, 0))),
        Item("b", (Choice("small", 1, 1), Choice("large", 3, 0))),
    ]
    assert allocate_both(items, 4, [[9, 9], [9, 9]], 18) == allocate(items, 4)
    # The large one of "a" is the slow one.
    found = allocate_both(items, 4, [[1, 5], [1, 1]], 4)
    assert [choice.name for choice in found.chosen] == ["small", "large"]
    with pytest.raises(UsageError, match="both budgets"):
        allocate_both(items, 2, [[5, 1], [5, 1]], 4)
