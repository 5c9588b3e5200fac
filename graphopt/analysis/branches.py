"""Residual branches: the additions of a graph whose one operand was computed from the other."""

from __future__ import annotations

import dataclasses
from typing import Literal

import onnx_ir as ir

from graphopt.analysis.algebra import is_op
from graphopt.analysis.shapes import ShapeFacts
from graphopt.graph.constants import is_constant, stored_weight
from graphopt.graph.edits import captured_values

Placement = Literal["pre", "post", "sandwich", "both", "none"]
BranchKind = Literal["attention", "mlp", "attention+mlp", "conv", "recurrent", "other"]

NORMALIZATIONS = (
    "LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "BatchNormalization",
    "InstanceNormalization", "GroupNormalization", "LpNormalization",
)  # fmt: skip
FUSED_ATTENTION = (
    "Attention", "MultiHeadAttention", "GroupQueryAttention", "DecoderMaskedMultiHeadAttention", "PackedAttention",
    "SparseAttention", "QAttention", "LinearAttention", "CachedAttention", "QuantizedKVAttention",
)  # fmt: skip
WEIGHTED = (
    "MatMul", "Gemm", "MatMulInteger", "MatMulNBits", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QLinearMatMul",
    "FusedMatMul", "FusedGemm", "QGemm",
)  # fmt: skip
CONVOLUTIONS = ("Conv", "ConvTranspose", "ConvInteger", "QLinearConv", "FusedConv")
RECURRENT = ("LSTM", "GRU", "RNN", "Scan")

BETWEEN = (
    *NORMALIZATIONS, "Relu", "Gelu", "Sigmoid", "Tanh", "LeakyRelu", "Clip", "HardSwish", "Swish", "PRelu", "Identity",
    "Cast", "Dropout", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "QuantizeLinear", "DequantizeLinear", "Mul",
    "Add", "Div",
)  # fmt: skip
"""What may stand on the main path between two additions (Mul, Add and Div with a constant, or x · sigmoid(x))."""
_SHORTCUT = (*CONVOLUTIONS, "AveragePool", "MaxPool", "BatchNormalization", "GroupNormalization", "Slice", "Pad")
"""What a shortcut may change of the skip besides."""
_MAX_BETWEEN = 8


@dataclasses.dataclass
class Branch:
    """One term that is added to the stream.

    Attributes:
        add: The addition.
        skip: What the branch is computed from.
        operand: Which input of `add` comes from the skip.
        output: The branch's term: the other operand.
        nodes: The nodes between the skip and the output, in topological order.
        shortcut: The nodes on the way of the skip itself to the addition, for example a convolution of stride 2.
        kind: What the branch computes.
        placement: Where it is normalised: "pre" (what enters), "sandwich" (what enters and what leaves), "post" (the
            sum), "both" (what enters and the sum), "none".
        beside: The branch that reads the same skip and was added just before, where attention and MLP are parallel.
    """

    add: ir.Node
    skip: ir.Value
    operand: int
    output: ir.Value
    nodes: list[ir.Node]
    shortcut: list[ir.Node]
    kind: BranchKind
    placement: Placement = "none"
    beside: Branch | None = None


@dataclasses.dataclass(frozen=True)
class LongSkip:
    """A value that is concatenated to what was computed from it, as U-Net and DenseNet do.

    Attributes:
        concat: The Concat.
        skip: The earlier value.
        length: The number of nodes between.
    """

    concat: ir.Node
    skip: ir.Value
    length: int


def long_skips(model: ir.Model) -> list[LongSkip]:
    """The skip connections of the main graph that concatenate instead of adding."""
    finder = BranchFinder(model.graph, ShapeFacts(model))
    found = []
    for node in finder.order:
        inputs = [v for v in node.inputs if v is not None and v.producer() is not None and not is_constant(v)]
        if not is_op(node, "Concat") or len(inputs) < 2:
            continue
        inputs.sort(key=finder.place_of)
        nodes = finder.between(inputs[0], inputs[-1])
        if _kind(nodes) is not None:
            found.append(LongSkip(node, inputs[0], len(nodes)))
    return found


