"""How large the elements of a value can be, proven from the graph.

A softmax, a normalization or a Tanh bounds what it gives whatever goes in, and sums and products of bounded values are
bounded. True for finite inputs of the model, and up to rounding, for which whoever uses a bound must leave room.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from graphopt.analysis.algebra import is_op
from graphopt.analysis.shapes import ShapeFacts
from graphopt.graph.constants import constant_array, constant_tensor

_MAX_ELEMENTS = 1 << 24
_DEEPEST = 64

# Of magnitude 1 at most, whatever goes in.
_UNIT = frozenset({"Tanh", "Erf", "Sin", "Cos", "Sigmoid", "HardSigmoid", "Softmax", "Sign", "Softsign", "Hardmax"})
# No larger than the first input.
_NO_LARGER = frozenset(
    {"Abs", "Cast", "Dropout", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Gelu", "Identity", "Neg",
      "ReduceMax", "ReduceMean", "ReduceMin", "Relu", "Reshape", "Slice", "Split", "Squeeze", "Swish", "Tile",
     "Transpose", "Unsqueeze"}
)  # fmt: skip
_LARGEST_OF_ALL = frozenset({"Concat", "Max", "Min", "Mean"})
_NORMS = frozenset({"LayerNormalization", "RMSNormalization"})


class Bounds:
    """Bounds of the magnitudes of the values of one model; each is found once."""

    def __init__(self, facts: ShapeFacts) -> None:
        self._facts = facts
        self._known: dict[ir.Value, float | None] = {}

    def of(self, value: ir.Value | None, depth: int = 0) -> float | None:
        """The largest magnitude that an element of `value` can have; None where nothing bounds it."""
        if value is None or depth > _DEEPEST:
            return None
        if value not in self._known:
            self._known[value] = None  # a cycle has no bound
            found = self._find(value, lambda operand: self.of(operand, depth + 1))
            self._known[value] = found if found is not None and math.isfinite(found) else None
        return self._known[value]

    def _find(self, value: ir.Value, bound: Callable[[ir.Value | None], float | None]) -> float | None:
        if constant_tensor(value) is not None:
            return _magnitude(value)
        node = value.producer()
        if node is None or node.domain not in ("", "ai.onnx") or any(a.is_ref() for a in node.attributes.values()):
            return None
        if value is not node.outputs[0] and node.op_type != "Split":
            return None
        if node.op_type in _UNIT:
            return 1.0
        if node.op_type == "Cast" and (value.dtype is None or not value.dtype.is_floating_point()):
            return None
        if node.op_type in _NO_LARGER:
            return bound(node.inputs[0]) if node.op_type != "Dropout" or len(node.inputs) < 3 else None
        if node.op_type == "Clip":
            limits = [_magnitude(v) for v in node.inputs[1:] if v is not None]
            numbers = [limit for limit in limits if limit is not None]
            return max(numbers) if len(numbers) == 2 else bound(node.inputs[0]) if not limits else None
        if node.op_type in _NORMS:
            return self._norm(node)
        if is_op(node, "Div"):
            divisor = constant_array(node.inputs[1], _MAX_ELEMENTS)
            least = 0.0 if divisor is None else float(np.abs(divisor.astype(np.float64)).min(initial=np.inf))
            return _times(bound(node.inputs[0]), 1 / least) if least > 0 else None
        if node.op_type in ("MatMul", "Gemm"):
            return self._product(node, bound)
        parts = [bound(v) for v in (node.inputs[1:] if node.op_type == "Where" else node.inputs)]
        numbers = [part for part in parts if part is not None]
        if len(numbers) < len(parts) or not numbers:
            return None
        if node.op_type in _LARGEST_OF_ALL or node.op_type == "Where":
            return max(numbers)
        if node.op_type in ("Add", "Sub", "Sum"):
            return sum(numbers)
        return numbers[0] * numbers[1] if node.op_type == "Mul" else None

    def _norm(self, node: ir.Node) -> float | None:
        """√N · max |γ| + max |β|: no element of a normalized vector of N is larger than √N."""
        axis = node.attributes.get("axis")
        shape = self._facts.shape(node.inputs[0])
        if shape is None or (axis is not None and axis.as_int() not in (-1, len(shape) - 1)):
            return None
        gain = _magnitude(node.inputs[1])
        shift = _magnitude(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else 0.0
        size = shape[-1].value
        return None if size is None or gain is None or shift is None else math.sqrt(size) * gain + shift

    def _product(self, node: ir.Node, bound: Callable[[ir.Value | None], float | None]) -> float | None:
        """|Σ a·b| ≤ the number of terms · max |a| · max |b|."""
        transposed = node.attributes.get("transA")
        shape = self._facts.shape(node.inputs[0])
        if not shape:
            return None
        terms = shape[-2 if transposed is not None and transposed.as_int() else -1].value
        left, right = bound(node.inputs[0]), bound(node.inputs[1])
        if terms is None or left is None or right is None:
            return None
        alpha, beta = node.attributes.get("alpha"), node.attributes.get("beta")
        product = terms * left * right * (1.0 if alpha is None else abs(alpha.as_float()))
        if len(node.inputs) < 3 or node.inputs[2] is None:
            return product
        added = _times(bound(node.inputs[2]), 1.0 if beta is None else abs(beta.as_float()))
        return None if added is None else product + added


def _times(number: float | None, factor: float) -> float | None:
    return None if number is None else number * factor


def _magnitude(value: ir.Value | None) -> float | None:
    array = constant_array(value, _MAX_ELEMENTS)
    if array is None or (array.dtype.kind not in "fiub" and array.dtype.name != "bfloat16"):
        return None
    if array.size == 0:
        return 0.0
    return max(abs(float(array.max())), abs(float(array.min())))
