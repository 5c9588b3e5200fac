"""Layout algebra: which axes of one tensor the axes of another are made of.

A view (Reshape, Transpose, Expand, ...) doesn't compute, it arranges. Here the axes of a tensor are lists of *atoms*,
and a view moves atoms, splits them (a Reshape that makes heads of features) or drops them (an Expand that repeats
one). Walking from a tensor to what it is made of, whatever mixture of views an exporter wrote comes out as the same
lists, so that a rule asks for "batch, head, sequence, depth" and not for chains of operators.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.analysis.algebra import attribute_int, is_op
from graphopt.analysis.dims import Dim, as_symbol
from graphopt.analysis.shapes import ShapeFacts
from graphopt.graph.constants import constant_array


class NotAView(Exception):
    """Raised where the arrangement can't be followed; the message is the missing fact, as a phrase."""


class Atom:
    """A part of an axis that no view met so far has split.

    Attributes:
        size: Its length.
        parts: What it was split into later, outermost first; empty where it wasn't.
        repeat: Whether every index along it reads the same element (made by an Expand, a Tile, ...).
    """

    __slots__ = ("parts", "repeat", "size")

    def __init__(self, size: Dim) -> None:
        self.size = size
        self.parts: tuple[Atom, ...] = ()
        self.repeat = False

    def leaves(self) -> Iterable[Atom]:
        """The atom itself, or what it was split into."""
        if not self.parts:
            yield self
        for part in self.parts:
            yield from part.leaves()

    def __repr__(self) -> str:
        return f"{'repeat ' if self.repeat else ''}{self.size}"


Axes = tuple[tuple[Atom, ...], ...]
"""The atoms of each axis, outermost first; an axis of length 1 has none."""


def settled(axes: Axes) -> Axes:
    """The same axes in atoms that aren't split."""
    return tuple(tuple(leaf for atom in axis for leaf in atom.leaves()) for axis in axes)


def plain_axes(value: ir.Value, facts: ShapeFacts) -> Axes:
    """One new atom for each axis of `value`.

    Raises:
        NotAView: The rank isn't known.
    """
    return tuple(() if size == 1 else (Atom(size),) for size in _shape(value, facts))


def regroup(atoms: Iterable[Atom], sizes: Sequence[Dim]) -> Axes:
    """Distribute atoms, in their order, over axes of these sizes; an atom across a border is split.

    Raises:
        NotAView: The sizes of atoms and axes can't be matched for certain.
    """
    queue = deque(leaf for atom in atoms for leaf in atom.leaves() if leaf.size != 1)
    known = {leaf.size for leaf in queue}
    axes: list[tuple[Atom, ...]] = []
    for size in sizes:
        axis: list[Atom] = []
        missing = _met(size, known)
        while missing != 1:
            if not queue:
                raise NotAView(f"an axis of {size} elements isn't covered")
            atom = queue.popleft()
            if (rest := _quotient(missing, atom.size)) is not None:
                axis.append(atom)
                missing = rest
            elif (inner := _quotient(atom.size, missing)) is not None:
                outer_part, inner_part = Atom(missing), Atom(inner)
                outer_part.repeat = inner_part.repeat = atom.repeat
                atom.parts = (outer_part, inner_part)
                axis.append(outer_part)
                queue.appendleft(inner_part)
                missing = Dim.of(1)
            else:
                raise NotAView(f"{atom.size} elements don't fit into an axis of {size} for certain")
        axes.append(tuple(axis))
    if queue:
        raise NotAView(f"{queue[0].size} elements are left over")
    return tuple(axes)


def _met(size: Dim, known: set[Dim]) -> Dim:
    """`size`, or that of an atom where the two are the same because they met in an elementwise operation."""
    symbol = as_symbol(size)
    if symbol is not None and symbol.op == "broadcast" and size not in known:
        return next((side for side in symbol.args if side in known), size)
    return size


