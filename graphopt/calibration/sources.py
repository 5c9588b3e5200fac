"""Calibration data by the name of a file, a folder, or "self"."""

from __future__ import annotations

import os
from pathlib import Path

import onnx_ir as ir

from graphopt.calibration.data import Dataset, load_arrays
from graphopt.calibration.images import VALUES, ImageFolder
from graphopt.calibration.text import generated_text, load_text, tokenizer_beside
from graphopt.errors import InputDataError, UsageError
from graphopt.graph.kv_interface import kv_interface
from graphopt.graph.load import PATH_KEY

SELF = "self"
"""In place of a file: what a decoder writes itself."""
SAMPLES = 128
"""Samples that are used at most unless one says how many."""
DECODER_WINDOW, ENCODER_WINDOW, GENERATED_WINDOW = 512, 128, 256
"""Tokens of a window unless one says how many."""


def load_data(
    source: str | os.PathLike[str],
    model: ir.Model,
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    samples: int | None = None,
    window: int | None = None,
    images: str = "unit",
    seed: int = 0,
) -> Dataset:
    """The data set behind a name: text (.txt, .jsonl), arrays (.npz), a folder of images, or "self".

    Args:
        source: The file or folder, or "self".
        model: What it is for.
        tokenizer: A folder with a `tokenizer.json`, or that file, for text; None: the folder of the model's file.
        samples: Windows, samples or images that are used at most; None: 128, of generated text 64.
        window: Tokens in one window of text; None: 512 for a decoder, 128 for an encoder, 256 where it is generated.
        images: What pixels become: "unit" (0 to 1), "signed" (−1 to 1), "imagenet" (mean 0 and deviation 1 over
            ImageNet) or "raw" (0 to 255).
        seed: Of generated text.

    Raises:
        UsageError: An option that isn't for this sort of data, or is missing.
        InputDataError: The file can't be read, or doesn't fit.
    """
    if samples is not None and samples < 1:
        raise UsageError(f"Calibration needs at least one sample, not {samples}.")
    name, path = os.fspath(source), Path(source)
    text = path.suffix.lower() in (".txt", ".jsonl") and name != SELF
    if tokenizer is not None and not text:
        raise UsageError(f"A tokenizer is for text (.txt or .jsonl), which {name} isn't.")
    if window is not None and not text and name != SELF:
        raise UsageError(f"A window of tokens is for text (.txt or .jsonl), which {name} isn't.")
    if images not in VALUES:
        raise UsageError(f"Pixels can't become {images!r}; there are {', '.join(VALUES)}.")
    if name == SELF:
        return generated_text(model, samples or SAMPLES // 2, window or GENERATED_WINDOW, seed)
    if path.is_dir():
        scale, mean, deviation = VALUES[images]
        return ImageFolder(path, scale=scale, mean=mean, deviation=deviation, limit=samples or SAMPLES)
    if not path.is_file():
        raise InputDataError(f"There is no calibration data {name}.")
    if path.suffix.lower() == ".npz":
        return load_arrays(path, limit=samples or SAMPLES)
    if not text:
        raise UsageError(f"Calibration data is a .txt, .jsonl or .npz file, a folder of images, or self, not {name}.")
    usual = DECODER_WINDOW if kv_interface(model) is not None else ENCODER_WINDOW
    return load_text(path, tokenizer or tokenizer_beside(model.meta.get(PATH_KEY)), window or usual, samples or SAMPLES)
