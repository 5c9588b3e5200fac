"""Shared fixtures; `exactness` beside this file is imported by the tests of passes."""

import gc
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True, scope="module")
def nothing_old_is_searched_for_garbage() -> None:
    """A verification collects garbage after each session, which takes seconds where PyTorch and the like are loaded.

    Their modules, and what pytest keeps of thousands of tests, stay until the end anyway.
    """
    gc.collect()
    gc.freeze()
