"""Loading a model from a file: memory-mapped, checked, with one clear sentence for whatever is wrong with it."""

from __future__ import annotations

import mmap
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from graphopt.errors import ModelError, first_line
from graphopt.graph.edits import sort, walk
from graphopt.graph.wire import Span, WireError, split

MAPPED_BYTES = 1 << 16
"""Inline initializers from this size on stay in the file and are memory-mapped."""
DENSE_BYTES = 1 << 28
"""Sparse constants are made dense (onnx_ir has no sparse tensors) as far as this many bytes together."""

PATH_KEY = "graphopt.path"
"""`model.meta` key of the file that a model was loaded from."""
EXTERNAL_KEY = "graphopt.external_data"
"""`model.meta` key: whether the file keeps weights in external data."""


def load(path: str | os.PathLike[str]) -> ir.Model:
    """Load an ONNX model; weights stay on disk, memory-mapped, whether external or inline.

    Differences to `onnx_ir.load`: large inline weights aren't read into memory; missing, short or escaping external
    data is an error now and not at first use; sparse initializers are made dense instead of dropped; nodes are put
    in topological order (real files aren't always); initializers of IR versions below 4, which are listed among the
    inputs although they can't be overridden, are plain initializers afterwards, and the model is one of IR version 4.

    Args:
        path: The .onnx file.

    Raises:
        ModelError: Missing, empty, truncated, not ONNX, cyclic, or with bad external data.
    """
    path = Path(path)
    proto, spans = parse(path)
    _make_dense(proto, path)
    for key, what in (("graph", "no graph"), ("ir_version", "no IR version")):
        if not proto.HasField(key):
            raise ModelError(f"{path} is not an ONNX model: it has {what}.")
    if not proto.graph.node and not proto.graph.output:
        raise ModelError(f"{path} is not an ONNX model: its graph has neither nodes nor outputs.")
    if not proto.opset_import and proto.ir_version >= 3:
        raise ModelError(f"{path} imports no opset, so its operators have no defined meaning.")
    try:
        model = ir.serde.deserialize_model(proto)
    except Exception as error:
        raise ModelError(f"{path} is not a valid ONNX graph: {first_line(error)}") from error
    ir.external_data.set_base_dir(model.graph, path.parent)
    _map_inline(model, spans, path)
    external = _check_external_data(model, path)
    try:
        normalize(model)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    model.meta[PATH_KEY] = path
    model.meta[EXTERNAL_KEY] = external
    return model


def normalize(model: ir.Model) -> None:
    """Bring what old files write differently to one form, in place; `load` has done so.

    The default domain goes by its short name; initializers of IR versions below 4, which are listed among the inputs
    although they can't be overridden, are plain initializers of IR version 4; nodes of one graph have different names
    (the name means nothing, but ONNX Runtime refuses a name met twice) and are in topological order.

    Raises:
        ModelError: A graph has a cycle.
    """
    parts: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for part in parts:
        if "ai.onnx" in part.opset_imports:
            part.opset_imports.setdefault("", part.opset_imports.pop("ai.onnx"))
    if model.ir_version < 4:
        for graph in walk(model):
            kept = [value for value in graph.inputs if not value.is_initializer()]
            if len(kept) != len(graph.inputs):
                graph.inputs.clear()
                graph.inputs.extend(kept)
        if not model.graph.opset_imports:  # IR versions 1 and 2 knew no opsets: theirs is the first
            model.graph.opset_imports[""] = 1
        model.ir_version = 4
    for graph in walk(model):
        _name_apart(graph)
    try:
        sort(model)
    except ValueError as error:
        raise ModelError(str(error)) from error


def _name_apart(graph: ir.Graph) -> None:
    counts = Counter(node.name for node in graph if node.name)
    if len(counts) == sum(counts.values()):
        return
    met: set[str] = set()
    for node in graph:
        name, number = node.name, 1
        while node.name in met or (number > 1 and node.name in counts):
            number += 1
            node.name = f"{name}_{number}"
        if node.name:
            met.add(node.name)


