"""Writes the integer operators that stand for float weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphopt.export.gguf.quantized import Rows
from graphopt.graph.edits import Editor
from graphopt.runtime_ops.block_products import BlockMatrix, BlockProducts, Inputs

Product = tuple[ir.Node, ir.Value, Rows, ir.Value]
"""A MatMul or Gemm, the value that it multiplies, the rows of its weight, and the weight."""


class Writer:
    """Writes operators into a graph; each stored matrix becomes one set of initializers, however often it is read.

    Args:
        edit: The graph's editor.
        inputs: What the operators make of their inputs.
    """

    def __init__(self, edit: Editor, inputs: Inputs) -> None:
        self.edit, self.inputs = edit, inputs
        self._products = BlockProducts(edit)
        self._matrices: dict[tuple[int | bytes, ...], BlockMatrix] = {}

    def size(self, rows: Rows) -> int:
        """Bytes of the initializers of these rows."""
        grid, numbers = rows.grid, rows.count * rows.length
        each = 2 if grid.half else 4
        # With 8 bits MatMulNBits has its scales in float32.
        scale = 4 if grid.bits == 8 and self.inputs != "int16" else each
        offset = 0 if grid.minimums is None else each
        return numbers * grid.bits // 8 + numbers // grid.block * (scale + offset)

    def matrices(self, products: Sequence[Product]) -> None:
        """Replace products that have one input by one operator, and a Split where they are several."""
        first, source, rows, _ = products[0]
        if len(products) > 1:
            rows = Rows(tuple(part for _, _, r, _ in products for part in r.parts))
        self.edit.at(first)
        matrix = self._matrix(rows, products[0][3].name or "weight")
        result = self._products.multiply(source, matrix, self.inputs)
        parts = [result]
        if len(products) > 1:
            widths = self.edit.constant(np.array([r.count for _, _, r, _ in products], np.int64), "widths")
            split = self.edit.op("Split", [result, widths], {"axis": -1}, outputs=len(products))
            producer = split.producer()
            assert producer is not None
            parts = list(producer.outputs)
        for (node, _, _, _), part in zip(products, parts, strict=True):
            old = node.outputs[0]
            part.type, part.shape = old.type, old.shape
            if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
                self.edit.at(node)
                part = self.edit.op("Add", [part, node.inputs[2]], like=old)
            self.edit.replace(old, part)

    def gather(self, node: ir.Node, rows: Rows, weight: ir.Value) -> None:
        """Replace the Gather of an embedding."""
        self.edit.at(node)
        indices, old = node.inputs[1], node.outputs[0]
        assert indices is not None
        matrix = self._matrix(rows, weight.name or "weight")
        self.edit.replace(old, self._products.gather(matrix, indices, like=old))

    def _matrix(self, rows: Rows, name: str) -> BlockMatrix:
        key = tuple(part for stored, at in rows.parts for part in (stored.offset, at.tobytes()))
        if key not in self._matrices:
            fresh, initializer, grid = self.edit.names.fresh, self._products.initializer, rows.grid
            minimums = rows.minimums(fresh(f"{name}.minimums"))
            self._matrices[key] = BlockMatrix(
                grid.bits,
                grid.block,
                initializer(rows.integers(fresh(f"{name}.integers"))),
                initializer(rows.scales(fresh(f"{name}.scales"))),
                minimums=None if minimums is None else initializer(minimums),
                # The integers were moved for an operator whose zero is the middle.
                moved=2 ** (grid.bits - 1) - grid.middle,
            )
        return self._matrices[key]
