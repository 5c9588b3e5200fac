"""Saving a model: streamed, with its external data, and atomically."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import BinaryIO

import onnx
import onnx_ir as ir

from graphopt.errors import ModelError, UsageError
from graphopt.graph.edits import walk
from graphopt.graph.load import EXTERNAL_KEY, PATH_KEY, parse
from graphopt.graph.wire import join

INLINE_LIMIT = 1_900_000_000
"""A protobuf file can't exceed 2 GiB; above this many bytes weights go to external data."""
STREAMED_BYTES = 1 << 12
"""Weights from this size on are streamed to the file, or go to external data."""

Progress = Callable[[int, int], None]
"""Called with (tensors written, tensors in all)."""


def save(
    model: ir.Model,
    path: str | os.PathLike[str],
    *,
    external_data: bool | None = None,
    shard_bytes: int | None = None,
    in_place: bool = False,
    progress: Progress | None = None,
    accept: Callable[[Path], None] | None = None,
) -> list[Path]:
    """Write a model so that at every moment there is either the old output or the new one, whole.

    Everything is written to a temporary folder beside the target, synchronized to disk and renamed; the .onnx file
    comes last. Where that file replaces one that has external data, the new data gets another name, so that a crash
    between the renames leaves the old pair intact; the old data file is deleted afterwards. Peak memory is that of
    the largest tensor, not of the model.

    Args:
        model: The model; unchanged by the call. Weights may be lazy or memory-mapped, also from the file replaced.
        path: The .onnx file to write. Missing parent folders are made.
        external_data: Weights beside the file (`<name>.data`) or inside it; None: as the model was loaded, and
            beside it where they don't fit into one protobuf file.
        shard_bytes: Split external data into files of at most this many bytes.
        in_place: Allow `path` to be the file that the model was loaded from.
        progress: Called after each tensor.
        accept: Called with the written .onnx file, weights beside it, before it takes its place; what this raises
            leaves everything as it was, and nothing of the new model.

    Returns:
        The files written, the .onnx file first.

    Raises:
        UsageError: `path` is the input and `in_place` isn't set, or a weight file that the input needs.
        ModelError: The disk is full or the folder isn't writable; nothing is left behind.
    """
    path = Path(path)
    source = model.meta.get(PATH_KEY)
    if source is not None and same_file(path, Path(source)):
        if not in_place:
            raise UsageError(f"{path} is the input; give another output, or --in-place to replace it.")
    elif path.exists() and _weights_in(model) & {path.resolve()}:
        raise UsageError(f"{path} holds weights of the input; give another output.")
    if path.is_dir():
        raise UsageError(f"{path} is a folder; give a file name such as {path / 'model.onnx'}.")
    if shard_bytes is not None and shard_bytes <= 0:
        raise UsageError("The shard size must be a positive number of bytes.")
    size = weight_bytes(model)
    if external_data is None:
        external_data = bool(model.meta.get(EXTERNAL_KEY)) or shard_bytes is not None
    external_data = external_data or size > INLINE_LIMIT
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _temporary_folder(path.parent) as folder, _data_name(path, shard_bytes is not None, external_data) as name:
            if name is not None:
                _write_external(model, folder, path, name, shard_bytes, progress)
            else:
                _write_inline(model, folder / path.name, progress)
            written = sorted(folder.iterdir())
            if path.exists():
                shutil.copymode(path, folder / path.name)
            for file in written:
                _synchronize(file)
            if accept is not None:
                accept(folder / path.name)
            replaced = _referenced_files(path)
            for file in written:
                if file.name != path.name:
                    os.replace(file, path.parent / file.name)
            os.replace(folder / path.name, path)
            _synchronize(path.parent)
    except OSError as error:
        raise ModelError(f"{path} couldn't be written: {error.strerror or error}; nothing was changed.") from error
    kept = {path.parent / file.name for file in written}
    stale = replaced - {p.resolve() for p in kept}
    for file in stale - _weights_elsewhere(path) if stale else ():
        with contextlib.suppress(OSError):
            file.unlink()
    return [path, *sorted(kept - {path})]


