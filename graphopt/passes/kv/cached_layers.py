"""Attentions with a cache of their own, and how one is let read the cache of another."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from graphopt.analysis.algebra import attribute_int
from graphopt.analysis.shapes import ShapeFacts, infer
from graphopt.graph.cache_flow import qualified
from graphopt.graph.edits import Editor
from graphopt.graph.kv_interface import CachePair, KVInterface, kv_interface
from graphopt.passes.base import Pass

_PAST, _MASK = 4, 3


@dataclasses.dataclass(frozen=True)
class CachedLayer:
    """An `Attention` that joins a cache, an input of the model, to new keys and values.

    Attributes:
        number: Number of the layer among those with a cache.
        node: The `Attention`.
        pairs: Its keys and its values at the interface.
        heads: Heads of the queries.
        kv_heads: Heads of the keys and values.
        depth: Elements of a head of the keys.
        joined: Whether its operands are [B, S, H·D].
        form: What layers must have in common to share a cache: types and sizes, among them the lengths of batch and
            past.
    """

    number: int
    node: ir.Node
    pairs: tuple[CachePair, CachePair]
    heads: int
    kv_heads: int
    depth: int
    joined: bool
    form: tuple[object, ...]

    @property
    def presents(self) -> tuple[ir.Value, ir.Value]:
        """Keys and values of past and new tokens, [B, H, P + S, D]."""
        return self.node.outputs[1], self.node.outputs[2]


@dataclasses.dataclass(frozen=True)
class Caches:
    """What a pass starts from that works on the caches of a decoder.

    Attributes:
        interface: Inputs and outputs of the decoder.
        facts: Its shapes.
        layers: Those that can be worked on, by number.
        left: Of the others the node and the reason.
    """

    interface: KVInterface
    facts: ShapeFacts
    layers: dict[int, CachedLayer]
    left: dict[int, tuple[ir.Node | None, str]]

    @classmethod
    def of(cls, rule: Pass, model: ir.Model, what: str = "cache") -> Caches | None:
        """Read them, and let `rule` tell why the `what` of other layers stays; None: the model has no cache."""
        interface = kv_interface(model)
        if interface is None or not interface.pairs:
            return None
        facts = infer(model, believe_names=True)
        layers, left = cached_layers(model, interface, facts)
        for node, reason in left.values():
            if node is not None:
                rule.left(node, f"its {what} {'stay' if what.endswith('s') else 'stays'}: {reason}")
        return cls(interface, facts, layers, left)


def cached_layers(
    model: ir.Model, interface: KVInterface, facts: ShapeFacts
) -> tuple[dict[int, CachedLayer], dict[int, tuple[ir.Node | None, str]]]:
    """The layers with a cache, by number: those that can be worked on, and of the others the node and the reason."""
    values = {value.name: value for value in model.graph.inputs}
    found: dict[int, CachedLayer] = {}
    left: dict[int, tuple[ir.Node | None, str]] = {}
    for number in range(interface.layers):
        pairs = [pair for pair in interface.pairs if pair.layer == number]
        node = next((user for pair in pairs for user, _ in values[pair.past].uses() if _joins(user)), None)
        if [pair.part for pair in pairs] != ["key", "value"] or node is None:
            operators = ", ".join(sorted({pair.operator for pair in pairs}))
            left[number] = (node, f"its cache is joined by {operators}, not by Attention")
            continue
        layer = _read(model, number, node, (pairs[0], pairs[1]), facts)
        if isinstance(layer, str):
            left[number] = (node, layer)
        else:
            found[number] = layer
    return found, left


def _joins(node: ir.Node) -> bool:
    return qualified(node) == "Attention" and len(node.inputs) > _PAST + 1 and node.inputs[_PAST] is not None


def _read(
    model: ir.Model, number: int, node: ir.Node, pairs: tuple[CachePair, CachePair], facts: ShapeFacts
) -> CachedLayer | str:
    """The layer at an `Attention`, or why it can't be worked on."""
    if node.graph is not model.graph:
        return "it stands in a subgraph"
    if any(attribute.is_ref() for attribute in node.attributes.values()):
        return "an attribute is set by the caller of its function"
    if len(node.inputs) > _PAST + 2 and any(value is not None for value in node.inputs[_PAST + 2 :]):
        return "it reads the lengths of its keys from an input"
    if len(node.outputs) > 3 and (node.outputs[3].uses() or node.outputs[3].is_graph_output()):
        return "its scores are read"
    pasts = node.inputs[_PAST : _PAST + 2]
    if [None if value is None else value.name for value in pasts] != [pair.past for pair in pairs]:
        return "its past isn't an input of the model as it is"
    if len(node.outputs) < 3 or [value.name for value in node.outputs[1:3]] != [pair.present for pair in pairs]:
        return "its present isn't an output of the model as it is"
    if any(_beside_others(user, node) for present in node.outputs[1:3] for user, _ in present.uses()):
        return "its keys or values are read by an attention with others beside them"
    query, shapes = node.inputs[0], [facts.shape(value) for value in pasts]
    shape = None if query is None else facts.shape(query)
    if shape is None or query is None or any(one is None or len(one) != 4 for one in shapes):
        return "the ranks of its operands aren't certain"
    keys, values = (one for one in shapes if one is not None)
    kv_heads = keys[1].value or attribute_int(node, "kv_num_heads", 0)
    joined = len(shape) == 3
    heads = attribute_int(node, "q_num_heads", 0) if joined else shape[1].value
    depth = keys[3].value or (shape[3].value if not joined else None)
    if not heads or not kv_heads or not depth:
        return "the sizes of its heads aren't certain"
    form = (facts.dtype(query), kv_heads, depth, keys[0], keys[2], values[0], values[2], values[3])
    return CachedLayer(number, node, pairs, heads, kv_heads, depth, joined, form)


