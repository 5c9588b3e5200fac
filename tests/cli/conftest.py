"""Command lines run within the process of the tests."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

import pytest

import graphopt.cli

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line: (exit code, standard output, standard error)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["graphopt", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "100")
        handler = signal.getsignal(signal.SIGTERM)
        with pytest.raises(SystemExit) as end:
            graphopt.cli.main()
        signal.signal(signal.SIGTERM, handler)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return int(end.value.code or 0), captured.out, captured.err

    return call