def same_file(a: Path, b: Path) -> bool:
    """Whether two paths lead to one file, also where a folder on the way is yet to be made ("new/../model.onnx")."""
    return a.resolve() == b.resolve() or (a.exists() and b.exists() and os.path.samefile(a, b))


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers, over all graphs."""
    return sum(
        value.const_value.nbytes
        for graph in walk(model)
        for value in graph.initializers.values()
        if value.const_value is not None and value.const_value.dtype != ir.DataType.STRING
    )


def _write_external(
    model: ir.Model, folder: Path, path: Path, data_name: str, shard_bytes: int | None, progress: Progress | None
) -> None:
    def report(_: ir.TensorProtocol, info: ir.external_data.CallbackInfo) -> None:
        if progress is not None:
            progress(info.index + 1, info.total)

    _attributes_in_memory(model)
    values = [
        (value, value.const_value)
        for graph in walk(model)
        for value in graph.initializers.values()
        if value.const_value is not None
    ]
    # onnx_ir's `save` writes a tensor once for each initializer that holds it. Those of this graph hold each one once.
    written: dict[Hashable, ir.Value] = {}
    for value, tensor in values:
        if _streamable(value):
            written.setdefault(_place(tensor), ir.Value(name=str(len(written)), const_value=tensor))
    once = ir.Model(ir.Graph([], [], nodes=[], initializers=[*written.values()]), ir_version=model.ir_version)
    if written:  # else a file of no bytes would be made
        ir.external_data.unload_from_model(once, folder, data_name, max_shard_size_bytes=shard_bytes, callback=report)
    try:
        for value, tensor in values:
            if _streamable(value):
                place = written[_place(tensor)].const_value
                assert isinstance(place, ir.ExternalTensor)
                shape, name = ir.Shape(tensor.shape.numpy()), value.name or ""
                value.const_value = ir.ExternalTensor(
                    place.location, place.offset, place.length, tensor.dtype, shape=shape, name=name
                )
            elif isinstance(tensor, ir.ExternalTensor):
                value.const_value = in_memory(tensor)
        onnx.save(ir.serde.serialize_model(model), folder / path.name, format="protobuf")
    finally:
        for value, tensor in values:
            value.const_value = tensor


def _place(tensor: ir.TensorProtocol) -> Hashable:
    """What two tensors share that are one: their place in a file, or in memory."""
    return (tensor.path, tensor.offset, tensor.length) if isinstance(tensor, ir.ExternalTensor) else id(tensor)


def _write_inline(model: ir.Model, file: Path, progress: Progress | None) -> None:
    streamed: list[tuple[onnx.TensorProto, int, Callable[[BinaryIO], None]]] = []
    total = sum(1 for v in model.graph.initializers.values() if _streamable(v))

    def write(tensor: ir.TensorProtocol, index: int, out: BinaryIO) -> None:
        if isinstance(tensor, ir.ExternalTensor | ir.LazyTensor | ir.Tensor | ir.PackedTensor):
            tensor.tofile(out)  # copies within the kernel where it can
        else:
            out.write(tensor.tobytes())
        if progress is not None:
            progress(index + 1, total)

    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and _streamable(value):
            header = onnx.TensorProto(name=value.name, data_type=tensor.dtype.value, dims=tensor.shape.numpy())
            streamed.append((header, tensor.nbytes, functools.partial(write, tensor, len(streamed))))
    _attributes_in_memory(model)
    proto = _serialize_without(model, {header.name for header, _, _ in streamed})
    with file.open("wb") as out:
        join(proto, streamed, out)


def _streamable(value: ir.Value) -> bool:
    tensor = value.const_value
    return tensor is not None and tensor.dtype != ir.DataType.STRING and tensor.nbytes >= STREAMED_BYTES


def _serialize_without(model: ir.Model, names: set[str]) -> onnx.ModelProto:
    """Serialize, leaving out the main graph's initializers of these names, and all others with their data inside."""
    order = list(model.graph.initializers.values())
    for name in names:
        del model.graph.initializers[name]
    inlined = _external_made_inline(model)
    try:
        return ir.serde.serialize_model(model)
    finally:
        for value, tensor in inlined:
            value.const_value = tensor
        model.graph.initializers.clear()
        for value in order:
            model.graph.initializers.add(value)


def _external_made_inline(model: ir.Model) -> list[tuple[ir.Value, ir.TensorProtocol]]:
    """Replace the remaining external tensors (small ones, and those of subgraphs) by tensors in memory."""
    changed: list[tuple[ir.Value, ir.TensorProtocol]] = []
    for graph in walk(model):
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                changed.append((value, tensor))
                value.const_value = in_memory(tensor)
    return changed


def in_memory(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """A copy of an external tensor in memory."""
    proto = onnx.TensorProto(
        name=tensor.name, data_type=tensor.dtype.value, dims=tensor.shape.numpy(), raw_data=tensor.tobytes()
    )
    return ir.serde.deserialize_tensor(proto)


def _attributes_in_memory(model: ir.Model) -> None:
    """Read external tensors of node attributes: they name the input's files, which don't move with the output."""
    for graph in walk(model):
        for node in graph:
            for name, attribute in list(node.attributes.items()):
                if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                    held = attribute.as_tensor()
                    if isinstance(held, ir.ExternalTensor):
                        node.attributes[name] = ir.AttrTensor(name, in_memory(held))


@contextlib.contextmanager
def _data_name(path: Path, sharded: bool, external_data: bool) -> Iterator[str | None]:
    """A data file name that no file has yet, so that a crash can't separate an old model from its data.

    The name is taken by an empty file at once, so that two runs with the same output can't choose the same one.
    """
    if not external_data:
        yield None
        return
    count = 1
    while True:
        name = f"{path.name}.data" if count == 1 else f"{path.stem}.{count}{path.suffix}.data"
        count += 1
        if sharded and any(path.parent.glob(f"{name.removesuffix('.data')}-*-of-*.data")):
            continue
        try:
            (path.parent / name).touch(exist_ok=False)
            break
        except FileExistsError:
            continue
    try:
        yield name
    finally:
        # Still empty: the run failed, or the data went to shards or (there being none) nowhere.
        with contextlib.suppress(OSError):
            if (path.parent / name).stat().st_size == 0:
                (path.parent / name).unlink()


def _referenced_files(path: Path) -> set[Path]:
    """External data files of the model at `path`, if there is a readable one."""
    if not path.is_file():
        return set()
    try:
        proto, _ = parse(path)
    except ModelError:  # whatever stands there is about to be replaced; it need not be a model
        return set()
    found: set[Path] = set()
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location" and "/" not in entry.value and "\\" not in entry.value:
                file = path.parent / entry.value
                if file.is_file():
                    found.add(file.resolve())
    return found


def _weights_in(model: ir.Model) -> set[Path]:
    """The files that the model's weights are mapped from."""
    paths = {
        value.const_value.path
        for graph in walk(model)
        for value in graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    }
    return {Path(path).resolve() for path in paths}


def _weights_elsewhere(path: Path) -> set[Path]:
    """Data files that other models in the folder of `path` use too, so that they aren't deleted with it."""
    used: set[Path] = set()
    for other in path.parent.glob("*.onnx"):
        if other != path:
            used |= _referenced_files(other)
    return used


@contextlib.contextmanager
def _temporary_folder(parent: Path) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix=".graphopt-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _synchronize(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
