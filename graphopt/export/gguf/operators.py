"""Writes the integer operators that stand for float weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
import onnx_ir as ir

from graphopt.export.gguf.quantized import Grid, Rows
from graphopt.graph.edits import Editor
from graphopt.runtime_ops.operator import DOMAIN, add_body, operators

Inputs = Literal["int16", "int8", "int8x2", "float32"]
"""What an integer operator makes of its input: for each block of it 16-bit numbers and a scale (graphopt's own
`QuantizedLinear`); signed 8-bit numbers and a scale (`accuracy_level` 4 of `MatMulNBits`); the same twice, the second
time of what the first time left over; or nothing (level 0)."""

_MICROSOFT = "com.microsoft"

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
        self._sets: dict[tuple[int | bytes, ...], _Set] = {}
        self._blocks: dict[tuple[ir.Value, int], ir.Value] = {}
        self._sums: dict[tuple[ir.Value, int], ir.Value] = {}
        self._twice: dict[tuple[ir.Value, int, int], ir.Value] = {}
        self._units: dict[tuple[int, int], tuple[ir.Value, ir.Value]] = {}
        self._empty: dict[ir.DataType, ir.Value] = {}

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
        result = self._multiply(source, rows, products[0][3].name or "weight")
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
        scales = self.edit.op("Reshape", [self._scales(made), shape])
        result = self.edit.op("GatherBlockQuantized", [made.integers, indices, scales], attributes, domain=_MICROSOFT)
        if (offsets := self._offsets(made, grid)) is not None:
            by_row = self.edit.op("Reshape", [self.edit.op("Transpose", [offsets], {"perm": [1, 0]}), shape])
            result = self.edit.op("Add", [result, self.edit.op("Gather", [by_row, indices], {"axis": 0})])
        # The two last dimensions become one, whatever the ids' rank is.
        ids = self.edit.op("Shape", [indices])
        last = self.edit.constant(np.array([rows.length], np.int64), "row")
        whole = self.edit.op("Concat", [ids, last], {"axis": 0})
        self.edit.replace(old, self.edit.op("Reshape", [result, whole], like=old))

    def _multiply(self, source: ir.Value, rows: Rows, name: str) -> ir.Value:
        made, grid = self._set(rows, name), rows.grid
        if self.inputs == "int16":
            return self._own_product(source, made, grid)
        # Computed in float32, 8 bits take 60 to 1000 times as long in ONNX Runtime 1.31.
        twice = self.inputs == "int8x2" or (self.inputs == "float32" and grid.bits == 8)
        if twice:
            result = self._product(self._both(source, rows.length, grid), made.integers, self._scales(made), grid)
            count = {"num_outputs": 2} if self.edit.opset >= 18 else {}
            halves = self.edit.op("Split", [result], {"axis": 0, **count}, outputs=2).producer()
            assert halves is not None
            terms = list(halves.outputs)
        else:
            terms = [self._product(source, made.integers, self._scales(made), grid)]
        if (offsets := self._offsets(made, grid)) is not None:
            terms.append(self.edit.op("MatMul", [self._block_sums(source, rows.length, grid.block), offsets]))
        if len(terms) == 1:
            return terms[0]
        # One Sum of three takes 5 % less of a token's time than two Adds.
        return self.edit.op("Add" if len(terms) == 2 else "Sum", terms)

    def _product(self, source: ir.Value, integers: ir.Value, scales: ir.Value, grid: Grid) -> ir.Value:
        rows, columns, _ = (int(size) for size in _shape(integers))
        attributes = {
            "K": columns * grid.block,
            "N": rows,
            "bits": grid.bits,
            "block_size": grid.block,
            "accuracy_level": 0 if self.inputs == "float32" and grid.bits == 4 else 4,
        }
        return self.edit.op("MatMulNBits", [source, integers, scales], attributes, domain=_MICROSOFT)

    def _own_product(self, source: ir.Value, made: _Set, grid: Grid) -> ir.Value:
        """By graphopt's operator, which takes the file's half-precision scales and minimums as they are."""
        add_body(self.edit.model, "QuantizedLinear")
        zeros = self._nothing(ir.DataType.UINT8)
        moved = 2 ** (grid.bits - 1) - grid.middle
        if made.minimums is not None and moved:
            # The numbers were moved for an operator whose zero is the middle; beside minimums it is 0.
            rows, columns, _ = _shape(made.integers)
            zeros = self._initializer(
                ir.tensor(np.full((rows, columns), moved, np.uint8), name=self.edit.names.fresh("moved"))
            )
        kind = made.stored_scales.dtype or ir.DataType.FLOAT
        number, half = self._nothing(ir.DataType.FLOAT), self._nothing(kind)
        minimums = half if made.minimums is None else made.minimums
        inputs = [source, number, made.integers, made.stored_scales, zeros, minimums, number, number]
        attributes = operators()["QuantizedLinear"].attributes_of(
            bits=grid.bits, block_size=grid.block, activation_bits=16
        )
        return self.edit.op("QuantizedLinear", inputs, attributes, domain=DOMAIN)

    def _nothing(self, dtype: ir.DataType) -> ir.Value:
        """The empty tensor that says that an input isn't there."""
        if dtype not in self._empty:
            empty = ir.tensor(np.zeros(0, dtype.numpy()), name=self.edit.names.fresh("nothing"))
            self._empty[dtype] = self._initializer(empty)
        return self._empty[dtype]

    def _by_block(self, source: ir.Value, length: int, block: int) -> ir.Value:
        """A value as blocks along its last dimension, made once: [..., blocks, block]."""
        key = (source, block)
        if key not in self._blocks:
            self._blocks[key] = self._reshaped(source, source, [length // block, block])
        return self._blocks[key]

    def _reshaped(self, value: ir.Value, source: ir.Value, last: list[int]) -> ir.Value:
        """A value with all dimensions that `source` has but the last one, and these behind them."""
        rank = 2 if source.shape is None else len(source.shape)  # a Gemm's where it isn't said
        shape = self.edit.constant(np.array([0] * (rank - 1) + last, np.int64), "shape")
        return self.edit.op("Reshape", [value, shape])

    def _block_sums(self, source: ir.Value, length: int, block: int) -> ir.Value:
        """The sums of a value's blocks, made once: [..., blocks]."""
        key = (source, block)
        if key not in self._sums:
            axes = self.edit.constant(np.array([-1], np.int64), "axes")
            self._sums[key] = self.edit.op("ReduceSum", [self._by_block(source, length, block), axes], {"keepdims": 0})
        return self._sums[key]

    def _both(self, source: ir.Value, length: int, grid: Grid) -> ir.Value:
        """A value, and along the first dimension behind it what rounding its blocks to 8 bits takes from it.

        The operator itself says what it makes of a block: its product with the unit matrix.
        """
        key = (source, grid.bits, grid.block)
        if key not in self._twice:
            blocks = self._by_block(source, length, grid.block)
            rounded = self._product(blocks, *self._unit(grid), grid)
            rest = self.edit.op("Sub", [blocks, rounded])
            both = self.edit.op("Concat", [blocks, rest], {"axis": 0})
            self._twice[key] = self._reshaped(both, source, [length])
        return self._twice[key]

    def _unit(self, grid: Grid) -> tuple[ir.Value, ir.Value]:
        """Integers and scales of the unit matrix of the size of a block."""
        key = (grid.bits, grid.block)
        if key not in self._units:
            numbers = (2 ** (grid.bits - 1) + np.eye(grid.block)).astype(np.uint8)
            packed = numbers[:, 0::2] | numbers[:, 1::2] << 4 if grid.bits == 4 else numbers
            integers = self._initializer(ir.tensor(packed[:, None], name=self.edit.names.fresh("unit.integers")))
            ones = np.ones((grid.block, 1), np.float32)
            self._units[key] = integers, self._initializer(ir.tensor(ones, name=self.edit.names.fresh("unit.scales")))
        return self._units[key]

    def _set(self, rows: Rows, name: str) -> _Set:
        """The values of a matrix."""
        key = tuple(part for stored, at in rows.parts for part in (stored.offset, at.tobytes()))
        if key not in self._sets:
            integers = self._initializer(rows.integers(self.edit.names.fresh(f"{name}.integers")))
            scales = self._initializer(rows.scales(self.edit.names.fresh(f"{name}.scales")))
            minimums = rows.minimums(self.edit.names.fresh(f"{name}.minimums"))
            self._sets[key] = _Set(integers, scales, None if minimums is None else self._initializer(minimums))
        return self._sets[key]

    def _scales(self, made: _Set) -> ir.Value:
        """The scales as float32. A session makes constants of what is computed from constants when it is loaded."""
        if made.scales is None:
            half = made.stored_scales.dtype == ir.DataType.FLOAT16
            made.scales = self.edit.op("Cast", [made.stored_scales], {"to": ir.DataType.FLOAT}) if half else None
        return made.scales or made.stored_scales

    def _offsets(self, made: _Set, grid: Grid) -> ir.Value | None:
        """What is added to s·(q - z), as float32 [blocks, rows]."""
        if made.offsets is None and made.minimums is not None:
            minimums = made.minimums
            if minimums.dtype == ir.DataType.FLOAT16:
                minimums = self.edit.op("Cast", [minimums], {"to": ir.DataType.FLOAT})
            middle = self.edit.constant(np.array(grid.middle, np.float32), "middle")
            offsets = self.edit.op("Add", [self.edit.op("Mul", [self._scales(made), middle]), minimums])
            made.offsets = self.edit.op("Transpose", [offsets], {"perm": [1, 0]})
        return made.offsets

    def _initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(
            name=tensor.name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(tensor.shape.numpy()),
            const_value=tensor,
        )
        self.edit.model.graph.register_initializer(value)
        return value


def _shape(value: ir.Value) -> tuple[int, ...]:
    assert value.const_value is not None
    return tuple(value.const_value.shape.numpy())


@dataclasses.dataclass
class _Set:
    """The values of a stored matrix.

    Attributes:
        integers: Its numbers [rows, blocks, bytes].
        stored_scales: The scales as the file has them [rows, blocks].
        minimums: What is added to s·q, as the file has it [rows, blocks]; None: nothing.
        scales: The scales as float32; None: not made yet, or stored so.
        offsets: What is added to s·(q - z), as float32 [blocks, rows]; None: not made yet, or nothing.
    """

    integers: ir.Value
    stored_scales: ir.Value
    minimums: ir.Value | None
    scales: ir.Value | None = None
    offsets: ir.Value | None = None
