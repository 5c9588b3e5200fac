"""HIGGS: weights rotated until they look normal, then rounded to the best vectors for normal numbers."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from graphopt.passes.quantize.codebook_grids import gaussian_grid
from graphopt.passes.quantize.gaussian_grids import STORED, gaussian_vectors, nearest_vectors
from graphopt.passes.quantize.gptq import Order, gptq
from graphopt.passes.quantize.grids import Array, Fit, Grid, step_size
from graphopt.passes.quantize.quantized_weight import QuantizedWeight
from graphopt.passes.quantize.rotations import hadamard
from graphopt.passes.quantize.roundings import round_to_nearest
from graphopt.passes.quantize.scale_search import searched_fit
from graphopt.runtime_ops.hadamard_transform.factors import LARGEST, hadamard_matrix

_SHARES = (0.8, 0.9, 1.0, 1.1, 1.2)
"""Scales that a search tries, as parts of the root of the mean square."""


@dataclasses.dataclass(frozen=True)
class GaussianVectorGrid(Grid):
    """w = s · c[code] for `width` neighbouring weights at once, with vectors c made for normal numbers of variance 1.

    A scale is the root of a group's mean square. Roundings that look at one weight at a time can't use it.

    Attributes:
        bits: Of a code: the grid has 2^bits vectors.
        width: Numbers of a vector, which divide the size of a group.
        search: Try scales around that one, then fit the best to the codes that it gives by least squares.
        half: Scales are numbers of float16.
    """

    bits: int = 8
    width: int = 2
    search: bool = False
    half: bool = True

    def __post_init__(self) -> None:
        gaussian_vectors(self.width, 1 << self.bits)

    def fit(self, block: npt.NDArray[np.float32], importance: npt.NDArray[np.float32] | None = None) -> Fit:
        """See the base."""
        mean = np.einsum("nm,nm->n", block, block) / max(block.shape[1], 1)
        trials = (Fit(step_size(np.sqrt(mean) * share, self.half)) for share in (_SHARES if self.search else (1.0,)))
        return searched_fit(self, block, trials, importance, self.half) if self.search else next(trials)

    def nearest(self, numbers: npt.NDArray[np.float32], fit: Fit) -> Array:
        """See the base: codes [N, ceil(m / width)]; what is missing of the last vector counts as 0."""
        scaled = np.pad(numbers / fit.scale[:, None], ((0, 0), (0, -numbers.shape[1] % self.width)))
        vectors = scaled.reshape(-1, self.width)
        codes = nearest_vectors(vectors, gaussian_vectors(self.width, 1 << self.bits))
        return codes.astype(np.uint8 if self.bits <= 8 else np.uint16).reshape(len(numbers), -1)

    def nearest_under(self, numbers: npt.NDArray[np.float32], fit: Fit, metric: npt.NDArray[np.float32]) -> Array:
        """See the base."""
        codes = nearest_vectors(numbers / fit.scale[:, None], gaussian_vectors(self.width, 1 << self.bits), metric)
        return codes.astype(np.uint8 if self.bits <= 8 else np.uint16)[:, None]

    def values(self, codes: Array, fit: Fit) -> npt.NDArray[np.float32]:
        """See the base: [N, width · codes of a row]."""
        level = gaussian_vectors(self.width, 1 << self.bits)[codes].reshape(len(codes), -1)
        return level * fit.scale[:, None]

    def levels(self) -> npt.NDArray[np.float32]:
        """See the base."""
        return gaussian_vectors(self.width, 1 << self.bits)[None]


def round_higgs(
    weight: npt.NDArray[np.float32],
    bits: int = 4,
    width: int = 2,
    group_size: int | None = None,
    rotation: int | None = None,
    search: bool = False,
    half: bool = True,
    hessian: Array | None = None,
    damping: float = 0.01,
    order: Order = "groups",
) -> QuantizedWeight:
    """Rotate groups of columns, and round what comes out to vectors made for normal numbers.

    A rotation by a Hadamard matrix makes sums of many weights of each, which are nearly normal whatever those were; so
    one grid without any data is the best for all matrices, and a group's scale is its root mean square. Paper: "Pushing
    the Limits of Large Language Model Quantization via the Linearity Theorem". There a group is rotated and scaled
    alike, 1024 columns of it.

    Args:
        weight: [N, K].
        bits: Of a weight: 2 to 4 with `width` 2, 2 and 3 with 4, 1 to 8 with 1.
        width: Neighbouring weights that share a code: 1, 2 or 4.
        group_size: Columns that share a scale, a multiple of `width`; None: those that are rotated together.
        rotation: Columns that are rotated together, of which `hadamard` knows a matrix; 0: none are; None: as
            `rotation_size` says.
        search: Fit scales by the least squared error, which pays in groups of fewer than 256 columns.
        half: Scales are numbers of float16.
        hessian: [K, K], the second moments of the inputs as they are: round by `gptq`, in the rotated basis. None: to
            nearest.
        damping: See `gptq`.
        order: See `gptq`.

    Raises:
        ValueError: No grid of this kind, or a size that doesn't fit.
    """
    columns = weight.shape[1]
    rotation = rotation_size(columns) if rotation is None else rotation
    if rotation and columns % rotation:
        raise ValueError(f"{columns} columns can't be rotated {rotation} at a time")
    size = group_size or rotation or columns
    if size % width and size < columns:
        raise ValueError(f"a group of {size} columns isn't a multiple of {width}, the numbers that share a code")
    grid: Grid
    if width == 1:
        grid = gaussian_grid(bits, search=search, half=half)
    elif (width, 1 << bits * width) not in STORED:
        known = ", ".join(f"{b} bits with {p} to a code" for (p, _), b in STORED.items())
        raise ValueError(f"HIGGS of {bits} bits with {width} weights to a code has no grid; there are {known}")
    else:
        grid = GaussianVectorGrid(bits * width, width, search, half)
    turned = rotated(weight, rotation)
    if hessian is None:
        rounded = round_to_nearest(turned, grid, size)
    else:
        moments = rotated(rotated(hessian, rotation).T, rotation)
        rounded = gptq(turned, grid, size, moments, damping=damping, order=order)
    return dataclasses.replace(rounded, hadamard=rotation)


def rotated(weight: npt.NDArray[np.float32], size: int) -> npt.NDArray[np.float32]:
    """W Hᵀ, each `size` columns of a weight [N, K] turned by an orthonormal Hadamard matrix; 0: the weight itself."""
    if not size:
        return weight
    blocks = weight.reshape(len(weight), -1, size) @ hadamard(size).T
    return np.asarray(blocks.reshape(weight.shape), np.float32)


def rotation_size(columns: int, least: int = 256, most: int = 1024) -> int:
    """How many columns are rotated together.

    The largest power of two from `least` to `most` that divides them; else the largest other divisor up to `most` of
    which a Hadamard matrix can be made; else that with a random rotation as its factor; 0: none is larger than 1.

    Args:
        columns: K, at least 1.
        least: The smallest power of two that is preferred, for speed, to larger sizes. With a scale for each rotated
            group, one of 64 columns costs as much as a quarter of a bit of a weight, which takes 30 % off the error.
        most: The largest size.
    """
    divisors = [size for size in range(2, min(columns, most) + 1) if columns % size == 0]
    powers = [size for size in divisors if size & (size - 1) == 0 and size >= least]
    if powers:
        return powers[-1]
    made = [size for size in divisors if _has_matrix(size)]
    return max(made or [size for size in divisors if _odd(size) <= LARGEST], default=0)


def _has_matrix(size: int) -> bool:
    rows = _odd(size)
    while size % rows == 0 and rows <= LARGEST:
        if hadamard_matrix(rows) is not None:
            return True
        rows *= 2
    return False


def _odd(size: int) -> int:
    return size // (size & -size)
