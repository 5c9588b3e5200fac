"""Detectors: every form of outputs is read, and a wrong score is seen where a cosine over all numbers sees nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from graphopt.errors import InputDataError
from graphopt.verification.quality.boxes import Detections, iou, matched, suppressed
from graphopt.verification.quality.detection import DetectionMeasure
from graphopt.verification.quality.detection_outputs import corners, detection_heads
from graphopt.verification.quality.generic import cosine_of
from graphopt.verification.quality.metrics import Quality
from graphopt.verification.quality.runs import Array

CALM = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""A busy machine is no failure."""


CLASSES, ANCHORS = 3, 40
FEEDS = {"image": np.zeros((1, 3, 8, 8))}


def joint(scores: dict[tuple[int, int], float], moved: float = 0.0) -> Array:
    """YOLOv8's output [1, 4 + classes, anchors] with boxes of 10 x 10 on a grid, and scores at (anchor, class)."""
    output = np.zeros((1, 4 + CLASSES, ANCHORS), np.float32)
    places = np.arange(ANCHORS)
    output[0, 0], output[0, 1], output[0, 2:4] = 20 * places + 5 + moved, 20 * places + 5, 10
    output[0, 4:] = 0.001
    for (anchor, label), score in scores.items():
        output[0, 4 + label, anchor] = score
    return output


def judged(expected: dict[str, Array], found: dict[str, Array], **options: float) -> Quality:
    measure = DetectionMeasure(**options)
    measure.add(FEEDS, expected, found)
    return measure.quality()


def test_the_same_is_perfect() -> None:
    output = joint({(3, 0): 0.9, (7, 2): 0.5})
    found = judged({"y": output}, {"y": output})
    assert [found[name] for name in ("score", "score_error", "iou", "detections")] == [1, 0, 1, 1]
    assert found.samples == "2 scores over 0.25 in 1 image"
    assert found.notes == ("Read as joint scores and boxes (centre and size) in y.",)


def test_a_wrong_score_is_seen_where_a_cosine_sees_nothing() -> None:
    expected, found = joint({(3, 0): 0.9, (7, 2): 0.5}), joint({(3, 0): 0.12, (7, 2): 0.5})
    assert cosine_of(expected.reshape(-1), found.reshape(-1)) > 0.99999
    quality = judged({"y": expected}, {"y": found})
    assert quality["score_error"] == pytest.approx(0.78)
    assert quality["score"] == pytest.approx(1 - 0.78 / 2)
    assert quality["iou"] == 1
    assert quality["detections"] == pytest.approx(2 / 3)


def test_what_only_the_candidate_sees_counts() -> None:
    quality = judged({"y": joint({(3, 0): 0.9})}, {"y": joint({(3, 0): 0.9, (9, 1): 0.601})})
    assert quality["score_error"] == pytest.approx(0.6, abs=1e-3)
    assert quality["score"] == pytest.approx(0.7, abs=1e-3)
    # Below the threshold in both it doesn't.
    faint = judged({"y": joint({(3, 0): 0.9, (5, 1): 0.2})}, {"y": joint({(3, 0): 0.9, (5, 1): 0.05})})
    assert faint["score"] == 1
    assert judged({"y": joint({(5, 1): 0.2})}, {"y": joint({(5, 1): 0.05})}, threshold=0.1)["score_error"] > 0.1


def test_a_moved_box_is_seen() -> None:
    quality = judged({"y": joint({(3, 0): 0.9})}, {"y": joint({(3, 0): 0.9}, moved=5)})
    assert quality["iou"] == pytest.approx(1 / 3)
    assert quality["detections"] == 0  # less than half of it is shared
    assert quality["score"] == 1


def test_nothing_seen_and_nothing_valid() -> None:
    empty = judged({"y": joint({})}, {"y": joint({})})
    assert all(math.isnan(metric.value) for metric in empty.metrics)
    assert "Neither model sees anything" in empty.notes[1]
    broken = judged({"y": joint({(3, 0): 0.9})}, {"y": joint({(3, 0): 0.9}) * np.nan})
    assert math.isnan(broken["score"])
    assert math.isnan(broken["score_error"])
    assert broken["iou"] == 0


