"""The report of one optimization: everything that was done, what it cost, and how to make it again."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from collections import Counter
from typing import Any

import graphopt
from graphopt.graph.assumptions import NOTHING, Assumptions, Reliance, listed, unneeded
from graphopt.recipe import Recipe
from graphopt.run_report import PassRecord, RunReport

LIBRARIES = ("onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu", "numpy")


@dataclasses.dataclass
class Report:
    """What `graphopt.optimize` did.

    Attributes:
        source: The input: path or None, bytes on disk (model and external data together) or None.
        output: The same of the result, once it is saved.
        recipe: The full recipe.
        target: "cpu", "cuda" or "portable".
        seed: Seed of the probe inputs.
        run: What the pass manager did.
        operators: Number of nodes by operator, before and after.
        probes: Name and description of every probe used.
        skipped_probes: Probes that the original itself doesn't run on, with the reason.
        session_settings: What the file can't carry and a session should set: (setting, value, reason).
        timing: Result of a benchmark against the original, where one was run.
        arguments: Further command line arguments that the output depends on.
        profile: Which target profile the passes followed: its id, date and description; None: the safe defaults.
        assumed: What the passes could take for granted about inputs.
        relied: What the result does take for granted.
        renamed: Inputs and outputs that got other names, name before to name now.
        calibration: What the calibration data was, and its fingerprint, to tell it from data that judges the result;
            None: there was none.
        quality: How well the result does its task beside the original, where that was judged.
        steps: What each lossy pass gives and costs, where that was asked for: the original, the model behind each pass
            without the lossy ones that follow, and the result; see `graphopt.cli.steps.told`.
        notes: What else a reader should know, a sentence each.
    """

    source: dict[str, Any]
    recipe: Recipe
    target: str
    seed: int
    run: RunReport
    operators: tuple[Counter[str], Counter[str]]
    probes: list[dict[str, str]] = dataclasses.field(default_factory=list)
    skipped_probes: list[dict[str, str]] = dataclasses.field(default_factory=list)
    session_settings: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
    output: dict[str, Any] | None = None
    timing: dict[str, Any] | None = None
    arguments: list[str] = dataclasses.field(default_factory=list)
    profile: dict[str, str] | None = None
    assumed: Assumptions = NOTHING
    relied: list[Reliance] = dataclasses.field(default_factory=list)
    renamed: dict[str, str] = dataclasses.field(default_factory=dict)
    calibration: dict[str, Any] | None = None
    quality: dict[str, Any] | None = None
    steps: list[dict[str, Any]] | None = None
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every pass held what it promises."""
        return not self.run.rolled_back

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON data; keys are stable within one major version."""
        before, after = self.operators
        changed = sorted(set(before) | set(after))
        return {
            "graphopt": graphopt.__version__,
            "libraries": versions(),
            "platform": {
                "python": platform.python_version(),
                "system": platform.system(),
                "machine": platform.machine(),
            },
            "source": self.source,
            "output": self.output,
            "target": self.target,
            "profile": self.profile or "defaults",
            "seed": self.seed,
            "assumptions": {
                "given": list(self.assumed.names),
                "relied": listed(self.relied),
                "unneeded": unneeded(self.assumed, self.relied),
            },
            "recipe": {"name": self.recipe.name, **self.recipe.to_data()},
            "ok": self.ok,
            "before": dataclasses.asdict(self.run.before),
            "after": dataclasses.asdict(self.run.after),
            "seconds": self.run.seconds,
            "verify_seconds": self.run.verify_seconds,
            "operators": {name: [before[name], after[name]] for name in changed},
            "passes": [_record(r) for r in self.run.records],
            "left_alone": [{"pass": name, **dataclasses.asdict(site)} for name, site in self.run.left()],
            "verification": None if self.run.verdict is None else self.run.verdict.to_dict(),
            "probes": self.probes,
            "skipped_probes": self.skipped_probes,
            "session_settings": [{"setting": s, "value": v, "reason": r} for s, v, r in self.session_settings],
            "timing": self.timing,
            "quality": self.quality,
            "steps": self.steps,
            "renamed": self.renamed,
            "notes": self.notes,
            "calibration": self.calibration,
            "arguments": self.arguments,
        }


def versions() -> dict[str, str]:
    """Versions of the libraries that decide about the result."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _record(record: PassRecord) -> dict[str, Any]:
    data = dataclasses.asdict(dataclasses.replace(record, verdict=None))
    data["verdict"] = None if record.verdict is None else record.verdict.to_dict()
    data["options"] = dict(record.options)
    return data
