"""Layers: what a model repeats.

The operators with weights, in topological order, are read as a string of signatures (operator and shape of the weight);
a stack of equal layers is a stretch that repeats with some period. This needs no names and no architecture, and finds
the layers of any transformer, ResNet stage or MLP. What a layer consists of beyond its weights, and the residual stream
through it, is another analysis.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from graphopt.graph.constants import constant_tensor
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
    sites: list[tuple[str, ir.Node]] = []
    for node in nodes(model):
        if node.op_type not in WEIGHTED:
            continue
        tensors = [t for v in node.inputs if (t := constant_tensor(v)) is not None]
        shapes = [tuple(t.shape.numpy()) for t in tensors if len(t.shape) > 1]
        if shapes:
            sites.append((f"{node.op_type} {'×'.join(map(str, shapes[0]))}", node))
    return _find(sites)


def _find(sites: Sequence[tuple[str, ir.Node]]) -> list[Stack]:
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
    return [*_find(sites[:start]), stack, *_find(sites[start + covered :])]
