"""Structures of convolutional networks, found by dataflow: what the layers of a block are to each other.

| kind | what it is | paper |
|---|---|---|
| separable | depthwise, then pointwise convolution | Xception |
| bottleneck | pointwise to fewer channels, spatial, pointwise | Deep Residual Learning for Image Recognition |
| grouped bottleneck | the same with groups in the middle | Aggregated Residual Transformations |
| inverted bottleneck | pointwise to more channels, spatial, pointwise | MobileNetV2 |
| branches | equal branches of one value, added or concatenated | Aggregated Residual Transformations |
| parallel | two or more convolutions of one value that are added, and at times the value itself | RepVGG |
| residual | convolutions whose output is added to their input, or to one convolution of it | Deep Residual Learning |
| pre-activation residual | the same, with a norm or activation first | Identity Mappings in Deep Residual Networks |

Between two convolutions may stand norms, activations however spelled (x · sigmoid(x), clips, products and sums with
constants), and gates computed from the value itself (squeeze and excite); nothing else. Each node is looked back from a
bounded number of times, so the time is linear in the nodes.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import onnx_ir as ir

from graphopt.analysis.algebra import attribute_int, is_op, producer
from graphopt.graph.constants import constant_tensor
from graphopt.graph.edits import nodes

NORMS = ("BatchNormalization", "InstanceNormalization", "GroupNormalization", "LayerNormalization", "RMSNormalization")
ACTIVATIONS = (
    *("Relu", "LeakyRelu", "PRelu", "Elu", "Selu", "Celu", "ThresholdedRelu", "HardSigmoid", "HardSwish", "Sigmoid"),
    *("Tanh", "Softplus", "Softsign", "Mish", "Gelu", "Swish", "Erf", "Clip", "Exp", "Neg", "Reciprocal"),
)
ARITHMETIC = ("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min")
COPIES = ("Identity", "Dropout", "Cast")
POOLED = ("GlobalAveragePool", "GlobalMaxPool", "ReduceMean", "ReduceMax", "AveragePool")
"""What a gate may hold besides: it stands for a whole channel."""
GATE = 12
"""Nodes of a gate or activation at most."""
BLOCK = 64
"""Nodes of a residual block's branch at most."""


@dataclasses.dataclass(frozen=True)
class ConvStructure:
    """Some convolutions of a model that belong together.

    Attributes:
        kind: What they are; see the module's table.
        nodes: Names of the convolutions in order, and of the node at which they end where that is none.
        detail: Sizes in words, for example "3×3 depthwise, 96 → 192 channels".
    """

    kind: str
    nodes: tuple[str, ...]
    detail: str

    def to_dict(self) -> dict[str, Any]:
        """The structure as JSON data."""
        return {"kind": self.kind, "nodes": list(self.nodes), "detail": self.detail}


@dataclasses.dataclass(frozen=True)
class _Conv:
    """A Conv with constant weights."""

    node: ir.Node
    inputs: int
    outputs: int
    group: int
    kernel: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.node.name or ""

    @property
    def pointwise(self) -> bool:
        return self.group == 1 and all(k == 1 for k in self.kernel)

    @property
    def depthwise(self) -> bool:
        return self.group > 1 and self.group == self.inputs and any(k != 1 for k in self.kernel)

    @property
    def size(self) -> str:
        return "×".join(map(str, self.kernel))


def conv_structures(model: ir.Model) -> list[ConvStructure]:
    """The structures of a model, in the order of the nodes at which they end."""
    found: list[ConvStructure] = []
    convs: dict[ir.Node, _Conv] = {}
    for node in nodes(model):
        if is_op(node, "Conv"):
            conv = _conv(node)
            if conv is not None:
                convs[node] = conv
                found += _chain(conv, convs)
        elif is_op(node, "Add", "Sum", "Concat"):
            found += _joint(node, convs)
    return found


def _conv(node: ir.Node) -> _Conv | None:
    weight = constant_tensor(node.inputs[1]) if len(node.inputs) > 1 else None
    group = attribute_int(node, "group", 1)
    if weight is None or group is None or len(weight.shape) < 3:
        return None
    shape = tuple(int(n) for n in weight.shape.numpy())
    return _Conv(node, shape[1] * group, shape[0], group, shape[2:])


# ---- convolutions in a row


