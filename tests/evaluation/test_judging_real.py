"""Real models judged on data: each is perfect beside itself, and the coarser its weights, the worse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from coarse_weights import coarsened
from drawings import face, line

from graphopt.evaluation.data import EvaluationData
from graphopt.evaluation.judging import Options, evaluate
from graphopt.models.catalogue import fetch
from graphopt.verification.quality.metrics import Quality

pytestmark = pytest.mark.real

TEXTS = ("0123456789", "42 HELL", "2026 1984", "TELL 7531", "8 6 4 2")
SENTENCES = (
    "A cat sat on the mat.",
    "A dog lay on the rug.",
    "Shares fell sharply on Monday.",
    "The stock market lost ground today.",
    "I would like a cup of tea.",
    "He plays the violin in an orchestra.",
)


@pytest.fixture
def judged(tmp_path: Path) -> Callable[..., list[Quality]]:
    def call(key: str, data: EvaluationData, bits: tuple[int, ...], **options: object) -> list[Quality]:
        source = fetch(key)
        worse = [coarsened(source, tmp_path / f"{key}-{b}.onnx", b) for b in bits]
        return evaluate(source, [source, *worse], data, Options(threads=1, **options))

    return call


def test_recogniser(judged: Callable[..., list[Quality]]) -> None:
    data = EvaluationData("lines", arrays={"x": np.stack([line(text) for text in TEXTS])}, truths=TEXTS)
    same, coarse = judged("ppocr-v6-rec", data, (5,), ignore_spaces=True)
    assert same["cer"] == same.metric("cer").reference < 0.06  # it reads these letters
    assert same["change"] == 0
    assert coarse.metric("cer").reference == same["cer"]
    assert coarse["cer"] > 0.5
    assert "a list of characters in its metadata" in same.notes[0]


def test_detector(judged: Callable[..., list[Quality]]) -> None:
    data = EvaluationData("faces", arrays={"images": np.stack([face(16), face(23)])})
    same, fine, coarse = judged("yolov8n", data, (8, 5))
    assert [same[name] for name in ("score", "score_error", "iou", "detections")] == [1, 0, 1, 1]
    assert fine["score"] > coarse["score"]
    assert fine["score_error"] < coarse["score_error"]
    assert fine["iou"] > 0.8
    assert "in 2 images" in same.samples


def test_detector_of_several_scales(judged: Callable[..., list[Quality]]) -> None:
    blocks = np.kron(np.random.default_rng(0).random((1, 3, 50, 38)), np.ones((1, 1, 16, 16))).astype(np.float32)
    same, coarse = judged("layout", EvaluationData("blocks", arrays={"image": blocks}), (6,))
    assert (same["score"], same["iou"]) == (1, 1)
    assert coarse["score"] < 1
    assert 0.5 < coarse["iou"] < 1
    assert "distances as distributions" in same.notes[1]


def test_classifier(judged: Callable[..., list[Quality]]) -> None:
    pictures = np.stack([face(seed, 224) for seed in range(3)]).transpose(0, 2, 3, 1) * 255 - 110
    data = EvaluationData("pictures", arrays={"input:0": pictures.astype(np.float32)}, labels=np.array([0, 0, 1]))
    same, coarse = judged("open-nsfw", data, (4,))
    assert (same["top1"], same["score"]) == (1, 1)
    assert same["accuracy"] == same.metric("accuracy").reference == pytest.approx(2 / 3)
    assert coarse["score"] < 1


def test_embedder(judged: Callable[..., list[Quality]]) -> None:
    data = EvaluationData("sentences", rows=SENTENCES)
    same, fine, coarse = judged("paraphrase-minilm", data, (8, 4), tokenizer=fetch("minilm"))
    assert (same["spearman"], same["cosine"]) == (pytest.approx(1), 1)
    assert 0.9 < fine["spearman"] < 1
    assert coarse["cosine"] < fine["cosine"] < 1
    assert same.samples == "6 samples, 15 pairs"


def test_any_model(judged: Callable[..., list[Quality]]) -> None:
    audio = np.random.default_rng(0).normal(size=(1, 16, 96)).astype(np.float32)
    data = EvaluationData("features", arrays={"onnx::Flatten_0": audio})
    same, coarse = judged("openwakeword-alexa", data, (3,), task="generic")
    assert (same["cosine"], same["error"]) == (1, 0)
    assert coarse["error"] > 0
