"""Linear sites: every constant weight matrix, what it is for, and with whom it shares its input.

Roles are read off the dataflow: q, k and v are what the operands of an attention site were computed by, o what its
output goes through first; gate and up are the two that a product joins, down what reads the product. The *group* of a
site are the sites that read the same value (q, k, v; gate, up): they share a rotation, a scale, a statistic of it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any, Literal

import onnx_ir as ir

from graphopt.analysis.algebra import attribute_int, is_op, source
from graphopt.analysis.attention_sites import AttentionSite
from graphopt.graph.constants import constant_tensor, is_constant, stored_weight
from graphopt.graph.edits import nodes

Role = Literal[
    "q",
    "k",
    "v",
    "qkv",
    "kv",
    "o",
    "gate",
    "up",
    "gate_up",
    "down",
    "fc1",
    "fc2",
    "embed",
    "head",
    "conv",
    "other",
]

_ACTIVATIONS = (
    "Relu", "Gelu", "Sigmoid", "Tanh", "Swish", "HardSwish", "HardSigmoid", "LeakyRelu", "Elu", "Selu", "Softplus",
    "Erf", "Clip", "Mish", "Celu", "ThresholdedRelu", "PRelu",
)  # fmt: skip
_LIGHT = (
    "Add", "Mul", "Div", "Sub", "Cast", "Identity", "Dropout", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Split",
    "Slice", "Concat", "Expand", "Gather", "Neg", "RotaryEmbedding", "Where", "RMSNormalization", "LayerNormalization",
    "Flatten", "Tile", "QuantizeLinear", "DequantizeLinear",
)  # fmt: skip
"""What may lie between a linear site and the attention that it serves."""
_MAX_VISITED = 64


@dataclasses.dataclass
class LinearSite:
    """One constant weight and the node that multiplies by it.

    Attributes:
        node: MatMul, Gemm, a 1×1 Conv, or for an embedding the Gather.
        weight: The weight as it is stored, below a DequantizeLinear where it is quantized.
        orientation: "in,out" ([K, N]) or "out,in" ([N, K]); an embedding is "in,out" (rows are tokens).
        inputs: Input features K.
        outputs: Output features N.
        bias: Whether a constant vector is added, by the node or behind it.
        role: What it is for.
        group: The number of the group of sites that read the same value.
        shared: Names of the other nodes that read the same weight (tied).
    """

    node: ir.Node
    weight: ir.Value
    orientation: Literal["in,out", "out,in"]
    inputs: int
    outputs: int
    bias: bool
    role: Role = "other"
    group: int = -1
    shared: tuple[str, ...] = ()

    @property
    def x(self) -> ir.Value | None:
        """What is multiplied."""
        return self.node.inputs[1 if self.role == "embed" else 0]

    def to_dict(self) -> dict[str, Any]:
        """What `inspect` tells of it."""
        return {
            "node": self.node.name,
            "weight": self.weight.name,
            "role": self.role,
            "inputs": self.inputs,
            "outputs": self.outputs,
            "orientation": self.orientation,
            "bias": self.bias,
            "group": self.group,
            "shared_with": list(self.shared),
        }


def linear_sites(model: ir.Model, attention: list[AttentionSite]) -> list[LinearSite]:
    """The linear sites of all graphs in the order of their nodes, with role and group.

    Args:
        model: The model.
        attention: Its attention sites, from `attention_sites`.
    """
    sites = [site for node in nodes(model) if (site := _site(node)) is not None]
    by_node = {site.node: site for site in sites}
    for one in attention:
        _attention_roles(one, by_node)
    for site in sites:
        if site.role == "other" and not is_op(site.node, "Gather", "Conv"):
            _mlp_role(site, by_node)
    for site in sites:
        if site.role == "other" and _reaches_output(site):
            site.role = "head"
        if site.role == "other" and is_op(site.node, "Conv"):
            site.role = "conv"
    groups: dict[ir.Value, int] = {}
    for site in sites:
        if (x := site.x) is not None:
            site.group = groups.setdefault(source(x), len(groups))
        readers = dict.fromkeys(_reader(user) for user, _ in site.weight.uses())
        site.shared = tuple(user.name or "" for user in readers if user is not site.node)
    return sites


def roles(sites: list[LinearSite]) -> dict[str, int]:
    """The number of sites by role, the most frequent first."""
    return dict(Counter(site.role for site in sites).most_common())


def _site(node: ir.Node) -> LinearSite | None:
    if not is_op(node, "MatMul", "Gemm", "Conv", "Gather") or len(node.inputs) < 2:
        return None
    place = 0 if is_op(node, "Gather") else 1
    weight, turned = node.inputs[place], False
    if weight is not None and (transpose := weight.producer()) is not None and is_op(transpose, "Transpose"):
        perm = transpose.attributes.get("perm")
        inner = transpose.inputs[0]
        if inner is not None and (perm is None or list(perm.as_ints()) == [1, 0]):
            weight, turned = inner, True
    stored = stored_weight(weight)
    tensor = constant_tensor(stored)
    if stored is None or tensor is None or (stored is weight and not tensor.dtype.is_floating_point()):
        return None
    weight = stored
    shape = tuple(tensor.shape.numpy())
    if is_op(node, "Conv"):
        if any(n != 1 for n in shape[2:]) or attribute_int(node, "group", 1) != 1:
            return None
        shape = shape[:2]
    if len(shape) != 2 or min(shape) < 2:
        return None
    if is_op(node, "Gather"):
        index = node.inputs[1]
        if attribute_int(node, "axis", 0) != 0 or index is None or is_constant(index):
            return None
        return LinearSite(node, weight, "in,out", shape[0], shape[1], False, "embed")
    flipped = turned != (is_op(node, "Conv") or (is_op(node, "Gemm") and attribute_int(node, "transB", 0) == 1))
    inputs, outputs = (shape[1], shape[0]) if flipped else shape
    bias = len(node.inputs) > 2 and node.inputs[2] is not None
    if not bias and is_op(node, "MatMul"):
        users = [user for user, _ in node.outputs[0].uses()]
        bias = len(users) == 1 and is_op(users[0], "Add") and any(is_constant(v) for v in users[0].inputs)
    return LinearSite(node, weight, "out,in" if flipped else "in,out", inputs, outputs, bias)


def _reader(node: ir.Node) -> ir.Node:
    """The node that reads a weight, or its transpose, or what it is dequantized to."""
    users = [user for user, _ in node.outputs[0].uses()]
    return users[0] if is_op(node, "Transpose", "DequantizeLinear") and len(users) == 1 else node


def _attention_roles(one: AttentionSite, by_node: dict[ir.Node, LinearSite]) -> None:
    found: dict[Role, list[LinearSite]] = {
        "q": _makers(one.q, by_node), "k": _makers(one.k, by_node), "v": _makers(one.v, by_node)
    }  # fmt: skip
    for name, makers in found.items():
        for site in makers:
            also = {other for other, others in found.items() if site in others}
            if len(also) == 1:
                site.role = name
            elif site.role in ("other", "q", "k", "v"):
                site.role = "qkv" if len(also) == 3 or "q" in also else "kv"
    for site in _takers(one.output, by_node):
        if site.role == "other":
            site.role = "o"


def _makers(value: ir.Value, by_node: dict[ir.Node, LinearSite]) -> list[LinearSite]:
    """The linear sites that `value` was computed by, nearest on every path."""
    found: dict[ir.Node, None] = {}
    seen = {value}
    queue = [value]
    for current in queue:
        node = current.producer()
        if node is None or len(seen) > _MAX_VISITED:
            continue
        if node in by_node:
            if not is_op(node, "Gather"):
                found[node] = None
            continue
        if is_op(node, *_LIGHT, *_ACTIVATIONS):
            inputs = node.inputs[:1] if is_op(node, "Reshape", "Slice", "Gather", "Expand", "Tile") else node.inputs
            for operand in inputs:
                if operand is not None and operand not in seen and not is_constant(operand):
                    seen.add(operand)
                    queue.append(operand)
    return [by_node[node] for node in found]


def _takers(value: ir.Value, by_node: dict[ir.Node, LinearSite]) -> list[LinearSite]:
    """The first linear sites on the ways from `value`."""
    found: dict[ir.Node, None] = {}
    seen = {value}
    queue = [value]
    for current in queue:
        if len(seen) > _MAX_VISITED:
            break
        for user, index in current.uses():
            if user in by_node:
                if index == 0:
                    found[user] = None
            elif is_op(user, *_LIGHT, *_ACTIVATIONS) and not _adds_two(user):
                for output in user.outputs:
                    if output not in seen:
                        seen.add(output)
                        queue.append(output)
    return [by_node[node] for node in found]


def _adds_two(node: ir.Node) -> bool:
    return is_op(node, "Add", "Sum", "Sub") and sum(not is_constant(v) for v in node.inputs) > 1


def _mlp_role(site: LinearSite, by_node: dict[ir.Node, LinearSite]) -> None:
    """fc1 and fc2 where an activation lies between, gate, up and down where two meet in a product."""
    queue: list[tuple[ir.Value, bool]] = [(site.node.outputs[0], False)]
    seen: dict[ir.Value, bool] = {}
    gate, joined, split = False, None, False
    for current, active in queue:
        if len(seen) > _MAX_VISITED:
            return
        for user, index in current.uses():
            if user in by_node:
                if index == 0 and (active or joined is not None):
                    _mark(site, by_node[user], gate=gate, joined=joined is not None, split=split)
                    return
                continue
            if _adds_two(user) or not is_op(user, *_LIGHT, *_ACTIVATIONS):
                continue
            now = active or is_op(user, *_ACTIVATIONS)
            if is_op(user, "Mul") and not any(is_constant(v) for v in user.inputs):
                others = [v for v in user.inputs if v is not None and v is not current]
                makers = [m for v in others for m in _makers(v, by_node)]
                if any(m is not site for m in makers) and joined is None:
                    joined, gate = user, active
                now |= makers == [site]  # x · sigmoid(x)
            split |= is_op(user, "Split", "Slice")
            for output in user.outputs:
                if output not in seen:
                    seen[output] = now
                    queue.append((output, now))


def _mark(site: LinearSite, reader: LinearSite, *, gate: bool, joined: bool, split: bool) -> None:
    if joined:
        site.role = "gate" if gate else "up"
        last: Role = "down"
    else:
        site.role = "gate_up" if split and site.outputs == 2 * reader.inputs else "fc1"
        last = "down" if site.role == "gate_up" else "fc2"
    if reader.role in ("other", "fc2"):
        reader.role = last


def _reaches_output(site: LinearSite) -> bool:
    """Whether nothing but light operators lies between the site and an output of the graph."""
    seen = {site.node.outputs[0]}
    queue = [site.node.outputs[0]]
    for current in queue:
        if current.is_graph_output():
            return True
        for user, _ in current.uses():
            light = is_op(user, *_LIGHT, *_ACTIVATIONS, "Softmax", "LogSoftmax") and not _adds_two(user)
            if light and not is_op(user, "LayerNormalization", "RMSNormalization"):
                for output in user.outputs:
                    if output not in seen and len(seen) < _MAX_VISITED:
                        seen.add(output)
                        queue.append(output)
    return False
