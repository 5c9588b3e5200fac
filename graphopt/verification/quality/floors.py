"""Floors: what a metric must at least reach, as users write it, and whether it does.

ppl=+5%          at most 5 % above the original's perplexity
cer<=+0.001      at most 0.001 above the original's error rate
kl<=0.05         at most 0.05
top1>=0.98       at least 0.98, which is also top1>=98%
spearman=0.995   "=" is the bound on the metric's worse side
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from graphopt.errors import QualityError, UsageError
from graphopt.verification.quality.metrics import Better, Metric, Quality, Scale

_FLOOR = re.compile(
    r"\s*(?P<name>[a-z][a-z0-9_]*)\s*(?P<sign><=|>=|=|<|>)\s*(?P<change>[+\-−]?)\s*"
    r"(?P<number>\d+\.?\d*(?:e[+-]?\d+)?|\.\d+(?:e[+-]?\d+)?)\s*(?P<percent>%?)\s*",
    re.IGNORECASE,
)
_EXAMPLES = "such as ppl=+5%, kl<=0.05, top1>=0.98 or cer<=+0.001"

METRICS: dict[str, dict[str, tuple[Better, bool, Scale]]] = {
    "language": {
        "ppl": ("lower", True, "number"),
        "kl": ("lower", False, "number"),
        "top1": ("higher", False, "share"),
    },
    "embedding": {
        "spearman": ("higher", False, "number"),
        "cosine": ("higher", False, "number"),
        "min_cosine": ("higher", False, "number"),
    },
    "classification": {
        "accuracy": ("higher", True, "share"),
        "top1": ("higher", False, "share"),
        "score": ("higher", False, "share"),
        "score_error": ("lower", False, "number"),
    },
    "detection": {
        "score": ("higher", False, "share"),
        "score_error": ("lower", False, "number"),
        "iou": ("higher", False, "share"),
        "detections": ("higher", False, "share"),
    },
    "recognition": {"cer": ("lower", True, "share"), "change": ("lower", False, "share")},
    "generic": {"cosine": ("higher", False, "number"), "error": ("lower", False, "number")},
}
"""The metrics of each task: the better side, whether the original has one of its own, and its scale."""

TASKS = tuple(METRICS)


@dataclasses.dataclass(frozen=True)
class Floor:
    """A bound of one metric.

    Attributes:
        name: The metric.
        bound: The number, or the change from the reference's.
        better: The side of the metric that is better: "lower" for an upper bound.
        change: What `bound` is: "none" for the number itself, or an "absolute" or "relative" change.
        text: As it was written.
    """

    name: str
    bound: float
    better: Better
    change: Literal["none", "absolute", "relative"]
    text: str

    def limit(self, metric: Metric) -> float:
        """The number that the metric must reach."""
        if self.change == "none":
            return self.bound
        assert metric.reference is not None
        return metric.reference * (1 + self.bound) if self.change == "relative" else metric.reference + self.bound

    def held(self, metric: Metric) -> bool:
        """Whether the metric reaches it; NaN never does."""
        limit = self.limit(metric)
        # A change of nothing must hold for equal models, whatever the last digits are.
        slack = 1e-12 * abs(limit)
        return metric.value <= limit + slack if self.better == "lower" else metric.value >= limit - slack


@dataclasses.dataclass(frozen=True)
class Missed:
    """A floor that wasn't reached.

    Attributes:
        floor: The floor.
        metric: What was reached.
    """

    floor: Floor
    metric: Metric

    @property
    def sentence(self) -> str:
        """Which one, and by how much, without a full stop."""
        metric, limit = self.metric, self.floor.limit(self.metric)
        if math.isnan(metric.value):
            return f"{metric.name} is no number where {self.floor.text} was asked for"
        by = shown(abs(metric.value - limit), metric.scale)
        beside = "" if metric.reference is None else f", the original {shown(metric.reference, metric.scale)}"
        side = "above" if metric.better == "lower" else "below"
        return (
            f"{metric.name} is {shown(metric.value, metric.scale)}{beside}, {by} {side} the floor "
            f"{self.floor.text}{'' if self.floor.change == 'none' else f' ({shown(limit, metric.scale)})'}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types."""
        return {"floor": self.floor.text, "metric": self.metric.name, "limit": self.floor.limit(self.metric),
                "reason": self.sentence}  # fmt: skip