class BranchFinder:
    """Finds residual additions of one graph."""

    def __init__(self, graph: ir.Graph, facts: ShapeFacts) -> None:
        self.facts = facts
        self.order = _topological(graph)
        self.place = {node: index for index, node in enumerate(self.order)}
        self._found: dict[ir.Value, Branch] = {}

    def branches(self) -> list[Branch]:
        """All branches of the graph, in the order of their additions."""
        for node in self.order:
            if is_op(node, "Add", "Sum") and (branch := self.branch(node)) is not None:
                self._found[node.outputs[0]] = branch
        return list(self._found.values())

    def branch(self, add: ir.Node) -> Branch | None:
        """The branch that `add` adds, None where it isn't a residual addition."""
        operands = list(add.inputs)
        if len(operands) != 2 or any(v is None or is_constant(v) for v in operands):
            return None
        first, second = operands
        assert first is not None
        assert second is not None
        if first is second or self._differ(first, second) or _on_scores(add):
            return None
        candidates = [(0, first, second), (1, second, first)]
        candidates.sort(key=lambda c: self.place_of(c[1]))
        for operand, skip, output in candidates:
            nodes = self.between(skip, output)
            if nodes and (kind := _kind(nodes)) is not None:
                return Branch(add, skip, operand, output, nodes, [], kind)
        for operand, skip, output in candidates:
            earlier = self._found.get(skip)
            if earlier is not None and (nodes := self.between(earlier.skip, output)):
                kind = _kind(nodes)
                if kind is not None:
                    return Branch(add, earlier.skip, operand, output, nodes, [], kind, beside=earlier)
        for operand, skip, output in candidates:
            shortcut: list[ir.Node] = []
            for source, node in main_path(skip, (*BETWEEN, *_SHORTCUT)):
                shortcut.append(node)
                nodes = self.between(source, output)
                if nodes and (kind := _kind(nodes)) is not None and any(n.op_type in _SHORTCUT for n in shortcut):
                    return Branch(add, source, operand, output, nodes, shortcut, kind)
        return None

    def between(self, start: ir.Value, end: ir.Value) -> list[ir.Node]:
        """The nodes on the paths from `start` to `end`, in topological order; none where there is no path.

        What depends on the sizes of a value alone, as a mask may, isn't computed from it.
        """
        floor = self.place_of(start)
        seen: dict[ir.Node, None] = {}
        stack = [end.producer()]
        while stack:
            node = stack.pop()
            if node is None or node in seen or self.place.get(node, -1) <= floor:
                continue
            seen[node] = None
            stack.extend(v.producer() for v in reads(node) if v is not start)
        reached = {start}
        path = []
        for node in sorted(seen, key=self.place.__getitem__):
            if not is_op(node, "Shape", "Size") and any(v in reached for v in reads(node)):
                path.append(node)
                reached.update(node.outputs)
        return path if end in reached and end is not start else []

    def place_of(self, value: ir.Value) -> int:
        """Where `value` is made in the order of the nodes; -1 for an input or a constant."""
        node = value.producer()
        return -1 if node is None else self.place.get(node, -1)

    def _differ(self, a: ir.Value, b: ir.Value) -> bool:
        """Whether the shapes are known to differ: a mask, or a bias that isn't constant."""
        first, second = self.facts.shape(a), self.facts.shape(b)
        if first is None or second is None:
            return False
        if len(first) != len(second):
            return True
        return any(x.value is not None and y.value is not None and x != y for x, y in zip(first, second, strict=True))


def _kind(nodes: list[ir.Node]) -> BranchKind | None:
    """What a branch computes; None where it does no real work."""
    attends = any((n.op_type == "Softmax" and not _routes(n)) or n.op_type in FUSED_ATTENTION for n in nodes)
    linear = [n for n in nodes if n.op_type in WEIGHTED and any(stored_weight(v) is not None for v in n.inputs)]
    if attends:
        return "attention+mlp" if _parallel_mlp(nodes, linear) else "attention"
    if any(n.op_type in RECURRENT for n in nodes):
        return "recurrent"
    if any(is_op(n, *CONVOLUTIONS) for n in nodes):
        return "conv"
    if linear:
        return "mlp"
    return None


