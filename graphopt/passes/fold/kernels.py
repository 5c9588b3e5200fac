"""Kernels of convolutions, [M, C/group, ...], composed, added and stacked: in float64, rounded once.

A convolution with g groups is one with fewer groups whose kernel holds zeros, so two kernels meet at the greatest
common divisor of their groups.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.windows import Window, place
from graphopt.graph.computed import weight
from graphopt.passes.fold.layers import Numbers


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The numbers of a convolution and where they stand.

    Attributes:
        shape: [M, C/group, ...].
        group: The number of groups.
        window: Where its taps read.
        dtype: The type of its weights.
        compute: Gives the numbers, in any floating-point type; large ones are asked for when they are saved.
    """

    shape: tuple[int, ...]
    group: int
    window: Window
    dtype: ir.DataType
    compute: Callable[[], npt.NDArray[Any]]

    @property
    def size(self) -> int:
        """How many weights it has, which is how many products one output position takes."""
        return math.prod(self.shape)

    @property
    def inputs(self) -> int:
        """Number of input channels."""
        return self.shape[1] * self.group

    def describe(self) -> str:
        """The kernel in words: "96 → 24 channels, 3×3, stride 2×2, 4 groups"."""
        parts = [f"{self.inputs} → {self.shape[0]} channels", "×".join(map(str, self.window.kernel))]
        for name, numbers in (("stride", self.window.strides), ("dilation", self.window.dilations)):
            if any(n != 1 for n in numbers):
                parts.append(f"{name} {'×'.join(map(str, numbers))}")
        return ", ".join([*parts, f"{self.group} groups"] if self.group > 1 else parts)

    def numbers(self) -> Numbers:
        """The weights in float64."""
        return self.compute().astype(np.float64)

    def tensor(self) -> ir.TensorProtocol:
        """The weights as a constant, computed now where they are small."""

        def make() -> ir.TensorProtocol:
            with np.errstate(over="ignore"):
                array = np.ascontiguousarray(self.numbers().astype(self.dtype.numpy()))
            return ir.tensor(array, dtype=self.dtype)

        return weight(make, self.dtype, self.shape)

    def problem(self) -> str | None:
        """Why its weights can't be written in their type."""
        import ml_dtypes

        info = ml_dtypes.finfo(self.dtype.numpy())
        peaks = np.abs(self.numbers()).reshape(self.shape[0], -1).max(axis=1, initial=0.0)
        if not (peaks <= float(info.max)).all():
            return f"the weights would overflow {self.dtype.name.lower()}"
        # Half of the smallest normal number: where the largest weight of a channel is below it, rounding loses bits.
        lowest = float(info.smallest_normal) / 2 if self.dtype == ir.DataType.FLOAT16 else 0.0
        if ((peaks > 0) & (peaks < lowest)).any():
            return f"the weights would lose precision in {self.dtype.name.lower()}"
        return None


def delta(scale: Numbers, rank: int, dtype: ir.DataType) -> Kernel:
    """The kernel of y = scale · x, one number a channel, of axes 2 to `rank`: of size 1, a group for each channel."""
    ones, zeros = (1,) * (rank - 2), (0,) * (rank - 2)
    shape = (scale.size, 1, *ones)
    return Kernel(shape, scale.size, Window(ones, ones, ones, zeros, zeros), dtype, lambda: scale.reshape(shape))


def composed(first: Kernel, second: Kernel) -> Kernel:
    """The kernel that does what `first` and then `second` do: U[s₁·d₂·b + d₁·a] = Σ W[b]·V[a]."""
    group = math.gcd(first.group, second.group)
    window = first.window.then(second.window)

    def compute() -> Numbers:
        v, w = _with_groups(first, group), _with_groups(second, group)
        result = np.zeros((group, w.shape[1], v.shape[2], *window.kernel))
        one, two = first.window, second.window
        for b in itertools.product(*map(range, two.kernel)):
            for a in itertools.product(*map(range, one.kernel)):
                tap = tuple(
                    (s * e * j + d * i) // step
                    for s, e, j, d, i, step in zip(
                        one.strides, two.dilations, b, one.dilations, a, window.dilations, strict=True
                    )
                )
                result[_taps(tap)] += np.matmul(w[_taps(b)], v[_taps(a)])
        return result.reshape(-1, *result.shape[2:])

    shape = (second.shape[0], first.inputs // group, *window.kernel)
    return Kernel(shape, group, window, first.dtype, compute)


def added(kernels: Sequence[Kernel], window: Window) -> Kernel:
    """The kernel that does the sum of what `kernels` do; `window` holds the taps of all."""
    group = math.gcd(*(kernel.group for kernel in kernels))
    inputs = kernels[0].inputs // group

    def compute() -> Numbers:
        result = np.zeros((group, kernels[0].shape[0] // group, inputs, *window.kernel))
        for kernel in kernels:
            result[_taps(place(kernel.window, window))] += _with_groups(kernel, group)
        return result.reshape(-1, *result.shape[2:])

    return Kernel((kernels[0].shape[0], inputs, *window.kernel), group, window, kernels[0].dtype, compute)


def _taps(index: tuple[Any, ...]) -> Any:
    """An index of the last axes."""
    return (..., *index)


def _with_groups(kernel: Kernel, group: int) -> Numbers:
    """The kernel with fewer groups, [group, M/group, C/group, ...]; zeros stand where the old groups don't meet."""
    array = kernel.numbers()
    parts = kernel.group // group
    rows, columns, taps = array.shape[0] // kernel.group, array.shape[1], array.shape[2:]
    old = array.reshape(group, parts, rows, columns, *taps)
    result = np.zeros((group, parts, rows, parts, columns, *taps))
    for part in range(parts):
        result[:, part, :, part] = old[:, part]
    return result.reshape(group, parts * rows, parts * columns, *taps)
