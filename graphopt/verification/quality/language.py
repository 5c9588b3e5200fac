"""How well a changed decoder still foresees a text: perplexity, divergence from the original, and its favourite token.

Of every token of every window but the last, with p the original's distribution over the vocabulary and q the
candidate's: perplexity exp(mean of -ln q(next token)) beside that of p, the mean divergence KL(p ‖ q) = Σ p ln(p / q)
in nats, and how often p and q have the same most probable token. Perplexity moves with the text and may even fall by
accident; the divergence is 0 only where the distributions are the same, and rises with every kind of damage.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from graphopt.errors import InputDataError, UsageError
from graphopt.runtime_ops.generation import CHUNK, Generator
from graphopt.runtime_ops.memory_session import release_memory
from graphopt.runtime_ops.scoring import ROWS, logits_of, text_windows
from graphopt.verification.quality.metrics import Metric, Quality, counted, mean

Decoder: TypeAlias = str | os.PathLike[str] | Generator
"""A decoder: the .onnx file, its folder, or a generator."""

TOGETHER = 8
"""Candidates whose sessions are open at once."""


@dataclasses.dataclass
class _Sums:
    """What a candidate has gathered, in nats and tokens."""

    losses: float = 0.0
    reference_losses: float = 0.0
    divergence: float = 0.0
    same: int = 0
    scored: int = 0


def language_quality(
    reference: Decoder,
    candidates: Sequence[Decoder],
    token_ids: Sequence[int] | npt.NDArray[np.int64],
    window: int = 512,
    windows: int | None = None,
    *,
    threads: int = 0,
    together: int = TOGETHER,
    chunk: int = CHUNK,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Quality]:
    """Judge decoders with any kind of KV cache on a text, window by window, each from an empty cache.

    The reference runs once over each window for all candidates of a group, so memory holds the logits of one piece of
    one window, and the sessions of one group.

    Args:
        reference: The original.
        candidates: What was made of it.
        token_ids: The text, held out from calibration; a rest shorter than a window is left out.
        window: Tokens of one window.
        windows: Use so many windows from the beginning; None: all.
        threads: Threads within an operator; 0: all cores. Generators have their own.
        together: Candidates of one group.
        chunk: Tokens that are fed at a time. Where a cache is exact for the tokens of one run, as with those of
            `low-rank-kv` and `couple-kv`, a window that is fed at once loses nothing, and few at a time are nearer to
            what generation loses.
        progress: Called after each window.

    Returns:
        For each candidate the metrics "ppl", "kl" and "top1".

    Raises:
        ModelError: A model isn't a decoder with a KV cache.
        UsageError: A window of fewer than two tokens, or no windows, candidates or tokens asked for.
        InputDataError: A text shorter than a window, or a token that a model doesn't know; another vocabulary than the
            reference's; logits of the last token only.
    """
    if together < 1:
        raise UsageError(f"At least one candidate must be judged at a time, not {together}.")
    if chunk < 1:
        raise UsageError(f"At least one token must be fed at a time, not {chunk}.")
    pieces = text_windows(token_ids, window, windows)
    original = _opened(reference, threads)
    groups = [candidates[i : i + together] for i in range(0, len(candidates), together)]
    found: list[Quality] = []
    for number, group in enumerate(groups):
        judged = [_opened(candidate, threads) for candidate in group]
        sums = [_Sums() for _ in group]
        for index, piece in enumerate(pieces):
            _judge(original, judged, piece, sums, chunk)
            if progress is not None:
                progress("quality", number * len(pieces) + index + 1, len(groups) * len(pieces))
        found += [_quality(gathered, len(pieces), window) for gathered in sums]
        del judged
        release_memory()
    return found


def _opened(model: Decoder, threads: int) -> Generator:
    return model if isinstance(model, Generator) else Generator(model, threads=threads)


def _judge(
    reference: Generator,
    candidates: Sequence[Generator],
    ids: npt.NDArray[np.int64],
    sums: Sequence[_Sums],
    chunk: int,
) -> None:
    """Add one window to the sums."""
    runs = [logits_of(generator, ids, chunk) for generator in candidates]
    for begin, expected in logits_of(reference, ids, chunk):
        following = ids[begin + 1 : begin + len(expected) + 1]
        places = range(0, len(following), ROWS)
        blocks = [Rows.of(expected[first : min(first + ROWS, len(following))]) for first in places]
        for run, generator, gathered in zip(runs, candidates, sums, strict=True):
            _, logits = next(run)
            if logits.shape[-1] != expected.shape[-1]:
                raise InputDataError(
                    f"{generator.name} gives logits over {logits.shape[-1]} tokens, {reference.name} over "
                    f"{expected.shape[-1]}, so their distributions can't be compared."
                )
            for first, block in zip(places, blocks, strict=True):
                part = slice(first, first + len(block.logits))
                _add(gathered, block, Rows.of(logits[part]), following[part])


@dataclasses.dataclass(frozen=True)
class Rows:
    """Distributions over a vocabulary, a row each.

    Attributes:
        logits: [rows, vocabulary], float32 or wider.
        weights: exp(logits − the highest of the row), in the same type [rows, vocabulary].
        totals: Sums of the weights [rows].
        sums: ln Σ exp(logits) [rows].
    """

    logits: npt.NDArray[Any]
    weights: npt.NDArray[Any]
    totals: npt.NDArray[np.float64]
    sums: npt.NDArray[np.float64]

    @classmethod
    def of(cls, logits: npt.NDArray[Any]) -> Rows:
        """The distributions of logits [rows, vocabulary]; NaN where these are no numbers."""
        wide = logits if logits.dtype in (np.float32, np.float64) else logits.astype(np.float32)
        highest = wide.max(axis=1)
        with np.errstate(invalid="ignore"):
            weights = np.exp(wide - highest[:, None])
            totals = weights.sum(axis=1, dtype=np.float64)
            return cls(wide, weights, totals, np.log(totals) + highest)


def _add(gathered: _Sums, expected: Rows, found: Rows, targets: npt.NDArray[np.int64]) -> None:
    """Add some rows, after each of which a token came."""
    rows = np.arange(len(targets))
    gathered.losses += float((found.sums - found.logits[rows, targets]).sum())
    gathered.reference_losses += float((expected.sums - expected.logits[rows, targets]).sum())
    gathered.same += int((expected.logits.argmax(axis=1) == found.logits.argmax(axis=1)).sum())
    gathered.scored += len(targets)
    gathered.divergence += float(divergence(expected, found).sum())


def divergence(p: Rows, q: Rows) -> npt.NDArray[np.float64]:
    """KL(p ‖ q) of each row, in nats: 0 where the logits are the same, infinite where q excludes what p allows.

    It is the mean under p of the difference of the logits, less that of the ln Σ exp: differences of near numbers are
    exact, so that little is lost in float32.
    """
    with np.errstate(invalid="ignore"):
        differences = p.logits - q.logits
        rows = _mean(p, differences, slice(None)) - (p.sums - q.sums)
        if not np.isfinite(rows).all():
            # What has no probability adds nothing, whatever the candidate thinks of it.
            odd = np.flatnonzero(~np.isfinite(rows))
            rows[odd] = _mean(p, np.where(p.weights[odd] == 0, 0, differences[odd]), odd) - (p.sums - q.sums)[odd]
    # Not below 0 but for rounding; NaN stays.
    return np.maximum(rows, 0.0)


def _mean(p: Rows, values: npt.NDArray[Any], rows: slice | npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """The mean of values [rows, vocabulary] under p."""
    products = np.einsum("ij,ij->i", p.weights[rows], values, dtype=np.float64)
    return np.asarray(products / p.totals[rows], dtype=np.float64)


def _quality(gathered: _Sums, windows: int, window: int) -> Quality:
    scored = gathered.scored
    return Quality(
        "language",
        (
            Metric("ppl", "perplexity", "lower", _exp(mean(gathered.losses, scored)),
                   _exp(mean(gathered.reference_losses, scored))),
            Metric("kl", "divergence from the original, nats", "lower", mean(gathered.divergence, scored)),
            Metric("top1", "same most probable token", "higher", mean(gathered.same, scored), scale="share"),
        ),
        f"{counted(scored, 'token')} in {counted(windows, 'window')} of {window}",
    )  # fmt: skip


def _exp(number: float) -> float:
    try:
        return math.exp(number)
    except OverflowError:
        return math.inf
