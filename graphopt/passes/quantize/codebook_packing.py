"""A quantized weight as the constant inputs of CodebookMatMul."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt.passes.quantize.quantized_weight import Array, Outliers, QuantizedWeight
from graphopt.runtime_ops.codebook_matmul.packing import pack_indices

_NONE = np.zeros(0, np.uint8)
_LARGEST = 1 << 18
"""Bytes of codebooks of combined codes; larger ones leave the cache, and are no longer small beside a weight."""


@dataclasses.dataclass(frozen=True)
class CodebookInputs:
    """What a node of CodebookMatMul is given beside x, in the operator's order; what has no use is empty.

    Attributes:
        indices: uint8 [N, ceil(ceil(K / p) · bits / 8)].
        codebooks: float32 [C, 2^bits, 1, p].
        scales: float32 or float16 [N, G].
        selectors: uint8 [N, G] or [0].
        outlier_rows: int32 [N + 1] or [0].
        outlier_columns: int32 [outliers].
        outlier_values: float32 [outliers].
        bias: Of x's type, [0]; a bias of the layer takes its place.
        attributes: columns, bits, group_size.
        rotation: 0, or the group size of the HadamardTransform that x goes through before the node.
    """

    indices: npt.NDArray[np.uint8]
    codebooks: npt.NDArray[np.float32]
    scales: Array
    selectors: npt.NDArray[np.uint8]
    outlier_rows: npt.NDArray[np.int32]
    outlier_columns: npt.NDArray[np.int32]
    outlier_values: npt.NDArray[np.float32]
    bias: Array
    attributes: dict[str, int]
    rotation: int

    def arrays(self) -> list[Array]:
        """The eight inputs behind x."""
        fields = [field.name for field in dataclasses.fields(self)]
        return [getattr(self, name) for name in fields[: fields.index("attributes")]]

    @property
    def nbytes(self) -> int:
        """Bytes of all inputs."""
        return sum(array.nbytes for array in self.arrays())


def codebook_inputs(weight: QuantizedWeight, scale_dtype: Any = np.float16, dtype: Any = np.float32) -> CodebookInputs:
    """The inputs of a CodebookMatMul that multiplies by a weight (rotated, where that one is).

    - Weights with codebooks keep them. Integers become one codebook, of the integers less their zero point; where zero
      points differ, there is a codebook for each of them and the groups select.
    - Where no fast kernel reads the codes, two, four or eight neighbouring ones that make 8 or 12 bits become one code,
      of a codebook of all their combinations: the same bits, which take a quarter of the time to read. That codebook
      depends on the grid alone, so weights with the same one can share it.
    - The result is that of `weight.dequantized()` but for the rounding of the scales, which are kept in float32 where
      `scale_dtype` has no number within 0.1 % of one of them.

    Args:
        weight: What every grid makes, but for float offsets, which no codebook times a scale can be; see `centred`.
        scale_dtype: float16 or float32.
        dtype: Of x.

    Raises:
        ValueError: The weight has float offsets or is transposed, or a vector of its codebooks lies in two groups.
    """
    if weight.transposed:
        raise ValueError("CodebookMatMul has groups along the inputs, and the weight's go along the outputs")
    if weight.offsets is not None:
        raise ValueError("CodebookMatMul has no float offsets; zero points or symmetric integers can be packed")
    if weight.group_size < weight.columns and weight.group_size % weight.width:
        raise ValueError(
            f"a group of {weight.group_size} columns isn't a multiple of {weight.width}, the numbers that share a code"
        )
    together = _together(weight)
    width, bits = weight.width * together, weight.bits * together
    group_size = weight.group_size
    if group_size >= weight.columns:
        group_size = -(-weight.columns // width) * width
    codebooks, selectors = _codebooks(weight)
    rows, columns, values = _compressed(weight.outliers, weight.rows)
    return CodebookInputs(
        pack_indices(_joined(weight.codes, weight.bits, together), bits),
        _combined(codebooks, together)[:, :, None],
        _scales(weight.scales, scale_dtype),
        _NONE if selectors is None else selectors,
        rows,
        columns,
        values,
        np.zeros(0, dtype),
        {"columns": weight.columns, "bits": bits, "group_size": group_size},
        weight.hadamard,
    )


def centred(weight: QuantizedWeight) -> QuantizedWeight | None:
    """Integers with the middle of their range as the only zero point, for one codebook and a fast kernel.

    What that leaves of a weight, the same number for each group of a row, is to be added as the product of the sums of
    x's groups with those numbers. None: the weight needs no such help, or rows don't end with a group.
    """
    if weight.levels is not None or weight.transposed or weight.columns % min(weight.group_size, weight.columns):
        return None
    middle = np.full_like(weight.scales, 1 << (weight.bits - 1), dtype=np.uint8)
    plain = dataclasses.replace(weight, zero_points=middle, offsets=None)
    helped = weight.offsets is not None or (_selects(weight) and _narrow_reason(weight) is not None)
    return plain if helped and slow_reason(plain) is None else None


def slow_reason(weight: QuantizedWeight) -> str | None:
    """Why the CPU's kernels for single rows of x don't serve a weight that is packed; None: they do.

    A weight with a reason takes as long as float32 weights do, or longer.
    """
    if _together(weight) > 1:
        return None
    return _narrow_reason(weight) if weight.width == 1 else _vector_reason(weight.bits, weight.width)


def _narrow_reason(weight: QuantizedWeight) -> str | None:
    """Why the kernels of single numbers don't serve a weight."""
    if not 2 <= weight.bits <= 4:
        return f"kernels of single numbers have 2 to 4 bits, not {weight.bits}"
    if weight.group_size >= weight.columns:
        return None
    if _selects(weight) and weight.group_size % 128:
        return f"groups that select a codebook have a multiple of 128 columns, not {weight.group_size}"
    if weight.group_size % 8:
        return f"groups have a multiple of 8 columns, not {weight.group_size}"
    return None


