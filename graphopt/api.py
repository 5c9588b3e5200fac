"""The Python API: optimize, verify, inspect."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import onnx
import onnx_ir as ir

from graphopt.analysis.cost import cost
from graphopt.analysis.profile import Profile
from graphopt.analysis.profile import load as load_profile
from graphopt.analysis.profile_cache import cached as cached_profile
from graphopt.analysis.structure import structure
from graphopt.analysis.target import TARGETS
from graphopt.calibration.calibration import Calibration, stage_cache
from graphopt.calibration.data import ArrayDataset, Dataset
from graphopt.calibration.sources import SELF, load_data
from graphopt.errors import InputDataError, ModelError, UsageError, VerificationError
from graphopt.graph import assumptions, load, session_settings
from graphopt.graph import save as save_model
from graphopt.graph.edits import functions, nodes, walk
from graphopt.graph.kv_interface import kv_interface
from graphopt.graph.kv_names import rename_kv_cache
from graphopt.graph.load import EXTERNAL_KEY, PATH_KEY, normalize
from graphopt.graph.save import Progress as SaveProgress
from graphopt.pass_manager import PassManager, Progress, VerifyMode
from graphopt.recipe import Recipe
from graphopt.recipe import load as load_recipe
from graphopt.report.report import Report
from graphopt.runtime_ops.memory_session import make_session
from graphopt.verification.equivalence import verify as verify_models
from graphopt.verification.probes import Probe, load_probes, make_probes
from graphopt.verification.structure import check_structure, found_by_onnx, nan_weight
from graphopt.verification.verdict import Verdict
from graphopt.verification.verifier import Verifier

Source: TypeAlias = ir.Model | onnx.ModelProto | str | os.PathLike[str]
"""What a model can be given as."""
Inputs: TypeAlias = str | os.PathLike[str] | Mapping[str, Any]
"""Inputs of the user's own: one array for each input by name, or an .npz file of them."""


@dataclasses.dataclass(repr=False)
class Result:
    """An optimized model and the report about it."""

    model: ir.Model
    report: Report

    def __repr__(self) -> str:
        before, after = self.report.run.before.nodes, self.report.run.after.nodes
        return f"<Result: {before} -> {after} nodes{'' if self.report.ok else ', passes rolled back'}>"

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        external_data: bool | None = None,
        shard_bytes: int | None = None,
        in_place: bool = False,
        progress: SaveProgress | None = None,
        accept: Callable[[Path], None] | None = None,
    ) -> list[Path]:
        """Write the model (see `graphopt.graph.save.save`) and note its size in the report."""
        files = save_model(
            self.model, path, external_data=external_data, shard_bytes=shard_bytes, in_place=in_place,
            progress=progress, accept=accept,
        )  # fmt: skip
        self.report.output = {
            "path": str(path),
            "bytes": sum(f.stat().st_size for f in files),
            "files": [f.name for f in files],
        }
        return files


