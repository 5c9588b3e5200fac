"""Floors: every way to write one, every mistake in one sentence, and the sentence for one that was missed."""

from __future__ import annotations

import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graphopt.errors import QualityError, UsageError
from graphopt.verification.quality.floors import (
    METRICS,
    Floor,
    missed_floors,
    parse_floor,
    parse_floors,
    require_floors,
)
from graphopt.verification.quality.metrics import Metric, Quality

CALM = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""A busy machine is no failure."""


def quality(**values: float | tuple[float, float]) -> Quality:
    """Values by metric; two of them: the candidate's and the reference's."""
    facts = {name: fact for metrics in METRICS.values() for name, fact in metrics.items()}
    metrics = []
    for name, value in values.items():
        better, _, scale = facts[name]
        own, reference = value if isinstance(value, tuple) else (value, None)
        metrics.append(Metric(name, name, better, own, reference, scale))
    return Quality("language", tuple(metrics), "")


@pytest.mark.parametrize(
    ("text", "bound", "change"),
    [
        ("ppl=+5%", 0.05, "relative"),
        (" PPL <= +5 % ", 0.05, "relative"),
        ("ppl<=20", 20, "none"),
        ("ppl=+0.5", 0.5, "absolute"),
        ("ppl=-2%", -0.02, "relative"),
        ("kl<=0.05", 0.05, "none"),
        ("kl=5e-2", 0.05, "none"),
        ("top1>=0.98", 0.98, "none"),
        ("top1>=98%", 0.98, "none"),
        ("spearman>=.995", 0.995, "none"),
        ("cer<=+0.001", 0.001, "absolute"),
        ("accuracy=-0.5%", -0.005, "absolute"),
        ("score_error<=0.1", 0.1, "none"),
    ],
)
def test_every_form(text: str, bound: float, change: str) -> None:
    floor = parse_floor(text)
    assert (floor.bound, floor.change) == (pytest.approx(bound), change)
    assert floor.text == text.strip()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("ppl", "'ppl' is no floor; write a metric, =, <= or >=, and a number, such as"),
        ("ppl=+5%%", "is no floor"),
        ("ppl=", "is no floor"),
        ("bleu>=3", "There is no metric 'bleu'; the metrics are ppl, kl, top1"),
        ("ppl>=20", "ppl is better when lower, so its floor is ppl<=NUMBER"),
        ("top1<=0.9", "top1 is better when higher, so its floor is top1>=NUMBER"),
        ("ppl<20", "write <= for a floor"),
        ("ppl=5%", r"ppl is no percentage; write ppl=\+5% for a change"),
        ("kl<=+0.05", r"kl compares with the original already and has no change; leave out the \+"),
    ],
)
def test_every_mistake(text: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        parse_floor(text)


def test_mistakes_of_several() -> None:
    assert [floor.name for floor in parse_floors(["kl=1", "top1=0.5"], ["ppl", "kl", "top1"])] == ["kl", "top1"]
    with pytest.raises(UsageError, match="spearman can't be told for this task from this data; what can is ppl, kl"):
        parse_floors(["spearman>=0.9"], ["ppl", "kl"])
    with pytest.raises(UsageError, match="There are two floors for kl; give one"):
        parse_floors(["kl=1", "kl=2"])


def test_a_metric_that_the_outputs_do_not_give() -> None:
    with pytest.raises(
        UsageError, match=r"'detections>=0\.9': detections can't be told of this model; what can is score"
    ):
        missed_floors(quality(score=1.0), parse_floors(["detections>=0.9"]))


def test_missed_and_held() -> None:
    found = quality(ppl=(20.0, 19.0), kl=0.05, top1=0.975)
    assert missed_floors(found, parse_floors(["ppl=+6%", "kl<=0.05", "top1>=0.97"])) == []
    missed = missed_floors(found, parse_floors(["ppl=+5%", "kl<=0.04", "top1>=0.98"]))
    assert [m.sentence for m in missed] == [
        "ppl is 20.00, the original 19.00, 0.05000 above the floor ppl=+5% (19.95)",
        "kl is 0.05000, 0.01000 above the floor kl<=0.04",
        "top1 is 97.50 %, 0.50 % below the floor top1>=0.98",
    ]
    assert missed[0].to_dict()["limit"] == pytest.approx(19.95)
    with pytest.raises(QualityError, match=r"^Too little quality: kl is .*; nothing was written\.$") as caught:
        require_floors(missed[1:2], "; nothing was written")
    assert caught.value.exit_code == 7
    require_floors([])


def test_nan_holds_no_floor() -> None:
    for name, (better, _, _) in METRICS["language"].items():
        floor = Floor(name, math.inf if better == "lower" else -math.inf, better, "none", f"{name}=...")
        [missed] = missed_floors(quality(**{name: math.nan}), [floor])
        assert missed.sentence == f"{name} is no number where {name}=... was asked for"


@CALM
@given(st.floats(1e-6, 1e6))
def test_equal_models_hold_a_change_of_nothing(value: float) -> None:
    for text in ("ppl=+0%", "ppl=+0", "ppl<=-0%"):
        assert missed_floors(quality(ppl=(value, value)), [parse_floor(text)]) == []
    assert missed_floors(quality(ppl=(value * 1.001, value)), [parse_floor("ppl=+0.05%")])


@CALM
@given(st.floats(0, 1), st.floats(0, 1))
def test_a_floor_is_its_inequality(value: float, bound: float) -> None:
    held = not missed_floors(quality(top1=value), [Floor("top1", bound, "higher", "none", "")])
    assert held == (value >= bound - 1e-12 * bound)
