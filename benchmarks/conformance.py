"""The exact recipe on the ONNX standard's backend tests: does every model still compute what it computed?

    python benchmarks/conformance.py                                       tests of the installed onnx package
    python benchmarks/conformance.py --folder /usr/share/libonnx-testdata  any folder of model.onnx, test_data_set_*
    python benchmarks/conformance.py --every 10 --variants given constant  a sample

Each model is loaded, optimized by the default recipe without verification, and its outputs on the test's inputs are
compared with those of the *original* model: in ONNX Runtime without optimizations where that runs the original, else in
the reference evaluator of the onnx package. (Whether the runtime gives what the standard expects isn't asked here.) Bit
for bit where every pass that changed something promises so, else within the tolerance of the dtype.

Variants of a test: `given`, the model as it is; `integers`, its small integer and bool inputs made constants, so that
shapes and axes are known; `constant`, all inputs made constants, so that folding meets every operator; `dynamic`, the
declared sizes of inputs and outputs replaced by symbols.

Exit status 1 where there is a fault. Downloads nothing. The full run takes two to three minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
from backend_tests import Case, folder_cases, package_cases
from onnx import numpy_helper

from graphopt.api import require_valid
from graphopt.errors import ModelError
from graphopt.graph import load, save
from graphopt.pass_manager import PassManager, RunReport
from graphopt.recipe import Recipe
from graphopt.recipe import load as load_recipe
from graphopt.runtime_ops.memory_session import make_session, run
from graphopt.verification.compare import compare

VARIANTS = ("given", "integers", "constant", "dynamic")
CONSTANT_INTEGERS = 64
"""Elements up to which the variant `integers` makes an input a constant."""


@dataclasses.dataclass
class Outcome:
    """What became of one variant of one test.

    Attributes:
        compared: "ORT", "reference", "nowhere" (the original runs in neither), or "refused" (not a valid model).
        bitwise: Whether only passes that promise the same bits changed something.
        modified: Whether anything was changed.
        faults: What is wrong, one sentence each.
        left: Operators folded, and other words for the table.
    """

    compared: str = ""
    bitwise: bool = True
    modified: bool = False
    faults: list[str] = dataclasses.field(default_factory=list)


# ---- one test


def conform(case: Case, variant: str = "given") -> Outcome | None:
    """Optimize one test's model and compare; None where the test has no such variant."""
    original, data_sets = onnx.ModelProto(), case.inputs()
    original.CopyFrom(case.model())
    constants = {t.name for t in original.graph.initializer}
    names = [v.name for v in original.graph.input]
    if len(names) > max((len(s) for s in data_sets), default=0):
        names = [n for n in names if n not in constants]
    feeds = [dict(zip(names, s, strict=False)) for s in data_sets] or [{}]
    if variant == "dynamic":
        if not _make_dynamic(original):
            return None
    elif variant != "given":
        made = _make_constant(original, feeds[0], integers=variant == "integers")
        if not made:
            return None
        feeds = [{name: value for name, value in feeds[0].items() if name not in made}]
    outcome = Outcome()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        path = Path(folder) / "model.onnx"
        path.write_bytes(original.SerializeToString())
        try:
            _conform(path, original, feeds, outcome)
        except Exception as error:
            outcome.faults.append(f"raised {type(error).__name__}: {_line(error)}")
    return outcome


def _conform(path: Path, original: onnx.ModelProto, feeds: Sequence[dict[str, Any]], outcome: Outcome) -> None:
    valid, fully = _checked(original, False), _checked(original, True)
    model = load(path)
    try:
        require_valid(model)
    except ModelError as error:
        outcome.compared = "refused"
        if fully is None or not isinstance(_ort(path, original), str):
            outcome.faults.append(f"refused although onnx.checker or ONNX Runtime takes it: {error}")
        return
    recipe = _recipe()
    report = PassManager(recipe.passes(), verifier_of=None)(model)
    outcome.modified = report.modified
    outcome.bitwise = _bitwise(report)
    outcome.faults += [f"{r.name} rolled back: {r.detail}" for r in report.rolled_back]
    optimized = _saved(model, path.with_name("optimized.onnx"))
    if valid is None and (reason := _checked(optimized, False)):
        outcome.faults.append(f"onnx.checker refuses the result: {reason}")
    elif fully is None and (reason := _checked(optimized, True)):
        outcome.faults.append(f"the full onnx.checker refuses the result: {reason}")
    outcome.faults += _interface(original, optimized)
    again = PassManager(recipe.passes(), verifier_of=None)(model)
    if again.modified:
        names = {r.name for r in again.records if r.status == "applied"}
        outcome.faults.append(f"a second run changes something: {', '.join(sorted(names))}")
    elif _saved(model, path.with_name("again.onnx")) != optimized:
        outcome.faults.append("a second run says that it changed nothing, but did")
    outcome.compared = _compare(path, original, optimized, feeds, outcome)


