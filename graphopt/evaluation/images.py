"""Folders of images to judge with: a folder for each class, or images and a list of what they read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.calibration.images import SUFFIXES, VALUES, ImageFolder
from graphopt.errors import InputDataError, UsageError
from graphopt.evaluation.data import EvaluationData

LIST = "texts.txt"
"""The file beside images that says what they read: the name of the file, a tab, and the text, in each line."""


def image_data(folder: Path, images: str = "unit") -> EvaluationData:
    """The images of a folder, in the order of their names; or those of its folders, each of which is a class.

    Classes are numbered in the order of their names, and their images come in turn, so that the first ones are of all
    classes.

    Args:
        folder: The folder.
        images: What pixels become; see `graphopt.calibration.images.VALUES`.

    Raises:
        UsageError: Pixels can't become that.
        InputDataError: There is no image, or the list of texts doesn't fit.
    """
    if images not in VALUES:
        raise UsageError(f"Pixels can't become {images!r}; there are {', '.join(VALUES)}.")
    scale, mean, deviation = VALUES[images]
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    found = [ImageFolder(path, scale=scale, mean=mean, deviation=deviation) for path in classes or [folder]]
    turns = [number for turn in range(max(map(len, found))) for number, one in enumerate(found) if turn < len(one)]
    return EvaluationData(
        str(folder),
        samples=InTurn(found, turns),
        labels=np.array(turns, dtype=np.int64) if classes else None,
        truths=None if classes or not (folder / LIST).is_file() else _texts(folder),
    )


class InTurn:
    """Several folders of images as one data set.

    Args:
        folders: The folders.
        turns: Which of them gives each image.
    """

    def __init__(self, folders: list[ImageFolder], turns: list[int]) -> None:
        self._folders, self._turns = folders, turns

    def feeds(self, model: ir.Model) -> Iterator[Mapping[str, npt.NDArray[Any]]]:
        """One image at a time."""
        running = [folder.feeds(model) for folder in self._folders]
        return (next(running[number]) for number in self._turns)


def _texts(folder: Path) -> tuple[str, ...]:
    """What each image reads, in the order of their names."""
    lines = (folder / LIST).read_text(encoding="utf-8").splitlines()
    told = dict(line.split("\t", 1) for line in lines if "\t" in line)
    names = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if missing := [name for name in names if name not in told]:
        raise InputDataError(
            f"{folder / LIST} doesn't say what {missing[0]} reads; a line has the name of an image, a tab and its text."
        )
    return tuple(told[name] for name in names)
