"""Codebooks of vectors that stand for many: weighted k-means."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt.passes.kv.cache_codes import ENTRIES, Rows
from graphopt.passes.kv.feature_bases import Floats
from graphopt.passes.quantize.gaussian_grids import nearest_vectors

_STEPS, _FEW = 12, 8
"""Steps, and those of them that look at a quarter of the vectors where there are many."""


def fitted_codebook(
    vectors: npt.NDArray[Any], counts: npt.NDArray[Any] | None, metric: Floats | None, seed: int
) -> Rows:
    """256 vectors t with a small sum of n (x − t) M (x − t)ᵀ, t the nearest of them to each x.

    Lloyd's steps from vectors drawn with the chances n; one that nothing is nearest to moves to where the greatest
    error is. Where there are no more than 256 different x they are all in it.

    Args:
        vectors: x, [N, c].
        counts: n, [N]; None: alike.
        metric: M, [c, c]; None: the identity.
        seed: Of the draws.

    Returns:
        float32 [256, c].
    """
    rows = np.asarray(vectors, np.float32)
    distinct = np.unique(rows, axis=0)
    if len(distinct) <= ENTRIES:
        return np.resize(distinct, (ENTRIES, rows.shape[1]))
    weights = np.ones(len(rows)) if counts is None else np.asarray(counts, np.float64)
    chances = np.random.default_rng(seed).random(len(rows)) ** (1 / np.maximum(weights, np.finfo(np.float32).tiny))
    table = rows[np.argsort(-chances, kind="stable")[:ENTRIES]]
    for step in range(_STEPS):
        some = slice(None, None, 4 if step < _FEW and len(rows) >= 16 * ENTRIES else 1)
        seen, counted = rows[some], weights[some]
        nearest = nearest_vectors(seen, table, metric)
        held = np.bincount(nearest, counted, ENTRIES)
        sums = np.stack([np.bincount(nearest, counted * column, ENTRIES) for column in seen.T], axis=1)
        moved = (sums / np.maximum(held, np.finfo(np.float64).tiny)[:, None]).astype(np.float32)
        if (empty := np.flatnonzero(held == 0)).size:
            errors = seen - table[nearest]
            weighed = errors if metric is None else errors @ metric
            worst = np.argsort(-counted * (errors * weighed).sum(axis=1), kind="stable")
            moved[empty] = seen[worst[: len(empty)]]
        table = moved
    return table
