"""Finished stages on disk, found again by what they were made of.

The key of a stage is a digest of the data, of all pieces before it with the weights they ran with, of the piece itself
and of what is asked of it. So an interrupted run goes on where it stopped: its finished stages are read, and what
crosses into the first unfinished one is made again by running the pieces before it once, without statistics. This holds
for sequential runs too, as long as the caller makes the same weights of the same statistics.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.calibration.data import digest
from graphopt.calibration.statistics import Summary
from graphopt.graph.content import digest_of
from graphopt.graph.skeleton import skeleton

Array = npt.NDArray[Any]

FORMAT = "1"
_UNFINISHED = ".tmp"
_DAY_SECONDS = 86400
_NOT_THERE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)
"""What reading a file of arrays raises that isn't there, or not whole."""
MOST_BYTES = 4 << 30
"""What the cache may hold; beyond it, what was used longest ago is removed, but nothing of the run that goes on.

Of a run that makes more than this the first stages are kept: an interrupted one goes on behind them.
"""


class StageCache:
    """The stages of one run in a folder, in their order: `enter`, `load` or `save`, and `leave` for each."""

    def __init__(self, folder: Path, fingerprint: str, most_bytes: int = MOST_BYTES) -> None:
        """Use a folder, which is made at the first `save`.

        Args:
            folder: The folder.
            fingerprint: Of the data.
            most_bytes: What it may hold.
        """
        self._folder, self._most = folder, most_bytes
        self._before = digest(FORMAT, fingerprint)
        self._key = self._piece = ""
        self._own: dict[Path, int] = {}
        """The files of this run, with their bytes."""

    def enter(self, piece: ir.Model, requests: Sequence[str]) -> None:
        """Go to the next stage: a piece with its weights, and what is asked of it."""
        if self._key:
            self._before = digest(self._before, self._piece)
        self._piece = _content(piece)
        self._key = digest(self._before, self._piece, *requests)

    def leave(self, piece: ir.Model | None) -> None:
        """Say with which weights the piece ran for those behind it, where that were others."""
        if piece is not None:
            self._piece = _content(piece)

    def load(self) -> tuple[list[Summary], list[Array]] | None:
        """The summaries, and the attentions received, of this stage; None where it isn't there."""
        path = self._path
        try:
            with np.load(path, allow_pickle=False) as file:
                rows = json.loads(str(file["summaries"]))
                summaries = [
                    Summary({name: file[f"{i}.{name}"] for name in names}, count, weight, excluded)
                    for i, (names, count, weight, excluded) in enumerate(rows)
                ]
                received = [file[f"received.{i}"] for i in range(int(file["received"]))]
            os.utime(path)
            self._own[path] = path.stat().st_size
        except _NOT_THERE:
            return None  # Not there, or not whole: it is made again.
        return summaries, received

    def save(self, summaries: Sequence[Summary], received: Sequence[Array]) -> None:
        """Keep this stage."""
        rows = [[list(s.arrays), s.rows, s.weight, s.excluded] for s in summaries]
        arrays = {f"{i}.{name}": array for i, s in enumerate(summaries) for name, array in s.arrays.items()}
        arrays |= {f"received.{i}": array for i, array in enumerate(received)}
        arrays |= {"summaries": np.asarray(json.dumps(rows)), "received": np.asarray(len(received))}
        size = sum(array.nbytes for array in arrays.values())
        if not self._own or sum(self._own.values()) + size <= self._most:
            self._own[self._path] = size
            _keep(self._path, arrays, self._most, self._own)

    @property
    def _path(self) -> Path:
        return self._folder / f"{self._key}.npz"


class TrialCache:
    """What trials on one model gave, by their names, each kept as soon as it is made.

    Args:
        folder: The folder, which is made at the first `save`; None: nothing is kept.
        model: The model, with its weights; None: they hang on no model.
        parts: What else the trials hang on: the data, and what is tried.
        most_bytes: What the folder may hold.
    """

    def __init__(self, folder: Path | None, model: ir.Model | None, *parts: str, most_bytes: int = MOST_BYTES) -> None:
        self._most, self._path = most_bytes, None
        if folder is not None:
            content = "" if model is None else _content(model)
            self._path = folder / f"{digest(FORMAT, 'trials', content, *parts)}.npz"
        self._found: dict[str, Array] = {}
        if self._path is None:
            return
        try:
            with np.load(self._path, allow_pickle=False) as file:
                names = json.loads(str(file["names"]))
                self._found = dict(zip(names, np.asarray(file["numbers"], np.float64), strict=True))
            os.utime(self._path)
        except _NOT_THERE:
            self._found = {}

    def load(self, name: str) -> Array | None:
        """The numbers that a trial gave, float64; None: it wasn't made."""
        return self._found.get(name)

    def save(self, name: str, numbers: Array) -> None:
        """Keep what a trial gave, as many numbers as the others did."""
        self._found[name] = numbers
        if self._path is not None:
            arrays = {
                "names": np.asarray(json.dumps(list(self._found))),
                "numbers": np.stack(list(self._found.values())),
            }
            _keep(self._path, arrays, self._most, (self._path,))


def _keep(path: Path, arrays: Mapping[str, Array], most_bytes: int, own: Collection[Path]) -> None:
    """Write a file of arrays in one step, and remove what was used longest ago beyond what the folder may hold; of
    `own`, nothing.

    A disk that is full or read-only costs the cache, not the run.
    """
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=_UNFINISHED, delete=False) as file:
            temporary = file.name
            np.savez(file, **arrays)  # type: ignore[arg-type]
        os.replace(temporary, path)
        _prune(path.parent, most_bytes, own)
    except OSError:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _prune(folder: Path, most_bytes: int, own: Collection[Path]) -> None:
    for path in folder.glob(f"*{_UNFINISHED}"):
        if time.time() - path.stat().st_mtime > _DAY_SECONDS:  # of a run that was killed while it wrote
            path.unlink(missing_ok=True)
    files = sorted(folder.glob("*.npz"), key=lambda path: path.stat().st_mtime)
    total = sum(path.stat().st_size for path in files)
    for path in files:
        if total <= most_bytes:
            return
        if path in own:
            continue
        total -= path.stat().st_size
        path.unlink(missing_ok=True)


def _content(piece: ir.Model) -> str:
    """A digest of a model and all its weights."""
    proto, weights = skeleton(piece)
    for weight in weights:
        del weight.proto.external_data[:]
    return digest(proto.SerializeToString(deterministic=True), *(digest_of(weight.tensor) for weight in weights))
