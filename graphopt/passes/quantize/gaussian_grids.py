"""Numbers and vectors that stand for normal ones with the least squared error, the grids of HIGGS.

Single numbers are computed when they are asked for. Vectors take minutes, and are stored beside this file; this makes
them again, to the same bytes with the same NumPy and BLAS:

    python -m graphopt.passes.quantize.gaussian_grids gaussian_grids.npz
"""

from __future__ import annotations

import functools
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt.passes.quantize.codebooks import Codebook

Array = npt.NDArray[Any]

STORED = {(2, 16): 2, (2, 64): 3, (2, 256): 4, (4, 256): 2, (4, 4096): 3}
"""The stored grids: (numbers of a vector, vectors) and the bits of a weight."""
_FILE = Path(__file__).with_suffix(".npz")
_PRODUCTS = 1 << 16
"""Products of vectors and entries made at once; more of them leave the cache, and take up to 20 times as long."""


@functools.lru_cache(maxsize=16)
def lloyd_max(count: int) -> Codebook:
    """The numbers with the least mean squared distance to a normal number of variance 1.

    The conditions of Lloyd and Max, each number being the mean of what is nearest to it, are solved by Newton's method,
    beginning at quantiles of the normal distribution of variance 3, which are nearly right for large counts. Paper:
    "Least Squares Quantization in PCM".

    Args:
        count: 2 to 256.

    Returns:
        As many numbers, ascending and symmetric around 0.

    Raises:
        ValueError: The count is out of range.
    """
    if not 2 <= count <= 256:
        raise ValueError(f"a grid for normal numbers has 2 to 256 of them here, not {count}")
    normal = statistics.NormalDist()
    x = np.array([math.sqrt(3) * normal.inv_cdf((index + 0.5) / count) for index in range(count)])
    for _ in range(200):
        ends = np.concatenate([[-np.inf], (x[:-1] + x[1:]) / 2, [np.inf]])
        mass = np.diff([normal.cdf(end) for end in ends])
        density = np.array([normal.pdf(end) if math.isfinite(end) else 0.0 for end in ends])
        residual = x * mass + np.diff(density)
        # How a number's residual changes with the number, and with its neighbours through the ends between them.
        beside = density[1:-1] * np.diff(x) / 4
        own = mass - np.append(beside, 0) - np.append(0, beside)
        jacobian = np.diag(own) - np.diag(beside, 1) - np.diag(beside, -1)
        step = np.linalg.solve(jacobian, residual)
        # Far from the solution, only moving to the means is sure to come nearer.
        near = bool((np.diff(x - step) > 0).all()) and np.abs(step).max() < 0.1
        x = x - (step if near else residual / mass)
        if np.abs(step).max() < 1e-9:
            break
    return tuple(float(number) for number in (x - x[::-1]) / 2)


@functools.lru_cache(maxsize=16)
def gaussian_vectors(width: int, count: int) -> npt.NDArray[np.float32]:
    """The vectors with the least mean squared distance to one of `width` independent normal numbers of variance 1.

    Args:
        width: Numbers of a vector; 1: see `lloyd_max`.
        count: Vectors.

    Returns:
        float32 [count, width]. Don't write into it.

    Raises:
        ValueError: There is no such grid.
    """
    if width == 1:
        return np.array(lloyd_max(count), np.float32)[:, None]
    if (width, count) not in STORED:
        known = ", ".join(f"{n} of {p}" for p, n in STORED)
        raise ValueError(f"there is no grid of {count} vectors of {width} normal numbers; there are {known}")
    with np.load(_FILE) as stored:
        return np.asarray(stored[f"{count} of {width}"], np.float32)


