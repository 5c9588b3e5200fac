"""Runs a pipeline of passes, measures each, verifies each, and takes back what fails."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Literal, Protocol, get_args

import onnx_ir as ir

from graphopt.analysis.cost import Counted
from graphopt.analysis.profile import Profile
from graphopt.analysis.shapes import ShapeFacts, infer
from graphopt.analysis.shapes.facts import KEPT_KEY, MADE_KEY
from graphopt.calibration.calibration import Calibration
from graphopt.calibration.data import Dataset
from graphopt.errors import GraphoptError, InputDataError, UsageError
from graphopt.graph.assumptions import ASSUMPTIONS_KEY, NOTHING, Assumptions, carried
from graphopt.graph.edits import sort
from graphopt.passes.base import Guarantee, Pass
from graphopt.run_report import PassRecord, RunReport, Stats
from graphopt.verification.structure import new_problems
from graphopt.verification.verdict import Verdict
from graphopt.verification.verifier import Verifier

VerifyMode = Literal["auto", "pass", "phase", "none"]
Progress = Callable[[str, int, int], None]
"""Called with (what is being done, steps done, steps in all)."""

CHEAP_SECONDS = 1.0
"""`verify="auto"` verifies after every pass where one verification takes at most this long, ..."""
DEAR_SECONDS = 5.0
"""... after every phase where it takes at most this long, and else once a round, with bisection where that fails."""


class ModelVerifier(Protocol):
    """Judges candidates against a reference model; see `graphopt.verification.verifier.Verifier`."""

    cost_seconds: float

    def check(self, candidate: ir.Model, *, bitwise: bool = False) -> Verdict:
        """Compare `candidate` with the reference on every probe."""


class PassManager:
    """Runs passes in order, again until nothing changes, and keeps only what passes verification.

    A pass that raises, leaves an invalid graph, or (if its guarantee is EXACT) changes the numbers beyond the
    tolerance is taken back and left out of the rest of the run. No copy of the model is kept for every pass: one at
    the start of each phase of the first round is, and taking back means running the other passes since then on it
    again, which gives the same result because passes are deterministic.

    Args:
        passes: graphopt passes and any other `onnx_ir` passes.
        verifier_of: Makes the judge of the numbers from a reference model: the one given, and after a LOSSY pass the
            one that this pass made. By default probe inputs are made from the model's signature. None turns the
            comparison off; structure is always checked.
        verify: "none" compares nothing, "pass" verifies after every pass that changed something, "phase" after every
            run of passes of one family (and bisects to the guilty pass), "auto" chooses by what a verification costs.
        max_rounds: How often the pipeline is run at most; it stops when a round changes nothing.
        calibration: Data for passes that name what they need of it, or data with options; without it they are refused.
        profile: What was measured of the target, for passes that choose by it; None: their safe defaults.
        assumptions: What passes may take for granted about inputs, besides what the model already takes for granted.
        progress: Called before each pass.
    """

    def __init__(
        self,
        passes: Sequence[ir.passes.PassBase],
        *,
        verifier_of: Callable[[ir.Model], ModelVerifier] | None = Verifier,
        verify: VerifyMode = "auto",
        max_rounds: int = 4,
        calibration: Dataset | Calibration | None = None,
        profile: Profile | None = None,
        assumptions: Assumptions = NOTHING,
        progress: Progress | None = None,
    ) -> None:
        if not passes or not all(isinstance(pass_, ir.passes.PassBase) for pass_ in passes):
            raise UsageError("A pipeline needs at least one pass, and passes only; a recipe makes them from names.")
        if verify not in get_args(VerifyMode):
            raise UsageError(f"Verification has no mode {verify!r}; it has {', '.join(get_args(VerifyMode))}.")
        self.passes = list(passes)
        given = Calibration(calibration) if isinstance(calibration, Dataset) else calibration
        for pass_ in self.passes:
            if isinstance(pass_, Pass):
                pass_.profile = profile
            if isinstance(pass_, Pass) and pass_.needs:
                if given is None:
                    wanted = ", ".join(pass_.needs)
                    raise UsageError(f"The pass {pass_.name!r} needs calibration data ({wanted}); give --calibration.")
                pass_.calibration = given
        self._calibration = given
        self._verifier_of = verifier_of if verify != "none" else None
        self._verify = verify
        self._max_rounds = max_rounds
        self._assumptions = assumptions
        self._progress = progress

    def __call__(self, model: ir.Model) -> RunReport:
        """Run the pipeline on `model` in place.

        Raises:
            UsageError: An option can't be kept on this model, such as a budget below what the cheapest choices take.
                The model is then as it was at the start of that phase.
            InputDataError: The calibration data doesn't fit the model.
        """
        if self._calibration is not None and any(getattr(pass_, "needs", ()) for pass_ in self.passes):
            # A mistake in the data is told now; within a pass it would only cost that pass.
            next(self._calibration.data.feeds(model), None)
        for pass_ in self.passes:
            if isinstance(pass_, Pass):
                pass_.assumptions = self._assumptions | carried(model)
        return _Run(self, model).report()


@dataclasses.dataclass
class _Run:
    """The state of one run of a pipeline."""

    manager: PassManager
    model: ir.Model

    def __post_init__(self) -> None:
        self.disabled: set[int] = set()
        # A pass that saw the model at this version has nothing to do on it again: passes are idempotent.
        self.version = 0
        # The shapes of the model as it stands; after a change only what changed is inferred again.
        self.facts: ShapeFacts = infer(self.model)
        self.seen: dict[str, int] = {}
        # A copy of the model as it once was, and the passes that have changed the model since then, up to this phase.
        self.saved = self.model.clone()
        self.since: list[int] = []
        self.records: list[PassRecord] = []
        self.verdict: Verdict | None = None
        self.bitwise_so_far = True
        self.check_seconds = 0.0
        self.counted = Counted()
        self.stats = Stats.of(self.model, self.facts, self.counted)
        self.verifier: ModelVerifier | None = None
        self.new_reference()

    def new_reference(self) -> None:
        """Compare with the model as it stands from now on."""
        if self.manager._verifier_of is not None:
            start = time.perf_counter()
            self.verifier = self.manager._verifier_of(self.model.clone())
            self.check_seconds += time.perf_counter() - start
            self.bitwise_so_far = True

    @property
    def each(self) -> bool:
        """Whether every pass is verified by itself."""
        if self.verifier is None:
            return False
        mode = self.manager._verify
        return mode == "pass" or (mode == "auto" and self.verifier.cost_seconds <= CHEAP_SECONDS)

    def report(self) -> RunReport:
        start, before, setup = time.perf_counter(), self.stats, self.check_seconds
        dear = self.verifier is not None and self.verifier.cost_seconds > DEAR_SECONDS
        phases = _phases(self.manager.passes, whole=self.verifier is None or (dear and self.manager._verify == "auto"))
        for number in range(1, self.manager._max_rounds + 1):
            # Later rounds repeat exact passes only: a lossy one would lose again.
            changed = False
            for phase in phases:
                chosen = [i for i in phase if number == 1 or not _lossy(self.manager.passes[i])]
                changed |= self.run_phase(chosen, number)
            if not changed:
                break
        elapsed = time.perf_counter() - start - (self.check_seconds - setup)
        return RunReport(self.records, before, self.stats, self.verdict, elapsed, self.check_seconds)

    def run_phase(self, phase: list[int], number: int) -> bool:
        """Run the passes of one phase; on a failure, again from its start without the guilty one."""
        # Most phases of later rounds change nothing, which isn't worth a copy; a lossy pass takes longer than one.
        if self.since and (number == 1 or any(_lossy(self.manager.passes[i]) for i in self.since)):
            self.saved, self.since = self.model.clone(), []
        stats, bitwise, verdict = self.stats, self.bitwise_so_far, self.verdict
        failed: list[PassRecord] = []
        while True:
            records: list[PassRecord] = []
            applied: dict[int, PassRecord] = {}
            culprit = self.attempt(phase, number, records, applied, bitwise=bitwise)
            if culprit is None:
                break
            self.disabled.add(culprit[0])
            failed.append(culprit[1])
            _assign(self.model, self.again())
            self.facts = infer(self.model)
            # What was found wrong is gone; the verdict is again that of the model at the start of the phase.
            self.stats, self.bitwise_so_far, self.verdict = stats, bitwise, verdict
            self.seen.clear()
        self.records += [*records, *failed]
        self.since += applied
        return bool(applied)

    def again(self, passes: Sequence[int] = ()) -> ir.Model:
        """The model as it was at the start of the phase, after some of the phase's passes."""
        model = self.saved.clone()
        for index in (*self.since, *passes):
            model = self.manager.passes[index](model).model
            sort(model)
        return model

    def attempt(
        self,
        phase: list[int],
        number: int,
        records: list[PassRecord],
        applied: dict[int, PassRecord],
        *,
        bitwise: bool,
    ) -> tuple[int, PassRecord] | None:
        """Run a phase until a pass fails; returns the index and the record of the failing pass.

        What the phase did is entered into `records`, and into `applied` where a pass changed the model.
        """
        for index in phase:
            key = _key(self.manager.passes[index])
            if index in self.disabled or self.seen.get(key) == self.version:
                continue
            claimed = self.model.metadata_props.get(ASSUMPTIONS_KEY)
            record = self.run_pass(index, number)
            self.version += record.status == "applied"
            self.seen[key] = self.version
            records.append(record)
            if record.status == "applied":
                if self.model.metadata_props.get(ASSUMPTIONS_KEY) != claimed and not self.each:
                    # What was done before this pass narrowed the domain is judged on all of it.
                    culprit = self.judge_before(applied, bitwise=bitwise)
                    if culprit is not None:
                        return culprit
                applied[index] = record
                if self.each and (problem := self.judge(record, lossy=_lossy(self.manager.passes[index]))):
                    return index, _taken_back(record, problem)
                if _lossy(self.manager.passes[index]):
                    self.new_reference()
            if record.status == "rolled back":
                return index, record
        if not applied or self.each:
            return None
        last = next(reversed(applied.values()))
        problem = self.judge(last, lossy=any(_lossy(self.manager.passes[i]) for i in applied))
        if problem is None:
            return None
        guilty = self.bisect(list(applied), bitwise=bitwise)
        applied[guilty].verdict = last.verdict
        return guilty, _taken_back(applied[guilty], problem)

    def run_pass(self, index: int, number: int) -> PassRecord:
        """Run one pass; "rolled back" means that the model is now useless and must be restored."""
        pass_ = self.manager.passes[index]
        name = _name(pass_)
        if self.manager._progress is not None:
            self.manager._progress(name, index, len(self.manager.passes))
        record = PassRecord(
            name,
            getattr(pass_, "family", "other"),
            _guarantee(pass_),
            pass_.option_values() if isinstance(pass_, Pass) else {},
            number,
            before=self.stats,
            after=self.stats,
        )
        start = time.perf_counter()
        self.model.meta[KEPT_KEY] = self.model.meta[MADE_KEY] = self.facts
        try:
            result = pass_(self.model)
            if result.model is not self.model:
                _assign(self.model, result.model)
            if result.modified:
                sort(self.model)
        except ir.passes.PreconditionError as error:
            record.status, record.detail = "skipped", f"it requires what the model isn't: {_reason(error)}"
            return record
        except (UsageError, InputDataError):
            # What was asked for can't be: going on without this pass would give the user something else.
            _assign(self.model, self.again())
            raise
        except Exception as error:  # a faulty pass, ours or another's, must not cost the user the run
            record.status, record.detail = "rolled back", f"it failed with {type(error).__name__}: {_reason(error)}"
            return record
        finally:
            record.seconds = time.perf_counter() - start
            self.model.meta.pop(KEPT_KEY, None)
            made = self.model.meta.pop(MADE_KEY, None)
        record.sites = list(getattr(pass_, "sites", []))
        if isinstance(pass_, Pass):
            record.options = pass_.option_values()  # with what a pass that searches has found
        if result.modified:
            record.status = "applied"
            self.bitwise_so_far &= bool(getattr(pass_, "bitwise", False))
            self.facts = infer(self.model, earlier=made)
            record.after = self.stats = Stats.of(self.model, self.facts, self.counted)
        return record

    def judge(self, record: PassRecord, *, lossy: bool) -> str | None:
        """Check structure and, unless a loss is meant, numbers; returns what is wrong, and notes the verdict."""
        start = time.perf_counter()
        try:
            if problems := new_problems(self.model, self.saved):
                return problems[0]
            if self.verifier is None or lossy:
                return None
            self.verdict = record.verdict = self.verifier.check(self.model, bitwise=self.bitwise_so_far)
            # Where every output is random or empty nothing is compared; the verdict says so, and no pass is to blame.
            return self.verdict.summary if self.verdict.differs else None
        finally:
            self.check_seconds += time.perf_counter() - start

    def judge_before(self, applied: dict[int, PassRecord], *, bitwise: bool) -> tuple[int, PassRecord] | None:
        """Check the model as it was after the passes `applied` of this phase; returns the first wrong one's index and
        record. `bitwise`: the model was the same bit for bit at the start of the phase."""
        if self.verifier is None or not applied:
            return None
        start = time.perf_counter()
        same_bits = bitwise and all(getattr(self.manager.passes[i], "bitwise", False) for i in applied)
        verdict = self.verifier.check(self.again(list(applied)), bitwise=same_bits)
        applied[next(reversed(applied))].verdict = verdict
        guilty = self.bisect(list(applied), bitwise=bitwise) if verdict.differs else None
        self.check_seconds += time.perf_counter() - start
        return None if guilty is None else (guilty, _taken_back(applied[guilty], verdict.summary))

    def bisect(self, applied: list[int], *, bitwise: bool) -> int:
        """The first pass of a failing phase after which the model is wrong; `bitwise`: so it was at the start."""
        low, high = 0, len(applied) - 1  # the prefix of `high + 1` passes is wrong
        while low < high:
            middle = (low + high) // 2
            prefix = applied[: middle + 1]
            trial = self.again(prefix)
            bad = bool(new_problems(trial, self.saved))
            if not bad and self.verifier is not None:
                same_bits = bitwise and all(getattr(self.manager.passes[i], "bitwise", False) for i in prefix)
                bad = self.verifier.check(trial, bitwise=same_bits).differs
            low, high = (low, middle) if bad else (middle + 1, high)
        return applied[low]


