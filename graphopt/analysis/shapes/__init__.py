"""Sound symbolic shapes: `infer(model)` gives `ShapeFacts`."""

from __future__ import annotations

# Imported for the rules that they register.
from graphopt.analysis.shapes import arrangement, elementwise, neural, reduction, views  # noqa: F401
from graphopt.analysis.shapes.facts import ShapeFacts, infer, lazily
from graphopt.analysis.shapes.rule import Content, Fact, Shape

__all__ = ["Content", "Fact", "Shape", "ShapeFacts", "infer", "lazily"]
