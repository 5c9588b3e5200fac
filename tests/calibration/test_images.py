"""Images of a folder, as the model takes them."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from calibration.small_models import parse
from graphopt.calibration.images import VALUES, ImageFolder, resized
from graphopt.errors import InputDataError, UsageError

RNG = np.random.default_rng(0)


def classifier(shape: str = "b, 3, 4, 6", dtype: str = "float") -> ir.Model:
    return parse(f"g ({dtype}[{shape}] image) => ({dtype}[{shape}] y) {{ y = Identity(image) }}", {})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    np.save(tmp_path / "b.npy", RNG.integers(0, 256, (8, 12, 3), dtype=np.uint8))
    np.save(tmp_path / "a.npy", np.full((5, 5), 51, np.uint8))
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def test_images_in_the_order_of_their_names(folder: Path) -> None:
    data = ImageFolder(folder, mean=(0.1, 0.2, 0.3), deviation=0.5)
    first, second = (one["image"] for one in data.feeds(classifier()))
    assert first.shape == second.shape == (1, 3, 4, 6)
    assert first.dtype == np.float32
    np.testing.assert_allclose(first[0, :, 0, 0], [0.2, 0.0, -0.2], atol=1e-6)
    pixels = np.load(folder / "b.npy").astype(np.float64)
    # A triangle that is twice as wide as a pixel of the result: half of its weight lies outside.
    mean = (pixels[2:6, 4:8].reshape(4, 4, 3) * np.outer([1, 3, 3, 1], [1, 3, 3, 1])[:, :, None] / 64).sum(axis=(0, 1))
    expected = (mean / 255 - np.asarray([0.1, 0.2, 0.3])) / 0.5
    at = resized(pixels, (4, 6))[1:3, 2:4]
    assert at.shape == (2, 2, 3)
    np.testing.assert_allclose(second[0, :, 1, 2], ((at[0, 0] / 255) - [0.1, 0.2, 0.3]) / 0.5, atol=1e-5)
    assert np.abs(second[0, :, 1:3, 2:4].mean(axis=(1, 2)) - expected).max() < 0.5
    assert len(data) == 2
    assert data.fingerprint == ImageFolder(folder, mean=(0.1, 0.2, 0.3), deviation=0.5).fingerprint
    assert data.fingerprint != ImageFolder(folder).fingerprint
    assert len(ImageFolder(folder, limit=1)) == 1


def test_channels_last_integers_grey_and_bgr(folder: Path) -> None:
    scale, mean, deviation = VALUES["raw"]
    raw = {"scale": scale, "mean": mean, "deviation": deviation}
    _, last = (one["image"] for one in ImageFolder(folder, **raw).feeds(classifier("b, 8, 12, 3", "uint8")))  # type: ignore[arg-type]
    np.testing.assert_array_equal(last[0], np.load(folder / "b.npy"))
    _, turned = (one["image"] for one in ImageFolder(folder, bgr=True, **raw).feeds(classifier("b, 8, 12, 3", "uint8")))  # type: ignore[arg-type]
    np.testing.assert_array_equal(turned[0], np.load(folder / "b.npy")[:, :, ::-1])
    grey, _ = (one["image"] for one in ImageFolder(folder, **raw).feeds(classifier("b, 1, 5, 5")))  # type: ignore[arg-type]
    np.testing.assert_allclose(grey, 51, rtol=1e-5)
    (first, _) = ImageFolder(folder, size=(7, 9)).feeds(classifier("b, 3, h, w"))
    assert first["image"].shape == (1, 3, 7, 9)


def test_resizing() -> None:
    flat = np.full((6, 10, 3), 40.0)
    for fit in ("stretch", "crop", "pad"):
        image = resized(flat, (8, 8), fit)  # type: ignore[arg-type]
        assert image.shape == (8, 8, 3)
        inside = image[2:6] if fit == "pad" else image
        np.testing.assert_allclose(inside, 40, rtol=1e-5)
    assert np.all(resized(flat, (8, 8), "pad")[0] == 114)
    image = RNG.random((6, 10, 3))
    np.testing.assert_allclose(resized(image, (6, 10)), image, rtol=1e-6)
    # Enlarged by two, each pixel of the result lies a quarter off: 3/4 of one neighbour and 1/4 of the other.
    wide = resized(np.asarray([0.0, 4.0]).reshape(1, 2, 1), (1, 4))[0, :, 0]
    np.testing.assert_allclose(wide, [0, 1, 3, 4])
    # Halved, the mean stays.
    assert resized(image, (3, 5)).mean() == pytest.approx(image.mean(), rel=0.1)


def test_what_does_not_fit(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputDataError, match="no folder"):
        ImageFolder(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputDataError, match="no image"):
        ImageFolder(tmp_path / "empty")
    with pytest.raises(InputDataError, match="takes images of any size"):
        next(ImageFolder(folder).feeds(classifier("b, 3, h, w")))
    with pytest.raises(InputDataError, match="4 channels"):
        next(ImageFolder(folder).feeds(classifier("b, 4, 5, 5")))
    with pytest.raises(InputDataError, match="a model that takes one image"):
        next(ImageFolder(folder).feeds(classifier("b, 12")))
    with pytest.raises(InputDataError, match="2 means"):
        next(ImageFolder(folder, mean=(0.1, 0.2)).feeds(classifier()))
    np.save(folder / "0.npy", np.zeros((2, 2, 5)))
    with pytest.raises(InputDataError, match=r"shape \[2, 2, 5\]"):
        next(ImageFolder(folder).feeds(classifier()))
    (folder / "0.npy").write_bytes(b"no")
    with pytest.raises(InputDataError, match="can't be read as an image"):
        next(ImageFolder(folder).feeds(classifier()))


def test_without_pillow(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "0.png").write_bytes(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UsageError, match="needs the package pillow"):
        next(ImageFolder(folder).feeds(classifier()))


class Image:
    """What is used of Pillow's."""

    mode = "RGBA"

    def __enter__(self) -> Image:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def convert(self, mode: str) -> np.ndarray:
        assert mode == "RGB"
        return np.full((4, 6, 3), 255, np.uint8)


def test_files_that_pillow_reads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a stand-in: Pillow is no dependency."""
    (folder / "0.png").write_bytes(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "PIL", types.ModuleType("PIL"))
    monkeypatch.setitem(sys.modules, "PIL.Image", types.SimpleNamespace(open=lambda path: Image()))
    np.testing.assert_allclose(next(ImageFolder(folder).feeds(classifier()))["image"], 1, rtol=1e-6)
