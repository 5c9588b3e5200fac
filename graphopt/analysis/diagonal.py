"""Square matrices with one number on the diagonal and another everywhere else, however a graph makes them.

The identity is such a matrix, and so is the mask of an attention in which each token sees itself alone: a constant,
`EyeLike`, a range compared with itself, and whatever arithmetic makes of them. `Diagonals.of` computes the two numbers
by doing to them what the graph does to the matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.algebra import cast_target, is_op, producer, same
from graphopt.analysis.dims import Dim
from graphopt.analysis.shapes import ShapeFacts
from graphopt.graph.constants import constant_array, constant_tensor

Two = npt.NDArray[Any]
"""The number on the diagonal and the other, in the type of the value."""

_MAX_ELEMENTS = 1 << 24
_DEEPEST = 16

_ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": np.divide, "Neg": np.negative,
    "Not": np.logical_not, "And": np.logical_and, "Or": np.logical_or, "Xor": np.logical_xor, "Equal": np.equal,
    "Greater": np.greater, "Less": np.less, "GreaterOrEqual": np.greater_equal, "LessOrEqual": np.less_equal,
    "Where": np.where, "Abs": np.abs, "Max": np.maximum, "Min": np.minimum,
}  # fmt: skip
_VIEWS = ("Identity", "Unsqueeze", "Squeeze", "Reshape", "Expand")


class Diagonals:
    """The matrices of one model that are known to have this form."""

    def __init__(self, facts: ShapeFacts) -> None:
        self._facts = facts
        self._known: dict[ir.Value, Two | None] = {}

    def of(self, value: ir.Value | None, depth: int = 0) -> Two | None:
        """The two numbers of `value`: of its last two axes, in all matrices alike; equal ones say nothing of its shape.

        Where they differ the matrix is square, in every run. None where nothing is known.
        """
        if value is None or depth > _DEEPEST:
            return None
        if value not in self._known:
            self._known[value] = None
            self._known[value] = self._find(value, depth)
        return self._known[value]

    def size(self, value: ir.Value) -> Dim | None:
        """The rows of a matrix that is known to be square."""
        shape = self._facts.shape(value)
        return shape[-1] if shape is not None and len(shape) >= 2 and shape[-1] == shape[-2] else None

    def _find(self, value: ir.Value, depth: int) -> Two | None:
        if constant_tensor(value) is not None:
            return _of_constant(value)
        node = value.producer()
        if node is None or node.domain not in ("", "ai.onnx") or any(a.is_ref() for a in node.attributes.values()):
            return None
        if node.op_type == "EyeLike":
            return self._eye(node)
        if node.op_type == "ConstantOfShape":
            filled = node.attributes.get("value")
            number = np.zeros(1, np.float32) if filled is None else filled.as_tensor().numpy()
            return np.repeat(number.reshape(-1), 2)
        if node.op_type == "Equal" and self._same_positions(node):
            return np.array([True, False])
        if node.op_type in _VIEWS or node.op_type == "Cast":
            two = self.of(node.inputs[0], depth + 1)
            if two is None or not self._keeps(node, [two]):
                return None
            if node.op_type != "Cast":
                return two
            to = cast_target(node)
            with np.errstate(all="ignore"):
                return None if to is None or to == ir.DataType.STRING else two.astype(to.numpy())
        if node.op_type not in _ELEMENTWISE or (node.op_type in ("Max", "Min") and len(node.inputs) != 2):
            return None
        operands = [self.of(v, depth + 1) for v in node.inputs]
        known = [two for two in operands if two is not None]
        if len(known) < len(operands) or not self._keeps(node, known):
            return None
        with np.errstate(all="ignore"):
            return np.asarray(_ELEMENTWISE[node.op_type](*known))

    def _keeps(self, node: ir.Node, operands: list[Two]) -> bool:
        """Whether the matrices that aren't uniform have the last two axes of the result (a 1 × 1 could be widened)."""
        result = self._facts.shape(node.outputs[0])
        for value, two in zip(node.inputs, operands, strict=False):
            if _uniform(two):
                continue
            shape = self._facts.shape(value)
            if shape is None or result is None or len(result) < 2 or shape[-2:] != result[-2:]:
                return False
        return True

    def _eye(self, node: ir.Node) -> Two | None:
        offset, dtype = node.attributes.get("k"), self._facts.dtype(node.outputs[0])
        if (offset is not None and offset.as_int() != 0) or dtype is None or self.size(node.outputs[0]) is None:
            return None
        return np.array([1, 0]).astype(dtype.numpy())

    def _same_positions(self, node: ir.Node) -> bool:
        """Whether a column of different numbers is compared with the row of the same numbers."""
        result = self._facts.shape(node.outputs[0])
        if result is None or len(result) < 2 or result[-1] != result[-2]:
            return False
        bases = []
        for value, axis in zip(node.inputs, self._axes(node), strict=True):
            shape = self._facts.shape(value)
            if value is None or shape is None or axis is None:
                return False
            if shape[axis] != result[-1] or any(
                dim.value != 1 for i, dim in enumerate(shape) if i != len(shape) + axis
            ):
                return False
            bases.append(_base(value))
        return bases[0] is not None and bases[1] is not None and self._equal_ranges(bases[0], bases[1])

    def _axes(self, node: ir.Node) -> tuple[int | None, int | None]:
        """The axis along which each of the two operands runs: one along the rows, one along the columns."""
        shapes = [self._facts.shape(v) for v in node.inputs]
        column = [shape is not None and len(shape) >= 2 and shape[-1].value == 1 for shape in shapes]
        return (-2, -1) if column[0] else (-1, -2) if column[1] else (None, None)

    def _equal_ranges(self, a: ir.Value, b: ir.Value) -> bool:
        left, right = constant_array(a), constant_array(b)
        if left is not None and right is not None:
            equal = np.array_equal(left.reshape(-1), right.reshape(-1))
            return left.dtype.kind in "iu" and equal and len(np.unique(left)) == left.size
        first, second = producer(a, "Range"), producer(b, "Range")
        dtype = self._facts.dtype(a)
        if first is None or second is None or dtype is None or dtype.is_floating_point():
            return False
        step = constant_array(first.inputs[2], 1)
        if step is None or not step.any():
            return False
        return first is second or all(
            same(x, y) or (_number(x) is not None and _number(x) == _number(y))
            for x, y in zip(first.inputs, second.inputs, strict=True)
        )


