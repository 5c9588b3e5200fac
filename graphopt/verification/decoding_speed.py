"""Measuring how fast decoders read a prompt and write text, against each other."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from graphopt.analysis.interleaved import Ratio
from graphopt.errors import UsageError


class Fed(Protocol):
    """A batch in progress."""

    def feed(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """The logits [batch, rows, vocabulary] after the next tokens of each row."""


class Decoder(Protocol):
    """What is timed: `graphopt.Generator`, or anything of its form."""

    name: str
    cache: Any

    def start(self, batch: int, capacity: int) -> Any:
        """An empty cache for `batch` rows of at most `capacity` tokens; a `Fed`."""

    def prefill(self, decoding: Any, ids: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Feed a prompt and return the logits after its last token [batch, vocabulary]."""


@dataclasses.dataclass(frozen=True)
class DecodingTiming:
    """How fast one decoder is.

    Attributes:
        name: The model.
        cache: "growing" or "static".
        prefill_tokens_s: Prompt tokens of all rows per second, median of the rounds.
        decode_tokens_s: New tokens of all rows per second, median of the rounds.
        prefill_ratio: Wall-clock time over that of the first model.
        decode_ratio: Likewise.
        prefill_cpu_ratio: CPU time over that of the first model.
        decode_cpu_ratio: Likewise.
    """

    name: str
    cache: str
    prefill_tokens_s: float
    decode_tokens_s: float
    prefill_ratio: Ratio
    decode_ratio: Ratio
    prefill_cpu_ratio: Ratio
    decode_cpu_ratio: Ratio


@dataclasses.dataclass(frozen=True)
class DecodingResult:
    """What `benchmark_decoding` measured.

    Attributes:
        models: The models in the order given.
        control: The first model once more, in a session of its own: how far its ratios are from 1 is how far two
            equal models seem apart here.
        batch: Rows.
        prompt_tokens: Tokens of each prompt.
        new_tokens: Tokens written after it, each the most probable one.
        runs: Rounds that were measured.
        threads: Threads within an operator; None: ONNX Runtime's choice.
    """

    models: list[DecodingTiming]
    control: DecodingTiming
    batch: int
    prompt_tokens: int
    new_tokens: int
    runs: int
    threads: int | None

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types."""
        return dataclasses.asdict(self)


def benchmark_decoding(
    decoders: Sequence[Decoder],
    control: Decoder,
    prompts: npt.NDArray[np.int64],
    new_tokens: int = 128,
    runs: int = 5,
    *,
    threads: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> DecodingResult:
    """Time decoders against each other: in every round each reads the prompt and writes, so that noise meets all alike.

    Args:
        decoders: Ratios are to the first.
        control: The first model in another session.
        prompts: Token ids [batch, tokens], the same for all.
        new_tokens: Tokens that each writes after the prompt.
        runs: Rounds that count, after one that doesn't.
        threads: What the decoders were made with, for the result.
        progress: Called after each round.

    Raises:
        UsageError: No decoders, rounds or tokens.
        InputDataError: A decoder doesn't run on this.
    """
    if not decoders or runs < 1 or new_tokens < 1 or prompts.size == 0:
        raise UsageError("Timing needs at least one decoder, one round, one prompt token and one new token.")
    everyone = [*decoders, control]
    times: list[list[tuple[float, float, float, float]]] = [[] for _ in everyone]
    for number in range(runs + 1):
        # In another order every time, so that no decoder always follows the same neighbour.
        for index in np.random.default_rng(number).permutation(len(everyone)).tolist():
            measured = _once(everyone[index], prompts, new_tokens)
            if number:
                times[index].append(measured)
        if progress is not None:
            progress("generating", number, runs)
    columns = [list(zip(*series, strict=True)) for series in times]
    read, written = prompts.size, prompts.shape[0] * new_tokens
    timings = [
        DecodingTiming(
            decoder.name if index < len(decoders) else f"{decoders[0].name} (control)",
            str(decoder.cache),
            read / statistics.median(columns[index][0]),
            written / statistics.median(columns[index][1]),
            *(Ratio.of(columns[index][kind], columns[0][kind]) for kind in range(4)),
        )
        for index, decoder in enumerate(everyone)
    ]
    return DecodingResult(timings[:-1], timings[-1], prompts.shape[0], prompts.shape[1], new_tokens, runs, threads)


def _once(decoder: Decoder, prompts: npt.NDArray[np.int64], new_tokens: int) -> tuple[float, float, float, float]:
    """Seconds of wall-clock time of the prompt and of the new tokens, then of CPU time."""
    decoding = decoder.start(prompts.shape[0], prompts.shape[1] + new_tokens)
    wall, cpu = [time.perf_counter()], [time.process_time()]
    logits = decoder.prefill(decoding, prompts)
    wall.append(time.perf_counter())
    cpu.append(time.process_time())
    for _ in range(new_tokens):
        tokens = np.asarray(np.argmax(logits, axis=-1), dtype=np.int64)
        logits = decoding.feed(tokens[:, None])[:, -1]
    wall.append(time.perf_counter())
    cpu.append(time.process_time())
    return wall[1] - wall[0], wall[2] - wall[1], cpu[1] - cpu[0], cpu[2] - cpu[1]
