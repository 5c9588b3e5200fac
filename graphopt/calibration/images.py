"""Images as calibration data: the files of a folder, resized to what the model takes."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.calibration.data import Dataset, Feeds, checked, counted, digest
from graphopt.errors import InputDataError, UsageError, first_line

Array = npt.NDArray[Any]
Fit = Literal["stretch", "crop", "pad"]
"""How an image of other proportions becomes one of the model's size: stretched, cut at the centre, or grey around."""

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".npy"})
BORDER = 114
"""Grey of the borders of "pad", of 255, as detectors of the YOLO family are trained with."""
VALUES: dict[str, tuple[float, tuple[float, ...], tuple[float, ...]]] = {
    "unit": (1 / 255, (0.0,), (1.0,)),
    "signed": (1 / 255, (0.5,), (0.5,)),
    "imagenet": (1 / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "raw": (1.0, (0.0,), (1.0,)),
}
"""Scale, mean and standard deviation by name: x = (pixel · scale − mean) / deviation, pixels from 0 to 255."""


class ImageFolder(Dataset):
    """The images of a folder, one for each sample, in the order of their names.

    .npy files hold pixels [height, width, 3], [height, width, 1] or [height, width] from 0 to 255; everything else is
    read by the package Pillow.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        size: tuple[int, int] | None = None,
        scale: float = 1 / 255,
        mean: float | Sequence[float] = 0.0,
        deviation: float | Sequence[float] = 1.0,
        fit: Fit = "stretch",
        bgr: bool = False,
        limit: int | None = None,
    ) -> None:
        """Look into a folder, not below it.

        Args:
            folder: The folder.
            size: Height and width, for a model that takes any.
            scale: What pixels (0 to 255) are multiplied by first.
            mean: What is subtracted then; one number, or one for each channel.
            deviation: What the result is divided by; one number, or one for each channel.
            fit: What happens to an image of other proportions.
            bgr: Blue first and red last, as OpenCV has them.
            limit: Images that are used at most; None: all.

        Raises:
            InputDataError: There is no image.
        """
        self._folder = Path(folder)
        if not self._folder.is_dir():
            raise InputDataError(f"There is no folder {self._folder} of images.")
        files = [path for path in sorted(self._folder.iterdir()) if path.suffix.lower() in SUFFIXES and path.is_file()]
        self._files = files if limit is None else files[:limit]
        if not self._files:
            raise InputDataError(f"There is no image in {self._folder}.")
        self._size, self._fit, self._bgr = size, fit, bgr
        self._values = (float(scale), _numbers(mean), _numbers(deviation))

    def __len__(self) -> int:
        """Number of images."""
        return len(self._files)

    @functools.cached_property
    def fingerprint(self) -> str:
        """See the base; of the files' contents and of what is made of them."""
        options = repr((self._size, self._fit, self._bgr, self._values))
        return digest("images", options, *(digest(path.read_bytes()) for path in self._files))

    @property
    def description(self) -> str:
        """See the base."""
        return counted(len(self), "image")

    def feeds(self, model: ir.Model) -> Iterator[Feeds]:
        """The one input of `model` for each image, [1, channels, height, width] or with the channels last.

        Raises:
            InputDataError: The model doesn't take one image, or a file can't be read.
        """
        value, last, channels, size = self._input(model)
        dtype = value.dtype or ir.DataType.FLOAT
        scale, mean, deviation = self._values
        for numbers in (mean, deviation):
            if len(numbers) not in (1, channels):
                raise InputDataError(
                    f"The model's images have {channels} channels, and {len(numbers)} means are given."
                )
        for path in self._files:
            pixels = resized(_channels(_read(path), channels, path), size, self._fit)
            if self._bgr and channels == 3:
                pixels = pixels[:, :, ::-1]
            made = (pixels * np.float32(scale) - mean) / deviation
            if dtype.is_integer():
                made = np.rint(made)
            made = made if last else made.transpose(2, 0, 1)
            yield checked({value.name or "": made[None].astype(dtype.numpy())}, model, str(path))

    def _input(self, model: ir.Model) -> tuple[ir.Value, bool, int, tuple[int, int]]:
        """The input, whether its channels are the last axis, how many, and height and width."""
        inputs = [value for value in model.graph.inputs if not value.is_initializer()]
        if len(inputs) != 1 or inputs[0].shape is None or len(inputs[0].shape) != 4:
            told = ", ".join(f"{value.name!r} {value.shape}" for value in inputs)
            raise InputDataError(f"Images are for a model that takes one image, and this one takes {told}.")
        sizes = [size if isinstance(size, int) and size > 0 else None for size in inputs[0].shape]
        last = sizes[3] in (1, 3) and sizes[1] not in (1, 3)
        channels = sizes[3 if last else 1] or 3
        if channels not in (1, 3):
            raise InputDataError(f"The input {inputs[0].name!r} takes images of {channels} channels, not of 1 or 3.")
        height, width = sizes[1:3] if last else sizes[2:4]
        if self._size is not None:
            height, width = height or self._size[0], width or self._size[1]
        if height is None or width is None:
            raise InputDataError(
                f"The input {inputs[0].name!r} takes images of any size; say which with the size of the image folder."
            )
        return inputs[0], last, channels, (height, width)


def resized(pixels: Array, size: tuple[int, int], fit: Fit = "stretch") -> Array:
    """An image of another size, by linear interpolation that averages where it shrinks.

    Args:
        pixels: [height, width, channels].
        size: Height and width of the result.
        fit: What happens to other proportions.

    Returns:
        [height, width, channels], float32.
    """
    height, width = pixels.shape[:2]
    if fit != "stretch":
        choose = max if fit == "crop" else min
        ratio = choose(size[0] / height, size[1] / width)
        inner = max(1, round(height * ratio)), max(1, round(width * ratio))
    else:
        inner = size
    rows, columns = _interpolation(height, inner[0]), _interpolation(width, inner[1])
    image = np.einsum("oh,hwc->owc", rows, pixels.astype(np.float32), optimize=True)
    image = np.einsum("pw,owc->opc", columns, image, optimize=True)
    if fit == "crop":
        top, left = (inner[0] - size[0]) // 2, (inner[1] - size[1]) // 2
        return np.asarray(image[top : top + size[0], left : left + size[1]])
    if fit == "pad":
        whole = np.full((*size, image.shape[2]), BORDER, dtype=np.float32)
        top, left = (size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2
        whole[top : top + inner[0], left : left + inner[1]] = image
        return whole
    return np.asarray(image)


@functools.lru_cache(maxsize=64)
def _interpolation(size: int, wanted: int) -> npt.NDArray[np.float32]:
    """The matrix [wanted, size] of a triangle filter."""
    ratio = size / wanted
    centres = (np.arange(wanted) + 0.5) * ratio
    distances = np.abs(np.arange(size) + 0.5 - centres[:, None]) / max(ratio, 1)
    weights = np.maximum(1 - distances, 0)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), dtype=np.float32)


