"""Corresponding weights: which constants stand in the same places of two branches of the same form."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx_ir as ir

from graphopt.analysis.branches import NORMALIZATIONS
from graphopt.analysis.depth_units import DepthUnit
from graphopt.graph.constants import constant_tensor


@dataclasses.dataclass(frozen=True)
class Place:
    """One constant that a node of a branch reads, and the constant of the other branch in the same place.

    Attributes:
        node: The node.
        index: Which of its inputs it is.
        own: What it reads.
        other: What stands there in the other branch; of the same type and shape.
        norm: Whether it is a gain or a bias of a norm.
    """

    node: ir.Node
    index: int
    own: ir.Value
    other: ir.Value
    norm: bool


class NotAlikeError(Exception):
    """Two branches don't have the same form; the message says where, as a phrase."""


def corresponding(units: Sequence[DepthUnit], others: Sequence[DepthUnit]) -> list[Place]:
    """The constants of the branches of one layer, with those of another layer in the same places.

    Both are walked from what they add back to what they read of the stream, in step. What is made outside of the
    branches (masks, positions, caches) stays each branch's own, but for weights that are dequantized there.

    Args:
        units: Branches of one layer.
        others: Branches of the other, of the same kinds in the same order.

    Returns:
        Places in which the constants aren't the same value already.

    Raises:
        NotAlikeError: The layers differ in their operators, or in types or shapes of weights.
    """
    if [unit.kind for unit in units] != [other.kind for other in others]:
        raise NotAlikeError("the layers have other branches")
    found: dict[tuple[ir.Node, int], Place] = {}
    for unit, other in zip(units, others, strict=True):
        inside = (set(unit.branch.nodes), set(other.branch.nodes))
        pending = [(unit.branch.output.producer(), other.branch.output.producer())]
        if unit.norm is not None and other.norm is not None:
            _pair(unit.norm, other.norm, found)
        seen = set(pending)
        while pending:
            a, b = pending.pop()
            if a is None or b is None or a not in inside[0] or b not in inside[1]:
                # A DequantizeLinear of a weight stands beside the branch, since it isn't made of the stream.
                weights = a is not None and b is not None and _dequantizes(a) and _dequantizes(b)
                if (a in inside[0]) != (b in inside[1]):
                    raise NotAlikeError("one reads of the stream what the other makes elsewhere")
                if not weights:
                    continue
                assert a is not None
                assert b is not None
            for step in _pair(a, b, found):
                if step not in seen:
                    seen.add(step)
                    pending.append(step)
    return list(found.values())


def _pair(
    a: ir.Node, b: ir.Node, found: dict[tuple[ir.Node, int], Place]
) -> list[tuple[ir.Node | None, ir.Node | None]]:
    """Note the constants that two nodes read; returns the nodes that make the rest of what they read."""
    if (a.op_type, a.domain, len(a.inputs)) != (b.op_type, b.domain, len(b.inputs)) or _settings(a) != _settings(b):
        raise NotAlikeError(f"{b.name or b.op_type!r} isn't {a.name or a.op_type!r} with other weights")
    further: list[tuple[ir.Node | None, ir.Node | None]] = []
    for index, (own, other) in enumerate(zip(a.inputs, b.inputs, strict=True)):
        if (own is None) != (other is None):
            raise NotAlikeError(f"{b.name or b.op_type!r} has other inputs than {a.name or a.op_type!r}")
        if own is other or own is None or other is None:
            continue
        tensor, donor = constant_tensor(own), constant_tensor(other)
        if (tensor is None) != (donor is None):
            raise NotAlikeError(f"an input of {a.name or a.op_type!r} is constant in one of the layers alone")
        if tensor is None or donor is None:
            further.append((own.producer(), other.producer()))
            continue
        form, others = (tensor.dtype, tuple(tensor.shape.numpy())), (donor.dtype, tuple(donor.shape.numpy()))
        if form != others:
            raise NotAlikeError(f"{own.name!r} is {_text(*form)}, {other.name!r} {_text(*others)}")
        found[a, index] = Place(a, index, own, other, index > 0 and a.op_type in NORMALIZATIONS)
    return further


def _dequantizes(node: ir.Node) -> bool:
    return node.op_type == "DequantizeLinear" and all(constant_tensor(v) is not None for v in node.inputs if v)


def _settings(node: ir.Node) -> dict[str, object]:
    return {
        name: None if attribute.is_ref() else attribute.value
        for name, attribute in node.attributes.items()
        if attribute.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS, ir.AttributeType.TENSOR)
    }


def _text(dtype: ir.DataType, shape: tuple[int, ...]) -> str:
    return f"{dtype.name.lower()} {list(shape)}"