def parse(path: Path) -> tuple[onnx.ModelProto, list[Span]]:
    """Parse a file without its large inline weights, and say where those lie.

    Raises:
        ModelError: Missing, empty, truncated, or something else than ONNX.
    """
    if path.is_dir():
        raise ModelError(f"{path} is a folder; give the .onnx file in it.")
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ModelError(f"{path} can't be read: {error.strerror}.") from error
    if size == 0:
        raise ModelError(f"{path} is empty.")
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            view = memoryview(mapped)
            try:
                head = bytes(view[:64]).lstrip().lower()
                if head.startswith((b"<!doctype", b"<html", b"<?xml", b"version https://git-lfs")):
                    kind = "a Git LFS pointer" if head.startswith(b"version") else "a web page"
                    raise ModelError(f"{path} is {kind}, not an ONNX model; download the model itself.")
                return split(view, MAPPED_BYTES)
            finally:
                view.release()
    except OSError as error:
        raise ModelError(f"{path} can't be read: {error.strerror}.") from error
    except (WireError, ValueError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is truncated or not an ONNX model ({first_line(error)}).") from error
    except Exception as error:
        if type(error).__name__ != "DecodeError":  # protobuf's, whose module differs between its implementations
            raise
        raise ModelError(f"{path} is truncated or not an ONNX model ({first_line(error)}).") from error


def _map_inline(model: ir.Model, spans: list[Span], path: Path) -> None:
    """Let the initializers whose bytes were left in the file read them from there."""
    real = path.resolve()
    for span in spans:
        value = model.graph.initializers[span.name]
        tensor = value.const_value
        if tensor is None:
            continue
        value.const_value = MappedTensor(
            real.name,
            span.offset,
            span.length,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=span.name,
            base_dir=real.parent,
        )
        if value.const_value.nbytes != span.length:
            raise ModelError(
                f"{path}: initializer {span.name!r} holds {span.length} bytes where its type and shape need "
                f"{value.const_value.nbytes}."
            )


class MappedTensor(ir.ExternalTensor):
    """A weight in a file, in the model's or beside it, that is mapped only while somebody holds its array.

    `ir.ExternalTensor` keeps its mapping for good, so that every weight that a pass has looked at stays resident; here
    the memory goes with the last array. Its place was checked when the model was loaded; the checks that `onnx_ir`
    makes for external data (which would refuse a hard-linked .onnx file) aren't made again.
    """

    __slots__ = ()

    def _check_path_containment(self) -> None:
        return

    def numpy(self) -> np.ndarray:
        """The weight, mapped into memory; the mapping lasts as long as the array."""
        self._array = None
        array = super().numpy()
        self._array, self.raw = None, None
        return array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.numpy().__array__(dtype)

    def tobytes(self) -> bytes:
        """The bytes as they are stored."""
        with open(self.path, "rb") as file:
            file.seek(self.offset or 0)
            return file.read(self.nbytes)


def _check_external_data(model: ir.Model, path: Path) -> bool:
    """Check every external tensor's file, range and place, and let it be mapped; return whether there is any."""
    found = False
    sizes: dict[str, int] = {}
    for graph in walk(model):
        tensors = [(v.name, v.const_value) for v in graph.initializers.values()]
        for node in graph:
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                    # Not as_tensor(), which checks the type against a protocol and takes 20 us.
                    tensors.append((f"{node.name}.{attribute.name}", attribute.value))
        for name, tensor in tensors:
            if not isinstance(tensor, ir.ExternalTensor) or isinstance(tensor, MappedTensor):
                continue
            found = True
            file = tensor.path
            if file not in sizes:
                _check_place(path, name, tensor)
                try:
                    sizes[file] = os.stat(file).st_size
                except OSError as error:
                    raise ModelError(
                        f"{path}: the external data file {tensor.location!r} of {name!r} is missing; put it beside "
                        "the model."
                    ) from error
            start, length = tensor.offset or 0, tensor.length if tensor.length is not None else tensor.nbytes
            if length != tensor.nbytes:
                raise ModelError(
                    f"{path}: external tensor {name!r} names {length} bytes where its type and shape need "
                    f"{tensor.nbytes}."
                )
            if start < 0 or start + length > sizes[file]:
                raise ModelError(
                    f"{path}: the external data file {tensor.location!r} is truncated: {name!r} needs bytes "
                    f"{start} to {start + length} of {sizes[file]}."
                )
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor) and not isinstance(tensor, MappedTensor):
                value.const_value = MappedTensor(
                    tensor.location,
                    tensor.offset,
                    tensor.length,
                    tensor.dtype,
                    shape=tensor.shape,
                    name=tensor.name,
                    base_dir=tensor.base_dir,
                )
    return found


