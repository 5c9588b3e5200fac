"""Export of models from PyTorch to ONNX, verified against PyTorch."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

from graphopt.errors import GraphoptError, ModelError, UsageError, VerificationError
from graphopt.export import layers
from graphopt.export.compare import compare, dry_references, run_torch
from graphopt.export.dependencies import require
from graphopt.export.huggingface import from_pretrained
from graphopt.export.loaded import Loaded, available_bytes
from graphopt.export.source import Reference, Source, from_factory
from graphopt.export.trace import Exporter, trace
from graphopt.graph.edits import nodes
from graphopt.graph.save import save, weight_bytes

Verify = Literal["auto", "full", "layers", "none"]
Finish = Callable[[ir.Model], ir.Model]

OPSET = {"dynamo": 23, "torchscript": 17}
"""The opset of each exporter where none is asked for: 17 is the first with LayerNormalization, 23 with Attention."""
INLINE_BYTES = 100_000_000
"""Weights of more bytes than this go to a file beside the model."""
VERIFIED_SHARE = 2.5
"""A model is verified whole where memory for so many copies of it is free: PyTorch's, ONNX Runtime's, and the rest."""


@dataclass(frozen=True)
class Part:
    """One model that an export wrote.

    Attributes:
        path: The model.
        inputs: The dimensions of each input: a size, or the name of a dynamic one.
        outputs: The same for each output.
        nodes: Number of nodes, Constant ones too.
        errors: For each output the largest absolute difference from PyTorch, relative to the largest magnitude
            of that output, over all calls. Empty: not compared.
    """

    path: Path
    inputs: dict[str, tuple[int | str, ...]]
    outputs: dict[str, tuple[int | str, ...]]
    nodes: int
    errors: dict[str, float]


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        parts: The models, one of them for most.
        files: All files written, the models first.
        opset: The version of the default operator domain.
        attention: The attention implementation that was traced; empty: the module's own.
        seconds: Seconds of wall time by step: load, reference, trace, write, verify.
        notes: What the user should know.
    """

    parts: tuple[Part, ...]
    files: tuple[Path, ...]
    opset: int
    attention: str
    seconds: dict[str, float]
    notes: tuple[str, ...]

    @property
    def path(self) -> Path:
        """The first model."""
        return self.parts[0].path

    @property
    def inputs(self) -> dict[str, tuple[int | str, ...]]:
        """Of the first model."""
        return self.parts[0].inputs

    @property
    def outputs(self) -> dict[str, tuple[int | str, ...]]:
        """Of the first model."""
        return self.parts[0].outputs

    @property
    def nodes(self) -> int:
        """Of all models."""
        return sum(part.nodes for part in self.parts)

    @property
    def max_relative_error(self) -> float:
        """The largest error of any output."""
        return max((error for part in self.parts for error in part.errors.values()), default=0.0)


@dataclass(frozen=True)
class Options:
    """How to export.

    Attributes:
        opset: Version of the default operator domain; None: 23 for dynamo, 17 for torchscript.
        attention: transformers' attention implementation, "sdpa" or "eager"; None: one that exports to ONNX's operator
            where the model can use it.
        exporter: "dynamo" (torch.export) or "torchscript" (tracing).
        dtype: "float32" or "float16", of weights and floating-point inputs of Hugging Face models.
        last_logits: A decoder gives the logits of the last position only.
        repeat: Equal layers are traced a few times and repeated in the graph, where that can be.
        verify: "full": compare with PyTorch; "layers": compare the first layers, as many as are traced; "none"; "auto":
            full where the memory is free for it, else layers.
        finish: Rewrites each graph before it is written, exactly.
    """

    opset: int | None = None
    attention: str | None = None
    exporter: Exporter = "dynamo"
    dtype: str = "float32"
    last_logits: bool = False
    repeat: bool = True
    verify: Verify = "auto"
    finish: Finish | None = None

    def check(self, name: str) -> None:
        """Raise UsageError for what can't be."""
        if self.exporter not in OPSET:
            raise UsageError(f"there is no exporter {self.exporter!r}; use dynamo or torchscript")
        if self.attention not in (None, "sdpa", "eager"):
            raise UsageError(f"there is no attention implementation {self.attention!r}; use sdpa or eager")
        if self.dtype not in ("float32", "float16"):
            raise UsageError(f"models aren't exported in {self.dtype}; use float32 or float16")
        if self.verify not in ("auto", "full", "layers", "none"):
            raise UsageError(f"there is no verification {self.verify!r}; use auto, full, layers or none")
        if _is_factory(name) and (self.dtype != "float32" or self.attention is not None or self.last_logits):
            raise UsageError(
                f"dtype, attention and last logits are for Hugging Face models; {name} makes its module as it wants it"
            )


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
            parts, files = [], []
            for part, names in written:
                files += [_moved(file, path.parent) for file in reversed(names)][::-1]
                parts.append(dataclasses.replace(part, path=path.parent / part.path.name))
            if folder is not None:
                files += [_copy(companion, folder, Path(temporary)) for companion in loaded.companions]
    except OSError as error:
        raise ModelError(f"{path.parent} can't be written: {error.strerror or error}") from error
    finally:
        for made in made_folders:
            if made.is_dir() and not any(made.iterdir()):
                made.rmdir()
    return ExportReport(
        tuple(parts), tuple(files), export.opset, export.attention, export.seconds, tuple(export.notes + loaded.notes)
    )


