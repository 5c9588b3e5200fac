"""Factors of HadamardTransform: Hadamard matrices and random rotations."""

from __future__ import annotations

import numpy as np
import pytest

from graphopt.runtime_ops.hadamard_transform.factors import hadamard_factor, hadamard_matrix

UNKNOWN = {92, 116, 156, 172, 184, 188, 232, 236}
"""Orders up to 256 that neither construction makes."""


@pytest.mark.parametrize("rows", range(1, 257))
def test_hadamard_matrices(rows: int) -> None:
    found = hadamard_matrix(rows)
    if rows in UNKNOWN or (rows > 2 and rows % 4):
        assert found is None
        return
    assert found is not None
    assert found.dtype == np.float32
    assert set(np.unique(found)) <= {-1.0, 1.0}
    np.testing.assert_array_equal(found @ found.T, rows * np.eye(rows))


@pytest.mark.parametrize(
    ("features", "rows", "hadamard"),
    [
        (1, 1, True), (4096, 1, True), (6, 3, False), (12, 12, True), (576, 36, True), (1536, 12, True),
        (5120, 20, True), (6656, 52, True), (11008, 43, False), (14336, 28, True), (18944, 148, True), (7, 7, False),
    ],
)  # fmt: skip
def test_factors_of_real_sizes(features: int, rows: int, hadamard: bool) -> None:
    factor = hadamard_factor(features)
    assert factor.dtype == np.float32
    assert factor.shape == (rows, rows)
    halves = features // rows
    assert halves * rows == features
    assert halves & (halves - 1) == 0
    np.testing.assert_allclose(factor @ factor.T, rows * np.eye(rows), atol=1e-4)
    assert bool(np.all(np.abs(factor) == 1)) == hadamard


def test_random_rotations_come_from_their_seed() -> None:
    np.testing.assert_array_equal(hadamard_factor(11008), hadamard_factor(11008, seed=0))
    assert not np.allclose(hadamard_factor(11008), hadamard_factor(11008, seed=1))
