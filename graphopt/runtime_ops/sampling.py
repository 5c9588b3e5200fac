"""Choosing the next token from logits: the largest, or drawn with temperature, top-k and top-p."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the largest logit; else the logits are divided by it and one is drawn.
        top_k: Only the k largest may be drawn; 0: all.
        top_p: Only the largest whose probabilities sum up to p may be drawn ("The Curious Case of Neural Text
            Degeneration"); 1: all.
        seed: Seed of the draws.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise UsageError(
                "Sampling needs a temperature of at least 0, a top-p above 0 and up to 1, and a top-k of at least 0, "
                f"not {self.temperature}, {self.top_p} and {self.top_k}."
            )

    def chooser(self) -> Chooser:
        """A fresh series of choices."""
        return Chooser(self, np.random.default_rng(self.seed))


class Chooser:
    """A series of choices; the same seed and logits give the same tokens."""

    def __init__(self, sampling: Sampling, random: np.random.Generator) -> None:
        self.sampling, self.random = sampling, random

    def __call__(self, logits: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """One token for each row of `logits` [batch, vocabulary]."""
        if self.sampling.temperature == 0:
            return np.asarray(np.argmax(logits, axis=-1), dtype=np.int64)
        shares = probabilities(logits, self.sampling)
        draws = self.random.random(len(shares))
        sums = np.cumsum(shares, axis=-1)
        # Rounding may leave the last sum below a draw; a token of no probability is never taken.
        picked = [
            int(np.searchsorted(row, draw * row[-1], side="right")) for row, draw in zip(sums, draws, strict=True)
        ]
        last = [int(np.flatnonzero(row)[-1]) for row in shares]
        return np.asarray(np.minimum(picked, last), dtype=np.int64)


def probabilities(logits: npt.NDArray[Any], sampling: Sampling) -> npt.NDArray[np.float64]:
    """What each token of each row is drawn with: softmax(logits / temperature), cut to top-k, then to top-p."""
    scaled = np.asarray(logits, dtype=np.float64) / sampling.temperature
    order = np.argsort(-scaled, axis=-1, kind="stable")
    ranked = np.take_along_axis(scaled, order, axis=-1)
    if sampling.top_k:
        ranked[:, sampling.top_k :] = -np.inf
    shares = np.exp(ranked - ranked[:, :1])
    shares /= shares.sum(axis=-1, keepdims=True)
    before = np.cumsum(shares, axis=-1) - shares
    shares[before >= sampling.top_p] = 0
    shares /= shares.sum(axis=-1, keepdims=True)
    result = np.empty_like(shares)
    np.put_along_axis(result, order, shares, axis=-1)
    return result
