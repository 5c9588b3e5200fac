"""What the commands share: the estimate of the time that is left."""

from __future__ import annotations

from graphopt.cli.console import TimeLeft


def test_what_is_left_is_told_by_the_steps_so_far() -> None:
    now = 0.0
    left = TimeLeft(lambda: now)
    told = []
    for what, done, total, seconds in (
        ("trying layers", 0, 10, 30),
        ("trying layers", 1, 10, 10),
        ("trying layers", 2, 10, 500),
        ("choosing", 2, 4, 90),  # something else, which begins in the middle
        ("choosing", 3, 4, 0),
        ("choosing", 0, 100, 4000),  # the same once more
        ("choosing", 1, 100, 0.1),
        ("choosing", 100, 100, 1),
    ):
        told.append(left.told(what, done, total))
        now += seconds
    assert told[:3] == ["", "about 0:04:30 left", "about 0:02:40 left"]
    assert told[3:6] == ["", "about 0:01:30 left", ""]
    assert told[6:] == ["about 4 days, 14:00:00 left", ""]
