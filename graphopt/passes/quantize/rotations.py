"""Orthogonal matrices that spread outliers over many numbers."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from graphopt.runtime_ops.hadamard_transform.factors import hadamard_factor


@functools.lru_cache(maxsize=8)
def hadamard(features: int) -> npt.NDArray[np.float32]:
    """The orthonormal matrix H that `HadamardTransform` multiplies a group of features by: it makes H x of x.

    Args:
        features: 2^k · m; see `hadamard_factor`.

    Returns:
        (H_{2^k} ⊗ F) / sqrt(features), float32 [features, features]. Don't write into it.
    """
    factor = hadamard_factor(features)
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) * len(factor) < features:
        matrix = np.kron(np.array([[1, 1], [1, -1]], np.float32), matrix)
    return np.asarray(np.kron(matrix, factor) * features**-0.5, np.float32)
