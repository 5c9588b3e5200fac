"""Every operator's kernel on nodes at random, mostly broken ones, under AddressSanitizer and UndefinedBehaviorSanitizer.

`make sanitize` builds and runs the fuzzer; it stands in for ONNX Runtime, so that the sanitizers work at once.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from shared_files import made_once

from graphopt.runtime_ops import operators
from graphopt.runtime_ops.operator import folder_of

ROOT = Path(__file__).parents[2]
OPERATORS = ROOT / "graphopt" / "runtime_ops"


@pytest.fixture(scope="module")
def fuzzer() -> Path:
    for tool in ("cmake", "c++"):
        if shutil.which(tool) is None:
            pytest.skip(f"the fuzzer can't be built: there is no {tool}")
    # Not with a compiler that something else has named in the environment: CXX=gcc was met, which doesn't link C++.
    clean = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX", "CFLAGS", "CXXFLAGS")}

    def make(_: Path) -> None:
        done = subprocess.run(["make", "fuzzer"], cwd=ROOT, capture_output=True, text=True, check=False, env=clean)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]

    made_once("fuzzer", make)
    return ROOT / "build" / "sanitize" / "graphopt_fuzz"


@pytest.mark.parametrize("name", operators())
def test_nothing_crashes(fuzzer: Path, name: str) -> None:
    done = subprocess.run(
        [fuzzer, "--operator", name, "--cases", "1000"], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]
    if (OPERATORS / folder_of(name) / "cpu.cc").is_file():
        assert f"{name}, inputs" in done.stdout


@pytest.mark.parametrize("name", operators())
def test_the_fuzzer_knows_a_valid_node(name: str) -> None:
    folder = OPERATORS / folder_of(name)
    if (folder / "cpu.cc").is_file():
        assert (folder / "fuzz.cc").is_file(), f"{folder.name} has a kernel and no fuzz.cc"