def _quotient(a: Dim, b: Dim) -> Dim | None:
    return Dim.of(1) if a == b else a.exact_div(b)


_REGROUPING = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
VIEWS = ("Identity", "Transpose", *_REGROUPING)
"""Operators that arrange all elements of their first input anew."""


def below(node: ir.Node, axes: Axes, facts: ShapeFacts) -> Axes:
    """The axes of the output of a view whose first input has `axes`.

    Raises:
        NotAView: It is no view, or a size isn't known.
    """
    if is_op(node, "Identity"):
        return axes
    if is_op(node, "Transpose"):
        return tuple(axes[axis] for axis in _perm(node, len(axes)))
    if is_op(node, *_REGROUPING):
        sizes = _reshaped(node, [total(axis) for axis in axes], facts)
        return regroup(_flat(axes), sizes or _shape(node.outputs[0], facts))
    raise NotAView(f"{node.op_type} {node.name!r} is no view")


def above(node: ir.Node, axes: Axes, facts: ShapeFacts) -> tuple[ir.Value, Axes]:
    """What the output of a view with `axes` is made of, and the axes of that.

    Raises:
        NotAView: It is no view, or a size isn't known.
    """
    source = node.inputs[0] if node.inputs else None
    if source is None:
        raise NotAView(f"{node.op_type} {node.name!r} is no view")
    if is_op(node, "Identity"):
        return source, axes
    if is_op(node, "Transpose"):
        perm = _perm(node, len(axes))
        return source, tuple(axes[perm.index(axis)] for axis in range(len(axes)))
    if is_op(node, *_REGROUPING):
        return source, regroup(_flat(axes), _shape(source, facts))
    if is_op(node, "Expand"):
        return source, _above_expand(axes, _shape(source, facts))
    if is_op(node, "Tile"):
        counts = constant_array(node.inputs[1], 16)
        shape = _shape(source, facts)
        if counts is None or counts.size != len(axes):
            raise NotAView(f"the counts of Tile {node.name!r} aren't constant")
        return source, tuple(
            axis if count == 1 else _without_outer(axis, Dim.of(int(count)), size)
            for axis, count, size in zip(axes, counts.tolist(), shape, strict=True)
        )
    if is_op(node, "Concat") and len(set(node.inputs)) == 1 and len(node.inputs) > 1:
        shape = _shape(source, facts)
        place = (attribute_int(node, "axis", 0) or 0) % len(axes)
        return source, _at(axes, place, lambda axis: _without_outer(axis, Dim.of(len(node.inputs)), shape[place]))
    if is_op(node, "Gather"):
        return source, _above_gather(node, axes, _shape(source, facts))
    raise NotAView(f"{node.op_type} {node.name!r} is no view")


def _above_expand(axes: Axes, shape: Sequence[Dim]) -> Axes:
    new = len(axes) - len(shape)
    if new < 0:
        raise NotAView("an Expand lowers the rank")
    result: list[tuple[Atom, ...]] = []
    for index, axis in enumerate(axes):
        size = shape[index - new] if index >= new else Dim.of(1)
        length = total(axis)
        if length == size:
            kept = axis
        elif size == 1:
            for atom in axis:
                for leaf in atom.leaves():
                    leaf.repeat = True
            kept = ()
        else:
            raise NotAView(f"whether an Expand repeats an axis of {size} elements to {length} isn't known")
        if index >= new:
            result.append(kept)
    return tuple(result)


def _above_gather(node: ir.Node, axes: Axes, shape: Sequence[Dim]) -> Axes:
    indices = constant_array(node.inputs[1], 1 << 16)
    place = (attribute_int(node, "axis", 0) or 0) % len(shape)
    count = shape[place].value
    if indices is None or indices.ndim != 1 or not count or indices.size % count:
        raise NotAView(f"Gather {node.name!r} is no repetition of an axis")
    times = indices.size // count
    numbers = np.arange(count)
    if np.array_equal(indices, np.repeat(numbers, times)):
        return _at(axes, place, lambda axis: _without_inner(axis, Dim.of(count), Dim.of(times)))
    if np.array_equal(indices, np.tile(numbers, times)):
        return _at(axes, place, lambda axis: _without_outer(axis, Dim.of(times), Dim.of(count)))
    raise NotAView(f"Gather {node.name!r} is no repetition of an axis")


