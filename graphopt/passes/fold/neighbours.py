"""The layers that a per-channel affine map can go into: before it, or all those behind it.

Between the map and a layer there may be operators that it commutes with: what only moves numbers (Transpose, Reshape,
Slice, Gather, Split of a value), and what keeps their order or is linear (Relu and pooling, for scales not below 0).
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import onnx_ir as ir

from graphopt.analysis.algebra import attribute_int, is_op
from graphopt.analysis.dims import Dim
from graphopt.graph.constants import constant_array, is_constant
from graphopt.passes.fold.channel_affine import Affine, Change, into_input, into_output, rank_of, same_axis
from graphopt.passes.fold.layers import LAYERS, Layer, Numbers, bias_behind, layer_of, sole_reader_of_numbers
from graphopt.passes.raise_.shape_rules import ShapeRulePass

_MOVES = ("Identity", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze")
_SHAPED = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
_ORDERED = ("Relu", "LeakyRelu", "MaxPool", "GlobalMaxPool")
_POOLS = ("MaxPool", "GlobalMaxPool", "AveragePool", "GlobalAveragePool")
_LIMIT = 32
"""Operators that one walk looks at, so that a chain of maps isn't walked once for every map in it."""


class AffinePass(ShapeRulePass):
    """A rule pass whose sites lie apart from what they change.

    A fold may free a map that is further away than the neighbours which the work list looks at again.
    """

    def apply(self, model: ir.Model) -> bool:
        """Work off all sites until none changes anything."""
        changed = False
        while super().apply(model):
            changed = True
            self.sites = [site for site in self.sites if site.outcome == "applied"]
        return changed


