"""Packings: how a quantized weight is written into a graph, as bytes and as the operators that read them.

| operator | what it carries |
|---|---|
| `MatMulNBits` (com.microsoft) | integers of 2, 4, 8 bits in blocks, zero points; float offsets by the sums of blocks |
| `QuantizedLinear` (graphopt) | the same, float offsets at no cost, activations in 16 bits |
| `CodebookMatMul` (graphopt) | all else: 3 bits (offsets by the sums of groups), codebooks, outliers, rotations |
| `DequantizeLinear` + `MatMul` | integers of 4 and 8 bits with zero points, on every runtime |
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.graph.edits import Editor
from graphopt.graph.scratch import Scratch
from graphopt.passes.quantize.codebook_packing import centred, codebook_inputs
from graphopt.passes.quantize.compensation import LowRank
from graphopt.passes.quantize.quantized_weight import QuantizedWeight
from graphopt.runtime_ops.block_products import BlockMatrix, BlockProducts, Inputs
from graphopt.runtime_ops.hadamard_transform.factors import hadamard_factor
from graphopt.runtime_ops.operator import DOMAIN, add_body, operators

Array = npt.NDArray[Any]
Operator = Literal["contrib", "graphopt", "standard"]

SMALLEST_BLOCK, LARGEST_BLOCK = 16, 256
"""Numbers of a block in `MatMulNBits` and `QuantizedLinear`; a power of two."""
_BLOCK_BITS = (2, 4, 8)
_SCALES = 2
"""Where the scales are among the constants of `CodebookMatMul`."""


class Unpackable(Exception):
    """A quantized weight that no operator carries; the message says why."""


def block_of(group_size: int, columns: int) -> int | None:
    """The block size of a weight in groups; None: there is none.

    The group itself, or the largest power of two that divides it and the rows: a group that is larger than a block is
    written as several blocks with one scale. Where that is less than `SMALLEST_BLOCK`, rows don't end with a block.
    """
    group = min(group_size, columns)
    block = math.gcd(group, columns, LARGEST_BLOCK)
    if block < SMALLEST_BLOCK and group <= LARGEST_BLOCK:
        block = math.gcd(group, LARGEST_BLOCK)
    return block if block >= SMALLEST_BLOCK else None


def pack_numbers(codes: Array, bits: int, block: int) -> npt.NDArray[np.uint8]:
    """Codes [N, K] as bytes [N, K / block, block · bits / 8], the first of a byte in its lowest bits."""
    rows, columns = codes.shape
    parts = codes.astype(np.uint8).reshape(rows, columns // block, -1, 8 // bits)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    packed: npt.NDArray[np.uint8] = np.bitwise_or.reduce(parts << shifts, axis=-1)
    return packed


def pack_zero_points(zero_points: Array, bits: int) -> npt.NDArray[np.uint8]:
    """Zero points [N, G] as bytes [N, ceil(G · bits / 8)]; places without a group are 0."""
    each = 8 // bits
    rows, groups = zero_points.shape
    padded = np.zeros((rows, -(-groups // each) * each), np.uint8)
    padded[:, :groups] = zero_points
    return pack_numbers(padded, bits, padded.shape[1]).reshape(rows, -1)


def stored(numbers: npt.NDArray[np.float32]) -> Array:
    """Scales or offsets in half precision where that changes nothing, else as they are."""
    with np.errstate(over="ignore"):
        half = numbers.astype(np.float16)
    return half if np.array_equal(half.astype(np.float32), numbers) else numbers


class Packer:
    """Writes quantized weights and what reads them into the main graph, at the editor's site.

    Args:
        edit: The graph's editor.
        operator: "contrib": `MatMulNBits` where it carries a weight; "graphopt": `QuantizedLinear`; "standard":
            standard ONNX alone. What none of these carries goes to `CodebookMatMul`, whose body is standard ONNX.
    """

    def __init__(self, edit: Editor, operator: Operator) -> None:
        self.edit, self.operator = edit, operator
        self.products = BlockProducts(edit)
        self._scratch = Scratch()
        self._rotated: dict[tuple[ir.Value, int], ir.Value] = {}
        self._equal: dict[tuple[tuple[int, ...], bytes], ir.Value] = {}

    def matrix(self, weight: QuantizedWeight, name: str) -> BlockMatrix:
        """A weight of integers in blocks as initializers.

        Raises:
            Unpackable: It isn't one.
        """
        block = block_of(weight.group_size, weight.columns)
        if weight.bits not in _BLOCK_BITS or weight.levels is not None or weight.outliers or weight.transposed:
            raise Unpackable(f"MatMulNBits has integers of 2, 4 or 8 bits, and this is {_kind(weight)}")
        if block is None:
            raise Unpackable(f"groups of {weight.group_size} of {weight.columns} numbers aren't made of blocks of 16")
        whole = weight.columns % block == 0
        if not whole and (self.operator == "graphopt" or weight.offsets is not None):
            raise Unpackable(f"rows of {weight.columns} numbers don't end with a block of {block}")
        repeat, count = min(weight.group_size, weight.columns) // block, -(-weight.columns // block)
        zeros = None if weight.zero_points is None or weight.symmetric else weight.zero_points
        offsets = weight.offsets
        if weight.zero_points is None and offsets is None:  # a code is a level, and nothing is taken from it
            offsets = np.zeros_like(weight.scales)
        return BlockMatrix(
            weight.bits,
            block,
            self._initializer(pack_numbers(_filled(weight, block), weight.bits, block), f"{name}.integers"),
            self._initializer(stored(np.repeat(weight.scales, repeat, axis=1)[:, :count]), f"{name}.scales"),
            None
            if zeros is None
            else self._initializer(
                pack_zero_points(np.repeat(zeros, repeat, axis=1)[:, :count], weight.bits), f"{name}.zeros"
            ),
            None
            if offsets is None
            else self._initializer(self._minimums(weight, offsets, repeat, count), f"{name}.minimums"),
            columns=0 if whole else weight.columns,
        )

    def blocks_of(self, weight: QuantizedWeight) -> int | None:
        """The block in which `MatMulNBits` carries a weight; None: another operator does."""
        return block_in_contrib(weight) if self.operator == "contrib" else None

    def product(self, x: ir.Value, weight: QuantizedWeight, name: str, inputs: Inputs = "int8") -> ir.Value:
        """The product of x with the transpose of a weight, [..., N], by the first operator that carries the weight.

        Args:
            x: [..., K].
            weight: [N, K].
            name: What initializers are called after.
            inputs: What `MatMulNBits` makes of x, where it is the one.

        Raises:
            Unpackable: None does.
        """
        block = block_of(weight.group_size, weight.columns) or 1
        if weight.transposed or self.operator == "standard":
            try:
                return self.edit.op("MatMul", [x, self.dequantized(weight, name)])
            except Unpackable:
                if weight.transposed or _in_blocks(weight):
                    raise
        elif _in_blocks(weight) and (self.operator == "contrib" or weight.columns % block == 0):
            x = self._rotate(x, weight.hadamard) if weight.hadamard else x
            return self.multiply(x, self.matrix(weight, name), inputs)
        return self.codebook(x, weight, name)

    def multiply(self, x: ir.Value, matrix: BlockMatrix, inputs: Inputs = "int8") -> ir.Value:
        """The product of x with the transpose of a matrix, [..., N]; `inputs` are for `MatMulNBits`."""
        return self.products.multiply(x, matrix, "int16" if self.operator == "graphopt" else inputs)

    def dequantized(self, weight: QuantizedWeight, name: str) -> ir.Value:
        """The weight [K, N] as a DequantizeLinear makes it, in the layout that ONNX Runtime fuses with a MatMul; where
        groups go along the outputs (`transposed`) it fuses nothing.

        Raises:
            Unpackable: Standard ONNX has no such numbers.
        """
        if weight.bits not in (4, 8) or weight.levels is not None or weight.outliers is not None or weight.hadamard:
            raise Unpackable(f"DequantizeLinear has integers of 4 or 8 bits, and this is {_kind(weight)}")
        if weight.offsets is not None:
            raise Unpackable("DequantizeLinear has no float offsets")
        block = min(weight.group_size, weight.columns)
        if weight.columns % block:
            raise Unpackable("its rows don't end with a group")
        dtype = ir.DataType.UINT4 if weight.bits == 4 else ir.DataType.UINT8
        zeros = weight.zero_points if weight.zero_points is not None else np.zeros(weight.scales.shape, np.uint8)

        def turned(array: Array) -> Array:
            return array if weight.transposed else np.ascontiguousarray(array.T)

        def integers(array: Array, label: str) -> ir.Value:
            numbers = turned(np.asarray(array, np.uint8)).astype(dtype.numpy())
            return self.products.initializer(self._scratch.keep(numbers, self.edit.names.fresh(label), dtype))

        inputs = [
            integers(weight.codes, f"{name}.integers"),
            self._initializer(turned(weight.scales.astype(np.float32)), f"{name}.scales"),
            integers(zeros, f"{name}.zeros"),
        ]
        return self.edit.op("DequantizeLinear", inputs, {"axis": int(weight.transposed), "block_size": block})

    def codebook(self, x: ir.Value, weight: QuantizedWeight, name: str) -> ir.Value:
        """The product of x with the transpose of a weight by `CodebookMatMul`, behind the rotation of x.

        Raises:
            Unpackable: It doesn't carry the weight.
        """
        dtype = ir.DataType.FLOAT if x.dtype is None else x.dtype
        plain = centred(weight) if dtype == ir.DataType.FLOAT else None
        try:
            given = codebook_inputs(weight if plain is None else plain, dtype=dtype.numpy())
        except ValueError as error:
            raise Unpackable(str(error)) from error
        if given.rotation:
            x = self._rotate(x, given.rotation)
        add_body(self.edit.model, "CodebookMatMul")
        constants = [
            self._shared(array, "codebook") if array is given.codebooks else self._initializer(array, f"{name}.codes")
            for array in given.arrays()
        ]
        attributes = operators()["CodebookMatMul"].attributes_of(**given.attributes)
        product = self.edit.op("CodebookMatMul", [x, *constants], attributes, domain=DOMAIN)
        if plain is None:
            return product
        size = min(weight.group_size, weight.columns)
        offsets = self._offsets_from_middle(weight, constants[_SCALES], name)
        return self.edit.op("Add", [product, self.products.sums_times(x, weight.columns, size, offsets)], like=product)

    def _offsets_from_middle(self, weight: QuantizedWeight, scales: ir.Value, name: str) -> ir.Value:
        """What is added to s (c - middle) for each group, float32 [G, N]: computed from constants, and so by a session
        when it is loaded, since zero points are bytes in the file."""
        middle: ir.Value = self.edit.constant(np.array(1 << (weight.bits - 1), np.float32), "middle")
        least = None
        if weight.offsets is not None:
            least = self._initializer(stored(weight.offsets), f"{name}.minimums")
        else:
            assert weight.zero_points is not None
            zeros = self.products.as_float(self._initializer(weight.zero_points, f"{name}.zeros"))
            middle = self.edit.op("Sub", [middle, zeros])
        return self.products.scaled(self.products.as_float(scales), middle, least)

    def _shared(self, array: Array, name: str) -> ir.Value:
        """An initializer that is the same for equal numbers: codebooks of many weights are one."""
        key = (array.shape, array.tobytes())
        if key not in self._equal:
            self._equal[key] = self._initializer(array, name)
        return self._equal[key]

    def with_branch(self, product: ir.Value, x: ir.Value, branch: LowRank) -> ir.Value:
        """A product, and what a branch of low rank makes of x: y + (x Aᵀ) Bᵀ."""
        dtype = np.float32 if x.dtype is None else x.dtype.numpy()
        a, b = (
            self._initializer(np.ascontiguousarray(matrix.T).astype(dtype), name)
            for matrix, name in ((branch.a, "branch.a"), (branch.b, "branch.b"))
        )
        return self.edit.op("Add", [product, self.edit.op("MatMul", [self.edit.op("MatMul", [x, a]), b])])

    def _rotate(self, x: ir.Value, size: int) -> ir.Value:
        """Each `size` features of x rotated, once for all that read it."""
        if (x, size) not in self._rotated:
            add_body(self.edit.model, "HadamardTransform")
            factor = self.edit.constant(hadamard_factor(size), "factor")
            attributes = operators()["HadamardTransform"].attributes_of(group_size=size, scale=size**-0.5)
            made = self.edit.op("HadamardTransform", [x, factor], attributes, domain=DOMAIN, like=x)
            self._rotated[x, size] = made
        return self._rotated[x, size]

    def _minimums(self, weight: QuantizedWeight, offsets: npt.NDArray[np.float32], repeat: int, count: int) -> Array:
        """Offsets in the type of the scales."""
        kind = stored(weight.scales).dtype
        return np.repeat(offsets, repeat, axis=1)[:, :count].astype(kind)

    def _initializer(self, array: Array, name: str) -> ir.Value:
        return self.products.initializer(self._scratch.keep(array, self.edit.names.fresh(name)))


def stacked(weights: list[QuantizedWeight]) -> QuantizedWeight | None:
    """Weights of the same inputs as one, one below the other; None where they aren't of one kind."""
    first = weights[0]
    if len(weights) == 1:
        return first

    def kind(weight: QuantizedWeight) -> tuple[Any, ...]:
        present = tuple(getattr(weight, name) is None for name in ("zero_points", "offsets", "selectors", "outliers"))
        shared = weight.levels is None or (first.levels is not None and np.array_equal(weight.levels, first.levels))
        sizes = (weight.bits, weight.group_size, weight.columns, weight.hadamard)
        return (*sizes, weight.symmetric, weight.transposed, present, shared)

    if any(kind(weight) != kind(first) for weight in weights) or first.outliers is not None or first.transposed:
        return None

    def joined(name: str) -> Any:
        parts = [getattr(weight, name) for weight in weights]
        return None if parts[0] is None else np.concatenate(parts)

    return QuantizedWeight(
        joined("codes"),
        first.bits,
        first.group_size,
        first.columns,
        joined("scales"),
        zero_points=joined("zero_points"),
        offsets=joined("offsets"),
        levels=first.levels,
        selectors=joined("selectors"),
        hadamard=first.hadamard,
    )


