"""Sessions of ONNX Runtime as verification uses them: those of `graphopt.runtime_ops.memory_session`."""

from __future__ import annotations

from graphopt.runtime_ops.memory_session import Optimizations, WeightStore, make_session, release_memory, run

__all__ = ["Optimizations", "WeightStore", "make_session", "release_memory", "run"]