def nearest_vectors(vectors: Array, grid: npt.NDArray[np.float32], metric: Array | None = None) -> Array:
    """The index of the nearest entry c of a grid [n, p] for each x of vectors [M, p], int64 [M].

    Args:
        vectors: x.
        grid: The entries.
        metric: M, symmetric [p, p]: nearest is what makes (x - c) M (x - c)ᵀ least; None: the unit matrix.
    """
    # |x - c|² without |x|², which is the same for all entries: the greatest x·c - |c|²/2, as one product.
    seen = grid if metric is None else grid @ metric
    halves = np.einsum("np,np->n", seen, grid) / 2
    entries = np.concatenate([seen, -halves[:, None]], axis=1).T.astype(np.float32, order="C")
    extended = np.concatenate([vectors, np.ones((len(vectors), 1))], axis=1, dtype=np.float32)
    found = np.empty(len(vectors), np.int64)
    rows = max(1, _PRODUCTS // len(grid))
    for start in range(0, len(vectors), rows):
        found[start : start + rows] = (extended[start : start + rows] @ entries).argmax(axis=1)
    return found


def optimal_vectors(width: int, count: int, seed: int = 0) -> tuple[npt.NDArray[np.float32], float]:
    """A grid as `gaussian_vectors` has them, by Lloyd's algorithm on evenly spread normal vectors.

    The best of several beginnings, each drawn with the density that large grids have, goes on with many more vectors.

    Args:
        width: Numbers of a vector, an even count of them.
        count: Vectors.
        seed: Of the beginnings.

    Returns:
        The vectors, float32 [count, width], in lexical order, and the mean squared error of a number.
    """
    rng = np.random.default_rng(seed)
    few = _spread_normal(min(256 * count, 1 << 18), width)
    spread = math.sqrt((width + 2) / width)
    # Large grids take long, and end nearly alike wherever they begin.
    beginnings, steps = (8, 100) if count <= 256 else (2, 60)
    begun = [_lloyd(spread * rng.standard_normal((count, width)), few, steps) for _ in range(beginnings)]
    best = min(begun, key=lambda made: made[1])[0]
    made, error = _lloyd(best, _spread_normal(min(4096 * count, 1 << 20), width), steps)
    return made[np.lexsort(made.T[::-1])], error


def _lloyd(grid: Array, sample: npt.NDArray[np.float32], steps: int) -> tuple[npt.NDArray[np.float32], float]:
    """Each entry moved to the mean of what is nearest to it, again and again; and the error of a number at the end."""
    made = grid.astype(np.float32)
    for _ in range(steps):
        nearest = nearest_vectors(sample, made)
        held = np.bincount(nearest, minlength=len(made))
        sums = np.stack([np.bincount(nearest, sample[:, at], len(made)) for at in range(made.shape[1])], axis=1)
        # An entry that nothing is nearest to stays where it is.
        made = np.where(held[:, None] > 0, sums / np.maximum(held, 1)[:, None], made).astype(np.float32)
    error = float(np.mean((sample - made[nearest_vectors(sample, made)]) ** 2, dtype=np.float64))
    return made, error


def _spread_normal(count: int, width: int) -> npt.NDArray[np.float32]:
    """Normal vectors [count, width] that fill the space more evenly than random ones: Box and Muller's transform of
    an additive recurrence whose steps are powers of the inverse of the root of x^(width+1) = x + 1."""
    root = 1.0
    for _ in range(60):
        root = (1 + root) ** (1 / (width + 1))
    steps = root ** -np.arange(1.0, width + 1)
    uniform = (0.5 + np.arange(1, count + 1)[:, None] * steps) % 1
    radius = np.sqrt(-2 * np.log(1 - uniform[:, 0::2]))
    angle = 2 * np.pi * uniform[:, 1::2]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1).astype(np.float32)


def _main(path: str) -> None:
    grids: dict[str, Any] = {}
    for width, count in STORED:
        grids[f"{count} of {width}"], error = optimal_vectors(width, count)
        print(f"{count} vectors of {width}: mean squared error {error:.6f}", flush=True)
    np.savez(path, **grids)


if __name__ == "__main__":
    _main(sys.argv[1])