def new_rows(layer: CachedLayer, slot: int, edit: Editor) -> ir.Value:
    """The new keys (slot 1), rotated, or values (slot 2) of a layer, [B, KV, S, D]; written at the editor's site."""
    value = layer.node.inputs[slot]
    assert value is not None
    if not layer.joined:
        return value
    sizes = edit.constant(np.array([0, 0, layer.kv_heads, -1]), "heads")
    return edit.op("Transpose", [edit.op("Reshape", [value, sizes])], {"perm": [0, 2, 1, 3]})


def _beside_others(user: ir.Node, node: ir.Node) -> bool:
    """Whether an attention reads the keys or the values of `node` alone."""
    return qualified(user) == "Attention" and list(user.inputs[1:3]) != list(node.outputs[1:3])


class Sharing:
    """Lets layers read the caches of earlier ones."""

    def __init__(self, edit: Editor, facts: ShapeFacts) -> None:
        self._edit, self._facts = edit, facts
        self._causal: dict[object, ir.Value] = {}

    def share(self, layer: CachedLayer, donor: CachedLayer) -> None:
        """Let `layer` read keys and values of `donor`, which comes before it; its own projections and what leads to
        them go, and so do its outputs. Its cache inputs stay: see `graphopt.graph.kv_edits.remove_pairs`."""
        keys, values = donor.presents
        y = self.write(layer, keys, values)
        edit, old = self._edit, layer.node
        edit.replace(old.outputs[0], y)
        for present in old.outputs[1:3]:
            edit.model.graph.outputs.remove(present)
        edit.remove_dead(old)

    def write(self, layer: CachedLayer, keys: ir.Value, values: ir.Value) -> ir.Value:
        """What the attention of `layer` gives on other `keys` and `values` [B, H, P + S, D], past and new.

        Without a past the operator aligns its causal mask at the first key, so that a mask says what a query sees.
        """
        edit, node = self._edit, layer.node
        edit.at(node)
        query = node.inputs[0]
        assert query is not None
        mask = node.inputs[_MASK]
        if attribute_int(node, "is_causal", 0):
            mask = self._with_causal(mask, query, layer, keys)
        if layer.joined:
            sizes = edit.constant(np.array([0, 0, layer.heads, layer.depth]), "heads")
            query = edit.op("Transpose", [edit.op("Reshape", [query, sizes])], {"perm": [0, 2, 1, 3]})
        gone = ("is_causal", "q_num_heads", "kv_num_heads")
        attributes = {name: a.value for name, a in node.attributes.items() if name not in gone}
        inputs = [query, keys, values] + ([mask] if mask is not None else [])
        result = node.outputs[0]
        if not layer.joined:
            return edit.op("Attention", inputs, attributes, like=result)
        y = edit.op("Transpose", [edit.op("Attention", inputs, attributes)], {"perm": [0, 2, 1, 3]})
        return edit.op("Reshape", [y, edit.constant(np.array([0, 0, -1]), "joined")], like=result)

    def _with_causal(self, mask: ir.Value | None, query: ir.Value, layer: CachedLayer, keys: ir.Value) -> ir.Value:
        """A mask by which a query sees the past, the new keys up to its own, and of these what `mask` lets it see."""
        edit = self._edit
        axis = 1 if layer.joined else 2
        shape = self._facts.shape(query)
        causal = self._causal.get(key := (None if shape is None else shape[axis], layer.form))
        if causal is None:
            zero, one = edit.constant(np.array(0), "zero"), edit.constant(np.array(1), "one")
            first = edit.constant(np.array([0]), "first")
            total = edit.op("Squeeze", [edit.op("Shape", [keys], {"start": 2, "end": 3}), first])
            new = edit.op("Squeeze", [edit.op("Shape", [query], {"start": axis, "end": axis + 1}), first])
            places = edit.op("Range", [zero, total, one])
            rows = edit.op("Range", [edit.op("Sub", [total, new]), total, one])
            column = edit.op("Unsqueeze", [rows, edit.constant(np.array([1]), "axis")])
            causal = self._causal[key] = edit.op("LessOrEqual", [places, column])
        if mask is None:
            return causal
        dtype = self._facts.dtype(mask) or mask.dtype
        if dtype == ir.DataType.BOOL:
            return edit.op("And", [mask, causal])
        assert dtype is not None
        number = dtype.numpy()
        hidden = [edit.constant(np.array(n, dtype=number), "hidden") for n in (0.0, -np.inf)]
        return edit.op("Add", [mask, edit.op("Where", [causal, *hidden])])
