"""The libraries that export needs and the rest of graphopt doesn't, imported when they are used."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from graphopt.errors import UsageError

_EXTRA = {"onnxruntime": "cpu"}


def require(module: str) -> Any:
    """Import a module of an optional extra.

    Raises:
        UsageError: It isn't installed; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        extra = _EXTRA.get(module.partition(".")[0], "export")
        raise UsageError(
            f"export needs {module}, which can't be imported ({error}); run `pip install graphopt[{extra}]`"
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[list[str]]:
    """Keep what libraries print, warn and log off the terminal; yields the list that the warnings are added to.

    The state before is restored at the end, also after an exception.
    """
    told: list[str] = []
    before = logging.root.manager.disable
    # Their handlers hold the terminal's stream itself, so redirecting the stream doesn't reach them.
    logging.disable(max(before, logging.ERROR))
    try:
        with (
            warnings.catch_warnings(record=True) as caught,
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            _silent_descriptors(),
        ):
            warnings.simplefilter("always")
            try:
                yield told
            finally:
                told.extend(" ".join(str(w.message).split()) for w in caught)
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _silent_descriptors() -> Iterator[None]:
    """Send file descriptors 1 and 2 to nowhere: C++ code (torch's tracer) prints whole graphs there."""
    for stream in (sys.__stdout__, sys.__stderr__):
        if stream is not None and not stream.closed:
            stream.flush()
    saved: list[tuple[int, int]] = []
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for descriptor in (1, 2):
            with contextlib.suppress(OSError):  # A closed descriptor stays closed.
                saved.append((descriptor, os.dup(descriptor)))
                os.dup2(nowhere, descriptor)
        yield
    finally:
        os.close(nowhere)
        for descriptor, copy in saved:
            os.dup2(copy, descriptor)
            os.close(copy)
