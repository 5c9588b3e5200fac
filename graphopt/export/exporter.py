"""Export of encoders and feed-forward models from PyTorch to ONNX, verified against PyTorch."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

from graphopt.errors import ModelError, UsageError, first_line
from graphopt.export.compare import Reference, compare, run_torch
from graphopt.export.dependencies import quiet, require
from graphopt.export.huggingface import from_pretrained
from graphopt.export.source import Source, from_factory
from graphopt.graph.edits import nodes, walk
from graphopt.graph.load import load
from graphopt.graph.save import save, weight_bytes

Exporter = Literal["dynamo", "torchscript"]
Attention = Literal["sdpa", "eager"]

OPSET = {"dynamo": 21, "torchscript": 17}
"""The opset of each exporter where none is asked for: 17 is the first with LayerNormalization, 21 the first with
blocked quantization."""
INLINE_BYTES = 100_000_000
"""Weights of more bytes than this go to a file beside the model."""


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        path: The model.
        files: All files written, the model first.
        inputs: The dimensions of each input: a size, or the name of a dynamic one.
        outputs: The same for each output.
        opset: The version of the default operator domain.
        nodes: Number of nodes, Constant ones too.
        errors: For each output the largest absolute difference from PyTorch, relative to the largest magnitude
            of that output, over all probes.
        seconds: Seconds of wall time, loading and verification included.
        notes: What the user should know.
    """

    path: Path
    files: tuple[Path, ...]
    inputs: dict[str, tuple[int | str, ...]]
    outputs: dict[str, tuple[int | str, ...]]
    opset: int
    nodes: int
    errors: dict[str, float]
    seconds: float
    notes: tuple[str, ...]

    @property
    def max_relative_error(self) -> float:
        """The largest of `errors`."""
        return max(self.errors.values(), default=0.0)


