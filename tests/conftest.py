"""Shared fixtures; `exactness` beside this file is imported by the tests of passes."""

import gc
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import shared_files

_opened = False


def pytest_configure() -> None:
    """Before the other processes start, which find the folder by the environment."""
    global _opened
    _opened = shared_files.open_folder()


def pytest_unconfigure() -> None:
    """The process that made it removes it."""
    if _opened:
        shared_files.remove_folder()


@pytest.fixture(autouse=True, scope="module")
def nothing_old_is_searched_for_garbage() -> None:
    """A verification collects garbage after each session, which takes seconds where PyTorch and the like are loaded.

    Their modules, and what pytest keeps of thousands of tests, stay until the end anyway.
    """
    gc.collect()
    gc.freeze()