def optimize(
    model_or_path: Source,
    recipe: Recipe | str | os.PathLike[str] | dict[str, Any] | None = None,
    target: str = "cpu",
    *,
    options: Sequence[str] = (),
    verify: VerifyMode = "auto",
    inputs: Inputs | None = None,
    calibration: Dataset | Calibration | Iterable[Mapping[str, Any]] | Literal["self"] | None = None,
    profile: Profile | str | os.PathLike[str] | None = None,
    assume: str | Sequence[str] = (),
    rename_kv: bool = False,
    seed: int = 0,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Result:
    """Run a recipe on a model, verifying as it goes.

    Args:
        model_or_path: An `onnx_ir` model, which is rewritten in place, an `onnx` one, which isn't, or a path.
        recipe: A recipe, its file, the name of one that ships, or parsed YAML; None: every exact pass.
        target: What the result is for: "cpu", "cuda" or "portable".
        options: Options of the recipe's passes, as "bits=3" or "quantize-weights.bits=3".
        verify: "pass", "phase", "auto" or "none"; see `PassManager`.
        inputs: One array for each input, or an .npz file of them, used besides the generated probe inputs.
        calibration: Data for passes that need it, see docs/calibration.md: a data set, samples as mappings from the
            names of inputs to arrays, or "self": text that a decoder writes.
            What a data set was found to be like is kept in the user's cache; a `Calibration` says where, if at all.
        profile: What was measured of the target, which lowering then follows: a profile or its file, or "auto" for the
            one of this machine from the cache, if there is one (target cpu). None: safe defaults.
        assume: What may be taken for granted about inputs, besides what the recipe and the model say: names such as
            "no-left-padding" or "max-length=2048"; see `graphopt.graph.assumptions`. What a pass relied on is written
            into the result, which is judged where that holds, and `graphopt.session` refuses other inputs.
        rename_kv: Give the inputs and outputs of a decoder the names of docs/generation.md at the end.
        seed: Seed of the generated probe inputs.
        jobs: Processes that try the candidates of a search side by side; None: as many as pay and fit, or as a
            `Calibration` says.
        progress: Called before each pass, and before each step of what takes long.

    Raises:
        ModelError: The model is broken or ONNX Runtime can't run it.
        UsageError: An unknown recipe, pass, option, target or assumption; a profile that is none, or for another
            target; names for the cache of a model that has none.
        InputDataError: `inputs` or `calibration` doesn't fit the model.
        VerificationError: No probe input runs on the original.
    """
    if target not in TARGETS:
        raise UsageError(f"There is no target {target!r}; the targets are {', '.join(TARGETS)}.")
    chosen = load_recipe(recipe).with_options(options)
    passes = chosen.passes(target)
    if calibration is not None and not any(getattr(p, "needs", ()) for p in passes):
        raise UsageError(f"No pass of the recipe {chosen.name} needs calibration data; leave it out.")
    found = find_profile(profile, target)
    given = assumptions.Assumptions.parse(assume) | chosen.assume
    model = _model(model_or_path)
    require_valid(model)
    assumed = given | assumptions.carried(model)
    if inputs is not None:
        load_probes(inputs, model)  # a mistake in them is told before the work, and also where nothing is compared
    used: list[Probe] = []
    unusable: list[tuple[Probe, str]] = []

    def verifier_of(reference: ir.Model) -> Verifier:
        if progress is not None:
            progress("probing the original", 0, len(passes))
        # A lossy pass may give the model other inputs, which need probes of their own.
        fitting = [probe for probe in used if _fits(probe, reference)]
        own = load_probes(inputs, reference) if inputs is not None and not used else []
        try:
            verifier = Verifier(
                reference, fitting or [*own, *make_probes(reference, seed, assumptions=assumed)], seed=seed
            )
        except VerificationError as error:
            raise VerificationError(f"{error} To go on without comparing numbers, use --verify none.") from error
        for probe, reason in verifier.unusable:
            if probe.recipe is None:
                raise InputDataError(f"The original doesn't run on {probe.name}: {reason}")
        if (names := verifier.nan_outputs()) and (weight := nan_weight(reference)) is not None:
            raise ModelError(
                f"The weight {weight!r} holds NaN, and the output {names[0]!r} of the original is NaN on every probe, "
                "so nothing can be compared; mend the weight, or use --verify none."
            )
        if not used:
            used.extend(verifier.probes)
            unusable.extend(verifier.unusable)
        return verifier

    if isinstance(calibration, str):
        if calibration != SELF:
            raise UsageError(f'Calibration data is a data set, or "self", not {calibration!r}; load it first.')
        if progress is not None:
            progress("writing calibration data", 0, len(passes))
        calibration = load_data(SELF, model, seed=seed)
    if calibration is not None and not isinstance(calibration, Dataset | Calibration):
        calibration = ArrayDataset(calibration)
    if isinstance(calibration, Dataset):
        calibration = Calibration(calibration, cache=stage_cache(), progress=progress)
    if calibration is not None and jobs is not None:
        calibration = dataclasses.replace(calibration, jobs=jobs)
    source = describe_source(model)
    before = Counter(node.op_type for node in nodes(model))
    manager = PassManager(
        passes,
        verifier_of=verifier_of,
        verify=verify,
        calibration=calibration,
        profile=found,
        assumptions=assumed,
        progress=progress,
    )
    if rename_kv and kv_interface(model) is None:
        raise UsageError("--rename-kv-cache is for decoders, and no attention here joins an input to new keys.")
    run = manager(model)
    # After all is verified: outputs are compared by name.
    renamed = rename_kv_cache(model) if rename_kv else {}
    report = Report(
        source,
        chosen,
        target,
        seed,
        run,
        (before, Counter(node.op_type for node in nodes(model))),
        probes=[{"name": p.name, "description": p.description} for p in used],
        skipped_probes=[{"name": p.name, "reason": reason} for p, reason in unusable],
        session_settings=session_settings.read(model).listed(),
        profile=None if found is None else {"id": found.id, "date": found.date, "description": found.description},
        assumed=given,
        relied=assumptions.read(model),
        renamed=renamed,
        calibration=None if calibration is None else calibration.to_dict(),
    )
    return Result(model, report)


def canonical(model: ir.Model) -> ir.Model:
    """Bring a graph to standard operators and clean it up, exactly and in place; weights stay as they are.

    These are the passes of the default recipe that fold nothing into weights and look at no target.
    """
    passes = [p for p in load_recipe().passes() if getattr(p, "family", "") in ("clean", "raise")]
    PassManager(passes, verify="none")(model)
    return model


def find_profile(given: Profile | str | os.PathLike[str] | None, target: str) -> Profile | None:
    """The profile that `optimize` means by `given`.

    Raises:
        UsageError: The file is no profile; or the target isn't the cpu, which is what profiles are measured on.
    """
    if given is None or (given == "auto" and target != "cpu"):
        return None
    if target != "cpu":
        raise UsageError(f"A profile is for the target cpu; leave it out for the target {target}.")
    if isinstance(given, Profile):
        return given
    return cached_profile() if given == "auto" else load_profile(given)


def verify(
    reference: Source | Result,
    candidate: Source | Result,
    *,
    inputs: Inputs | None = None,
    seed: int = 0,
) -> Verdict:
    """Compare two models (paths, models in memory, or a `Result`) on probe inputs made from the first one's signature,
    where what they take for granted about inputs holds.

    Raises:
        ModelError: One of them is broken.
        VerificationError: Their inputs or outputs differ, or no probe runs.
    """
    given = [m.model if isinstance(m, Result) else m for m in (reference, candidate)]
    # A file stays a file, so that messages name it.
    first, second = (_model(m) if isinstance(m, ir.Model | onnx.ModelProto) else m for m in given)
    return verify_models(first, second, inputs=inputs, seed=seed)


def inspect(
    model_or_path: Source,
    *,
    why: bool = False,
    dims: dict[str, int] | None = None,
    assume: str | Sequence[str] = (),
) -> dict[str, Any]:
    """What a model is: interface, operators, size, FLOPs, and with `why` what the exact passes leave alone and why.

    Args:
        model_or_path: A model, unchanged by this, or the path of one.
        why: Run the exact passes on a copy (without verification) and collect their reasons.
        dims: Sizes for dynamic dimensions by name, for FLOPs.
        assume: What these passes may take for granted about inputs; as for `optimize`.

    Raises:
        ModelError: The file can't be loaded at all.
        UsageError: A name in `dims` is no dynamic dimension of the inputs; an unknown assumption.
    """
    assumed = assumptions.Assumptions.parse(assume)
    model = _model(model_or_path)
    _require_dims(model, dims or {})
    problems = check_structure(model)
    measured = cost(model, dims=dims)
    operators = Counter(
        node.op_type if node.domain == "" else f"{node.domain}::{node.op_type}" for node in nodes(model)
    )
    data: dict[str, Any] = {
        **describe_source(model),
        "ir_version": model.ir_version,
        "opsets": dict(model.graph.opset_imports),
        "producer": " ".join(filter(None, (model.producer_name, model.producer_version))),
        "inputs": [_value(v) for v in model.graph.inputs if not v.is_initializer()],
        "overridable": [_value(v) for v in model.graph.inputs if v.is_initializer()],
        "outputs": [_value(v) for v in model.graph.outputs],
        "nodes": measured.node_count,
        "parameters": measured.parameters,
        "weight_bytes": measured.weight_bytes,
        "flops": measured.flops,
        "flops_dims": dict(measured.sizes),
        "unknown_flops": measured.unknown_flops,
        "operators": dict(sorted(operators.items(), key=lambda item: (-item[1], item[0]))),
        "functions": [":".join(identifier[:2]) for identifier in model.functions],
        "subgraphs": sum(1 for _ in walk(model)) - 1 - sum(1 for _ in functions(model)),
        "structures": {},
        "layers": [],
        "residual_streams": [],
        "no_residual_stream": None,
        "long_skips": [],
        "convolutions": [],
        "elementwise_norms": {},
        "attention": {},
        "linear": {},
        "tied_layers": [],
        "assumptions": assumptions.listed(assumptions.read(model)),
        "kv_cache": None,
        "problems": problems,
        "why": None,
    }
    if all(map(found_by_onnx, problems)):
        decoder = kv_interface(model)
        data["kv_cache"] = None if decoder is None else decoder.to_dict()
        copy = model.clone()
        passes = load_recipe().passes()
        # Structure is read off the canonical graph: what a target runs fastest is spelled in its own way.
        canonical = [pass_ for pass_ in passes if getattr(pass_, "family", "") != "lower"]
        PassManager(canonical, verify="none")(copy)
        raised = Counter(node.op_type for node in nodes(copy))
        data["structures"] = {name: raised[name] for name in STRUCTURES if raised[name]}
        data |= structure(copy)
        if why:
            run = PassManager(passes, verify="none", assumptions=assumed)(model.clone())
            data["why"] = [{"pass": name, **dataclasses.asdict(site)} for name, site in run.left()]
    return data


STRUCTURES = (
    "LayerNormalization", "RMSNormalization", "GroupNormalization", "InstanceNormalization", "BatchNormalization",
    "Attention", "Softmax", "Gelu", "Swish", "RotaryEmbedding", "MatMul", "Gemm", "Conv", "ConvTranspose", "LSTM",
    "GRU", "If", "Loop", "Scan",
)  # fmt: skip
"""Operators of the canonical graph that say what a model is made of."""


def _model(given: Source) -> ir.Model:
    if isinstance(given, str | os.PathLike):
        return load(given)
    if not isinstance(given, ir.Model | onnx.ModelProto):
        raise UsageError(f"A model must be a path, an onnx_ir.Model or an onnx.ModelProto, not {type(given).__name__}.")
    if isinstance(given, onnx.ModelProto):
        copy = onnx.ModelProto()
        copy.CopyFrom(given)  # onnx_ir renames tensors of the proto in place
        given = ir.from_proto(copy)
    model = given
    normalize(model)  # a model in memory may come from anywhere
    return model


def _fits(probe: Probe, model: ir.Model) -> bool:
    """Whether a probe feeds what a model takes."""
    inputs = [value for value in model.graph.inputs if value.name in probe.feeds or not value.is_initializer()]
    return {value.name for value in inputs} == set(probe.feeds) and all(
        value.dtype is None or value.dtype == ir.DataType.STRING or value.dtype.numpy() == probe.feeds[value.name].dtype
        for value in inputs
        if value.name is not None
    )


def require_valid(model: ir.Model) -> None:
    """Raise ModelError with the first problem of an invalid graph.

    A model on which only onnx's checker or shape inference stumbles is valid if ONNX Runtime loads it.
    """
    problems = check_structure(model)
    if not problems or (all(map(found_by_onnx, problems)) and _runs(model)):
        return
    more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
    raise ModelError(f"{model.meta.get(PATH_KEY, 'the model')} is not a valid model: {problems[0].rstrip('.')}{more}.")


def _runs(model: ir.Model) -> bool:
    try:
        make_session(model, "none")
    except VerificationError:
        return False
    return True


def describe_source(model: ir.Model) -> dict[str, Any]:
    """Where a model came from: path and bytes on disk, with its external data."""
    path = model.meta.get(PATH_KEY)
    if path is None:
        return {"path": None, "bytes": None, "external_data": False}
    external = {
        value.const_value.path
        for graph in walk(model)
        for value in graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    }
    files = {Path(file).resolve() for file in (path, *external)}  # a thousand weights lie in few files
    return {
        "path": str(path),
        "bytes": sum(f.stat().st_size for f in sorted(files)),
        "external_data": bool(model.meta.get(EXTERNAL_KEY)),
    }


def _require_dims(model: ir.Model, dims: dict[str, int]) -> None:
    """Raise UsageError for a name that is no dynamic dimension of the inputs: its own, or "input[axis]"."""
    known: dict[str, None] = {}
    places = set()
    for value in model.graph.inputs:
        for axis, size in enumerate(value.shape or ()):
            if not isinstance(size, int) or size <= 0:
                place = f"{value.name}[{axis}]"
                places.add(place)
                known[place if isinstance(size, int) or not size.value else size.value] = None
    for name in dims:
        if name not in known and name not in places:
            raise UsageError(f"The inputs have no dynamic dimension {name!r}; they have {', '.join(known) or 'none'}.")


def _value(value: ir.Value) -> dict[str, Any]:
    shape = None if value.shape is None else [d if isinstance(d, int) else str(d) for d in value.shape]
    return {
        "name": value.name,
        "dtype": str(value.dtype) if value.dtype is not None else str(value.type),
        "shape": shape,
    }