def _chain(last: _Conv, convs: dict[ir.Node, _Conv]) -> list[ConvStructure]:
    """Separable pairs and bottlenecks that end at `last`."""
    middle = _before(last, convs)
    if middle is None or not last.pointwise:
        return []
    found = []
    if middle.depthwise:
        detail = f"{middle.size} depthwise, {last.inputs} → {last.outputs} channels"
        found.append(ConvStructure("separable", (middle.name, last.name), detail))
    first = _before(middle, convs) if any(k != 1 for k in middle.kernel) else None
    if first is not None and first.pointwise and middle.outputs == first.outputs:
        names = first.name, middle.name, last.name
        groups = f", {middle.group} groups" if middle.group > 1 else ""
        detail = f"{first.inputs} → {first.outputs} → {last.outputs} channels, {middle.size}{groups}"
        if first.outputs > max(first.inputs, last.outputs):
            found.append(ConvStructure("inverted bottleneck", names, detail))
        elif first.outputs <= min(first.inputs, last.outputs) and first.inputs + last.outputs > 2 * first.outputs:
            grouped = 1 < middle.group < middle.inputs
            found.append(ConvStructure("grouped bottleneck" if grouped else "bottleneck", names, detail))
    return found


def _before(conv: _Conv, convs: dict[ir.Node, _Conv]) -> _Conv | None:
    """The convolution before, with nothing between but what works on each channel by itself."""
    value = conv.node.inputs[0]
    for _ in range(GATE):
        made = None if value is None else value.producer()
        if made is None or made.graph is not conv.node.graph:
            return None
        if made in convs:
            return convs[made]
        value = _back(made)
    return None


def _back(node: ir.Node) -> ir.Value | None:
    """The value that a norm, activation or gate is made of, None where `node` is none of these."""
    if is_op(node, *NORMS, *ACTIVATIONS, *COPIES):
        return node.inputs[0]
    if not is_op(node, *ARITHMETIC):
        return None
    operands = [v for v in node.inputs if v is not None and not _given(v)]
    if len(operands) == 1:
        return operands[0]
    if len(operands) != 2 or operands[0] is operands[1]:
        return operands[0] if operands else None
    if not is_op(node, "Mul", "Div"):
        return None  # a sum of two values is a junction, not an activation
    first, second = (_gate(value) for value in operands)
    if operands[0] in second:
        return operands[0]
    return next((value for value in first if value in second or value is operands[1]), None)


def _gate(value: ir.Value) -> dict[ir.Value, None]:
    """The values that a gate is made of, one after the other, nearest first."""
    found: dict[ir.Value, None] = {}
    current: ir.Value | None = value
    while current is not None and len(found) < GATE:
        found[current] = None
        node = producer(current, "Conv", *NORMS, *ACTIVATIONS, *COPIES, *POOLED, *ARITHMETIC)
        operands = [] if node is None else [v for v in node.inputs if v is not None and not _given(v)]
        current = operands[0] if len(operands) == 1 or (node is not None and is_op(node, "Conv")) else None
    return found


# ---- convolutions side by side


@dataclasses.dataclass(frozen=True)
class _Branch:
    """What leads to a value: nodes and values, nearest first; `values[i + 1]` is what `steps[i]` reads."""

    values: tuple[ir.Value, ...]
    steps: tuple[ir.Node, ...]

    def until(self, root: ir.Value) -> tuple[ir.Node, ...]:
        """The nodes from `root` on, the first one first."""
        return tuple(reversed(self.steps[: self.values.index(root)]))


def _branch(value: ir.Value, graph: object) -> _Branch:
    values: list[ir.Value] = [value]
    steps: list[ir.Node] = []
    while len(steps) < BLOCK:
        node = values[-1].producer()
        if node is None or node.graph is not graph:
            break
        x = node.inputs[0] if is_op(node, "Conv", "MaxPool", "AveragePool") else _back(node)
        if x is None:
            break
        values.append(x)
        steps.append(node)
    return _Branch(tuple(values), tuple(steps))


def _joint(node: ir.Node, convs: dict[ir.Node, _Conv]) -> list[ConvStructure]:
    """Structures that end at a sum or a Concat."""
    if not is_op(node, "Concat") and any(is_op(u.node, "Add", "Sum") for u in node.outputs[0].uses()):
        reader = next(u.node for u in node.outputs[0].uses() if is_op(u.node, "Add", "Sum"))
        if len(node.outputs[0].uses()) == 1 and reader.graph is node.graph:
            return []  # a part of a larger sum
    terms = list(node.inputs) if is_op(node, "Concat") else _terms(node)
    values = [value for value in terms if value is not None and not _given(value)]
    if len(values) < 2 or all(producer(v, "Add", "Sum") is not None for v in values):
        return []
    branches = [_branch(value, node.graph) for value in values]
    found = _equal(node, branches, convs)
    if found or is_op(node, "Concat"):
        return found
    found = _parallel(node, values, convs)
    return found or (_residual(node, branches, convs) if len(branches) == 2 else [])