def _vector_reason(bits: int, width: int) -> str | None:
    """Why the kernels of vectors don't serve indices of `bits` for `width` numbers."""
    if width not in (2, 4, 8):
        return f"kernels of vectors have 2, 4 or 8 numbers, not {width}"
    return None if bits in (8, 12, 16) else f"kernels of vectors have indices of 8, 12 or 16 bits, not {bits}"


def _together(weight: QuantizedWeight) -> int:
    """How many neighbouring codes are packed as one: 1 where the kernels for the codes as they are serve."""
    plain = _narrow_reason(weight) if weight.width == 1 else _vector_reason(weight.bits, weight.width)
    if plain is None:
        return 1
    books = 1 if weight.levels is None else len(weight.levels)
    if _selects(weight) and weight.zero_points is not None:
        books = len(np.unique(weight.zero_points))
    for together in (2, 4, 8):
        bits, width = weight.bits * together, weight.width * together
        fits = weight.group_size >= weight.columns or weight.group_size % width == 0
        size = 4 * books * width << bits
        if bits in (8, 12) and _vector_reason(bits, width) is None and fits and size <= _LARGEST:
            return together
    return 1


def _joined(codes: Array, bits: int, together: int) -> Array:
    """Codes [N, Q] as codes of `together` of them, the first in the lowest bits, [N, ceil(Q / together)]."""
    if together == 1:
        return codes
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % together))).astype(np.uint16)
    parts = padded.reshape(len(codes), -1, together) << (bits * np.arange(together, dtype=np.uint16))
    return np.asarray(np.bitwise_or.reduce(parts, axis=-1))


def _combined(books: npt.NDArray[np.float32], together: int) -> npt.NDArray[np.float32]:
    """Codebooks [C, n, p] of single codes as those of `together`, [C, n^together, p · together]."""
    count, entries, width = books.shape
    at = np.arange(entries**together)[:, None] // entries ** np.arange(together) % entries
    return np.ascontiguousarray(books[:, at].reshape(count, -1, width * together))


def _selects(weight: QuantizedWeight) -> bool:
    """Whether groups have different codebooks."""
    if weight.levels is not None:
        return weight.selectors is not None
    return weight.zero_points is not None and bool((weight.zero_points != weight.zero_points.flat[0]).any())


def _codebooks(weight: QuantizedWeight) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8] | None]:
    """Codebooks [C, 2^bits, width] and selectors; only codebooks that a group selects."""
    if weight.levels is not None:
        if weight.selectors is None:
            return weight.levels[:1], None
        used, selectors = np.unique(weight.selectors, return_inverse=True)
        books = weight.levels[used]
    else:
        integers = np.arange(1 << weight.bits, dtype=np.float32)
        points = np.zeros(weight.scales.shape, np.uint8) if weight.zero_points is None else weight.zero_points
        used, selectors = np.unique(points, return_inverse=True)
        books = (integers - used.astype(np.float32)[:, None])[:, :, None]
    if len(books) == 1:
        return books, None
    return books, selectors.reshape(weight.scales.shape).astype(np.uint8)


def _scales(scales: npt.NDArray[np.float32], dtype: Any) -> Array:
    with np.errstate(over="ignore"):
        short = scales.astype(dtype)
    near = np.abs(short.astype(np.float32) - scales) <= 1e-3 * np.abs(scales)
    return short if near.all() else scales.astype(np.float32)


def _compressed(
    outliers: Outliers | None, rows: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Outliers in compressed rows."""
    if outliers is None or not len(outliers.values):
        return np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32)
    starts = np.searchsorted(outliers.rows, np.arange(rows + 1)).astype(np.int32)
    return starts, outliers.columns.astype(np.int32), outliers.values.astype(np.float32)
