"""CPU time of each part of `graphopt optimize` on one model, and what a pass adds that finds nothing.

    python benchmarks/pass_cost.py model.onnx
    python benchmarks/pass_cost.py model.onnx --idle 30 --runs 9

Passes of three kinds are added to the default recipe: of operators that no model has, of the operators that every
model has, and of these with the rank and the type of each input asked for. Runs with and without them are interleaved;
the difference of the least times, divided by their number, is what one of them costs, both rounds of the recipe
together. Nothing is verified or written.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir

from graphopt.analysis.cost import cost
from graphopt.analysis.shapes import infer
from graphopt.cli.startup import prepare
from graphopt.graph import load
from graphopt.graph.edits import Editor
from graphopt.pass_manager import PassManager
from graphopt.passes.base import RulePass
from graphopt.passes.raise_.shape_rules import ShapeRulePass
from graphopt.recipe import load as load_recipe
from graphopt.verification.structure import check_structure

LEAST = 0.002
"""Seconds; passes that take less aren't listed."""
COMMON = ("Add", "Mul", "MatMul", "Gemm", "Conv", "Reshape", "Transpose")


class Nothing(RulePass):
    """Looks for an operator that no model has."""

    name: ClassVar[str] = "nothing"
    family: ClassVar[str] = "raise"
    anchors: ClassVar[tuple[str, ...]] = ("NoSuchOperator",)

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number  # a pass with the options of another one isn't run again on the same model

    def rewrite(self, node: ir.Node, edit: Editor) -> bool:
        """Never called."""
        return False


class Looking(Nothing):
    """Looks at the operators that every model has, and takes none."""

    name: ClassVar[str] = "looking"
    anchors: ClassVar[tuple[str, ...]] = COMMON


class Asking(ShapeRulePass):
    """Asks for the rank and the type of what they read."""

    name: ClassVar[str] = "asking"
    family: ClassVar[str] = "raise"
    anchors: ClassVar[tuple[str, ...]] = COMMON

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def rewrite(self, node: ir.Node, edit: Editor) -> bool:
        """Find out, and leave it at that."""
        for value in node.inputs:
            if value is not None:
                self.rank(value)
                self.dtype(value)
        return False


def seconds(action: Callable[[], object]) -> float:
    """CPU seconds of one call."""
    start = time.process_time()
    action()
    return time.process_time() - start


def pipeline(model: ir.Model, idle: Sequence[ir.passes.PassBase]) -> tuple[float, list[tuple[str, str, float]]]:
    """CPU seconds of a whole run, and (pass, status, wall seconds) of each pass."""
    passes = load_recipe().passes("cpu")
    manager = PassManager([*passes[:-1], *idle, passes[-1]], verify="none")
    start = time.process_time()
    report = manager(model)
    return time.process_time() - start, [(r.name, f"{r.round} {r.status}", r.seconds) for r in report.records]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--idle", type=int, default=15, help="How many passes are added of each kind (default: 15).")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    prepare()  # as the command does
    model = load(options.model)
    facts = infer(model)
    parts: dict[str, Callable[[], object]] = {
        "load": lambda: load(options.model),
        "check the structure": lambda: check_structure(model),
        "copy": model.clone,
        "infer shapes": lambda: infer(model),
        "infer them again": lambda: infer(model, earlier=facts),
        "count FLOPs": lambda: cost(model, facts, activations=False),
    }
    kinds: dict[str, type[Nothing] | type[Asking] | None] = {
        "": None,
        "nothing": Nothing,
        "looking": Looking,
        "asking": Asking,
    }
    whole: dict[str, list[float]] = defaultdict(list)
    single: dict[tuple[str, str], list[float]] = defaultdict(list)
    for _ in range(options.runs):
        for name, action in parts.items():
            whole[name].append(seconds(action))
        for name, kind in kinds.items():
            idle = [kind(number) for number in range(options.idle)] if kind is not None else []
            took, records = pipeline(load(options.model), idle)
            whole[f"recipe {name}"].append(took)
            if kind is None:
                positions: dict[str, int] = defaultdict(int)
                for label, status, wall in records:
                    positions[label] += 1
                    single[f"{label} ({positions[label]})", status].append(wall)
    print(f"{options.model}: {len(model.graph)} nodes; least CPU ms of {options.runs} runs")
    for name in parts:
        print(f"{min(whole[name]) * 1e3:9.1f}  {name}")
    base = min(whole["recipe "])
    print(f"{base * 1e3:9.1f}  the recipe")
    for name, kind in kinds.items():
        if kind is not None:
            added = (min(whole[f"recipe {name}"]) - base) / options.idle
            print(f"{added * 1e3:9.1f}  one more pass: {(kind.__doc__ or '').splitlines()[0]}")
    print(f"\nmedian wall ms of each pass, from {1e3 * LEAST:g} ms on")
    for (name, status), times in single.items():
        if statistics.median(times) >= LEAST:
            print(f"{statistics.median(times) * 1e3:9.1f}  {name}, round {status}")


if __name__ == "__main__":
    main()
