"""Checkpoints whose weights are quantized, as far as transformers can make floating-point weights of them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx_ir as ir

from graphopt.errors import UsageError
from graphopt.export.dependencies import quiet, require
from graphopt.export.safetensors_files import json_object

NARROW = {
    ir.DataType.FLOAT8E4M3FN,
    ir.DataType.FLOAT8E4M3FNUZ,
    ir.DataType.FLOAT8E5M2,
    ir.DataType.FLOAT8E5M2FNUZ,
    ir.DataType.FLOAT8E8M0,
    ir.DataType.INT8,
    ir.DataType.UINT8,
}
"""Types of quantized numbers, which mean nothing without their scales."""


def dequantizer(folder: Path, module: Any) -> Any:
    """transformers' quantizer for a folder's weights, set to make floating-point weights; None where they are so.

    Raises:
        UsageError: They are quantized in a way that transformers can't undo while it loads them.
    """
    settings = getattr(getattr(module, "config", None), "quantization_config", None)
    if settings is None and (folder / "config.json").is_file():
        settings = json_object(folder / "config.json").get("quantization_config")
    if settings is None:
        return None
    held = settings if isinstance(settings, dict) else settings.to_dict()
    try:
        quantizers = require("transformers.quantizers.auto")
        with quiet():
            made = quantizers.AutoHfQuantizer.from_config({**held, "dequantize": True}, pre_quantized=True)
        able = getattr(made.quantization_config, "dequantize", False)
    except Exception:  # An unknown method, or one whose library isn't there.
        able = False
    if not able:
        raise refusal(folder, held)
    return made


def require_dequantized(folder: Path, tensors: Iterable[ir.TensorProtocol], settings: Any) -> None:
    """Refuse weights that have stayed quantized, as they do where transformers finds no scales for them.

    Raises:
        UsageError: There are such weights.
    """
    if any(tensor.dtype in NARROW for tensor in tensors):
        raise refusal(folder, settings if isinstance(settings, dict) else settings.to_dict())


def refusal(folder: Path, settings: dict[str, Any]) -> UsageError:
    """The error that says which way of quantization can't be read."""
    method = settings.get("quant_method") or "an unnamed method"
    return UsageError(
        f"{folder} holds weights that are quantized with {getattr(method, 'value', method)}, which can't be made "
        "floating-point here; give the folder of the model before it was quantized, or a GGUF file"
    )
