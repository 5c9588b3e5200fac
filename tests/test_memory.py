"""Peak memory of the command is that of one weight, not of the model: it doesn't grow with the number of layers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "make_large_model.py"
LAYER = 12 * 512 * 512 * 4
"""Bytes of a layer of hidden size 512."""


def peak(*arguments: object) -> int:
    """The largest resident set of `graphopt` with these arguments, in bytes."""
    with open(os.devnull, "w") as nowhere:
        process = subprocess.Popen([sys.executable, "-m", "graphopt", *map(str, arguments)], stdout=nowhere)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss * 1024


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="the peak of one process is asked of the system by wait4")
@pytest.mark.parametrize("place", ["--external-data", "--inline"])
def test_peak_does_not_grow_with_the_layers(tmp_path: Path, place: str) -> None:
    peaks = []
    for layers in (2, 12):
        source, target = tmp_path / str(layers) / "m.onnx", tmp_path / "out" / f"{layers}.onnx"
        make = [sys.executable, SCRIPT, "--bytes", str(layers * LAYER), "--hidden", "512", "--output", source]
        subprocess.run(list(map(str, make)), check=True, stdout=subprocess.DEVNULL)
        peaks.append(peak("optimize", source, "-o", target, "--verify", "none", place))
        written = sum(file.stat().st_size for file in target.parent.glob(f"{layers}.onnx*"))
        assert written > 0.9 * layers * LAYER
    assert peaks[1] - peaks[0] < 2 * LAYER  # of the 10 layers more; the graph itself takes some of it
