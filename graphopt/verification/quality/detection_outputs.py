"""Which outputs of a detector hold scores and boxes, and how: read off the outputs of a run, by shapes and names.

Known forms, for A anchors (or queries) and C classes:

- joint: one output [batch, 4 + C, A] (YOLOv8 and later), or [batch, A, 5 + C] with an objectness (YOLOv5, YOLOX);
  boxes are centre, width and height.
- separate: an output of scores [batch, A, C] and one of boxes [batch, A, 4], or of distances to the four sides as
  distributions over bins [batch, A, 4 · bins] (PicoDet, NanoDet); once, or for each of several scales.
- listed: detections that the model chose itself, boxes [n, 4], scores [n] and labels [n], with or without a batch; or
  [batch, n, 6] of corners, score and label (YOLOv10).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np
import numpy.typing as npt

from graphopt.errors import InputDataError
from graphopt.verification.quality.boxes import Boxes, Detections
from graphopt.verification.quality.runs import Array

_BOXES = re.compile(r"box|bbox|reg|loc|dist", re.IGNORECASE)
_ENDED = 6
"""Numbers of a detection in a list of one tensor: corners, score, label."""
_LONGEST_LIST = 1000


@dataclasses.dataclass(frozen=True)
class Anchored:
    """Scores and boxes of one image at fixed anchors.

    Attributes:
        scores: Probabilities [anchors, classes].
        boxes: Corners [anchors, 4].
        placed: Whether the corners are places in the image; else they are relative to the anchor.
    """

    scores: npt.NDArray[np.float64]
    boxes: Boxes
    placed: bool


@dataclasses.dataclass(frozen=True)
class Heads:
    """Where a detector's outputs hold what.

    Attributes:
        form: See the module.
        pairs: Names of (scores, boxes); of a joint form, or a list in one tensor, that output twice.
        labels: Of a listed form, the output of labels; None: in the tensor, or one class.
        channels_last: Of a joint form, whether anchors come before channels.
        objectness: Of a joint form, whether a score of being anything precedes the classes.
        boxes: How four numbers tell a box.
        logits: Whether scores pass a sigmoid first.
    """

    form: Literal["joint", "separate", "listed"]
    pairs: tuple[tuple[str, str], ...]
    labels: str | None = None
    channels_last: bool = False
    objectness: bool = False
    boxes: Literal["centre", "corners", "distances"] = "corners"
    logits: bool = False

    @property
    def described(self) -> str:
        """In words."""
        names = ", ".join(dict.fromkeys(name for pair in self.pairs for name in pair))
        how = {"centre": "centre and size", "corners": "corners", "distances": "distances as distributions"}[self.boxes]
        return f"{self.form} scores and boxes ({how}) in {names}"

    def anchored(self, outputs: Mapping[str, Array]) -> Iterator[Anchored]:
        """Each image's scores and boxes, the scales of an image one after the other."""
        for scores_name, boxes_name in self.pairs:
            if self.form == "joint":
                joint = outputs[scores_name].astype(np.float64)
                joint = joint if self.channels_last else joint.transpose(0, 2, 1)
                boxes, scores = joint[..., :4], joint[..., 4:]
            else:
                scores, boxes = (outputs[name].astype(np.float64) for name in (scores_name, boxes_name))
            if self.logits:
                with np.errstate(over="ignore"):
                    scores = 1 / (1 + np.exp(-scores))
            if self.objectness:
                scores = scores[..., :1] * scores[..., 1:]
            for one, four in zip(scores, boxes, strict=True):
                yield Anchored(one, corners(four, self.boxes), self.boxes != "distances")

    def listed(self, outputs: Mapping[str, Array]) -> Iterator[Detections]:
        """Each image's detections."""
        [(scores_name, boxes_name)] = self.pairs
        boxes, scores = outputs[boxes_name].astype(np.float64), outputs[scores_name].astype(np.float64)
        if scores_name == boxes_name:
            boxes, scores, labels = boxes[..., :4], scores[..., 4], scores[..., 5]
        else:
            labels = np.zeros(scores.shape) if self.labels is None else outputs[self.labels]
        if scores.ndim == 1:
            boxes, scores, labels = boxes[None], scores[None], labels[None]
        for four, one, label in zip(boxes, scores, labels, strict=True):
            yield Detections(four, one, label.astype(np.int64))


