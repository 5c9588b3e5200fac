"""Whether data to judge with was also calibrated with: such numbers look better than the model is."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt.errors import InputDataError

RUN = 64
"""Tokens in a row that no two texts share by chance."""
_BASE = np.uint64(0x9E3779B97F4A7C15)


def refuse_shared_text(evaluation: npt.NDArray[np.int64], calibration: npt.NDArray[np.int64], run: int = RUN) -> None:
    """Refuse a text of which `run` tokens in a row stand in the calibration text too, wherever windows begin.

    Args:
        evaluation: Token ids of the text to judge with.
        calibration: Those of the text that was calibrated with.
        run: Tokens in a row; of a shorter text all of it.

    Raises:
        InputDataError: They share a run.
    """
    run = min(run, len(evaluation), len(calibration))
    if run == 0:
        return
    shared = np.flatnonzero(np.isin(_runs(evaluation, run), _runs(calibration, run)))
    if len(shared):
        tokens = int((np.diff(shared, prepend=shared[0] - run).clip(max=run)).sum())
        raise InputDataError(
            f"The text to judge with shares {tokens:,} of its {len(evaluation):,} tokens with the calibration text, "
            f"from token {int(shared[0]):,} on, so its numbers would flatter the model; give text that was held out."
        )


def refuse_shared_samples(
    evaluation: Iterable[Mapping[str, npt.NDArray[Any]]], calibration: Iterable[Mapping[str, npt.NDArray[Any]]]
) -> None:
    """Refuse samples that were calibrated with, bit for bit.

    Args:
        evaluation: Batches of inputs by name, samples along the first axis.
        calibration: Likewise.

    Raises:
        InputDataError: They share a sample.
    """
    known = {print_ for batch in calibration for print_ in fingerprints(batch)}
    judged = [print_ for batch in evaluation for print_ in fingerprints(batch)]
    shared = sum(print_ in known for print_ in judged)
    if shared:
        raise InputDataError(
            f"{shared:,} of the {len(judged):,} samples to judge with were calibrated with, so their numbers would "
            "flatter the model; give samples that were held out."
        )


def fingerprints(batch: Mapping[str, npt.NDArray[Any]]) -> list[bytes]:
    """A digest of each sample of a batch: of its part of every input that has one for each sample."""
    arrays = {name: np.asarray(array) for name, array in sorted(batch.items())}
    count = max((len(array) for array in arrays.values() if array.ndim), default=0)
    prints = []
    for index in range(count):
        digest = hashlib.blake2b(digest_size=16)
        for name, array in arrays.items():
            if array.ndim and len(array) == count:
                digest.update(f"{name} {array.dtype} {array.shape[1:]}".encode())
                digest.update(np.ascontiguousarray(array[index]).tobytes())
        prints.append(digest.digest())
    return prints


def _runs(ids: npt.NDArray[np.int64], run: int) -> npt.NDArray[np.uint64]:
    """A hash of each run of tokens [tokens - run + 1]: a polynomial in a fixed base, modulo 2⁶⁴."""
    hashes = np.zeros(len(ids) - run + 1, dtype=np.uint64)
    tokens = ids.astype(np.uint64) * np.uint64(0xBF58476D1CE4E5B9) + np.uint64(1)
    with np.errstate(over="ignore"):
        tokens ^= tokens >> np.uint64(29)
        for offset in range(run):
            hashes = hashes * _BASE + tokens[offset : offset + len(hashes)]
    return hashes
