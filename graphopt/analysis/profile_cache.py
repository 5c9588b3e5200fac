"""The profile of this machine: which one it is, and where it is kept."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import platform
from pathlib import Path

from graphopt.analysis.profile import Profile, load
from graphopt.cache import cache_folder
from graphopt.errors import UsageError
from graphopt.runtime_ops.machine import cores


def this_machine() -> tuple[str, str, int]:
    """(runtime with version, processor, processors that this process may use).

    Raises:
        ImportError: There is no ONNX Runtime.
    """
    # Not `onnxruntime.__version__`: importing it takes longer than many a whole run of the command.
    for package in ("onnxruntime", "onnxruntime-gpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f"ONNX Runtime {importlib.metadata.version(package)}", _processor(), cores()
    raise ImportError("ONNX Runtime is missing")


def cached_path(cache: Path | str | None = None) -> Path:
    """The file in the cache folder for the profile of this machine and the installed ONNX Runtime.

    Raises:
        ImportError: There is no ONNX Runtime.
    """
    key = hashlib.sha256("\n".join(map(str, this_machine())).encode()).hexdigest()[:12]
    return cache_folder(cache) / "profiles" / f"{key}.json"


def cached(cache: Path | str | None = None) -> Profile | None:
    """The profile of this machine from the cache, or None where it wasn't measured.

    Raises:
        UsageError: The file in its place is no profile, or one of another machine or runtime.
    """
    try:
        path = cached_path(cache)
    except ImportError:
        return None
    if not path.exists():
        return None
    profile = load(path)
    if (profile.runtime, profile.cpu, profile.cores) != this_machine():
        raise UsageError(
            f"{path} is a profile of {profile.runtime} on another machine; remove it, or measure this one with "
            "`graphopt target --measure`."
        )
    return profile


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"
