"""Compensation: what is added to a rounded layer so that its outputs come nearer to those of the original.

For a layer y = W x with weights Ŵ after rounding, the *error* is E = W − Ŵ [N outputs, K inputs], and with H = E[xᵀx]

    mean |y − ŷ|² = tr(E H Eᵀ)

Low-rank branches take the largest part of E, a bias its effect on the mean input, and a scale of each output channel
restores the spread that outputs had.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.graph.edits import Editor
from graphopt.passes.fold.channel_affine import Affine
from graphopt.passes.quantize.quantized_weight import Outliers, QuantizedWeight

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class LowRank:
    """A branch y += B (A x).

    Attributes:
        b: float32 [N, r].
        a: float32 [r, K]; row i of A and column i of B have the same length.
    """

    b: npt.NDArray[np.float32]
    a: npt.NDArray[np.float32]

    @property
    def matrix(self) -> npt.NDArray[np.float32]:
        """B A, [N, K]."""
        return self.b @ self.a


def low_rank(error: Array, rank: int, hessian: Array | None = None) -> LowRank:
    """The branch of a rank that takes most of a layer's error.

    Without H it is the matrix next to E (LoRC: ZeroQuant-V2: Exploring Post-training Quantization in LLMs from
    Comprehensive Study to Low Rank Compensation). With H it is the one that makes tr((E − BA) H (E − BA)ᵀ) least (EoRA:
    Training-free Compensation for Compressed LLM with Eigenspace Low-Rank Approximation): with H = S Sᵀ that is the
    squared length of E S − B (A S), whose minimum is the truncated singular value decomposition U Σ Vᵀ of E S, so

        B A = U Σ Vᵀ S⁻¹ = U Uᵀ E S S⁻¹ = U Uᵀ E

    The paper divides by the root of the eigenvalues of H and clamps tiny ones; U Uᵀ E needs no inverse, and is right
    where H is singular too.

    Args:
        error: W − Ŵ, [N, K].
        rank: At most so many columns of B; fewer where E has a lower rank.
        hessian: H = E[xᵀx], [K, K]; None: LoRC.

    Raises:
        ValueError: The rank isn't positive.
    """
    if rank < 1:
        raise ValueError(f"a branch has a rank of at least 1, not {rank}")
    matrix = error.astype(np.float64)
    rows, columns = matrix.shape
    # The eigenvectors of the smaller of both products: squares of singular values lose no digits that count here.
    if rows <= columns:
        seen = matrix if hessian is None else matrix @ hessian.astype(np.float64)
        values, vectors = np.linalg.eigh(seen @ matrix.T)
        left = vectors[:, ::-1][:, :rank]
    else:
        seen = matrix if hessian is None else matrix @ _root(hessian)
        values, vectors = np.linalg.eigh(seen.T @ seen)
        left = seen @ vectors[:, ::-1][:, :rank]
    largest = values[::-1][:rank]
    left = left[:, largest > max(float(values[-1]), 0) * 1e-12]
    if left.shape[1]:
        left, _ = np.linalg.qr(left)
    a = left.T @ matrix
    balance = np.sqrt(np.maximum(np.linalg.norm(a, axis=1), np.finfo(np.float32).tiny))
    return LowRank((left * balance).astype(np.float32), (a / balance[:, None]).astype(np.float32))


def _root(hessian: Array) -> npt.NDArray[np.float64]:
    """S with S Sᵀ = H, where H has no negative eigenvalues but those that rounding made."""
    values, vectors = np.linalg.eigh(hessian.astype(np.float64))
    return np.asarray(vectors * np.sqrt(np.maximum(values, 0)))


def bias_correction(error: Array, mean: Array) -> npt.NDArray[np.float32]:
    """What rounding took from the mean of each output, to be added to the bias: (W − Ŵ) E[x], float32 [N].

    Data-Free Quantization Through Weight Equalization and Bias Correction (Nagel et al., 2019), with means of data.

    Args:
        error: W − Ŵ, [N, K], less the branch B A where there is one.
        mean: E[x], [K].
    """
    return np.asarray(error.astype(np.float64) @ mean.astype(np.float64), np.float32)


@dataclasses.dataclass(frozen=True)
class Moments:
    """Mean and variance of each channel, [N] each."""

    mean: Array
    variance: Array


def output_moments(weight: Array, mean: Array, second_moment: Array) -> Moments:
    """Mean and variance of W x, from those of x.

    Args:
        weight: [N, K].
        mean: E[x], [K].
        second_moment: E[xᵀx], [K, K].
    """
    rows = weight.astype(np.float64)
    centre = rows @ mean.astype(np.float64)
    squares = np.einsum("nk,nk->n", rows @ second_moment.astype(np.float64), rows)
    return Moments(centre, np.maximum(squares - centre**2, 0))


def restoring(original: Moments, now: Moments, limit: float = 2.0) -> Affine:
    """The map of each channel that gives it back the mean and the variance that it had.

        y ← s y + t        s = σ / σ̂,   t = μ − s μ̂

    Of Rethinking Model Re-Basin and Linear Mode Connectivity (rescaling and reshift after a model was changed).

    Args:
        original: Of the original's channels.
        now: Of the same channels after weights were rounded, on the same data.
        limit: s is kept between 1/limit and limit.

    Returns:
        A map that goes into the layer that makes the channels (`rescaled` and its bias), or into those behind it
        (`graphopt.passes.fold.neighbours`), or into a normalization's gain and bias.
    """
    before, after = (m.variance.astype(np.float64) for m in (original, now))
    known = after > max(float(after.max(initial=0)), 0) * 1e-12
    scale = np.where(known, np.sqrt(before / np.where(known, after, 1)), 1.0)
    scale = np.clip(scale, 1 / limit, limit)
    return Affine(scale, original.mean - scale * now.mean)


def rescaled(weight: QuantizedWeight, scale: Array) -> QuantizedWeight:
    """A weight whose rows are multiplied by numbers, with the same codes: diag(s) Ŵ.

    Args:
        weight: [N, K].
        scale: s, [N].
    """
    factor = scale.astype(np.float32)[:, None]
    outliers = weight.outliers
    if outliers is not None:
        values = outliers.values * factor[outliers.rows, 0]
        outliers = Outliers(outliers.rows, outliers.columns, values.astype(np.float32))
    offsets = None if weight.offsets is None else weight.offsets * factor
    return dataclasses.replace(weight, scales=weight.scales * factor, offsets=offsets, outliers=outliers)


def with_branch(x: ir.Value, y: ir.Value, branch: LowRank, edit: Editor) -> ir.Value:
    """Write y + B (A x) before the site of `edit`, which must lie behind what makes both.

    Args:
        x: What the layer reads, [..., K].
        y: What it gives out, [..., N].
        branch: B and A; stored in the type of `y`.
        edit: The editor.

    Returns:
        The sum. Nothing reads it yet.
    """
    dtype = (y.dtype or ir.DataType.FLOAT).numpy()
    down = edit.constant(np.ascontiguousarray(branch.a.T).astype(dtype), "low_rank_in")
    up = edit.constant(np.ascontiguousarray(branch.b.T).astype(dtype), "low_rank_out")
    inner = edit.op("MatMul", [x, down])
    return edit.op("Add", [y, edit.op("MatMul", [inner, up], like=y)], like=y)
