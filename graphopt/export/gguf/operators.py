"""Writes the integer operators that stand for float weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphopt.export.gguf.quantized import Rows
from graphopt.graph.edits import Editor

_MICROSOFT = "com.microsoft"

Product = tuple[ir.Node, ir.Value, Rows, ir.Value]
"""A MatMul or Gemm, the value that it multiplies, the rows of its weight, and the weight."""


class Writer:
    """Writes operators into a graph; each stored matrix becomes one set of initializers, however often it is read.

    Args:
        edit: The graph's editor.
        level: `accuracy_level` of MatMulNBits.
    """

    def __init__(self, edit: Editor, level: int) -> None:
        self.edit, self.level = edit, level
        self._sets: dict[tuple[int, ...], _Set] = {}
        self._sums: dict[tuple[ir.Value, int], ir.Value] = {}

    def size(self, rows: Rows) -> int:
        """Bytes of the initializers of these rows."""
        grid, numbers = rows.grid, rows.count * rows.length
        floats = 1 if grid.minimums is None else 2
        return numbers * grid.bits // 8 + floats * numbers // grid.block * (2 if grid.half else 4)

    def matrices(self, products: Sequence[Product]) -> None:
        """Replace products that have one input by one operator, and a Split where they are several."""
        first, source, rows, _ = products[0]
        if len(products) > 1:
            rows = Rows(tuple(part for _, _, r, _ in products for part in r.parts))
        self.edit.at(first)
        result = self._multiply(first, source, rows, products[0][3].name or "weight")
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
        made = self._set(rows, weight.name or "weight")
        grid, indices, old = rows.grid, node.inputs[1], node.outputs[0]
        # As [rows, blocks, block]: so the integers are the same initializer as the head's.
        columns = rows.length // grid.block
        shape = self.edit.constant(np.array([rows.count, columns, 1], np.int64), "by_block")
        attributes = {"bits": grid.bits, "block_size": grid.block, "gather_axis": 0, "quantize_axis": 2}
        scales = self.edit.op("Reshape", [made.scales, shape])
        result = self.edit.op("GatherBlockQuantized", [made.integers, indices, scales], attributes, domain=_MICROSOFT)
        if made.offsets is not None:
            by_row = self.edit.op("Reshape", [self.edit.op("Transpose", [made.offsets], {"perm": [1, 0]}), shape])
            result = self.edit.op("Add", [result, self.edit.op("Gather", [by_row, indices], {"axis": 0})])
        # The two last dimensions become one, whatever the ids' rank is.
        ids = self.edit.op("Shape", [indices])
        last = self.edit.constant(np.array([rows.length], np.int64), "row")
        whole = self.edit.op("Concat", [ids, last], {"axis": 0})
        self.edit.replace(old, self.edit.op("Reshape", [result, whole], like=old))

    def _multiply(self, node: ir.Node, source: ir.Value, rows: Rows, name: str) -> ir.Value:
        made, grid = self._set(rows, name), rows.grid
        attributes = {
            "K": rows.length,
            "N": rows.count,
            "bits": grid.bits,
            "block_size": grid.block,
            "accuracy_level": self.level,
        }
        inputs = [source, made.integers, made.scales]
        result = self.edit.op("MatMulNBits", inputs, attributes, domain=_MICROSOFT)
        if made.offsets is None:
            return result
        offset = self.edit.op("MatMul", [self._block_sums(source, grid.block, rows.length), made.offsets])
        return self.edit.op("Add", [result, offset])

    def _block_sums(self, source: ir.Value, block: int, length: int) -> ir.Value:
        """The sums of a value's blocks along its last dimension, made once: [..., length / block]."""
        key = (source, block)
        if key not in self._sums:
            rank = 2 if source.shape is None else len(source.shape)
            kept = [0] * (rank - 1)
            shape = self.edit.constant(np.array([*kept, length // block, block], np.int64), "blocks")
            blocks = self.edit.op("Reshape", [source, shape])
            axes = self.edit.constant(np.array([-1], np.int64), "axes")
            self._sums[key] = self.edit.op("ReduceSum", [blocks, axes], {"keepdims": 0})
        return self._sums[key]

    def _set(self, rows: Rows, name: str) -> _Set:
        """The values of a matrix."""
        key = tuple(part for stored, at in rows.parts for part in (stored.offset, len(at), hash(at.tobytes())))
        if key not in self._sets:
            grid = rows.grid
            integers = self._initializer(rows.integers(self.edit.names.fresh(f"{name}.integers")))
            scales = self._initializer(rows.scales(self.edit.names.fresh(f"{name}.scales")))
            minimums = rows.minimums(self.edit.names.fresh(f"{name}.minimums"))
            offsets = None if minimums is None else self._initializer(minimums)
            if (
                grid.half
            ):  # Stored as float16 as in the file; a session makes float32 constants of it when it is loaded.
                scales = self.edit.op("Cast", [scales], {"to": ir.DataType.FLOAT})
            if offsets is not None:
                if grid.half:
                    offsets = self.edit.op("Cast", [offsets], {"to": ir.DataType.FLOAT})
                middle = self.edit.constant(np.array(grid.middle, np.float32), "middle")
                offsets = self.edit.op("Add", [self.edit.op("Mul", [scales, middle]), offsets])
                offsets = self.edit.op("Transpose", [offsets], {"perm": [1, 0]})
            self._sets[key] = _Set(integers, scales, offsets)
        return self._sets[key]

    def _initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(
            name=tensor.name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(tensor.shape.numpy()),
            const_value=tensor,
        )
        self.edit.model.graph.register_initializer(value)
        return value


class _Set:
    """The values of a stored matrix: integers [rows, blocks, bytes], scales [rows, blocks], offsets [blocks, rows]."""

    def __init__(self, integers: ir.Value, scales: ir.Value, offsets: ir.Value | None) -> None:
        self.integers, self.scales, self.offsets = integers, scales, offsets
