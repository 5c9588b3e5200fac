"""Probes that hold equal caches, for results that keep these once (`graphopt.graph.equal_caches`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from graphopt.verification.probes import Probe

UNEQUAL = "The inputs given hold other numbers in caches that the result takes for equal; give equal ones."


def on_equal(probes: Sequence[Probe], equal: Mapping[str, str]) -> list[Probe]:
    """The probes without the inputs that are equal to others, of those given by a user only where they are.

    Args:
        probes: Those of the original.
        equal: Name of an input → name of the one that it is equal to.
    """
    return [
        dataclasses.replace(probe, feeds={name: array for name, array in probe.feeds.items() if name not in equal})
        for probe in probes
        if probe.recipe is not None or _holds(probe, equal)
    ]


def told(equal: Mapping[str, str]) -> str:
    """A note that results were compared so."""
    names = ", ".join(repr(name) for name in dict.fromkeys(equal.values()))
    return f"Compared with equal numbers in the caches that are kept once now: {names}."


def _holds(probe: Probe, equal: Mapping[str, str]) -> bool:
    feeds = probe.feeds
    return all(np.array_equal(feeds[a], feeds[b]) for a, b in equal.items() if a in feeds and b in feeds)
