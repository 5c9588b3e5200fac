"""The README.md of a packaged model: how to run it with ONNX Runtime alone, in Python, C++ and C#."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from graphopt.errors import GraphoptError
from graphopt.graph.session_code import cpp_lines, csharp_lines, python_lines
from graphopt.graph.session_settings import SessionSettings
from graphopt.runtime_ops.library import CUDA_ENTRY
from graphopt.verification.probes import make_probes

LITERAL = 16
"""Arrays of up to this many numbers are written out in the example."""


@dataclasses.dataclass(frozen=True)
class Served:
    """What the README tells.

    Attributes:
        title: The model's name.
        model: The model.
        file: Its file in the folder.
        library: That of the library with graphopt's kernels; None: it isn't there.
        note: Why it isn't.
        built_for: The system and processor of the library.
        cuda: Whether it has CUDA kernels for all of the model's own operators.
        settings: What the model asks of a session.
        relied: What it takes for granted, as `graphopt.graph.assumptions.listed` has it.
        operators: How many nodes it has of each operator of graphopt's.
    """

    title: str
    model: ir.Model
    file: str
    library: str | None
    note: str
    built_for: str
    cuda: bool
    settings: SessionSettings
    relied: Sequence[Mapping[str, Any]]
    operators: Mapping[str, int]


def readme(served: Served) -> str:
    """The whole text. The blocks of Python run one behind the other, in the folder."""
    parts = [f"# {served.title}", _library(served), *_limits(served), *_code(served), _signature(served.model)]
    return "\n\n".join(parts) + "\n"


def _library(served: Served) -> str:
    if not served.operators:
        return f"`{served.file}` runs on ONNX Runtime (`pip install onnxruntime`), with the lines below."
    nodes = ", ".join(f"{count} {name}" for name, count in sorted(served.operators.items()))
    bodies = (
        "each of these nodes has a body of standard operators in the file, so that the model runs on any ONNX Runtime"
    )
    if served.library is None:
        return (
            f"`{served.file}` has operators of its own ({nodes}). The library with their kernels is not here "
            f"({served.note}), but {bodies}, only more slowly."
        )
    return (
        f"`{served.file}` has operators of its own ({nodes}). `{served.library}` holds their kernels for "
        f"{served.built_for} and ONNX Runtime 1.17 or newer; a session registers it before it opens the model. "
        f"Elsewhere, leave the line with the library out: {bodies}, only more slowly."
    )


def _limits(served: Served) -> list[str]:
    parts = []
    if rows := served.settings.listed():
        lines = ["The file can't carry these settings of its session, so the lines below set them:", ""]
        lines += [f"- `{setting}` = `{value}`{f': {reason}' if reason else ''}" for setting, value, reason in rows]
        parts.append("\n".join(lines))
    if served.relied:
        lines = ["The model is right only for inputs where", ""]
        lines += [f"- {entry['meaning']} ({entry['reason']})" for entry in served.relied]
        parts.append("\n".join(lines))
    return parts


def _code(served: Served) -> list[str]:
    settings = [{"setting": setting, "value": value} for setting, value, _ in served.settings.listed()]
    # A name without a folder would be looked for where the system keeps its libraries.
    library = None if served.library is None else f"./{served.library}"
    parts = [
        "Paths are those of a program that runs in this folder.",
        "## Python",
        f"```python\n{python_lines(settings, served.file, library)}\n```",
    ]
    if (example := example_lines(served.model)) is not None:
        parts.append(f"```python\n{example}\n```")
    parts += [
        "## C++",
        f"```cpp\n{cpp_lines(settings, served.file, library)}\n```",
        "## C#",
        f"```csharp\n{csharp_lines(settings, served.file, library)}\n```",
    ]
    if served.cuda:
        gpu = [*settings, {"setting": CUDA_ENTRY, "value": "1"}]
        parts += [
            "## On a GPU",
            f"The library has CUDA kernels too, and offers them where the entry `{CUDA_ENTRY}` is `1` before it is "
            "registered:",
            f"```python\n{python_lines(gpu, served.file, library, ['CUDAExecutionProvider'])}\n```",
        ]
    return parts


def example_lines(model: ir.Model) -> str | None:
    """Python that runs the model once, on made-up inputs; None: it has inputs that numpy can't hold, or no tensors."""
    try:
        (feeds, *_) = (probe.feeds for probe in make_probes(model))
    except (GraphoptError, ValueError):
        return None
    dims = {value.name: ", ".join(_dims(value)) for value in model.graph.inputs}
    lines = ["import numpy as np", "", "inputs = {"]
    for name, array in feeds.items():
        if array.dtype.kind not in "biufO":
            return None
        lines.append(f"    {name!r}: {_array(array)},  # {dims[name]}".rstrip(" #"))
    return "\n".join([*lines, "}", "outputs = session.run(None, inputs)"])


def _array(array: npt.NDArray[Any]) -> str:
    """An array as code: small ones number by number, others as zeros or ones."""
    dtype = "object" if array.dtype == object else f"np.{array.dtype}" if array.dtype != bool else "np.bool_"
    if array.dtype == object or (array.size <= LITERAL and array.dtype.kind != "f"):
        return f"np.array({array.tolist()!r}, {dtype}).reshape({array.shape})"
    if array.size and (array == 1).all():
        return f"np.ones({array.shape}, {dtype})"
    return f"np.zeros({array.shape}, {dtype})"


def _signature(model: ir.Model) -> str:
    lines = ["## Inputs and outputs", "", "| | name | type | shape |", "|---|---|---|---|"]
    for kind, values in (("input", model.graph.inputs), ("output", model.graph.outputs)):
        for value in values:
            if value.is_initializer():
                continue
            dtype = "" if value.dtype is None else value.dtype.name.lower()
            lines.append(f"| {kind} | `{value.name}` | {dtype} | {', '.join(_dims(value))} |")
    return "\n".join(lines)


def _dims(value: ir.Value) -> list[str]:
    """The sizes of a value: numbers, names, or "?"."""
    return [] if value.shape is None else [str(d if isinstance(d, int) else d.value or "?") for d in value.shape]
