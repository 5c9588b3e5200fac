"""graphopt bench --generate: how fast decoders read and write, and how well they foresee a text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from graphopt.errors import InputDataError, UsageError

BUILT_IN = "wikipedia"
"""The name of the held-out text of `graphopt.models.texts`, in place of a file."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What `graphopt bench --generate` was asked for; see its options."""

    prompt_tokens: int = 512
    new_tokens: int = 128
    batch: int = 1
    cache: Literal["auto", "growing", "static"] = "auto"
    runs: int = 5
    threads: int = 0
    seed: int = 0
    text: str | None = None
    tokenizer: Path | None = None
    window: int = 512
    tokens: int | None = None


def bench_generation(
    paths: Sequence[Path], request: Request, progress: Callable[[str, int, int], None]
) -> dict[str, Any]:
    """The speed of decoders against each other, and with a text the perplexity of each.

    Raises:
        GraphoptError: A model that isn't a decoder, a text or tokenizer that can't be read.
    """
    from graphopt.runtime_ops.generation import Generator
    from graphopt.runtime_ops.scoring import perplexity
    from graphopt.verification.decoding_speed import benchmark_decoding

    ids = None if request.text is None else _text_ids(request)
    options = _session_options(request.threads)
    generators = [Generator(path, cache=request.cache, sess_options=options()) for path in paths]
    data: dict[str, Any] = {}
    if ids is not None:
        found = [perplexity(generator, ids, request.window, progress=progress) for generator in generators]
        data["perplexity"] = [
            {"name": generator.name, **result.to_dict()} for generator, result in zip(generators, found, strict=True)
        ]
    control = Generator(paths[0], cache=request.cache, sess_options=options())
    prompts = _prompts(request, ids, generators[0].interface.vocabulary)
    result = benchmark_decoding(
        generators, control, prompts, request.new_tokens, request.runs, threads=request.threads or None,
        progress=progress,
    )  # fmt: skip
    return {**result.to_dict(), **data}


def bench_writing(paths: Sequence[Path], seed: int, progress: Callable[[str, int, int], None]) -> dict[str, Any] | None:
    """How fast decoders read a short prompt and write behind it; None: they aren't decoders.

    Raises:
        GraphoptError: One of them can't be generated with, or not with as many tokens.
    """
    from graphopt.graph.load import load
    from graphopt.verification.quality.tasks import guess_task

    if guess_task(load(paths[0])).task != "language":
        return None
    return bench_generation(paths, Request(prompt_tokens=128, new_tokens=32, seed=seed), progress)


def _session_options(threads: int) -> Callable[[], Any]:
    """Sessions as they are made for timing elsewhere: waiting threads sleep."""
    import onnxruntime

    from graphopt.analysis.interleaved import NO_SPINNING

    def make() -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        for key, value in NO_SPINNING.items():
            options.add_session_config_entry(key, value)
        return options

    return make


def _text_ids(request: Request) -> npt.NDArray[np.int64]:
    from graphopt.calibration.text import load_text, tokenize

    assert request.text is not None
    if request.tokenizer is None:
        raise UsageError("A text needs a tokenizer; give the folder of the model's tokenizer.json with --tokenizer.")
    if request.text == BUILT_IN and not Path(request.text).exists():
        from graphopt.models.texts import wikipedia

        ids = tokenize(wikipedia("evaluation"), request.tokenizer)
    else:
        ids = load_text(request.text, request.tokenizer, request.window).tokens
    return ids[: request.tokens]


def _prompts(request: Request, ids: npt.NDArray[np.int64] | None, vocabulary: int | None) -> npt.NDArray[np.int64]:
    """The rows of the batch: consecutive pieces of the text, or random tokens."""
    size = (request.batch, request.prompt_tokens)
    if ids is None:
        return np.random.default_rng(request.seed).integers(0, vocabulary or 1000, size, dtype=np.int64)
    if len(ids) < request.batch * request.prompt_tokens:
        raise InputDataError(f"The text has {len(ids)} tokens; {size[0]} prompts of {size[1]} need more.")
    return ids[: request.batch * request.prompt_tokens].reshape(size)