def _read(path: Path) -> Array:
    try:
        if path.suffix.lower() == ".npy":
            return np.asarray(np.load(path, allow_pickle=False))
        try:
            pillow = importlib.import_module("PIL.Image")
        except ImportError as error:
            message = f"Reading {path.name} needs the package pillow; install it, or give .npy files."
            raise UsageError(message) from error
        with pillow.open(path) as image:
            return np.asarray(image.convert("L" if image.mode in ("1", "L", "I", "F") else "RGB"))
    except (OSError, ValueError) as error:
        raise InputDataError(f"{path} can't be read as an image: {first_line(error)}.") from error


def _channels(pixels: Array, channels: int, path: Path) -> Array:
    """Pixels [height, width, channels] of an image that may have another number of them."""
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3):
        raise InputDataError(f"{path} holds an array of shape {list(pixels.shape)}, not [height, width, 3].")
    if pixels.shape[2] == channels:
        return pixels
    if channels == 3:
        return np.repeat(pixels, 3, axis=2)
    grey = pixels.astype(np.float32) @ np.asarray([0.299, 0.587, 0.114], dtype=np.float32)
    return np.asarray(grey[:, :, None])


def _numbers(given: float | Sequence[float]) -> npt.NDArray[np.float32]:
    return np.atleast_1d(np.asarray(given, dtype=np.float32))
