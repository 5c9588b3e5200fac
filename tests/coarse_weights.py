"""Models made worse on purpose: their weights rounded to few levels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from graphopt.graph.load import load
from graphopt.graph.save import save


def coarsened(source: Path, target: Path, bits: int) -> Path:
    """A copy of a model whose float weights of two axes and more, but for embeddings, lie on a symmetric grid for each
    tensor."""
    model = load(source)
    constants = [node for node in model.graph if node.op_type == "Constant" and "value" in node.attributes]
    embeddings = {node.inputs[0] for node in model.graph.all_nodes() if node.op_type == "Gather"}
    for value in model.graph.initializers.values():
        if value.const_value is not None and _is_weight(value.const_value) and value not in embeddings:
            value.const_value = ir.tensor(_rounded(value.const_value.numpy(), bits), name=value.name)
    for node in constants:
        tensor = node.attributes["value"].as_tensor()
        if _is_weight(tensor):
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(_rounded(tensor.numpy(), bits)))
    save(model, target)
    return target


def _is_weight(tensor: ir.TensorProtocol) -> bool:
    return tensor.dtype == ir.DataType.FLOAT and len(tensor.shape) > 1 and tensor.size > 256


def _rounded(array: np.ndarray, bits: int) -> np.ndarray:
    step = np.abs(array).max() / (2 ** (bits - 1) - 1)
    return (np.round(array / step) * step).astype(np.float32)
