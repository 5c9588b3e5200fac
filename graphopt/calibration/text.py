"""Text as calibration data: files of plain text or JSON lines, cut into windows of tokens."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt.errors import InputDataError, UsageError, first_line

TEXT_KEYS = ("text", "content", "prompt")


@dataclasses.dataclass(frozen=True)
class TextDataset:
    """Windows of tokens.

    Attributes:
        tokens: All token ids of the text in order, int64.
        window: Tokens in one window.
    """

    tokens: npt.NDArray[np.int64]
    window: int = 512

    def __len__(self) -> int:
        """Number of whole windows."""
        return len(self.tokens) // self.window

    def __iter__(self) -> Iterator[npt.NDArray[np.int64]]:
        """The windows, each of shape [1, window]; a rest shorter than a window is left out."""
        for i in range(len(self)):
            yield self.tokens[None, i * self.window : (i + 1) * self.window]


def load_text(path: str | os.PathLike[str], tokenizer: str | os.PathLike[str] | None, window: int = 512) -> TextDataset:
    """Read a text file, or a .jsonl file with a string under "text", "content" or "prompt" in each line.

    Args:
        path: The file, in UTF-8.
        tokenizer: A folder with a `tokenizer.json`, or that file.
        window: Tokens in one window.

    Raises:
        UsageError: No tokenizer is given, or the package that reads it is missing.
        InputDataError: A file can't be read, has another form, or holds less than one window.
    """
    if tokenizer is None:
        raise UsageError("Calibration text needs a tokenizer; give the folder of the model's tokenizer.json.")
    text = _read(Path(path))
    encoded = tokenize(text, tokenizer)
    if len(encoded) < window:
        raise InputDataError(f"{path} holds {len(encoded)} tokens; calibration needs at least {window}.")
    return TextDataset(encoded, window)


def tokenize(text: str, tokenizer: str | os.PathLike[str]) -> npt.NDArray[np.int64]:
    """The token ids of a text, without special tokens.

    Args:
        text: The text.
        tokenizer: A folder with a `tokenizer.json`, or that file.

    Raises:
        UsageError: The package that reads tokenizers is missing.
        InputDataError: The tokenizer can't be read.
    """
    ids = _tokenizer(Path(tokenizer)).encode(text, add_special_tokens=False).ids
    return np.asarray(ids, dtype=np.int64)


def _read(path: Path) -> str:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputDataError(f"{path} can't be read as text: {error}.") from error
    if path.suffix != ".jsonl":
        return content
    texts = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputDataError(f"Line {number} of {path} isn't JSON: {error}.") from error
        found = next((row[k] for k in TEXT_KEYS if isinstance(row, dict) and isinstance(row.get(k), str)), None)
        if found is None:
            raise InputDataError(f"Line {number} of {path} has no string under {', '.join(map(repr, TEXT_KEYS))}.")
        texts.append(found)
    return "\n\n".join(texts)


def tokenize_each(texts: Sequence[str], tokenizer: str | os.PathLike[str], longest: int) -> list[npt.NDArray[np.int64]]:
    """The token ids of texts of their own, with the special tokens that an encoder wants around each.

    Args:
        texts: The texts.
        tokenizer: A folder with a `tokenizer.json`, or that file.
        longest: Tokens of a text that are kept, special ones included.

    Raises:
        UsageError: The package that reads tokenizers is missing.
        InputDataError: The tokenizer can't be read.
    """
    reader = _tokenizer(Path(tokenizer))
    reader.enable_truncation(longest)
    return [np.asarray(encoding.ids, dtype=np.int64) for encoding in reader.encode_batch(list(texts))]


def read_texts(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The texts of a .jsonl file, a row each, with what stands beside them; else the lines of a file that aren't empty.

    Returns:
        For each text a dictionary that has it under "text".

    Raises:
        InputDataError: The file can't be read, or has another form.
    """
    path = Path(path)
    text = _read(path)
    if path.suffix != ".jsonl":
        return [{"text": line.strip()} for line in text.splitlines() if line.strip()]
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [{**row, "text": next(row[k] for k in TEXT_KEYS if isinstance(row.get(k), str))} for row in rows]


def _tokenizer(path: Path) -> Any:
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise InputDataError(f"There is no tokenizer at {file}; give a folder with a tokenizer.json.")
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise UsageError("The package tokenizers is missing; install graphopt[export].") from error
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises plain Exception
        raise InputDataError(f"{file} is not a tokenizer: {first_line(error)}.") from error
    # The file may ask for both, and a text would be cut off, or filled up, to the length of one input.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
