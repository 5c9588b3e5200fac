"""Which values of a graph are equal, where some of its inputs are."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence

import onnx_ir as ir

from graphopt.analysis.algebra import attribute_int
from graphopt.analysis.shapes import ShapeFacts
from graphopt.graph.constants import constant_tensor
from graphopt.graph.content import same_content, sample
from graphopt.graph.edits import opset, subgraphs_of
from graphopt.passes.clean.eliminate_common_subexpressions import attributes_of, is_random

_COMMUTES = frozenset({"Add", "And", "Equal", "Max", "Min", "Mul", "Or"})
_PRESENTS = {1: (1, 4), 2: (2, 5)}
"""Outputs of Attention that are a past and what is new alone: the places of the new and of the past."""
_HEADS_FIRST = (("perm", ir.AttributeType.INTS, (0, 2, 1, 3)),)
_BEHIND = (("axis", ir.AttributeType.INT, 2),)


class ValueNumbers:
    """Gives equal values of the main graph equal numbers: same operator, equal inputs, equal attributes.

    Constants are equal by their contents, results of Reshape by what they are made of and their shapes. The presents of
    an `Attention` are a Concat of its past and its new keys or values. Operators of other domains, random ones and
    those with subgraphs equal nothing.
    """

    def __init__(self, model: ir.Model, facts: ShapeFacts) -> None:
        self._graph, self._version, self._facts = model.graph, opset(model), facts
        self._constants: dict[ir.Value, Hashable] = {}
        self._alike: dict[Hashable, list[ir.TensorProtocol]] = defaultdict(list)
        self._attributes: dict[ir.Node, tuple[Hashable, ...] | None] = {}

    def of(self, inputs: Mapping[ir.Value, Hashable]) -> dict[ir.Value, int]:
        """The number of every value.

        Args:
            inputs: Inputs of the graph that are equal to each other have equal keys; others equal nothing.
        """
        counter = itertools.count()
        known: defaultdict[Hashable, int] = defaultdict(counter.__next__)
        numbers: dict[ir.Value, int] = {}

        def number(value: ir.Value | None) -> int:
            if value is None:
                return -1
            if value not in numbers:
                numbers[value] = known[self._constant(value) or (inputs.get(value, value),)]
            return numbers[value]

        def made(op_type: str, read: Sequence[int], told: Hashable, output: int = 0) -> int:
            return known[op_type, tuple(sorted(read) if op_type in _COMMUTES else read), told, output]

        for node in self._graph:
            read = [number(value) for value in node.inputs]
            told = self._told(node)
            if told is None:
                continue
            if node.op_type == "Identity":
                numbers[node.outputs[0]] = read[0]
                continue
            if node.op_type == "Reshape" and (shape := self._facts.shape(node.outputs[0])) is not None:
                numbers[node.outputs[0]] = made("Reshape", read[:1], tuple(shape))
                continue
            for index, output in enumerate(node.outputs):
                numbers[output] = made(node.op_type, read, (told, len(node.outputs)), index)
                if node.op_type == "Attention" and index in _PRESENTS and len(read) > _PRESENTS[index][1]:
                    slot, past = _PRESENTS[index]
                    new = read[slot]
                    if (split := self._split(node, slot)) is not None:
                        new = made("Transpose", [made("Reshape", [new], split)], (_HEADS_FIRST, 1))
                    numbers[output] = made("Concat", [read[past], new], (_BEHIND, 1))
        return numbers

    def _split(self, node: ir.Node, slot: int) -> tuple[Hashable, ...] | None:
        """The shape [B, S, H, D] of what an Attention reads as [B, S, H · D]; None where it reads [B, H, S, D]."""
        shape, heads = self._facts.shape(node.inputs[slot]), attribute_int(node, "kv_num_heads", 0)
        if shape is None or len(shape) == 4:
            return None
        width = shape[2].value
        return (*shape[:2], heads, width // heads if width and heads else None)

    def _told(self, node: ir.Node) -> tuple[Hashable, ...] | None:
        """The attributes of a node whose outputs follow from its inputs alone; None where they may not."""
        if node not in self._attributes:
            plain = node.domain in ("", "ai.onnx") and not is_random(node, self._version)
            plain = plain and not any(True for _ in subgraphs_of(node)) and node.op_type != "Constant"
            self._attributes[node] = self._axis_counted(node, attributes_of(node)) if plain else None
        return self._attributes[node]

    def _axis_counted(self, node: ir.Node, told: tuple[Hashable, ...] | None) -> tuple[Hashable, ...] | None:
        """The attributes of a Concat with its axis counted from the first one."""
        axis, shape = attribute_int(node, "axis", 0), self._facts.shape(node.outputs[0])
        if node.op_type != "Concat" or axis is None or shape is None:
            return told
        return (("axis", ir.AttributeType.INT, axis % len(shape)),)

    def _constant(self, value: ir.Value) -> Hashable:
        """What equal constants have in common; None where it is none."""
        if value not in self._constants:
            tensor = None if value.is_graph_input() else constant_tensor(value)
            self._constants[value] = None if tensor is None else self._content(tensor)
        return self._constants[value]

    def _content(self, tensor: ir.TensorProtocol) -> Hashable:
        if tensor.dtype == ir.DataType.STRING:
            return ("string", id(tensor))
        form = (tensor.dtype, tuple(tensor.shape.numpy()), sample(tensor))
        others = self._alike[form]
        place = next((i for i, other in enumerate(others) if same_content(other, tensor)), len(others))
        if place == len(others):
            others.append(tensor)
        return ("constant", form, place)
