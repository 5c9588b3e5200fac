"""Fashion-MNIST: reading the data, what is said where it can't be had, and the training of its classifiers."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from graphopt.errors import ModelError, UsageError
from graphopt.models import fashion
from graphopt.models.fashion import FILES, Kind, available, images, main, model, top1


def idx(array: np.ndarray) -> bytes:
    sizes = b"".join(int(n).to_bytes(4, "big") for n in array.shape)
    return gzip.compress(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with forty pictures in each split: those of label 0 are dark on the left, those of label 1 on the right."""
    monkeypatch.setattr(fashion, "INSTALLED", tmp_path / "none")
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for part in ("train", "t10k"):
        labels = np.arange(40, dtype=np.uint8) % 2
        pixels = rng.integers(0, 60, size=(40, 28, 28)).astype(np.uint8)
        for picture, label in zip(pixels, labels, strict=True):
            # Not left and right: pictures are mirrored while a model is trained.
            picture[:14] += np.uint8(150 * label)
            picture[14:] += np.uint8(150 * (1 - label))
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(idx(pixels))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(idx(labels))
    return tmp_path


def test_reading(cache: Path) -> None:
    assert available(cache)
    pixels, labels = images("test", cache=cache)
    assert (pixels.shape, pixels.dtype) == ((40, 1, 28, 28), np.float32)
    assert (labels.shape, labels.dtype) == ((40,), np.int64)
    assert 0 <= pixels.min() < 0.3 < 0.7 < pixels.max() <= 1
    assert labels.tolist() == [0, 1] * 20
    few, first = images("test", 3, cache=cache)
    np.testing.assert_array_equal(few, pixels[:3])
    np.testing.assert_array_equal(first, labels[:3])
    assert len(images("train", 1000, cache=cache)[1]) == 40


@pytest.mark.parametrize("content", [b"no gzip", gzip.compress(b"\0\0"), gzip.compress(b"\0\0\x0d\x01\0\0\0\x05aaaaa"),
                                     idx(np.zeros((40, 28, 28), np.uint8))[:60]],
                         ids=["no gzip", "short", "wrong", "cut off"])  # fmt: skip
def test_broken_files(cache: Path, content: bytes) -> None:
    (cache / "fashion-mnist" / "train-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(ModelError, match="can't be read"):
        images("train", cache=cache)


@pytest.mark.parametrize(
    ("found", "command", "message"),
    [
        (None, "false", "apt-get, which isn't here"),
        ("apt-get", "echo 'E: Unable to locate package' >&2; exit 1", "Unable to locate package"),
        ("apt-get", "true", "left no package"),
    ],
)
def test_what_can_t_be_fetched(
    found: str | None, command: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fashion, "INSTALLED", tmp_path / "none")
    if found is None:
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        (tmp_path / found).write_text(f"#!/bin/sh\n{command}\n")
        (tmp_path / found).chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert not available(tmp_path)
    with pytest.raises(UsageError, match=message) as error:
        images("test", cache=tmp_path)
    assert "apt install dataset-fashion-mnist" in str(error.value)
    assert not any((tmp_path / "fashion-mnist").iterdir())


@pytest.mark.export
@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_training(kind: Kind, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    from graphopt.models import fashion_training

    epochs = {"cnn": 4, "vit": 8}.get(kind, 0)
    plan = fashion_training.Plan(epochs, 4e-3, layers=1, batch=8)
    monkeypatch.setitem(fashion_training.PLANS, kind, plan)
    told: list[str] = []
    path = model(kind, cache=cache, threads=1, progress=told.append)
    assert [line.split(",")[0] for line in told] == [f"{kind}: epoch {n + 1} of {epochs}" for n in range(epochs)]
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,), (made,) = session.get_inputs(), session.get_outputs()
    assert (given.name, made.name) == ("image", "logits")
    pixels, _ = images("test", cache=cache)
    together = session.run(None, {"image": pixels})[0]
    assert together.shape == (40, 10)
    alone = np.concatenate([session.run(None, {"image": pixels[i : i + 1]})[0] for i in range(3)])
    np.testing.assert_allclose(alone, together[:3], atol=1e-4)
    assert top1(session, cache=cache) >= 0.95
    assert model(kind, cache=cache, progress=told.append) == path
    assert len(told) == epochs  # nothing was trained again


def test_the_seed_decides(cache: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from graphopt.models.fashion_training import Plan, train

    pixels, labels = images("train", cache=cache)
    made = []
    for seed in (0, 0, 1):
        train("vit", pixels, labels, tmp_path / "m.onnx", plan=Plan(1, 1e-3, 1, 20), threads=1, seed=seed)
        session = ort.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
        made.append(session.run(None, {"image": pixels})[0])
    np.testing.assert_array_equal(made[0], made[1])
    assert (made[0] != made[2]).any()


def test_wrong_names(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong: Any = "mlp"
    with pytest.raises(UsageError, match="no classifier 'mlp'"):
        model(wrong, cache=cache)
    assert main(["mlp"]) == 2
    assert capsys.readouterr().err.startswith("error: There is no classifier 'mlp'")


@pytest.mark.real
def test_the_data() -> None:
    if not available():
        pytest.skip("Fashion-MNIST isn't here: python -m graphopt.models.fashion brings it")
    pixels, labels = images("test")
    assert pixels.shape == (10_000, 1, 28, 28)
    assert np.bincount(labels).tolist() == [1000] * 10
    folder = fashion.data_folder()
    assert {name: fashion._sha256(folder / name) for name in FILES} == FILES
