"""The pass manager: records, rounds, rollback of passes that break their promise, bisection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common
import pytest
from exactness import op_types, parse

import graphopt.pass_manager
from graphopt.analysis.shapes import ShapeFacts
from graphopt.api import optimize
from graphopt.errors import GraphoptError, InputDataError, UsageError
from graphopt.graph.edits import Editor
from graphopt.pass_manager import PassManager, VerifyMode
from graphopt.passes.base import Guarantee, Pass, RulePass
from graphopt.passes.clean.eliminate_dead_code import EliminateDeadCode
from graphopt.passes.clean.eliminate_identities import EliminateIdentities
from graphopt.verification.probes import make_probes
from graphopt.verification.verifier import Verifier

TEXT = """<ir_version: 10, opset_import: ["": 21]>
g (float[n, 4] x) => (float[n, 4] y) <float[4] w = {1, 2, 3, 4}> {
  dead = Abs(x)  i = Identity(x)  a = Mul(i, w)  b = Neg(a)  y = Tanh(b)
}"""


def verifier_of(reference: ir.Model) -> Verifier:
    return Verifier(reference, make_probes(reference))


class Replace(RulePass):
    """Replace one operator by another one (a test's stand-in for right and wrong rules)."""

    family: ClassVar[str] = "raise"

    def __init__(self, old: str, new: str) -> None:
        super().__init__()
        self.old, self.new = old, new

    def rewrite(self, node: ir.Node, edit: Editor) -> bool:
        if node.op_type != self.old:
            return False
        edit.replace(node.outputs[0], edit.op(self.new, list(node.inputs), like=node.outputs[0]))
        return self.applied(node, f"{self.old} became {self.new}")


class NegToAbs(Replace):
    """Wrong."""

    name: ClassVar[str] = "neg-to-abs"
    anchors: ClassVar[tuple[str, ...]] = ("Neg",)

    def __init__(self) -> None:
        super().__init__("Neg", "Abs")


class TanhToTanh(Replace):
    """Right: x·w becomes w·x."""

    name: ClassVar[str] = "commute"
    anchors: ClassVar[tuple[str, ...]] = ("Mul",)

    def __init__(self) -> None:
        super().__init__("Mul", "Mul")

    def rewrite(self, node: ir.Node, edit: Editor) -> bool:
        if node.inputs[0] is not None and node.inputs[0].is_initializer():
            return False
        edit.replace(node.outputs[0], edit.op("Mul", [node.inputs[1], node.inputs[0]], like=node.outputs[0]))
        return self.applied(node, "operands swapped")


class LossyNeg(NegToAbs):
    """A loss that a recipe asked for."""

    name: ClassVar[str] = "lossy-neg"
    guarantee: ClassVar[Guarantee] = Guarantee.LOSSY


class Raises(Pass):
    """Fails halfway, with the graph already damaged."""

    name: ClassVar[str] = "raises"
    family: ClassVar[str] = "raise"

    def apply(self, model: ir.Model) -> bool:
        node = next(n for n in model.graph if n.op_type == "Neg")
        node.replace_input_with(0, ir.Value(name="nowhere"))
        raise ValueError("half done")


class Dangling(Raises):
    """Leaves an undefined input behind."""

    name: ClassVar[str] = "dangling"

    def apply(self, model: ir.Model) -> bool:
        try:
            return super().apply(model)
        except ValueError:
            return True


class CannotKeep(Raises):
    """An option that can't be kept, with the graph already damaged."""

    name: ClassVar[str] = "cannot-keep"

    def __init__(self, error: GraphoptError) -> None:
        super().__init__()
        self.error = error

    def apply(self, model: ir.Model) -> bool:
        try:
            return super().apply(model)
        except ValueError:
            raise self.error from None


class Needs(EliminateDeadCode):
    """Asks for data."""

    name: ClassVar[str] = "needs"
    needs: ClassVar[tuple[str, ...]] = ("absmax",)


def test_passes_are_recorded_and_verified() -> None:
    model = parse(TEXT)
    report = PassManager([EliminateDeadCode(), EliminateIdentities(), TanhToTanh()], verifier_of=verifier_of)(model)
    assert op_types(model) == ["Mul", "Neg", "Tanh"]
    assert [(r.name, r.status, r.round) for r in report.records] == [
        ("eliminate-dead-code", "applied", 1),
        ("eliminate-identities", "applied", 1),
        ("commute", "applied", 1),
        ("eliminate-dead-code", "unchanged", 2),
        ("eliminate-identities", "unchanged", 2),
    ]
    assert report.verdict is not None
    assert report.verdict.ok
    assert (report.before.nodes, report.after.nodes) == (5, 3)
    assert not report.rolled_back


@pytest.mark.parametrize("mode", ["auto", "pass", "phase"])
@pytest.mark.parametrize("order", range(3))
def test_the_guilty_pass_is_taken_back_and_the_others_stay(mode: VerifyMode, order: int) -> None:
    passes: list[ir.passes.PassBase] = [EliminateIdentities(), TanhToTanh()]
    passes.insert(order, NegToAbs())
    model = parse(TEXT)
    report = PassManager([EliminateDeadCode(), *passes], verifier_of=verifier_of, verify=mode)(model)
    assert sorted(op_types(model)) == ["Mul", "Neg", "Tanh"]
    (guilty,) = report.rolled_back
    assert guilty.name == "neg-to-abs"
    assert "y" in guilty.detail
    assert guilty.verdict is not None
    assert report.verdict is not None
    assert report.verdict.ok
    assert model.graph.initializers["w"].const_value is not None


class ReluOfNeg(Replace):
    """Right: min(0, x) becomes -Relu(-x), in which others find a Neg."""

    name: ClassVar[str] = "relu-of-neg"
    anchors: ClassVar[tuple[str, ...]] = ("Min",)

    def __init__(self) -> None:
        super().__init__("Min", "Neg")

    def rewrite(self, node: ir.Node, edit: Editor) -> bool:
        positive = edit.op("Relu", [edit.op("Sub", [node.inputs[1], node.inputs[0]])])
        edit.replace(node.outputs[0], edit.op("Neg", [positive], like=node.outputs[0]))
        return self.applied(node, "written with Relu")


@pytest.mark.parametrize("mode", ["pass", "phase"])
def test_a_pass_that_fails_in_a_later_round_is_taken_back_alone(mode: VerifyMode) -> None:
    text = """<ir_version: 10, opset_import: ["": 21]>
    g (float[n, 4] x) => (float[n, 4] y) <float zero = {0}> { i = Identity(x)  m = Min(i, zero)  y = Tanh(m) }"""
    model = parse(text)
    passes = [NegToAbs(), ReluOfNeg(), EliminateIdentities()]
    report = PassManager(passes, verifier_of=verifier_of, verify=mode)(model)
    assert [(r.name, r.round) for r in report.rolled_back] == [("neg-to-abs", 2)]
    assert [r.name for r in report.records if r.status == "applied"] == ["relu-of-neg", "eliminate-identities"]
    assert op_types(model) == ["Sub", "Relu", "Neg", "Tanh"]
    assert report.after.nodes == 4
    assert report.verdict is not None
    assert report.verdict.ok
    assert not {key for key in model.meta if key.startswith("graphopt.shapes")}


def test_a_round_that_changes_nothing_does_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """No copy, no check and no inference: what a long recipe costs on a model that is done."""
    model = parse(TEXT)
    passes = [EliminateDeadCode(), EliminateIdentities()]
    PassManager(passes, verifier_of=None)(model)
    done: list[str] = []
    for owner, name in ((ir.Model, "clone"), (graphopt.pass_manager, "new_problems"), (ShapeFacts, "apply")):
        original = getattr(owner, name)

        def counted(*args: Any, _name: str = name, _original: Any = original, **named: Any) -> Any:
            done.append(_name)
            return _original(*args, **named)

        monkeypatch.setattr(owner, name, counted)
    report = PassManager(passes, verifier_of=None)(model)
    assert not report.modified
    assert done == ["apply"] * len(model.graph) + ["clone"]  # once a run


class RoundsAnew(Replace):
    """Claims to keep every bit, but rounds otherwise: x·w becomes x/(1/w)."""

    name: ClassVar[str] = "rounds-anew"
    bitwise: ClassVar[bool] = True
    anchors: ClassVar[tuple[str, ...]] = ("Mul",)

    def __init__(self) -> None:
        super().__init__("Mul", "Div")

    def rewrite(self, node: ir.Node, edit: Editor) -> bool:
        inverse = edit.op("Reciprocal", [node.inputs[1]])
        edit.replace(node.outputs[0], edit.op("Div", [node.inputs[0], inverse], like=node.outputs[0]))
        return self.applied(node, "divided by the reciprocal")


@pytest.mark.parametrize("mode", ["pass", "phase"])
def test_a_bit_that_changes_where_none_may(mode: VerifyMode) -> None:
    model = parse(TEXT)
    passes = [RoundsAnew(), EliminateDeadCode(), EliminateIdentities()]
    report = PassManager(passes, verifier_of=verifier_of, verify=mode)(model)
    assert [r.name for r in report.rolled_back] == ["rounds-anew"]
    assert op_types(model) == ["Mul", "Neg", "Tanh"]


@pytest.mark.parametrize("mode", ["pass", "phase"])
def test_the_verdict_is_that_of_the_result(mode: VerifyMode) -> None:
    model = parse(TEXT)
    report = PassManager([EliminateIdentities(), NegToAbs()], verifier_of=verifier_of, verify=mode)(model)
    assert report.verdict is not None
    assert report.verdict.ok
    alone = PassManager([NegToAbs()], verifier_of=verifier_of, verify=mode)(parse(TEXT))
    assert alone.rolled_back
    assert alone.verdict is None


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("bad", [Raises, Dangling])
def test_a_pass_that_breaks_the_graph_is_taken_back(bad: Callable[[], Pass], verify: bool) -> None:
    model = parse(TEXT)
    report = PassManager(
        [EliminateDeadCode(), EliminateIdentities(), bad()], verifier_of=verifier_of if verify else None
    )(model)
    assert op_types(model) == ["Mul", "Neg", "Tanh"]
    (guilty,) = report.rolled_back
    assert "half done" in guilty.detail or "nowhere" in guilty.detail


@pytest.mark.parametrize("error", [UsageError("Too little."), InputDataError("No sample.")])
def test_a_request_that_cannot_be_kept_ends_the_run(error: GraphoptError) -> None:
    model = parse(TEXT)
    with pytest.raises(type(error), match=str(error)):
        PassManager([CannotKeep(error), TanhToTanh()], verifier_of=verifier_of)(model)
    assert ir.to_proto(model) == ir.to_proto(parse(TEXT))


def test_lossy_passes_become_the_reference() -> None:
    model = parse(TEXT)
    report = PassManager([LossyNeg(), EliminateDeadCode(), EliminateIdentities()], verifier_of=verifier_of)(model)
    assert op_types(model) == ["Mul", "Abs", "Tanh"]
    assert not report.rolled_back
    assert [r.round for r in report.records if r.name == "lossy-neg"] == [1]


def test_passes_of_onnx_ir_run_too() -> None:
    model = parse(TEXT)
    report = PassManager([common.IdentityEliminationPass()], verifier_of=verifier_of)(model)
    assert "Identity" not in op_types(model)
    assert report.records[0].guarantee == "unstated"


def test_a_pass_runs_in_onnx_irs_manager() -> None:
    model = parse(TEXT)
    ir.passes.PassManager([EliminateDeadCode(), EliminateIdentities()])(model)
    assert op_types(model) == ["Mul", "Neg", "Tanh"]


def test_calibration_is_asked_for() -> None:
    with pytest.raises(UsageError, match="'needs' needs calibration data"):
        PassManager([Needs()])


def test_empty_pipeline() -> None:
    with pytest.raises(UsageError):
        PassManager([])


def test_other_mistakes() -> None:
    with pytest.raises(UsageError, match="passes only"):
        PassManager(["fold-constants"])  # type: ignore[list-item]
    with pytest.raises(UsageError, match="no mode False"):
        PassManager([EliminateDeadCode()], verify=False)  # type: ignore[arg-type]


def test_progress_and_determinism() -> None:
    seen: list[Any] = []
    results = []
    for _ in range(2):
        model = parse(TEXT)
        PassManager([EliminateDeadCode(), TanhToTanh()], progress=lambda *a: seen.append(a))(model)
        results.append(ir.to_proto(model).SerializeToString(deterministic=True))
    assert results[0] == results[1]
    assert seen[0] == ("eliminate-dead-code", 0, 2)
    assert np.prod([len(s) for s in seen]) > 0


def test_a_proto_given_by_the_caller_stays_as_it_is() -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 21]> g (float[3] x) => (float[3] y) <bool c = {1}> { y = If(c) <'
        "then_branch = t () => (float[3] p) <float[3] w = {1, 2, 3}> { p = Mul(x, w) }, "
        "else_branch = e () => (float[3] q) { q = Neg(x) }> }"
    )
    before = proto.SerializeToString(deterministic=True)
    assert optimize(proto, verify="none").report is not None
    assert proto.SerializeToString(deterministic=True) == before
