"""What a chain of reshapes and transposes does as a whole."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from graphopt.analysis.algebra import is_op
from graphopt.analysis.shapes import ShapeFacts

VIEWS = ("Identity", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze")
"""Operators that give the elements of their first input in an order and a shape of their own."""

_LONGEST = 8


def chain_above(value: ir.Value) -> list[ir.Node]:
    """The views through which `value` is made of something else, in the order of the data; at most a few."""
    chain: list[ir.Node] = []
    while (node := value.producer()) is not None and is_op(node, *VIEWS) and len(chain) < _LONGEST:
        source = node.inputs[0]
        if source is None:
            break
        chain.append(node)
        value = source
    return chain[::-1]


def permutation(chain: Sequence[ir.Node], facts: ShapeFacts) -> tuple[int, ...] | None:
    """The transpose that a chain of views amounts to, () where it changes nothing; None where it is neither.

    Splitting the heads off, exchanging two axes, exchanging them back and merging the heads again changes nothing.
    """
    if not chain:
        return ()
    order: tuple[int, ...] | None = None  # since the last reshape
    reshaped = False
    for node in chain:
        if node.op_type == "Identity":
            continue
        if node.op_type == "Transpose":
            step = _perm(node, facts)
            if step is None or (order is not None and len(order) != len(step)):
                return None
            order = step if order is None else tuple(order[axis] for axis in step)
            continue
        if order is not None and order != tuple(range(len(order))):
            return None
        order, reshaped = None, True
    moved = order is not None and order != tuple(range(len(order)))
    if moved:
        return None if reshaped else order
    before, after = facts.shape(chain[0].inputs[0]), facts.shape(chain[-1].outputs[0])
    if reshaped and (before is None or before != after):
        return None
    return ()


def _perm(node: ir.Node, facts: ShapeFacts) -> tuple[int, ...] | None:
    attribute = node.attributes.get("perm")
    if attribute is not None:
        return None if attribute.is_ref() else tuple(attribute.as_ints())
    shape = facts.shape(node.inputs[0])
    return None if shape is None else tuple(reversed(range(len(shape))))
