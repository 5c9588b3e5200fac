"""Session settings as lines of code to copy."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

DISABLED_OPTIMIZERS = "disabled_optimizers"
_CPP_DISABLED = "optimization.disable_specified_optimizers"
"""The config entry behind Python's argument `disabled_optimizers`; names are separated by semicolons."""


def python_lines(settings: Sequence[Mapping[str, Any]], model: str) -> str:
    """Python that opens `model` with these settings, with graphopt and without."""
    lines = ["import graphopt", "", f"session = graphopt.session({_quoted(model)})  # sets all of this"]
    if not settings:
        return "\n".join(lines)
    lines += ["", "# the same without graphopt", "import onnxruntime", "", "options = onnxruntime.SessionOptions()"]
    extra = ""
    for name, value in _pairs(settings):
        if name == DISABLED_OPTIMIZERS:
            extra = f", disabled_optimizers={_names(value)!r}"
        elif "." in name:
            lines.append(f"options.add_session_config_entry({_quoted(name)}, {_quoted(value)})")
        else:
            lines.append(f"options.{name} = {_python_value(name, value)}")
    lines.append(f"session = onnxruntime.InferenceSession({_quoted(model)}, options{extra})")
    return "\n".join(lines)


def cpp_lines(settings: Sequence[Mapping[str, Any]], model: str) -> str:
    """C++ that opens `model` with these settings."""
    lines = ["Ort::Env env;", "Ort::SessionOptions options;"]
    for name, value in _pairs(settings):
        if name == DISABLED_OPTIMIZERS:
            lines.append(f'options.AddConfigEntry("{_CPP_DISABLED}", {_quoted(";".join(_names(value)))});')
        elif "." in name:
            lines.append(f"options.AddConfigEntry({_quoted(name)}, {_quoted(value)});")
        else:
            setter = "".join(part.capitalize() for part in name.split("_"))
            lines.append(f"options.Set{setter}({value});")
    lines.append(f"Ort::Session session(env, ORT_TSTR({_quoted(model)}), options);")
    return "\n".join(lines)


def _pairs(settings: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    return [(str(s.get("setting", "")), str(s.get("value", ""))) for s in settings if s.get("setting")]


def _names(value: str) -> list[str]:
    return re.findall(r"[A-Za-z_]\w*", value)


def _python_value(name: str, value: str) -> str:
    if name == "graph_optimization_level":
        return f"onnxruntime.GraphOptimizationLevel.{value}"
    return value


def _quoted(text: str) -> str:
    """A string literal that Python and C++ read alike."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
