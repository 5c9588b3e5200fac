"""Reading and writing an ONNX file's large inline weights without holding them in memory.

A `ModelProto` with its weights inside can only be parsed or serialized whole by protobuf, which takes two to three
times the file in memory. The wire format is simple enough to walk (field tag, length, bytes): `split` finds the
`raw_data` of each large initializer of the main graph in the file and returns the model without those bytes, plus
where they lie; `join` writes such a file from a model without them and their sources. Everything else is left to
protobuf. Format: "Protocol Buffers, Encoding"; field numbers from onnx.proto.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO

import onnx

# Field numbers of onnx.proto.
_MODEL_GRAPH, _GRAPH_INITIALIZER, _TENSOR_RAW_DATA = 7, 5, 9
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


class WireError(ValueError):
    """The bytes aren't a whole protobuf message."""


@dataclasses.dataclass(frozen=True)
class Span:
    """Where the bytes of one initializer lie in the file."""

    name: str
    offset: int
    length: int


def split(data: memoryview, min_bytes: int) -> tuple[onnx.ModelProto, list[Span]]:
    """Parse a serialized model, leaving out the raw data of initializers of at least `min_bytes`.

    Args:
        data: The whole file, memory-mapped.
        min_bytes: Smaller tensors stay in the result.

    Returns:
        The model whose large initializers have an empty `raw_data`, and the place of those bytes by tensor.

    Raises:
        WireError: Truncated or no protobuf.
    """
    model_parts: list[bytes] = []
    graph_parts: list[bytes] = []
    spans: list[Span] = []
    for field, kind, start, begin, end in _fields(data, 0, len(data)):
        if field != _MODEL_GRAPH or kind != _LENGTH:
            model_parts.append(bytes(data[start:end]))
            continue
        for inner, inner_kind, inner_start, inner_begin, inner_end in _fields(data, begin, end):
            large = inner == _GRAPH_INITIALIZER and inner_kind == _LENGTH and inner_end - inner_begin >= min_bytes
            stripped = _strip_tensor(data, inner_begin, inner_end, min_bytes) if large else None
            if stripped is None:
                graph_parts.append(bytes(data[inner_start:inner_end]))
                continue
            header, span = stripped
            spans.append(span)
            graph_parts.append(_message(_GRAPH_INITIALIZER, header))
    body = b"".join(graph_parts)
    return onnx.ModelProto.FromString(b"".join([*model_parts, _message(_MODEL_GRAPH, body)])), spans


def _strip_tensor(data: memoryview, begin: int, end: int, min_bytes: int) -> tuple[bytes, Span] | None:
    raw: tuple[int, int] | None = None
    parts: list[bytes] = []
    for field, kind, start, value, stop in _fields(data, begin, end):
        if field == _TENSOR_RAW_DATA and kind == _LENGTH:
            raw = (value, stop)
        elif stop - start > 1 << 16 and kind == _LENGTH:
            return None  # typed data (float_data, ...): protobuf must decode it
        else:
            parts.append(bytes(data[start:stop]))
    if raw is None or raw[1] - raw[0] < min_bytes:
        return None
    header = b"".join(parts)
    name = onnx.TensorProto.FromString(header).name
    return header, Span(name, raw[0], raw[1] - raw[0])


def join(
    model: onnx.ModelProto,
    tensors: Sequence[tuple[onnx.TensorProto, int, Callable[[BinaryIO], None]]],
    file: BinaryIO,
) -> None:
    """Write `model` with further initializers whose bytes are streamed.

    Args:
        model: A model whose graph lacks the streamed initializers. Its graph is emptied while writing.
        tensors: For each: its header without data, its length in bytes, and what writes exactly those bytes.
        file: Where to write.
    """
    graph = model.graph.SerializeToString(deterministic=True)
    model.ClearField("graph")
    file.write(model.SerializeToString(deterministic=True))
    heads: list[bytes] = []
    total = len(graph)
    for header, length, _ in tensors:
        head = header.SerializeToString(deterministic=True) + _tag(_TENSOR_RAW_DATA) + _varint(length)
        head = _tag(_GRAPH_INITIALIZER) + _varint(len(head) + length) + head
        heads.append(head)
        total += len(head) + length
    file.write(_tag(_MODEL_GRAPH) + _varint(total))
    file.write(graph)
    for head, (_, _, write) in zip(heads, tensors, strict=True):
        file.write(head)
        write(file)


def _fields(data: memoryview, position: int, end: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Each field of a message as (number, wire type, start of its tag, start of its value, end of its value)."""
    while position < end:
        start = position
        key, position = _read_varint(data, position, end)
        kind = key & 7
        if kind == _VARINT:
            begin = position
            _, position = _read_varint(data, position, end)
        elif kind == _LENGTH:
            length, position = _read_varint(data, position, end)
            begin = position
            position += length
        elif kind in (_FIXED64, _FIXED32):
            begin = position
            position += 8 if kind == _FIXED64 else 4
        else:
            raise WireError(f"unknown wire type {kind} at byte {start}")
        if position > end or key >> 3 == 0:
            raise WireError(f"the message ends inside a field at byte {start}")
        yield key >> 3, kind, start, begin, position


def _read_varint(data: memoryview, position: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= end or shift > 63:
            raise WireError(f"the file ends inside a number at byte {position}")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _tag(field: int) -> bytes:
    return _varint(field << 3 | _LENGTH)


def _message(field: int, body: bytes) -> bytes:
    return _tag(field) + _varint(len(body)) + body
