"""Arithmetic in bfloat16 among float32: modules round a few numbers (ALiBi's slopes) that ONNX Runtime's CPU can't.

PyTorch computes such an operator in float32 and rounds its result, so a cast before and after is the same, bit for bit.
"""

from __future__ import annotations

import onnx_ir as ir

ARITHMETIC = {"Add", "Sub", "Mul", "Div", "Pow", "Neg", "Abs", "Exp", "Log", "Sqrt", "Reciprocal", "Min", "Max", "Sum"}


def compute_in_float(graph: ir.Graph) -> int:
    """Put casts around the arithmetic in bfloat16 of a graph; returns how many operators got them."""
    found = [
        node
        for node in graph
        if node.domain == "" and node.op_type in ARITHMETIC and node.outputs[0].dtype == ir.DataType.BFLOAT16
    ]
    for node in found:
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype == ir.DataType.BFLOAT16:
                wide = _cast(value, ir.DataType.FLOAT)
                graph.insert_before(node, wide)
                node.replace_input_with(index, wide.outputs[0])
        output = node.outputs[0]
        narrow = _cast(output, ir.DataType.BFLOAT16)
        graph.insert_after(node, narrow)
        ir.convenience.replace_all_uses_with(output, narrow.outputs[0], replace_graph_outputs=True)
        narrow.replace_input_with(0, output)  # which the line above took for a use like the others
        output.dtype = ir.DataType.FLOAT
        output.name, narrow.outputs[0].name = f"{output.name}.float", output.name
    return len(found)


def _cast(value: ir.Value, dtype: ir.DataType) -> ir.Node:
    node = ir.node("Cast", [value], {"to": int(dtype)})
    node.outputs[0].shape = value.shape
    node.outputs[0].dtype = dtype
    return node
