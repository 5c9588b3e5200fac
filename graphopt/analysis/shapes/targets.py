"""Constant targets of Reshape and Expand that give a proven shape."""

from __future__ import annotations

from graphopt.analysis.dims import Dim
from graphopt.analysis.shapes.rule import Shape


def reshape_literal(given: Shape, wanted: Shape, inferred: int | None = None) -> list[int] | None:
    """A constant target with which Reshape (allowzero = 0) turns `given` into `wanted` in every run, else None.

    A size that equals the input's in the same place is written 0 (copied), a constant as itself, and at most one other
    as -1: only where the product of all others is proven not to be 0, because ONNX Runtime refuses -1 beside a size
    of 0, so that an empty batch or an empty cache would fail.

    Args:
        given: The input's shape.
        wanted: The output's shape.
        inferred: The place at which the present target has -1 already, which fails in the same runs.
    """
    literal: list[int] = []
    for i, dim in enumerate(wanted):
        copied = i < len(given) and given[i] == dim
        if dim.value is not None and dim.value > 0:
            literal.append(dim.value)
        elif copied:
            literal.append(0)
        elif dim.value is not None or -1 in literal:
            return None
        else:
            literal.append(-1)
    if -1 in literal:
        place = literal.index(-1)
        others = [d for i, d in enumerate(wanted) if i != place]
        if place != inferred and not all(d.low >= 1 for d in others):
            return None
    return literal


def expand_literal(given: Shape, wanted: Shape) -> list[int] | None:
    """A constant target with which Expand turns `given` into `wanted` in every run, else None."""
    literal: list[int] = []
    for i, dim in enumerate(wanted):
        place = i - (len(wanted) - len(given))
        if place >= 0 and given[place] == dim:
            literal.append(1)
        elif dim.value is not None:
            literal.append(dim.value)
        else:
            return None
    return literal


def unsettled(given: Shape, wanted: Shape) -> list[Dim]:
    """The sizes of `wanted` that no constant target of Reshape says: neither constant nor the input's in place."""
    return [d for i, d in enumerate(wanted) if d.value is None and not (i < len(given) and given[i] == d)]
