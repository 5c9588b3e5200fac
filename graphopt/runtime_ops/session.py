"""An ONNX Runtime session with everything that a model asks for, which refuses inputs that it isn't right for."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from graphopt.errors import GraphoptError, GraphoptWarning, ModelError, UsageError, first_line
from graphopt.graph.assumptions import Reliance
from graphopt.graph.assumptions import read as read_assumptions
from graphopt.graph.load import load
from graphopt.graph.session_settings import SessionSettings
from graphopt.graph.session_settings import read as read_settings
from graphopt.runtime_ops.checked import checked_session
from graphopt.runtime_ops.library import CUDA_ENTRY, REGISTERED_ENTRY, library_path, without_kernel
from graphopt.runtime_ops.operator import uses
from graphopt.runtime_ops.packed_products import NO_PREPACKING, needs_folding

if TYPE_CHECKING:
    import onnxruntime


def requested_settings(path: str | os.PathLike[str]) -> SessionSettings:
    """What the model at `path` asks of a session, from its metadata; empty where it asks for nothing.

    Raises:
        ModelError: Not a model, or metadata that isn't what graphopt writes.
    """
    return _metadata(path, load(path))[0]


def _metadata(path: str | os.PathLike[str], model: ir.Model) -> tuple[SessionSettings, list[Reliance]]:
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
    kernels: bool = True,
) -> onnxruntime.InferenceSession:
    """An `onnxruntime.InferenceSession` for a model, with the settings that the model's metadata asks for.

    A model with operators of graphopt's runs on the library's kernels (`graphopt.runtime_ops.library_path`), and on the
    operators' portable bodies, with a `GraphoptWarning`, where there is no library or it can't run one of the nodes.
    The options of a session may be those of another one; the library is registered with them once. Options without
    ONNX Runtime's optimizations get what keeps its quantized products right (`graphopt.runtime_ops.packed_products`).

    Where the model is right for some inputs only (`graphopt.graph.assumptions`), running it on others raises
    `graphopt.errors.AssumptionError`; see `graphopt.runtime_ops.checked` for what is seen of bound inputs.

    Args:
        path: The .onnx file.
        sess_options: Options of your own; entries that you set stay as you set them.
        providers: Execution providers; None: CUDA where it is installed, then the CPU.
        check: Whether inputs are checked.
        kernels: Whether the library with graphopt's kernels is registered, for a model that has use for it.

    Raises:
        ModelError: ONNX Runtime can't load the model.
        UsageError: ONNX Runtime isn't installed.
    """
    try:
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as state
    except ImportError as error:
        raise UsageError("ONNX Runtime is missing; install graphopt[cpu] or graphopt[gpu].") from error
    model = load(path)
    settings, relied = _metadata(path, model)
    if providers is None:
        available = onnxruntime.get_available_providers()
        providers = [p for p in ("CUDAExecutionProvider", "CPUExecutionProvider") if p in available]
    make = checked_session(relied) if check and relied else onnxruntime.InferenceSession
    wanted = kernels and bool(uses(model))
    unfolded = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL

    def opened(with_library: bool) -> tuple[onnxruntime.InferenceSession, str | None]:
        options = sess_options if sess_options is not None else onnxruntime.SessionOptions()
        for key, value in settings.config.items():
            _set(options, key, value)
        if options.graph_optimization_level == unfolded and needs_folding(model):
            _set(options, NO_PREPACKING, "1")
        names = [p if isinstance(p, str) else p[0] for p in providers]
        why = register(options, model, names) if with_library else None
        disabled = settings.disabled_optimizers or None
        return make(str(Path(path)), options, providers=list(providers), disabled_optimizers=disabled), why

    try:
        try:
            made, why = opened(wanted)
        except (state.InvalidGraph, state.NotImplemented) as error:
            # A type that the file didn't tell. What options hold can't be taken out of them again.
            if not wanted or sess_options is not None:
                raise
            made, why = opened(False)[0], f"the library can't run all of it ({first_line(error)})"
    except GraphoptError:
        raise
    except Exception as error:  # ONNX Runtime has a class of exception for each reason
        raise ModelError(f"ONNX Runtime can't load {path}: {first_line(error)}") from error
    if why is not None:
        message = f"{path} runs on the portable bodies of its operators, more slowly: {why}."
        warnings.warn(message, GraphoptWarning, stacklevel=2)
    return made


def register(options: onnxruntime.SessionOptions, model: ir.Model, providers: Sequence[str]) -> str | None:
    """Register the library with graphopt's kernels with the options of a session, if it serves all of `model`.

    Returns:
        None: It is registered. Else why not: the portable bodies serve.

    Raises:
        ModelError: The library can't be loaded.
        UsageError: The options hold the library already, and it can't run all of the model.
    """
    library = library_path()
    if library is None:
        return "the library with graphopt's kernels wasn't built"
    try:
        if (node := without_kernel(model, library, providers)) is not None:
            why = f"the library has no kernel for {node.op_type} {node.name!r} with its types"
            if _entry(options, REGISTERED_ENTRY) == "1":
                raise UsageError(f"These session options hold graphopt's library, but {why}; give other options.")
            return why
        if "CUDAExecutionProvider" in providers:
            _set(options, CUDA_ENTRY, "1")
        options.register_custom_ops_library(os.fspath(library))
    except (OSError, RuntimeError) as error:
        raise ModelError(f"{library} can't be loaded: {first_line(error)}") from error
    return None


def _entry(options: onnxruntime.SessionOptions, key: str) -> str | None:
    try:
        return str(options.get_session_config_entry(key))
    except RuntimeError:
        return None


def _set(options: onnxruntime.SessionOptions, key: str, value: str) -> None:
    """Set an entry that the caller hasn't set."""
    if _entry(options, key) is None:
        options.add_session_config_entry(key, value)
