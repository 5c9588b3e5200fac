"""Which values of a graph are equal, where some of its inputs are."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Hashable, Mapping

import onnx_ir as ir

from graphopt.graph.constants import constant_tensor
from graphopt.graph.content import same_content, sample
from graphopt.graph.edits import opset, subgraphs_of
from graphopt.passes.clean.eliminate_common_subexpressions import attributes_of, is_random

_COMMUTES = frozenset({"Add", "And", "Equal", "Max", "Min", "Mul", "Or"})
_PRESENTS = {1: (1, 4), 2: (2, 5)}
"""Outputs of Attention that are a past and what is new alone: the places of the new and of the past."""


class ValueNumbers:
    """Gives equal values of the main graph equal numbers: same operator, equal inputs, equal attributes.

    Constants are equal by their contents. Operators of other domains, random ones and those with subgraphs equal
    nothing, but the presents of an `Attention` are what its past and its new keys or values are.
    """

    def __init__(self, model: ir.Model) -> None:
        self._graph, self._version = model.graph, opset(model)
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

        for node in self._graph:
            read = [number(value) for value in node.inputs]
            attributes = self._told(node)
            if attributes is None:
                continue
            if node.op_type == "Identity":
                numbers[node.outputs[0]] = read[0]
                continue
            key = (node.op_type, tuple(sorted(read) if node.op_type in _COMMUTES else read), attributes)
            for index, output in enumerate(node.outputs):
                if node.op_type == "Attention" and index in _PRESENTS:
                    new, past = (read[slot] if slot < len(read) else -1 for slot in _PRESENTS[index])
                    heads = tuple(one for one in attributes if isinstance(one, tuple) and one[0] == "kv_num_heads")
                    numbers[output] = known["present", new, past, heads]
                else:
                    numbers[output] = known[key, len(node.outputs), index]
        return numbers

    def _told(self, node: ir.Node) -> tuple[Hashable, ...] | None:
        """The attributes of a node whose outputs follow from its inputs alone; None where they may not."""
        if node not in self._attributes:
            plain = node.domain in ("", "ai.onnx") and not is_random(node, self._version)
            plain = plain and not any(True for _ in subgraphs_of(node)) and node.op_type != "Constant"
            self._attributes[node] = attributes_of(node) if plain else None
        return self._attributes[node]

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
