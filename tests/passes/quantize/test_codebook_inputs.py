"""Quantized weights as inputs of CodebookMatMul: kernel and body multiply by what they stand for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from smollm2_matrices import Floats, some_rows

from graphopt.passes.quantize.codebook_packing import CodebookInputs, codebook_inputs, slow_reason
from graphopt.passes.quantize.grid_names import make_grid
from graphopt.passes.quantize.grids import UniformGrid
from graphopt.passes.quantize.higgs import round_higgs
from graphopt.passes.quantize.quantized_weight import Outliers, QuantizedWeight
from graphopt.passes.quantize.roundings import round_to_nearest
from graphopt.runtime_ops.codebook_matmul.packing import unpack_indices
from graphopt.runtime_ops.hadamard_transform.factors import hadamard_factor
from tests.runtime_ops.operator_cases import judge


def named(name: str, bits: int | None = None, group_size: int = 128, **options: Any) -> Callable[[Floats], Any]:
    """Round to nearest on a grid."""
    return lambda weight: round_to_nearest(weight, make_grid(name, bits, **options), group_size)


def higgs(**options: Any) -> Callable[[Floats], Any]:
    return lambda weight: round_higgs(weight, **options)


def with_outliers(weight: Floats) -> QuantizedWeight:
    """The largest 1 % of the weights exactly."""
    rounded = round_to_nearest(np.clip(weight, -1, 1), UniformGrid(4), 32)
    rows, columns = np.nonzero(np.abs(weight) > np.quantile(np.abs(weight), 0.99))
    exact = (weight - rounded.dequantized())[rows, columns]
    return dataclasses.replace(rounded, outliers=Outliers(rows.astype(np.int32), columns.astype(np.int32), exact))


WAYS: dict[str, Callable[[Floats], QuantizedWeight]] = {
    "nf4": named("nf4"),
    "nf4, groups of 32": named("nf4", group_size=32),
    "nf3, one scale a row": named("nf3", group_size=10**6),
    "nf2": named("nf2"),
    "fp4": named("fp4", search=True),
    "fp8": named("fp8"),
    "nupes": lambda w: round_to_nearest(w, make_grid("nupes", 4).for_weight(w, 128), 128),
    "nupes, an exponent for each group": named("nupes", 3),
    "bitmod of 3 bits": named("bitmod", 3),
    "bitmod of 4 bits, groups of 32": named("bitmod", 4, 32),
    "integers of 3 bits": named("int", 3),
    "integers of 2 bits": named("int", 2, 32),
    "integers of 5 bits": named("int", 5, 32),
    "integers of 3 bits with zero points": named("int", 3, symmetric=False),
    "bitmod of 3 bits, groups of 32": named("bitmod", 3, 32),
    "nupes of 3 bits, an exponent for each of many groups": named("nupes", 3, 32),
    "integers of 4 bits with zero points, groups of 24": named("int", 4, 24, symmetric=False),
    "integers of 4 bits with zero points, groups of 9": named("int", 4, 9, symmetric=False),
    "integers of 2 bits with zero points, groups of 12": named("int", 2, 12, symmetric=False),
    "integers of 8 bits with zero points": named("int", 8, symmetric=False),
    "scales of float32": named("nf4", half=False),
    "outliers": with_outliers,
    "higgs, single numbers": higgs(width=1, bits=4, group_size=64),
    "higgs, single numbers of 3 bits": higgs(width=1, bits=3),
    "higgs, pairs of 4 bits": higgs(),
    "higgs, pairs of 3 bits, groups of 64": higgs(bits=3, group_size=64),
    "higgs, pairs of 2 bits": higgs(bits=2),
    "higgs, fours": higgs(bits=2, width=4),
    "higgs, fours of 3 bits": higgs(bits=3, width=4),
    "higgs, fours, not rotated": higgs(bits=2, width=4, rotation=0, group_size=96),
}
SLOW = {
    "fp8": "2 to 4 bits, not 8",
    "integers of 5 bits": "2 to 4 bits, not 5",
    "integers of 8 bits with zero points": "2 to 4 bits, not 8",
    "nupes of 3 bits, an exponent for each of many groups": "a multiple of 128 columns, not 32",
    "integers of 4 bits with zero points, groups of 9": "a multiple of 128 columns, not 9",
}
TOGETHER = {
    "bitmod of 4 bits, groups of 32": (8, 2),
    "bitmod of 3 bits, groups of 32": (12, 4),
    "integers of 4 bits with zero points, groups of 24": (8, 2),
    "integers of 2 bits with zero points, groups of 12": (8, 4),
    "higgs, pairs of 3 bits, groups of 64": (12, 4),
    "higgs, pairs of 2 bits": (8, 4),
    "higgs, pairs of 4 bits": (8, 2),
    "higgs, fours": (8, 4),
    "higgs, fours of 3 bits": (12, 4),
    "nf4": (4, 1),
}
"""Bits and numbers of an index as it is packed."""


def product(packed: CodebookInputs, x: Floats, atol: float) -> Floats:
    """y of x, rotated first where the weight is; kernel and body alike."""
    if packed.rotation:
        factor = hadamard_factor(packed.rotation)
        options = {"group_size": packed.rotation, "scale": packed.rotation**-0.5}
        (x,) = judge("HadamardTransform", [x, factor], atol=1e-5, **options)
    (y,) = judge("CodebookMatMul", [x, *packed.arrays()], atol=atol, **packed.attributes)
    return np.asarray(y)


def judged(rounded: QuantizedWeight, rows: int) -> CodebookInputs:
    """Hold kernel and body to the product with the dequantized weight."""
    x = np.random.default_rng(1).standard_normal((rows, rounded.columns)).astype(np.float32)
    packed = codebook_inputs(rounded, np.float16 if rounded.scales.astype(np.float16).all() else np.float32)
    expected = x @ rounded.dequantized().T
    atol = 1e-5 * float(np.abs(expected).max())
    np.testing.assert_allclose(product(packed, x, atol), expected, atol=2 * atol)
    return packed


@pytest.mark.real
@pytest.mark.parametrize("name", WAYS)
def test_the_product_with_real_weights(name: str) -> None:
    for rows, weight in ((1, some_rows(24)["gate"]), (5, some_rows(24)["down"])):
        rounded = WAYS[name](weight)
        if name == "scales of float32":
            packed = codebook_inputs(rounded, np.float32)
            assert packed.scales.dtype == np.float32
            x = np.ones((1, rounded.columns), np.float32)
            np.testing.assert_allclose(product(packed, x, 1e-4), x @ rounded.dequantized().T, atol=1e-4)
        else:
            assert judged(rounded, rows).scales.dtype == np.float16
        reason = slow_reason(rounded)
        assert (reason is not None) == (name in SLOW)
        assert SLOW.get(name, "") in (reason or "")
        if name in TOGETHER:
            packed = codebook_inputs(rounded)
            assert (packed.attributes["bits"], packed.codebooks.shape[-1]) == TOGETHER[name]


@pytest.mark.parametrize("name", [name for name in WAYS if name != "scales of float32"])
def test_odd_sizes(name: str) -> None:
    """Rows of 77 columns: groups, bytes and vectors that end with them."""
    weight = np.random.default_rng(0).standard_normal((7, 77)).astype(np.float32)
    judged(WAYS[name](weight), 2)


def test_bytes_of_a_weight() -> None:
    weight = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    packed = codebook_inputs(round_to_nearest(weight, make_grid("nf4"), 128))
    assert packed.nbytes == 64 * 256 // 2 + 64 * 2 * 2 + 16 * 4
    chosen = codebook_inputs(round_to_nearest(weight, make_grid("bitmod", 3), 128))
    assert chosen.nbytes == 64 * 256 * 3 // 8 + 64 * 2 * (2 + 1) + 3 * 8 * 4
    pairs = codebook_inputs(round_higgs(weight, bits=3))
    assert pairs.nbytes == 64 * 256 * 3 // 8 + 64 * 2 + 4096 * 4 * 4
    assert packed.nbytes - packed.codebooks.nbytes == 64 * 256 // 2 + 64 * 2 * 2


def test_only_codebooks_in_use() -> None:
    weight = np.random.default_rng(0).standard_normal((8, 128)).astype(np.float32)
    rounded = round_to_nearest(weight, make_grid("int", 3, symmetric=False), 128)
    assert rounded.zero_points is not None
    assert len(codebook_inputs(rounded).codebooks) == len(np.unique(rounded.zero_points))
    same = dataclasses.replace(rounded, zero_points=np.full_like(rounded.zero_points, 3))
    assert codebook_inputs(same).selectors.size == 0
    assert codebook_inputs(same).codebooks.reshape(-1).tolist() == [-3, -2, -1, 0, 1, 2, 3, 4]


def test_scales_beyond_half_precision_stay_in_float32() -> None:
    weight = np.random.default_rng(0).standard_normal((8, 128)).astype(np.float32)
    for factor in (1e-8, 1e8):
        packed = codebook_inputs(round_to_nearest(weight * np.float32(factor), make_grid("nf4"), 64))
        assert packed.scales.dtype == np.float32


def test_what_the_operator_can_not_do() -> None:
    weight = np.random.default_rng(0).standard_normal((8, 96)).astype(np.float32)
    floats = round_to_nearest(weight, UniformGrid(4, symmetric=False, floats=True), 32)
    with pytest.raises(ValueError, match="no float offsets"):
        codebook_inputs(floats)
    with pytest.raises(ValueError, match="go along the outputs"):
        codebook_inputs(dataclasses.replace(round_to_nearest(weight, UniformGrid(4), 32), transposed=True))
    pairs = dataclasses.replace(round_higgs(weight, rotation=0), group_size=31)
    with pytest.raises(ValueError, match="31 columns isn't a multiple of 2"):
        codebook_inputs(pairs)


@settings(max_examples=30, deadline=None)
@given(
    bits=st.integers(1, 6),
    width=st.sampled_from([1, 2, 3, 4]),
    rows=st.integers(1, 4),
    columns=st.integers(1, 70),
    group=st.integers(1, 20),
    books=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_bytes_hold_the_weight(
    bits: int, width: int, rows: int, columns: int, group: int, books: int, seed: int
) -> None:
    """The indices of the bytes, looked up in the codebooks, whatever was packed together."""
    rng = np.random.default_rng(seed)
    group_size = group * width
    groups = -(-columns // group_size)
    weight = QuantizedWeight(
        rng.integers(0, 1 << bits, (rows, -(-columns // width))).astype(np.uint8),
        bits,
        group_size,
        columns,
        rng.integers(1, 100, (rows, groups)).astype(np.float32),
        levels=rng.standard_normal((books, 1 << bits, width)).astype(np.float32),
        selectors=rng.integers(0, books, (rows, groups)).astype(np.uint8) if books > 1 else None,
    )
    packed = codebook_inputs(weight)
    tile = packed.codebooks.shape[-1]
    indices = unpack_indices(packed.indices, packed.attributes["bits"], -(-columns // tile))
    assert packed.attributes["bits"] * weight.width == bits * tile
    of_tile = np.arange(indices.shape[1]) * tile // packed.attributes["group_size"]
    chosen = packed.selectors[:, of_tile] if packed.selectors.size else np.zeros_like(indices)
    level = packed.codebooks[chosen, indices, 0].reshape(rows, -1)[:, :columns]
    scales = packed.scales.astype(np.float32)[:, np.arange(columns) // packed.attributes["group_size"]]
    np.testing.assert_array_equal(level * scales, weight.numbers())
