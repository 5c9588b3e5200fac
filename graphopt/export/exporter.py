"""Export of models from PyTorch to ONNX, verified against PyTorch."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from graphopt.errors import GraphoptError, ModelError, UsageError, VerificationError
from graphopt.export import attention, layers
from graphopt.export.adapters import AdaptedWeights
from graphopt.export.adapters.separate import KeptAdapter, keep_adapters
from graphopt.export.compare import compare, dry_references, run_torch
from graphopt.export.dependencies import require
from graphopt.export.genai import write_genai_config
from graphopt.export.gguf import GGUFWeights
from graphopt.export.gguf.keep import keep_quantized
from graphopt.export.huggingface import from_pretrained
from graphopt.export.loaded import Loaded
from graphopt.export.options import OPSET, ExportReport, Options, Part, Way, is_factory
from graphopt.export.source import Reference, Source, from_factory
from graphopt.export.trace import Dims, Exporter, trace
from graphopt.export.weights import load_into, shared_names
from graphopt.graph.edits import nodes
from graphopt.graph.last_logits import last_logits
from graphopt.graph.load import load
from graphopt.graph.save import save, weight_bytes
from graphopt.runtime_ops.machine import available_bytes

INLINE_BYTES = 100_000_000
"""Weights of more bytes than this go to a file beside the model."""
KEPT_TOLERANCE = {"int16": 1e-3, "float32": 1e-3, "int8x2": 1e-3, "int8": 0.1}
"""Largest error allowed of a model with quantized weights kept, by what its operators make of their inputs."""
VERIFIED_SHARE = 2.5
"""A model is verified whole where memory for so many copies of it is free: PyTorch's, ONNX Runtime's, and the rest."""


Written = list[tuple[Part, list[Path]]]
"""Models with their files, the model first."""


def export_model(source: str | Path, output: str | Path, **options: Any) -> Path:
    """Export a model to ONNX and verify it against PyTorch; see `export_report`, whose `path` this returns."""
    return export_report(source, output, **options).path


def export_report(
    source: str | Path, output: str | Path, *, progress: Callable[[str], None] | None = None, **options: Any
) -> ExportReport:
    """Export a model to ONNX, verify it against PyTorch, and say what was written.

    Inputs and their dynamic dimensions ("batch", "sequence", ...) follow from the model's forward and configuration; a
    decoder has its cache among inputs and outputs (`graphopt.export.decoder`). Weights are read from the checkpoint one
    at a time while they are written.

    Args:
        source: A Hugging Face folder (config.json and .safetensors), a name on the hub, or "module:factory", a
            callable that returns (torch.nn.Module, example inputs[, input names[, output names[, dynamic axes]]]).
        output: A path that ends in .onnx, or a folder, in which model.onnx and the model's tokenizer and
            configuration files are written. Weights of more than 100 MB lie beside the model (`model.onnx.data`).
        progress: Called with a line of text at each step.
        **options: See `Options`.

    Raises:
        UsageError: A wrong argument, a library that is missing, or a model that isn't supported.
        ModelError: The model can't be loaded or exported, or the output can't be written.
        VerificationError: The exported model differs from PyTorch. Then, and after every other error, nothing
            is written.
    """
    name = str(source)
    chosen = Options(**options)
    chosen.check(name)
    path, folder = _target(output)
    for module in ("torch", "onnxruntime"):
        require(module)
    export = _Export(chosen, progress or (lambda _: None))
    loaded = export.load(name)
    if folder is None and len(loaded.sources) > 1:
        raise UsageError(f"{name} becomes {len(loaded.sources)} models ({', '.join(loaded.sources)}); give a folder")
    made_folders = _make_folders(path.parent)
    try:
        with tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent, ignore_cleanup_errors=True) as temporary:
            written = export.write(loaded, Path(temporary), path.name if folder is None else None)
            beside = export.companions(loaded, written, Path(temporary)) if folder is not None else []
            if _holds(path.parent, name):
                # What is there belongs to the source, which stays as it is.
                beside = [file for file in beside if not (path.parent / file.name).exists()]
            # What a model refers to is there before it is.
            own = [_moved(file, path.parent) for _, some in written for file in reversed(some)]
            files = [*reversed(own), *(_moved(file, path.parent) for file in beside)]
            parts = [dataclasses.replace(part, path=path.parent / part.path.name) for part, _ in written]
    except OSError as error:
        raise ModelError(f"{path.parent} can't be written: {error.strerror or error}") from error
    finally:
        for made in made_folders:
            if made.is_dir() and not any(made.iterdir()):
                made.rmdir()
    return ExportReport(tuple(parts), tuple(files), export.way, export.seconds, tuple(export.notes + loaded.notes))


class _Export:
    """One export, with the time that its steps take."""

    def __init__(self, options: Options, say: Callable[[str], None]) -> None:
        self.options, self._say = options, say
        self.way = Way("dynamo", "", 0)
        self.notes: list[str] = []
        self.kept: list[KeptAdapter] = []
        self.seconds: dict[str, float] = {}
        self._step, self._since = "", time.perf_counter()

    def say(self, step: str, text: str) -> None:
        """Begin a step."""
        now = time.perf_counter()
        if self._step:
            self.seconds[self._step] = self.seconds.get(self._step, 0.0) + now - self._since
        self._step, self._since = step, now
        if text:
            self._say(text)

    def load(self, name: str) -> Loaded:
        """The model that this name gives."""
        self.say("load", f"loading {name}")
        options = self.options
        if is_factory(name):
            source = from_factory(name)
            return Loaded(name, {"model": source}, source.module)
        merged = () if options.keep_adapters else options.adapters
        loaded = from_pretrained(name, attention=options.attention, dtype=options.dtype, adapters=merged)
        if options.last_logits and any(source.references is None for source in loaded.sources.values()):
            raise UsageError(f"{name} isn't a decoder of tokens alone, which has logits of a last position")
        return loaded

    def write(self, loaded: Loaded, folder: Path, name: str | None) -> Written:
        """Write all models into a folder, and verify them there; each with its files."""
        whole = self._whole(loaded)
        if whole:
            loaded.put_in()
        first: GraphoptError | None = None
        for way in self._ways(loaded, whole):
            try:
                if way.exporter == "torchscript":  # Which writes the numbers that it finds in the module.
                    loaded.put_in()
                written = [
                    self._part(loaded, source, folder, name or f"{stem}.onnx", way, whole)
                    for stem, source in loaded.sources.items()
                ]
            except (ModelError, VerificationError) as error:
                # What one way can't, a plainer one can.
                first = first or error
                continue
            self.way = way
            if first is not None:
                self.notes.append(f"exported with {way}, because another way failed: {first}")
            self.say("", "")
            return written
        assert first is not None
        raise first

    def _ways(self, loaded: Loaded, whole: bool) -> list[Way]:
        """Exporter, attention and opset in the order to try them."""
        options = self.options
        exporters: list[Exporter] = [options.exporter] if options.exporter else ["dynamo", "torchscript"]
        if options.exporter is None and (not loaded.implementations or not whole):
            exporters = ["dynamo"]
        ways = []
        for exporter in exporters:
            usable = [name for name in loaded.implementations if exporter == "dynamo" or name != attention.NAME]
            for implementation in usable or [""]:
                opset = options.opset or OPSET[exporter]
                if implementation == attention.NAME and opset < attention.OPSET:
                    continue
                ways.append(Way(exporter, implementation, opset))
                if exporter == "dynamo" and implementation == "sdpa" and options.opset is None:
                    # The operator of opset 23 has no form for one head of keys that is broadcast.
                    ways.append(Way(exporter, implementation, attention.OPSET - 2))
        return ways

    def companions(self, loaded: Loaded, written: Written, folder: Path) -> list[Path]:
        """Write what belongs beside the models into a folder below the one they're in."""
        beside = folder / "beside"
        beside.mkdir()
        if loaded.companions is not None:
            _, notes = loaded.companions(beside)
            self.notes += notes
        if self.options.runtime == "genai":
            part, _ = written[0]
            config = loaded.module.config
            write_genai_config(beside, load(part.path), part.path.name, config, _generation(beside))
        return sorted(beside.iterdir())

    def _whole(self, loaded: Loaded) -> bool:
        """Whether the whole model is compared with PyTorch."""
        if self.options.verify != "auto":
            return self.options.verify == "full"
        return loaded.weights is None or VERIFIED_SHARE * loaded.weight_bytes() < (available_bytes() or 0)

    def _part(
        self, loaded: Loaded, source: Source, folder: Path, name: str, way: Way, whole: bool
    ) -> tuple[Part, list[Path]]:
        references = None
        if whole:
            self.say("reference", f"running {source.label} in PyTorch")
            # Before the export, which may change the module's state.
            with loaded.attending("eager"):
                references = self._references(source)
        outputs = output_dims(source, references)
        with loaded.attending(way.implementation):
            model = self._model(loaded, source, outputs, folder, way, self.options.repeat)
        self.say("write", f"writing {name}")
        nodes_written = sum(1 for _ in nodes(model))
        inputs = {item.name: item.dims for item in source.inputs}
        files = save(model, folder / name, external_data=weight_bytes(model) > INLINE_BYTES)
        files += [adapter.write(folder / f"{adapter.name}.onnx_adapter") for adapter in self.kept]
        errors: dict[str, float] = {}
        if references is not None:
            self.say("verify", f"verifying {name} against PyTorch")
            errors = compare(source.label, folder / name, references, list(outputs), self._warned, self._tolerance)
            self._verify_adapters(loaded, source, folder / name, list(outputs))
        elif self.options.verify != "none":
            errors = self._first_layers(loaded, source, folder, way)
        if self.options.last_logits:
            first = next(iter(outputs))
            outputs = {**outputs, first: (outputs[first][0], 1, *outputs[first][2:])}
        return Part(folder / name, inputs, outputs, model.graph.opset_imports[""], nodes_written, errors), files

    def _model(self, loaded: Loaded, source: Source, outputs: Dims, folder: Path, way: Way, repeat: bool) -> ir.Model:
        self.say("trace", f"exporting {source.label} with {way}")
        traced = trace(source, outputs, way.exporter, way.opset, folder, repeat)
        self.notes += [note for note in traced.notes if note not in self.notes]
        self._warned = traced.warned
        written = traced.model.graph.opset_imports.get("", 0)
        if written != way.opset:
            raise ModelError(
                f"PyTorch couldn't write {source.label} at opset {way.opset} with {way.exporter}; ask for "
                + (f"{written} or a newer one" if way.opset < written else "an older one")
            )
        if way.exporter == "dynamo":
            loaded.fill(traced.model, source)
        self._keep(loaded, traced.model)
        model = traced.model if self.options.finish is None else self.options.finish(traced.model)
        if self.options.last_logits:
            last_logits(model)
        return model

    def _references(self, source: Source) -> list[Reference]:
        """PyTorch's answers; of the logits the last position, if that is all that is exported."""
        found = run_torch(source)
        if not self.options.last_logits:
            return found
        cut = []
        for one in found:
            real = dict(one.real or {})
            logits = (source.outputs or ["logits"])[0]
            where = real.get(logits)
            real[logits] = None if where is None else where[:, -1:]
            cut.append(dataclasses.replace(one, outputs=[one.outputs[0][:, -1:], *one.outputs[1:]], real=real))
        return cut

    @property
    def _tolerance(self) -> float | None:
        return KEPT_TOLERANCE[self.options.activations] if self.options.keep_quantized else None

    def _verify_adapters(self, loaded: Loaded, source: Source, path: Path, outputs: list[str]) -> None:
        """Compare the model with each kept adapter switched on with PyTorch, the adapter merged into its weights."""
        for adapter in self.kept:
            self.say("verify", f"verifying the adapter {adapter.name} against PyTorch")
            given = next(item for item in self.options.adapters if Path(item).name == adapter.name)
            assert loaded.weights is not None
            load_into(loaded.module, AdaptedWeights(loaded.weights, given))
            with loaded.attending("eager"):
                references = self._references(source)
            active = path.with_name(f"{adapter.name}.onnx_adapter")
            errors = compare(source.label, path, references, outputs, self._warned, self._tolerance, active)
            self.notes.append(f"the adapter {adapter.name} is equal to PyTorch to {max(errors.values()):.1e}")
        if self.kept:
            loaded.put_in()

    def _keep(self, loaded: Loaded, model: ir.Model) -> None:
        """Put integers in place of float weights, and adapters beside them, where that is asked for."""
        if self.options.keep_quantized:
            assert isinstance(loaded.weights, GGUFWeights)
            report = keep_quantized(model, loaded.weights, inputs=self.options.activations)
            left = sum(item.nbytes for item in report.left)
            self.notes.append(
                f"kept {', '.join(f'{len(names)} {kind}' for kind, names in report.kept.items())} weights quantized, "
                f"{report.bytes_after / 1e6:.0f} MB in place of {report.bytes_before / 1e6:.0f}; {left / 1e6:.1f} MB "
                "stay float" + (f" ({report.left[0].reason})" if report.left else "")
            )
        if self.options.keep_adapters:
            named = {Path(path).name: path for path in self.options.adapters}
            tied = {other: names[0] for names in shared_names(loaded.module) for other in names[1:]}
            self.kept = keep_adapters(model, named, tied=tied).adapters

    def _first_layers(self, loaded: Loaded, source: Source, folder: Path, way: Way) -> dict[str, float]:
        """Verify the model cut to the layers that are traced; the others are made of these, with their own weights."""
        plan = layers.plan(source.module) if source.again is not None else None
        if plan is None:
            self.notes.append(f"{source.label} wasn't compared with PyTorch: its memory isn't free (--verify full)")
            return {}
        self.say("verify", f"verifying the first {plan.kept} layers against PyTorch")
        with layers.cut(source.module, plan):
            loaded.put_in()
            assert source.again is not None
            fewer = source.again()
            with loaded.attending("eager"):
                references = self._references(fewer)
            outputs = output_dims(fewer, references)
            with loaded.attending(way.implementation):
                model = self._model(loaded, fewer, outputs, folder, way, False)
            trial = folder / "first-layers.onnx"
            self.say("verify", "")
            files = save(model, trial, external_data=weight_bytes(model) > INLINE_BYTES)
            errors = compare(fewer.label, trial, references, list(outputs), self._warned, self._tolerance)
        for file in files:
            file.unlink()
        self.notes.append(
            f"compared with PyTorch on its first {plan.kept} layers: memory for all {plan.count} isn't free"
            if self.options.verify == "auto"
            else f"compared with PyTorch on its first {plan.kept} layers of {plan.count}"
        )
        return errors


