"""Depth units: the residual branches that a model can do without, one by one or as layers.

A stream gives x + f(x) for every branch f. Without the branch x alone goes on, which is a valid model wherever x has
the shape of the sum. Which branches a model has is told by the residual analysis, which caches are an attention's by
dataflow, so that neither names nor architectures matter.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from typing import Any

import onnx_ir as ir

from graphopt.analysis.algebra import is_op
from graphopt.analysis.attention_sites import attention_sites
from graphopt.analysis.branches import NORMALIZATIONS, Branch, BranchKind, Placement, reads
from graphopt.analysis.residual import residual_streams
from graphopt.analysis.shapes import ShapeFacts
from graphopt.graph.cache_flow import CacheFlow
from graphopt.graph.constants import constant_tensor
from graphopt.graph.kv_interface import CachePair, KVInterface, kv_interface


@dataclasses.dataclass(frozen=True, eq=False)
class DepthUnit:
    """One residual branch whose input has the shape of its sum.

    Attributes:
        index: Its number among the units of the model, in the order of their additions, stream by stream.
        name: What it is called: its kind and the number of its layer, such as "attention.7"; a second one of a kind in
            one layer (the cross-attention of a decoder) is "attention.7.2".
        stream: The number of its stream, the longest first.
        layer: The number of its layer, counted over all streams: attention and the MLP that follows are one layer, any
            other branch is one by itself.
        kind: What it computes.
        placement: Where it is normalised.
        branch: The branch.
        norm: The normalization of the sum, where nothing else reads the sum: it may go with a post-LN branch.
        caches: What the attention keeps of earlier tokens, or reads of another sequence.
        bytes: Bytes of the constants that nothing but the branch reads.
    """

    index: int
    name: str
    stream: int
    layer: int
    kind: BranchKind
    placement: Placement
    branch: Branch
    norm: ir.Node | None
    caches: tuple[CachePair, ...]
    bytes: int

    @property
    def remainder(self) -> ir.Value:
        """What goes on without the branch: the other operand of the addition, as the graph is now."""
        value = self.branch.add.inputs[self.branch.operand]
        assert value is not None
        return value

    def result(self, without_norm: bool) -> ir.Value:
        """What `remainder` takes the place of: the sum, or its norm where that goes with a post-LN branch."""
        return self.norm.outputs[0] if self.norm is not None and without_norm else self.total

    @property
    def total(self) -> ir.Value:
        """The sum."""
        return self.branch.add.outputs[0]

    def to_dict(self) -> dict[str, Any]:
        """What a report says of it."""
        return {
            "name": self.name,
            "kind": self.kind,
            "layer": self.layer,
            "placement": self.placement,
            "node": self.branch.add.name,
            "bytes": self.bytes,
            "caches": [pair.past for pair in self.caches],
        }


@dataclasses.dataclass(frozen=True)
class DepthUnits:
    """What `depth_units` found.

    Attributes:
        units: The units.
        left: The additions of the other branches, each with the reason why it isn't one.
        interface: The interface of the decoder, None where the model has no cache.
    """

    units: tuple[DepthUnit, ...]
    left: tuple[tuple[ir.Node, str], ...]
    interface: KVInterface | None

    @property
    def layers(self) -> list[list[DepthUnit]]:
        """The units by layer, in order."""
        found: dict[int, list[DepthUnit]] = {}
        for unit in self.units:
            found.setdefault(unit.layer, []).append(unit)
        return list(found.values())

    def named(self, names: Iterable[str]) -> list[DepthUnit]:
        """The units with these names; a number alone is all of a layer.

        Raises:
            ValueError: There is no such unit.
        """
        wanted: set[DepthUnit] = set()
        for name in names:
            found = [u for u in self.units if name in (u.name, str(u.layer))]
            if not found:
                last = self.units[-1].name if self.units else "none"
                raise ValueError(f"the model has no branch {name!r}; its last one is {last!r}")
            wanted.update(found)
        return [unit for unit in self.units if unit in wanted]


def depth_units(model: ir.Model, facts: ShapeFacts) -> DepthUnits:
    """The units of the main graph, for a canonical model; the work is linear in its nodes.

    Args:
        model: The model.
        facts: Its shapes; with `believe_names`, dimensions of inputs that have one name are taken for equal.
    """
    interface = kv_interface(model)
    caches = _caches(model, interface)
    keys = {site.node: site.k.producer() for site in attention_sites(model, facts)}
    units: list[DepthUnit] = []
    left: list[tuple[ir.Node, str]] = []
    first = 0
    for number, stream in enumerate(residual_streams(model, facts)):
        layers = _layers(stream.branches, keys)
        for layer, branches in enumerate(layers, first):
            kinds: Counter[str] = Counter()
            for branch in branches:
                kinds[branch.kind] += 1
                if (reason := _obstacle(branch, facts)) is not None:
                    left.append((branch.add, reason))
                    continue
                name = f"{branch.kind}.{layer}" + (f".{kinds[branch.kind]}" if kinds[branch.kind] > 1 else "")
                own = tuple(pair for node in branch.nodes for pair in caches.get(node, ()))
                units.append(
                    DepthUnit(
                        len(units),
                        name,
                        number,
                        layer,
                        branch.kind,
                        branch.placement,
                        branch,
                        _norm_of_sum(branch),
                        own,
                        _bytes(branch),
                    )
                )
        first += len(layers)
    return DepthUnits(tuple(units), tuple(left), interface)


def _layers(branches: list[Branch], keys: dict[ir.Node, ir.Node | None]) -> list[list[Branch]]:
    """The branches by layer: an attention, the cross-attention that follows, and the MLP; any other by itself.

    Args:
        branches: Those of one stream.
        keys: What makes the keys, by attention.
    """
    found: list[list[Branch]] = []
    # Keys made in another branch of the stream are shared ones, not another sequence's.
    inside = {node for branch in branches for node in branch.nodes}
    for branch in branches:
        crosses = any(node in keys and keys[node] not in inside for node in branch.nodes)
        follows = bool(found) and found[-1][-1].kind == "attention"
        if follows and (branch.kind == "mlp" or (branch.kind == "attention" and crosses)):
            found[-1].append(branch)
        else:
            found.append([branch])
    return found


def _obstacle(branch: Branch, facts: ShapeFacts) -> str | None:
    """Why the addition can't be replaced by its other operand."""
    if branch.shortcut:
        return "the skip changes the shape of what it passes"
    kept, total = branch.add.inputs[branch.operand], branch.add.outputs[0]
    assert kept is not None
    types = {value.dtype or facts.dtype(value) for value in (kept, total)} - {None}
    if len(types) > 1:
        return "the skip has another type than the sum"
    return None if same_shape(kept, total, facts) else "the skip isn't known to have the shape of the sum"


