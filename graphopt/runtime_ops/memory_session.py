"""Sessions of ONNX Runtime on models in memory, without a second copy of the weights.

ONNX Runtime maps external data into memory, so a weight that lies in a file anywhere is handed over as a reference to
that file; weights that passes made are written to a temporary file once, tensor by tensor, and referenced likewise.
`SessionOptions.add_external_initializers` would need no file, but ONNX Runtime 1.31 copies what it is given, knows
numpy's dtypes only, and takes no initializers of subgraphs.
"""

from __future__ import annotations

import functools
import gc
import os
import sys
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx_ir as ir

from graphopt.errors import ModelError, VerificationError
from graphopt.graph.load import load
from graphopt.graph.session_settings import SessionSettings
from graphopt.graph.session_settings import read as read_settings
from graphopt.graph.skeleton import Weight, first_line, serialized, skeleton
from graphopt.runtime_ops.library import mentioned
from graphopt.runtime_ops.operator import uses
from graphopt.runtime_ops.packed_products import NO_PREPACKING, needs_folding
from graphopt.runtime_ops.session import register

if TYPE_CHECKING:
    import onnxruntime

Optimizations = Literal["all", "none"]
"""ONNX Runtime's own graph optimizations: all of them, as users run a model, or none, as the graph is written."""

GROWTH_BYTES = 64 << 20
"""What a process may grow by before garbage is collected."""
_resident_then = 0

INLINE_TOTAL_BYTES = 64 << 20
"""Weights in memory of at most this many bytes together travel inside the protobuf; no file is written for them."""

_FOLDER_KEY = "session.model_external_initializers_file_folder_path"


class WeightStore:
    """The temporary file in which sessions find weights that lie in memory only.

    A tensor is written at its first use and found again afterwards, so that checking a model after every pass writes
    only what that pass changed. The file goes away with the store (`close`, or garbage collection).
    """

    def __init__(self) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._places: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._end = 0

    def place(self, tensor: ir.TensorProtocol) -> tuple[Path, int]:
        """The file and the byte offset at which the numbers of `tensor` lie, little-endian as ONNX stores them."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="graphopt-", ignore_cleanup_errors=True)
        path = Path(self._folder.name).resolve() / "weights"
        known = self._places.get(id(tensor))
        if known is not None and known[0]() is tensor:
            return path, known[1]
        offset = self._end
        try:
            with path.open("ab") as file:
                # Not every class of tensor can write itself without making bytes of everything first.
                write = getattr(tensor, "tofile", None)
                if write is not None:
                    write(file)
                else:
                    file.write(tensor.tobytes())
                self._end = file.tell()
                # ONNX Runtime maps whole pages; aligned tensors also suit its vector instructions.
                padding = -self._end % 4096
                file.write(bytes(padding))
                self._end += padding
        except OSError as error:
            raise VerificationError(
                f"Weights can't be written to {path.parent} for verification ({error.strerror}); "
                "free disk space there or set TMPDIR to another folder."
            ) from error
        try:
            self._places[id(tensor)] = (weakref.ref(tensor), offset)
        except TypeError:  # a tensor class without weak references is written again next time
            self._places.pop(id(tensor), None)
        return path, offset

    def close(self) -> None:
        """Remove the file. Sessions that were made from it keep working where the system allows (not on Windows)."""
        if self._folder is not None:
            self._folder.cleanup()
        self._folder, self._places, self._end = None, {}, 0


def make_session(
    model: ir.Model | str | os.PathLike[str],
    optimizations: Optimizations = "all",
    *,
    threads: int | None = None,
    store: WeightStore | None = None,
    settings: Mapping[str, str] | None = None,
    requested: SessionSettings | None = None,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    reuse: bool = True,
) -> onnxruntime.InferenceSession:
    """Make an ONNX Runtime session for a model in memory or a file.

    Memory goes back to the system with the session: no arena, no memory pattern (probes differ in shape).

    Args:
        model: The model, or the path of its file.
        optimizations: "all" or "none".
        threads: Threads within an operator; None leaves it to ONNX Runtime.
        store: Keeps weights for several sessions; without one, the session has its own.
        settings: Session config entries, such as {"session.intra_op.allow_spinning": "0"}.
        requested: What the model asks of a session, to be granted; `settings` go before it. A model in memory says
            itself what it asks for, which counts where optimizations are on.
        providers: Execution providers by name.
        reuse: Whether a result may take the memory of another that has, by inference, the same sizes. ONNX Runtime
            1.31 infers those of an `Attention`'s weights wrongly.

    Raises:
        VerificationError: ONNX Runtime isn't installed or doesn't load the model.
        ModelError: The model can't be serialized.
    """
    ort = _onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.enable_mem_reuse = reuse
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimizations == "all" else level.ORT_DISABLE_ALL
    if threads is not None:
        options.intra_op_num_threads = threads
    if requested is None and isinstance(model, ir.Model) and optimizations == "all":
        requested = read_settings(model)
    asked = dict(requested.config) if requested is not None else {}
    if optimizations == "none" and _needs_folding(model):
        asked[NO_PREPACKING] = "1"
    for key, value in {**asked, **(settings or {})}.items():
        options.add_session_config_entry(key, value)
    register_kernels(options, model, providers)
    source: bytes | str
    own_store: WeightStore | None = None
    if isinstance(model, ir.Model):
        if store is None:
            store = own_store = WeightStore()
        source, folder = with_references(model, store)
        options.add_session_config_entry(_FOLDER_KEY, folder)
        name = f"the graph {model.graph.name!r}" if model.graph.name else "the model"
    else:
        source = os.fspath(model)
        name = source
        if not Path(source).is_file():
            raise ModelError(f"There is no model file {source}.")
    try:
        disabled = list(requested.disabled_optimizers) if requested is not None else []
        session = ort.InferenceSession(source, options, providers=list(providers), disabled_optimizers=disabled or None)
    except Exception as error:
        raise VerificationError(_load_message(name, first_line(error), ort.__version__)) from error
    finally:
        if own_store is not None and sys.platform != "win32":
            own_store.close()
    if own_store is not None:
        session._graphopt_store = own_store
    return session


def _needs_folding(model: ir.Model | str | os.PathLike[str]) -> bool:
    """Whether a model, or the one in a file, has products that are wrong where ONNX Runtime folds nothing."""
    if isinstance(model, ir.Model):
        return needs_folding(model)
    return Path(model).is_file() and mentioned(Path(model), "MatMulNBits") and needs_folding(load(model))


def register_kernels(
    options: onnxruntime.SessionOptions, model: ir.Model | str | os.PathLike[str], providers: Sequence[str]
) -> None:
    """Let a session run graphopt's own operators, if the model has any, on their kernels."""
    if not isinstance(model, ir.Model):
        if not Path(model).is_file() or not mentioned(Path(model)):
            return
        model = load(model)
    if uses(model):
        register(options, model, providers)


