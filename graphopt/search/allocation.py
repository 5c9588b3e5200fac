"""Allocation: one choice for each item, so that the loss is least under a budget of cost.

Items are sites of a model, choices what may be done to each (a grid, bits, a rank, a sparsity), costs what the budget
counts (bytes, seconds), losses what the choice costs in quality. Losses add up: by the linearity theorem (Pushing the
Limits of Large Language Model Quantization via the Linearity Theorem) the loss of a model is, for small errors, a sum
over layers of a sensitivity times the layer's squared error; for others it is an assumption to be measured.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from graphopt.errors import UsageError

UNITS = 8192
"""Parts that a budget is counted in: the allocation is the best for a budget that is less by one part for each item."""
PRICES = 40
"""Prices that a search tries, at most."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """One thing that can be done to an item.

    Attributes:
        name: What it is called.
        cost: What it takes of the budget, not negative.
        loss: What it costs in quality; may be negative.
    """

    name: str
    cost: float
    loss: float


@dataclasses.dataclass(frozen=True)
class Item:
    """Something for which one of several things is chosen."""

    name: str
    choices: tuple[Choice, ...]


@dataclasses.dataclass(frozen=True)
class Allocation:
    """What was chosen.

    Attributes:
        chosen: The choice of each item, in their order.
    """

    chosen: tuple[Choice, ...]

    @property
    def cost(self) -> float:
        """The sum of their costs."""
        return math.fsum(choice.cost for choice in self.chosen)

    @property
    def loss(self) -> float:
        """The sum of their losses."""
        return math.fsum(choice.loss for choice in self.chosen)


def allocate(items: Sequence[Item], budget: float, units: int = UNITS) -> Allocation:
    """The choices of least loss whose costs together are at most `budget`: the integer program of a multiple-choice
    knapsack.

    By dynamic programming over the items and what is spent, in `units` equal parts of what the budget leaves beyond the
    cheapest choices. Of all that spend as much, up to a part, the least loss is kept with what it spends itself, so
    that roundings don't add up and the budget always holds; with costs that are multiples of a part the result is the
    best there is. Memory and time grow with items × units.

    Args:
        items: What to choose for.
        budget: The most that the costs may sum to.
        units: Parts.

    Raises:
        UsageError: No item, an item without choices, a cost that is negative or no number, or a budget that the
            cheapest choices exceed.
    """
    _check(items)
    least = [min(choice.cost for choice in item.choices) for item in items]
    room = budget - math.fsum(least)
    if room < -1e-9 * max(1.0, abs(budget)):
        raise UsageError(
            f"The budget of {budget:g} is less than the {math.fsum(least):g} that the cheapest choices take."
        )
    # What is left by rounding of floats alone is nothing, and no part of it is a number to divide by.
    room = room if room > 1e-12 * max(choice.cost for item in items for choice in item.choices) else 0.0
    kept = [_undominated(item) for item in items]
    part = room / units or 1.0
    # Of what spends up to so many parts: the least loss, what it spends, and for each item its choice and the place
    # of what it continues.
    best: npt.NDArray[np.float64] = np.full(units + 1, np.inf)
    spent: npt.NDArray[np.float64] = np.zeros(units + 1)
    best[0] = 0.0
    picks: list[npt.NDArray[np.int16]] = []
    origins: list[npt.NDArray[np.int32]] = []
    for item, floor in zip(kept, least, strict=True):
        found, taken = np.full(units + 1, np.inf), np.zeros(units + 1)
        pick, origin = np.zeros(units + 1, np.int16), np.zeros(units + 1, np.int32)
        for index, choice in enumerate(item):
            extra = choice.cost - floor
            if extra > 0 and not room:
                continue
            # What is next but one spends more by over a part: among every other no two come to one place.
            for first in (0, 1):
                places = np.arange(first, units + 1, 2, dtype=np.int32)
                places = places[np.isfinite(best[places])]
                reached = spent[places] + max(extra, 0.0)
                # What is over a whole number of parts by rounding of floats alone is that number.
                parts = np.ceil(reached / part - 1e-9)
                inside = parts <= units
                places, reached, to = places[inside], reached[inside], parts[inside].astype(np.int64)
                loss = best[places] + choice.loss
                better = loss < found[to]
                places, reached, to, loss = places[better], reached[better], to[better], loss[better]
                found[to], taken[to], pick[to], origin[to] = loss, reached, index, places
        best, spent = found, taken
        picks.append(pick)
        origins.append(origin)
    place = int(best.argmin())
    chosen: list[Choice] = []
    for item, pick, origin in zip(reversed(kept), reversed(picks), reversed(origins), strict=True):
        chosen.append(item[int(pick[place])])
        place = int(origin[place])
    return Allocation(tuple(reversed(chosen)))


def allocate_both(
    items: Sequence[Item], budget: float, others: Sequence[Sequence[float]], other_budget: float
) -> Allocation:
    """The choices of little loss whose costs keep one budget, and whose costs of another kind keep another.

    By Lagrangian relaxation: `allocate` with losses to which the other costs are added at a price, and the least price
    is taken, by bisection, at which they keep their budget. Both budgets always hold. The loss is the least of all
    allocations that cost no more of both; where the other costs end below their budget a better one may have been
    missed, which takes choices between two prices.

    Args:
        items: What to choose for, with choices of different names.
        budget: The most that the costs may sum to.
        others: The other cost of each choice of each item.
        other_budget: The most that these may sum to.

    Raises:
        UsageError: As `allocate`, or no choices keep both.
    """
    _check(items)
    known = {
        (number, choice.name): (choice, cost)
        for number, (item, costs) in enumerate(zip(items, others, strict=True))
        for choice, cost in zip(item.choices, costs, strict=True)
    }

    def priced(price: float, weight: float = 1.0) -> tuple[Allocation, float]:
        changed = []
        for number, item in enumerate(items):
            choices = (known[number, choice.name] for choice in item.choices)
            changed.append(
                Item(item.name, tuple(dataclasses.replace(c, loss=weight * c.loss + price * o) for c, o in choices))
            )
        found = [known[number, choice.name] for number, choice in enumerate(allocate(changed, budget).chosen)]
        return Allocation(tuple(choice for choice, _ in found)), math.fsum(cost for _, cost in found)

    best, spent = priced(0.0)
    if spent <= other_budget:
        return best
    best, spent = priced(1.0, 0.0)
    if spent > other_budget:
        raise UsageError(
            f"No choices keep both budgets: within {budget:g} of the one cost, the other comes to {spent:g}, more than "
            f"{other_budget:g}."
        )
    scale = max(abs(choice.loss) for choice, _ in known.values()) or 1.0
    low, high = 0.0, scale / max(other_budget, spent, 1e-300)
    for _ in range(PRICES):
        found, spent = priced(high)
        if spent <= other_budget:
            best = found
            break
        low, high = high, 2 * high
    for _ in range(PRICES):
        middle = (low + high) / 2
        found, spent = priced(middle)
        if spent <= other_budget:
            best, high = found, middle
        else:
            low = middle
    return best


def frontier(items: Sequence[Item]) -> list[Allocation]:
    """Allocations of falling loss and rising cost, from the cheapest choices on: each is the best for its own cost.

    Beginning with the cheapest, the step that buys most for its cost is taken again and again, along the lower convex
    hull of each item. No allocation of the same cost has less loss; budgets between two of them are for `allocate`.

    Raises:
        UsageError: As `allocate`.
    """
    _check(items)
    hulls = [_hull(_undominated(item)) for item in items]
    steps = sorted(
        (
            ((after.loss - before.loss) / (after.cost - before.cost), number, place)
            for number, hull in enumerate(hulls)
            for place, (before, after) in enumerate(itertools.pairwise(hull))
        ),
    )
    at = [hull[0] for hull in hulls]
    found = [Allocation(tuple(at))]
    for _, number, place in steps:
        at[number] = hulls[number][place + 1]
        found.append(Allocation(tuple(at)))
    return found


def _undominated(item: Item) -> list[Choice]:
    """An item's choices by rising cost and falling loss; of equal ones the first."""
    kept: list[Choice] = []
    for choice in sorted(item.choices, key=lambda choice: (choice.cost, choice.loss)):
        if not kept or choice.loss < kept[-1].loss:
            kept.append(choice)
    return kept


def _hull(choices: Sequence[Choice]) -> list[Choice]:
    """The lower convex hull of choices by rising cost and falling loss."""
    hull: list[Choice] = []
    for choice in choices:
        while len(hull) > 1 and _turns_down(hull[-2], hull[-1], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _turns_down(a: Choice, b: Choice, c: Choice) -> bool:
    return (b.loss - a.loss) * (c.cost - b.cost) >= (c.loss - b.loss) * (b.cost - a.cost)


def _check(items: Sequence[Item]) -> None:
    if not items:
        raise UsageError("There is nothing to allocate.")
    for item in items:
        if not item.choices:
            raise UsageError(f"There is no choice for {item.name!r}.")
        for choice in item.choices:
            if not math.isfinite(choice.cost) or choice.cost < 0 or math.isnan(choice.loss):
                raise UsageError(f"The choice {choice.name!r} of {item.name!r} has no usable cost or loss.")
