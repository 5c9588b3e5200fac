"""Image classifiers of Fashion-MNIST: a true top-1 of small models, and images to calibrate and to judge with.

    python -m graphopt.models.fashion                  trains what is missing, prints the files and their top-1
    python -m graphopt.models.fashion cnn --threads 2

The data, 60,000 + 10,000 labelled pictures of 28 × 28 grey pixels (Zalando, MIT licence), are those of Debian's package
dataset-fashion-mnist: from where it is installed, else fetched with apt and unpacked into the cache without installing.
Calibrate with the training split and judge with the test split. The models are trained once, by
`graphopt.models.fashion_training`, and kept in the cache.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from graphopt.cache import cache_folder
from graphopt.errors import GraphoptError, ModelError, UsageError, first_line
from graphopt.models.packages import Notify

Split = Literal["train", "test"]
Kind = Literal["cnn", "vit", "vit-deep"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""A residual CNN, a ViT of 4 layers, and one of 12 layers, some of which can be done without."""

PACKAGE = "dataset-fashion-mnist"
INSTALLED = Path("/usr/share/datasets/fashion-mnist")
FILES = {
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}
"""The package's files and their SHA-256."""
NAMES = (
    "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"
)  # fmt: skip
"""The classes by label."""
TRAINING = 1
"""The version of the training; models of another one in the cache aren't used."""


def images(
    split: Split, count: int | None = None, *, cache: Path | str | None = None, progress: Notify | None = None
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Pictures, float32 [n, 1, 28, 28] from 0 (black) to 1, and their labels, int64 [n], in the order of the files.

    Args:
        split: "train" (60,000) or "test" (10,000).
        count: The first so many; None: all.
        cache: See `graphopt.cache.cache_folder`.
        progress: Called with a line of text before a download.

    Raises:
        UsageError: The package is neither installed nor in the cache, and can't be fetched.
        ModelError: A file holds something else than it should.
    """
    root = data_folder(cache=cache, progress=progress)
    part = "train" if split == "train" else "t10k"
    pixels = _read(root / f"{part}-images-idx3-ubyte.gz", count)
    labels = _read(root / f"{part}-labels-idx1-ubyte.gz", count)
    return pixels[:, None].astype(np.float32) / np.float32(255), labels.astype(np.int64)


def available(cache: Path | str | None = None) -> bool:
    """Whether the pictures are here without a download."""
    return any(_whole(folder) for folder in (INSTALLED, _cached(cache)))


def trained(kind: Kind, cache: Path | str | None = None) -> bool:
    """Whether `model` has the classifier already, and needn't train it."""
    return _file(kind, cache).is_file()


def data_folder(*, cache: Path | str | None = None, progress: Notify | None = None) -> Path:
    """The folder of the package's four files; brings them into the cache where needed; raises as `images` does."""
    target = _cached(cache)
    for folder in (INSTALLED, target):
        if _whole(folder):
            return folder
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=target, ignore_cleanup_errors=True) as temporary:
            if progress is not None:
                progress(f"fetching {PACKAGE} with apt")
            _run(["apt-get", "download", PACKAGE], Path(temporary))
            packages = sorted(Path(temporary).glob("*.deb"))
            if len(packages) != 1:
                raise UsageError(f"apt-get download {PACKAGE} left no package; {_ADVICE}")
            _run(["dpkg-deb", "-x", packages[0].name, "unpacked"], Path(temporary))
            unpacked = Path(temporary, "unpacked", *INSTALLED.parts[1:])
            for name, expected in FILES.items():
                if not (unpacked / name).is_file() or _sha256(unpacked / name) != expected:
                    raise ModelError(f"{name} of the package {PACKAGE} isn't the file that was tested.")
                os.replace(unpacked / name, target / name)
    except OSError as error:
        raise UsageError(f"{target} can't be written ({error.strerror or error}); set GRAPHOPT_CACHE.") from error
    return target


_ADVICE = f"install it (apt install {PACKAGE}), or put its four files into the folder fashion-mnist of the cache."


