"""Time and peak memory of `graphopt optimize` and of its peers on one model, each in a process of its own.

    python benchmarks/tool_cost.py model.onnx                    graphopt, without verification
    python benchmarks/tool_cost.py model.onnx --peers --runs 3   and every peer that is installed

Figures are of the whole process, start-up and imports included: wall and CPU seconds, and the largest resident set
(which counts memory-mapped pages that were touched). One that isn't installed says so (`pip install 'graphopt[zoo]'`
brings them). Runs are interleaved; medians are printed. `make zoo` measures all of them on many models.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from tools import PEERS, Cost, graphopt_tool, measure


def main() -> None:
    """Print one line a tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--peers", action="store_true", help="Measure the peers too.")
    parser.add_argument("--verify", default="none", help="graphopt's --verify.")
    arguments = parser.parse_args()
    tools = [graphopt_tool(arguments.verify), *(PEERS if arguments.peers else ())]
    with tempfile.TemporaryDirectory(dir=arguments.model.parent) as folder:
        target, log = Path(folder) / "out.onnx", Path(folder) / "log"
        found: dict[str, list[Cost]] = {tool.name: [] for tool in tools if tool.version is not None}
        for _ in range(arguments.runs):
            for tool in tools:
                costs = found.get(tool.name)
                if costs is not None and (not costs or costs[-1].status == 0):
                    costs.append(measure(tool.command(arguments.model, target), log))
    print(f"{'tool':24} {'wall s':>8} {'CPU s':>8} {'peak MB':>8}   median of {arguments.runs}, {arguments.model}")
    for tool in tools:
        costs = found.get(tool.name)
        if costs is None:
            print(f"{tool.name:24} is not installed")
        elif costs[-1].status:
            print(f"{tool.name:24} fails: {costs[-1].error}")
        else:
            wall, cpu, peak = (statistics.median(getattr(c, k) for c in costs) for k in ("wall_s", "cpu_s", "peak_mb"))
            print(f"{tool.name:24} {wall:8.2f} {cpu:8.2f} {peak:8.0f}")


if __name__ == "__main__":
    main()
