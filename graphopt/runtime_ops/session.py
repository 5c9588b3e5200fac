"""An ONNX Runtime session with everything that a model asks for."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.errors import ModelError, UsageError, first_line
from graphopt.graph.load import load

if TYPE_CHECKING:
    import onnxruntime

SETTINGS_KEY = "graphopt.session"
"""Metadata key under which a model says what a session should set: JSON with "config" (session configuration entries)
and "disabled_optimizers" (names)."""


def requested_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What the model at `path` asks of a session, from its metadata; empty where it asks for nothing.

    Raises:
        ModelError: Not a model, or metadata that isn't what graphopt writes.
    """
    text = load(path).metadata_props.get(SETTINGS_KEY)
    if text is None:
        return {}
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise ModelError(f"{path}: the metadata entry {SETTINGS_KEY!r} isn't valid JSON ({error}).") from error
    if not isinstance(settings, dict):
        raise ModelError(f"{path}: the metadata entry {SETTINGS_KEY!r} must be a JSON object.")
    return settings


def session(
    path: str | os.PathLike[str],
    sess_options: onnxruntime.SessionOptions | None = None,
    providers: Sequence[Any] | None = None,
) -> onnxruntime.InferenceSession:
    """An `onnxruntime.InferenceSession` for a model, with the settings that the model's metadata asks for.

    Args:
        path: The .onnx file.
        sess_options: Options of your own; entries that you set stay as you set them.
        providers: Execution providers; None: CUDA where it is installed, then the CPU.

    Raises:
        ModelError: ONNX Runtime can't load the model.
        UsageError: ONNX Runtime isn't installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UsageError("ONNX Runtime is missing; install graphopt[cpu] or graphopt[gpu].") from error
    settings = requested_settings(path)
    options = sess_options if sess_options is not None else onnxruntime.SessionOptions()
    for key, value in settings.get("config", {}).items():
        try:
            options.get_session_config_entry(key)
        except RuntimeError:  # not set by the caller
            options.add_session_config_entry(key, str(value))
    if providers is None:
        available = onnxruntime.get_available_providers()
        providers = [p for p in ("CUDAExecutionProvider", "CPUExecutionProvider") if p in available]
    try:
        return onnxruntime.InferenceSession(
            str(Path(path)),
            options,
            providers=list(providers),
            disabled_optimizers=settings.get("disabled_optimizers") or None,
        )
    except Exception as error:  # ONNX Runtime has a class of exception for each reason
        raise ModelError(f"ONNX Runtime can't load {path}: {first_line(error)}") from error
