"""Tensors between onnx_ir and PyTorch without copies."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from graphopt.export.dependencies import require

NAMES = {
    ir.DataType.BOOL: "bool",
    ir.DataType.UINT8: "uint8",
    ir.DataType.INT8: "int8",
    ir.DataType.UINT16: "uint16",
    ir.DataType.INT16: "int16",
    ir.DataType.UINT32: "uint32",
    ir.DataType.INT32: "int32",
    ir.DataType.UINT64: "uint64",
    ir.DataType.INT64: "int64",
    ir.DataType.FLOAT8E4M3FN: "float8_e4m3fn",
    ir.DataType.FLOAT8E4M3FNUZ: "float8_e4m3fnuz",
    ir.DataType.FLOAT8E5M2: "float8_e5m2",
    ir.DataType.FLOAT8E5M2FNUZ: "float8_e5m2fnuz",
    ir.DataType.FLOAT8E8M0: "float8_e8m0fnu",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.FLOAT: "float32",
    ir.DataType.DOUBLE: "float64",
    ir.DataType.COMPLEX64: "complex64",
}
"""torch's name of each type."""


def torch_dtype(dtype: ir.DataType) -> Any:
    """The torch.dtype of a type."""
    return getattr(require("torch"), NAMES[dtype])


def ir_dtype(dtype: Any) -> ir.DataType:
    """The type of a torch.dtype."""
    return _BY_NAME[str(dtype).removeprefix("torch.")]


_BY_NAME = {name: dtype for dtype, name in NAMES.items()}


def as_torch(tensor: ir.TensorProtocol) -> Any:
    """A torch tensor of the same numbers.

    One that lies in a file is mapped: its pages are read when they are touched, and copied when they are written to,
    so that the file never changes.
    """
    torch = require("torch")
    dtype, shape = torch_dtype(tensor.dtype), tensor.shape.numpy()
    if tensor.size == 0:
        return torch.empty(shape, dtype=dtype)
    if isinstance(tensor, ir.ExternalTensor):
        offset = tensor.offset or 0
        raw: Any = np.memmap(tensor.path, np.uint8, mode="c", offset=offset, shape=(tensor.nbytes,))
        if offset % tensor.dtype.itemsize:
            raw = np.array(raw)  # torch takes unaligned memory for an error of its own.
    else:
        array = np.ascontiguousarray(tensor.numpy())
        raw = (array if array.flags.writeable else array.copy()).reshape(-1).view(np.uint8)
    return torch.from_numpy(raw).view(dtype).reshape(shape)


def as_array(tensor: Any) -> Any:
    """The NumPy array of a torch tensor in memory, of an ml_dtypes type where NumPy has none."""
    kind = ir_dtype(tensor.dtype).numpy()
    tensor = tensor.detach().contiguous()
    if kind.kind == "V" or kind == ml_dtypes.bfloat16 or kind.itemsize == 1:
        torch = require("torch")
        return tensor.view({1: torch.uint8, 2: torch.int16}[kind.itemsize]).numpy().view(kind)
    return tensor.numpy()
