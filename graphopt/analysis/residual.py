"""The residual stream: y = s + F(s), once for every branch.

Found by dataflow alone. An addition is residual where one operand (the skip) is what the other (the branch) was
computed from, and the branch does real work (weights or a softmax). Chains of such additions are one stream, whatever
stands between two of them on the main path: nothing (pre-LN), a normalization (post-LN), an activation (ResNet), or a
convolution on the shortcut where the shape changes (Deep Residual Learning for Image Recognition).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any, Literal

import onnx_ir as ir

from graphopt.analysis.algebra import is_op
from graphopt.analysis.feature_space import FeatureSpace, feature_space
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
    "SparseAttention", "QAttention", "LinearAttention",
)  # fmt: skip
WEIGHTED = (
    "MatMul", "Gemm", "MatMulInteger", "MatMulNBits", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QLinearMatMul",
    "FusedMatMul", "FusedGemm", "QGemm",
)  # fmt: skip
CONVOLUTIONS = ("Conv", "ConvTranspose", "ConvInteger", "QLinearConv", "FusedConv")
RECURRENT = ("LSTM", "GRU", "RNN", "Scan")

_BETWEEN = (
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


@dataclasses.dataclass
class Stream:
    """One residual stream.

    Attributes:
        origin: The value that it starts with: the embedded tokens or patches.
        branches: Its branches, in the order in which they are added.
        final: The sum of all: the output of the last addition.
        space: The feature space of the last sum, None where its shape isn't known: its writers and readers are those
            of the whole stream in a pre-LN model, and those of the last sum in a post-LN one.
    """

    origin: ir.Value
    branches: list[Branch]
    final: ir.Value
    space: FeatureSpace | None

    @property
    def placement(self) -> Placement:
        """The placement of most branches."""
        return Counter(b.placement for b in self.branches).most_common(1)[0][0]

    @property
    def layers(self) -> list[list[Branch]]:
        """The branches by layer: attention (and cross-attention) with the MLP that follows; any other by itself."""
        result: list[list[Branch]] = []
        for branch in self.branches:
            open_ = result[-1] if result else None
            if open_ and branch.kind in ("attention", "mlp") and open_[-1].kind == "attention":
                open_.append(branch)
            else:
                result.append([branch])
        return result

    def to_dict(self) -> dict[str, Any]:
        """What `inspect` tells of it."""
        space = self.space
        return {
            "origin": self.origin.name,
            "final": self.final.name,
            "features": None if space is None else space.size,
            "placement": self.placement,
            "layers": len(self.layers),
            "branches": dict(Counter(b.kind for b in self.branches)),
            "shortcuts": sum(bool(b.shortcut) for b in self.branches),
            "writers": {} if space is None else dict(Counter(w.kind for w in space.writers)),
            "readers": {} if space is None else dict(Counter(r.kind for r in space.readers)),
        }


def residual_streams(model: ir.Model, facts: ShapeFacts) -> list[Stream]:
    """The residual streams of the main graph, longest first.

    The work is linear in the nodes where branches are local, as they are in every layered model.
    """
    return _chained(_Finder(model.graph, facts).branches(), facts)


class _Finder:
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
        candidates.sort(key=lambda c: self._place(c[1]))
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
            for source, node in _main_path(skip, (*_BETWEEN, *_SHORTCUT)):
                shortcut.append(node)
                nodes = self.between(source, output)
                if nodes and (kind := _kind(nodes)) is not None and any(n.op_type in _SHORTCUT for n in shortcut):
                    return Branch(add, source, operand, output, nodes, shortcut, kind)
        return None

    def between(self, start: ir.Value, end: ir.Value) -> list[ir.Node]:
        """The nodes on the paths from `start` to `end`, in topological order; none where there is no path."""
        floor = self._place(start)
        seen: dict[ir.Node, None] = {}
        stack = [end.producer()]
        while stack:
            node = stack.pop()
            if node is None or node in seen or self.place.get(node, -1) <= floor:
                continue
            seen[node] = None
            stack.extend(v.producer() for v in _reads(node) if v is not start)
        reached = {start}
        path = []
        for node in sorted(seen, key=self.place.__getitem__):
            if any(v in reached for v in _reads(node)):
                path.append(node)
                reached.update(node.outputs)
        return path if end in reached and end is not start else []

    def _place(self, value: ir.Value) -> int:
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


def _chained(branches: list[Branch], facts: ShapeFacts) -> list[Stream]:
    """Branches put together to streams by what lies between one addition and the next."""
    by_sum = {branch.add.outputs[0]: branch for branch in branches}
    groups: dict[ir.Node, list[Branch]] = {}
    heads: dict[ir.Node, ir.Value] = {}
    root_of: dict[ir.Node, ir.Node] = {}
    for branch in branches:
        previous = branch.beside or by_sum.get(branch.skip)
        passed: list[ir.Node] = []
        if previous is None:
            for source, node in _main_path(branch.skip, _BETWEEN):
                passed.append(node)
                if source in by_sum:
                    previous = by_sum[source]
                    break
        root = branch.add if previous is None else root_of[previous.add]
        root_of[branch.add] = root
        groups.setdefault(root, []).append(branch)
        if previous is None:
            heads[root] = branch.skip
        elif any(is_op(node, *NORMALIZATIONS) for node in passed):
            previous.placement = "post"
    streams = []
    for root, members in groups.items():
        for branch in members:
            branch.placement = _placement(branch)
        final = members[-1].add.outputs[0]
        streams.append(Stream(heads[root], members, final, feature_space(final, _feature_axis(members), facts)))
    streams.sort(key=lambda s: -len(s.branches))
    return streams


def _feature_axis(branches: list[Branch]) -> int:
    """The last axis, or the channels of images."""
    convolved = next((n for b in branches for n in b.nodes if is_op(n, *CONVOLUTIONS) and len(n.inputs) > 1), None)
    if all(b.kind == "conv" for b in branches) and convolved is not None:
        weight = convolved.inputs[1]
        if weight is not None and weight.shape is not None:
            return 1 - len(weight.shape)
    return -1


def _placement(branch: Branch) -> Placement:
    inside = set(branch.nodes)
    entries = [n for n in branch.nodes if any(v is branch.skip for v in _reads(n))]
    pre = bool(entries) and all(is_op(n, *NORMALIZATIONS) for n in entries)
    last = branch.output.producer()
    for _ in range(3):  # a scale or a cast may follow the norm
        if last is not None and is_op(last, "Mul", "Cast", "Identity", "Dropout") and last in inside:
            last = next((v.producer() for v in last.inputs if v is not None and v.producer() in inside), None)
    leaves = last is not None and last in inside and is_op(last, *NORMALIZATIONS)
    total = branch.add.outputs[0]
    post = branch.placement == "post"
    if not post and not total.is_graph_output() and len(total.uses()) == 1 and not pre:
        post = all(is_op(user, *NORMALIZATIONS) for user, _ in total.uses())
    if pre and leaves:
        return "sandwich"
    if post:
        return "both" if pre else "post"
    return "pre" if pre else "none"


def _kind(nodes: list[ir.Node]) -> BranchKind | None:
    """What a branch computes; None where it does no real work."""
    attends = any(n.op_type == "Softmax" or n.op_type in FUSED_ATTENTION for n in nodes)
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


def _parallel_mlp(nodes: list[ir.Node], linear: list[ir.Node]) -> bool:
    """Whether a linear layer of the branch neither feeds its softmax nor follows it: an MLP beside the attention."""
    softmax = [n for n in nodes if n.op_type == "Softmax" or n.op_type in FUSED_ATTENTION]
    inside = set(nodes)
    above, below = set(softmax), set(softmax)
    for node in reversed(nodes):
        if node in above:
            above.update(p for v in _reads(node) if (p := v.producer()) in inside and p is not None)
    for node in nodes:
        if any(v.producer() in below for v in _reads(node)):
            below.add(node)
    # Values don't feed the softmax, but they meet its output in a MatMul with it.
    mixed = {n for n in nodes if n in below and n.op_type == "MatMul" and n not in linear}
    feeds = set(mixed)
    for node in reversed(nodes):
        if node in feeds:
            feeds.update(p for v in _reads(node) if (p := v.producer()) in inside and p is not None)
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


def _main_path(value: ir.Value, allowed: tuple[str, ...]) -> list[tuple[ir.Value, ir.Node]]:
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


def _reads(node: ir.Node) -> list[ir.Value]:
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
            for value in _reads(node):
                producer = value.producer()
                if producer is not None and producer.graph is graph and producer not in place:
                    stack.append((producer, False))
    return order
