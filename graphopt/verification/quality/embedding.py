"""Embedders: do the vectors point where they did, and are the same texts near each other as before?"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from graphopt.errors import InputDataError
from graphopt.verification.quality.generic import cosine_of
from graphopt.verification.quality.metrics import Metric, Quality, counted
from graphopt.verification.quality.runs import Array, Batch, same_shape


class EmbeddingMeasure:
    """Cosine between each sample's two embeddings, and the rank correlation of the similarities of all pairs.

    Search and clustering use nothing but the order of similarities, which is what Spearman's rank correlation of the
    cosines of all pairs judges: a cosine of 0.999 between old and new vectors says little where all texts are alike.

    Args:
        output: The output [batch, size], or hidden states [batch, sequence, size], which are averaged over the tokens.
        mask: The input [batch, sequence] that is 1 for the tokens that count; None: all do.
    """

    def __init__(self, output: str, mask: str | None = None) -> None:
        self._output, self._mask = output, mask
        self._expected: list[Array] = []
        self._found: list[Array] = []

    def add(self, feeds: Batch, expected: Mapping[str, Array], found: Mapping[str, Array]) -> None:
        """See `Measure`."""
        same_shape(self._output, expected[self._output], found[self._output])
        mask = None if self._mask is None else feeds.get(self._mask)
        self._expected.append(pooled(expected[self._output], mask))
        self._found.append(pooled(found[self._output], mask))

    def quality(self) -> Quality:
        """See `Measure`.

        Raises:
            InputDataError: Fewer than three samples, which have no order of pairs.
        """
        expected, found = np.concatenate(self._expected), np.concatenate(self._found)
        if len(expected) < 3:
            raise InputDataError(
                f"An embedder is judged by the pairs of at least 3 samples, and there are {len(expected)}."
            )
        cosines = np.array([cosine_of(a, b) for a, b in zip(expected, found, strict=True)])
        metrics = (
            Metric("spearman", "rank correlation of the similarities of all pairs", "higher",
                   spearman(similarities(expected), similarities(found))),
            Metric("cosine", "mean cosine to the original's embedding", "higher", float(cosines.mean())),
            Metric("min_cosine", "lowest cosine to the original's embedding", "higher", float(cosines.min())),
        )  # fmt: skip
        pairs = len(expected) * (len(expected) - 1) // 2
        return Quality("embedding", metrics, f"{counted(len(expected), 'sample')}, {counted(pairs, 'pair')}")


def pooled(output: Array, mask: Array | None) -> npt.NDArray[np.float64]:
    """Embeddings [batch, size] of an output [batch, size] or [batch, sequence, size].

    Raises:
        InputDataError: An output of another form.
    """
    array = output.astype(np.float64)
    if array.ndim == 2:
        return array
    if array.ndim != 3:
        raise InputDataError(
            f"An embedding has the shape [batch, size] or [batch, sequence, size], not {output.shape}."
        )
    weights = np.ones(array.shape[:2]) if mask is None or mask.shape != array.shape[:2] else mask.astype(np.float64)
    means: npt.NDArray[np.float64] = (array * weights[:, :, None]).sum(axis=1) / np.maximum(
        weights.sum(axis=1)[:, None], 1.0
    )
    return means


def similarities(vectors: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The cosines of all pairs of rows [n, size] -> [n (n - 1) / 2]."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / np.where(lengths > 0, lengths, 1.0)
    cosines: npt.NDArray[np.float64] = (unit @ unit.T)[np.triu_indices(len(unit), 1)]
    return cosines


def spearman(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    """Spearman's rank correlation; NaN where one side has no order, or isn't of numbers.

    Ties have the mean of their ranks.
    """
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("nan")
    first, second = (ranks - ranks.mean() for ranks in (ranked(a), ranked(b)))
    product = float(np.sqrt((first @ first) * (second @ second)))
    return float(np.clip(first @ second / product, -1.0, 1.0)) if product else float("nan")


def ranked(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The rank of each number, from 0; of equal ones the mean of theirs."""
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: npt.NDArray[np.float64] = (ends - (counts + 1) / 2)[where]
    return ranks
