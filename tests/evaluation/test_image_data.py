"""Folders of images to judge with: classes in turn, texts by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import graphopt
from graphopt.errors import InputDataError, UsageError
from graphopt.evaluation.data import load_evaluation
from graphopt.evaluation.judging import Options, evaluate, prepare

CLASSIFIER = """<ir_version: 8, opset_import: ["": 17]>
g (float[n, 3, 4, 4] image) => (float[n, 3] probabilities) {
  mean = ReduceMean<axes = [2, 3], keepdims = 0>(image)  probabilities = Softmax(mean)
}"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(onnx.parser.parse_model(CLASSIFIER), path)
    return path


def picture(path: Path, channel: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((6, 6, 3), np.uint8)
    pixels[..., channel] = 200
    np.save(path, pixels)


def test_a_folder_for_each_class(model: Path, tmp_path: Path) -> None:
    for name, channel, count in (("a-red", 0, 3), ("b-green", 1, 1), ("c-blue", 2, 2)):
        for number in range(count):
            picture(tmp_path / "images" / name / f"{number}.npy", channel)
    data = load_evaluation(tmp_path / "images")
    assert data.labels is not None
    assert data.labels.tolist() == [0, 1, 2, 0, 2, 0]
    [found] = evaluate(model, [model], data)
    assert (found["accuracy"], found["top1"], found.samples) == (1, 1, "6 samples")
    [three] = evaluate(model, [model], data, Options(samples=3))
    assert (three["accuracy"], three.samples) == (1, "3 samples")
    with pytest.raises(InputDataError, match="6 of the 6 samples to judge with were calibrated with"):
        prepare(model, data, calibration=load_evaluation(tmp_path / "images").samples)
    assert data.samples is not None
    first = next(data.samples.feeds(graphopt.load(model)))["image"]
    assert first.max() == pytest.approx(200 / 255)
    raw = load_evaluation(tmp_path / "images", "raw").samples
    assert raw is not None
    assert next(raw.feeds(graphopt.load(model)))["image"].max() == pytest.approx(200)


def test_images_and_what_they_read(tmp_path: Path) -> None:
    for name in ("two", "one"):
        picture(tmp_path / "lines" / f"{name}.npy", 0)
    assert load_evaluation(tmp_path / "lines").truths is None
    (tmp_path / "lines" / "texts.txt").write_text("two.npy\tzwei\none.npy\tein s\n")
    data = load_evaluation(tmp_path / "lines")
    assert (data.truths, data.labels) == (("ein s", "zwei"), None)
    (tmp_path / "lines" / "texts.txt").write_text("two.npy\tzwei\n")
    with pytest.raises(InputDataError, match=r"doesn't say what one\.npy reads"):
        load_evaluation(tmp_path / "lines")


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(InputDataError, match="There is no image in"):
        load_evaluation(tmp_path)
    with pytest.raises(UsageError, match="Pixels can't become 'grey'; there are unit"):
        load_evaluation(tmp_path, "grey")
