"""Products and look-ups with weights that are integers in blocks: the operators that stand for float ones."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
import onnx_ir as ir

from graphopt.graph.computed import weight
from graphopt.graph.edits import Editor
from graphopt.runtime_ops.operator import DOMAIN, add_body, operators

Inputs = Literal["int16", "int8", "int8x2", "float32"]
"""What an integer operator makes of its input: for each block of it 16-bit numbers and a scale (graphopt's own
`QuantizedLinear`); signed 8-bit numbers and a scale (`accuracy_level` 4 of `MatMulNBits`); the same twice, the second
time of what the first time left over; or nothing (level 0)."""

_MICROSOFT = "com.microsoft"


@dataclasses.dataclass
class BlockMatrix:
    """A matrix [N, K] as initializers: w = scale · (number - zero point), or scale · number + minimum.

    Attributes:
        bits: Of a number: 2, 4 or 8.
        block: Neighbouring numbers of a row that share a scale.
        integers: The numbers, uint8 [N, K / block, block · bits / 8], the first of a byte in its lowest bits. Where K
            doesn't end with a block, K / block is rounded up here, and the last block is filled up with zero points.
        stored_scales: float16 or float32 [N, K / block].
        zero_points: Packed like the numbers, uint8 [N, ceil(K / block · bits / 8)]; None: the middle, 2^(bits - 1).
        minimums: What is added to scale · number, float16 or float32 [N, K / block]; None: nothing.
        moved: What is to be taken from all numbers beside minimums: w = scale · (number - moved) + minimum.
        columns: K; 0: it ends with a block.
        scales: The scales as float32; None: not made yet, or stored so.
        offsets: What is added to scale · (number - middle), float32 [K / block, N]; None: not made yet, or nothing.
    """

    bits: int
    block: int
    integers: ir.Value
    stored_scales: ir.Value
    zero_points: ir.Value | None = None
    minimums: ir.Value | None = None
    moved: int = 0
    columns: int = 0
    scales: ir.Value | None = None
    offsets: ir.Value | None = None

    @property
    def rows(self) -> int:
        """N."""
        return _shape(self.integers)[0]

    @property
    def blocks(self) -> int:
        """K / block."""
        return _shape(self.integers)[1]

    @property
    def length(self) -> int:
        """K."""
        return self.columns or self.blocks * self.block

    @property
    def whole(self) -> bool:
        """Whether rows end with a block, which all but `MatMulNBits` without offsets need."""
        return self.length == self.blocks * self.block


class BlockProducts:
    """Writes operators into a graph at the editor's site.

    Args:
        edit: The graph's editor.
    """

    def __init__(self, edit: Editor) -> None:
        self.edit = edit
        self._blocks: dict[tuple[ir.Value, int], ir.Value] = {}
        self._sums: dict[tuple[ir.Value, int], ir.Value] = {}
        self._twice: dict[tuple[ir.Value, int, int], ir.Value] = {}
        self._units: dict[tuple[int, int], BlockMatrix] = {}
        self._empty: dict[ir.DataType, ir.Value] = {}

    def gather(self, matrix: BlockMatrix, indices: ir.Value, like: ir.Value | None = None) -> ir.Value:
        """Rows of a matrix, by `indices` of any rank."""
        # As [rows, blocks, block]: so the integers are the same initializer as the head's.
        shape = self.edit.constant(np.array([matrix.rows, matrix.blocks, 1], np.int64), "by_block")
        attributes = {"bits": matrix.bits, "block_size": matrix.block, "gather_axis": 0, "quantize_axis": 2}
        scales = self.edit.op("Reshape", [self._scales(matrix), shape])
        inputs = [matrix.integers, indices, scales]
        if matrix.zero_points is not None:
            inputs.append(self.edit.op("Reshape", [self._single_zero_points(matrix, matrix.zero_points), shape]))
        result = self.edit.op("GatherBlockQuantized", inputs, attributes, domain=_MICROSOFT)
        if (offsets := self._offsets(matrix)) is not None:
            by_row = self.edit.op("Reshape", [self.edit.op("Transpose", [offsets], {"perm": [1, 0]}), shape])
            result = self.edit.op("Add", [result, self.edit.op("Gather", [by_row, indices], {"axis": 0})])
        # The two last dimensions become one, whatever the ids' rank is.
        ids = self.edit.op("Shape", [indices])
        last = self.edit.constant(np.array([matrix.length], np.int64), "row")
        whole = self.edit.op("Concat", [ids, last], {"axis": 0})
        return self.edit.op("Reshape", [result, whole], like=like)

    def _single_zero_points(self, matrix: BlockMatrix, packed: ir.Value) -> ir.Value:
        """The zero points in a byte each, uint8 [rows, blocks], as a look-up by block takes them. A session makes a
        constant of them when it is loaded, so that the file has those of the head alone."""
        each = 8 // matrix.bits
        if each == 1:
            return packed
        edit, mask = self.edit, self.edit.constant(np.array((1 << matrix.bits) - 1, np.uint8), "mask")
        last = edit.constant(np.array([2], np.int64), "last")
        parts = []
        for place in range(each):
            by = edit.constant(np.array(place * matrix.bits, np.uint8), "shift")
            moved = edit.op("BitShift", [packed, by], {"direction": "RIGHT"})
            parts.append(edit.op("Unsqueeze", [edit.op("BitwiseAnd", [moved, mask]), last]))
        size = edit.constant(np.array([matrix.rows, -1], np.int64), "by_row")
        flat = edit.op("Reshape", [edit.op("Concat", parts, {"axis": 2}), size])
        ends = (edit.constant(np.array([end], np.int64), "end") for end in (0, matrix.blocks, 1))
        return edit.op("Slice", [flat, *ends])

    def multiply(self, source: ir.Value, matrix: BlockMatrix, inputs: Inputs) -> ir.Value:
        """source · matrixᵀ, [..., N] of [..., K]."""
        if inputs == "int16":
            return self._own_product(source, matrix)
        # Computed in float32, 8 bits take 60 to 1000 times as long in ONNX Runtime 1.31.
        twice = matrix.whole and (inputs == "int8x2" or (inputs == "float32" and matrix.bits == 8))
        level = 0 if inputs == "float32" and matrix.bits == 4 else 4
        if twice:
            result = self._product(self._both(source, matrix), matrix, level)
            count = {"num_outputs": 2} if self.edit.opset >= 18 else {}
            halves = self.edit.op("Split", [result], {"axis": 0, **count}, outputs=2).producer()
            assert halves is not None
            terms = list(halves.outputs)
        else:
            terms = [self._product(source, matrix, level)]
        if (offsets := self._offsets(matrix)) is not None:
            sums = self._block_sums(source, matrix.length, matrix.block)
            terms.append(self.edit.op("MatMul", [sums, offsets]))
        if len(terms) == 1:
            return terms[0]
        # One Sum of three takes 5 % less of a token's time than two Adds.
        return self.edit.op("Add" if len(terms) == 2 else "Sum", terms)

    def sums_times(self, source: ir.Value, length: int, block: int, offsets: ir.Value) -> ir.Value:
        """The sums of a value's blocks [..., length / block] times offsets [length / block, N]."""
        return self.edit.op("MatMul", [self._block_sums(source, length, block), offsets])

    def _product(self, source: ir.Value, matrix: BlockMatrix, level: int) -> ir.Value:
        attributes = {
            "K": matrix.length,
            "N": matrix.rows,
            "bits": matrix.bits,
            "block_size": matrix.block,
            "accuracy_level": level,
        }
        inputs = [source, matrix.integers, self._constant_scales(matrix)]
        if matrix.zero_points is not None:
            inputs.append(matrix.zero_points)
        return self.edit.op("MatMulNBits", inputs, attributes, domain=_MICROSOFT)

    def _own_product(self, source: ir.Value, matrix: BlockMatrix) -> ir.Value:
        """By graphopt's operator, which takes half-precision scales and minimums as they are."""
        add_body(self.edit.model, "QuantizedLinear")
        zeros = matrix.zero_points or self._nothing(ir.DataType.UINT8)
        if matrix.minimums is not None and matrix.moved:
            # The numbers were moved for an operator whose zero is the middle; beside minimums it is 0.
            zeros = self.initializer(
                ir.tensor(
                    np.full((matrix.rows, matrix.blocks), matrix.moved, np.uint8), name=self.edit.names.fresh("moved")
                )
            )
        kind = matrix.stored_scales.dtype or ir.DataType.FLOAT
        number, half = self._nothing(ir.DataType.FLOAT), self._nothing(kind)
        minimums = half if matrix.minimums is None else matrix.minimums
        inputs = [source, number, matrix.integers, matrix.stored_scales, zeros, minimums, number, number]
        attributes = operators()["QuantizedLinear"].attributes_of(
            bits=matrix.bits, block_size=matrix.block, activation_bits=16
        )
        return self.edit.op("QuantizedLinear", inputs, attributes, domain=DOMAIN)

    def _nothing(self, dtype: ir.DataType) -> ir.Value:
        """The empty tensor that says that an input isn't there."""
        if dtype not in self._empty:
            empty = ir.tensor(np.zeros(0, dtype.numpy()), name=self.edit.names.fresh("nothing"))
            self._empty[dtype] = self.initializer(empty)
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

    def _both(self, source: ir.Value, matrix: BlockMatrix) -> ir.Value:
        """A value, and along the first dimension behind it what rounding its blocks to 8 bits takes from it.

        The operator itself says what it makes of a block: its product with the unit matrix.
        """
        key = (source, matrix.bits, matrix.block)
        if key not in self._twice:
            blocks = self._by_block(source, matrix.length, matrix.block)
            rounded = self._product(blocks, self._unit(matrix.bits, matrix.block), 4)
            rest = self.edit.op("Sub", [blocks, rounded])
            both = self.edit.op("Concat", [blocks, rest], {"axis": 0})
            self._twice[key] = self._reshaped(both, source, [matrix.length])
        return self._twice[key]

    def _unit(self, bits: int, block: int) -> BlockMatrix:
        """The unit matrix of the size of a block."""
        key = (bits, block)
        if key not in self._units:
            numbers = (2 ** (bits - 1) + np.eye(block)).astype(np.uint8)
            packed = numbers[:, 0::2] | numbers[:, 1::2] << 4 if bits == 4 else numbers
            integers = self.initializer(ir.tensor(packed[:, None], name=self.edit.names.fresh("unit.integers")))
            ones = ir.tensor(np.ones((block, 1), np.float32), name=self.edit.names.fresh("unit.scales"))
            self._units[key] = BlockMatrix(bits, block, integers, self.initializer(ones))
        return self._units[key]

    def _scales(self, matrix: BlockMatrix) -> ir.Value:
        """The scales as float32. A session makes constants of what is computed from constants when it is loaded."""
        if matrix.scales is None and matrix.stored_scales.dtype == ir.DataType.FLOAT16:
            matrix.scales = self.as_float(matrix.stored_scales)
        return matrix.scales or matrix.stored_scales

    def _constant_scales(self, matrix: BlockMatrix) -> ir.Value:
        """The scales as float32 for `MatMulNBits`. With optimizations off nothing is made a constant, and with 8 bits
        and scales that aren't constant it gives zeros in ONNX Runtime 1.31; so they are stored in float32 there."""
        stored, tensor = matrix.stored_scales, matrix.stored_scales.const_value
        if matrix.bits < 8 or stored.dtype != ir.DataType.FLOAT16 or tensor is None:
            return self._scales(matrix)
        shape = tensor.shape.numpy()
        made = weight(lambda: ir.tensor(tensor.numpy().astype(np.float32)), ir.DataType.FLOAT, shape)
        made.name = self.edit.names.fresh(f"{stored.name}.float")
        matrix.stored_scales = self.initializer(made)
        if matrix.scales is not None:
            self.edit.replace(matrix.scales, matrix.stored_scales)
            matrix.scales = None
        if not stored.uses() and stored.name is not None:
            self.edit.model.graph.initializers.pop(stored.name, None)
        return matrix.stored_scales

    def _offsets(self, matrix: BlockMatrix) -> ir.Value | None:
        """What is added to s·(q - z), as float32 [blocks, rows]."""
        if matrix.offsets is None and matrix.minimums is not None:
            middle = self.edit.constant(np.array(2 ** (matrix.bits - 1) - matrix.moved, np.float32), "middle")
            matrix.offsets = self.scaled(self._scales(matrix), middle, matrix.minimums)
        return matrix.offsets

    def scaled(self, scales: ir.Value, numbers: ir.Value, minimums: ir.Value | None) -> ir.Value:
        """scales [N, blocks] times numbers, with minimums [N, blocks] added, as float32 [blocks, N]."""
        product = self.edit.op("Mul", [scales, numbers])
        if minimums is not None:
            product = self.edit.op("Add", [product, self.as_float(minimums)])
        return self.edit.op("Transpose", [product], {"perm": [1, 0]})

    def as_float(self, value: ir.Value) -> ir.Value:
        """A value as float32."""
        if value.dtype == ir.DataType.FLOAT:
            return value
        return self.edit.op("Cast", [value], {"to": ir.DataType.FLOAT})

    def initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        """A new initializer of the main graph."""
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
