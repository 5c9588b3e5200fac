"""Boxes as corners (x1, y1, x2, y2) [n, 4]: how much they overlap, which of many stay, and which belong together."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

Boxes = npt.NDArray[np.float64]

SAME_OBJECT = 0.5
"""Overlap from which two boxes of one class are taken for the same object."""
_MOST = 1000
"""Detections of one image that are looked at, the surest ones."""


@dataclasses.dataclass(frozen=True)
class Detections:
    """What was found in one image.

    Attributes:
        boxes: Corners [n, 4].
        scores: [n].
        labels: Class of each, [n].
    """

    boxes: Boxes
    scores: npt.NDArray[np.float64]
    labels: npt.NDArray[np.int64]


def iou(a: Boxes, b: Boxes) -> npt.NDArray[np.float64]:
    """Intersection over union of boxes one by one, [..., 4] each -> [...]; 1 of equal boxes, also of empty ones."""
    sizes = [np.maximum(x[..., 2:] - x[..., :2], 0.0).prod(axis=-1) for x in (a, b)]
    shared = np.maximum(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0.0).prod(axis=-1)
    union = sizes[0] + sizes[1] - shared
    with np.errstate(invalid="ignore", divide="ignore"):
        overlap = np.where(union > 0, shared / union, 0.0)
    overlap = np.where(np.isfinite(a).all(axis=-1) & np.isfinite(b).all(axis=-1), overlap, 0.0)
    return np.where((a == b).all(axis=-1), 1.0, overlap)


def suppressed(scores: npt.NDArray[Any], boxes: Boxes, threshold: float, overlap: float = 0.45) -> Detections:
    """Detections out of scores [anchors, classes] and boxes [anchors, 4] by non-maximum suppression within a class.

    Args:
        scores: Probability of each class.
        boxes: Corners.
        threshold: Least score.
        overlap: A box that overlaps a surer one of its class by more is dropped.
    """
    anchors, labels = np.nonzero(scores > threshold)
    sure = scores[anchors, labels]
    order = np.argsort(-sure, kind="stable")[:_MOST]
    anchors, labels, sure = anchors[order], labels[order], sure[order]
    found = boxes[anchors]
    left = np.ones(len(sure), dtype=np.bool_)
    for index in range(len(sure)):
        if left[index]:
            same = (labels[index + 1 :] == labels[index]) & (iou(found[index], found[index + 1 :]) > overlap)
            left[index + 1 :] &= ~same
    return Detections(found[left], sure[left], labels[left].astype(np.int64))


def matched(a: Detections, b: Detections) -> list[tuple[int, int, float]]:
    """Pairs of the same object: (index in a, index in b, overlap), each detection in one pair at most.

    The surest of `a` choose first, each the box of its class that overlaps it most, by `SAME_OBJECT` at least.
    """
    free = np.ones(len(b.scores), dtype=np.bool_)
    pairs: list[tuple[int, int, float]] = []
    for index in np.argsort(-a.scores, kind="stable").tolist():
        overlaps = np.where(free & (b.labels == a.labels[index]), iou(a.boxes[index], b.boxes), -1.0)
        if len(overlaps) and overlaps.max() >= SAME_OBJECT:
            best = int(overlaps.argmax())
            free[best] = False
            pairs.append((index, best, float(overlaps[best])))
    return pairs