def _uniform(two: Two) -> bool:
    return bool(two[0] == two[1])


def _number(value: ir.Value | None) -> int | None:
    array = constant_array(value, 1)
    return None if array is None or array.size != 1 or array.dtype.kind not in "iu" else int(array.reshape(()))


def _base(value: ir.Value) -> ir.Value | None:
    """What a value is a view of; a cast between integers changes no number that a range of sizes can hold."""
    while (node := value.producer()) is not None and is_op(node, "Identity", "Unsqueeze", "Reshape", "Squeeze"):
        if node.inputs[0] is None:
            return None
        value = node.inputs[0]
    return value


def _of_constant(value: ir.Value) -> Two | None:
    array = constant_array(value, _MAX_ELEMENTS)
    if array is None or array.size == 0 or array.dtype.kind not in "fiub":
        return None
    first = array.reshape(-1)[0]
    if array.size == 1:
        return np.array([first, first])
    if array.ndim < 2 or array.shape[-1] != array.shape[-2] or array.shape[-1] < 2:
        return np.array([first, first]) if bool((array == first).all()) else None
    rest = array.reshape(-1)[1]
    here = np.eye(array.shape[-1], dtype=bool)
    # A look at the first row, so that a weight isn't read to its end for nothing.
    if not (array.reshape(-1, array.shape[-1])[0, 1:] == rest).all():
        return None
    return np.array([first, rest]) if bool((array == np.where(here, first, rest)).all()) else None
