"""Time and peak memory of `graphopt optimize` and of its peers on one model, each in a process of its own.

    python benchmarks/tool_cost.py model.onnx                    graphopt, without verification
    python benchmarks/tool_cost.py model.onnx --peers --runs 3   and every peer that is installed

Figures are of the whole process, start-up and imports included: wall and CPU seconds, and the largest resident set
(which counts memory-mapped pages that were touched). The peers are onnxslim, onnxsim, onnxscript's optimizer and ONNX
Runtime's transformer optimizer; one that isn't installed says so. Runs are interleaved; medians are printed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

PEERS = {
    "onnxscript optimize": (
        "import sys, onnx_ir as ir, onnxscript.optimizer as o;"
        "m = ir.load(sys.argv[1]); o.optimize_ir(m); ir.save(m, sys.argv[2], external_data='peer.data')"
    ),
    "onnxslim": "import sys, onnxslim; onnxslim.slim(sys.argv[1], sys.argv[2], save_as_external_data=True)",
    "onnxsim": (
        "import sys, onnx, onnxsim; m, ok = onnxsim.simplify(sys.argv[1]);"
        "onnx.save(m, sys.argv[2], save_as_external_data=True)"
    ),
    "ONNX Runtime optimizer": (
        "import sys; from onnxruntime.transformers import optimizer as o;"
        "o.optimize_model(sys.argv[1], model_type='gpt2', opt_level=0)"
        ".save_model_to_file(sys.argv[2], use_external_data_format=True)"
    ),
}


def measure(command: list[str]) -> tuple[float, float, float, int]:
    """Wall seconds, CPU seconds, peak MB and exit status of one process."""
    start = time.perf_counter()
    with open(os.devnull, "w") as null:
        pid = os.posix_spawn(
            command[0], command, os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, null.fileno(), 1), (os.POSIX_SPAWN_DUP2, null.fileno(), 2)],
        )  # fmt: skip
        _, status, usage = os.wait4(pid, 0)
    elapsed = time.perf_counter() - start
    return elapsed, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1000, os.waitstatus_to_exitcode(status)


def main() -> None:
    """Print one line a tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--peers", action="store_true", help="Measure the peers too.")
    parser.add_argument("--verify", default="none", help="graphopt's --verify.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.model.parent) as folder:
        target = str(Path(folder) / "out.onnx")
        model = str(arguments.model)
        graphopt = [sys.executable, "-m", "graphopt", "optimize", model, "-o", target, "--force", "--verify"]
        commands = {"graphopt": [*graphopt, arguments.verify]}
        if arguments.peers:
            commands |= {name: [sys.executable, "-c", code, model, target] for name, code in PEERS.items()}
        found: dict[str, list[tuple[float, float, float, int]]] = {name: [] for name in commands}
        for _ in range(arguments.runs):
            for name, command in commands.items():
                if not found[name] or found[name][-1][3] == 0:
                    found[name].append(measure(command))
        print(f"{'tool':24} {'wall s':>8} {'CPU s':>8} {'peak MB':>8}   median of {arguments.runs}, {model}")
        for name, rows in found.items():
            if rows[-1][3] != 0:
                print(f"{name:24} failed with exit status {rows[-1][3]}, or isn't installed")
                continue
            wall, cpu, peak = (statistics.median(row[i] for row in rows) for i in range(3))
            print(f"{name:24} {wall:8.2f} {cpu:8.2f} {peak:8.0f}")


if __name__ == "__main__":
    main()
