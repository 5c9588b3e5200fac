"""Layers: what a model repeats.

The operators with weights, in topological order, are read as a string of signatures (operator and shape of the weight);
a stack of equal layers is a stretch that repeats with some period. This needs no names and no architecture, and finds
the layers of any transformer, ResNet stage or MLP. What a layer consists of beyond its weights, and the residual stream
through it, is another analysis.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any

import onnx_ir as ir

from graphopt.graph.constants import constant_tensor
from graphopt.graph.content import same_content, sample
from graphopt.graph.edits import nodes

WEIGHTED = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose", "MatMulInteger", "ConvInteger", "LSTM", "GRU"})
LONGEST_PERIOD = 64
"""Weights in one layer at most."""
FEWEST = 3
"""A stack has at least as many layers, or at least two of two weights or more."""


@dataclasses.dataclass(frozen=True)
class Stack:
    """Equal layers, one after the other.

    Attributes:
        count: How many layers.
        weights: Operator and shape of each weight of one layer, in order, for example "MatMul 576×1536".
        first: Name of the first layer's first node.
        last: Name of the last layer's last node.
    """

    count: int
    weights: tuple[str, ...]
    first: str
    last: str

    def to_dict(self) -> dict[str, Any]:
        """The stack as JSON data."""
        return dataclasses.asdict(self)


def stacks(model: ir.Model) -> list[Stack]:
    """The stacks of equal layers of a model, in order, found in time linear in its nodes."""
    return [stack for stack, _ in _find(_sites(model))]


@dataclasses.dataclass(frozen=True)
class TiedLayers:
    """Layers of one stack that share all their weights.

    Attributes:
        stack: Which of `stacks(model)`, from 0.
        layers: Which of its layers, from 0, in order; two at least.
        stored: Whether the weights are stored once; False where the file holds copies of them.
    """

    stack: int
    layers: tuple[int, ...]
    stored: bool

    def to_dict(self) -> dict[str, Any]:
        """The layers as JSON data."""
        return dataclasses.asdict(self)


def tied_layers(model: ir.Model) -> list[TiedLayers]:
    """The layers of each stack that share all weights, as ALBERT's do, in the order of the stacks.

    Compared are the constants of the operators with weights and of the Add behind each, by their contents: an export
    with a copy for each layer is tied too. Norms between them may differ.
    """
    classes: dict[Hashable, list[ir.TensorProtocol]] = {}
    found: list[TiedLayers] = []
    for index, (stack, members) in enumerate(_find(_sites(model))):
        period = len(stack.weights)
        alike: dict[tuple[Hashable, ...], list[int]] = {}
        values: dict[Hashable, set[ir.Value]] = {}
        for layer in range(stack.count):
            constants = [v for node in members[layer * period : (layer + 1) * period] for v in _constants(node)]
            key = tuple(_class(v, classes) for v in constants)
            alike.setdefault(key, []).append(layer)
            values.setdefault(key, set()).update(constants)
        for weights, layers in alike.items():
            if len(layers) > 1:
                found.append(TiedLayers(index, tuple(layers), len(values[weights]) == len(set(weights))))
    return found


def _class(value: ir.Value, classes: dict[Hashable, list[ir.TensorProtocol]]) -> tuple[Hashable, ...]:
    """Equal for constants of the same type, shape and contents."""
    tensor = constant_tensor(value)
    assert tensor is not None
    form = (tensor.dtype, tuple(tensor.shape.numpy()), sample(tensor))
    members = classes.setdefault(form, [])
    for number, member in enumerate(members):
        if same_content(member, tensor):
            return (*form, number)
    members.append(tensor)
    return (*form, len(members) - 1)


def _constants(node: ir.Node) -> list[ir.Value]:
    """The constants that a node reads, and the Add of a constant behind it."""
    behind = [user for out in node.outputs for user, _ in out.uses() if user.op_type == "Add" and user.domain == ""]
    return [v for n in (node, *behind) for v in n.inputs if v is not None and constant_tensor(v) is not None]


def _sites(model: ir.Model) -> list[tuple[str, ir.Node]]:
    """The operators with weights, each with its signature, in order."""
    sites: list[tuple[str, ir.Node]] = []
    for node in nodes(model):
        if node.op_type not in WEIGHTED:
            continue
        tensors = [t for v in node.inputs if (t := constant_tensor(v)) is not None]
        shapes = [tuple(t.shape.numpy()) for t in tensors if len(t.shape) > 1]
        if shapes:
            sites.append((f"{node.op_type} {'×'.join(map(str, shapes[0]))}", node))
    return sites


def _find(sites: Sequence[tuple[str, ir.Node]]) -> list[tuple[Stack, list[ir.Node]]]:
    """The stacks, each with the operators with weights of all its layers."""
    signatures = [signature for signature, _ in sites]
    best: tuple[int, int, int] | None = None  # (covered, -period, -start), the largest wins
    for period in range(1, min(LONGEST_PERIOD, len(signatures) // 2) + 1):
        run = 0
        for i in range(len(signatures) - period + 1):
            if i + period < len(signatures) and signatures[i] == signatures[i + period]:
                run += 1
                continue
            count = run // period + 1
            enough = count >= FEWEST or (count == 2 and period >= 2)
            if run >= period and enough and (best is None or (count * period, -period, run - i) > best):
                best = (count * period, -period, run - i)
            run = 0
    if best is None:
        return []
    covered, period, start = best[0], -best[1], -best[2]
    stack = Stack(
        covered // period,
        tuple(signatures[start : start + period]),
        sites[start][1].name or "",
        sites[start + covered - 1][1].name or "",
    )
    members = [node for _, node in sites[start : start + covered]]
    return [*_find(sites[:start]), (stack, members), *_find(sites[start + covered :])]