@functools.cache
def _recipe() -> Recipe:
    return load_recipe()


def _saved(model: ir.Model, path: Path) -> onnx.ModelProto:
    save(model, path)
    return onnx.load(path)


def _compare(
    path: Path, original: onnx.ModelProto, optimized: onnx.ModelProto, feeds: Sequence[dict[str, Any]], outcome: Outcome
) -> str:
    """Run both models; returns where."""
    names = [o.name for o in original.graph.output]
    target = path.with_name("optimized.onnx")
    for place, runner in (("ORT", _ort), ("reference", _reference)):
        before = runner(path, original)
        expected = [before(f) for f in feeds] if not isinstance(before, str) else before
        if isinstance(expected, str) or any(isinstance(e, str) for e in expected):
            continue
        after = runner(target, optimized)
        if isinstance(after, str):
            outcome.faults.append(f"{place} runs the original but doesn't load the result: {after}")
            return place
        repeated = before(feeds[0])
        assert not isinstance(before, str)
        random = not all(c.ok for c in compare(expected[0], repeated, names, bitwise=True))
        for feed, reference in zip(feeds, expected, strict=True):
            got = after(feed)
            if isinstance(got, str):
                outcome.faults.append(f"{place} runs the original but not the result: {got}")
                continue
            if random:
                reference, got = [_form(v) for v in reference], [_form(v) for v in got]
            for part in compare(reference, got, names, bitwise=outcome.bitwise):
                if not part.ok:
                    outcome.faults.append(f"output {part.name!r} {part.reason} ({place})")
        return place
    return "nowhere"


def _form(value: Any) -> str:
    """What two runs of a random output have in common."""
    return f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__


_Runner = Callable[[dict[str, Any]], Any]


def _ort(path: Path, proto: onnx.ModelProto) -> _Runner | str:
    try:
        session = make_session(path, "none", threads=1)
    except Exception as error:
        return _line(error)
    order = [o.name for o in session.get_outputs()]

    def call(feeds: dict[str, Any]) -> Any:
        try:
            outputs = dict(zip(order, run(session, feeds), strict=True))
        except Exception as error:
            return _line(error)
        return [outputs[o.name] for o in proto.graph.output]

    return call


def _reference(path: Path, proto: onnx.ModelProto) -> _Runner | str:
    try:
        evaluator = onnx.reference.ReferenceEvaluator(proto)
    except Exception as error:
        return _line(error)

    def call(feeds: dict[str, Any]) -> Any:
        try:
            outputs = evaluator.run(None, dict(feeds))
        except Exception as error:
            return _line(error)
        for output, value in zip(outputs, proto.graph.output, strict=True):
            declared = value.type.tensor_type.elem_type
            if isinstance(output, np.ndarray) and declared and output.dtype.kind not in "OU":
                given = ir.DataType.from_numpy(output.dtype)
                if int(given) != declared:  # its CastLike of opset 15 makes integers of bfloat16, for example
                    return f"the evaluator gives {given} for {value.name!r}"
        return outputs

    return call


def _bitwise(report: RunReport) -> bool:
    promised = {p.name for p in _recipe().passes() if getattr(p, "bitwise", False)}
    return all(r.name in promised for r in report.records if r.status == "applied")


def _checked(proto: onnx.ModelProto, full: bool) -> str | None:
    try:
        onnx.checker.check_model(proto, full_check=full)
    except Exception as error:
        return _line(error)
    return None


def _interface(before: onnx.ModelProto, after: onnx.ModelProto) -> Iterator[str]:
    """Inputs keep name, type and shape; outputs name and type (their shapes may become known)."""
    constants = {t.name for t in before.graph.initializer} if before.ir_version < 4 else set()
    for what, old, new in (
        ("inputs", [v for v in before.graph.input if v.name not in constants], after.graph.input),
        ("outputs", before.graph.output, after.graph.output),
    ):
        if [v.name for v in old] != [v.name for v in new]:
            yield f"the {what} are now called {[v.name for v in new]}"
            continue
        for a, b in zip(old, new, strict=True):
            first, second = onnx.TypeProto(), onnx.TypeProto()
            first.CopyFrom(a.type)
            second.CopyFrom(b.type)
            if what == "outputs" and first.HasField("tensor_type"):
                first.tensor_type.ClearField("shape")
                second.tensor_type.ClearField("shape")
            if first.SerializeToString(deterministic=True) != second.SerializeToString(deterministic=True):
                yield f"the type of {a.name!r} became {_line(str(second))} from {_line(str(first))}"