def _run(command: list[str], folder: Path) -> None:
    if shutil.which(command[0]) is None:
        raise UsageError(f"Fashion-MNIST is fetched with {command[0]}, which isn't here; {_ADVICE}")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("E:")] or done.stderr.splitlines()
        reason = (said or ["no reason given"])[-1].removeprefix("E: ")
        raise UsageError(f"{' '.join(command[:2])} fails on {PACKAGE} ({reason}); {_ADVICE}")


def _cached(cache: Path | str | None) -> Path:
    return cache_folder(cache) / "fashion-mnist"


def _file(kind: Kind, cache: Path | str | None) -> Path:
    return _cached(cache) / f"{kind}-{TRAINING}.onnx"


def _whole(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILES)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read(path: Path, count: int | None) -> npt.NDArray[np.uint8]:
    """The first entries of a file of the form IDX with unsigned bytes."""
    try:
        with gzip.open(path) as stream:
            magic = stream.read(4)
            rank = magic[3]
            shape = [int(n) for n in np.frombuffer(stream.read(4 * rank), ">u4")]
            if magic[:3] != b"\0\0\x08" or len(shape) != rank:
                raise ValueError("it doesn't begin as a file of the form IDX does")
            shape[0] = min(shape[0], shape[0] if count is None else count)
            size = int(np.prod(shape))
            return np.frombuffer(stream.read(size), np.uint8, count=size).reshape(shape)
    except (OSError, EOFError, IndexError, ValueError) as error:
        raise ModelError(f"{path} can't be read ({first_line(error)}); delete it and fetch it again.") from error


def model(
    kind: Kind, *, cache: Path | str | None = None, threads: int | None = None, progress: Notify | None = None
) -> Path:
    """The ONNX file of a trained classifier: from the cache, else trained now, which takes minutes.

    Its input "image" is float32 [batch, 1, 28, 28] as `images` gives it, its output "logits" float32 [batch, 10].

    Args:
        kind: One of `KINDS`.
        cache: See `graphopt.cache.cache_folder`.
        threads: Threads of the training; None: as PyTorch chooses. The weights differ a little with their number.
        progress: Called with a line of text when something takes time.

    Raises:
        UsageError: An unknown kind; no data (see `images`), or PyTorch is missing.
        ModelError: A file of the data is broken.
    """
    if kind not in KINDS:
        raise UsageError(f"There is no classifier {kind!r}; there are {', '.join(KINDS)}.")
    path = _file(kind, cache)
    if not path.exists():
        from graphopt.models.fashion_training import train

        data = images("train", cache=cache, progress=progress)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".training-", dir=path.parent, ignore_cleanup_errors=True) as temporary:
            staged = Path(temporary) / path.name
            train(kind, *data, staged, threads=threads, progress=progress)
            os.replace(staged, path)
    return path


def top1(session: Any, split: Split = "test", count: int | None = None, *, cache: Path | str | None = None) -> float:
    """The share of pictures that a session of a model like those of `model` puts into the right class.

    Args:
        session: An ONNX Runtime session, or what has its `run` and `get_inputs`.
        split: Which pictures.
        count: The first so many; None: all.
        cache: See `graphopt.cache.cache_folder`.

    Raises:
        UsageError: As `images`.
        ModelError: As `images`.
    """
    pixels, labels = images(split, count, cache=cache)
    name = session.get_inputs()[0].name
    right = 0
    for start in range(0, len(labels), 250):
        logits = session.run(None, {name: pixels[start : start + 250]})[0]
        right += int((np.asarray(logits).argmax(axis=1) == labels[start : start + 250]).sum())
    return right / len(labels)


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m graphopt.models.fashion", description="Train classifiers of Fashion-MNIST, once."
    )
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}; default: all")
    parser.add_argument("--threads", type=int, help="threads of the training")
    options = parser.parse_args(arguments)
    try:
        for kind in options.kinds or KINDS:
            path = model(kind, threads=options.threads, progress=lambda line: print(line, flush=True))
            print(f"{kind}: {path}, top-1 {top1(_session(path)):.2%}", flush=True)
    except GraphoptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _session(path: Path) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise UsageError("The package onnxruntime is missing; install graphopt[cpu].") from error
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


if __name__ == "__main__":
    sys.exit(main())
