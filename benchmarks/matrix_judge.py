"""Judges one export of the attention matrix: what becomes of its attentions, and whether the numbers stay.

The model is brought to canonical form by the default recipe up to its lowering passes, where attentions are counted,
and through the whole recipe without verification, whose result then runs in ONNX Runtime as users run it beside the
original without any optimization. All probes count: both batch sizes, padding at either end, with and without a past.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir

from graphopt.analysis.attention_sites import AttentionSite, attention_sites
from graphopt.analysis.shapes import infer
from graphopt.api import optimize
from graphopt.errors import GraphoptError, VerificationError, first_line
from graphopt.graph import load
from graphopt.graph.edits import nodes
from graphopt.pass_manager import PassManager
from graphopt.recipe import load as load_recipe
from graphopt.runtime_ops.memory_session import make_session

RAISE = "raise-attention"
TOLERANCE = 1e-4
"""Largest difference of an output, relative to its largest magnitude."""
ATTENTION = (
    "Attention",
    "MultiHeadAttention",
    "GroupQueryAttention",
    "PackedMultiHeadAttention",
    "RotaryEmbedding",
    "Softmax",
)
UNSAID = "no reason given"


@dataclasses.dataclass
class Outcome:
    """What became of one export.

    Attributes:
        model: The model's key.
        variant: The variant's name.
        sites: Attentions softmax(q·kᵀ)·v that the model has.
        others: Attentions of another kind that it has.
        fault: Why it isn't there: "not exported: ..." or what failed.
        raised: Attentions raised to one operator.
        left: Attentions found and left, by reason.
        missed: Attentions softmax(q·kᵀ)·v that nothing found.
        unseen: Attentions of another kind that nothing found.
        error: The largest difference from the original, relative to the largest magnitude of the output.
        exporter_error: The same between the original and PyTorch.
        wrong: Probes on which the result fails or differs.
        unusable: Probes on which the original itself doesn't run.
        operators: Operators of attention in the result.
        nodes: Nodes of the original and of the result.
        seconds: Of the recipe.
    """

    model: str
    variant: str
    sites: int
    others: int
    fault: str = ""
    raised: int = 0
    left: dict[str, int] = dataclasses.field(default_factory=dict)
    missed: int = 0
    unseen: int = 0
    error: float = 0.0
    exporter_error: float = 0.0
    wrong: list[str] = dataclasses.field(default_factory=list)
    unusable: list[str] = dataclasses.field(default_factory=list)
    operators: dict[str, int] = dataclasses.field(default_factory=dict)
    nodes: tuple[int, int] = (0, 0)
    seconds: float = 0.0

    @property
    def exported(self) -> bool:
        """Whether there is a model to judge."""
        return not self.fault.startswith("not exported")

    @property
    def bad(self) -> bool:
        """Whether an attention was missed, a number is off, or something failed."""
        return self.exported and bool(self.missed or self.wrong or self.fault)


def judge(path: Path, outcome: Outcome) -> Outcome:
    """Fill in what became of the export at `path`."""
    record = json.loads(path.with_suffix(".json").read_text())
    if "error" in record:
        outcome.fault = f"not exported: {record['error']}"
        return outcome
    try:
        truths = _truths(path, record["outputs"], outcome)
    except VerificationError as error:
        outcome.fault = f"not exported: what it writes is no valid model: {_said(error)}"
        return outcome
    try:
        if all(truth is None for truth in truths):
            outcome.fault = f"not exported: what it writes runs on no probe: {outcome.unusable[0].partition(': ')[2]}"
            outcome.unusable.clear()
            return outcome
        _count(path, outcome)
        _compare(path, record["outputs"], truths, outcome)
    except GraphoptError as error:
        outcome.fault = f"failed: {type(error).__name__}: {first_line(error)}"
    return outcome


def canonical(path: Path) -> tuple[ir.Model, dict[str, str]]:
    """The model after the passes before lowering, and the reasons of `raise-attention` by node."""
    model = load(path)
    passes = load_recipe().passes("cpu")
    names = [getattr(p, "name", "") for p in passes]
    if RAISE in names:
        lowering = [i for i, p in enumerate(passes) if i > names.index(RAISE) and getattr(p, "family", "") == "lower"]
        passes = passes[: lowering[0]] if lowering else passes
    report = PassManager(passes, verify="none")(model)
    return model, {site.node: site.detail for name, site in report.left() if name == RAISE}


def _count(path: Path, outcome: Outcome) -> None:
    model, reasons = canonical(path)
    found = attention_sites(model, infer(model))
    left = [site for site in found if not _is_raised(site)]
    softmax = [site for site in left if site.operator == "Softmax"]
    outcome.raised = len(found) - len(left)
    outcome.left = dict(Counter(reasons.get(site.node.name or "") or _unfused(site) for site in left))
    # A softmax may be written with another operator, such as Exp and a division behind the product.
    instead = max(0, len(left) - len(softmax) - outcome.others)
    outcome.missed = max(0, outcome.sites - outcome.raised - len(softmax) - instead)
    outcome.unseen = max(0, outcome.sites + outcome.others - len(found) - outcome.missed)


def _unfused(site: AttentionSite) -> str:
    return UNSAID if site.operator == "Softmax" else f"{site.operator} instead of a softmax: no operator computes that"


def _is_raised(site: AttentionSite) -> bool:
    return site.node.op_type.endswith("Attention")


def _truths(path: Path, outputs: list[str], outcome: Outcome) -> list[list[np.ndarray] | None]:
    """What the original gives for each probe, None where it doesn't run."""
    session = make_session(path, "none", threads=1)
    accepted = {item.name for item in session.get_inputs()}
    truths: list[list[np.ndarray] | None] = []
    for name, given, expected in _probes(path):
        try:
            truth = session.run(outputs, {key: array for key, array in given.items() if key in accepted})
        except Exception as error:  # the runtime has many classes of errors
            outcome.unusable.append(f"{name}: {_said(error)}")
            truths.append(None)
            continue
        truths.append(truth)
        if expected:
            outcome.exporter_error = max([outcome.exporter_error, *map(distance, expected, truth)])
    return truths


