"""An ONNX Runtime session with everything that a model asks for, which refuses inputs that it isn't right for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.errors import ModelError, UsageError, first_line
from graphopt.graph.assumptions import Reliance
from graphopt.graph.assumptions import read as read_assumptions
from graphopt.graph.load import load
from graphopt.graph.session_settings import SessionSettings
from graphopt.graph.session_settings import read as read_settings
from graphopt.runtime_ops.checked import checked_session

if TYPE_CHECKING:
    import onnxruntime


def requested_settings(path: str | os.PathLike[str]) -> SessionSettings:
    """What the model at `path` asks of a session, from its metadata; empty where it asks for nothing.

    Raises:
        ModelError: Not a model, or metadata that isn't what graphopt writes.
    """
    return _metadata(path)[0]


def _metadata(path: str | os.PathLike[str]) -> tuple[SessionSettings, list[Reliance]]:
    model = load(path)
    try:
        return read_settings(model), read_assumptions(model)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error


def session(
    path: str | os.PathLike[str],
    sess_options: onnxruntime.SessionOptions | None = None,
    providers: Sequence[Any] | None = None,
    *,
    check: bool = True,
) -> onnxruntime.InferenceSession:
    """An `onnxruntime.InferenceSession` for a model, with the settings that the model's metadata asks for.

    Where the model is right for some inputs only (`graphopt.graph.assumptions`), running it on others raises
    `graphopt.errors.AssumptionError`; see `graphopt.runtime_ops.checked` for what is seen of bound inputs.

    Args:
        path: The .onnx file.
        sess_options: Options of your own; entries that you set stay as you set them.
        providers: Execution providers; None: CUDA where it is installed, then the CPU.
        check: Whether inputs are checked.

    Raises:
        ModelError: ONNX Runtime can't load the model.
        UsageError: ONNX Runtime isn't installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UsageError("ONNX Runtime is missing; install graphopt[cpu] or graphopt[gpu].") from error
    settings, relied = _metadata(path)
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
        made = checked_session(relied) if check and relied else onnxruntime.InferenceSession
        return made(
            str(Path(path)),
            options,
            providers=list(providers),
            disabled_optimizers=settings.disabled_optimizers or None,
        )
    except Exception as error:  # ONNX Runtime has a class of exception for each reason
        raise ModelError(f"ONNX Runtime can't load {path}: {first_line(error)}") from error