def _target(output: str | Path) -> tuple[Path, Path | None]:
    """The model's path, and the folder for its companions where the output is a folder."""
    given = Path(output).expanduser()
    if given.suffix == ".onnx" and not given.is_dir():
        return given, None
    if given.is_file():
        raise UsageError(f"{output} is a file without the ending .onnx; give a folder or a path that ends in .onnx")
    return given / "model.onnx", given


def _make_folders(folder: Path) -> list[Path]:
    """Make a folder with its parents; those that were made, innermost first."""
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"the folder {folder} can't be made: {error.strerror or error}") from error
    return missing


def _holds(folder: Path, source: str) -> bool:
    """Whether a folder is the one that the source is, or lies in."""
    given = Path(source).expanduser()
    return given.exists() and os.path.samefile(folder, given if given.is_dir() else given.parent)


def _generation(folder: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _moved(file: Path, folder: Path) -> Path:
    target = folder / file.name
    os.replace(file, target)
    return target


def output_dims(source: Source, references: Sequence[Reference] | None) -> dict[str, tuple[int | str, ...]]:
    """Each output's dimensions: fixed where all runs agree, named after the dynamic size that each equals."""
    if source.dims is not None:
        return source.dims
    if references is None:
        references = dry_references(source)
    first = references[0]
    names = source.outputs
    if names is None:
        names = ["output"] if len(first.outputs) == 1 else [f"output_{i}" for i in range(len(first.outputs))]
    if len(names) != len(first.outputs) or len(set(names)) != len(names):
        raise UsageError(f"{source.label} has {len(first.outputs)} outputs, but the output names are {names}")
    found: dict[str, tuple[int | str, ...]] = {}
    for index, name in enumerate(names):
        dims: list[int | str] = []
        for axis in range(first.outputs[index].ndim):
            sizes = [r.outputs[index].shape[axis] for r in references]
            same = [s for s in first.sizes if all(r.sizes[s] == n for r, n in zip(references, sizes, strict=True))]
            fixed = len(set(sizes)) == 1 and not same
            dims.append(sizes[0] if fixed else same[0] if len(same) == 1 else f"{name}_dim_{axis}")
        found[name] = tuple(dims)
    return found
