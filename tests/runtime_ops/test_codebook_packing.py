"""Packed indices: the bytes, and back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.runtime_ops.codebook_matmul.packing import pack_indices, packed_size, unpack_indices


@given(st.integers(1, 16), st.integers(0, 3), st.integers(0, 37), st.integers(0, 2**32 - 1))
def test_what_was_packed_comes_back(bits: int, rows: int, count: int, seed: int) -> None:
    indices = np.random.default_rng(seed).integers(0, 1 << bits, (rows, count))
    packed = pack_indices(indices, bits)
    assert packed.shape == (rows, packed_size(count, bits))
    np.testing.assert_array_equal(unpack_indices(packed, bits, count), indices)


def test_three_bits_take_three_bytes_for_eight() -> None:
    assert pack_indices([1, 2, 3, 4, 5, 6, 7, 0], 3).tolist() == [0b11_010_001, 0b0_101_100_0, 0b000_111_11]
    assert pack_indices([15, 1], 4).tolist() == [0x1F]


def test_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="from 0 to 8 don't fit 3 bits"):
        pack_indices([0, 8], 3)
    with pytest.raises(ValueError, match="from -1 to 2"):
        pack_indices([-1, 2], 3)
    with pytest.raises(ValueError, match="1 to 16 bits, not 17"):
        pack_indices([0], 17)
    with pytest.raises(ValueError, match="5 indices of 3 bits take 2 bytes, not 3"):
        unpack_indices(np.zeros((2, 3), np.uint8), 3, 5)
