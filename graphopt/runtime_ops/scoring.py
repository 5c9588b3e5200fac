"""How probable a text is to a decoder: log-probabilities token by token, and perplexity."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt.errors import InputDataError, UsageError
from graphopt.runtime_ops.generation import CHUNK, Generator

ROWS = 64
"""Rows of logits that are looked at together: a vocabulary in float64 is large."""


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """The perplexity of a text.

    Attributes:
        value: exp(-mean of the log-probabilities).
        tokens: Tokens that were scored: all but the first of each window.
        windows: Windows of the text.
        window: Tokens of one window.
    """

    value: float
    tokens: int
    windows: int
    window: int

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types."""
        return dataclasses.asdict(self)


def text_windows(
    token_ids: Sequence[int] | npt.NDArray[np.int64], window: int, windows: int | None = None
) -> npt.NDArray[np.int64]:
    """A text in windows [windows, window]; a rest shorter than a window is left out.

    Args:
        token_ids: The text.
        window: Tokens of one window.
        windows: Take so many from the beginning; None: all.

    Raises:
        UsageError: A window of fewer than two tokens, or no window asked for.
        InputDataError: A text of fewer windows.
    """
    if window < 2:
        raise UsageError(f"A window must hold at least two tokens, not {window}.")
    if windows is not None and windows < 1:
        raise UsageError(f"At least one window must be asked for, not {windows}.")
    ids = np.asarray(token_ids, dtype=np.int64).reshape(-1)
    count = len(ids) // window
    if count < (windows or 1):
        wanted = "one window" if (windows or 1) == 1 else f"{windows} windows"
        raise InputDataError(f"The text has {len(ids)} tokens, fewer than {wanted} of {window}.")
    count = windows or count
    return ids[: count * window].reshape(count, window)


def logits_of(
    generator: Generator, ids: npt.NDArray[np.int64], chunk: int = CHUNK
) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    """The logits after each token of a text, piece by piece: (first token of the piece, [tokens, vocabulary]).

    Each piece is memory of the runtime, which the next one may reuse.

    Raises:
        InputDataError: A model that gives no logits but the last, or that doesn't run on the text.
    """
    decoding = generator.start(1, len(ids))
    for begin in range(0, len(ids), chunk):
        piece = ids[None, begin : begin + chunk]
        logits = decoding.feed(piece)[0]
        if len(logits) != piece.shape[1]:
            raise InputDataError(f"{generator.name} gives logits for the last token only, so it can't score a text.")
        yield begin, logits


def log_sums(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """ln Σ exp(logits) of each row [rows, vocabulary] -> [rows]."""
    highest = logits.max(axis=1)
    with np.errstate(invalid="ignore"):  # a broken model gives infinities, and gets NaN
        sums: npt.NDArray[np.float64] = np.log(np.exp(logits - highest[:, None]).sum(axis=1)) + highest
    return sums


def scores(generator: Generator, ids: Sequence[int] | npt.NDArray[np.int64], chunk: int = CHUNK) -> npt.NDArray[Any]:
    """ln p(token | all before it) of every token but the first, in float64.

    Raises:
        InputDataError: Fewer than two tokens, or a model that gives no logits but the last.
    """
    row = np.asarray(ids, dtype=np.int64).reshape(-1)
    if len(row) < 2:
        raise InputDataError("A text must have at least two tokens to be scored.")
    found = np.empty(len(row) - 1)
    for begin, logits in logits_of(generator, row, chunk):
        following = row[begin + 1 : begin + len(logits) + 1]
        for first in range(0, len(following), ROWS):
            targets = following[first : first + ROWS]
            block = np.asarray(logits[first : first + len(targets)], dtype=np.float64)
            scored = block[np.arange(len(targets)), targets] - log_sums(block)
            found[begin + first : begin + first + len(targets)] = scored
    return found


def perplexity(
    model: str | os.PathLike[str] | Generator,
    token_ids: Sequence[int] | npt.NDArray[np.int64],
    window: int = 512,
    *,
    threads: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Perplexity:
    """The perplexity of a text to a decoder, over windows of their own: each starts with an empty cache.

    Args:
        model: The .onnx file, its folder, or a generator.
        token_ids: The text; a rest shorter than a window is left out.
        window: Tokens of one window.
        threads: Threads within an operator; 0: all cores.
        progress: Called after each window.

    Raises:
        ModelError: Not a decoder with a KV cache.
        UsageError: A window of fewer than two tokens.
        InputDataError: A text shorter than a window.
    """
    pieces = text_windows(token_ids, window)
    generator = model if isinstance(model, Generator) else Generator(model, threads=threads)
    total, count = 0.0, len(pieces)
    for index, piece in enumerate(pieces):
        total += float(scores(generator, piece).sum())
        if progress is not None:
            progress("perplexity", index + 1, count)
    scored = count * (window - 1)
    return Perplexity(math.exp(-total / scored), scored, count, window)
