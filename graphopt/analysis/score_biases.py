"""What is added to attention scores beside a mask: a value of the graph, or slopes of ALiBi.

Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation: slope[h] · (j - i). A softmax
doesn't see what all keys of a row share, so slope[h] · j and slope[h] · (j - T + 1), which exporters write, do the
same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.algebra import is_op
from graphopt.analysis.dims import Dim, Monomial, Symbol, as_symbol
from graphopt.analysis.elements import Elements
from graphopt.analysis.leaves import Cases, OpaqueError, Poly
from graphopt.graph.constants import constant_array

Slopes: TypeAlias = npt.NDArray[np.float64]


def slopes(elements: Elements, axes: tuple[Dim, Dim, Dim, Dim], bias: Poly) -> Slopes | None:
    """The slope of each head where `bias` is slope[h] · j + what doesn't depend on j."""
    column, head = as_symbol(axes[3]), as_symbol(axes[1])
    if column is None or head is None:
        return None
    found: Slopes | None = None
    for monomial, factor in bias.terms:
        if not any(_depends(elements, symbol, column) for symbol in monomial):
            continue
        of_term = _slopes(elements, monomial, head, column)
        if found is not None or of_term is None:
            return None
        found = of_term * factor
    return found


def _depends(elements: Elements, symbol: Symbol, index: Symbol) -> bool:
    read = elements.reads.get(symbol)
    if read is not None:
        return any(index in place.symbols() for place in read.indices)
    return symbol is index or any(index in arg.symbols() for arg in symbol.args)


def _slopes(elements: Elements, monomial: Monomial, head: Symbol, column: Symbol) -> Slopes | None:
    """Of one product: a constant that is read at the head times j, or one that is read at both and is linear in j."""
    rest = [symbol for symbol in monomial if symbol is not column]
    read = elements.reads.get(rest[0]) if len(rest) == 1 else None
    array = None if read is None else constant_array(read.value)
    if read is None or array is None or len(monomial) > 2:
        return None
    places = [(k, as_symbol(place)) for k, place in enumerate(read.indices) if place != 0]
    of_head = [k for k, symbol in places if symbol is head]
    table = np.squeeze(array.astype(np.float64), tuple(k for k in range(array.ndim) if array.shape[k] == 1))
    if len(monomial) == 2:
        return table if len(places) == len(of_head) == 1 and table.ndim == 1 else None
    others = [place for k, place in enumerate(read.indices) if place != 0 and k not in of_head]
    if len(of_head) != 1 or len(others) != 1 or table.ndim != 2 or of_head[0] != places[0][0] or table.shape[1] < 2:
        return None
    if (others[0] - Dim({(column,): 1})).symbols() & set(elements.logic.last):
        return None
    steps = (table[:, -1:] - table[:, :1]) / (table.shape[1] - 1)
    line = table[:, :1] + steps * np.arange(table.shape[1])
    # Rounded to float32 where the table was.
    close = np.abs(table - line) <= 1e-6 * np.abs(table).max(axis=1, keepdims=True)
    return steps[:, 0] if bool(close.all()) else None


def added(elements: Elements, value: ir.Value, indices: Sequence[Dim], bias: Poly | None) -> ir.Value | None:
    """The value that is the bias of the mask `value`: what is added to a pure mask, or chosen beside a masked value."""
    if bias is None:
        return None
    element, _ = elements.element(value, indices)
    if isinstance(element, Cases) and element.leaf == bias:
        return value
    node = value.producer()
    if node is None or not is_op(node, "Add", "Where", "Identity"):
        return None
    for operand in node.inputs:
        if operand is None or elements.facts.dtype(operand) != elements.facts.dtype(value):
            continue
        try:
            place = elements.broadcast(node, operand, tuple(indices))
        except OpaqueError:
            continue
        found = added(elements, operand, place, bias)
        if found is not None:
            return found
    return None