def run(session: onnxruntime.InferenceSession, feeds: Mapping[str, Any]) -> list[Any]:
    """Run a session once.

    Types that numpy has no name for (bfloat16, float8, int4) go in and come out as arrays of `ml_dtypes`.

    Args:
        session: The session.
        feeds: Arrays by input name; inputs that the session doesn't have are left out.

    Returns:
        The outputs in the session's order: arrays, lists (sequences), dicts (maps), or None (optionals).

    Raises:
        Exception: Whatever ONNX Runtime raises; see `first_line`.
    """
    ort = _onnxruntime()
    wanted = {i.name for i in session.get_inputs()}
    feeds = {name: value for name, value in feeds.items() if name in wanted}
    options = ort.RunOptions()
    options.log_severity_level = 4
    foreign_in = any(isinstance(v, np.ndarray) and _is_foreign(v.dtype) for v in feeds.values())
    foreign_out = [_element_type(o.type) for o in session.get_outputs()]
    if not foreign_in and not any(foreign_out):
        return list(session.run(None, feeds, options))
    values = {}
    for name, array in feeds.items():
        dtype = ir.DataType.from_numpy(array.dtype)
        if _is_foreign(array.dtype):
            values[name] = _foreign_value(ort, np.ascontiguousarray(array), dtype)
        else:
            values[name] = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
    outputs = session.run_with_ort_values(None, values, options)
    return [_array(o, dtype) for o, dtype in zip(outputs, foreign_out, strict=True)]


