"""The safetensors files of a Hugging Face folder: which they are, and where in them each tensor lies.

The headers are read here and not by the safetensors library, because the library doesn't tell the place of a tensor in
its file, and with the place a weight can be mapped, or copied by the kernel, without ever being in memory.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx_ir as ir

from graphopt.errors import ModelError, UsageError, first_line
from graphopt.graph.load import MappedTensor

TYPES = {
    "BOOL": ir.DataType.BOOL,
    "U8": ir.DataType.UINT8,
    "I8": ir.DataType.INT8,
    "U16": ir.DataType.UINT16,
    "I16": ir.DataType.INT16,
    "U32": ir.DataType.UINT32,
    "I32": ir.DataType.INT32,
    "U64": ir.DataType.UINT64,
    "I64": ir.DataType.INT64,
    "F8_E4M3": ir.DataType.FLOAT8E4M3FN,
    "F8_E4M3FNUZ": ir.DataType.FLOAT8E4M3FNUZ,
    "F8_E5M2": ir.DataType.FLOAT8E5M2,
    "F8_E5M2FNUZ": ir.DataType.FLOAT8E5M2FNUZ,
    "F8_E8M0": ir.DataType.FLOAT8E8M0,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
    "F32": ir.DataType.FLOAT,
    "F64": ir.DataType.DOUBLE,
    "C64": ir.DataType.COMPLEX64,
}
"""The type of a tensor by its name in the header."""
HEADER_BYTES = 100_000_000
"""The longest header that the format allows."""

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def stored_tensors(folder: Path) -> dict[str, MappedTensor]:
    """All tensors of a model's folder by their names in the files; no data is read.

    Raises:
        UsageError: Which of several files holds the weights can't be told, or there are only pickled weights.
        ModelError: A file is missing, truncated or something else, or a tensor of the index isn't in its file.
    """
    files, promised = _files(folder)
    found: dict[str, MappedTensor] = {}
    by_file: dict[str, set[str]] = {}
    for file in files:
        tensors = read_header(file)
        by_file[file.name] = set(tensors)
        found.update(tensors)
    for name, file_name in promised.items():
        if name not in by_file[file_name]:
            raise ModelError(
                f"{folder / file_name} doesn't hold the tensor {name}, which the index beside it promises; download "
                "the file again"
            )
    return found


def _files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The files with the model's weights, and the file of each tensor where an index tells it."""
    told = (
        json_object(folder / "config.json").get("transformers_weights") if (folder / "config.json").is_file() else None
    )
    if isinstance(told, str):
        chosen = folder / told
        return _of_index(chosen) if told.endswith(".json") else ([chosen], {})
    if (folder / SINGLE).is_file():
        return [folder / SINGLE], {}
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if folder / INDEX in indexes or len(indexes) == 1:
        return _of_index(folder / INDEX if folder / INDEX in indexes else indexes[0])
    # An adapter lies in the folder of its base model sometimes; its files are a few per cent of a model.
    rest = sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith("adapter_"))
    if shards := _shards(rest):
        return shards, {}
    if len(rest) == 1:
        return rest, {}
    if rest:
        raise UsageError(
            f"{folder} has {_several(rest)} and no {INDEX} that says which of them hold the model's weights; rename "
            f"the right one to {SINGLE}"
        )
    pickled = sorted(file for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in folder.glob(pattern))
    pickled = [file for file in pickled if not file.name.startswith(("adapter_", "training_args"))]
    if pickled:
        raise UsageError(
            f"{folder} has its weights only as {_several(pickled)}, which can't be read tensor by tensor; load it with "
            "transformers' from_pretrained and write it again with save_pretrained, which makes .safetensors files"
        )
    if any(folder.glob("adapter_*.safetensors")):
        raise UsageError(f"{folder} holds an adapter and no model; give the folder of its base model too")
    raise UsageError(f"{folder} has no weights; give a folder with {SINGLE}, or with {INDEX} and its shards")


