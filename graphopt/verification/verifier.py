"""Judging whether a rewritten model still computes what the original computes."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.errors import ModelError, VerificationError
from graphopt.graph.assumptions import Reliance, carried
from graphopt.graph.assumptions import read as read_assumptions
from graphopt.graph.edits import nodes
from graphopt.graph.equal_caches import as_if_equal, merged_since, with_copies
from graphopt.graph.load import load
from graphopt.graph.skeleton import first_line
from graphopt.runtime_ops.memory_session import Optimizations, WeightStore, make_session, release_memory, run
from graphopt.verification.codes import FLIPPED, code_outputs, settled
from graphopt.verification.compare import TOLERANCES, Tolerance, compare
from graphopt.verification.domain import Domain, Layout
from graphopt.verification.equal_probes import UNEQUAL, on_equal, told
from graphopt.verification.probes import Probe, make_probes
from graphopt.verification.unrounded import rounds, unrounded
from graphopt.verification.usable import Runs, usable_probes
from graphopt.verification.verdict import Checked, Verdict

MODES: tuple[Optimizations, ...] = ("none", "all")

SPREAD_FACTOR = 4.0
"""An output may be off by this many times what ONNX Runtime's own optimizations do to it in the original."""
SPREAD_CAP = 1e-2
"""But not by more than this fraction of its scale."""


