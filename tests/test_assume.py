"""Passes that are right on a part of the domain: caught where nothing is assumed, accepted and noted where it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from narrowing import INPUTS, Narrow, decoder

import graphopt
from graphopt.api import Result, optimize
from graphopt.errors import AssumptionError, ModelError, UsageError
from graphopt.graph.assumptions import ASSUMPTIONS_KEY, Assumptions, read
from graphopt.pass_manager import PassManager, VerifyMode
from graphopt.report.html import render_html
from graphopt.verification.verdict import Verdict

ASSUMED = ("no-padding", "no-left-padding", "batch=1", "no-batched-chunks", "counted-positions", "max-length=13")

ONE_ROW = {
    "prefill", "prefill, other positions", "decode", "chunk",
    "chunk of one, left padding", "chunk of one, right padding",
}  # fmt: skip
"""The probes of a decoder with a batch of one, where that is assumed."""


def narrow(right_for: str, honest: bool = True, name: str = "Narrow") -> dict[str, Any]:
    return {f"narrowing:{name}": {"right_for": right_for, "honest": honest}}


def run(*steps: dict[str, Any], model: ir.Model | None = None, verify: VerifyMode = "auto", **options: Any) -> Result:
    return optimize(model or decoder(), {"passes": list(steps)}, verify=verify, **options)


def probes_of(verdict: Verdict | None) -> list[str]:
    assert verdict is not None
    return list(dict.fromkeys(c.probe for c in verdict.checked))


# ---- what is claimed is what is judged


@pytest.mark.parametrize("assumption", ASSUMED)
@pytest.mark.parametrize("verify", ["pass", "phase"])
def test_a_narrower_domain_without_a_word_is_taken_back(assumption: str, verify: VerifyMode) -> None:
    result = run(narrow(assumption, honest=False), verify=verify)
    assert [r.status for r in result.report.run.records if r.round == 1] == ["rolled back"]
    assert result.report.relied == []
    # To assume it makes no difference for a pass that doesn't say that it relies on it.
    if assumption != "max-length=13":  # longer inputs aren't even probed then
        assert not run(narrow(assumption, honest=False), assume=assumption).report.ok


@pytest.mark.parametrize("assumption", ASSUMED)
@pytest.mark.parametrize("verify", ["pass", "phase"])
def test_where_it_is_assumed_the_pass_is_accepted_and_the_model_says_so(assumption: str, verify: VerifyMode) -> None:
    result = run(narrow(assumption), assume=[assumption], verify=verify)
    assert result.report.ok
    assert result.report.run.modified
    (entry,) = read(result.model)
    assert entry.to_dict() == {
        "assumption": assumption,
        "inputs": INPUTS,
        "reason": "a quicker formula",
        "pass": "narrow",
    }
    assert result.report.to_dict()["assumptions"]["unneeded"] == []
    verdict = graphopt.verify(decoder(), result)
    assert verdict.ok
    # Without the model's word for it the two are different.
    del result.model.metadata_props[ASSUMPTIONS_KEY]
    assert not graphopt.verify(decoder(), result).ok


def test_where_it_is_not_assumed_an_honest_pass_does_nothing() -> None:
    result = run(narrow("batch=1"))
    assert not result.report.run.modified
    assert [site.detail for _, site in result.report.run.left()] == ["batch=1 isn't assumed"]
    why = graphopt.inspect(decoder(), why=True)
    assert why["assumptions"] == []


def test_the_probes_cover_the_domain_that_is_claimed_and_no_more() -> None:
    everything = set(probes_of(run(narrow("max-length=99"), assume="max-length=99").report.run.verdict))
    assert {"prefill", "prefill, batch", "decode", "decode, batch", "chunk", "decode, longest"} < everything
    found = {
        name: set(probes_of(run(narrow(name), assume=name).report.run.verdict)) for name in ASSUMED if "=13" not in name
    }
    assert found["no-left-padding"] == everything - {
        "decode, longest",
        "prefill, left padding",
        "decode, left padding",
        "chunk, left padding",
    }
    assert found["no-padding"] == {n for n in everything if "padding" not in n} - {"decode, longest"} | {"chunk, batch"}
    assert found["batch=1"] == ONE_ROW
    assert found["counted-positions"] == found["no-left-padding"] - {"prefill, other positions"}
    unbatched = {n for n in everything if not n.startswith("chunk,")} - {"decode, longest"}
    assert found["no-batched-chunks"] == unbatched | ONE_ROW


def test_the_verdict_says_where_it_compared() -> None:
    verdict = run(narrow("no-left-padding"), assume="no-left-padding").report.run.verdict
    assert verdict is not None
    assert (
        "Compared only where the result is valid (no-left-padding): on 8 of 11 probes, not on 'prefill, left padding', "
        "'decode, left padding', 'chunk, left padding'." in verdict.notes
    )
    assert (
        "At padded positions, which no-left-padding leaves open, 'logits', 'present_key' are not compared."
        in verdict.notes
    )
    counted = {(c.probe, c.output.name): c.output.elements for c in verdict.checked}
    assert counted["prefill, batch", "logits"] == 3 * 13 * 9
    assert counted["prefill, right padding", "logits"] == (8 + 6 + 4) * 9
    assert counted["chunk, right padding", "present_key"] == (11 + 10 + 9) * 2 * 4


def test_a_wrong_pass_is_caught_inside_of_what_is_claimed() -> None:
    # What it relies on is weaker than what it needs.
    class Liar(Narrow):
        name = "liar"

        def rely_on(self, model: ir.Model, assumption: str, inputs: Any, reason: str) -> bool:
            return super().rely_on(model, "no-left-padding", inputs, reason)

    model = decoder()
    graphopt_run = PassManager([Liar("no-padding")], assumptions=Assumptions.parse(["no-padding"]))(model)
    assert [r.status for r in graphopt_run.records if r.round == 1] == ["rolled back"]
    assert read(model) == []


@pytest.mark.parametrize("verify", ["pass", "phase"])
def test_passes_before_the_one_that_relies_on_it_are_judged_on_everything(verify: VerifyMode) -> None:
    result = run(
        narrow("no-left-padding", honest=False),
        narrow("batch=1", name="NarrowWaves"),
        assume=["no-left-padding", "batch=1"],
        verify=verify,
    )
    states = {r.name: r.status for r in result.report.run.records if r.round == 1}
    assert states == {"narrow": "rolled back", "narrow-waves": "applied"}
    (wrong,) = result.report.run.rolled_back
    assert "padding'" in wrong.detail
    assert [e.by for e in read(result.model)] == ["narrow-waves"]
    assert "Softsign" in [node.op_type for node in result.model.graph]


def test_each_of_two_claims_is_judged() -> None:
    steps = (narrow("no-left-padding"), narrow("batch=1", name="NarrowWaves"))
    result = run(*steps, assume=["no-left-padding", "batch=1"], verify="phase")
    assert result.report.ok
    first, second = (r.verdict for r in result.report.run.records if r.status == "applied")
    assert len(probes_of(first)) == 8 + 1  # one row, padded on the right
    assert set(probes_of(second)) == ONE_ROW - {"chunk of one, left padding"}


def test_what_was_not_assumed_can_not_be_relied_on() -> None:
    pass_ = Narrow("batch=1")
    with pytest.raises(ValueError, match="relies on batch=1, which wasn't assumed"):
        pass_.rely_on(decoder(), "batch=1", INPUTS, "")
    pass_.assumptions = Assumptions.parse(["batch=1"])
    model = decoder()
    assert pass_.rely_on(model, "no-batched-chunks", INPUTS, "")
    assert not pass_.rely_on(model, "no-batched-chunks", INPUTS, "")
    with pytest.raises(ValueError, match="'mask' is no input"):
        pass_.rely_on(model, "batch=1", {"ids": "mask"}, "")


def test_where_no_probe_lies_in_the_domain_nothing_is_accepted() -> None:
    model = decoder()
    for value in (*model.graph.inputs, *model.graph.outputs):
        assert value.shape is not None
        value.shape = ir.Shape([3, *value.shape.dims[1:]])
    result = run(narrow("batch=1"), model=model, assume="batch=1")
    assert not result.report.ok
    assert "No probe lies in what the result is valid for (batch=1)" in result.report.run.rolled_back[0].detail


def test_inputs_of_the_users_own_outside_of_the_domain_are_told_of() -> None:
    feeds = {
        "input_ids": np.zeros((2, 3), np.int64),
        "attention_mask": np.ones((2, 3), np.int64),
        "position_ids": np.zeros((2, 3), np.int64),
        "past_key": np.zeros((2, 2, 0, 4), np.float32),
    }
    result = run(narrow("batch=1"), assume="batch=1", inputs=feeds)
    verdict = result.report.run.verdict
    assert verdict is not None
    assert any("not on 'the inputs given'" in note for note in verdict.notes)


# ---- where assumptions come from, and where they go


def test_a_recipe_may_carry_them() -> None:
    recipe = {"passes": [narrow("batch=1")], "assume": ["batch=1", "no-padding"]}
    result = optimize(decoder(), recipe)
    data = result.report.to_dict()
    assert data["recipe"]["assume"] == ["batch=1", "no-padding"]
    assert data["assumptions"]["given"] == ["batch=1", "no-padding"]
    assert data["assumptions"]["unneeded"] == ["no-padding"]
    assert [e["assumption"] for e in data["assumptions"]["relied"]] == ["batch=1"]


@pytest.mark.parametrize(
    ("assume", "told"),
    [
        ("batch=1", "must be a list of names"),
        ([1], "must be a list of names"),
        (["batch=2"], "did you mean batch=1"),
    ],
)
def test_what_a_recipe_may_not_carry(assume: Any, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        optimize(decoder(), {"passes": [narrow("batch=1")], "assume": assume})


def test_what_a_model_carries_holds_for_the_next_run() -> None:
    first = run(narrow("batch=1"), assume="batch=1").model
    for assumption in ("batch=1", "no-batched-chunks"):
        again = run(narrow(assumption, name="NarrowWaves"), model=first.clone())
        assert again.report.ok
        assert {(e.assumption, e.by) for e in read(again.model)} == {
            ("batch=1", "narrow"),
            (assumption, "narrow-waves"),
        }
        assert again.report.to_dict()["assumptions"]["given"] == []
        for reference in (decoder(), first):
            assert set(probes_of(graphopt.verify(reference, again))) == ONE_ROW
    assert not run(narrow("no-padding", name="NarrowWaves"), model=first.clone()).report.run.modified


def test_only_as_much_is_noted_as_is_relied_on() -> None:
    result = run(narrow("no-left-padding"), assume=["no-padding", "batch=1", "max-length=2048"])
    data = result.report.to_dict()["assumptions"]
    assert [e["assumption"] for e in data["relied"]] == ["no-left-padding"]
    assert data["unneeded"] == ["no-padding (no-left-padding was enough)", "batch=1", "max-length=2048"]


def test_unknown_names_are_told_before_the_work() -> None:
    for call in (optimize, graphopt.inspect):
        with pytest.raises(UsageError, match="did you mean no-padding"):
            call(decoder(), assume=["no-paddings"])


# ---- reports


def test_reports_say_what_the_result_is_valid_only_for(tmp_path: Path) -> None:
    result = run(narrow("no-left-padding"), assume=["no-left-padding", "batch=1"])
    data = json.loads(json.dumps(result.report.to_dict()))
    page = render_html(data)
    for words in ("Valid only for no-left-padding", "narrow: a quicker formula", "Given but not needed: batch=1."):
        assert words in page
    assert "valid only for no-left-padding" in page
    result.save(tmp_path / "m.onnx")
    (entry,) = graphopt.inspect(tmp_path / "m.onnx")["assumptions"]
    assert entry["reason"] == "a quicker formula"
    assert entry["meaning"].startswith("each row of the attention mask")
    assert graphopt.verify(decoder(), tmp_path / "m.onnx").ok


def test_a_report_without_assumptions_has_nothing_of_them() -> None:
    page = render_html(run(narrow("batch=1")).report.to_dict())
    assert "Valid only for" not in page
    assert "not needed" not in page
    unneeded = render_html(run(narrow("batch=1"), assume="no-padding").report.to_dict())
    assert "The result takes every input that the original takes." in unneeded


# ---- at run time


def test_the_session_refuses_what_the_result_is_not_right_for(tmp_path: Path) -> None:
    run(narrow("batch=1"), assume="batch=1").save(tmp_path / "m.onnx")
    feeds = {
        "input_ids": np.zeros((2, 3), np.int64),
        "attention_mask": np.ones((2, 3), np.int64),
        "position_ids": np.zeros((2, 3), np.int64),
        "past_key": np.zeros((2, 2, 0, 4), np.float32),
    }
    with pytest.raises(AssumptionError) as caught:
        graphopt.session(tmp_path / "m.onnx").run(None, feeds)
    assert str(caught.value) == (
        "The model was optimized for batch=1 (the batch is 1), but the batch of 'input_ids' is 2; to run such inputs, "
        "optimize the original again without assuming that."
    )
    assert graphopt.session(tmp_path / "m.onnx", check=False).run(None, feeds)[0].shape == (2, 3, 9)


def test_metadata_of_another_version_is_refused(tmp_path: Path) -> None:
    model = decoder()
    model.metadata_props[ASSUMPTIONS_KEY] = '[{"assumption": "even-length", "inputs": {}}]'
    graphopt.save(model, tmp_path / "m.onnx")
    for call in (graphopt.session, graphopt.optimize):
        with pytest.raises(ModelError, match="'even-length'"):
            call(tmp_path / "m.onnx")