def same_shape(a: ir.Value, b: ir.Value, facts: ShapeFacts, axes: slice = slice(None)) -> bool:
    """Whether two values are known to be equally large, along some axes."""
    first, second = facts.shape(a), facts.shape(b)
    return first is not None and second is not None and len(first) == len(second) and first[axes] == second[axes]


def _norm_of_sum(branch: Branch) -> ir.Node | None:
    total = branch.add.outputs[0]
    users = [user for user, _ in total.uses()]
    if branch.placement not in ("post", "both") or len(users) != 1 or total.is_graph_output():
        return None
    norm = users[0]
    alone = not any(value.uses() or value.is_graph_output() for value in norm.outputs[1:])
    return norm if is_op(norm, *NORMALIZATIONS) and norm.inputs[0] is total and alone else None


def _caches(model: ir.Model, interface: KVInterface | None) -> dict[ir.Node, list[CachePair]]:
    """The caches by the attention that reads them."""
    found: dict[ir.Node, list[CachePair]] = {}
    if interface is None:
        return found
    flow = CacheFlow(model)
    inputs = {value.name: value for value in model.graph.inputs}
    for pair in (*interface.pairs, *interface.cross):
        join = flow.join(inputs[pair.past])
        if join is not None and join.attention is not None:
            found.setdefault(join.attention, []).append(pair)
    return found


def exclusive(branch: Branch) -> set[ir.Node]:
    """The nodes of a branch, and those before them that serve nothing else."""
    inside = set(branch.nodes)
    pending = list(branch.nodes)
    while pending:
        for value in reads(pending.pop()):
            node = value.producer()
            if node is None or node in inside:
                continue
            if all(user in inside for out in node.outputs for user, _ in out.uses()) and not any(
                out.is_graph_output() for out in node.outputs
            ):
                inside.add(node)
                pending.append(node)
    return inside


def _bytes(branch: Branch) -> int:
    """Bytes of the constants that serve nothing else."""
    inside = exclusive(branch)
    constants: dict[ir.Value, int] = {}
    for node in inside:
        for value in (*reads(node), *node.outputs):
            if value.is_graph_input() or not all(user in inside for user, _ in value.uses()):
                continue
            tensor = constant_tensor(value)
            if tensor is not None:
                constants[value] = tensor.nbytes
    return sum(constants.values())
