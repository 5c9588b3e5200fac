"""A fault of ONNX Runtime's that sessions have to know: MatMulNBits that multiplies by nothing.

Where `MatMulNBits` rounds activations (`accuracy_level` 4), ONNX Runtime 1.31 rearranges its weight when the session is
made, together with the scales. Scales that are computed from constants, as a Cast of float16, aren't there then unless
ONNX Runtime folds them first: without its optimizations (`ORT_DISABLE_ALL`) such products give nonsense, silently.
"""

from __future__ import annotations

import onnx_ir as ir

from graphopt.graph.edits import nodes

NO_PREPACKING = "session.disable_prepacking"
"""The session configuration entry that keeps products right where nothing is folded ("1"); they are slower then."""


def needs_folding(model: ir.Model) -> bool:
    """Whether `model` has products that ONNX Runtime computes wrongly where it folds no constants."""
    for node in nodes(model):
        if node.op_type != "MatMulNBits" or node.domain != "com.microsoft":
            continue
        scales = node.inputs[2] if len(node.inputs) > 2 else None
        level = node.attributes.get("accuracy_level")
        if scales is None or level is None or level.is_ref() or level.as_int() < 4:
            continue
        maker = scales.producer()
        if maker is not None and maker.op_type != "Constant":
            return True
    return False
