"""Every case of the CUDA harness that is small, with kernels that run on the host, their threads forwards and backwards."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from cuda_case import Case, all_cases, largest_difference
from cuda_launchers import OPERATORS, Launchers, declared

from tests.runtime_ops.cuda_emulation import emulated

torch = pytest.importorskip("torch")
MOST = 12
"""Cases of a launcher that are run in each direction; of more, every second, third, ... is."""
CASES = [case for case in all_cases() if not case.timed]


def folders(folder: str) -> list[str]:
    """A folder and those whose kernels it uses."""
    used = re.findall(r'#include "\.\./(\w+)/', (OPERATORS / folder / "cuda.cu").read_text(encoding="utf-8"))
    return sorted({folder, *(other for other in used if (OPERATORS / other / "cuda.cu").is_file())})


@pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize("launcher", sorted({case.launcher for case in CASES}))
def test_kernels_on_the_host(launcher: str, backwards: bool) -> None:
    every: list[Case] = [case for case in CASES if case.launcher == launcher]
    chosen = every[backwards :: -(-len(every) // MOST)]
    library = emulated(*folders(declared()[launcher].folder))
    library.on_host_run_backwards(int(backwards))
    launchers = Launchers(library)
    for case in chosen:
        call = case.make(torch, "cpu", launchers)
        given = list(call.arguments.values() if isinstance(call.arguments, dict) else call.arguments)
        for output in call.outputs:
            if sum(argument is output for argument in given) > 1:
                continue  # it is an input too
            output.fill_(float("nan") if output.dtype.is_floating_point else 99)
        assert launchers.call(case.launcher, call.arguments) == 0, case.shape
        assert largest_difference(call) <= 1, case.shape
