"""raise-one-hot: a product with a one-hot matrix as a lookup."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.algebra import attribute_int, cast_target, producer
from graphopt.graph.constants import constant_array, constant_tensor, scalar
from graphopt.graph.edits import Editor
from graphopt.passes.raise_.shape_rules import ShapeRulePass

MAX_ELEMENTS = 1 << 22
"""Elements of the largest table that is looked through for infinities and written again with a row of zeros."""

TYPES = (
    *(ir.DataType.INT8, ir.DataType.INT16, ir.DataType.INT32, ir.DataType.INT64),
    *(ir.DataType.UINT8, ir.DataType.UINT16),
)


@dataclasses.dataclass(frozen=True)
class _Encoding:
    """A one-hot encoding: the node that makes it, what is encoded, and the class of each column.

    `squeeze`: the indices have a last axis of 1 in the place of the classes. `wraps`: negative ones count from the end.
    """

    node: ir.Node
    indices: ir.Value
    dtype: ir.DataType
    classes: npt.NDArray[Any]
    squeeze: bool
    wraps: bool


class RaiseOneHot(ShapeRulePass):
    """Replace the product of a one-hot encoding with a constant matrix by a Gather of its rows.

    With the classes `v, v + 1, ..., v + n - 1` and a finite matrix W of n rows

        [i = v, i = v + 1, ...] W = W[i - v]   where i is one of the classes, else 0

    Frameworks without an embedding operator write a lookup so (JAX's `one_hot(i, n) @ W`, Keras' `CategoryEncoding`),
    and a runtime then multiplies mostly zeros: n multiplications for each number that is copied.

    1. The encoding is a comparison `Equal(i, classes)` of integers with a constant, made a float by `Cast` or by
       `Where(·, 1, 0)`, where the last axis of `i` is proven to be 1; or `OneHot` on the last axis with the values 0
       and 1.
    2. Integers that are no class give a row of zeros: `Clip` sends them to one behind the last row, or to -1, which
       Gather counts from the end. OneHot reads -n to -1 from the end as Gather does, and gives zeros beyond.

    **Needs:** a constant matrix without infinities and NaN (0 · inf is NaN, a lookup isn't), at most 4 million numbers;
    opset 13. **Guarantees:** the same numbers: what is added to a row is zeros only.

    **Left alone, with the reason:** classes that aren't consecutive; a matrix that isn't finite or is too large.

    **When not to use it:** never.
    """

    name: ClassVar[str] = "raise-one-hot"
    family: ClassVar[str] = "raise"
    anchors: ClassVar[tuple[str, ...]] = ("MatMul",)

    def rewrite(self, node: ir.Node, edit: Editor) -> bool:
        """See the class."""
        encoding, weight = node.inputs[0], node.inputs[1]
        if encoding is None or constant_tensor(weight) is None or edit.opset < 13:
            return False
        found = self._compared(encoding) or self._one_hot(encoding)
        if found is None:
            return False
        table = constant_array(weight, MAX_ELEMENTS)
        if table is None:
            return self.left(node, f"no lookup: the matrix has more than {MAX_ELEMENTS} elements")
        if table.ndim != 2 or table.shape[0] != len(found.classes):
            return False
        if not np.array_equal(found.classes, np.arange(len(found.classes)) + found.classes[0]):
            return self.left(node, "no lookup: the classes aren't consecutive integers")
        if not np.isfinite(table.astype(np.float64)).all():
            return self.left(node, "no lookup: the matrix holds infinities or NaN, which a product with 0 makes NaN")
        dtype = found.dtype if found.dtype in (ir.DataType.INT32, ir.DataType.INT64) else ir.DataType.INT32
        limits = np.iinfo(dtype.numpy())
        if found.classes[0] - 1 < limits.min or 2 * abs(found.classes[-1]) + 1 > limits.max:
            return self.left(node, f"no lookup: {dtype} doesn't hold the number beside the last class")
        self.applied(node, f"a lookup in {table.shape[0]} rows in place of a product with {found.node.op_type}")
        indices = found.indices
        if found.squeeze:
            indices = edit.op("Squeeze", [indices, edit.constant(np.array([-1], np.int64), "axis")])
        if dtype != found.dtype:
            indices = edit.op("Cast", [indices], {"to": int(dtype)})
        padded = np.concatenate([table, np.zeros((1, table.shape[1]), table.dtype)])
        rows = self._rows(found, indices, dtype, edit)
        lookup = edit.op("Gather", [edit.constant(padded, "table"), rows], {"axis": 0}, like=node.outputs[0])
        edit.replace(node.outputs[0], lookup)
        return True

    @staticmethod
    def _rows(found: _Encoding, indices: ir.Value, dtype: ir.DataType, edit: Editor) -> ir.Value:
        """The row of each index: its class, or the row of zeros, which is the last one."""

        def number(value: int, name: str) -> ir.Value:
            return edit.constant(np.array(value, dtype.numpy()), name)

        first, count = int(found.classes[0]), len(found.classes)
        if found.wraps:
            negative = edit.op("Less", [indices, number(0, "zero")])
            wrapped = edit.op("Add", [indices, number(count, "count")])
            indices = edit.op("Where", [negative, wrapped, indices])
        clipped = edit.op("Clip", [indices, number(first - 1, "low"), number(first + count, "high")])
        return clipped if first == 0 else edit.op("Sub", [clipped, number(first, "first")])

    def _compared(self, value: ir.Value) -> _Encoding | None:
        """A comparison with the classes, made a float."""
        made = producer(value, "Cast", "Where")
        if made is None:
            return None
        if made.op_type == "Cast":
            to = cast_target(made)
            if to is None or not to.is_floating_point():
                return None
        elif [scalar(v) for v in made.inputs[1:]] != [1.0, 0.0]:
            return None
        equal = producer(made.inputs[0], "Equal")
        for indices, classes in () if equal is None else (equal.inputs, reversed(equal.inputs)):
            array = constant_array(classes)
            if indices is None or array is None or array.dtype.kind not in "iu" or array.size < 2:
                continue
            shape, dtype = self.shape(indices), self.dtype(indices)
            ranks = [len(t.shape) for t in map(constant_tensor, (classes, *made.inputs[1:])) if t is not None]
            if not shape or shape[-1] != 1 or max(ranks) > len(shape) or array.size != array.shape[-1]:
                continue
            if dtype in TYPES:
                return _Encoding(made, indices, dtype, array.reshape(-1).astype(np.int64), True, False)
        return None

    def _one_hot(self, value: ir.Value) -> _Encoding | None:
        """A OneHot on the last axis."""
        node = producer(value, "OneHot")
        if node is None or node.inputs[0] is None or attribute_int(node, "axis", -1) != -1:
            return None
        depth, values, dtype = scalar(node.inputs[1]), constant_array(node.inputs[2], 2), self.dtype(node.inputs[0])
        if depth is None or depth < 1 or values is None or values.tolist() != [0, 1] or dtype not in TYPES:
            return None
        return _Encoding(node, node.inputs[0], dtype, np.arange(int(depth)), False, True)
