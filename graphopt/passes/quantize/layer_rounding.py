"""How the weight of a layer is rounded where what it reads is rounded too: from moments of both inputs.

With x [K] what a layer of the original reads, x̂ what it reads once all before it is rounded, and a bias that is free,
rounding W [N, K] to Q loses

    E |W x + b − Q x̂ − b̂|² = tr((W′ − Q) Ĥ (W′ − Q)ᵀ) + constant        W′ = W C Ĥ⁻¹,  b̂ = b + W E[x] − Q E[x̂]

with the covariances Ĥ = Cov[x̂, x̂] and C = Cov[x, x̂], so that any rounding that takes a Hessian serves.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.passes.fold.layers import Layer
from graphopt.passes.quantize.compensation import Moments, output_moments, rescaled, restoring
from graphopt.passes.quantize.integer_weights import IntegerWeight, SignedGrid
from graphopt.passes.quantize.quantized_weight import QuantizedWeight
from graphopt.passes.quantize.roundings import Rounding, quantize

Array = npt.NDArray[Any]
Correction = Literal["none", "bias", "moments", "reconstruct"]
CORRECTIONS: tuple[Correction, ...] = get_args(Correction)
_DAMPING = 0.01


@dataclasses.dataclass(frozen=True)
class PairMoments:
    """Moments of (x, x̂), of K numbers each.

    Attributes:
        mean: float [2K].
        second: float [2K, 2K].
    """

    mean: Array
    second: Array

    @property
    def size(self) -> int:
        """K."""
        return len(self.mean) // 2

    def covariance(self) -> Array:
        """float64 [2K, 2K]."""
        mean = self.mean.astype(np.float64)
        return np.asarray(self.second.astype(np.float64) - np.outer(mean, mean))


@dataclasses.dataclass(frozen=True)
class RoundedLayer:
    """A layer's weight as integers.

    Attributes:
        weight: [N, K], codes of a `SignedGrid`, one group a row.
        shift: float64 [N], what is added to the bias.
    """

    weight: QuantizedWeight
    shift: npt.NDArray[np.float64]

    def numbers(self) -> npt.NDArray[np.float32]:
        """What the weight stands for, float32 [N, K]."""
        return self.weight.numbers()

    def matrix(self) -> IntegerWeight:
        """The weight as int8 [K, N]."""
        codes, scales = self._signed()
        return IntegerWeight(ir.tensor(np.ascontiguousarray(codes.T)), scales)

    def kernels(self, layer: Layer, least: npt.NDArray[np.float64]) -> IntegerWeight:
        """The weight of a convolution as int8 [M, C, ...], with scales of at least `least` [M]."""
        codes, scales = self._signed()
        wanted = np.maximum(scales, least.astype(np.float32))
        codes = np.rint(codes * (scales / wanted)[:, None]).astype(np.int8)
        return IntegerWeight(ir.tensor(codes.reshape(layer.weight.shape.numpy())), wanted)

    def _signed(self) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
        middle, scales = 1 << (self.weight.bits - 1), self.weight.scales[:, 0].astype(np.float32)
        # A descent over scales may leave one negative, which the kernels don't take.
        codes = (self.weight.codes.astype(np.int16) - middle) * np.where(scales < 0, -1, 1)[:, None]
        return np.clip(codes, -middle, middle - 1).astype(np.int8), np.abs(scales)


def round_alone(weight: npt.NDArray[np.float32], grid: SignedGrid, rounding: Rounding, second: Array) -> RoundedLayer:
    """Round a layer's weight, and correct nothing.

    Args:
        weight: float32 [N, K].
        grid: The integers.
        rounding: How codes are chosen, see `roundings.quantize`.
        second: E[x̂ x̂ᵀ] of what it reads once rounded, [K, K], or the covariance.

    Raises:
        ValueError: See `roundings.quantize`.
    """
    hessian = np.asarray((second + second.T) / 2, np.float32)
    rounded = quantize(np.ascontiguousarray(weight), grid, weight.shape[1], rounding, hessian=hessian)
    return RoundedLayer(rounded, np.zeros(len(weight)))


def round_layer(
    weight: npt.NDArray[np.float32],
    grid: SignedGrid,
    rounding: Rounding,
    correction: Correction,
    pair: PairMoments,
) -> RoundedLayer:
    """Round a layer's weight and correct its bias.

    Args:
        weight: float32 [N, K].
        grid: The integers.
        rounding: How codes are chosen, see `roundings.quantize`.
        correction: "none"; "bias": the mean of each output is that of the original (Nagel et al., 2019, with means of
            data); "moments": mean and variance are (norm re-estimation); "reconstruct": W′ is rounded instead of W,
            and means are kept.
        pair: Moments of what the layer reads, and of what it reads once rounded.

    Raises:
        ValueError: See `roundings.quantize`.
    """
    size = pair.size
    if correction == "none":
        return round_alone(weight, grid, rounding, pair.second[size:, size:])
    covariance = pair.covariance()
    hessian = covariance[size:, size:]
    target = weight
    if correction == "reconstruct":
        damping = _DAMPING * float(np.trace(hessian)) / size or 1.0
        damped = hessian + damping * np.eye(size)
        aim = weight.astype(np.float64) @ (covariance[:size, size:] + damping * np.eye(size))
        target = np.linalg.solve(damped, aim.T).T.astype(np.float32)
    used = pair.second[size:, size:] if correction == "moments" else hessian
    rounded = round_alone(target, grid, rounding, used).weight
    if correction == "moments":
        before, after = (
            output_moments(w, pair.mean[own], pair.second[own, own])
            for w, own in ((weight, slice(size)), (rounded.numbers(), slice(size, None)))
        )
        # A channel that hardly varies any more is not blown up.
        found = restoring(before, Moments(after.mean, after.variance), 1.25)
        rounded = rescaled(rounded, found.scale)
    means = pair.mean.astype(np.float64)
    shift = weight.astype(np.float64) @ means[:size] - rounded.numbers().astype(np.float64) @ means[size:]
    return RoundedLayer(rounded, shift)