def _at(axes: Axes, place: int, change: Callable[[tuple[Atom, ...]], tuple[Atom, ...]]) -> Axes:
    return tuple(change(axis) if index == place else axis for index, axis in enumerate(axes))


def _without_outer(axis: tuple[Atom, ...], times: Dim, size: Dim) -> tuple[Atom, ...]:
    repeated, kept = regroup(axis, [times, size])
    return _dropped(repeated, kept)


def _without_inner(axis: tuple[Atom, ...], size: Dim, times: Dim) -> tuple[Atom, ...]:
    kept, repeated = regroup(axis, [size, times])
    return _dropped(repeated, kept)


def _dropped(repeated: tuple[Atom, ...], kept: tuple[Atom, ...]) -> tuple[Atom, ...]:
    for atom in repeated:
        atom.repeat = True
    return kept


def _flat(axes: Axes) -> list[Atom]:
    return [atom for axis in axes for atom in axis]


def total(axis: Iterable[Atom]) -> Dim:
    """The length of an axis of these atoms."""
    size = Dim.of(1)
    for atom in axis:
        size = size * atom.size
    return size


def _shape(value: ir.Value, facts: ShapeFacts) -> Sequence[Dim]:
    shape = facts.shape(value)
    if shape is None:
        raise NotAView(f"the rank of {value.name!r} isn't known")
    node = value.producer()
    if node is not None and is_op(node, "Reshape"):
        given = facts.shape(node.inputs[0])
        return (None if given is None else _reshaped(node, given, facts)) or shape
    return shape


def _reshaped(node: ir.Node, given: Sequence[Dim], facts: ShapeFacts) -> list[Dim] | None:
    """The sizes that a Reshape with one open size makes of `given`, None where they aren't known.

    Facts of shapes leave an open size unknown where another could be 0; an attention of nothing is no matter here.
    """
    target = facts.data(node.inputs[1]) if is_op(node, "Reshape") and len(node.inputs) > 1 else None
    if target is None or target.ndim != 1:
        return None
    copies = attribute_int(node, "allowzero", 0) == 0
    sizes = [
        given[place] if size == 0 and copies and place < len(given) else size
        for place, size in enumerate(target.tolist())
    ]
    if sizes.count(-1) != 1 or any(size == 0 for size in sizes):
        return None
    whole, others = Dim.of(1), Dim.of(1)
    for size in given:
        whole = whole * size
    for size in sizes:
        others = others if size == -1 else others * size
    rest = whole.exact_div(others)
    return None if rest is None else [rest if size == -1 else size for size in sizes]


def _perm(node: ir.Node, rank: int) -> tuple[int, ...]:
    attribute = node.attributes.get("perm")
    if attribute is None:
        return tuple(reversed(range(rank)))
    if attribute.is_ref():
        raise NotAView(f"the order of Transpose {node.name!r} is set by a caller")
    perm = tuple(attribute.as_ints())
    if len(perm) != rank:
        raise NotAView(f"the order of Transpose {node.name!r} isn't of the rank of its input")
    return perm


@dataclasses.dataclass(frozen=True)
class Stage:
    """One value on the way from a tensor to what it is made of.

    Attributes:
        value: The value.
        axes: Its axes, in atoms of the tensor.
        factor: The number that the tensor is `value` times, besides the arrangement.
        scales: The nodes that multiply by it.
    """

    value: ir.Value
    axes: Axes
    factor: float
    scales: tuple[ir.Node, ...]

    def settled(self) -> Axes:
        """`axes` in atoms that aren't split."""
        return settled(self.axes)
