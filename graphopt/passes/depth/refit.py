"""Least squares from moments: a map that starts from another one, and as much of it as the data bears."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
STRENGTHS = np.logspace(-6, 6, 73)
"""Ridges that are tried, in parts of each input's own power."""
COARSE = 3
"""Of how many of them one is tried where each costs a product of matrices."""


@dataclasses.dataclass(frozen=True)
class Moments:
    """Means over rows of inputs y [P] and outputs r [N], what r is to be made of.

    Attributes:
        gram: E[yᵀ y], [P, P].
        cross: E[yᵀ r], [P, N].
        energy: E[r²], [N].
        rows: How many rows there were.
    """

    gram: Floats
    cross: Floats
    energy: Floats
    rows: int

    def error(self, weight: Floats) -> float:
        """E|r − y W|² of a map [P, N]."""
        product = self.gram @ weight
        return float((self.energy + (weight * (product - 2 * self.cross)).sum(0)).sum())


def linear_map(
    moments: Moments, before: Floats, ridge: float = 0.0, halves: tuple[Moments, Moments] | None = None
) -> Floats:
    """The map W [P, N] of least E|r − y W|² + λ Σ_i E[y_i²] |W_i − W⁰_i|².

    Inputs count by their own scale, so that one of large numbers isn't spared.

    Args:
        moments: The moments.
        before: W⁰.
        ridge: λ. 0: the one of least error of each half's map on the other half; without halves the one of least
            generalised cross-validation, E|r − y W|² / (1 − f / rows)², f being the degrees of freedom that λ leaves
            (Generalized Cross-Validation as a Method for Choosing a Good Ridge Parameter, Golub, Heath and Wahba,
            1979), which takes rows for independent.
        halves: Moments of two halves of the samples.
    """
    solve = _Solver(moments, before)
    if ridge > 0:
        return solve.map(ridge)
    if halves is None:
        return solve.map(float(min(STRENGTHS[::-1], key=solve.validated)))
    tried = STRENGTHS[::-COARSE]
    errors = np.zeros(len(tried))
    for fitted, other in (halves, halves[::-1]):
        of_half = _Solver(fitted, before)
        errors += [other.rows * other.error(of_half.map(strength)) for strength in tried]
    return solve.map(float(tried[int(errors.argmin())]))


class _Solver:
    """The maps of all ridges, from one decomposition."""

    def __init__(self, moments: Moments, before: Floats) -> None:
        self._moments, self._before = moments, before
        self._scale = np.sqrt(np.maximum(np.diag(moments.gram), 1e-30))
        values, self._vectors = np.linalg.eigh(moments.gram / np.outer(self._scale, self._scale))
        self._values = np.maximum(values, 0.0)
        # In the directions of the inputs: what the map before leaves, and how much of it each could make up for.
        self._left = self._vectors.T @ ((moments.cross - moments.gram @ before) / self._scale[:, None])
        self._power, self._whole = np.square(self._left).sum(1), moments.error(before)

    def map(self, ridge: float) -> Floats:
        """That of one ridge."""
        more = self._vectors @ (self._left / (self._values + ridge)[:, None])
        return np.asarray(self._before + more / self._scale[:, None])

    def validated(self, ridge: float) -> float:
        """The error by generalised cross-validation."""
        shrunk = 1 / (self._values + ridge)
        error = self._whole - float((self._power * (2 * shrunk - self._values * shrunk**2)).sum())
        freedom = float((self._values * shrunk).sum()) / max(self._moments.rows, 1)
        return max(error, 0.0) / (1 - freedom) ** 2 if freedom < 1 else float("inf")


def factors(moments: Moments, ridge: float = 0.0) -> Floats:
    """For each output r_j the factor a of y_j, and the shift b where y ends in one number more, of least error.

    Returns:
        A map [P, N]: a on the diagonal, b in its last row.
    """
    gram, cross = moments.gram, moments.cross
    size = cross.shape[1]
    power, along = np.diag(gram)[:size], np.diag(cross)
    if len(gram) == size:
        return np.asarray(np.diag((along + ridge * power) / np.maximum((1 + ridge) * power, 1e-30)))
    ones, tilt, wanted = gram[-1, -1], gram[-1, :size], cross[-1]
    # Two equations for each channel: of the factor and of the shift.
    determinant = np.maximum((1 + ridge) * power * ones - tilt**2, 1e-30)
    factor = ((along + ridge * power) * ones - tilt * wanted) / determinant
    return np.vstack([np.diag(factor), (wanted - factor * tilt) / ones])


def of_written(second: npt.NDArray[Any], weight: Floats, *, shifted: bool, rows: int) -> Moments:
    """The moments of y = h W, and of c where the map may hold a shift, from those of (h, r, c).

    Args:
        second: The second moments [K + N + 1, K + N + 1] of h [K], r [N] and c.
        weight: W [K, N].
        shifted: Whether c is the last of the inputs.
        rows: How many rows there were.
    """
    moments = second.astype(np.float64)
    size, outputs = weight.shape
    taken = [*range(size), *([len(moments) - 1] if shifted else [])]
    written = np.zeros((len(taken), outputs + shifted))
    written[:size, :outputs] = weight
    written[size:, outputs:] = 1
    gram = written.T @ moments[np.ix_(taken, taken)] @ written
    cross = written.T @ moments[np.ix_(taken, range(size, size + outputs))]
    return Moments(gram, cross, np.diag(moments)[size : size + outputs].copy(), rows)