def corners(boxes: Boxes, form: Literal["centre", "corners", "distances"]) -> Boxes:
    """Boxes [anchors, 4 · bins] as corners [anchors, 4]; distances give those around the anchor, in its stride."""
    if form == "centre":
        return np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], axis=1)
    if form == "corners":
        return boxes
    bins = boxes.reshape(len(boxes), 4, -1)
    weights = np.exp(bins - bins.max(axis=2, keepdims=True))
    distances = (weights / weights.sum(axis=2, keepdims=True)) @ np.arange(bins.shape[2])
    around: Boxes = distances * np.array([-1.0, -1.0, 1.0, 1.0])
    return around


def detection_heads(outputs: Mapping[str, Array], classes: int | None = None) -> Heads:
    """Tell scores and boxes apart.

    Args:
        outputs: The outputs of a run, by name.
        classes: The number of classes, where the model says it.

    Raises:
        InputDataError: The outputs have none of the known forms.
    """
    arrays = {name: array for name, array in outputs.items() if array.size}
    found = _listed(arrays) or _joint(arrays, classes) or _separate(arrays)
    if found is None:
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in outputs.items())
        raise InputDataError(
            f"Scores and boxes can't be told apart in the outputs {shapes}; judge the model with --task generic."
        )
    return found


def _floats(outputs: Mapping[str, Array], rank: int) -> dict[str, Array]:
    return {name: a for name, a in outputs.items() if a.ndim == rank and a.dtype.kind == "f"}


def _listed(outputs: Mapping[str, Array]) -> Heads | None:
    for boxes, array in outputs.items():
        if array.dtype.kind != "f" or array.ndim not in (2, 3):
            continue
        if array.ndim == 3 and len(outputs) == 1 and array.shape[2] == _ENDED and array.shape[1] <= _LONGEST_LIST:
            return Heads("listed", ((boxes, boxes),))
        beside = {name: a for name, a in outputs.items() if a.shape == array.shape[:-1]}
        scores = [name for name, a in beside.items() if a.dtype.kind == "f" and not re.search("class|label", name)]
        if array.shape[-1] != 4 or len(scores) != 1:
            continue
        labels = next((name for name in beside if name != scores[0]), None)
        return Heads("listed", ((scores[0], boxes),), labels=labels)
    return None


def _joint(outputs: Mapping[str, Array], classes: int | None) -> Heads | None:
    candidates = _floats(outputs, 3)
    if len(candidates) != 1:
        return None
    [(name, array)] = candidates.items()
    channels_last = array.shape[1] > array.shape[2]
    width = array.shape[2] if channels_last else array.shape[1]
    if width < 5:
        return None
    objectness = width == classes + 5 if classes is not None else channels_last
    rows = array if channels_last else array.transpose(0, 2, 1)
    return Heads(
        "joint", ((name, name),), channels_last=channels_last, objectness=objectness and width > 5, boxes="centre",
        logits=not _within_one(rows[..., 4:]),
    )  # fmt: skip


def _separate(outputs: Mapping[str, Array]) -> Heads | None:
    """Scores and boxes of the same anchors, for each scale."""
    scales: dict[int, list[str]] = {}
    for name, array in _floats(outputs, 3).items():
        scales.setdefault(array.shape[1], []).append(name)
    # Auxiliary outputs of other lengths are left alone.
    pairs = [pair for names in scales.values() if len(names) == 2 and (pair := _scores_first(names, outputs))]
    if not pairs:
        return None
    widths = {outputs[boxes].shape[2] for _, boxes in pairs}
    if len(widths) != 1:
        return None
    logits = not all(_within_one(outputs[scores]) for scores, _ in pairs)
    if widths != {4}:
        return Heads("separate", tuple(pairs), boxes="distances", logits=logits)
    boxes = np.concatenate([outputs[name].reshape(-1, 4) for _, name in pairs])
    ordered = bool((boxes[:, 2:] >= boxes[:, :2]).all())
    return Heads("separate", tuple(pairs), boxes="corners" if ordered else "centre", logits=logits)


def _scores_first(names: list[str], outputs: Mapping[str, Array]) -> tuple[str, str] | None:
    """(scores, boxes) of two outputs, if one of them can hold boxes and the other one can't, or isn't called so."""
    possible = [name for name in names if outputs[name].shape[2] % 4 == 0]
    if len(possible) == 2:
        called = [name for name in possible if _BOXES.search(name)]
        four = [name for name in possible if outputs[name].shape[2] == 4]
        unbounded = [name for name in possible if not _within_one(outputs[name])]
        possible = next((one for one in (called, four, unbounded) if len(one) == 1), possible)
    if len(possible) != 1:
        return None
    [boxes] = possible
    return next(name for name in names if name != boxes), boxes


def _within_one(array: Array) -> bool:
    return bool(((array >= 0) & (array <= 1)).all())
