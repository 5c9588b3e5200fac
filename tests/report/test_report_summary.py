"""What a report says, before it is laid out."""

from __future__ import annotations

import sample

from graphopt.report import measured, summary


def left(details: list[str]) -> list[dict[str, str]]:
    return [{"pass": "p", "node": f"n{i}", "op_type": "Add", "detail": d} for i, d in enumerate(details)]


def test_reasons_that_differ_in_numbers_or_names_are_one_group() -> None:
    groups = summary.group_left(left([f"past.{i}.value[2] of 'x{i}': {i}.5 times {i},000 bytes" for i in range(40)]))
    assert [(len(g.sites), g.varies) for g in groups] == [(40, True)]
    assert groups[0].reason == "past.0.value[2] of 'x0': 0.5 times 0,000 bytes"


def test_reasons_that_differ_in_words_are_not() -> None:
    groups = summary.group_left(left(["type is float16", "type is float32", "type is float16", "axis0"]))
    assert [(g.reason, len(g.sites)) for g in groups] == [("type is float16", 2), ("axis0", 1), ("type is float32", 1)]


def test_headlines() -> None:
    data = sample.report()
    assert "1 pass rolled back" in summary.headline(data)
    assert "valid only for no-left-padding" in summary.headline(data)
    assert "not verified" in summary.headline({**data, "verification": None})
    assert "NOT equal" in summary.headline({**data, "verification": sample.failing_verdict()})
    assert "the same numbers on 6 probes" in summary.headline({**data, "verification": sample.verdict(0.0)})
    data["output"]["bytes"] = 45_000_000
    assert "90.9 MB → 45.0 MB on disk" in summary.headline(data)


def test_a_ratio_within_the_noise_says_so() -> None:
    timing = sample.timing(0.96)
    assert measured.speed(timing) == "0.96× CPU time"
    timing["control"]["cpu_ratio"]["median"] = 1.05
    assert measured.speed(timing) == "0.96× CPU time (within noise)"
    assert measured.speed(None) == ""


def test_models_of_a_benchmark_are_told_apart() -> None:
    timing = sample.timing()
    timing["models"][0]["name"], timing["models"][1]["name"] = "old/a/model.onnx", "new/a/model.onnx"
    assert [r.label for r in measured.timing_rows(timing)][:2] == ["old/a/model.onnx", "new/a/model.onnx"]


def test_checks() -> None:
    data = sample.report()
    assert ("bad", "fold-batch-norm rolled back") in summary.checks(data)
    data["passes"] = [p for p in data["passes"] if p["status"] != "rolled back"]
    limited = ("warn", "Valid only for no-left-padding")
    good = [("good", "Verified against the original"), ("good", "Every pass that ran is exact")]
    assert summary.checks(data) == [good[0], limited, good[1]]
    del data["assumptions"]
    assert summary.checks(data) == good
    data["passes"][1]["guarantee"] = "lossy"
    assert ("warn", "Lossy passes ran: the numbers were meant to change") in summary.checks(data)


def test_what_a_result_is_valid_only_for() -> None:
    (found,) = summary.valid_only_for(sample.report())
    assert found.inputs == ("attention_mask",)
    assert found.reasons[0] == "group-query-attention: the kernel takes lengths"
    assert found.sentence.startswith(
        "no-left-padding: each row of the attention mask is ones, then zeros (input 'attention_mask'); needed by group-"
    )
    assert summary.not_needed(sample.report()) == "Given but not needed: batch=1."
    assert summary.valid_only_for({}) == []
    assert summary.not_needed({}) == ""
    assert summary.conditions([{}])[0].sentence == "?: ; needed by ?: no reason given"


def test_the_recipe_in_full_has_what_it_assumes() -> None:
    data = {"recipe": {"passes": ["a"], "assume": ["batch=1"]}}
    assert summary.recipe_yaml(data) == "passes:\n- a\nassume:\n- batch=1\n"