def _phases(passes: Sequence[ir.passes.PassBase], *, whole: bool) -> list[list[int]]:
    """Runs of neighbouring passes of one family, or of any where `whole`; a lossy pass always alone."""
    phases: list[list[int]] = []
    previous: object = None
    for index, pass_ in enumerate(passes):
        family = "any" if whole else getattr(pass_, "family", "other")
        key = object() if _lossy(pass_) else family
        if phases and key == previous:
            phases[-1].append(index)
        else:
            phases.append([index])
        previous = key
    return phases


def _key(pass_: ir.passes.PassBase) -> str:
    options = sorted(pass_.option_values().items()) if isinstance(pass_, Pass) else id(pass_)
    return f"{_name(pass_)} {options}"


def _lossy(pass_: ir.passes.PassBase) -> bool:
    return isinstance(pass_, Pass) and pass_.guarantee is Guarantee.LOSSY


def _taken_back(record: PassRecord, problem: str) -> PassRecord:
    record.status, record.detail = "rolled back", problem
    return record


def _guarantee(pass_: ir.passes.PassBase) -> str:
    return pass_.guarantee.value if isinstance(pass_, Pass) else "unstated"


def _name(pass_: ir.passes.PassBase) -> str:
    return pass_.name if isinstance(pass_, Pass) else f"{type(pass_).__module__}:{type(pass_).__qualname__}"


def _assign(model: ir.Model, other: ir.Model) -> None:
    """Let `model` hold what `other` holds, so that callers keep their object."""
    model.graph = other.graph
    model.functions.clear()
    model.functions.update(other.functions)
    model.ir_version = other.ir_version
    model.metadata_props.clear()
    model.metadata_props.update(other.metadata_props)


def _reason(error: BaseException) -> str:
    cause = error.__cause__ or error
    text = str(cause).strip() or type(cause).__name__
    return (text if isinstance(cause, GraphoptError) else text.splitlines()[0]).rstrip(".")