def _check_place(path: Path, name: str | None, tensor: ir.ExternalTensor) -> None:
    """Refuse external data outside of the model's folder, by name or through a symbolic link.

    One kind of link is followed: that to the folder in which the .onnx file itself really lies. Download caches keep
    both files so, as links from a snapshot into a folder of blobs.
    """
    folder = path.parent
    if not Path(os.path.abspath(tensor.path)).is_relative_to(os.path.abspath(folder)):
        raise ModelError(
            f"{path}: the external data of {name!r} lies outside of the model's folder ({tensor.location}); "
            "put the data file beside the model."
        )
    real = Path(tensor.path).resolve()
    if not (real.is_relative_to(folder.resolve()) or real.is_relative_to(path.resolve().parent)):
        raise ModelError(
            f"{path}: its external data {tensor.location!r} is a symbolic link that leads out of the "
            "model's folder; copy both files with `cp -L` and give the copy."
        )


def _make_dense(proto: onnx.ModelProto, path: Path) -> None:
    """Turn sparse initializers and sparse Constant nodes into dense ones, within a budget of bytes."""
    budget = DENSE_BYTES

    def dense(sparse: onnx.SparseTensorProto, name: str) -> onnx.TensorProto:
        nonlocal budget
        values = onnx.numpy_helper.to_array(sparse.values)
        indices = onnx.numpy_helper.to_array(sparse.indices)
        dims = tuple(sparse.dims)
        budget -= int(np.prod(dims, dtype=np.int64)) * values.dtype.itemsize
        if budget < 0:
            raise ModelError(
                f"{path}: the sparse constants up to {name!r} take more than {DENSE_BYTES >> 20} MiB when made dense, "
                "and graphopt doesn't keep sparse tensors; make the model without sparse initializers."
            )
        array = np.zeros(dims, dtype=values.dtype)
        if indices.ndim == 1:
            array.reshape(-1)[indices] = values
        else:
            array[tuple(indices.T)] = values
        return onnx.numpy_helper.from_array(array, name)

    def visit(graph: onnx.GraphProto) -> None:
        for sparse in graph.sparse_initializer:
            graph.initializer.append(dense(sparse, sparse.values.name))
        del graph.sparse_initializer[:]
        visit_nodes(graph.node)

    def visit_nodes(nodes: object) -> None:
        for node in nodes:  # type: ignore[attr-defined]
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    visit(attribute.g)
                elif attribute.type == onnx.AttributeProto.GRAPHS:
                    for graph in attribute.graphs:
                        visit(graph)
                elif attribute.type == onnx.AttributeProto.SPARSE_TENSOR and node.op_type == "Constant":
                    tensor = dense(attribute.sparse_tensor, node.output[0])
                    attribute.CopyFrom(onnx.helper.make_attribute("value", tensor))

    visit(proto.graph)
    for function in proto.functions:
        visit_nodes(function.node)