def export_model(
    source: str | Path,
    output: str | Path,
    *,
    opset: int | None = None,
    attention: Attention = "sdpa",
    exporter: Exporter = "dynamo",
    dtype: str = "float32",
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Export a model to ONNX and verify it against PyTorch; see `export_report`, whose `path` this returns."""
    return export_report(
        source, output, opset=opset, attention=attention, exporter=exporter, dtype=dtype, progress=progress
    ).path


def export_report(
    source: str | Path,
    output: str | Path,
    *,
    opset: int | None = None,
    attention: Attention = "sdpa",
    exporter: Exporter = "dynamo",
    dtype: str = "float32",
    progress: Callable[[str], None] | None = None,
) -> ExportReport:
    """Export a model to ONNX, verify it against PyTorch on two shapes, and say what was written.

    Inputs and their dynamic dimensions ("batch", "sequence") follow from the model's forward and configuration.
    The graph is left as the exporter wrote it; cleaning up is the pass manager's work.

    Args:
        source: A Hugging Face folder (config.json and .safetensors), a name on the hub, or "module:factory", a
            callable that returns (torch.nn.Module, example inputs[, input names[, output names[, dynamic axes]]]).
        output: A path that ends in .onnx, or a folder, in which model.onnx and the model's tokenizer and
            configuration files are written. Weights of more than 100 MB lie beside the model (`model.onnx.data`).
        opset: Version of the default operator domain; None: 21 for dynamo, 17 for torchscript.
        attention: transformers' attention implementation, "sdpa" or "eager".
        exporter: "dynamo" (torch.export) or "torchscript" (tracing).
        dtype: "float32" or "float16", of weights and floating-point inputs of Hugging Face models.
        progress: Called with a line of text at each step.

    Raises:
        UsageError: A wrong argument, a library that is missing, or a model that isn't supported.
        ModelError: The model can't be loaded or exported, or the output can't be written.
        VerificationError: The exported model differs from PyTorch. Then, and after every other error, nothing
            is written.
    """
    if exporter not in OPSET:
        raise UsageError(f"there is no exporter {exporter!r}; use dynamo or torchscript")
    if attention not in ("sdpa", "eager"):
        raise UsageError(f"there is no attention implementation {attention!r}; use sdpa or eager")
    if dtype not in ("float32", "float16"):
        raise UsageError(f"models aren't exported in {dtype}; use float32 or float16")
    start = time.perf_counter()
    say = progress or (lambda _: None)
    name = str(source)
    if _is_factory(name) and (dtype, attention) != ("float32", "sdpa"):
        raise UsageError(f"dtype and attention are for Hugging Face models; {name} makes its module as it wants it")
    path, folder = _target(output)
    for module in ("torch", "onnxruntime"):
        require(module)
    say(f"loading {name}")
    loaded = from_factory(name) if _is_factory(name) else from_pretrained(name, attention=attention, dtype=dtype)
    # Before the export, which may change the module's state.
    references = run_torch(loaded)
    outputs = _output_dims(loaded, references)
    say(f"exporting with {exporter}")
    made_folders = _make_folders(path.parent)
    try:
        with tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent, ignore_cleanup_errors=True) as temporary:
            model, warned = _export(loaded, outputs, exporter, opset or OPSET[exporter], Path(temporary))
            external = weight_bytes(model) > INLINE_BYTES
            _check_dims(loaded, model, exporter)
            say("verifying against PyTorch")
            trial = Path(temporary) / "verified.onnx"
            save(model, trial, external_data=external)
            errors = compare(loaded.label, trial, references, list(outputs), warned)
            files = save(model, path, external_data=external)
            if folder is not None:
                files += [_copy(companion, folder, Path(temporary)) for companion in loaded.companions]
    except OSError as error:
        raise ModelError(f"{path.parent} can't be written: {error.strerror or error}") from error
    finally:
        for made in made_folders:
            if made.is_dir() and not any(made.iterdir()):
                made.rmdir()
    return ExportReport(
        path=path,
        files=tuple(files),
        inputs={item.name: item.dims for item in loaded.inputs},
        outputs=outputs,
        opset=model.graph.opset_imports[""],
        nodes=sum(1 for _ in nodes(model)),
        errors=errors,
        seconds=time.perf_counter() - start,
        notes=tuple(loaded.notes),
    )


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


def _output_dims(source: Source, references: list[Reference]) -> dict[str, tuple[int | str, ...]]:
    """Each output's dimensions: fixed where all probes agree, named after the dynamic size that each equals."""
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


def _export(
    source: Source, outputs: dict[str, tuple[int | str, ...]], exporter: str, opset: int, folder: Path
) -> tuple[ir.Model, list[str]]:
    """The exporter's model, and what the exporter warned of."""
    torch = require("torch")
    args = source.tensors(source.sample, 0)
    options: dict[str, Any] = {
        "opset_version": opset,
        "input_names": [item.name for item in source.inputs],
        "output_names": list(outputs),
    }
    named = {n: {i: d for i, d in enumerate(dims) if isinstance(d, str)} for n, dims in outputs.items()}
    named |= {item.name: {i: d for i, d in enumerate(item.dims) if isinstance(d, str)} for item in source.inputs}
    warned: list[str] = []
    try:
        with torch.no_grad(), _plain_attention(torch), quiet() as warned:
            if exporter == "dynamo":
                shapes = tuple(named[item.name] for item in source.inputs)
                # Its own optimizer drops small summands such as the epsilon of a logarithm.
                program = torch.onnx.export(
                    source.module, args, dynamo=True, dynamic_shapes=(shapes,), optimize=False, **options
                )
                model: ir.Model = program.model
            else:
                raw = folder / "raw" / "model.onnx"
                raw.parent.mkdir()
                torch.onnx.export(source.module, args, str(raw), dynamo=False, dynamic_axes=named, **options)
                model = load(raw)
    except Exception as error:
        other = "torchscript" if exporter == "dynamo" else "dynamo"
        raise ModelError(
            f"PyTorch couldn't export {source.label} with {exporter} at opset {opset} ({first_line(error)}); "
            f"try the exporter {other}"
        ) from error
    written = model.graph.opset_imports.get("", 0)
    if written != opset:
        raise ModelError(
            f"PyTorch couldn't write {source.label} at opset {opset} with {exporter}; ask for "
            + (f"{written} or a newer one" if opset < written else "an older one")
        )
    _without_traces(model)
    for value in model.graph.outputs:
        declared = outputs.get(value.name or "", ())
        if value.shape is not None and len(value.shape) == len(declared):
            value.shape = ir.Shape(declared)
    return model, warned


@contextlib.contextmanager
def _plain_attention(torch: Any) -> Iterator[None]:
    """Keep torch.nn.TransformerEncoder off its fused path, an operator that the tracer has no ONNX form for."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _without_traces(model: ir.Model) -> None:
    """Drop the exporter's own records, among them the stack traces with paths of this machine."""
    for graph in walk(model):
        holders: list[Any] = [graph, *graph.inputs, *graph, *(v for node in graph for v in node.outputs)]
        for holder in [*holders, *graph.initializers.values()]:
            for key in [k for k in holder.metadata_props if k.startswith("pkg.torch.")]:
                del holder.metadata_props[key]
    for key in [k for k in model.metadata_props if k.startswith("pkg.torch.")]:
        del model.metadata_props[key]


def _check_dims(source: Source, model: ir.Model, exporter: str) -> None:
    """The inputs are there, and what should be dynamic is."""
    found = {value.name: value for value in model.graph.inputs}
    for item in source.inputs:
        value = found.get(item.name)
        if value is None:
            raise ModelError(f"{source.label} doesn't use its input {item.name}: {exporter} left it out of the model")
        for axis, dim in enumerate(item.dims):
            if isinstance(dim, str) and value.shape is not None and isinstance(value.shape[axis], int):
                raise ModelError(
                    f"{exporter} fixed the dimension {dim!r} of the input {item.name} at {value.shape[axis]}, because "
                    f"the code of {source.label} depends on it"
                )
