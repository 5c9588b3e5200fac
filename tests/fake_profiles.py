"""Profiles with the numbers that a test wants."""

from __future__ import annotations

from collections.abc import Callable

from graphopt.analysis.choices import CHOICES
from graphopt.analysis.profile import Entry, Executed, Measured, Profile

VERSION = (1, 31)
"""Of the runtime that the profiles are of."""

Ratio = Callable[[int, int, int], float]
"""(rows, width, threads) to the CPU time over that of the default."""


def measured(ratio: float, noise: float = 0.01) -> Measured:
    return Measured(10 * ratio, 10 * ratio, ratio, ratio, noise, noise)


def fake(
    choice: str,
    ratio: Ratio | float,
    *,
    alternative: str | None = None,
    noise: float = 0.01,
    control: float = 1.0,
    threads: tuple[int, ...] = (1, 2),
) -> Profile:
    """A profile in which one alternative (the first that isn't the default) takes `ratio` times what the default does."""
    known = CHOICES[choice]
    default = known.default_for(VERSION)
    other = alternative or next(a for a in known.alternatives if a != default)
    entries = []
    for t in threads:
        for w in known.widths:
            for r in known.rows:
                number = ratio if isinstance(ratio, (int, float)) else ratio(r, w, t)
                times = {default: measured(1.0, 0.0), other: measured(number, noise)}
                entries.append(Entry(choice, r, w, t, times, measured(control, 0.0)))
    executed = {choice: {a: Executed(("Op",), a) for a in (default, other)}}
    return Profile("Some Runtime 1.31", "Some CPU", 2, threads, "2026-01-31", 60.0, tuple(entries), executed)
