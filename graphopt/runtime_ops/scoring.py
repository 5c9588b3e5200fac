"""How probable a text is to a decoder: log-probabilities token by token, and perplexity."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt.errors import InputDataError, UsageError
from graphopt.runtime_ops.generation import CHUNK, Generator

_ROWS = 64
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


def scores(generator: Generator, ids: Sequence[int] | npt.NDArray[np.int64], chunk: int = CHUNK) -> npt.NDArray[Any]:
    """ln p(token | all before it) of every token but the first, in float64.

    Raises:
        InputDataError: Fewer than two tokens, or a model that gives no logits but the last.
    """
    row = np.asarray(ids, dtype=np.int64).reshape(1, -1)
    tokens = row.shape[1]
    if tokens < 2:
        raise InputDataError("A text must have at least two tokens to be scored.")
    decoding = generator.start(1, tokens)
    found = np.empty(tokens - 1)
    for begin in range(0, tokens, chunk):
        piece = row[:, begin : begin + chunk]
        logits = decoding.feed(piece)[0]
        if len(logits) != piece.shape[1]:
            raise InputDataError(f"{generator.name} gives logits for the last token only, so it can't score a text.")
        following = row[0, begin + 1 : begin + chunk + 1]
        for first in range(0, len(following), _ROWS):
            targets = following[first : first + _ROWS]
            block = np.asarray(logits[first : first + len(targets)], dtype=np.float64)
            highest = block.max(axis=1)
            sums = np.log(np.exp(block - highest[:, None]).sum(axis=1)) + highest
            found[begin + first : begin + first + len(targets)] = block[np.arange(len(targets)), targets] - sums
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
    if window < 2:
        raise UsageError(f"A window must hold at least two tokens, not {window}.")
    ids = np.asarray(token_ids, dtype=np.int64).reshape(-1)
    count = len(ids) // window
    if count == 0:
        raise InputDataError(f"The text has {len(ids)} tokens, fewer than one window of {window}.")
    generator = model if isinstance(model, Generator) else Generator(model, threads=threads)
    total = 0.0
    for index in range(count):
        total += float(scores(generator, ids[index * window : (index + 1) * window]).sum())
        if progress is not None:
            progress("perplexity", index + 1, count)
    scored = count * (window - 1)
    return Perplexity(math.exp(-total / scored), scored, count, window)