def release_memory() -> None:
    """Give the memory of deleted sessions and models back to the system (glibc otherwise keeps it for later).

    Models are cycles of Python objects, which only the collector frees. In a process with large libraries it takes
    half a second each time, so that it runs only where the process has grown by `GROWTH_BYTES` since it last ran.
    """
    global _resident_then
    resident = _resident()
    grown = resident is None or resident > _resident_then + GROWTH_BYTES
    if grown:
        gc.collect()
    if sys.platform == "linux":
        import ctypes

        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
    after = _resident() or 0
    # Where it has shrunk by itself, growth counts from there.
    _resident_then = after if grown else min(_resident_then, after)


def _resident() -> int | None:
    """Bytes of the process in memory; None where the system doesn't tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise VerificationError(
            "Verification and benchmarks need ONNX Runtime: pip install 'graphopt[cpu]' (or 'graphopt[gpu]')."
        ) from error
    return onnxruntime


def with_references(model: ir.Model, store: WeightStore) -> tuple[bytes, str]:
    """The model's bytes with weights as references below the root folder, and that folder.

    Another process finds the model there as long as the store lives; metadata is left out.
    """
    proto, weights = skeleton(model)
    in_memory = [w for w in weights if not isinstance(w.tensor, ir.ExternalTensor)]
    inline = sum(w.tensor.nbytes for w in in_memory) <= INLINE_TOTAL_BYTES
    root = Path(tempfile.gettempdir()).resolve().anchor
    for weight in weights:
        tensor = weight.tensor
        if isinstance(tensor, ir.ExternalTensor):
            path = Path(tensor.path).resolve()
            offset = tensor.offset or 0
            if path.anchor != root:  # another drive of a Windows machine
                _inline(weight)
                continue
        elif inline:
            _inline(weight)
            continue
        else:
            path, offset = store.place(tensor)
        del weight.proto.external_data[:]
        location = path.relative_to(root).as_posix()
        for key, value in (("location", location), ("offset", str(offset)), ("length", str(tensor.nbytes))):
            entry = weight.proto.external_data.add()
            entry.key, entry.value = key, value
    return serialized(proto), root


def _inline(weight: Weight) -> None:
    weight.proto.ClearField("external_data")
    weight.proto.ClearField("data_location")
    weight.proto.raw_data = weight.tensor.tobytes()


def _load_message(name: str, line: str, version: str) -> str:
    message = f"ONNX Runtime {version} doesn't load {name}: {line}"
    if "IR version" in line or "opset" in line.lower():
        message += " Save the model with an older opset or IR version, or install a newer onnxruntime."
    return message


_FOREIGN = (
    "BFLOAT16", "FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ", "FLOAT4E2M1",
    "INT4", "UINT4", "INT2", "UINT2",
)  # fmt: skip


@functools.cache
def _is_foreign(dtype: np.dtype[Any]) -> bool:
    return dtype.name in {getattr(ir.DataType, n).numpy().name for n in _FOREIGN if hasattr(ir.DataType, n)}


def _element_type(text: str) -> ir.DataType | None:
    """The dtype behind ONNX Runtime's "tensor(bfloat16)" where numpy has none of its own, else None."""
    name = text.removeprefix("tensor(").removesuffix(")").upper()
    return getattr(ir.DataType, name, None) if name in _FOREIGN else None


def _foreign_value(ort: Any, array: np.ndarray[Any, Any], dtype: ir.DataType) -> Any:
    if dtype.bitwidth < 8:
        packed = np.frombuffer(ir.Tensor(array, dtype=dtype).tobytes(), np.uint8)
        # ONNX Runtime takes shape and address from the array; the packed bytes are all it reads.
        strides = tuple(int(np.prod(array.shape[i + 1 :], dtype=np.int64)) for i in range(array.ndim))
        array = np.lib.stride_tricks.as_strided(packed, array.shape, strides, writeable=False)
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, int(dtype))


def _array(value: Any, dtype: ir.DataType | None) -> Any:
    if dtype is None or not value.is_tensor():
        return value.numpy() if value.has_value() else None
    import ctypes

    shape, size = tuple(value.shape()), value.tensor_size_in_bytes()
    if size == 0:
        return np.zeros(shape, dtype.numpy())
    raw = ctypes.string_at(value.data_ptr(), size)
    if dtype.bitwidth == 8 or dtype.bitwidth == 16:
        return np.frombuffer(raw, dtype.numpy()).reshape(shape)
    packed = ir.PackedTensor(np.frombuffer(raw, np.uint8), dtype, shape=ir.Shape(shape))
    return packed.numpy()
