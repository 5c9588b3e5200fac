"""What the machine has for a process: cores, and memory that is free."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_LIMITS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
"""Where a container's limit of memory stands, and what it has taken of it, pages of files among that."""
_CORES = "/sys/fs/cgroup/cpu.max"
"""Where the time that a container gets stands: microseconds of each period, and the period."""


def cores() -> int:
    """Cores that this process may run on; a container's share of time counts, rounded up."""
    count = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    try:
        quota, period = Path(_CORES).read_text(encoding="ascii").split()
        return min(count, max(1, -(-int(quota) // int(period))))
    except (OSError, ValueError):
        return count


def available_bytes() -> int | None:
    """Memory that can be had without pushing anything out; None where the system doesn't tell."""
    free = _number("/proc/meminfo", "MemAvailable:")
    if free is None:
        if not hasattr(os, "sysconf") or "SC_AVPHYS_PAGES" not in os.sysconf_names:
            return None
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit, usage in _LIMITS:
        try:
            most, taken = (int(Path(path).read_text(encoding="ascii")) for path in (limit, usage))
        except (OSError, ValueError):  # there is none, or it is "max"
            continue
        free = min(free, max(0, most - taken))
    return free


def own_bytes() -> int | None:
    """Memory of this process that no other shares: without mapped files; None where the system doesn't tell."""
    return _number("/proc/self/status", "RssAnon:")


def _number(path: str, key: str) -> int | None:
    """The bytes of a line of kilobytes."""
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith(key)), None)
    except OSError:
        return None
