"""The exact recipe on the ONNX standard's backend tests: every k-th here, all with GRAPHOPT_CONFORMANCE=all.

`python benchmarks/conformance.py` prints the same counts for all tests, and for folders of older ones.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import conformance
from backend_tests import Case, package_cases
from conformance import VARIANTS, conform, conform_all, table

from graphopt.graph.edits import Editor
from graphopt.passes.base import RulePass

EVERY = 1 if os.environ.get("GRAPHOPT_CONFORMANCE") == "all" else 6
"""Each variant meets other tests: together two thirds of all."""


def test_backend_tests(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    totals = conform_all(package_cases(), VARIANTS, EVERY)
    with capsys.disabled():
        print(f"\n{table(totals)}")
    assert [fault for t in totals.values() for fault in t.faults] == []
    for total in totals.values():
        counts = total.counts
        assert counts["ORT"] + counts["reference"] > 0.95 * counts["tests"], "too few tests are really compared"


class Wrong(RulePass):
    """Replaces one operator by another one."""

    name: ClassVar[str] = "wrong"
    family: ClassVar[str] = "raise"
    anchors: ClassVar[tuple[str, ...]] = ("Neg",)
    new: ClassVar[str] = "Abs"

    def rewrite(self, node: ir.Node, edit: Editor) -> bool:
        edit.replace(node.outputs[0], edit.op(self.new, list(node.inputs), like=node.outputs[0]))
        return self.applied(node, "replaced")


class Invalid(Wrong):
    new = "Absolutely"


class Restless(Wrong):
    new = "Neg"

    def apply(self, model: ir.Model) -> bool:
        model.graph.name = f"{model.graph.name}!"
        return True


class Renaming(Wrong):
    def apply(self, model: ir.Model) -> bool:
        model.graph.outputs[0].name = "other"
        return True


@pytest.mark.parametrize(
    ("fault", "words"),
    [(Wrong, "instead of|is off by"), (Invalid, "rolled back"), (Restless, "second run"), (Renaming, "called")],
)
def test_faults_are_seen(fault: type[Wrong], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")

    class Recipe:
        def passes(self) -> list[ir.passes.PassBase]:
            return [fault()]

    monkeypatch.setattr(conformance, "_recipe", Recipe)
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[3] x) => (float[3] y) { y = Neg(x) }'
    )
    case = Case("neg", lambda: proto, lambda: [[np.array([1, -2, 3], np.float32)]])
    outcome = conform(case)
    assert outcome is not None
    assert any(part in f for f in outcome.faults for part in words.split("|")), outcome.faults