def _terms(root: ir.Node) -> list[ir.Value]:
    terms: list[ir.Value] = []
    pending = [v for v in reversed(root.inputs) if v is not None]
    while pending:
        value = pending.pop()
        inner = producer(value, "Add", "Sum")
        if inner is None or inner.graph is not root.graph or len(value.uses()) > 1 or value.is_graph_output():
            terms.append(value)
        else:
            pending.extend(v for v in reversed(inner.inputs) if v is not None)
    return terms


def _parallel(node: ir.Node, values: Sequence[ir.Value], convs: dict[ir.Node, _Conv]) -> list[ConvStructure]:
    by_input: dict[ir.Value, list[_Conv]] = defaultdict(list)
    for value in values:
        made = value.producer()
        while made is not None and is_op(made, "BatchNormalization") and made.inputs[0] is not None:
            made = made.inputs[0].producer()
        if made in convs and made is not None and (x := made.inputs[0]) is not None:
            by_input[x].append(convs[made])
    found = []
    for x, group in by_input.items():
        same = sum(value is x or _is_norm_of(value, x) for value in values)
        if len(group) > 1:
            sizes = " + ".join([conv.size for conv in group] + ["identity"] * same)
            detail = f"{sizes}, {group[0].inputs} → {group[0].outputs} channels"
            found.append(ConvStructure("parallel", (*(conv.name for conv in group), node.name or ""), detail))
    return found


def _is_norm_of(value: ir.Value, x: ir.Value) -> bool:
    norm = producer(value, "BatchNormalization")
    return norm is not None and norm.inputs[0] is x


def _equal(node: ir.Node, branches: Sequence[_Branch], convs: dict[ir.Node, _Conv]) -> list[ConvStructure]:
    """Branches of at least two convolutions each that are equal up to one value."""
    alike: dict[tuple[object, ...], list[tuple[_Conv, ...]]] = defaultdict(list)
    for branch in branches:
        root = next((v for v in branch.values[1:] if len(v.uses()) >= len(branches)), None)
        if root is None:
            continue
        steps = branch.until(root)
        members = tuple(convs[step] for step in steps if step in convs)
        if len(members) > 1:
            shapes = tuple((c.inputs, c.outputs, c.group, c.kernel) for c in members)
            alike[(root, tuple(step.op_type for step in steps), shapes)].append(members)
    found = []
    for group in alike.values():
        if len(group) > 1:
            first = group[0]
            channels = " → ".join(map(str, [first[0].inputs, *(conv.outputs for conv in first)]))
            how = "concatenated" if is_op(node, "Concat") else "added"
            names = tuple(conv.name for members in group for conv in members)
            detail = f"{len(group)} branches of {channels} channels, {how}"
            found.append(ConvStructure("branches", (*names, node.name or ""), detail))
    return found


def _residual(node: ir.Node, branches: Sequence[_Branch], convs: dict[ir.Node, _Conv]) -> list[ConvStructure]:
    one, two = branches
    inside = dict.fromkeys(two.values)
    root = next((value for value in one.values if value in inside), None)
    if root is None:
        return []
    sides = sorted((branch.until(root) for branch in branches), key=lambda steps: len(_convs(steps, convs)))
    skip, body = sides
    shortcut, members = _convs(skip, convs), _convs(body, convs)
    if not members or len(shortcut) > 1 or (shortcut and len(members) < 2):
        return []
    ahead = body[: body.index(members[0].node)]
    kind = "pre-activation residual" if any(is_op(n, *NORMS, *ACTIVATIONS) for n in ahead) else "residual"
    channels = " → ".join(map(str, [members[0].inputs, *(conv.outputs for conv in members)]))
    how = "one convolution of the input" if shortcut else "the input"
    names = tuple(conv.name for conv in (*members, *shortcut))
    return [ConvStructure(kind, (*names, node.name or ""), f"{channels} channels, added to {how}")]


def _convs(steps: Iterable[ir.Node], convs: dict[ir.Node, _Conv]) -> list[_Conv]:
    return [convs[step] for step in steps if step in convs]


def _given(value: ir.Value) -> bool:
    """Whether `value` is no result of a run; unlike `is_constant`, it doesn't ask for the tensor, which takes long."""
    return producer(value, "Constant") is not None or (value.is_initializer() and not value.is_graph_input())
