"""Files that several tests need and that take long to make: made once in a run, by the process that needs them first."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

VARIABLE = "GRAPHOPT_TEST_FILES"
"""Names the folder to the processes among which the tests of a run are divided."""


def open_folder() -> bool:
    """Make the folder of this run, where there is none yet."""
    if VARIABLE in os.environ:
        folder().mkdir(exist_ok=True)
        return False
    os.environ[VARIABLE] = tempfile.mkdtemp(prefix="graphopt-tests-")
    return True


def remove_folder() -> None:
    """Remove it with all that is in it."""
    shutil.rmtree(os.environ.pop(VARIABLE), ignore_errors=True)


def folder() -> Path:
    """The folder."""
    return Path(os.environ[VARIABLE])


def made_once(name: str, make: Callable[[Path], object]) -> Path:
    """The file `name` of the folder, which `make` writes where none of the processes did before.

    Args:
        name: The file's name.
        make: Gets its path.
    """
    path, made = folder() / name, folder() / f"{name}.made"
    with (folder() / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():  # half a file of a process that died isn't made
            path.unlink(missing_ok=True)
            make(path)
            made.touch()
    return path