def test_forms() -> None:
    """The same detections in every form give the same numbers."""
    first, second = joint({(3, 0): 0.9, (7, 2): 0.5}), joint({(3, 0): 0.6, (7, 2): 0.5}, moved=1)
    wanted = judged({"y": first}, {"y": second})

    def separate(output: Array, logits: bool = False) -> dict[str, Array]:
        scores = output[:, 4:].transpose(0, 2, 1)
        scores = np.log(scores / (1 - scores)) if logits else scores
        return {"scores": scores, "boxes": corners(output[0, :4].T.astype(np.float64), "centre")[None]}

    def objectness(output: Array) -> dict[str, Array]:
        rows = output.transpose(0, 2, 1)
        return {"y": np.concatenate([rows[..., :4], np.ones((1, ANCHORS, 1), np.float32), rows[..., 4:]], axis=2)}

    def scales(output: Array) -> dict[str, Array]:
        both = separate(output)
        return {
            **{f"s{i}": both["scores"][:, part] for i, part in enumerate((slice(0, 5), slice(5, None)))},
            **{f"b{i}": both["boxes"][:, part] for i, part in enumerate((slice(0, 5), slice(5, None)))},
        }

    forms = [separate, objectness, scales, lambda output: separate(output, logits=True)]
    for form in forms:
        found = judged(form(first), form(second))
        for name in ("score", "score_error", "iou", "detections"):
            assert found[name] == pytest.approx(wanted[name], abs=1e-6), form
    listed = {
        "boxes": np.array([[0.0, 0, 10, 10], [20, 0, 30, 10]], np.float32),
        "scores": np.array([0.9, 0.5], np.float32),
        "labels": np.array([1, 2]),
    }
    assert judged(listed, listed)["detections"] == 1
    worse = {**listed, "scores": np.array([0.6, 0.1], np.float32)}
    found = judged(listed, worse)
    assert found["score"] == pytest.approx(1 - (0.3 + 0.5) / 2)
    assert found["detections"] == pytest.approx(2 / 3)
    ended = {"y": np.concatenate([listed["boxes"], listed["scores"][:, None], listed["labels"][:, None]], axis=1)[None]}
    assert judged(ended, ended)["score"] == 1


def test_distances_as_distributions() -> None:
    """PicoDet's boxes: 8 bins for each side; neither has a place, so there are no detections to count."""
    rng = np.random.default_rng(0)
    scores, boxes = np.full((1, 5, 3), 0.01), rng.normal(size=(1, 5, 32))
    scores[0, 2, 1] = 0.8
    outputs = {"a": scores, "b": boxes}
    assert detection_heads(outputs).boxes == "distances"
    found = judged(outputs, {"a": scores, "b": boxes + 1.0})  # a softmax takes no notice
    assert found["iou"] == pytest.approx(1)
    assert [m.name for m in found.metrics] == ["score", "score_error", "iou"]
    sharp = np.full((1, 5, 32), -50.0)
    sharp[..., 2::8] = 50.0  # two strides to each side
    far = np.full((1, 5, 32), -50.0)
    far[..., 4::8] = 50.0
    assert judged({"a": scores, "b": sharp}, {"a": scores, "b": far})["iou"] == pytest.approx(16 / 64)


def test_the_number_of_classes_decides() -> None:
    rows = np.abs(np.random.default_rng(0).normal(size=(1, 50, 9)))
    assert detection_heads({"y": rows}).objectness
    assert not detection_heads({"y": rows}, classes=5).objectness
    assert detection_heads({"y": rows}, classes=4).objectness
    assert not detection_heads({"y": rows.transpose(0, 2, 1)}).objectness
    with pytest.raises(InputDataError, match=r"can't be told apart in the outputs y \[1, 2\]"):
        detection_heads({"y": np.zeros((1, 2))})


BOX = arrays(np.float64, (2, 4), elements=st.floats(0, 50))


@CALM
@given(BOX)
def test_overlap_is_a_share(pair: np.ndarray) -> None:
    a, b = (np.concatenate([np.minimum(x[:2], x[2:]), np.maximum(x[:2], x[2:])]) for x in pair)
    overlap = float(iou(a[None], b[None])[0])
    assert 0 <= overlap <= 1
    assert overlap == float(iou(b[None], a[None])[0])
    assert float(iou(a[None], a[None])[0]) == 1


def test_suppression_and_matching() -> None:
    boxes = np.array([[0.0, 0, 10, 10], [1, 0, 11, 10], [50, 50, 60, 60]])
    scores = np.array([[0.8, 0.0], [0.9, 0.4], [0.3, 0.0]])
    found = suppressed(scores, boxes, 0.25)
    assert found.scores.tolist() == [0.9, 0.4, 0.3]  # the first box is hidden by the second, but for its other class
    assert found.labels.tolist() == [0, 1, 0]
    assert [pair[:2] for pair in matched(found, found)] == [(0, 0), (1, 1), (2, 2)]
    none = Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64))
    assert matched(found, none) == matched(none, found) == []
