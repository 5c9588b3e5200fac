"""What is constant in a graph, and its numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

AT_LOAD = "graphopt.at_load"
"""Metadata key of nodes on constants that were written to be computed when a session is loaded."""


def left_for_load(node: ir.Node) -> bool:
    """Whether a node on constants isn't to be computed before: the file is smaller by what it gives.

    Sessions with their usual optimizations compute it once. `graphopt.graph.edits.Editor.for_load` writes such nodes.
    """
    return AT_LOAD in node.metadata_props


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor behind `value` where it can never change, else None.

    An initializer that is also a graph input can be overridden by the caller and is therefore no constant
    (`graphopt.graph.load` has already made those of IR versions below 4, which can't be, plain initializers).
    """
    if value is None or value.is_graph_input():
        return None
    if value.is_initializer():
        return value.const_value
    node = value.producer()
    if node is None or node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
        return None
    if any(a.is_ref() or a.type == ir.AttributeType.SPARSE_TENSOR for a in node.attributes.values()):
        return None
    if value.const_value is None and len(node.attributes) == 1 and (held := node.attributes.get("value")) is not None:
        # As onnx_ir does below, without its check of the type against a protocol, which takes 20 us.
        tensor: ir.TensorProtocol = held.value
        tensor.name = value.name
        return tensor
    return ir.convenience.get_const_tensor(value)


def constant_array(value: ir.Value | None, max_elements: int = 1 << 20) -> npt.NDArray[Any] | None:
    """The numbers of a constant of at most `max_elements` elements, else None. Don't write into the array."""
    tensor = constant_tensor(value)
    if tensor is None or tensor.size > max_elements or tensor.dtype == ir.DataType.STRING:
        return None
    return tensor.numpy()


def scalar(value: ir.Value | None) -> float | None:
    """The number of a constant that holds one element (of any rank), else None."""
    array = constant_array(value, 1)
    if array is None or array.size != 1 or (array.dtype.kind not in "fiub" and array.dtype.name != "bfloat16"):
        return None
    return float(np.asarray(array, dtype=np.float64).reshape(()))


def is_constant(value: ir.Value | None) -> bool:
    """Whether `value` can never change."""
    return constant_tensor(value) is not None


def stored_weight(value: ir.Value | None) -> ir.Value | None:
    """The constant behind `value`: itself, or what a DequantizeLinear makes it of; None where it isn't constant."""
    node = None if value is None else value.producer()
    if node is not None and node.op_type == "DequantizeLinear" and node.domain in ("", "ai.onnx", "com.microsoft"):
        value = node.inputs[0]
    return value if is_constant(value) else None


def initializer_bytes(model: ir.Model) -> int:
    """Bytes of the initializers of the main graph."""
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)


def is_nothing(value: ir.Value | None) -> bool:
    """Whether a value is the empty constant by which an operator of graphopt's is told that an input isn't there."""
    tensor = None if value is None else constant_tensor(value)
    return tensor is not None and tensor.size == 0
