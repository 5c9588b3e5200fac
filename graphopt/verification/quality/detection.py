"""Detectors: how far scores and boxes move, of what either model takes for an object.

A cosine over all outputs says nothing here: of thousands of anchors a few hold an object, and coordinates of hundreds
of pixels drown scores up to 1. So a detector is judged where one of the two models sees something: by every score
above a threshold, at its anchor and class, by the boxes of those anchors, and by the detections that are left after
non-maximum suppression.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from graphopt.verification.quality.boxes import Detections, iou, matched, suppressed
from graphopt.verification.quality.detection_outputs import Anchored, Heads, detection_heads
from graphopt.verification.quality.metrics import Metric, Quality, counted, mean
from graphopt.verification.quality.runs import Array, Batch, same_shape

THRESHOLD = 0.25
"""Score from which something counts as seen."""


class DetectionMeasure:
    """Score agreement, the largest error of a score, overlap of the boxes, and agreement of the detections.

    Score agreement is 1 − the mean |error| over the scores (one for each anchor and class) that either model puts above
    the threshold. Models that list their detections have no anchors: there each detection of one model is matched with
    the nearest of the other's in its class, and what finds no match counts as an error as large as its score.

    Args:
        heads: Which outputs hold scores and boxes; None: told from the first outputs.
        classes: The number of classes, where the model says it.
        threshold: Score from which something counts as seen.
    """

    def __init__(self, heads: Heads | None = None, classes: int | None = None, threshold: float = THRESHOLD) -> None:
        self._heads, self._classes, self._threshold = heads, classes, threshold
        self._images = self._scores = self._boxes = 0
        self._error = self._largest = self._overlap = 0.0
        self._pairs, self._detections = 0, 0
        self._placed = True

    def add(self, feeds: Batch, expected: Mapping[str, Array], found: Mapping[str, Array]) -> None:
        """See `Measure`.

        Raises:
            InputDataError: The outputs have no known form.
        """
        if self._heads is None:
            self._heads = detection_heads(expected, self._classes)
        heads = self._heads
        self._images += next(iter(feeds.values())).shape[0]
        if heads.form == "listed":
            for ours, theirs in zip(heads.listed(expected), heads.listed(found), strict=True):
                self._add_listed(_sure(ours, self._threshold), _sure(theirs, self._threshold))
            return
        for name in {name for pair in heads.pairs for name in pair}:
            same_shape(name, expected[name], found[name])
        for first, second in zip(heads.anchored(expected), heads.anchored(found), strict=True):
            self._add_anchored(first, second)

    def _add_anchored(self, a: Anchored, b: Anchored) -> None:
        seen = ~((a.scores <= self._threshold) & (b.scores <= self._threshold))  # NaN is seen
        self._add_errors(np.abs(a.scores - b.scores)[seen])
        anchors = seen.any(axis=1)
        self._add_overlaps(iou(a.boxes[anchors], b.boxes[anchors]))
        self._placed &= a.placed
        if a.placed:
            first, second = (suppressed(x.scores, x.boxes, self._threshold) for x in (a, b))
            self._pairs += len(matched(first, second))
            self._detections += len(first.scores) + len(second.scores)

    def _add_listed(self, a: Detections, b: Detections) -> None:
        pairs = matched(a, b)
        first, second = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        alone = [np.delete(a.scores, first), np.delete(b.scores, second)]
        self._add_errors(np.concatenate([np.abs(a.scores[first] - b.scores[second]), *alone]))
        self._add_overlaps(np.array([pair[2] for pair in pairs]))
        self._pairs += len(pairs)
        self._detections += len(a.scores) + len(b.scores)

    def _add_errors(self, errors: Array) -> None:
        self._scores += len(errors)
        self._error += float(errors.sum())
        self._largest = float(np.maximum(self._largest, errors.max(initial=0.0)))

    def _add_overlaps(self, overlaps: Array) -> None:
        self._boxes += len(overlaps)
        self._overlap += float(overlaps.sum())

    def quality(self) -> Quality:
        """See `Measure`."""
        heads = self._heads
        metrics = [
            Metric("score", "score agreement", "higher", 1 - mean(self._error, self._scores), scale="share"),
            Metric("score_error", "largest error of a score", "lower", self._largest if self._scores else math.nan),
            Metric("iou", "mean overlap of the boxes", "higher", mean(self._overlap, self._boxes), scale="share"),
        ]
        if self._placed:
            same = mean(2 * self._pairs, self._detections)
            metrics.append(Metric("detections", "detections of both (F1)", "higher", same, scale="share"))
        notes = [] if heads is None else [f"Read as {heads.described}."]
        if not self._scores:
            notes.append(f"Neither model sees anything with a score over {self._threshold:g}; give other images.")
        samples = f"{counted(self._scores, 'score')} over {self._threshold:g} in {counted(self._images, 'image')}"
        return Quality("detection", tuple(metrics), samples, tuple(notes))


def _sure(found: Detections, threshold: float) -> Detections:
    kept = ~(found.scores <= threshold)
    return Detections(found.boxes[kept], found.scores[kept], found.labels[kept])