class Verifier:
    """Keeps what the original computes and compares candidates with it.

    The original runs once for each probe and mode (ONNX Runtime's optimizations "all" and "none"), and a second time
    without optimizations to find outputs that are random. Candidates run in both modes.

    The tolerance of an output is that of its dtype (`graphopt.verification.compare.TOLERANCES`), or of the coarsest
    float type that the graph computes in. Where ONNX Runtime's own optimizations change an output of the original by
    more (they flip levels of quantized models), up to `SPREAD_FACTOR` times their change is allowed, capped at
    `SPREAD_CAP` of the scale; a note says so.

    Where products of the original round what they read to 8 bits, original and candidate are compared without that
    rounding (`graphopt.verification.unrounded`).

    A candidate that takes something for granted (`graphopt.graph.assumptions`) is compared where that holds: on the
    probes that suit it, and without what comes out at padded positions where it leaves that open. One that keeps equal
    caches once (`graphopt.graph.equal_caches`) is compared with the original on equal caches, and has to give out again
    what each of the original's is.

    Attributes:
        probes: The probes in use.
        unusable: Probes on which the original itself doesn't run, with ONNX Runtime's reason.
        cost_seconds: How long one check takes, as measured on the original.
        notes: What will not be compared, or with a wider tolerance, and why.
    """

    def __init__(
        self,
        original: ir.Model | str | os.PathLike[str],
        probes: Sequence[Probe] | None = None,
        *,
        seed: int = 0,
        threads: int | None = None,
    ) -> None:
        """Run the original.

        Args:
            original: The model, or its file.
            probes: Inputs, or None to make them from the signature. Those made from a signature may get other sizes.
            seed: Seed of the probes that are made.
            threads: Threads within an operator; None leaves it to ONNX Runtime.

        Raises:
            VerificationError: ONNX Runtime doesn't load the original or runs it on no probe.
        """
        self._threads, self._seed = threads, seed
        self._store = WeightStore()
        self._original = original
        self._on_equal: dict[tuple[tuple[str, str], ...], Verifier] = {}
        model = _opened(original)
        self._unrounded = rounds(model)
        self._source = unrounded(model) if self._unrounded else original
        self._outputs = [v.name or "" for v in model.graph.outputs]
        self._inputs = {v.name or "" for v in model.graph.inputs}
        self._ends = {*self._inputs, *self._outputs}
        self._codes = code_outputs(model)
        self._coarse = "float16" if self._codes else coarsest_type(model)
        self._layout = Layout.of(model)
        self._relied = read_assumptions(model)
        self._kept: dict[tuple[Optimizations, str], list[Any]] = {}
        self._random: set[str] = set()
        self.notes: list[str] = []
        if self._unrounded:
            self.notes.append("Products that round what they read to 8 bits are compared without that rounding.")
        self.unusable: list[tuple[Probe, str]] = []
        self.probes = list(probes if probes is not None else make_probes(model, seed, assumptions=carried(model)))
        self.cost_seconds = 0.0
        errors = [e for mode in reversed(MODES) if (e := self._run_original(model, mode)) is not None]
        if not self._kept:
            raise errors[0]
        self._note_unusable(errors)
        self._tolerances = self._allow_spread()

    def check(self, candidate: ir.Model | str | os.PathLike[str], bitwise: bool = False) -> Verdict:
        """Compare a candidate with the original.

        Args:
            candidate: A model or its file.
            bitwise: Without ONNX Runtime's optimizations every bit must be the same. With them the tolerance holds,
                because ONNX Runtime may fuse another structure differently.
        """
        if equal := self._merged(candidate):
            return self._check_on_equal(candidate, equal, bitwise)
        begin = time.perf_counter()
        checked: list[Checked] = []
        failures: list[str] = []
        domain = Domain([*self._relied, *_relied(candidate)], self._layout)
        candidate = self._comparable(candidate)
        probes = [probe for probe in self.probes if domain.covers(probe)]
        if self.probes and not probes:
            failures.append(
                f"No probe lies in what the result is valid for ({domain.names}), so nothing shows that it is right; "
                "give inputs that do with --inputs FILE.npz."
            )
        for mode in MODES:
            if not probes or not any(m == mode for m, _ in self._kept):
                continue
            failures += self._check_mode(candidate, mode, bitwise and mode == "none", checked, (domain, probes))
        notes = [*self.notes, *domain.notes(self.probes), *self._tiny(checked)]
        ok = any(c.output.elements for c in checked) and not failures and all(c.output.ok for c in checked)
        return Verdict(ok, checked, list(dict.fromkeys(failures)), notes, time.perf_counter() - begin)

    def nan_outputs(self) -> list[str]:
        """Outputs in which the original gives NaN on every probe."""
        found = []
        for index, name in enumerate(self._outputs):
            arrays = [kept[index] for kept in self._kept.values() if isinstance(kept[index], np.ndarray)]
            floats = [a for a in arrays if a.size and a.dtype.kind in "fV"]
            if floats and all(np.isnan(a.astype(np.float64)).any() for a in floats):
                found.append(name)
        return found

    def close(self) -> None:
        """Remove the temporary files of weights, if any were needed."""
        self._store.close()
        for other in self._on_equal.values():
            other.close()

    # ---- the original

    def _run_original(self, model: ir.Model, mode: Optimizations) -> VerificationError | None:
        begin = time.perf_counter()
        try:
            session = make_session(self._source, mode, threads=self._threads, store=self._store)
        except VerificationError as error:
            return error
        spent = time.perf_counter() - begin
        runs: Runs = {}
        if not self._kept:
            try:
                self.probes, self.unusable = usable_probes(model, self.probes, session, runs)
            except VerificationError as error:
                return error
        names = [o.name for o in session.get_outputs()]
        for probe in self.probes:
            if probe.name not in runs:
                begin = time.perf_counter()
                try:
                    runs[probe.name] = run(session, probe.feeds), time.perf_counter() - begin
                except Exception as error:
                    self.notes.append(
                        f"The original doesn't run on probe {probe.name!r} with ONNX Runtime's optimizations "
                        f"{mode!r}: {first_line(error)}"
                    )
                    continue
            found, seconds = runs.pop(probe.name)
            outputs = dict(zip(names, found, strict=True))
            spent += seconds
            self._kept[mode, probe.name] = [outputs[name] for name in self._outputs]
            if mode == "none":
                again = dict(zip(names, run(session, probe.feeds), strict=True))
                self._find_random(outputs, again)
        self.cost_seconds += spent
        del session
        release_memory()
        return None

    def _find_random(self, first: dict[str, Any], second: dict[str, Any]) -> None:
        for name in self._outputs:
            same = compare([first[name]], [second[name]], [name], bitwise=True)
            if not all(c.ok for c in same) and name not in self._random:
                self._random.add(name)
                self.notes.append(
                    f"Output {name!r} is not deterministic (two runs of the original differ), so it is not compared."
                )

    def _note_unusable(self, errors: list[VerificationError]) -> None:
        self.notes += [f"The original was not run in one mode: {error}" for error in errors]
        self.notes += [f"Probe {p.name!r} is left out: the original doesn't run on it: {r}" for p, r in self.unusable]

    def _allow_spread(self) -> dict[str, Tolerance]:
        """The tolerance of each output of a float type, widened by what ONNX Runtime's own optimizations do to it."""
        result: dict[str, Tolerance] = {}
        spreads: dict[str, float] = {}
        for name in self._outputs:
            if name in self._random:
                continue
            index = self._outputs.index(name)
            worst, dtype = 0.0, None
            for probe in self.probes:
                if any((mode, probe.name) not in self._kept for mode in MODES):
                    continue
                none, full = (self._kept[mode, probe.name][index] for mode in MODES)
                for part in compare([none], [full], [name]):
                    dtype = part.tolerance or dtype
                    # Errors below the floor say nothing about the scale.
                    if part.tolerance is not None and part.max_abs > part.tolerance.floor:
                        worst = max(worst, part.max_rel)
            if dtype is None:
                continue
            base = dtype if self._coarse is None else dtype.widened(TOLERANCES[self._coarse].absolute)
            allowed = base.widened(min(SPREAD_CAP, SPREAD_FACTOR * worst))
            result[name] = allowed
            if allowed.absolute > base.absolute:
                spreads[name] = worst
        if self._coarse is not None and result:
            self.notes.append(f"Float outputs are compared as {self._coarse}, in which the graph computes.")
        if self._codes:
            self.notes.append(f"Codes of a quantized cache may be others in {FLIPPED:.0%}: rounding goes either way.")
        if spreads:
            name = max(spreads, key=lambda n: spreads[n])
            others = f" and {len(spreads) - 1} more" if len(spreads) > 1 else ""
            self.notes.append(
                f"Output {name!r}{others} may be off by up to {result[name].absolute:.1e} of the scale: ONNX Runtime's "
                f"own optimizations change the original by {spreads[name]:.1e}."
            )
        return result

    # ---- candidates

    def _merged(self, candidate: ir.Model | str | os.PathLike[str]) -> dict[str, str]:
        """The caches of the original that a candidate keeps once, with those that it keeps."""
        try:
            return merged_since(_opened(candidate), self._ends)
        except ModelError:  # a file that doesn't load is told of by the session
            return {}

    def _check_on_equal(
        self, candidate: ir.Model | str | os.PathLike[str], equal: dict[str, str], bitwise: bool
    ) -> Verdict:
        """Compare a candidate that keeps equal caches once with the original fed with equal caches."""
        key = tuple(sorted(equal.items()))
        if key not in self._on_equal:
            probes = on_equal(self.probes, equal)
            if self.probes and not probes:
                return Verdict(False, [], [UNEQUAL], self.notes, 0.0)
            reference = as_if_equal(_opened(self._original), equal)
            self._on_equal[key] = Verifier(reference, probes, seed=self._seed, threads=self._threads)
        verdict = self._on_equal[key].check(with_copies(_opened(candidate), equal), bitwise)
        return dataclasses.replace(verdict, notes=[*verdict.notes, told(equal)])

    def _comparable(self, candidate: ir.Model | str | os.PathLike[str]) -> ir.Model | str | os.PathLike[str]:
        """The candidate without rounding where the original is compared without."""
        if not self._unrounded:
            return candidate
        try:
            return unrounded(candidate if isinstance(candidate, ir.Model) else load(candidate))
        except ModelError:  # a file that doesn't load is told of by the session
            return candidate

    def _check_mode(
        self,
        candidate: ir.Model | str | os.PathLike[str],
        mode: Optimizations,
        bitwise: bool,
        checked: list[Checked],
        where: tuple[Domain, list[Probe]],
    ) -> Iterator[str]:
        domain, probes = where
        how = "without" if mode == "none" else "with"
        try:
            session = make_session(candidate, mode, threads=self._threads, store=self._store)
        except VerificationError as error:
            yield f"{error} ({how} optimizations)"
            return
        names = [o.name for o in session.get_outputs()]
        needed = [i.name for i in session.get_inputs()]
        if missing := [n for n in self._outputs if n not in names]:
            yield f"The result lacks the output {missing[0]!r} of the original."
            return
        if extra := [n for n in needed if n not in self._inputs]:
            yield f"The result needs an input {extra[0]!r} that the original doesn't have."
            return
        compared = [n for n in self._outputs if n not in self._random]
        for probe in probes:
            reference = self._kept.get((mode, probe.name))
            if reference is None:
                continue
            try:
                outputs = dict(zip(names, run(session, probe.feeds), strict=True))
            except Exception as error:
                yield (
                    f"The result doesn't run on probe {probe.name!r} {how} ONNX Runtime's optimizations, although "
                    f"the original does: {first_line(error)}"
                )
                continue
            expected = dict(zip(self._outputs, reference, strict=True))
            for name in self._codes if not bitwise else ():
                outputs[name] = settled(expected[name], outputs[name])
            found = domain.compare(probe, expected, {n: outputs[n] for n in compared}, bitwise, self._tolerances)
            checked += [Checked(mode, probe.name, part) for part in found]
        del session
        release_memory()

    def _tiny(self, checked: list[Checked]) -> list[str]:
        """Outputs whose numbers are so small on every probe that the floor hides most errors."""
        scales: dict[str, tuple[float, Tolerance]] = {}
        for c in checked:
            if c.output.tolerance is not None:
                before = scales.get(c.output.name, (0.0, c.output.tolerance))[0]
                scales[c.output.name] = (max(before, c.output.scale), c.output.tolerance)
        return [
            f"Output {name!r} is at most {scale:.1e} on every probe, so that the comparison says little; "
            "give inputs that make it larger with --inputs FILE.npz."
            for name, (scale, tolerance) in scales.items()
            if scale < 100 * tolerance.floor
        ]


def _relied(candidate: ir.Model | str | os.PathLike[str]) -> list[Reliance]:
    """What a candidate takes for granted."""
    try:
        return read_assumptions(_opened(candidate))
    except ModelError:  # a file that doesn't load is told of by the session
        return []


def _opened(model: ir.Model | str | os.PathLike[str]) -> ir.Model:
    return model if isinstance(model, ir.Model) else load(model)


def coarsest_type(model: ir.Model) -> str | None:
    """ "float16" or "bfloat16" where the graph computes in it (the coarser of both), else None."""
    found: set[ir.DataType | None] = set()
    for node in nodes(model):
        if node.op_type == "Cast":
            found.add(ir.DataType(node.attributes.get_int("to", 1)))
        elif node.op_type != "DequantizeLinear":
            found.update(v.dtype for v in node.inputs if v is not None and v.is_initializer())
    if ir.DataType.BFLOAT16 in found:
        return "bfloat16"
    return "float16" if ir.DataType.FLOAT16 in found else None