def _make_constant(proto: onnx.ModelProto, feeds: dict[str, Any], *, integers: bool) -> set[str]:
    """Give inputs as initializers; returns their names."""
    made: set[str] = set()
    taken = {t.name for t in proto.graph.initializer}
    for value in proto.graph.input:
        array = feeds.get(value.name)
        if not isinstance(array, np.ndarray) or value.name in taken or not value.type.HasField("tensor_type"):
            continue
        if integers and (array.dtype.kind not in "iub" or array.size > CONSTANT_INTEGERS):
            continue
        proto.graph.initializer.append(numpy_helper.from_array(array, value.name))
        made.add(value.name)
    kept = [v for v in proto.graph.input if v.name not in made]
    del proto.graph.input[:]
    proto.graph.input.extend(kept)
    if proto.ir_version < 4:
        proto.ir_version = 4
    return made


def _make_dynamic(proto: onnx.ModelProto) -> bool:
    """Replace the sizes of inputs by symbols; whether there were any."""
    taken = {t.name for t in proto.graph.initializer}
    any_sizes = False
    for value in proto.graph.input:
        if value.name in taken or not value.type.HasField("tensor_type"):
            continue
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            dim.dim_param = f"{value.name}_{axis}"
            any_sizes = True
    for value in proto.graph.output:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            dim.dim_param = f"{value.name}_{axis}"
    del proto.graph.value_info[:]
    return any_sizes


def _line(error: object) -> str:
    return " ".join(str(error).split())[:300]


# ---- all of them


@dataclasses.dataclass
class Totals:
    """Counts over all tests."""

    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    faults: list[str] = dataclasses.field(default_factory=list)

    def add(self, name: str, outcome: Outcome) -> None:
        """Count one outcome."""
        self.counts["tests"] += 1
        self.counts[outcome.compared or "failed"] += 1
        self.counts["changed"] += outcome.modified
        self.counts["bit for bit"] += outcome.bitwise and outcome.compared in ("ORT", "reference")
        self.counts["with faults"] += bool(outcome.faults)
        self.faults += [f"{name}: {fault}" for fault in outcome.faults]

    def row(self, title: str) -> str:
        """One line of the table."""
        return f"{title:<12}" + "".join(f"{self.counts[column]:>12}" for column in COLUMNS)


COLUMNS = ("tests", "ORT", "reference", "nowhere", "refused", "changed", "bit for bit", "with faults")


def conform_all(cases: Iterable[Case], variants: Sequence[str] = ("given",), every: int = 1) -> dict[str, Totals]:
    """Run every `every`-th test in each variant (different tests in different variants)."""
    totals = {variant: Totals() for variant in variants}
    for number, case in enumerate(cases):
        for offset, variant in enumerate(variants):
            if (number + offset) % every == 0 and (outcome := conform(case, variant)) is not None:
                totals[variant].add(f"{case.name} ({variant})", outcome)
    return totals


def table(totals: dict[str, Totals]) -> str:
    """The counts as text."""
    head = f"{'variant':<12}" + "".join(f"{column:>12}" for column in COLUMNS)
    return "\n".join([head, *(t.row(variant) for variant, t in totals.items())])


def main() -> int:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--folder", type=Path, action="append", help="tests in a folder instead of the package's")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--every", type=int, default=1, metavar="K", help="every K-th test only")
    parser.add_argument("--match", default="", help="only tests whose name contains this")
    options = parser.parse_args()
    cases = [c for f in options.folder for c in folder_cases(f)] if options.folder else package_cases()
    cases = [c for c in cases if options.match in c.name]
    start = time.perf_counter()
    totals = conform_all(cases, options.variants, options.every)
    for fault in (f for t in totals.values() for f in t.faults):
        print(fault)
    print(table(totals))
    print(f"{time.perf_counter() - start:.0f} s")
    return int(any(t.faults for t in totals.values()))


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # ONNX Runtime's threads of many sessions take long to end
