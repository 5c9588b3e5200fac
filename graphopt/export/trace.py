"""From a source to a graph, by PyTorch's exporters; equal layers are traced a few times and repeated."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir
from onnx_ir.passes import common

from graphopt.errors import ModelError, first_line
from graphopt.export import layers
from graphopt.export.bfloat16 import compute_in_float
from graphopt.export.dependencies import quiet, require
from graphopt.export.source import INNER, Source
from graphopt.export.weights import shared_names
from graphopt.graph.edits import walk
from graphopt.graph.load import load

Exporter = Literal["dynamo", "torchscript"]
Dims = Mapping[str, tuple[int | str, ...]]
CACHES = ("past_key_values", "present")
"""How the names of a layer's inputs and outputs begin."""


@dataclasses.dataclass(frozen=True)
class Traced:
    """A graph as an exporter wrote it.

    Attributes:
        model: The graph. Its weights are called as the module calls them; those that a module without weights has are
            still to be filled in.
        warned: What the exporter warned of.
        notes: What the user should know.
    """

    model: ir.Model
    warned: list[str]
    notes: list[str]


def trace(source: Source, outputs: Dims, exporter: Exporter, opset: int, folder: Path, repeat: bool = True) -> Traced:
    """Trace a source.

    Args:
        source: What is exported.
        outputs: The dimensions of each output.
        exporter: "dynamo" (torch.export) or "torchscript".
        opset: Version of the default operator domain.
        folder: An empty folder for files that come and go.
        repeat: Trace equal layers a few times only and repeat them in the graph, where that can be (dynamo only).

    Raises:
        ModelError: The exporter fails, writes another opset, or fixes a size that is dynamic.
    """
    notes: list[str] = []
    plan = layers.plan(source.module) if repeat and exporter == "dynamo" else None
    if plan is not None:
        try:
            return Traced(*_repeated(source, outputs, opset, plan), notes)
        except layers.NotRepeatable as reason:
            notes.append(f"every layer was traced, which takes longer: {reason}")
    model, warned = _export(source, outputs, exporter, opset, folder)
    _tidy(source, model, outputs, exporter)
    return Traced(model, warned, notes)


def _repeated(source: Source, outputs: Dims, opset: int, plan: layers.Plan) -> tuple[ir.Model, list[str]]:
    with layers.cut(source.module, plan):
        fewer = source.again() if source.again is not None else source
        dims = dict(fewer.dims or outputs)
        model, warned = _export(fewer, dims, "dynamo", opset, Path())
    _tidy(fewer, model, dims, "dynamo")
    inlined = common.InlinePass()(model).model
    common.CommonSubexpressionEliminationPass()(inlined)
    tensors = (
        *source.module.named_parameters(remove_duplicate=False),
        *source.module.named_buffers(remove_duplicate=False),
    )
    weights = {name.removeprefix(INNER) for name, _ in tensors}
    layers.repeat(inlined.graph, dataclasses.replace(plan, path=plan.path.removeprefix(INNER)), weights, CACHES)
    order = {name: place for place, name in enumerate([*(item.name for item in source.inputs), *outputs])}
    for values in (inlined.graph.inputs, inlined.graph.outputs):
        ordered = sorted(values, key=lambda value: order[value.name or ""])
        values.clear()
        values.extend(ordered)
    return inlined, warned


def _export(source: Source, outputs: Dims, exporter: Exporter, opset: int, folder: Path) -> tuple[ir.Model, list[str]]:
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
                return program.model, warned
            raw = folder / "raw" / "model.onnx"
            raw.parent.mkdir(exist_ok=True)
            # Folding constants would write a tied weight twice, once transposed.
            fold = not shared_names(source.module)
            torch.onnx.export(
                source.module, args, str(raw), dynamo=False, do_constant_folding=fold, dynamic_axes=named, **options
            )
            return load(raw), warned
    except Exception as error:
        other = "torchscript" if exporter == "dynamo" else "dynamo"
        raise ModelError(
            f"PyTorch couldn't export {source.label} with {exporter} at opset {opset} ({first_line(error)}); "
            f"try the exporter {other}"
        ) from error


@contextlib.contextmanager
def _plain_attention(torch: Any) -> Iterator[None]:
    """Keep torch.nn.TransformerEncoder off its fused path, an operator that the tracer has no ONNX form for."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _tidy(source: Source, model: ir.Model, outputs: Dims, exporter: Exporter) -> None:
    """Weights called as the module calls them, outputs as declared, no traces; and what should be dynamic is."""
    _without_traces(model)
    compute_in_float(model.graph)
    for value in list(model.graph.initializers.values()):
        if value.name and value.name.startswith(INNER):
            value.name = value.name.removeprefix(INNER)
    for value in model.graph.outputs:
        declared = outputs.get(value.name or "", ())
        if value.shape is not None and len(value.shape) == len(declared):
            value.shape = ir.Shape(declared)
    found = {value.name: value for value in model.graph.inputs}
    for item in source.inputs:
        given = found.get(item.name)
        if given is None:
            raise ModelError(f"{source.label} doesn't use its input {item.name}: {exporter} left it out of the model")
        for axis, dim in enumerate(item.dims):
            if isinstance(dim, str) and given.shape is not None and isinstance(given.shape[axis], int):
                raise ModelError(
                    f"{exporter} fixed the dimension {dim!r} of the input {item.name} at {given.shape[axis]}, because "
                    f"the code of {source.label} depends on it"
                )


def _without_traces(model: ir.Model) -> None:
    """Drop the exporter's own records, among them the stack traces with paths of this machine."""
    for graph in walk(model):
        holders: list[Any] = [graph, *graph.inputs, *graph, *(v for node in graph for v in node.outputs)]
        for holder in [*holders, *graph.initializers.values()]:
            for key in [k for k in holder.metadata_props if k.startswith("pkg.torch.")]:
                del holder.metadata_props[key]
    for key in [k for k in model.metadata_props if k.startswith("pkg.torch.")]:
        del model.metadata_props[key]
