"""deduplicate-initializers: equal weights stored once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import ClassVar

import onnx_ir as ir

from graphopt.graph.content import same_content, sample
from graphopt.graph.edits import Names, functions, subgraphs_of
from graphopt.passes.base import Pass

SHARED_BYTES = 1 << 10
"""From this size on an initializer of a subgraph is shared with other graphs; smaller ones stay with their readers."""
REPORTED_BYTES = 1 << 14
"""From this size on equal bytes in another shape are reported."""

SHARED_WITH = frozenset({"MatMul", "Gemm", "LSTM"})
"""Operators that ONNX Runtime was measured to run as fast with a weight of an outer graph as with one of their own. A
Conv isn't: 1.5 times the time, since its weights are laid out for the processor in their own graph only."""

_Kept = dict[Hashable, list[ir.Value]]


class DeduplicateInitializers(Pass):
    """Store equal initializers once and let all their users read that one.

    Finds what exporters write twice: tied embeddings and lm_heads, the constants of each layer, equal layers (ALBERT
    and its like, exported with a copy for each layer). Equal means the same type, shape and bytes. A weight that other
    passes compute only when the model is saved is equal to another that is computed in the same way from the same.

    An initializer of a subgraph (a branch, a loop body) is compared with those of its graph and of the graphs around
    it, and where two subgraphs of the main graph hold the same one, it moves to the main graph, which all of them see.
    `lift-constants` first makes initializers of Constant nodes. Only weights of MatMul, Gemm and LSTM are shared across
    graphs: ONNX Runtime doesn't prepare the weights of a Conv that stand in another graph.

    **Needs:** nothing. **Guarantees:** the same numbers, bit for bit; the file doesn't grow. Initializers that are
    graph inputs (they can be overridden) or outputs stay.

    **Left alone, with the reason:** weights of 16 KiB and more with the bytes of another in another shape: a Reshape at
    every run would be the price of storing them once. Copies in two graphs that other operators read.

    **Why not onnx_ir's DeduplicateHashedInitializersPass:** it reads and hashes every weight (SHA-512 over 540 MB takes
    longer than all other clean-ups together). Here weights are read only if type, shape and a sample of the bytes are
    equal, and then block by block.

    **When not to use it:** before training goes on with the file: tied weights stay tied.
    """

    name: ClassVar[str] = "deduplicate-initializers"
    family: ClassVar[str] = "clean"
    bitwise: ClassVar[bool] = True

    def apply(self, model: ir.Model) -> bool:
        """See the class."""
        self._taken: dict[ir.Graph, set[str]] = {}
        unshared: _Kept = defaultdict(list)
        changed = self._visit(model.graph, [], unshared)
        for function in functions(model):
            # A function sees no graph but its own.
            changed |= self._visit(function.graph, [], defaultdict(list))
        return self._hoist(model, unshared) or changed

    def _visit(self, graph: ir.Graph, around: list[tuple[ir.Graph, _Kept]], unshared: _Kept) -> bool:
        """Merge within `graph` and with the graphs around it, then within its subgraphs."""
        alike: dict[Hashable, list[ir.Value]] = defaultdict(list)
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None or value.is_graph_input() or value.is_graph_output():
                continue
            if tensor.dtype != ir.DataType.STRING:
                alike[tensor.dtype, tuple(tensor.shape.numpy())].append(value)
        inner = [sub for node in graph for sub in subgraphs_of(node)]
        kept: _Kept = defaultdict(list)
        changed = False
        for form, values in alike.items():
            if len(values) == 1 and not inner and not around:
                continue  # nothing could be equal to it, so nothing is read of it
            for value in values:
                key = (form, sample(_tensor(value)))
                twin = self._twin(value, key, kept, around, graph)
                if twin is not None:
                    self._merge(value, twin)
                    changed = True
                    continue
                kept[key].append(value)
                if around and _tensor(value).nbytes >= SHARED_BYTES:
                    unshared[key].append(value)
        self._report_reshaped([value for values in alike.values() for value in values if value.is_initializer()])
        for sub in inner:
            changed |= self._visit(sub, [*around, (graph, kept)], unshared)
        return changed

    def _twin(
        self, value: ir.Value, key: Hashable, kept: _Kept, around: list[tuple[ir.Graph, _Kept]], graph: ir.Graph
    ) -> ir.Value | None:
        """An equal initializer that the readers of `value` can read instead."""
        found = _equal(value, kept.get(key, ()))
        if found is not None or _tensor(value).nbytes < SHARED_BYTES:
            return found
        between = [graph]
        for outer, held in reversed(around):
            found = _equal(value, held.get(key, ()))
            if found is not None and not self._shareable(value, found):
                return None
            if found is not None and not any(found.name in self._names(inner) for inner in between):
                return found
            between.append(outer)
        return None

    def _shareable(self, value: ir.Value, twin: ir.Value) -> bool:
        """Whether the readers of `value` run as fast with a weight of an outer graph; says so where they don't."""
        for user, _ in value.uses():
            if user.op_type not in SHARED_WITH or user.domain != "":
                return self.left(
                    user, f"reads {value.name!r}, a copy of {twin.name!r} in another graph: slower if shared"
                )
        return True

    def _names(self, graph: ir.Graph) -> set[str]:
        """The names that stand for something of `graph` itself."""
        if graph not in self._taken:
            values = [*graph.inputs, *graph.initializers.values(), *(out for node in graph for out in node.outputs)]
            self._taken[graph] = {value.name for value in values if value.name}
        return self._taken[graph]

    def _merge(self, value: ir.Value, twin: ir.Value) -> None:
        if (first := next(iter(value.uses()), None)) is not None:
            self.applied(first.node, f"reads {twin.name!r} instead of its copy {value.name!r}")
        graph = value.graph
        value.replace_all_uses_with(twin)
        assert value.name is not None
        assert graph is not None
        graph.initializers.pop(value.name)

    def _hoist(self, model: ir.Model, unshared: _Kept) -> bool:
        """Move what two subgraphs of the main graph hold alike into the main graph."""
        changed = False
        names: Names | None = None
        for values in unshared.values():
            kept: list[ir.Value] = []
            for value in values if len(values) > 1 else ():
                twin = _equal(value, kept)
                if twin is None:
                    kept.append(value)
                    continue
                if not self._shareable(value, twin) or not (twin.graph is model.graph or self._shareable(twin, value)):
                    continue
                if twin.graph is not model.graph:
                    names = names or Names(model)
                    name = names.fresh(f"{twin.name}/shared")
                    moved = ir.Value(name=name, type=twin.type, shape=twin.shape, const_value=twin.const_value)
                    model.graph.register_initializer(moved)
                    kept[kept.index(twin)] = moved
                    self._merge(twin, moved)
                    twin = moved
                self._merge(value, twin)
                changed = True
        return changed

    def _report_reshaped(self, values: list[ir.Value]) -> None:
        """Say where two large weights have the same bytes in different shapes."""
        large: dict[Hashable, list[ir.Value]] = defaultdict(list)
        for value in values:
            tensor = _tensor(value)
            if tensor.nbytes >= REPORTED_BYTES and not isinstance(tensor, ir.LazyTensor):
                large[tensor.dtype, tensor.nbytes].append(value)
        for group in large.values():
            if len({tuple(_tensor(value).shape.numpy()) for value in group}) < 2:
                continue
            first: dict[Hashable, ir.Value] = {}
            for value in group:
                twin = first.setdefault(sample(_tensor(value)), value)
                use = next(iter(value.uses()), None)
                if twin is not value and use is not None and same_content(_tensor(twin), _tensor(value)):
                    shape = " × ".join(map(str, _tensor(twin).shape.numpy()))
                    self.left(use.node, f"{value.name!r} has the bytes of {twin.name!r} in another shape ({shape})")


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    assert value.const_value is not None
    return value.const_value


def _equal(value: ir.Value, candidates: Sequence[ir.Value]) -> ir.Value | None:
    return next((other for other in candidates if same_content(_tensor(other), _tensor(value))), None)
