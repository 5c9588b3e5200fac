"""Bases in which keys and values of a layer, or of several layers side by side, have few coordinates."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float64]

RIDGE = 1e-4
"""What is added to the diagonal of a weight, as a part of its mean, so that nothing counts as nothing."""


@dataclasses.dataclass(frozen=True)
class Basis:
    """Coordinates of rows x [d]: c = (x − μ) E, from which x ≈ c D + μ is rebuilt.

    Attributes:
        encoder: E [d, r].
        decoder: D [r, d].
        mean: μ [d].
    """

    encoder: Floats
    decoder: Floats
    mean: Floats

    @property
    def rank(self) -> int:
        """r."""
        return len(self.decoder)

    def part(self, own: slice) -> Basis:
        """The same coordinates, from which some of the elements are rebuilt."""
        return Basis(self.encoder[own], self.decoder[:, own], self.mean[own])

    def blocks(self, count: int) -> Floats | None:
        """D as blocks along its diagonal, [count, d / count, d / count]; None: it is one, or more than these."""
        size = len(self.mean) // count
        if count == 1 or self.decoder.shape != (size * count, size * count):
            return None
        split = self.decoder.reshape(count, size, count, size)
        found = np.stack([split[index, :, index] for index in range(count)])
        return found if np.count_nonzero(found) == np.count_nonzero(self.decoder) else None

    @classmethod
    def of_blocks(cls, blocks: Floats) -> Basis:
        """That of an orthogonal matrix [s, s] for each part of s elements, [count, s, s], around 0."""
        count, size, _ = blocks.shape
        encoder = np.zeros((count, size, count, size))
        for index, block in enumerate(blocks):
            encoder[index, :, index] = block
        whole = encoder.reshape(count * size, count * size)
        return cls(whole, whole.T.copy(), np.zeros(count * size))


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """All d coordinates, those that matter most first.

    Attributes:
        whole: The basis of full rank, in which nothing is lost.
        energies: What each coordinate contributes to E[(x − μ) M (x − μ)ᵀ], [d], falling.
    """

    whole: Basis
    energies: Floats

    def basis(self, rank: int) -> Basis:
        """The best one of a rank."""
        return Basis(self.whole.encoder[:, :rank], self.whole.decoder[:rank], self.whole.mean)

    def lost(self, rank: int) -> float:
        """The part of the energy that a rank leaves out, 0 to 1."""
        total = float(self.energies.sum())
        return float(self.energies[rank:].sum()) / total if total > 0 else 0.0

    def rank_for(self, energy: float) -> int:
        """The least rank that keeps a part of the energy, at least 1."""
        return next(
            (rank for rank in range(1, len(self.energies)) if self.lost(rank) <= 1 - energy), len(self.energies)
        )


def spectrum(moment: npt.NDArray[Any], mean: npt.NDArray[Any], weights: npt.NDArray[Any] | None = None) -> Spectrum:
    """The coordinates whose first r, for every r, lose least of E[(x − x̂) M (x − x̂)ᵀ].

    With M = L Lᵀ they are the principal axes U of (x − μ) L, so that E = L U and D = Uᵀ L⁻¹.

    Args:
        moment: E[xᵀ x], [d, d].
        mean: μ = E[x], [d].
        weights: The blocks of M along its diagonal, [blocks, s, s] with blocks · s = d; None: M is the identity.
    """
    centre = np.asarray(mean, dtype=np.float64)
    covariance = np.asarray(moment, dtype=np.float64) - np.outer(centre, centre)
    factor = np.eye(len(centre)) if weights is None else _factor(np.asarray(weights, dtype=np.float64))
    values, vectors = np.linalg.eigh(factor.T @ covariance @ factor)
    order = np.argsort(-values, kind="stable")
    axes = vectors[:, order]
    decoder = np.linalg.solve(factor.T, axes).T
    return Spectrum(Basis(factor @ axes, decoder, centre), np.maximum(values[order], 0.0))


def _factor(blocks: Floats) -> Floats:
    """L of M = L Lᵀ, scaled so that the mean of M's diagonal is 1: coordinates are as large as what they stand for."""
    count, size, _ = blocks.shape
    level = float(np.trace(blocks, axis1=1, axis2=2).sum()) / (count * size)
    found = np.zeros((count * size, count * size))
    for index, block in enumerate(blocks):
        scaled = (block + block.T) / (2 * level) if level > 0 else np.zeros((size, size))
        own = slice(index * size, (index + 1) * size)
        found[own, own] = np.linalg.cholesky(scaled + RIDGE * np.eye(size))
    return found
