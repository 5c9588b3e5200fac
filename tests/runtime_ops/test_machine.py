"""What the machine has for a process."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from graphopt.runtime_ops import machine


def test_a_container_has_less_than_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(machine.sys, "platform", "linux")
    monkeypatch.setattr(machine, "_number", lambda path, key: 10_000)
    limit, taken, time = (tmp_path / name for name in ("limit", "taken", "time"))
    monkeypatch.setattr(machine, "_LIMITS", ((str(limit), str(taken)),))
    monkeypatch.setattr(machine, "_CORES", str(time))
    assert (machine.cores(), machine.available_bytes()) == (8, 10_000)
    for limit_text, time_text, expected in (
        ("max", "max 100000", (8, 10_000)),
        ("5000", "250000 100000", (3, 2_000)),
        ("2000", "1000 100000", (1, 0)),
        ("50000", "1600000 100000", (8, 10_000)),
    ):
        limit.write_text(limit_text + "\n")
        taken.write_text("3000\n")
        time.write_text(time_text + "\n")
        assert (machine.cores(), machine.available_bytes()) == expected


def test_what_a_process_takes_is_seen() -> None:
    before = machine.own_bytes()
    if before is None:
        pytest.skip("the system doesn't tell")
    taken = np.ones(8 << 20)
    after = machine.own_bytes()
    assert after is not None
    assert 0.9 * taken.nbytes < after - before < 1.5 * taken.nbytes
