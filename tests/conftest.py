"""Shared fixtures; `exactness` beside this file is imported by the tests of passes."""

import functools
import gc
import os
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

import shared_files

_opened = False


def pytest_configure() -> None:
    """Before the other processes start, which find the folder and the number of threads by the environment."""
    global _opened
    _opened = shared_files.open_folder()
    _one_thread()


def _one_thread() -> None:
    """Processes, not threads, share the cores, where nobody asks for a number of threads.

    Threads that wait for work spin, and take the time of the other processes.
    """
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    try:
        import onnxruntime
    except ImportError:
        return
    make = onnxruntime.InferenceSession.__init__

    @functools.wraps(make)
    def made(self: Any, source: Any, sess_options: Any = None, *others: Any, **named: Any) -> None:
        options = onnxruntime.SessionOptions() if sess_options is None else sess_options
        options.intra_op_num_threads = options.intra_op_num_threads or 1
        make(self, source, options, *others, **named)

    onnxruntime.InferenceSession.__init__ = made


def pytest_unconfigure() -> None:
    """The process that made it removes it."""
    if _opened:
        shared_files.remove_folder()


@pytest.fixture(autouse=True)
def draws_of_its_own(request: pytest.FixtureRequest) -> None:
    """What a test draws from its module's generator doesn't hang on the tests that ran before it in this process."""
    generator = getattr(request.module, "RNG", None)
    if isinstance(generator, np.random.Generator):
        seed = zlib.crc32(request.node.nodeid.encode())
        generator.bit_generator.state = np.random.default_rng(seed).bit_generator.state


@pytest.fixture(autouse=True, scope="module")
def nothing_old_is_searched_for_garbage() -> None:
    """A verification collects garbage after each session, which takes seconds where PyTorch and the like are loaded.

    Their modules, and what pytest keeps of thousands of tests, stay until the end anyway.
    """
    gc.collect()
    gc.freeze()