def _compare(path: Path, outputs: list[str], truths: list[list[np.ndarray] | None], outcome: Outcome) -> None:
    result = optimize(path, verify="none")
    run = result.report.run
    outcome.nodes, outcome.seconds = (run.before.nodes, run.after.nodes), round(run.seconds, 2)
    counts = Counter(node.op_type for node in nodes(result.model))
    outcome.operators = {name: counts[name] for name in ATTENTION if counts[name]}
    for record in run.rolled_back:
        outcome.wrong.append(f"{record.name} was rolled back: {first_line(Exception(record.detail))}")
    session = make_session(result.model, "all", threads=1)
    accepted = {item.name for item in session.get_inputs()}
    for (name, given, expected), truth in zip(_probes(path), truths, strict=True):
        # Where the original doesn't run, PyTorch says what is true, if the result runs.
        told = expected if truth is None else truth
        try:
            found = session.run(outputs, {key: array for key, array in given.items() if key in accepted})
        except Exception as error:
            if truth is not None:
                outcome.wrong.append(f"{name}: {_said(error)}")
            continue
        worst = max(map(distance, told, found), default=0.0)
        outcome.error = max(outcome.error, worst)
        if not worst <= TOLERANCE:
            outcome.wrong.append(f"{name}: off by {worst:.1e}" + (" from PyTorch" if truth is None else ""))


def _said(error: Exception) -> str:
    """What the runtime says of a failure: the node, and the end of its message without the signature of its code."""
    text = " ".join(str(error).split()).removeprefix("[ONNXRuntimeError] : ")
    node, _, rest = text.partition(" Status Message: ")
    return f"{node.partition(' : ')[2].partition(' : ')[2] or node} {rest.rpartition(') ')[2]}".strip()[:300]


def _probes(path: Path) -> list[tuple[str, dict[str, np.ndarray], list[np.ndarray]]]:
    arrays = np.load(path.with_suffix(".npz"))
    found: dict[str, tuple[dict[str, np.ndarray], list[np.ndarray]]] = {}
    for name in arrays.files:
        index, side, key = name.split("/", 2)
        given, expected = found.setdefault(index, ({}, []))
        if side == "in":
            given[key] = arrays[name]
        else:
            expected.append(arrays[name])
    return [(_describe(given), given, expected) for given, expected in found.values()]


def _describe(given: dict[str, np.ndarray]) -> str:
    first = next(iter(given.values()))
    words = [f"batch {first.shape[0]}"]
    if first.ndim > 1:
        words.append(f"tokens {first.shape[1]}")
    if "past_key_values.0.key" in given:
        words.append(f"past {given['past_key_values.0.key'].shape[2]}")
    mask = given.get("attention_mask", given.get("mask"))
    if mask is not None and not mask.all():
        words.append("padded " + ("left" if not mask[0, 0] else "right"))
    return ", ".join(words)


def distance(expected: np.ndarray, found: np.ndarray) -> float:
    """The largest difference, relative to the largest magnitude; infinite where shapes, NaN or infinities differ."""
    if expected.shape != found.shape:
        return float("inf")
    if expected.size == 0:
        return 0.0
    a, b = expected.astype(np.float64), found.astype(np.float64)
    finite = np.isfinite(a)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return float("inf")
    if not finite.any():
        return 0.0
    return float(np.abs(a[finite] - b[finite]).max() / max(np.abs(a[finite]).max(), 1e-30))
