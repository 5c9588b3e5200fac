"""Text as calibration data: files of plain text or JSON lines, or what the model writes itself, in windows."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.calibration.data import Dataset, Feeds, counted, digest
from graphopt.calibration.token_feeds import TokenInputs
from graphopt.errors import InputDataError, ModelError, UsageError, first_line
from graphopt.graph.kv_interface import kv_interface
from graphopt.runtime_ops.generation import Generator
from graphopt.runtime_ops.memory_session import make_session
from graphopt.runtime_ops.sampling import Sampling

TEXT_KEYS = ("text", "content", "prompt")
_AT_ONCE = 16
"""Rows that are generated together."""


@dataclasses.dataclass(frozen=True, eq=False)
class TextDataset(Dataset):
    """Windows of tokens.

    Attributes:
        tokens: All token ids of the text in order, int64.
        window: Tokens in one window.
        before: Special tokens that an encoder wants before each text, such as [CLS]; a decoder gets none.
        after: Those behind it, such as [SEP].
        limit: Windows that are used at most; None: all.
    """

    tokens: npt.NDArray[np.int64]
    window: int = 512
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    limit: int | None = None

    def __len__(self) -> int:
        """Number of whole windows."""
        whole = len(self.tokens) // self.window
        return whole if self.limit is None else min(whole, self.limit)

    def __iter__(self) -> Iterator[npt.NDArray[np.int64]]:
        """The windows, each of shape [1, window]; a rest shorter than a window is left out."""
        for i in range(len(self)):
            yield self.tokens[None, i * self.window : (i + 1) * self.window]

    @property
    def fingerprint(self) -> str:
        """See the base."""
        used = self.tokens[: len(self) * self.window]
        return digest("text", str(self.window), str((self.before, self.after)), used)

    @property
    def description(self) -> str:
        """See the base."""
        return f"{counted(len(self), 'window')} of {counted(self.window, 'token')}"

    def feeds(self, model: ir.Model) -> Iterator[Feeds]:
        """The inputs for each window: ids, mask and positions, and an empty cache of a decoder; of an encoder ids with
        its special tokens around, mask and token types.

        Raises:
            InputDataError: The model takes something else than text.
        """
        inputs = TokenInputs.read(model)
        room = 0 if inputs.decoder else len(self.before) + len(self.after)
        if self.window <= room:
            raise InputDataError(f"A window of {self.window} tokens has no room for text beside the special ones.")
        for ids in self:
            if room:
                ids = np.concatenate(
                    [[self.before], ids[:, : self.window - room], [self.after]], axis=1, dtype=np.int64
                )
            yield inputs.feeds(ids)


def load_text(
    path: str | os.PathLike[str],
    tokenizer: str | os.PathLike[str] | None,
    window: int = 512,
    limit: int | None = None,
) -> TextDataset:
    """Read a text file, or a .jsonl file with a string under "text", "content" or "prompt" in each line.

    Args:
        path: The file, in UTF-8.
        tokenizer: A folder with a `tokenizer.json`, or that file.
        window: Tokens in one window.
        limit: Windows that are used at most; None: all.

    Raises:
        UsageError: No tokenizer is given, or the package that reads it is missing.
        InputDataError: A file can't be read, has another form, or holds less than one window.
    """
    if tokenizer is None:
        raise UsageError(
            "Calibration text needs a tokenizer; give the folder of the model's tokenizer.json with --tokenizer."
        )
    if window < 1 or (limit is not None and limit < 1):
        raise UsageError(
            f"Calibration needs a window of at least 1 token and at least 1 of them, not {window}, {limit}."
        )
    text = _read(Path(path))
    read = _tokenizer(Path(tokenizer))
    encoded = _encoded(read, text)
    if len(encoded) < window:
        raise InputDataError(f"{path} holds {len(encoded)} tokens; calibration needs at least {window}.")
    return TextDataset(encoded, window, *_special(read), limit)


def generated_text(model: ir.Model, windows: int = 64, window: int = 256, seed: int = 0) -> TextDataset:
    """Text that a decoder writes itself, for calibration where there is no data.

    Each window begins with a token drawn from the whole vocabulary and goes on with what the model samples at
    temperature 1. Source: LLM-QAT: Data-Free Quantization Aware Training for Large Language Models (Liu et al., 2023).

    Args:
        model: The decoder.
        windows: Windows to write.
        window: Tokens in one window.
        seed: Of the first tokens and the sampling.

    Raises:
        InputDataError: Not a decoder that can be run.
        UsageError: A window of fewer than two tokens, or none at all.
    """
    if window < 2 or windows < 1:
        raise UsageError(
            f"Generated text needs windows of at least 2 tokens, and at least one, not {windows}, {window}."
        )
    interface = kv_interface(model)
    if interface is None or not interface.vocabulary:
        raise InputDataError("Only a decoder with a KV cache can write its own calibration data; give a file instead.")
    try:
        generator = Generator(make_session(model), interface=interface, cache="growing")
    except ModelError as error:
        raise InputDataError(f"The model can't write its own calibration data: {error}") from error
    firsts = np.random.default_rng(seed).integers(0, interface.vocabulary, windows)
    rows: list[list[int]] = []
    for begin in range(0, windows, _AT_ONCE):
        prompts = [[int(first)] for first in firsts[begin : begin + _AT_ONCE]]
        sampling = Sampling(temperature=1.0, seed=seed + begin)
        new = generator.generate(prompts, max_new_tokens=window - 1, sampling=sampling, stop=())
        rows += [prompt + row for prompt, row in zip(prompts, new, strict=True)]
    return TextDataset(np.asarray(rows, dtype=np.int64).reshape(-1), window)


def rest_of(dataset: TextDataset) -> npt.NDArray[np.int64]:
    """The tokens of a text behind the windows that are used: text of the same kind, held out."""
    return dataset.tokens[len(dataset) * dataset.window :]


def tokenizer_beside(model: str | os.PathLike[str] | None) -> Path | None:
    """The folder of a model's file, where its tokenizer.json lies beside it."""
    if model is None:
        return None
    folder = Path(model) if Path(model).is_dir() else Path(model).parent
    return folder if (folder / "tokenizer.json").is_file() else None


def tokenize(text: str, tokenizer: str | os.PathLike[str]) -> npt.NDArray[np.int64]:
    """The token ids of a text, without special tokens.

    Args:
        text: The text.
        tokenizer: A folder with a `tokenizer.json`, or that file.

    Raises:
        UsageError: The package that reads tokenizers is missing.
        InputDataError: The tokenizer can't be read.
    """
    return _encoded(_tokenizer(Path(tokenizer)), text)


def _encoded(tokenizer: Any, text: str) -> npt.NDArray[np.int64]:
    return np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)


def _special(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special tokens that a tokenizer puts before and behind a text."""
    marked = tokenizer.encode("a", add_special_tokens=True)
    own = [index for index, special in enumerate(marked.special_tokens_mask) if not special]
    if not own:
        return (), ()
    return tuple(marked.ids[: own[0]]), tuple(marked.ids[own[-1] + 1 :])


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
