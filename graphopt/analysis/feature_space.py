"""Feature spaces: the values that hold one and the same vector of features, who writes into it and who reads it.

The residual stream of a transformer is one vector a token, added to by every branch. Most operators on the way (Add,
Transpose, Concat of tokens, a row of a table, ...) treat all features alike: for every linear map M of the features,
op(M v) = M op(v). Values connected by such operators are one *feature space*. A linear map of it (re-centring, a
rotation, fewer coordinates) can be moved out of the whole space and into the weights of its writers and readers, which
is what LayerNorm → RMSNorm, rotations before quantization and narrower models are made of.

Nothing is matched by name or architecture: a space is the closure of one value under those operators.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Literal

import onnx_ir as ir

from graphopt.analysis.algebra import attribute_int, is_op
from graphopt.analysis.dims import Dim
from graphopt.analysis.shapes import ShapeFacts
from graphopt.graph.constants import constant_array, constant_tensor, is_constant

WriterKind = Literal["linear", "conv", "constant", "norm", "input", "other"]
ReaderKind = Literal["norm", "linear", "output", "subgraph", "other"]

NORMS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
"""Normalizations over the last axes, with the input first."""

_ELEMENTWISE = ("Add", "Sub", "Sum", "Neg", "Identity", "Cast", "Dropout")
_RESHAPES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Expand")
_REDUCTIONS = ("ReduceMean", "ReduceSum")
_POOLS = ("AveragePool", "GlobalAveragePool", "Resize")

Slot = tuple[Literal["in", "out"], int]


@dataclasses.dataclass(frozen=True)
class Writer:
    """Where a vector enters the space.

    Attributes:
        value: The value that enters.
        axis: Its feature axis, counted from the end (-1 is the last).
        kind: "linear" (MatMul or Gemm with a constant weight whose output axis this is), "conv" (output channels),
            "constant" (a table, a bias, a positional embedding), "norm", "input" (of the graph), "other".
        node: The node that makes it; for a constant the node that reads it, since a constant may serve several.
        index: For a constant: which input of `node` it is. Otherwise 0.
    """

    value: ir.Value
    axis: int
    kind: WriterKind
    node: ir.Node | None
    index: int = 0


@dataclasses.dataclass(frozen=True)
class Reader:
    """Who takes a vector out of the space.

    Attributes:
        value: The value that is read.
        axis: Its feature axis, counted from the end.
        kind: "norm" (over exactly the features), "linear" (along the input axis of a constant weight), "output" (of
            the graph), "subgraph" (an inner graph captures it), "other".
        node: The reading node; None for a graph output.
        index: Which input of `node` it is.
    """

    value: ir.Value
    axis: int
    kind: ReaderKind
    node: ir.Node | None
    index: int = 0


@dataclasses.dataclass
class FeatureSpace:
    """One feature space.

    Attributes:
        size: The number of features.
        axes: Each value with its feature axis, counted from the end.
        writers: Where vectors enter.
        readers: Where they leave.
        adds: The additions of two vectors of the space, in the order in which they were met.
        conflict: Why it is no proper space (a value has its features on two axes), None where it is one.
    """

    size: int
    axes: dict[ir.Value, int]
    writers: list[Writer]
    readers: list[Reader]
    adds: list[ir.Node]
    conflict: str | None = None


def feature_space(seed: ir.Value, axis: int, facts: ShapeFacts) -> FeatureSpace | None:
    """The feature space that `seed` belongs to, found in time linear in its size.

    Args:
        seed: Any value of it.
        axis: Its feature axis, counted from the end.
        facts: Shapes of the model.

    Returns:
        The space, or None where the number of features of `seed` isn't known or is 1.
    """
    size = _size(seed, axis, facts)
    if size is None or size < 2:
        return None
    space = FeatureSpace(size, {seed: axis}, [], [], [])
    carried: dict[ir.Node, dict[Slot, int] | None] = {}
    queue = [seed]
    for value in queue:
        axis = space.axes[value]
        node = value.producer()
        if node is not None:
            index = next(i for i, out in enumerate(node.outputs) if out is value)
            _visit(node, ("out", index), space, queue, carried, facts)
        for user, index in value.uses():
            if user.graph is value.graph:
                _visit(user, ("in", index), space, queue, carried, facts)
    _collect(space, carried)
    return space


def feature_spaces(seeds: Iterable[tuple[ir.Value, int]], facts: ShapeFacts) -> list[FeatureSpace]:
    """The different spaces of these (value, axis) seeds, in their order."""
    found: list[FeatureSpace] = []
    seen: set[tuple[ir.Value, int]] = set()
    for value, axis in seeds:
        if (value, axis) in seen:
            continue
        space = feature_space(value, axis, facts)
        if space is not None:
            found.append(space)
            seen.update(space.axes.items())
    return found


def normalizes_last(node: ir.Node, facts: ShapeFacts) -> bool:
    """Whether `node` is a normalization over exactly the last axis of its first input."""
    if node.op_type not in NORMS or node.domain not in ("", "ai.onnx") or node.inputs[0] is None:
        return False
    axis = attribute_int(node, "axis", -1)
    if axis is None or axis < 0:
        return axis == -1
    shape = facts.shape(node.inputs[0])
    return shape is not None and axis == len(shape) - 1


def _visit(
    node: ir.Node,
    slot: Slot,
    space: FeatureSpace,
    queue: list[ir.Value],
    carried: dict[ir.Node, dict[Slot, int] | None],
    facts: ShapeFacts,
) -> None:
    """Follow `node` from one of its values into the others that hold the same features."""
    if carried.get(node) is not None:
        return
    value = node.inputs[slot[1]] if slot[0] == "in" else node.outputs[slot[1]]
    assert value is not None
    links = carry(node, slot, space.axes[value], facts)
    carried[node] = links
    for (side, index), axis in (links or {}).items():
        other = node.inputs[index] if side == "in" else node.outputs[index]
        if other is None or is_constant(other):
            continue
        if other not in space.axes:
            space.axes[other] = axis
            queue.append(other)
        elif space.axes[other] != axis:
            space.conflict = space.conflict or f"{other.name!r} would hold its features on two axes"


def _collect(space: FeatureSpace, carried: dict[ir.Node, dict[Slot, int] | None]) -> None:
    """List writers, readers and additions, each once."""
    seen_adds: dict[ir.Node, None] = {}
    for value, axis in space.axes.items():
        node = value.producer()
        if node is None:
            space.writers.append(Writer(value, axis, "input" if value.is_graph_input() else "other", None))
        else:
            links = carried.get(node)
            if not any(side == "out" and node.outputs[index] is value for side, index in links or {}):
                space.writers.append(Writer(value, axis, _writer_kind(node, value, axis), node))
            else:
                inputs = [(i, a, node.inputs[i]) for (side, i), a in (links or {}).items() if side == "in"]
                for index, its_axis, constant in inputs:
                    if constant is not None and is_constant(constant) and node not in seen_adds:
                        space.writers.append(Writer(constant, its_axis, "constant", node, index))
                vectors = [v for _, _, v in inputs if v is not None and not is_constant(v)]
                if is_op(node, "Add", "Sub", "Sum") and len(vectors) > 1 and node not in seen_adds:
                    space.adds.append(node)
                seen_adds[node] = None
        for user, index in value.uses():
            if user.graph is not value.graph:
                space.readers.append(Reader(value, axis, "subgraph", user, index))
            elif is_op(user, "Shape", "Size"):
                continue  # what is asked for isn't the features
            elif ("in", index) not in (carried.get(user) or {}):
                space.readers.append(Reader(value, axis, _reader_kind(user, index, axis), user, index))
        if value.is_graph_output():
            space.readers.append(Reader(value, axis, "output", None))


def _writer_kind(node: ir.Node, value: ir.Value, axis: int) -> WriterKind:
    if is_op(node, *NORMS):
        return "norm"
    if is_op(node, "MatMul", "Gemm") and axis == -1 and is_constant(node.inputs[1]):
        return "linear"
    if is_op(node, "Conv") and is_constant(node.inputs[1]):
        tensor = constant_tensor(node.inputs[1])
        return "conv" if tensor is not None and axis == 1 - len(tensor.shape) else "other"
    return "other"


def _reader_kind(node: ir.Node, index: int, axis: int) -> ReaderKind:
    if is_op(node, *NORMS) and index == 0 and axis == -1:
        normalised = attribute_int(node, "axis", -1)
        return "norm" if normalised is not None and (normalised == -1 or normalised > 0) else "other"
    if is_op(node, "MatMul") and index == 0 and axis == -1 and is_constant(node.inputs[1]):
        return "linear"
    if is_op(node, "Gemm") and index == 0 and axis == -1 and is_constant(node.inputs[1]):
        return "linear" if attribute_int(node, "transA", 0) == 0 else "other"
    if is_op(node, "Conv") and index == 0 and (tensor := constant_tensor(node.inputs[1])) is not None:
        return "linear" if axis == 1 - len(tensor.shape) else "other"
    return "other"


# ---- operators that treat all features alike


def carry(node: ir.Node, slot: Slot, axis: int, facts: ShapeFacts) -> dict[Slot, int] | None:
    """The inputs and outputs of `node` that hold the same features as the one at `slot`, with their axes.

    Args:
        node: Any node.
        slot: Which input or output holds the features.
        axis: The feature axis there, counted from the end.
        facts: Shapes of the model.

    Returns:
        All such slots, the given one included, or None where `node` mixes features or treats them differently.
    """
    if node.domain not in ("", "ai.onnx") or any(a.is_ref() for a in node.attributes.values()):
        return None
    value = node.inputs[slot[1]] if slot[0] == "in" else node.outputs[slot[1]]
    size = None if value is None else _size(value, axis, facts)
    if size is None or size < 2:
        return None
    if is_op(node, *_ELEMENTWISE):
        return _elementwise(node, range(1 if is_op(node, "Dropout") else len(node.inputs)), axis, size, facts)
    if is_op(node, "Mul", "Div"):
        vectors = [i for i in (0, 1) if not _uniform(node.inputs[i], axis, facts)]
        fits = len(vectors) == 1 and not (is_op(node, "Div") and vectors == [1])
        return _elementwise(node, vectors, axis, size, facts) if fits else None
    if is_op(node, "Where"):
        return _elementwise(node, (1, 2), axis, size, facts) if _uniform(node.inputs[0], axis, facts) else None
    links = _moved(node, slot, axis, facts)
    if links is None or slot not in links:
        return None
    for (side, index), its_axis in links.items():
        other = node.inputs[index] if side == "in" else node.outputs[index]
        if other is None or _size(other, its_axis, facts) != size:
            return None
    return links


def _elementwise(
    node: ir.Node, vectors: Iterable[int], axis: int, size: int, facts: ShapeFacts
) -> dict[Slot, int] | None:
    links: dict[Slot, int] = {("out", 0): axis}
    if _size(node.outputs[0], axis, facts) != size:
        return None
    for index in vectors:
        value = node.inputs[index]
        if value is None:
            continue
        # A constant that is broadcast over the features still adds the same to each of them.
        if not is_constant(value) and _size(value, axis, facts) != size:
            return None
        links["in", index] = axis
    if is_op(node, "Cast"):
        kinds = [facts.dtype(v) for v in (node.inputs[0], node.outputs[0])]
        if any(kind is None or not kind.is_floating_point() for kind in kinds):
            return None
    return links


def _moved(node: ir.Node, slot: Slot, axis: int, facts: ShapeFacts) -> dict[Slot, int] | None:
    """Slots of an operator that moves, selects or averages along other axes."""
    x, y = node.inputs[0] if node.inputs else None, node.outputs[0]
    shape = None if x is None else facts.shape(x)
    if x is None or shape is None:
        return None
    rank = len(shape)
    if is_op(node, "Concat"):
        along = attribute_int(node, "axis", 0)
        if along is None or (along - rank if along >= 0 else along) == axis:
            return None
        return {("out", 0): axis, **{("in", i): axis for i in range(len(node.inputs))}}
    if is_op(node, "Split"):
        along = attribute_int(node, "axis", 0)
        if along is None or (along - rank if along >= 0 else along) == axis:
            return None
        return {("in", 0): axis, **{("out", i): axis for i in range(len(node.outputs))}}
    if is_op(node, "Slice"):
        axes = constant_array(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] is not None else None
        if axes is None or axis in [int(a) - rank if a >= 0 else int(a) for a in axes.reshape(-1)]:
            return None
        return {("in", 0): axis, ("out", 0): axis}
    if is_op(node, "Transpose"):
        perm = node.attributes.get("perm")
        order = list(perm.as_ints()) if perm is not None else list(range(rank))[::-1]
        inner = axis + rank if slot[0] == "in" else order[axis + rank]
        return {("in", 0): inner - rank, ("out", 0): order.index(inner) - rank}
    if is_op(node, *_RESHAPES):
        return _reshaped(x, y, slot, axis, facts)
    if is_op(node, *_POOLS):
        return {("in", 0): axis, ("out", 0): axis} if axis == 1 - rank and rank > 2 else None
    if is_op(node, "Gather"):
        return _gathered(node, slot, axis, rank, facts)
    if is_op(node, *_REDUCTIONS):
        return _reduced(node, slot, axis, rank)
    return None


def _reshaped(x: ir.Value, y: ir.Value, slot: Slot, axis: int, facts: ShapeFacts) -> dict[Slot, int] | None:
    """The axis of the same size, with as many elements behind it, on the other side."""
    here, there = (x, y) if slot[0] == "in" else (y, x)
    first, second = facts.shape(here), facts.shape(there)
    if first is None or second is None or -axis > len(first):
        return None
    size, behind = first[axis], math.prod(first[len(first) + axis + 1 :], start=Dim.of(1))
    for other in range(-1, -len(second) - 1, -1):
        if second[other] == size and math.prod(second[len(second) + other + 1 :], start=Dim.of(1)) == behind:
            return {slot: axis, (("out" if slot[0] == "in" else "in"), 0): other}
    return None


def _gathered(node: ir.Node, slot: Slot, axis: int, rank: int, facts: ShapeFacts) -> dict[Slot, int] | None:
    along, indices = attribute_int(node, "axis", 0), facts.shape(node.inputs[1])
    if along is None or indices is None:
        return None
    along = along - rank if along >= 0 else along
    grown = len(indices) - 1  # the axis gathered along becomes as many axes as the indices have
    if slot[0] == "in":
        inner = axis
    else:
        inner = axis if axis > along else axis + grown
    if inner == along or not -rank <= inner < 0:
        return None
    return {("in", 0): inner, ("out", 0): inner if inner > along else inner - grown}


def _reduced(node: ir.Node, slot: Slot, axis: int, rank: int) -> dict[Slot, int] | None:
    attribute = node.attributes.get("axes")
    array = constant_array(node.inputs[1]) if len(node.inputs) > 1 else None
    axes = attribute.as_ints() if attribute is not None else None if array is None else array.reshape(-1).tolist()
    keep = attribute_int(node, "keepdims", 1)
    if not axes or keep is None:
        return None
    gone = sorted(int(a) - rank if a >= 0 else int(a) for a in axes)
    left = [a for a in range(-rank, 0) if keep or a not in gone]
    pairs = {inner: outer - len(left) for outer, inner in enumerate(left) if inner not in gone}
    inner = axis if slot[0] == "in" else next((i for i, o in pairs.items() if o == axis), 0)
    return {("in", 0): inner, ("out", 0): pairs[inner]} if inner in pairs else None


def _size(value: ir.Value, axis: int, facts: ShapeFacts) -> int | None:
    shape = facts.shape(value)
    return None if shape is None or -axis > len(shape) else shape[axis].value


def _uniform(value: ir.Value | None, axis: int, facts: ShapeFacts) -> bool:
    """Whether `value` is broadcast over the features."""
    shape = None if value is None else facts.shape(value)
    return shape is not None and (-axis > len(shape) or shape[axis].value == 1)
