"""Orthogonal matrices that spread outliers over many numbers."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Collection
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.graph.computed import identity, weight
from graphopt.runtime_ops.hadamard_transform.factors import hadamard_factor

Kind = Literal["hadamard", "orthogonal"]
KINDS: tuple[str, ...] = get_args(Kind)
_CHUNK = 1 << 20


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


@dataclasses.dataclass(frozen=True, eq=False)
class Rotation:
    """An orthogonal matrix.

    Attributes:
        matrix: Q, float64 [n, n].
    """

    matrix: npt.NDArray[np.float64]

    @functools.cached_property
    def digest(self) -> bytes:
        """Equal for equal matrices."""
        return hashlib.blake2b(np.ascontiguousarray(self.matrix).tobytes()).digest()


def random_rotation(features: int, kind: Kind, seed: int) -> Rotation:
    """A random orthogonal matrix Q, for x ↦ x Q.

    Args:
        features: Its size.
        kind: "hadamard": random signs, then `hadamard(features)`; "orthogonal": as likely as any other rotation.
        seed: The same seed gives the same matrix.

    Returns:
        Q, orthogonal to the last digits of float64.
    """
    rng = np.random.default_rng((seed, features))
    if kind == "hadamard":
        signs = np.where(rng.integers(0, 2, features), 1.0, -1.0)
        return Rotation(signs[:, None] * orthogonal(hadamard(features).astype(np.float64)))
    matrix, upper = np.linalg.qr(rng.standard_normal((features, features)))
    # The signs make every rotation as likely as every other.
    return Rotation(np.asarray(matrix * np.sign(np.diag(upper))))


def orthogonal(matrix: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The orthogonal matrix next to one that is orthogonal up to the rounding of float32 (two steps of Newton's)."""
    for _ in range(2):
        matrix = 1.5 * matrix - 0.5 * matrix @ matrix.T @ matrix
    return matrix


def rotated(
    tensor: ir.TensorProtocol,
    axis: int,
    rotation: Rotation,
    blocks: Collection[int] | None = None,
) -> ir.TensorProtocol:
    """A constant whose vectors v along an axis become v Q, in float64, rounded once; a large one when it is saved.

    For x' = x Q that is right for what makes x (its output axis) and for what reads x (its input axis): Qᵀ W.

    Args:
        tensor: The constant.
        axis: The axis, from the end. Where a constant is broadcast along it, the result isn't.
        rotation: Q [n, n]; the axis is as long, or holds several blocks of n that are rotated each.
        blocks: Which blocks are rotated; None: all.
    """
    matrix = rotation.matrix
    n = len(matrix)
    shape = list(tensor.shape.numpy())
    if len(shape) < -axis:
        shape = [*[1] * (-axis - len(shape)), *shape]
    if shape[axis] == 1:
        shape[axis] = n

    def compute() -> ir.TensorProtocol:
        array = tensor.numpy()
        whole = np.moveaxis(np.broadcast_to(array, shape), axis, -1)
        result = np.empty(whole.shape, array.dtype)
        rows, written = whole.reshape(-1, whole.shape[-1]), result.reshape(-1, whole.shape[-1])
        step = max(1, _CHUNK // whole.shape[-1])
        for start in range(0, len(rows), step):
            part = rows[start : start + step].astype(np.float64).reshape(-1, whole.shape[-1] // n, n)
            if blocks is None:
                part = part @ matrix
            else:
                part[:, list(blocks)] = part[:, list(blocks)] @ matrix
            written[start : start + step] = part.reshape(-1, whole.shape[-1])
        turned = np.ascontiguousarray(np.moveaxis(result, -1, axis))
        return ir.tensor(turned, dtype=tensor.dtype, name=tensor.name)

    which: tuple[Any, ...] = (None,) if blocks is None else tuple(blocks)
    origin = ("rotated", axis, rotation.digest, which, identity(tensor))
    return weight(compute, tensor.dtype, shape, tensor.name, origin)
