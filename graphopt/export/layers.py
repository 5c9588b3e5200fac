"""Equal layers are traced a few times and repeated in the graph: time and memory of an export don't grow with depth.

A module's list of layers is cut to its first few. In their graph a node belongs to the last layer that it depends on,
which cuts the graph into one segment a layer, each reading its own weights and cache, the segment before, and what all
layers share. A layer that was cut off gets the segment of a layer of its kind that is followed by its follower's kind;
the last one traced becomes the last of all, with what comes after the layers.

Two layers are of a kind if their modules are: classes, sizes and settings of everything in them. That this is all that
they depend on is checked twice: segments of one kind must be equal node by node, and the whole export is compared with
PyTorch. A graph that isn't built like this isn't repeated but traced whole.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from graphopt.export.dependencies import require

FEWEST = 6
"""A list of fewer layers is traced whole."""


@dataclass(frozen=True)
class Plan:
    """What is traced of a list of layers, and what each of the others is made of.

    Attributes:
        path: The list, as the module calls it ("model.layers").
        count: Layers of the module.
        kept: Layers that are traced: the first ones.
        templates: For each layer from `kept` - 1 to `count` - 2 the traced layer whose segment it gets.
        kinds: A number for each layer, the same for equal ones.
    """

    path: str
    count: int
    kept: int
    templates: tuple[int, ...]
    kinds: tuple[int, ...]


class NotRepeatable(Exception):
    """The graph isn't one segment a layer, each like the others of its kind; the message says where."""


