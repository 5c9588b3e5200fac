"""What a model is judged on, and the files that hold it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.calibration.data import read_arrays
from graphopt.calibration.text import read_texts
from graphopt.errors import InputDataError

LABELS, TEXTS = "labels", "texts"
"""Arrays of an .npz file that are no inputs: the true class, or the true text, of each sample."""


class Samples(Protocol):
    """A data set of samples for a model, such as those that calibration reads."""

    def feeds(self, model: ir.Model) -> Iterator[Mapping[str, npt.NDArray[Any]]]:
        """An array for each input, batch by batch; the same ones every time."""


@dataclasses.dataclass(frozen=True)
class EvaluationData:
    """What a model is judged on, held out from calibration; one of its fields from `text` to `samples` is given.

    Attributes:
        name: What it is called in messages and reports.
        text: One long text, for language models.
        tokens: The same as token ids [tokens].
        rows: Texts of their own.
        arrays: An array for each input, samples along the first axis.
        samples: A data set that makes feeds for the model.
        labels: The true class of each sample or row; None: not known.
        truths: The true text of each sample; None: not known.
    """

    name: str
    text: str | None = None
    tokens: npt.NDArray[np.int64] | None = None
    rows: tuple[str, ...] = ()
    arrays: Mapping[str, npt.NDArray[Any]] | None = None
    samples: Samples | None = None
    labels: npt.NDArray[np.int64] | None = None
    truths: tuple[str, ...] | None = None


def load_evaluation(path: str | os.PathLike[str], images: str = "unit") -> EvaluationData:
    """Read evaluation data: text, .jsonl with a string under "text" (and a whole number under "label") in each line,
    .npz with an array for each input, and perhaps `labels` or `texts` of the samples, or a folder of images.

    Args:
        path: The file or folder.
        images: What the pixels of images become; see `graphopt.calibration.images.VALUES`.

    Raises:
        UsageError: Pixels can't become that.
        InputDataError: The file can't be read, or has none of these forms.
    """
    file = Path(path)
    if file.suffix == ".npz":
        return _arrays(file)
    if file.is_dir():
        from graphopt.evaluation.images import image_data

        return image_data(file, images)
    rows = read_texts(file)
    if any("\0" in row["text"] for row in rows):
        raise InputDataError(
            f"{file} can't be read as text: it holds bytes of something else; give .txt, .jsonl or .npz."
        )
    if not rows:
        raise InputDataError(f"There is no text in {file}.")
    told = [row.get("label") for row in rows]
    labels = np.array(told, dtype=np.int64) if all(type(label) is int for label in told) else None
    texts = tuple(row["text"] for row in rows)
    whole = "\n\n".join(texts) if file.suffix == ".jsonl" else file.read_text(encoding="utf-8")
    return EvaluationData(str(file), text=whole, rows=texts, labels=labels)


def _arrays(file: Path) -> EvaluationData:
    arrays = read_arrays(file)
    labels, texts = arrays.get(LABELS), arrays.get(TEXTS)
    classes = labels is not None and labels.dtype.kind in "iu" and labels.ndim == 1
    truths = texts is not None and texts.dtype.kind == "U" and texts.ndim == 1
    return EvaluationData(
        str(file),
        arrays=arrays,
        labels=labels.astype(np.int64) if classes and labels is not None else None,
        truths=tuple(str(text) for text in texts) if truths and texts is not None else None,
    )
