"""The graph: load, save, edit. Knows no pass."""

from graphopt.graph.load import load
from graphopt.graph.save import save

__all__ = ["load", "save"]