def _of_index(index: Path) -> tuple[list[Path], dict[str, str]]:
    promised = json_object(index).get("weight_map")
    if not isinstance(promised, dict) or not promised or not all(isinstance(v, str) for v in promised.values()):
        raise ModelError(f"{index} has no weight_map that gives the file of each tensor; download it again")
    names = sorted(set(promised.values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise ModelError(f"{index} names the file {outside[0]}, which isn't in its folder")
    if absent := [name for name in names if not (index.parent / name).is_file()]:
        held = sum(1 for name in promised.values() if name == absent[0])
        more = f" ({len(absent)} of {len(names)} files are missing)" if len(absent) > 1 else ""
        raise ModelError(
            f"{index.parent / absent[0]} is missing{more}, where {index.name} says that {held} tensors lie; download it"
        )
    return [index.parent / name for name in names], promised


def _shards(files: list[Path]) -> list[Path]:
    """The files that are numbered as the parts of one ("x-00001-of-00002.safetensors"), if all of them are."""
    matches = [re.fullmatch(r"(.*)-(\d+)-of-(\d+)\.safetensors", file.name) for file in files]
    kinds = {(match[1], match[3]) if match else None for match in matches}
    if len(kinds) != 1 or None in kinds:
        return []
    stem, count = next(kind for kind in kinds if kind)
    there = {int(match[2]) for match in matches if match}
    if absent := sorted(set(range(1, int(count) + 1)) - there):
        missing = f"{stem}-{absent[0]:0{len(count)}}-of-{count}.safetensors"
        raise ModelError(f"{files[0].parent / missing} is missing; download it")
    return files


def read_header(file: Path) -> dict[str, MappedTensor]:
    """The tensors of one file, each to be mapped when it is asked for its numbers.

    Raises:
        ModelError: The file can't be read, is truncated, or isn't a safetensors file.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            if start == b"version ":
                raise ModelError(
                    f"{file} is a Git LFS pointer, not the weights themselves; fetch it with `git lfs pull`"
                )
            if size < 8 or (length <= HEADER_BYTES and 8 + length > size):
                raise ModelError(f"{file} is truncated: it has {size} bytes, and its header isn't complete")
            if length > HEADER_BYTES:
                raise ModelError(f"{file} isn't a safetensors file: its header would be {length} bytes long")
            header = json.loads(stream.read(length).decode("utf-8"))
    except OSError as error:
        raise ModelError(f"{file} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"{file} isn't a safetensors file: its header isn't JSON ({first_line(error)})") from error
    if not isinstance(header, dict):
        raise ModelError(f"{file} isn't a safetensors file: its header is no JSON object")
    header.pop("__metadata__", None)
    real, data = file.resolve(), 8 + length
    found = {name: _entry(file, real, name, entry, data) for name, entry in header.items()}
    end = max(((t.offset or 0) + (t.length or 0) for t in found.values()), default=data)
    if end > size:
        raise ModelError(f"{file} is truncated: it has {size} bytes where its header tells of {end}; download it again")
    if end < size:
        raise ModelError(f"{file} is damaged: it has {size} bytes where its header tells of {end}; download it again")
    return found


def _entry(file: Path, real: Path, name: str, entry: Any, data: int) -> MappedTensor:
    try:
        kind, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        good = isinstance(kind, str) and all(type(n) is int and n >= 0 for n in (*shape, begin, end)) and begin <= end
    except (TypeError, KeyError, ValueError):
        good = False
    if not good:
        raise ModelError(f"{file} isn't a safetensors file: its header's entry of {name} is {json.dumps(entry)[:80]}")
    if kind not in TYPES:
        raise ModelError(f"{file}: the tensor {name} is of the type {kind}, which isn't supported")
    needed = math.prod(shape) * int(TYPES[kind].itemsize)
    if end - begin != needed:
        raise ModelError(
            f"{file} is damaged: its tensor {name}, {kind} {list(shape)}, needs {needed} bytes, and its header "
            f"gives it {end - begin}"
        )
    return MappedTensor(
        real.name, data + begin, end - begin, TYPES[kind], shape=ir.Shape(shape), name=name, base_dir=real.parent
    )


def json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ModelError: It can't be read, or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"{path} isn't JSON ({first_line(error)})") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} is no JSON object")
    return found


def _several(files: Iterable[Path]) -> str:
    names = [file.name for file in files]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
