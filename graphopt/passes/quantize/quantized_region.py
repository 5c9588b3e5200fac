"""Which nodes of a graph compute in integers between layers that do, and which values share one scale."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable

import numpy as np
import onnx_ir as ir

from graphopt.analysis.algebra import is_op
from graphopt.graph.constants import constant_array, constant_tensor

LAYERS = ("Conv", "MatMul", "Gemm")
MOVERS = ("MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split")
"""What only moves numbers, or takes the larger one, so that its outputs have the codes of its input."""
ELEMENTWISE = ("Add", "Mul", "Sigmoid", "LeakyRelu", "Concat", "GlobalAveragePool")
"""What has a kernel on codes with scales of their own for inputs and output, and a fast one: that of AveragePool took
30 times as long as in float32 (1024 channels, 7 × 7)."""
_JOINING = ("Add", "Mul", "Concat")
FUSED = ("Relu", "Clip")
"""What costs nothing where its range is that of the codes."""


@dataclasses.dataclass
class Region:
    """The nodes that are computed on codes.

    Attributes:
        layers: Convolutions and products with constant weights.
        between: Other nodes among them.
        clamps: By the node before it: the Relu or Clip that its scale takes over.
    """

    layers: dict[ir.Node, None]
    between: dict[ir.Node, None]
    clamps: dict[ir.Node, ir.Node]

    def __contains__(self, node: object) -> bool:
        return node in self.layers or node in self.between

    def outputs(self, node: ir.Node) -> list[ir.Value]:
        """What a node of the region gives, behind its clamp; nothing for products, whose results are floats."""
        if is_op(node, "MatMul", "Gemm"):
            return []
        return list(self.clamps[node].outputs if node in self.clamps else node.outputs)

    def root(self, value: ir.Value) -> ir.Value:
        """The value whose scale this one has."""
        while (node := value.producer()) is not None and node in self.between and is_op(node, *MOVERS):
            assert node.inputs[0] is not None
            value = node.inputs[0]
        return value

    def touched(self, node: ir.Node) -> list[ir.Value]:
        """What a node of the region reads and makes."""
        return [*data_inputs(node), *self.outputs(node)]

    def values(self) -> list[ir.Value]:
        """All values that its nodes read or make."""
        return list(dict.fromkeys(v for node in (*self.layers, *self.between) for v in self.touched(node)))


def region(
    layers: Iterable[ir.Node], graph: ir.Graph, refused: Callable[[ir.Node], bool], last: Collection[ir.Node] = ()
) -> Region:
    """The nodes to compute on codes: the layers, and what lies between two of them.

    A node joins where one of its inputs has codes anyway and something in the region reads what it makes; so nothing
    joins between the last layers and the outputs, where scores and coordinates are.

    Args:
        layers: Nodes with constant weights that are taken.
        graph: The main graph, in topological order.
        refused: Says of a node that it must not join.
        last: Layers that aren't taken, before which a node joins nevertheless.
    """
    seeds = dict.fromkeys(layers)
    clamps: dict[ir.Node, ir.Node] = {}
    codes = {value for node in seeds for value in data_inputs(node)}
    joined: dict[ir.Node, None] = {}
    for node in graph:
        if node not in seeds:
            if not is_op(node, *MOVERS, *ELEMENTWISE) or refused(node):
                continue
            given = data_inputs(node)
            if not given or not any(value in codes for value in given) or not _fits(node):
                continue
            joined[node] = None
        if is_op(node, "MatMul", "Gemm"):
            continue
        clamp = None if is_op(node, *MOVERS) else _clamp(node)
        if clamp is not None:
            clamps[node] = clamp
        codes.update((clamp or node).outputs)
    kept: dict[ir.Node, None] = {}
    for node in reversed(joined):
        readers = {use.node for out in (clamps.get(node) or node).outputs for use in out.uses()}
        if any(reader in seeds or reader in kept or reader in last for reader in readers):
            kept[node] = None
    between = {node: None for node in joined if node in kept}
    return Region(seeds, between, {k: v for k, v in clamps.items() if k in seeds or k in between})


def data_inputs(node: ir.Node) -> list[ir.Value]:
    """The inputs of a node that are rounded as it runs: not weights, shapes or limits."""
    several = node.inputs if is_op(node, *_JOINING) else node.inputs[:1]
    return [value for value in several if value is not None]


def last_layers(layers: Iterable[ir.Node], graph: ir.Graph) -> list[ir.Node]:
    """The layers from which no way leads to another one."""
    seeds = dict.fromkeys(layers)
    leads: set[ir.Node] = set()
    for node in reversed(graph):
        readers = (use.node for out in node.outputs for use in out.uses())
        if any(reader in seeds or reader in leads for reader in readers):
            leads.add(node)
    return [node for node in seeds if node not in leads]


def only_swish(value: ir.Value) -> bool:
    """Whether value · Sigmoid(value) is all that is made of a value."""
    readers = [use.node for use in value.uses()]
    gate, product = (next((node for node in readers if is_op(node, kind)), None) for kind in ("Sigmoid", "Mul"))
    if len(readers) != 2 or gate is None or product is None or value.is_graph_output():
        return False
    opened = gate.outputs[0]
    return [use.node for use in opened.uses()] == [product] and not opened.is_graph_output()


def clamp_limits(node: ir.Node) -> tuple[float, float]:
    """The least and the largest number that a Relu or Clip lets through."""
    if is_op(node, "Relu"):
        return 0.0, float("inf")
    found = [-float("inf"), float("inf")]
    for place, name in enumerate(("min", "max")):
        limit = constant_array(node.inputs[place + 1]) if len(node.inputs) > place + 1 else None
        attribute = node.attributes.get(name)
        if limit is not None:
            found[place] = float(np.asarray(limit).reshape(-1)[0])
        elif attribute is not None:
            found[place] = float(attribute.value)
    return found[0], found[1]


def _clamp(node: ir.Node) -> ir.Node | None:
    """The Relu or Clip with constant limits that alone reads what a node makes."""
    output = node.outputs[0]
    uses = tuple(output.uses())
    if len(uses) != 1 or output.is_graph_output() or len(node.outputs) != 1:
        return None
    user = uses[0].node
    if not is_op(user, *FUSED) or user.graph is not node.graph or uses[0].idx != 0:
        return None
    limits: Collection[ir.Value | None] = user.inputs[1:]
    low, high = clamp_limits(user)
    # The codes reach 0 whatever the range, so that a clamp away from it can't be theirs.
    return user if low <= 0 <= high and all(v is None or constant_tensor(v) is not None for v in limits) else None


def _fits(node: ir.Node) -> bool:
    """Whether the integer kernels take a node as it is."""
    if any(constant_tensor(value) is not None for value in data_inputs(node)):
        return False
    if is_op(node, "MaxPool"):
        return sum(bool(out.name and out.uses()) or out.is_graph_output() for out in node.outputs) == 1
    return True
