"""The interface of a decoder: see `graphopt.graph.kv_interface`, where sessions and the generator can read it too."""

from __future__ import annotations

from graphopt.graph.kv_interface import CachePair, KVInterface, kv_interface

__all__ = ["CachePair", "KVInterface", "kv_interface"]
