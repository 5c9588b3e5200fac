"""expand-swish: `Swish` becomes Sigmoid and Mul."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.graph.edits import Editor
from graphopt.passes.base import RulePass


class ExpandSwish(RulePass):
    """Write `Swish` as the two or three operators it stands for.

        Swish(x) = x · Sigmoid(α x)

    Paper: Searching for Activation Functions (Ramachandran, Zoph, Le, 2017).

    For runtimes without a kernel for `Swish` (opset 24). ONNX Runtime 1.31 has none on CPU; it takes the operator
    apart itself, but too late for its own fusions (YOLOv8n: 1.20 times the time of the expanded graph). The product
    with α is left out where α is 1.

    **Needs:** nothing. **Guarantees:** the same function.

    **When not to use it:** where the runtime has a kernel for `Swish`.
    """

    name: ClassVar[str] = "expand-swish"
    family: ClassVar[str] = "lower"
    paper: ClassVar[str] = "Searching for Activation Functions"
    anchors: ClassVar[tuple[str, ...]] = ("Swish",)

    def rewrite(self, node: ir.Node, edit: Editor) -> bool:
        """See the class."""
        x, old = node.inputs[0], node.outputs[0]
        attribute = node.attributes.get("alpha")
        if attribute is not None and attribute.is_ref():
            return self.left(node, "alpha is set by the caller of its function: inline functions first")
        assert x is not None
        alpha = 1.0 if attribute is None else attribute.as_float()
        scaled = x
        if alpha != 1.0:
            dtype = x.dtype or old.dtype
            factor = edit.constant(np.asarray(alpha, dtype=np.float32 if dtype is None else dtype.numpy()), "alpha")
            if dtype is None:
                factor = edit.op("CastLike", [factor, x])
            scaled = edit.op("Mul", [x, factor], like=x)
        gate = edit.op("Sigmoid", [scaled], like=x)
        edit.replace(old, edit.op("Mul", [x, gate], like=old))
        return self.applied(node, "x · Sigmoid(x)" if alpha == 1.0 else f"x · Sigmoid({alpha:g} x)")