def _routes(softmax: ir.Node) -> bool:
    """Whether a Softmax makes probabilities of experts: the largest are chosen before or behind it."""
    before = softmax.inputs[0].producer() if softmax.inputs[0] is not None else None
    return any(user.op_type == "TopK" for user, _ in softmax.outputs[0].uses()) or (
        before is not None and before.op_type == "TopK"
    )


def _parallel_mlp(nodes: list[ir.Node], linear: list[ir.Node]) -> bool:
    """Whether a linear layer of the branch neither feeds its softmax nor follows it: an MLP beside the attention."""
    softmax = [n for n in nodes if n.op_type == "Softmax" or n.op_type in FUSED_ATTENTION]
    inside = set(nodes)
    above, below = set(softmax), set(softmax)
    for node in reversed(nodes):
        if node in above:
            above.update(p for v in reads(node) if (p := v.producer()) in inside and p is not None)
    for node in nodes:
        if any(v.producer() in below for v in reads(node)):
            below.add(node)
    # Values don't feed the softmax, but they meet its output in a MatMul with it.
    mixed = {n for n in nodes if n in below and n.op_type == "MatMul" and n not in linear}
    feeds = set(mixed)
    for node in reversed(nodes):
        if node in feeds:
            feeds.update(p for v in reads(node) if (p := v.producer()) in inside and p is not None)
    return any(n not in above and n not in below and n not in feeds for n in linear)


def _on_scores(add: ir.Node) -> bool:
    """Whether the sum goes into a softmax: a mask, which all layers share, is added to the scores of each."""
    value = add.outputs[0]
    for _ in range(3):
        users = [user for user, _ in value.uses()]
        if any(user.op_type == "Softmax" for user in users):
            return True
        if len(users) != 1 or not is_op(users[0], "Cast", "Identity", "Where", "Reshape", "Add", "Max"):
            return False
        value = users[0].outputs[0]
    return False


def main_path(value: ir.Value, allowed: tuple[str, ...]) -> list[tuple[ir.Value, ir.Node]]:
    """The values before `value` on a path of single operators, nearest first, each with the node passed to reach it."""
    path: list[tuple[ir.Value, ir.Node]] = []
    current = value
    while len(path) < _MAX_BETWEEN:
        node = current.producer()
        if node is None or not is_op(node, *allowed):
            break
        inputs = [v for v in node.inputs if v is not None and not is_constant(v)]
        if is_op(node, "Mul") and len(inputs) == 2:
            inputs = _gated(inputs)
        if is_op(node, "Reshape", "Dropout", *CONVOLUTIONS, *NORMALIZATIONS):
            inputs = inputs[:1]
        if len(inputs) != 1:
            break
        current = inputs[0]
        path.append((current, node))
    return path


def _gated(inputs: list[ir.Value]) -> list[ir.Value]:
    """x where the product is x · f(x)."""
    for x, gate in (inputs, inputs[::-1]):
        node = gate.producer()
        if node is not None and is_op(node, "Sigmoid", "HardSigmoid", "Tanh", "Softplus") and node.inputs[0] is x:
            return [x]
    return inputs


def reads(node: ir.Node) -> list[ir.Value]:
    """The values that `node` reads, those that its inner graphs capture included."""
    inner = captured_values(node) if any(a.type == ir.AttributeType.GRAPH for a in node.attributes.values()) else ()
    return [*(v for v in node.inputs if v is not None), *inner]


def _topological(graph: ir.Graph) -> list[ir.Node]:
    """The nodes in an order in which every value is made before it is read (the file's order may be another)."""
    place: dict[ir.Node, bool] = {}
    order: list[ir.Node] = []
    for start in graph:
        stack = [(start, False)]
        while stack:
            node, ready = stack.pop()
            if ready:
                order.append(node)
                continue
            if node in place:
                continue
            place[node] = True
            stack.append((node, True))
            for value in reads(node):
                producer = value.producer()
                if producer is not None and producer.graph is graph and producer not in place:
                    stack.append((producer, False))
    return order
