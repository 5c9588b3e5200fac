"""How fast this machine reads memory, for benchmarks to hold kernels against.

    python benchmarks/memory_limit.py

Without arguments it prints the speeds of buffers that fit different caches.
"""

from __future__ import annotations

import ctypes

from graphopt.runtime_ops import library_path

_BYTES = 1 << 28
"""More than a core's share of the last cache of most machines."""


def read_bandwidth(threads: int, size: int = _BYTES, rounds: int = 3) -> float:
    """The most bytes a second that `threads` threads read together, with prefetching.

    Args:
        threads: Of this process, none of ONNX Runtime's.
        size: Bytes of the buffer. Give the bytes that a benchmark goes through before it comes back to the first:
            the last cache may be twice as fast as memory, and large.
        rounds: Passes over it with each of eight ways of reading; the best counts.

    Raises:
        RuntimeError: The library with the kernels isn't built, or there is no memory for the buffer.
    """
    path = library_path()
    if path is None:
        raise RuntimeError("the library with graphopt's kernels isn't built: make library")
    library = ctypes.CDLL(str(path))
    library.graphopt_read_bandwidth.restype = ctypes.c_double
    library.graphopt_read_bandwidth.argtypes = [ctypes.c_int, ctypes.c_size_t, ctypes.c_int]
    found = float(library.graphopt_read_bandwidth(threads, size, rounds))
    if found <= 0:
        raise RuntimeError(f"no memory for a buffer of {size} bytes")
    return found


if __name__ == "__main__":
    for mebibytes in (1, 8, 64, 256):
        speeds = ", ".join(f"{read_bandwidth(t, mebibytes << 20) / 1e9:.1f} GB/s on {t} thread(s)" for t in (1, 2))
        print(f"{mebibytes} MiB: {speeds}")