def plan(module: Any) -> Plan | None:
    """How to trace the longest list of layers in a module; None: whole."""
    torch = require("torch")
    lists = [(name, item) for name, item in module.named_modules() if isinstance(item, torch.nn.ModuleList)]
    lists = [(name, item) for name, item in lists if len(item) >= FEWEST]
    if not lists:
        return None
    path, longest = max(lists, key=lambda pair: (len(pair[1]), -len(pair[0])))
    kinds = _kinds(longest)
    for wanted in (2, 1):
        for kept in range(4, len(kinds) - 1):
            if (templates := _templates(kinds, kept, wanted)) is not None:
                if kept <= max(4, len(kinds) // 2):
                    return Plan(path, len(kinds), kept, templates, tuple(kinds))
                break
    return None


def _kinds(layers: Any) -> list[int]:
    """A number for each layer, the same for equal ones."""
    simple = (bool, int, float, str, type(None), tuple)
    facts = []
    for layer in layers:
        found: dict[tuple[str, str], Any] = {}
        for name, part in layer.named_modules():
            found[name, "class"] = type(part)
            found |= {(name, key): value for key, value in vars(part).items() if isinstance(value, simple)}
        tensors = [*layer.named_parameters(), *layer.named_buffers()]
        found |= {(name, "tensor"): (tuple(tensor.shape), str(tensor.dtype)) for name, tensor in tensors}
        facts.append(found)
    # A layer's own number is no part of its kind.
    numbers = {key for key in facts[0] if all(f.get(key) == i and f.get(key) is not False for i, f in enumerate(facts))}
    seen: dict[str, int] = {}
    texts = [repr(sorted((repr(k), repr(v)) for k, v in f.items() if k not in numbers)) for f in facts]
    return [seen.setdefault(text, len(seen)) for text in texts]


def _templates(kinds: Sequence[int], kept: int, wanted: int) -> tuple[int, ...] | None:
    """A traced layer for each that isn't; None: there is none, or a kind isn't traced `wanted` times."""
    last = len(kinds) - 1
    if kinds[kept - 1] != kinds[last]:
        return None
    # Neither the first layer, which reads no layer, nor the last.
    pairs = [(kinds[i], kinds[i + 1]) for i in range(kept - 1)]
    found = []
    for layer in range(kept - 1, last):
        places = [i for i in range(1, kept - 1) if pairs[i] == (kinds[layer], kinds[layer + 1])]
        if len(places) < wanted:
            return None
        found.append(places[-1])
    return tuple(found)


@contextlib.contextmanager
def cut(module: Any, plan: Plan) -> Iterator[None]:
    """The module with the first layers only, and configurations that say so."""
    torch = require("torch")
    parent, _, name = plan.path.rpartition(".")
    holder = module.get_submodule(parent)
    layers = getattr(holder, name)
    configs = {id(c): c for m in module.modules() if (c := getattr(m, "config", None)) is not None}
    changed = [config for config in configs.values() if getattr(config, "num_hidden_layers", None) == plan.count]
    setattr(holder, name, torch.nn.ModuleList(list(layers)[: plan.kept]))
    for config in changed:
        config.num_hidden_layers = plan.kept
    try:
        yield
    finally:
        setattr(holder, name, layers)
        for config in changed:
            config.num_hidden_layers = plan.count


# ---- the graph


def repeat(graph: ir.Graph, plan: Plan, weights: Collection[str], prefixes: Sequence[str] = ()) -> None:
    """Make the graph of the first layers that of all.

    Args:
        graph: Inputs and outputs of layer i are named "<something>.i.<something>", its weights "`path`.i.<something>".
        plan: What was traced.
        weights: The names of the weights of all layers. Other initializers are constants, whatever they're called.
        prefixes: How the names of inputs and outputs of layers begin ("past_key_values", "present").

    Raises:
        NotRepeatable: The graph isn't built like this. It is as it was.
    """
    _Repetition(graph, plan, weights, prefixes).run()


class _Repetition:
    def __init__(self, graph: ir.Graph, plan: Plan, weights: Collection[str], prefixes: Sequence[str]) -> None:
        self.graph, self.plan, self.weights = graph, plan, weights
        heads = "|".join(re.escape(prefix) for prefix in (plan.path, *prefixes))
        self.pattern = re.compile(rf"({heads})\.(\d+)(\..+)?")
        graph.sort()
        self.segment: dict[ir.Node, int] = {}
        self.same: dict[tuple[ir.Value, ir.Value], bool] = {}
        for node in graph:
            self.segment[node] = self._segment(node)
        self.nodes = [[n for n in graph if self.segment[n] == i] for i in range(plan.kept)]

    def layer(self, value: ir.Value) -> int:
        """The layer that a weight, an input or an output belongs to by its name; -1: none."""
        match = self.pattern.fullmatch(value.name or "")
        if match is None or (match[1] == self.plan.path and value.name not in self.weights):
            return -1
        return int(match[2])

    def renamed(self, value: ir.Value, layer: int) -> str:
        """Its name for another layer."""
        match = self.pattern.fullmatch(value.name or "")
        assert match is not None
        return f"{match[1]}.{layer}{match[3] or ''}"

    def _segment(self, node: ir.Node) -> int:
        if node.op_type in ("Shape", "Size") and all(v is None or v.producer() is None for v in node.inputs):
            return -1  # The length of one layer's cache is that of all.
        found = -1
        for value in node.inputs:
            if value is None:
                continue
            producer = value.producer()
            found = max(found, self.layer(value) if producer is None else self.segment[producer])
        return found

    def run(self) -> None:
        plan, kept = self.plan, self.plan.kept
        if any(isinstance(a.value, ir.Graph) for nodes in self.nodes for n in nodes for a in n.attributes.values()):
            raise NotRepeatable("a layer has a subgraph")
        self.crossing = [self._crossing(i) for i in range(kept - 1)]
        self._require_own_outputs()
        self._require_equal_kinds()
        self._rename_last()
        before = list(self.crossing[kept - 2])
        for layer, template in zip(range(kept - 1, plan.count - 1), plan.templates, strict=True):
            mapping = dict(zip(self.crossing[template - 1], before, strict=True))
            self._clone(template, layer, mapping)
            before = [mapping[value] for value in self.crossing[template]]
        # The last segment traced reads the last one cloned.
        mapping = dict(zip(self.crossing[kept - 2], before, strict=True))
        for node in self.nodes[-1]:
            for index, value in enumerate(node.inputs):
                if value is not None and value in mapping:
                    node.replace_input_with(index, mapping[value])
        self.graph.sort()

    def _crossing(self, index: int) -> list[ir.Value]:
        """The values of a segment that the next one reads, in the order in which it does."""
        found: dict[ir.Value, None] = {}
        for node in self.nodes[index + 1]:
            for value in node.inputs:
                producer = value.producer() if value is not None else None
                if value is None or producer is None:
                    continue
                if (owner := self.segment[producer]) == index:
                    found[value] = None
                elif 0 <= owner < index:
                    raise NotRepeatable(f"layer {index + 1} reads {value.name}, which layer {owner} computes")
        return list(found)

    def _require_own_outputs(self) -> None:
        for value in self.graph.outputs:
            producer = value.producer()
            owner = -1 if producer is None else self.segment[producer]
            named = self.layer(value)
            if (named >= 0 and owner >= 0 and named != owner) or (named < 0 and 0 <= owner < self.plan.kept - 1):
                raise NotRepeatable(f"the output {value.name} is computed by layer {owner}")

    def _require_equal_kinds(self) -> None:
        """Segments that serve for each other's kind are equal."""
        used = sorted(set(self.plan.templates))
        for first in used:
            if len(self.crossing[first]) != len(self.crossing[first - 1]):
                raise NotRepeatable(
                    f"layer {first} hands on {len(self.crossing[first])} values and gets another number"
                )
        for second in range(1, self.plan.kept - 1):
            for first in used:
                if first != second and self._like(first, second) and (why := self._difference(first, second)):
                    raise NotRepeatable(f"layers {first} and {second} differ in {why}")

    def _like(self, first: int, second: int) -> bool:
        """The two are of one kind and before layers of one kind, as far as their modules tell."""
        kinds = self.plan.kinds
        return kinds[first : first + 2] == kinds[second : second + 2]

    def _difference(self, first: int, second: int) -> str:
        """Where two segments differ; empty: nowhere."""
        a, b = self.nodes[first], self.nodes[second]
        if len(a) != len(b):
            return f"their number of nodes, {len(a)} and {len(b)}"
        same: dict[ir.Value, ir.Value] = dict(zip(self.crossing[first - 1], self.crossing[second - 1], strict=False))
        for one, other in zip(a, b, strict=True):
            if one.op_identifier() != other.op_identifier() or not _same_attributes(one, other):
                return f"{one.op_type} {one.name} and {other.op_type} {other.name}"
            if len(one.inputs) != len(other.inputs):
                return f"the inputs of {one.name} and {other.name}"
            for x, y in zip(one.inputs, other.inputs, strict=True):
                if not self._corresponds(x, y, same, second):
                    return f"what {one.op_type} {one.name} and {other.name} read"
            same |= dict(zip(one.outputs, other.outputs, strict=True))
        return ""

    def _corresponds(
        self, x: ir.Value | None, y: ir.Value | None, same: Mapping[ir.Value, ir.Value], layer: int
    ) -> bool:
        if x is y or x is None or y is None:
            return x is y
        if x in same:
            return same[x] is y
        if x.producer() is None and self.layer(x) >= 0:
            return self.renamed(x, layer) == y.name
        return self._same(x, y)

    def _same(self, x: ir.Value | None, y: ir.Value | None) -> bool:
        """Whether two values that no layer computes are equal: by what they're computed with, or constants."""
        if x is y or x is None or y is None:
            return x is y
        key = (x, y)
        if key not in self.same:
            self.same[key] = False  # There is no circle to ask again in.
            one, other = x.producer(), y.producer()
            if one is None or other is None or self.segment[one] >= 0 or self.segment[other] >= 0:
                self.same[key] = _same_constant(x, y)
            else:
                alike = one.op_identifier() == other.op_identifier() and _same_attributes(one, other)
                alike = alike and len(one.inputs) == len(other.inputs) and x.index() == y.index()
                self.same[key] = alike and all(map(self._same, one.inputs, other.inputs))
        return self.same[key]

    def _clone(self, template: int, layer: int, mapping: dict[ir.Value, ir.Value]) -> None:
        """Append the segment once more, for another layer; `mapping` gets what it made."""
        made = []
        for node in self.nodes[template]:
            inputs = [None if value is None else self._for_layer(value, layer, mapping) for value in node.inputs]
            copy = ir.Node(
                node.domain, node.op_type, inputs, list(node.attributes.values()), overload=node.overload,
                num_outputs=len(node.outputs), version=node.version, name=f"{node.name}.{layer}",
            )  # fmt: skip
            for old, new in zip(node.outputs, copy.outputs, strict=True):
                new.name = self.renamed(old, layer) if self.layer(old) >= 0 else f"{old.name}.{layer}"
                new.type, new.shape = old.type, old.shape.copy() if old.shape is not None else None
                mapping[old] = new
                if old.is_graph_output():
                    self.graph.outputs.append(new)
            made.append(copy)
        self.graph.extend(made)

    def _for_layer(self, value: ir.Value, layer: int, mapping: dict[ir.Value, ir.Value]) -> ir.Value:
        if value not in mapping:
            if value.producer() is not None or self.layer(value) < 0:
                return value
            new = ir.Value(name=self.renamed(value, layer), type=value.type, shape=value.shape)
            if value.is_graph_input():
                self.graph.inputs.append(new)
            else:
                new.const_value = value.const_value
                self.graph.register_initializer(new)
            mapping[value] = new
        return mapping[value]

    def _rename_last(self) -> None:
        """The last segment traced has the weights, inputs and outputs of the last layer of all."""
        last = self.plan.count - 1
        for node in self.nodes[-1]:
            for value in [*node.inputs, *node.outputs]:
                if value is not None and self.layer(value) == self.plan.kept - 1:
                    value.name = self.renamed(value, last)


def _same_attributes(one: ir.Node, other: ir.Node) -> bool:
    if one.attributes.keys() != other.attributes.keys():
        return False
    return all(_same_attribute(a, other.attributes[name]) for name, a in one.attributes.items())


def _same_attribute(a: ir.Attr, b: ir.Attr) -> bool:
    if a.type != b.type:
        return False
    if a.type == ir.AttributeType.TENSOR:
        return _same_tensor(a.as_tensor(), b.as_tensor())
    return bool(a.value == b.value)


def _same_constant(x: ir.Value, y: ir.Value) -> bool:
    a, b = ir.convenience.get_const_tensor(x), ir.convenience.get_const_tensor(y)
    return a is not None and b is not None and _same_tensor(a, b)


def _same_tensor(a: ir.TensorProtocol, b: ir.TensorProtocol) -> bool:
    return a is b or (a.dtype == b.dtype and a.shape == b.shape and a.nbytes < 1_000_000 and a.tobytes() == b.tobytes())
