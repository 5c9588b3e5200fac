"""What judging a model gives: named numbers, each with the side on which it is better."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from graphopt.verification.compare import finite

Better = Literal["lower", "higher"]
Scale = Literal["share", "number"]
"""A share of 1, which may be given as a percentage, or any other number."""


@dataclasses.dataclass(frozen=True)
class Metric:
    """One number that a candidate got.

    Attributes:
        name: A short name, which floors use.
        title: What it is, in words.
        better: The side on which it is better.
        value: The candidate's; NaN where the candidate gave none.
        reference: What the reference got on the same data; None where the number compares the two.
        scale: Whether it is a share of 1.
    """

    name: str
    title: str
    better: Better
    value: float
    reference: float | None = None
    scale: Scale = "number"

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types; what isn't finite is null."""
        reference = None if self.reference is None else finite(self.reference)
        return {**dataclasses.asdict(self), "value": finite(self.value), "reference": reference}


@dataclasses.dataclass(frozen=True)
class Quality:
    """How a candidate does beside its reference.

    Attributes:
        task: What was judged: "language", "embedding", "classification", "detection", "recognition" or "generic".
        metrics: The numbers.
        samples: How much data they are over, in words: "4,088 tokens in 8 windows of 512".
        notes: What a reader must know besides, a sentence each.
        outputs: Of a generic judgement: the numbers of each output, by its name.
    """

    task: str
    metrics: tuple[Metric, ...]
    samples: str
    notes: tuple[str, ...] = ()
    outputs: tuple[tuple[str, tuple[Metric, ...]], ...] = ()

    def __getitem__(self, name: str) -> float:
        """The candidate's number by its name; KeyError where there is none."""
        return self.metric(name).value

    def metric(self, name: str) -> Metric:
        """The metric by its name; KeyError where there is none."""
        for metric in self.metrics:
            if metric.name == name:
                return metric
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types."""
        return {
            "task": self.task,
            "metrics": [metric.to_dict() for metric in self.metrics],
            "samples": self.samples,
            "notes": list(self.notes),
            "outputs": {name: [metric.to_dict() for metric in metrics] for name, metrics in self.outputs},
        }


def mean(total: float, count: int) -> float:
    """The mean of so many numbers with that sum; NaN of none."""
    return total / count if count else math.nan


def counted(number: int, noun: str, many: str = "") -> str:
    """ "1 image", "12 images"."""
    return f"{number:,} {noun if number == 1 else many or noun + 's'}"
