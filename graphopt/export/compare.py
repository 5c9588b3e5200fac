"""Comparison of an exported model, run in ONNX Runtime, with the PyTorch module it came from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt.errors import UsageError, VerificationError, first_line
from graphopt.export.dependencies import quiet, require
from graphopt.export.dry_run import dry_run
from graphopt.export.source import Reference, Source
from graphopt.runtime_ops.memory_session import register_kernels

TOLERANCE = {"float32": 1e-4, "float16": 2e-2}
"""Largest error allowed by the output's type (others as float32), relative to the largest magnitude of the output.
A right export is at about 1e-6 in float32 and 2e-3 in float16."""


def run_torch(source: Source) -> list[Reference]:
    """Run the module on the first set of its probes that it takes.

    Raises:
        UsageError: It takes none of them; the message says why not the first.
    """
    if source.references is not None:
        return list(source.references(lambda tensors: _call(source, tensors)))
    refused: UsageError | None = None
    for probes in source.probes:
        try:
            return [_run(source, sizes, seed) for seed, sizes in enumerate(probes, start=1)]
        except UsageError as error:
            refused = refused or error
    assert refused is not None
    raise refused


def _run(source: Source, sizes: dict[str, int], seed: int) -> Reference:
    tensors = source.tensors(sizes, seed)
    outputs = _call(source, tensors)
    if not outputs:
        raise UsageError(f"{source.label} returns no tensor")
    try:
        feeds = {item.name: tensor.cpu().numpy() for item, tensor in zip(source.inputs, tensors, strict=True)}
        return Reference(dict(sizes), feeds, [output.detach().cpu().numpy().copy() for output in outputs])
    except TypeError as error:
        raise UsageError(
            f"{source.label} has tensors that ONNX Runtime can't be given to compare ({first_line(error)}); "
            "use float32 or float16"
        ) from error


def dry_references(source: Source) -> list[Reference]:
    """The probes' outputs by shape alone, all numbers 0.

    Raises:
        UsageError: The module takes none of the probes.
    """
    refused: Exception | None = None
    for probes in source.probes:
        found = []
        try:
            for seed, sizes in enumerate(probes, start=1):
                tensors = source.tensors(sizes, seed)
                outputs = dry_run(source.module, source.module, tensors)
                found.append(Reference(dict(sizes), {}, [np.broadcast_to(np.float32(0), t.shape) for t in outputs]))
            return found
        except Exception as error:
            refused = refused or error
    assert refused is not None
    raise UsageError(f"{source.label} doesn't run on its own inputs: {first_line(refused)}") from refused


def _call(source: Source, tensors: tuple[Any, ...]) -> Sequence[Any]:
    try:
        with require("torch").no_grad(), quiet():
            outputs: Sequence[Any] = source.module(*tensors)
            return outputs
    except Exception as error:
        shapes = ", ".join(f"{i.name} {tuple(t.shape)}" for i, t in zip(source.inputs, tensors, strict=True))
        raise UsageError(
            f"{source.label} doesn't run on {shapes} ({first_line(error)}); "
            "declare as dynamic only the dimensions that may change"
        ) from error


def compare(
    label: str,
    path: Path,
    references: Sequence[Reference],
    names: Sequence[str],
    warned: Sequence[str] = (),
    tolerance: float | None = None,
    adapter: Path | None = None,
) -> dict[str, float]:
    """The largest relative error of each output over all references.

    Args:
        label: How messages call the model.
        path: The exported model.
        references: PyTorch's answers.
        names: The outputs in order.
        warned: What the exporter warned of.
        tolerance: The largest error allowed; None: `TOLERANCE`.
        adapter: An adapter of ONNX Runtime's format to switch on.

    Raises:
        VerificationError: The model doesn't run, gives other shapes or types, or is off by more than `TOLERANCE`.
    """
    runtime = require("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    hint = _hint(warned)
    register_kernels(options, path, ["CPUExecutionProvider"])
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise VerificationError(
            f"ONNX Runtime can't load the export of {label}: {_reason(error, path)}; nothing was written{hint}"
        ) from error
    run = runtime.RunOptions()
    if adapter is not None:
        active = runtime.LoraAdapter()
        active.Load(str(adapter))
        run.add_active_adapter(active)
    errors = dict.fromkeys(names, 0.0)
    for reference in references:
        at = ", ".join(f"{symbol} {size}" for symbol, size in reference.sizes.items()) or "its only shape"
        try:
            got = session.run(list(names), reference.feeds, run)
        except Exception as error:
            raise VerificationError(
                f"the export of {label} doesn't run at {at}: {first_line(error)}; nothing was written{hint}"
            ) from error
        for name, expected, found in zip(names, reference.outputs, got, strict=True):
            if expected.shape != found.shape or expected.dtype != found.dtype:
                raise VerificationError(
                    f"at {at} the output {name} of the export of {label} is {found.dtype} {found.shape} where PyTorch "
                    f"gives {expected.dtype} {expected.shape}; nothing was written{hint}"
                )
            real = (reference.real or {}).get(name)
            if real is not None:
                expected, found = expected[real], found[real]
            error_found = relative_error(expected, found)
            allowed = tolerance or TOLERANCE.get(expected.dtype.name, TOLERANCE["float32"])
            if not error_found <= allowed:
                raise VerificationError(
                    f"at {at} the output {name} of the export of {label} is off by {error_found:.2g} of its largest "
                    f"value, where {allowed:.0e} is allowed; nothing was written{hint}"
                )
            errors[name] = max(errors[name], error_found)
    return errors


def relative_error(expected: npt.NDArray[Any], found: npt.NDArray[Any]) -> float:
    """max |expected - found| / max |expected|; infinite where one is finite and the other isn't, or integers differ."""
    if not np.issubdtype(expected.dtype, np.floating):
        return 0.0 if np.array_equal(expected, found) else float("inf")
    e, f = expected.astype(np.float64), found.astype(np.float64)
    finite = np.isfinite(e)
    if not np.array_equal(e[~finite], f[~finite], equal_nan=True) or not np.isfinite(f[finite]).all():
        return float("inf")
    scale = float(np.max(np.abs(e[finite]), initial=0.0))
    difference = float(np.max(np.abs(e[finite] - f[finite]), initial=0.0))
    return difference / scale if scale else (0.0 if difference == 0 else float("inf"))


def _reason(error: Exception, path: Path) -> str:
    """ONNX Runtime's reason without the name of the temporary file."""
    return first_line(error).replace(f"Load model from {path} failed:", "")


def _hint(warned: Sequence[str]) -> str:
    """What the exporter said of values it took for constants, which is what a wrong trace mostly comes from."""
    told = [w for w in warned if "trace to be incorrect" in w or "trace might not generalize" in w]
    return f" (while tracing, {len(told)} values were taken for constants)" if told else ""
