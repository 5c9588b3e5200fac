"""Judging what was made of a model, by how well it still does its task."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.calibration.text import TextDataset, rest_of, tokenize, tokenize_each, tokenizer_beside
from graphopt.errors import UsageError
from graphopt.evaluation.data import EvaluationData, Samples, load_evaluation
from graphopt.evaluation.feeds import Fed, array_batches, encoder_feeds
from graphopt.graph.load import load
from graphopt.runtime_ops.scoring import text_windows
from graphopt.verification.quality.classification import ClassificationMeasure
from graphopt.verification.quality.detection import THRESHOLD, DetectionMeasure
from graphopt.verification.quality.embedding import EmbeddingMeasure
from graphopt.verification.quality.floors import METRICS
from graphopt.verification.quality.generic import GenericMeasure
from graphopt.verification.quality.language import language_quality
from graphopt.verification.quality.metrics import Quality
from graphopt.verification.quality.overlap import RUN, refuse_shared_samples, refuse_shared_text
from graphopt.verification.quality.recognition import RecognitionMeasure
from graphopt.verification.quality.runs import Batch, Measure, judge
from graphopt.verification.quality.tasks import Guess, Task, guess_task

Progress = Callable[[str, int, int], None]

WINDOW = 512
"""Tokens of one window of a text."""
HELD_OUT = 8
"""Windows of the calibration text that judge where no other text is given."""
LONGEST = 256
"""Tokens of one sentence."""
FEWEST = 16
"""Tokens from which a sentence isn't the same as another one by chance."""


@dataclasses.dataclass(frozen=True)
class Options:
    """How to judge.

    Attributes:
        task: The task; None: guessed from the graph.
        tokenizer: Folder of the tokenizer.json for text; None: the model's own folder.
        samples: Judge on so many windows, texts or samples from the beginning; None: all.
        window: Tokens of one window of a text.
        ignore_spaces: Leave spaces out where texts are compared.
        threshold: Score from which a detector sees something.
        threads: Threads within an operator; 0: all cores.
    """

    task: Task | None = None
    tokenizer: Path | None = None
    samples: int | None = None
    window: int = WINDOW
    ignore_spaces: bool = False
    threshold: float = THRESHOLD
    threads: int = 0


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A model and the data that candidates are judged on beside it.

    Attributes:
        reference: The original's file.
        data: The data.
        options: How to judge.
        guess: The task, and what its measure needs to know.
        token_ids: The text of a language model [tokens].
        batches: Inputs of any other model.
    """

    reference: Path
    data: EvaluationData
    options: Options
    guess: Guess
    token_ids: npt.NDArray[np.int64] | None
    batches: Iterable[Batch]

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics that this data gives."""
        unknown = {"accuracy"} if self.data.labels is None else set()
        unknown |= {"change"} if self.data.truths is None else set()
        return tuple(name for name in METRICS[self.guess.task] if name not in unknown)

    def judge(self, candidates: Sequence[str | os.PathLike[str]], progress: Progress | None = None) -> list[Quality]:
        """The quality of each candidate; see `evaluate`."""
        options = self.options
        if self.token_ids is not None:
            found = language_quality(
                self.reference, candidates, self.token_ids, options.window, threads=options.threads, progress=progress
            )
        else:
            found = judge(
                self.reference, candidates, self.batches, self.measure, threads=options.threads, progress=progress
            )
        if options.task is not None:
            return found
        told = f"Task guessed: {self.guess.task}, because the model has {self.guess.reason}; --task says otherwise."
        return [dataclasses.replace(quality, notes=(told, *quality.notes)) for quality in found]

    def measure(self) -> Measure:
        """What gathers the numbers of one candidate of a model that isn't a language model.

        Raises:
            InputDataError: There are true texts, but the characters of the model's classes aren't known.
        """
        guess, data = self.guess, self.data
        if guess.task == "generic":
            return GenericMeasure()
        if guess.task == "detection":
            return DetectionMeasure(classes=guess.classes, threshold=self.options.threshold)
        assert guess.output is not None
        if guess.task == "embedding":
            return EmbeddingMeasure(guess.output, guess.mask)
        if guess.task == "recognition":
            return RecognitionMeasure(
                guess.output, guess.characters, data.truths, ignore_spaces=self.options.ignore_spaces
            )
        return ClassificationMeasure(guess.output, data.labels)


