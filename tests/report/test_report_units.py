"""Numbers as people read them."""

from __future__ import annotations

import math

import pytest

from graphopt.report import units


@pytest.mark.parametrize(
    ("number", "count", "size"),
    [
        (0, "0", "0 B"),
        (999, "999", "999 B"),
        (2425, "2,425", "2.42 kB"),
        (999_999, "999,999", "1.00 MB"),
        (22_713_216, "22.7 M", "22.7 MB"),
        (538e6, "538 M", "538 MB"),
        (-23, "−23", "−23 B"),
        (None, "–", "–"),
        (math.inf, "–", "–"),
    ],
)
def test_counts_and_sizes(number: float | None, count: str, size: str) -> None:
    assert units.count(number) == count
    assert units.size(number) == size


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (2e-6, "2 µs"),
        (0.0042, "4.20 ms"),
        (0.9996, "1.00 s"),
        (5.123, "5.12 s"),
        (59.6, "1 min 00 s"),
        (75, "1 min 15 s"),
    ],
)
def test_seconds(number: float, shown: str) -> None:
    assert units.seconds(number) == shown


@pytest.mark.parametrize(
    ("before", "after", "shown"),
    [
        (254, 231, "−9.1 %"),
        (100, 200, "+100 %"),
        (3, 3, "same"),
        (0, 3, "new"),
        (None, 3, "–"),
        (1e8, 1e8 - 1, "<0.001 %"),
    ],
)
def test_change(before: float | None, after: float | None, shown: str) -> None:
    assert units.change(before, after) == shown


def test_percent_never_rounds_a_beyond_to_the_limit() -> None:
    assert units.percent(0.031) == "3.1 %"
    assert units.percent(1.0) == "100 %"
    assert units.percent(37.5) == "3,750 %"
    assert units.percent(1e-9) == "<0.001 %"
