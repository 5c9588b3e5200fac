"""fold-lookup: what is done to each row behind a lookup is done to the table once."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from graphopt.analysis.algebra import attribute_int, producer
from graphopt.graph.constants import constant_tensor
from graphopt.graph.edits import Editor
from graphopt.passes.raise_.shape_rules import ShapeRulePass

UNARY = (
    *(
        "Abs",
        "Elu",
        "Erf",
        "Exp",
        "Gelu",
        "HardSigmoid",
        "HardSwish",
        "LeakyRelu",
        "Neg",
        "Relu",
        "Sigmoid",
        "Softplus",
    ),
    *("Swish", "Tanh"),
)
BINARY = ("Add", "Div", "Mul", "Sub")
TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)
MAX_ELEMENTS = 1 << 18
"""Elements of the largest table through which a function is computed now: that takes a second with the slowest."""


class FoldLookup(ShapeRulePass):
    """Move elementwise operators from behind a Gather of a constant table to the table, where they are constant.

    For a function f of single numbers, and a constant c that is the same for every row

        f(T[i]) = f(T)[i]        T[i] + c = (T + c)[i]

    The operator then has constant inputs only, and [fold-constants](fold-constants.md) computes it. A lookup that has
    become a chain of bias and activation (see [raise-one-hot](raise-one-hot.md)) is a lookup again.

    1. A unary operator that is the Gather's only reader changes places with it.
    2. So does `Add`, `Sub`, `Mul` or `Div` with a constant that has no more axes than a row, leading axes of 1 apart.

    **Needs:** a table that nothing else reads (a tied one would have to be stored twice), gathered along its first
    axis, of at most 262,144 numbers. **Guarantees:** the same numbers as the operator gives, up to its rounding.

    **Left alone, with the reason:** a table that is too large or has other readers. Tables of bfloat16, which
    fold-constants doesn't compute, aren't looked at.

    **When not to use it:** never.
    """

    name: ClassVar[str] = "fold-lookup"
    family: ClassVar[str] = "fold"
    anchors: ClassVar[tuple[str, ...]] = (*UNARY, *BINARY)

    def prepare(self, model: ir.Model, edit: Editor) -> None:
        """Forget the tables of another model."""
        super().prepare(model, edit)
        self._computed: dict[ir.Value, ir.TensorProtocol] = {}

    def rewrite(self, node: ir.Node, edit: Editor) -> bool:
        """See the class."""
        if node.op_type in UNARY:
            places = [0] if len(node.inputs) == 1 else []
        else:
            places = [i for i in (0, 1) if constant_tensor(node.inputs[1 - i]) is not None]
        gather = producer(node.inputs[places[0]], "Gather") if len(places) == 1 else None
        if gather is None or attribute_int(gather, "axis", 0) != 0 or any(a.is_ref() for a in node.attributes.values()):
            return False
        table, indices, rows = gather.inputs[0], gather.inputs[1], gather.outputs[0]
        if table is None or indices is None:
            return False
        tensor = constant_tensor(table) or self._computed.get(table)
        if tensor is None or tensor.dtype not in TYPES:
            return False
        if constant_tensor(indices) is not None or len(rows.uses()) != 1 or rows.is_graph_output():
            return False
        if tensor.size > MAX_ELEMENTS:
            return self.left(node, f"not moved to the table: it has more than {MAX_ELEMENTS} elements")
        if len(table.uses()) != 1 or table.is_graph_output():
            return self.left(node, "not moved to the table: something else reads the table too")
        operand = None
        if node.op_type in BINARY:
            operand = self._row(node.inputs[1 - places[0]], tensor, indices, edit)
            if operand is None:
                return False
        self.applied(node, f"computed on the {tensor.shape[0]} rows of the table")
        inputs = [table] if operand is None else [table, operand] if places[0] == 0 else [operand, table]
        computed = edit.op(node.op_type, inputs, {a.name: a.value for a in node.attributes.values()})
        computed.type, computed.shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
        self._computed[computed] = tensor  # of the same shape and type, which is all that is asked of it
        edit.replace(node.outputs[0], edit.op("Gather", [computed, indices], {"axis": 0}, like=node.outputs[0]))
        return True

    def _row(
        self, constant: ir.Value | None, table: ir.TensorProtocol, indices: ir.Value, edit: Editor
    ) -> ir.Value | None:
        """The constant with the axes of a row; None where it isn't the same for every row, or widens the rows."""
        tensor = constant_tensor(constant)
        assert tensor is not None
        shape, row = list(tensor.shape.numpy()), list(table.shape.numpy())[1:]
        rank = self.rank(indices)
        surplus = max(0, len(shape) - len(row))
        if any(d != 1 for d in shape[:surplus]) or (surplus and (rank is None or surplus > rank)):
            return None
        kept = shape[surplus:]
        if any(d not in (1, n) for d, n in zip(kept[::-1], row[::-1], strict=False)):
            return None
        return constant if not surplus else edit.constant(tensor.numpy().reshape(kept), "row")