def held_out(calibration: TextDataset, name: str) -> EvaluationData | None:
    """What calibration leaves of its own text, `HELD_OUT` windows at most; None: it is less than two.

    Args:
        calibration: The windows that are calibrated with.
        name: What the text is called.
    """
    rest = rest_of(calibration)[: HELD_OUT * WINDOW]
    return EvaluationData(f"what calibration left of {name}", tokens=rest) if len(rest) >= 2 * WINDOW else None


def prepare(
    reference: str | os.PathLike[str],
    data: EvaluationData | str | os.PathLike[str],
    options: Options | None = None,
    calibration: TextDataset | Samples | None = None,
) -> Evaluation:
    """Read data for a model and check what can be checked before there is a candidate; for the rest see `evaluate`."""
    asked = options or Options()
    if asked.samples is not None and asked.samples < 1:
        raise UsageError(f"At least one sample must be asked for, not {asked.samples}.")
    held = data if isinstance(data, EvaluationData) else load_evaluation(data)
    model, path = load(reference), Path(reference)
    guess = guess_task(model, asked.task)
    if guess.task == "language":
        ids = _token_ids(held, asked, path)
        if isinstance(calibration, TextDataset):
            refuse_shared_text(ids, _calibrated(calibration))
        return Evaluation(path, held, asked, guess, ids, ())
    if guess.task not in ("generic", "detection") and guess.output is None:
        raise UsageError(f"No output of {reference} looks like one of a model for {guess.task}; use --task generic.")
    evaluation = Evaluation(path, held, asked, guess, None, _batches(held, model, asked, path, calibration))
    evaluation.measure()  # a mistake in what it takes is told before the work
    return evaluation


def evaluate(
    reference: str | os.PathLike[str],
    candidates: Sequence[str | os.PathLike[str]],
    data: EvaluationData | str | os.PathLike[str],
    options: Options | None = None,
    *,
    calibration: TextDataset | Samples | None = None,
    progress: Progress | None = None,
) -> list[Quality]:
    """Judge what was made of a model by how well it still does its task.

    Args:
        reference: The original's file.
        candidates: Files of what was made of it.
        data: Evaluation data or its file.
        options: How; None: the defaults.
        calibration: What the candidates were calibrated with, which may share nothing with `data`.
        progress: Called as the work goes on.

    Returns:
        For each candidate its metrics; see docs/quality.md for what they mean.

    Raises:
        UsageError: The task needs other data, or text lacks a tokenizer.
        InputDataError: The data can't be read, doesn't fit the model, or was calibrated with.
        ModelError: A model doesn't load.
        VerificationError: A candidate has other outputs, or doesn't run.
    """
    return prepare(reference, data, options, calibration).judge(candidates, progress)


def _tokenizer(options: Options, model: Path) -> Path:
    """The tokenizer for text: what was given, or what lies beside the model.

    Raises:
        UsageError: There is none.
    """
    found = options.tokenizer or tokenizer_beside(model)
    if found is None:
        raise UsageError("Text needs a tokenizer; give the folder of the model's tokenizer.json with --tokenizer.")
    return found


def _token_ids(data: EvaluationData, options: Options, model: Path) -> npt.NDArray[np.int64]:
    if data.tokens is not None:
        return text_windows(data.tokens, options.window, options.samples).reshape(-1)
    if data.text is None:
        raise UsageError(f"A language model is judged on text, and {data.name} holds none; give a .txt or .jsonl file.")
    ids = tokenize(data.text, _tokenizer(options, model))
    return text_windows(ids, options.window, options.samples).reshape(-1)


def _calibrated(calibration: TextDataset) -> npt.NDArray[np.int64]:
    """The tokens of the windows that are used."""
    return calibration.tokens[: len(calibration) * calibration.window]


def _batches(
    data: EvaluationData, model: ir.Model, options: Options, path: Path,
    calibration: TextDataset | Samples | None,
) -> Iterable[Batch]:  # fmt: skip
    """The feeds of the model, checked against what it was calibrated with."""
    if data.samples is not None:
        batches: Iterable[Batch] = Fed(data.samples, model, options.samples)
    elif data.arrays is not None:
        batches = array_batches(data, model, options.samples)
    else:
        rows = tokenize_each(data.rows[: options.samples], _tokenizer(options, path), LONGEST)
        if isinstance(calibration, TextDataset):
            known = _calibrated(calibration)
            for row in rows:
                inner = row[1:-1]  # without special tokens, which stand around each
                if len(inner) >= FEWEST:
                    refuse_shared_text(inner, known, min(RUN, len(inner)))
        batches = [encoder_feeds(model, row, data.name) for row in rows]
    if calibration is not None and not isinstance(calibration, TextDataset):
        refuse_shared_samples(batches, calibration.feeds(model))
    return batches
