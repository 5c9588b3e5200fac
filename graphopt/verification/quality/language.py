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
from graphopt.runtime_ops.scoring import ROWS, log_sums, logits_of, text_windows
from graphopt.verification.quality.metrics import Metric, Quality, counted, mean
from graphopt.verification.session import release_memory

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
        progress: Called after each window.

    Returns:
        For each candidate the metrics "ppl", "kl" and "top1".

    Raises:
        ModelError: A model isn't a decoder with a KV cache.
        UsageError: A window of fewer than two tokens, or no windows asked for.
        InputDataError: A text shorter than a window, or a token that a model doesn't know; another vocabulary than the
            reference's; logits of the last token only.
    """
    if together < 1:
        raise UsageError(f"At least one candidate must be judged at a time, not {together}.")
    pieces = text_windows(token_ids, window, windows)
    original = _opened(reference, threads)
    groups = [candidates[i : i + together] for i in range(0, len(candidates), together)]
    found: list[Quality] = []
    for number, group in enumerate(groups):
        judged = [_opened(candidate, threads) for candidate in group]
        sums = [_Sums() for _ in group]
        for index, piece in enumerate(pieces):
            _judge(original, judged, piece, sums)
            if progress is not None:
                progress("quality", number * len(pieces) + index + 1, len(groups) * len(pieces))
        found += [_quality(gathered, len(pieces), window) for gathered in sums]
        del judged
        release_memory()
    return found


def _opened(model: Decoder, threads: int) -> Generator:
    return model if isinstance(model, Generator) else Generator(model, threads=threads)


def _judge(
    reference: Generator, candidates: Sequence[Generator], ids: npt.NDArray[np.int64], sums: Sequence[_Sums]
) -> None:
    """Add one window to the sums."""
    runs = [logits_of(generator, ids, CHUNK) for generator in candidates]
    for begin, expected in logits_of(reference, ids, CHUNK):
        following = ids[begin + 1 : begin + len(expected) + 1]
        kept: list[tuple[_Block, npt.NDArray[np.int64]]] = []
        for first in range(0, len(following), ROWS):
            targets = following[first : first + ROWS]
            kept.append((_Block.of(expected[first : first + len(targets)]), targets))
        for run, generator, gathered in zip(runs, candidates, sums, strict=True):
            _, logits = next(run)
            if logits.shape[-1] != expected.shape[-1]:
                raise InputDataError(
                    f"{generator.name} gives logits over {logits.shape[-1]} tokens, {reference.name} over "
                    f"{expected.shape[-1]}, so their distributions can't be compared."
                )
            for number, (block, targets) in enumerate(kept):
                _add(gathered, block, logits[number * ROWS : number * ROWS + len(targets)], targets)


@dataclasses.dataclass(frozen=True)
class _Block:
    """Some rows of the reference's logits [rows, vocabulary], in the type in which they came, and ln Σ exp of each."""

    logits: npt.NDArray[Any]
    sums: npt.NDArray[np.float64]
    best: npt.NDArray[np.int64]

    @classmethod
    def of(cls, logits: npt.NDArray[Any]) -> _Block:
        return cls(logits, log_sums(logits.astype(np.float64)), logits.argmax(axis=1))


def _add(gathered: _Sums, block: _Block, logits: npt.NDArray[Any], targets: npt.NDArray[np.int64]) -> None:
    """Add some rows of a candidate's logits."""
    expected, found = block.logits.astype(np.float64), logits.astype(np.float64)
    sums, rows = log_sums(found), np.arange(len(targets))
    gathered.losses += float((sums - found[rows, targets]).sum())
    gathered.reference_losses += float((block.sums - expected[rows, targets]).sum())
    gathered.same += int((block.best == found.argmax(axis=1)).sum())
    gathered.scored += len(targets)
    gathered.divergence += float(divergence(expected, block.sums, found, sums).sum())


def divergence(
    expected: npt.NDArray[np.float64],
    expected_sums: npt.NDArray[np.float64],
    found: npt.NDArray[np.float64],
    found_sums: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    """KL(p ‖ q) of each row, in nats: 0 where the logits are the same, infinite where q excludes what p allows.

    Args:
        expected: Logits of p [rows, vocabulary].
        expected_sums: Their ln Σ exp [rows].
        found: Logits of q [rows, vocabulary].
        found_sums: Their ln Σ exp [rows].
    """
    with np.errstate(invalid="ignore"):
        likely = expected - expected_sums[:, None]
        probabilities = np.exp(likely)
        terms = probabilities * (likely - (found - found_sums[:, None]))
    # What has no probability adds nothing, whatever the candidate thinks of it.
    terms[probabilities == 0] = 0.0
    # Rounding alone could make a sum negative; NaN stays.
    rows: npt.NDArray[np.float64] = np.maximum(terms.sum(axis=1), 0.0)
    return rows


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
