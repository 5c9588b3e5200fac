"""Classifiers: do they say the same, how sure are they, and how often are they right?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from graphopt.errors import InputDataError
from graphopt.verification.quality.metrics import Metric, Quality, counted, mean
from graphopt.verification.quality.runs import Array, Batch, same_shape

Scores = Literal["probabilities", "logits"]


class ClassificationMeasure:
    """Agreement of the most probable class, score agreement, the largest error of a score, and accuracy.

    Score agreement is 1 − the mean total variation distance ½ Σ |p − q| between the two distributions over the
    classes; with two classes that is the mean error of the probability.

    Args:
        output: The output of scores [batch, classes], or [batch, 1] for one class against the rest.
        labels: The true class of each sample in order; None: not known.
        scores: Whether the output holds probabilities, or logits, which a softmax (one class: a sigmoid) makes
            probabilities of; None: probabilities if each sample's first ones are.
    """

    def __init__(
        self, output: str, labels: Sequence[int] | npt.NDArray[np.int64] | None = None, scores: Scores | None = None
    ) -> None:
        self._output, self._scores = output, scores
        self._labels = None if labels is None else np.asarray(labels, dtype=np.int64).reshape(-1)
        self._samples = self._same = 0
        self._right = [0, 0]
        self._distance = self._largest = 0.0

    def add(self, feeds: Batch, expected: Mapping[str, Array], found: Mapping[str, Array]) -> None:
        """See `Measure`.

        Raises:
            InputDataError: More samples than labels, or a label that no class has.
        """
        same_shape(self._output, expected[self._output], found[self._output])
        a, b = (_rows(outputs[self._output]) for outputs in (expected, found))
        if self._scores is None:
            self._scores = "probabilities" if are_probabilities(a) else "logits"
        first, second = (probabilities(rows, self._scores) for rows in (a, b))
        difference = np.abs(first - second)
        self._distance += float(difference.sum()) / 2
        self._largest = float(np.maximum(self._largest, difference.max(initial=0.0)))
        expected_class, found_class = first.argmax(axis=1), second.argmax(axis=1)
        valid = np.isfinite(second).all(axis=1)
        self._same += int((valid & (expected_class == found_class)).sum())
        if self._labels is not None:
            truth = self._labels[self._samples : self._samples + len(first)]
            if len(truth) < len(first):
                raise InputDataError(f"There are {len(self._labels)} labels for more samples than that.")
            if len(truth) and not 0 <= int(truth.min()) <= int(truth.max()) < first.shape[1]:
                wrong = int(truth.max()) if int(truth.max()) >= first.shape[1] else int(truth.min())
                raise InputDataError(f"A label is {wrong}, but the classes are 0 to {first.shape[1] - 1}.")
            self._right[0] += int((expected_class == truth).sum())
            self._right[1] += int((valid & (found_class == truth)).sum())
        self._samples += len(first)

    def quality(self) -> Quality:
        """See `Measure`."""
        count = self._samples
        metrics = [
            Metric("top1", "same most probable class", "higher", mean(self._same, count), scale="share"),
            Metric("score", "score agreement", "higher", 1 - mean(self._distance, count), scale="share"),
            Metric("score_error", "largest error of a score", "lower", self._largest),
        ]
        if self._labels is not None:
            right, reference = mean(self._right[1], count), mean(self._right[0], count)
            metrics.insert(0, Metric("accuracy", "accuracy", "higher", right, reference, scale="share"))
        return Quality("classification", tuple(metrics), counted(count, "sample"))


def _rows(output: Array) -> npt.NDArray[np.float64]:
    """Scores as [samples, classes]."""
    array = output.astype(np.float64)
    return array.reshape(-1, array.shape[-1])


def are_probabilities(rows: npt.NDArray[np.float64]) -> bool:
    """Whether scores [samples, classes] are probabilities already: of one class, or adding up to 1."""
    within = bool(((rows >= 0) & (rows <= 1)).all())
    return within and (rows.shape[1] == 1 or bool(np.allclose(rows.sum(axis=1), 1.0, atol=1e-2)))


def probabilities(rows: npt.NDArray[np.float64], scores: Scores) -> npt.NDArray[np.float64]:
    """The probability of each class [samples, classes]; of one class alone, also of the rest, before it."""
    if scores == "logits":
        if rows.shape[1] == 1:
            rows = np.concatenate([np.zeros_like(rows), rows], axis=1)
        with np.errstate(invalid="ignore"):
            rows = np.exp(rows - rows.max(axis=1, keepdims=True))
        return np.asarray(rows / rows.sum(axis=1, keepdims=True))
    return np.concatenate([1 - rows, rows], axis=1) if rows.shape[1] == 1 else rows
