"""The folder where graphopt keeps what it fetched or measured."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(cache: Path | str | None = None) -> Path:
    """`cache` if given, else `$GRAPHOPT_CACHE`, else `$XDG_CACHE_HOME/graphopt`, else `~/.cache/graphopt`."""
    if cache is not None:
        return Path(cache).expanduser()
    if named := os.environ.get("GRAPHOPT_CACHE"):
        return Path(named).expanduser()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base).expanduser() / "graphopt"
    return Path.home() / ".cache" / "graphopt"