class Neighbours:
    """Finds the layers beside a map.

    Args:
        shapes: The pass, which knows the shapes.
        sharers: How many other nodes may read a weight that is changed (they keep the original).
        products: Whether a number goes through a product of two computed matrices, into one of the two.
    """

    def __init__(self, shapes: ShapeRulePass, sharers: int = 1, products: bool = False) -> None:
        self.shapes = shapes
        self.sharers = sharers
        self.products = products

    # ---- before

    def before(self, value: ir.Value, affine: Affine, graph: ir.Graph | None) -> list[Change] | str:
        """The layers that make `value`, all of which must take the map, or why they can't.

        The reason is empty where no layer is near.
        """
        changes: list[Change] = []
        queue = [(value, affine)]
        for current, here in queue:
            if len(queue) > _LIMIT:
                return ""
            node = current.producer()
            if node is None:
                return ""
            layer = layer_of(node)
            if isinstance(layer, str):
                if node.op_type in LAYERS and not is_product(node):
                    return layer
                if sole_reader_of_numbers(current) is not None or node.graph is not graph:
                    return ""
                if is_product(node):
                    factor = self._factor(node, here, graph)
                    if not factor:
                        return ""
                    changes.extend(factor)
                    continue
                carried = self.back(node, current, here)
                if carried is None:
                    return ""
                queue.extend(carried)
                continue
            if (why := sole_reader_of_numbers(current)) is not None:
                return why if here.size > 1 else ""  # the x + 3 of a hard swish has no layer of its own
            if node.graph is not graph:
                return f"{layer.name} is in an outer graph"
            change = into_output(layer, here, rank_of(current, self.shapes), self.sharers)
            if isinstance(change, str):
                return change
            changes.append(change)
        return changes

    def _factor(self, node: ir.Node, affine: Affine, graph: ir.Graph | None) -> list[Change] | None:
        """The layers before one factor of a product of computed matrices, which takes a number for the product."""
        if not self.products or affine.size > 1 or affine.shifts or node.op_type != "MatMul":
            return None
        for factor in node.inputs:
            found = "" if factor is None else self.before(factor, affine, graph)
            if not isinstance(found, str):
                return found
        return None

    def back(self, node: ir.Node, value: ir.Value, affine: Affine) -> list[tuple[ir.Value, Affine]] | None:
        """The operands of `node` that must take a map each for `value` to take `affine`, None where that's unknown."""
        if node.domain not in ("", "ai.onnx") or any(a.is_ref() for a in node.attributes.values()) or not node.inputs:
            return None
        x = node.inputs[0]
        if x is None:
            return None
        if is_op(node, "Transpose") and affine.size > 1:
            perm = node.attributes.get("perm")
            if perm is None:
                return None
            order = list(perm.as_ints())
            return [(x, dataclasses.replace(affine, axis=order[affine.axis % len(order)] - len(order)))]
        if is_op(node, *_SHAPED):
            moved = self._reshaped(affine, value, x)
            return None if moved is None else [(x, moved)]
        if is_op(node, "Concat"):
            return self._concatenated(node, value, affine)
        if is_op(node, "Split"):
            full = self._in_split(node, value, affine)
            return None if full is None else [(x, full)]
        if is_op(node, "Slice", "Gather") and self._untouched(node, affine):
            return [(x, affine)]
        carried = _through(node, affine, rank_of(value, self.shapes))
        return None if carried is None else [(x, carried)]

    def _in_split(self, node: ir.Node, value: ir.Value, affine: Affine) -> Affine | None:
        """The map on the whole that changes this part of a split of the channels alone: q of packed q, k and v."""
        axis, rank = attribute_int(node, "axis", 0), self.shapes.rank(value)
        if axis is None or rank is None or not affine.on(axis, rank):
            return None
        shapes = [self.shapes.shape(out) for out in node.outputs]
        sizes = [None if shape is None else shape[axis] for shape in shapes]
        scales, shifts = [], []
        for out, size in zip(node.outputs, sizes, strict=True):
            if size is None:
                return None
            here = affine if out is value else Affine(np.ones(1), np.zeros(1))
            if here.size not in (1, size):
                return None
            scales.append(np.broadcast_to(here.scale, size))
            shifts.append(np.broadcast_to(here.shift, size))
        return Affine(np.concatenate(scales), np.concatenate(shifts), axis % rank - rank)

    def _concatenated(self, node: ir.Node, value: ir.Value, affine: Affine) -> list[tuple[ir.Value, Affine]] | None:
        axis = attribute_int(node, "axis", 0)
        operands = [x for x in node.inputs if x is not None]
        if axis is None or len(set(operands)) < len(node.inputs):
            return None
        rank = self.shapes.rank(value)
        if affine.size == 1 or (rank is not None and not same_axis(affine.axis, axis, rank)):
            return [(x, affine) for x in operands]
        if rank is None:
            return None
        parts, start = [], 0
        for x in operands:
            shape = self.shapes.shape(x)
            size = None if shape is None else shape[axis]
            if size is None:
                return None
            parts.append((x, _part(affine, slice(start, start + size))))
            start += size
        return parts if start == affine.size else None

    # ---- behind

    def behind(self, value: ir.Value, affine: Affine, graph: ir.Graph | None) -> list[Change] | str:
        """What becomes of all layers that read `value` if they get it without the map; or why one can't."""
        readers: list[tuple[Layer, Affine, int | None]] = []
        queue = [(value, affine)]
        for current, here in queue:
            if current.is_graph_output():
                return f"{current.name!r} is a graph output"
            if not current.uses() and current is value:
                return "nothing reads it"
            for node, index in current.uses():
                if is_op(node, "Shape", "Size"):
                    continue
                label = f"{node.op_type} {node.name!r}"
                if node.op_type in LAYERS:
                    layer = _reader(node, index, graph)
                    if isinstance(layer, str):
                        return layer
                    readers.append((layer, here, self.shapes.rank(current)))
                    continue
                carried = self._ahead(node, current, here) if index == 0 and node.graph is graph else None
                if carried is None or len(queue) > _LIMIT:
                    return f"{label} has no weights to fold into"
                queue.extend(carried)
        if not readers:
            return "no layer reads it"
        # The weights are looked at last: that takes as long as all the rest.
        changes: list[Change] = []
        for layer, here, rank in readers:
            change = into_input(layer, here, rank, self.sharers)
            if isinstance(change, str):
                return change
            changes.append(change)
        return changes

    def _ahead(self, node: ir.Node, value: ir.Value, affine: Affine) -> list[tuple[ir.Value, Affine]] | None:
        """The outputs of `node` with the map that each would miss, None where it doesn't commute."""
        if node.domain not in ("", "ai.onnx") or any(a.is_ref() for a in node.attributes.values()):
            return None
        y = node.outputs[0]
        if is_op(node, "Transpose") and affine.size > 1:
            perm = node.attributes.get("perm")
            if perm is None:
                return None
            order = list(perm.as_ints())
            return [(y, dataclasses.replace(affine, axis=order.index(affine.axis % len(order)) - len(order)))]
        if is_op(node, *_SHAPED):
            moved = self._reshaped(affine, value, y)
            return None if moved is None else [(y, moved)]
        if is_op(node, "Slice", "Gather", "Split"):
            if self._untouched(node, affine):
                return [(out, affine) for out in node.outputs]
            return self._split(node, affine) if is_op(node, "Split") else None
        carried = _through(node, affine, rank_of(value, self.shapes))
        return None if carried is None else [(y, carried)]

    def _split(self, node: ir.Node, affine: Affine) -> list[tuple[ir.Value, Affine]] | None:
        """The outputs of a split of the channels, each with its part of the map."""
        parts, start = [], 0
        for out in node.outputs:
            shape, axis = self.shapes.shape(out), attribute_int(node, "axis", 0)
            size = None if shape is None or axis is None else shape[axis]
            if size is None:
                return None
            parts.append((out, _part(affine, slice(start, start + size))))
            start += size
        return parts if start == affine.size else None

    # ---- both

    def _untouched(self, node: ir.Node, affine: Affine) -> bool:
        """Whether a Slice, Gather or Split takes whole channels, which lie along the same axis from the back after."""
        if affine.size == 1:
            return True
        assert node.inputs[0] is not None
        rank = self.shapes.rank(node.inputs[0])
        if is_op(node, "Slice"):
            axes = constant_array(node.inputs[3]) if len(node.inputs) > 3 else None
            touched = None if axes is None else [int(axis) for axis in axes.reshape(-1)]
        else:
            axis = attribute_int(node, "axis", 0)
            touched = None if axis is None else [axis]
        if rank is None or touched is None or any(same_axis(axis, affine.axis, rank) for axis in touched):
            return False
        # The indices of a Gather may have any rank, which moves the axes before the gathered one, from the back.
        return not is_op(node, "Gather") or touched[0] % rank < affine.axis % rank

    def _reshaped(self, affine: Affine, start: ir.Value, end: ir.Value) -> Affine | None:
        """The map on `end`, which holds the numbers of `start` in the same order in another shape."""
        if affine.size == 1:
            return affine
        shape, target = self.shapes.dims(start), self.shapes.dims(end)
        if shape is None or target is None or shape[affine.axis] != affine.size:
            return None
        # A channel is as many numbers in a row; where it starts doesn't depend on the axes before it.
        block = math.prod(shape[affine.axis % len(shape) + 1 :], start=Dim.of(1))
        for axis, size in enumerate(target):
            if size == affine.size and math.prod(target[axis + 1 :], start=Dim.of(1)) == block:
                return dataclasses.replace(affine, axis=axis - len(target))
        return None