def parse_floor(text: str) -> Floor:
    """A floor as users write it.

    Raises:
        UsageError: It can't be read; the sentence says why.
    """
    match = _FLOOR.fullmatch(text)
    if match is None:
        raise UsageError(f"{text!r} is no floor; write a metric, =, <= or >=, and a number, {_EXAMPLES}.")
    name, sign = match["name"].lower(), match["sign"]
    known = {key: facts for metrics in METRICS.values() for key, facts in metrics.items()}
    if name not in known:
        raise UsageError(f"There is no metric {name!r}; the metrics are {', '.join(known)}.")
    better, has_reference, scale = known[name]
    if sign in "<>":
        raise UsageError(f"{text!r}: write {sign}= for a floor, {_EXAMPLES}.")
    if (sign == "<=" and better == "higher") or (sign == ">=" and better == "lower"):
        right = ">=" if better == "higher" else "<="
        raise UsageError(f"{text!r}: {name} is better when {better}, so its floor is {name}{right}NUMBER.")
    number = float(match["number"]) / (100 if match["percent"] else 1)
    if not match["change"]:
        if match["percent"] and scale != "share":
            raise UsageError(f"{text!r}: {name} is no percentage; write {name}=+{match['number']}% for a change.")
        return Floor(name, number, better, "none", text.strip())
    if not has_reference:
        raise UsageError(
            f"{text!r}: {name} compares with the original already and has no change; leave out the {match['change']}."
        )
    number = number if match["change"] == "+" else -number
    # A percentage of a share is points of it: accuracy=-1% is one point less.
    relative = bool(match["percent"]) and scale != "share"
    return Floor(name, number, better, "relative" if relative else "absolute", text.strip())


def parse_floors(texts: Iterable[str], metrics: Sequence[str] | None = None) -> list[Floor]:
    """Floors as users write them.

    Args:
        texts: The floors.
        metrics: What will be measured, where that is known.

    Raises:
        UsageError: One can't be read, its metric isn't measured, or one metric has two.
    """
    floors = [parse_floor(text) for text in texts]
    for index, floor in enumerate(floors):
        if metrics is not None and floor.name not in metrics:
            raise UsageError(
                f"{floor.text!r}: {floor.name} can't be told for this task from this data; what can is "
                f"{', '.join(metrics)}."
            )
        if any(other.name == floor.name for other in floors[:index]):
            raise UsageError(f"There are two floors for {floor.name}; give one.")
    return floors


def missed_floors(quality: Quality, floors: Sequence[Floor]) -> list[Missed]:
    """The floors that a candidate doesn't reach.

    Raises:
        UsageError: A floor for a metric that the outputs of this model don't give.
    """
    measured = {metric.name: metric for metric in quality.metrics}
    if unknown := [floor for floor in floors if floor.name not in measured]:
        raise UsageError(
            f"{unknown[0].text!r}: {unknown[0].name} can't be told of this model; what can is {', '.join(measured)}."
        )
    return [Missed(floor, measured[floor.name]) for floor in floors if not floor.held(measured[floor.name])]


def require_floors(missed: Sequence[Missed], consequence: str = "") -> None:
    """Raise QualityError with one sentence if floors were missed; `consequence` ends it."""
    if missed:
        sentence = "; ".join(m.sentence for m in missed)
        raise QualityError(f"Too little quality: {sentence}{consequence}.")


def shown(value: float, scale: Scale = "number") -> str:
    """A metric's number in words: four significant digits, or a percentage with as many as tell it from 100 %."""
    if not math.isfinite(value):
        return "no number" if math.isnan(value) else "infinite"
    if scale == "share":
        return f"{100 * value:.{3 if 0.99 <= value < 1 else 2}f} %"
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:#.4g}"
