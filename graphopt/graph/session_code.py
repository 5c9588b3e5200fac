"""The session that a model asks for, as lines of code to copy: in Python, C++ and C#."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from graphopt.graph.session_settings import DISABLED_OPTIMIZERS

_DISABLED = "optimization.disable_specified_optimizers"
"""The config entry behind Python's argument `disabled_optimizers`; names are separated by semicolons."""

Settings = Sequence[Mapping[str, Any]]
"""Entries with "setting" and "value", as a report lists them (`SessionSettings.listed`)."""


def python_lines(settings: Settings, model: str, library: str | None = None, providers: Sequence[str] = ()) -> str:
    """Python that opens `model` with these settings.

    Args:
        settings: What the model asks for.
        model: Its file.
        library: The file of the library with graphopt's kernels, where it is to be registered; after the settings,
            since it looks at them.
        providers: Execution providers; none: the default.
    """
    lines = ["import onnxruntime", "", "options = onnxruntime.SessionOptions()"]
    extra = f", providers={list(providers)!r}" if providers else ""
    for name, value in _pairs(settings):
        if name == DISABLED_OPTIMIZERS:
            extra += f", disabled_optimizers={_names(value)!r}"
        elif "." in name:
            lines.append(f"options.add_session_config_entry({_quoted(name)}, {_quoted(value)})")
        else:
            lines.append(f"options.{name} = {_python_value(name, value)}")
    if library is not None:
        lines.append(f"options.register_custom_ops_library({_quoted(library)})")
    lines.append(f"session = onnxruntime.InferenceSession({_quoted(model)}, options{extra})")
    return "\n".join(lines)


def cpp_lines(settings: Settings, model: str, library: str | None = None) -> str:
    """C++ that opens `model` with these settings; arguments as those of `python_lines`."""
    lines = ["Ort::Env env;", "Ort::SessionOptions options;"]
    for name, value in _pairs(settings):
        if name == DISABLED_OPTIMIZERS:
            lines.append(f'options.AddConfigEntry("{_DISABLED}", {_quoted(";".join(_names(value)))});')
        elif "." in name:
            lines.append(f"options.AddConfigEntry({_quoted(name)}, {_quoted(value)});")
        else:
            lines.append(f"options.Set{_capitals(name)}({value});")
    if library is not None:
        lines.append(f"options.RegisterCustomOpsLibrary(ORT_TSTR({_quoted(library)}));")
    lines.append(f"Ort::Session session(env, ORT_TSTR({_quoted(model)}), options);")
    return "\n".join(lines)


def csharp_lines(settings: Settings, model: str, library: str | None = None) -> str:
    """C# that opens `model` with these settings; arguments as those of `python_lines`."""
    lines = ["using Microsoft.ML.OnnxRuntime;", "", "using var options = new SessionOptions();"]
    for name, value in _pairs(settings):
        if name == DISABLED_OPTIMIZERS:
            lines.append(f'options.AddSessionConfigEntry("{_DISABLED}", {_quoted(";".join(_names(value)))});')
        elif "." in name:
            lines.append(f"options.AddSessionConfigEntry({_quoted(name)}, {_quoted(value)});")
        else:
            level = "GraphOptimizationLevel." if name == "graph_optimization_level" else ""
            lines.append(f"options.{_capitals(name)} = {level}{value};")
    if library is not None:
        lines.append(f"options.RegisterCustomOpLibrary({_quoted(library)});")
    lines.append(f"using var session = new InferenceSession({_quoted(model)}, options);")
    return "\n".join(lines)


def _pairs(settings: Settings) -> list[tuple[str, str]]:
    return [(str(s.get("setting", "")), str(s.get("value", ""))) for s in settings if s.get("setting")]


def _names(value: str) -> list[str]:
    return re.findall(r"[A-Za-z_]\w*", value)


def _capitals(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


def _python_value(name: str, value: str) -> str:
    if name == "graph_optimization_level":
        return f"onnxruntime.GraphOptimizationLevel.{value}"
    return value


def _quoted(text: str) -> str:
    """A string literal that Python, C++ and C# read alike."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