def _reader(node: ir.Node, index: int, graph: ir.Graph | None) -> Layer | str:
    """The layer that `node` is, with the Add of its bias, where the value is what it reads; or why not."""
    layer = layer_of(node)
    if isinstance(layer, str):
        return layer
    if index != 0:
        return f"it isn't the input of {layer.name}"
    if node.graph is not graph:
        return f"{layer.name} is in an inner graph"
    return dataclasses.replace(layer, add=bias_behind(layer))


def _through(node: ir.Node, affine: Affine, rank: int | None) -> Affine | None:
    """The map on the other side of an operator that keeps the places of numbers; None where it doesn't commute."""
    if is_op(node, *_MOVES):
        return affine
    if affine.size == 1 and (is_op(node, "Expand") or (is_op(node, "RotaryEmbedding") and not affine.shifts)):
        return affine
    if is_op(node, *_POOLS) and not affine.on(1, rank):
        return None
    if is_op(node, *_ORDERED):
        others = any(out.uses() or out.is_graph_output() for out in node.outputs[1:])
        shifted = affine.shifts and not is_op(node, "MaxPool", "GlobalMaxPool")
        return affine if affine.increasing and not shifted and not others else None
    if is_op(node, "GlobalAveragePool"):
        return affine
    if is_op(node, "AveragePool"):
        # Zeros of the padding that are counted get no shift.
        return affine if not affine.shifts or attribute_int(node, "count_include_pad", 0) == 0 else None
    return None


def is_product(node: ir.Node) -> bool:
    """Whether `node` multiplies two computed values, so that it is no layer at all."""
    return is_op(node, "MatMul", "Gemm") and not any(is_constant(value) for value in node.inputs[:2])


def _part(affine: Affine, part: slice) -> Affine:
    def cut(numbers: Numbers) -> Numbers:
        return numbers[part] if numbers.size > 1 else numbers

    return Affine(np.asarray(cut(affine.scale)), np.asarray(cut(affine.shift)), affine.axis)