def _filled(weight: QuantizedWeight, block: int) -> Array:
    """The codes of rows that end with a block: what is added stands for 0."""
    missing = -weight.columns % block
    if not missing:
        return weight.codes
    middle = np.full(weight.rows, 1 << (weight.bits - 1), np.uint8)
    last = middle if weight.zero_points is None else weight.zero_points[:, -1]
    return np.concatenate([weight.codes, np.repeat(last[:, None], missing, axis=1)], axis=1)


def _in_blocks(weight: QuantizedWeight) -> bool:
    """Whether `MatMulNBits` and its kin carry a weight."""
    plain = weight.levels is None and weight.outliers is None and not weight.transposed
    return plain and weight.bits in _BLOCK_BITS and block_of(weight.group_size, weight.columns) is not None


def block_in_contrib(weight: QuantizedWeight) -> int | None:
    """The block in which `MatMulNBits` carries a weight; None: another operator does."""
    return block_of(weight.group_size, weight.columns) if _in_blocks(weight) and not weight.hadamard else None


def packed_bytes(weight: QuantizedWeight) -> int:
    """Bytes of a weight as `Packer` stores it for `MatMulNBits` or `CodebookMatMul`: codes without gaps, scales, zero
    points or offsets, codebooks, outliers."""
    scales, groups = stored(weight.scales), weight.scales.shape[1]
    each, zeros = scales.itemsize, groups
    total: int = weight.rows * -(-weight.codes.shape[1] * weight.bits // 8)
    if _in_blocks(weight):
        block = block_of(weight.group_size, weight.columns)
        assert block is not None
        groups = -(-weight.columns // block)
        total = weight.rows * groups * block * weight.bits // 8
        each, zeros = 4 if weight.bits == 8 else each, -(-groups * weight.bits // 8)
    total += weight.rows * groups * each
    if weight.zero_points is not None and not weight.symmetric:
        total += weight.rows * zeros
    if weight.offsets is not None:
        total += weight.rows * groups * (scales if _in_blocks(weight) else stored(weight.offsets)).itemsize
    for extra in (weight.levels, weight.selectors):
        total += 0 if extra is None else int(extra.nbytes)
    if weight.outliers is not None:
        total += weight.outliers.values.nbytes + weight.outliers.columns.nbytes + 4 * (weight.rows + 1)
    return total


def _kind(weight: QuantizedWeight) -> str:
    if weight.levels is not None:
        return f"a codebook of {weight.bits} bits"
    return f"{weight.bits} bits{' with outliers' if weight.outliers is not None else ''}"
