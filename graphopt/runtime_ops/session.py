"""An ONNX Runtime session with everything that a model asks for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.errors import ModelError, UsageError, first_line
from graphopt.graph.load import load
from graphopt.graph.session_settings import SessionSettings, read

if TYPE_CHECKING:
    import onnxruntime


def requested_settings(path: str | os.PathLike[str]) -> SessionSettings:
    """What the model at `path` asks of a session, from its metadata; empty where it asks for nothing.

    Raises:
        ModelError: Not a model, or metadata that isn't what graphopt writes.
    """
    model = load(path)
    try:
        return read(model)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error


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
    for key, value in settings.config.items():
        try:
            options.get_session_config_entry(key)
        except RuntimeError:  # not set by the caller
            options.add_session_config_entry(key, value)
    if providers is None:
        available = onnxruntime.get_available_providers()
        providers = [p for p in ("CUDAExecutionProvider", "CPUExecutionProvider") if p in available]
    try:
        return onnxruntime.InferenceSession(
            str(Path(path)),
            options,
            providers=list(providers),
            disabled_optimizers=settings.disabled_optimizers or None,
        )
    except Exception as error:  # ONNX Runtime has a class of exception for each reason
        raise ModelError(f"ONNX Runtime can't load {path}: {first_line(error)}") from error
