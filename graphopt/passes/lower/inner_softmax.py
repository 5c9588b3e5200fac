"""inner-softmax: a softmax over an inner axis is written so that ONNX Runtime needn't swap axes element by element."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.graph.edits import Editor
from graphopt.passes.raise_.shape_rules import ShapeRulePass

OPSET = 18
_POSITIONS = 256


class InnerSoftmax(ShapeRulePass):
    """Write `Softmax` and `LogSoftmax` over an axis that isn't the last in the form that is faster on CPU.

    ONNX Runtime's CPU kernel swaps the axis with the last one, and back. Where the two are neighbours that is a fast
    transpose, else one element at a time. With x of shape [..., C, t₁, t₂, ...]:

    1. C ≤ `few` → m = max(x), e = exp(x − m), y = e / Σ e, each over the axis (`Softmax` alone).
    2. Two axes or more behind C → Reshape to [..., C, t₁ · t₂ · ...], the operator, Reshape back.

    Measured on ONNX Runtime 1.31 (1 and 2 threads), time over that of the operator as it was: rule 1 at [1, 3, 96, 96]
    0.25, [2, 2, 256, 256] 0.07, [1, 4, 1000] 0.76; rule 2 at [1, 16, 4, 8400] (YOLOv8's boxes) 0.24, [1, 21, 128, 128]
    0.26, [1, 80, 40, 40] 0.24, [1, 4, 4, 4] 1.0.

    **Options:** `few` (elements, default 4): up to how many the softmax is taken apart, which `raise-softmax` with the
    same option leaves so; 0: never. From 8 on both rules are equally fast.

    **Needs:** the rank of x; for rule 1 the length of the axis, and float32. **Guarantees:** the same function; rule 2
    the same numbers, bit for bit.

    **Left alone, with the reason:** an x of unknown rank. Without a reason: the last axis; the one before it with more
    than `few` elements; fewer than 256 positions behind a short axis, where five operators take longer than one.

    **Targets:** cpu.

    **When not to use it:** for other providers.
    """

    name: ClassVar[str] = "inner-softmax"
    family: ClassVar[str] = "lower"
    targets: ClassVar[tuple[str, ...]] = ("cpu",)
    anchors: ClassVar[tuple[str, ...]] = ("Softmax", "LogSoftmax")

    def __init__(self, few: int = 4) -> None:
        super().__init__()
        self.few = few

    def rewrite(self, node: ir.Node, edit: Editor) -> bool:
        """See the class."""
        x, attribute = node.inputs[0], node.attributes.get("axis")
        axis = -1 if attribute is None else None if attribute.is_ref() else attribute.as_int()
        # Below opset 18 the reductions take their axes in other ways, and below 13 the operator means something else.
        if x is None or axis is None or axis == -1 or edit.opset < OPSET:
            return False
        shape = self._facts.shape(x)
        if shape is None:
            return self.left(node, f"it is over axis {axis} of a tensor whose rank isn't known")
        axis %= len(shape)
        sizes = [dim.value for dim in shape]
        behind = sizes[axis + 1 :]
        length, positions = sizes[axis], math.prod(size for size in behind if size is not None)
        many = positions >= _POSITIONS or None in behind
        if not behind:
            return False
        few = node.op_type == "Softmax" and length is not None and length <= self.few
        if few and many and self.dtype(x) == ir.DataType.FLOAT:
            return self._take_apart(node, x, axis, edit)
        return len(behind) > 1 and 0 not in behind and self._flatten(node, x, axis, sizes, edit)

    def _take_apart(self, node: ir.Node, x: ir.Value, axis: int, edit: Editor) -> bool:
        over = edit.constant(np.array([axis], dtype=np.int64), "axis")
        # Its parts are named after their operators; the shapes are those of x, or x with one element on the axis.
        shifted = edit.op("Sub", [x, edit.op("ReduceMax", [x, over])], like=x)
        exponential = edit.op("Exp", [shifted], like=x)
        old = node.outputs[0]
        edit.replace(old, edit.op("Div", [exponential, edit.op("ReduceSum", [exponential, over])], like=old))
        return self.applied(node, f"taken apart: few elements on the inner axis {axis}")

    def _flatten(self, node: ir.Node, x: ir.Value, axis: int, sizes: list[int | None], edit: Editor) -> bool:
        old, behind = node.outputs[0], sizes[axis + 1 :]
        # −1 for the product would fail where another size is 0, and a size of 0 written out means a copied one.
        literal = None in behind
        if not literal:
            flat = edit.constant(np.array([0] * (axis + 1) + [math.prod(s or 0 for s in behind)], np.int64), "flat")
        else:
            front = edit.op("Shape", [x], {"end": axis + 1})
            last = edit.op("ReduceProd", [edit.op("Shape", [x], {"start": axis + 1})], {"keepdims": 1})
            flat = edit.op("Concat", [front, last], {"axis": 0})
        rows = edit.op("Reshape", [x, flat], {"allowzero": 1 if literal else None})
        inner = edit.op(node.op_type, [rows], {"axis": axis})
        edit.replace(old, edit.op("Reshape", [inner, edit.op("Shape", [x])], {"allowzero": 1}, like=old))
        return self.applied(node, f"the {len(behind)} axes behind axis {axis} as one")
