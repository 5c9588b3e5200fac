"""Environments with nothing but an onnxruntime and numpy in them, of any version."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy
import onnxruntime
import pytest

from graphopt.cache import cache_folder


def fetched(version: str, numpy_version: str) -> Path:
    """A folder with this onnxruntime and a numpy, installed once; the test is skipped where they can't be had.

    Args:
        version: Of onnxruntime.
        numpy_version: What it needs, for example "<2".
    """
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    place = cache_folder() / "runtimes" / f"onnxruntime-{version}-python-{python}"
    if place.is_dir():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".install-", dir=place.parent, ignore_cleanup_errors=True) as temporary:
        target = Path(temporary) / "site"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary=:all:", "--target", str(target), f"onnxruntime=={version}", f"numpy{numpy_version}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        if done.returncode:
            told = [line for line in done.stderr.splitlines() if "ERROR" in line] or ["no reason given"]
            pytest.skip(f"onnxruntime {version} for Python {python} can't be had: {told[-1].strip()}")
        os.replace(target, place)
    return place


def installed(folder: Path) -> Path:
    """`folder`, made an environment with the onnxruntime and the numpy of this one and nothing else."""
    folder.mkdir()
    for package in (onnxruntime, numpy):
        place = Path(package.__path__[0])
        for part in (place, place.with_name(f"{place.name}.libs")):
            if part.is_dir():
                (folder / part.name).symlink_to(part)
    return folder


def run_in(environment: Path, *arguments: str | Path, cwd: Path | None = None) -> str:
    """What Python prints for these arguments where nothing but an environment's packages can be imported.

    Raises:
        AssertionError: It failed; the message is what it said.
    """
    variables = {"PATH": os.environ["PATH"], "PYTHONPATH": str(environment), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-S", *map(str, arguments)],
        env=variables,
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