class _Export:
    """One export, with the time that its steps take."""

    def __init__(self, options: Options, say: Callable[[str], None]) -> None:
        self.options, self._say = options, say
        self.opset = options.opset or OPSET[options.exporter]
        self.attention = ""
        self.notes: list[str] = []
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
        if _is_factory(name):
            source = from_factory(name)
            return Loaded(name, {"model": source}, source.module)
        return from_pretrained(
            name, attention=options.attention, exporter=options.exporter, dtype=options.dtype,
            last_logits=options.last_logits,
        )  # fmt: skip

    def write(self, loaded: Loaded, folder: Path, name: str | None) -> list[tuple[Part, list[Path]]]:
        """Write all models into a folder, and verify them there; each with its files."""
        whole = self._whole(loaded)
        if whole or self.options.exporter == "torchscript":  # Which writes the numbers that it finds in the module.
            loaded.put_in()
        first: GraphoptError | None = None
        for implementation in loaded.implementations or ("",):
            try:
                written = [
                    self._part(loaded, source, folder, name or f"{stem}.onnx", implementation, whole)
                    for stem, source in loaded.sources.items()
                ]
            except (ModelError, VerificationError) as error:
                # What one implementation of attention can't, a plainer one can.
                first = first or error
                continue
            self.attention = implementation
            self.say("", "")
            return written
        assert first is not None
        raise first

    def _whole(self, loaded: Loaded) -> bool:
        """Whether the whole model is compared with PyTorch."""
        if self.options.verify != "auto":
            return self.options.verify == "full"
        return loaded.weights is None or VERIFIED_SHARE * loaded.weight_bytes() < available_bytes()

    def _part(
        self, loaded: Loaded, source: Source, folder: Path, name: str, implementation: str, whole: bool
    ) -> tuple[Part, list[Path]]:
        references = None
        if whole:
            self.say("reference", f"running {source.label} in PyTorch")
            # Before the export, which may change the module's state.
            with loaded.attending("eager"):
                references = run_torch(source)
        outputs = output_dims(source, references)
        with loaded.attending(implementation):
            model = self._model(loaded, source, outputs, folder, self.options.repeat)
        self.say("write", f"writing {name}")
        nodes_written = sum(1 for _ in nodes(model))
        inputs = {item.name: item.dims for item in source.inputs}
        files = save(model, folder / name, external_data=weight_bytes(model) > INLINE_BYTES)
        errors: dict[str, float] = {}
        if references is not None:
            self.say("verify", f"verifying {name} against PyTorch")
            errors = compare(source.label, folder / name, references, list(outputs), self._warned)
        elif self.options.verify != "none":
            errors = self._first_layers(loaded, source, folder, implementation)
        return Part(folder / name, inputs, outputs, nodes_written, errors), files

    def _model(self, loaded: Loaded, source: Source, outputs: Any, folder: Path, repeat: bool) -> ir.Model:
        self.say("trace", f"exporting {source.label} with {self.options.exporter}")
        traced = trace(source, outputs, self.options.exporter, self.opset, folder, repeat)
        self.notes += [note for note in traced.notes if note not in self.notes]
        self._warned = traced.warned
        written = traced.model.graph.opset_imports.get("", 0)
        if written != self.opset:
            raise ModelError(
                f"PyTorch couldn't write {source.label} at opset {self.opset} with {self.options.exporter}; ask for "
                + (f"{written} or a newer one" if self.opset < written else "an older one")
            )
        if self.options.exporter == "dynamo":
            loaded.fill(traced.model, source)
        return traced.model if self.options.finish is None else self.options.finish(traced.model)

    def _first_layers(self, loaded: Loaded, source: Source, folder: Path, implementation: str) -> dict[str, float]:
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
                references = run_torch(fewer)
            outputs = output_dims(fewer, references)
            with loaded.attending(implementation):
                model = self._model(loaded, fewer, outputs, folder, False)
            trial = folder / "first-layers.onnx"
            self.say("verify", "")
            files = save(model, trial, external_data=weight_bytes(model) > INLINE_BYTES)
            errors = compare(fewer.label, trial, references, list(outputs), self._warned)
        for file in files:
            file.unlink()
        self.notes.append(
            f"compared with PyTorch on its first {plan.kept} layers: memory for all {plan.count} isn't free"
            if self.options.verify == "auto"
            else f"compared with PyTorch on its first {plan.kept} layers of {plan.count}"
        )
        return errors


def _is_factory(name: str) -> bool:
    module, colon, attribute = name.partition(":")
    identifiers = [*module.split("."), *attribute.split(".")]
    return bool(colon) and all(part.isidentifier() for part in identifiers)


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


def _copy(file: Path, folder: Path, temporary: Path) -> Path:
    target = folder / file.name
    if not (target.exists() and os.path.samefile(file, target)):
        shutil.copyfile(file, temporary / file.name)
        os.replace(temporary / file.name, target)
    return target


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
