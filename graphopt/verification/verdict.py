"""What came out of comparing a candidate with its original."""

from __future__ import annotations

import dataclasses
from typing import Any

from graphopt.runtime_ops.memory_session import Optimizations
from graphopt.verification.compare import OutputComparison, finite


@dataclasses.dataclass(frozen=True)
class Checked:
    """One output of one run of the candidate.

    Attributes:
        optimizations: "all" or "none", see `graphopt.runtime_ops.memory_session`.
        probe: Name of the probe.
        output: The comparison.
    """

    optimizations: Optimizations
    probe: str
    output: OutputComparison


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a candidate computes what the original computes.

    Attributes:
        ok: Everything compared is equal within its tolerance, and something was compared.
        checked: Every comparison.
        failures: What failed other than a comparison: doesn't load, doesn't run, lacks an output, ...
        notes: What was not compared, or with a wider tolerance, and why.
        seconds: How long the check took.
    """

    ok: bool
    checked: list[Checked]
    failures: list[str]
    notes: list[str]
    seconds: float

    @property
    def worst(self) -> Checked | None:
        """The comparison with the largest margin (then the largest relative error)."""
        return max(self.checked, key=lambda c: (c.output.margin, c.output.max_rel), default=None)

    @property
    def differs(self) -> bool:
        """Whether anything was found to be different. False beside `ok` False: nothing could be compared."""
        return bool(self.failures) or not all(c.output.ok for c in self.checked)

    @property
    def margin(self) -> float:
        """The largest error over what was allowed; infinite where something can't be compared."""
        if self.failures:
            return float("inf")
        return self.worst.output.margin if self.worst else 0.0

    @property
    def summary(self) -> str:
        """One sentence that names the worst output and the probe."""
        if self.failures:
            return self.failures[0]
        worst = self.worst
        if worst is not None and not any(c.output.elements for c in self.checked):
            return "Nothing was compared: every output is empty on every probe."
        if worst is None:
            return "Nothing was compared: " + (self.notes[0] if self.notes else "the model has no outputs.")
        mode = "without" if worst.optimizations == "none" else "with"
        where = f"on probe {worst.probe!r} ({mode} ONNX Runtime's optimizations)"
        if not self.ok:
            return f"Output {worst.output.name!r} {worst.output.reason} {where}."
        probes = len({c.probe for c in self.checked})
        outputs = len({c.output.name for c in self.checked})
        counts = f"{outputs} output{'s' * (outputs != 1)} on {probes} probe{'s' * (probes != 1)}"
        if worst.output.max_rel == 0:
            return f"Equal: {counts}, no difference at all."
        return (
            f"Equal: {counts}; the worst is {worst.output.name!r} {where}, off by {worst.output.max_rel:.1e} of its "
            f"scale, {worst.output.margin:.0%} of the tolerance."
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types; infinity is written as null."""
        return {
            "ok": self.ok,
            "summary": self.summary,
            "margin": finite(self.margin),
            "failures": self.failures,
            "notes": self.notes,
            "seconds": round(self.seconds, 3),
            "outputs": [
                {"optimizations": c.optimizations, "probe": c.probe, **c.output.to_dict()} for c in self.checked
            ],
        }
