"""Edits of an `onnx_ir` graph that keep it valid after every step.

`Editor` is what passes write through: it names new nodes and values uniquely over the whole model
(subgraphs see outer values, so a name that is unique in one graph only is not enough), keeps the names
of graph outputs, removes what became dead, and remembers what was touched for the work list.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.graph.constants import AT_LOAD

_WITH_GRAPHS = frozenset({"If", "Loop", "Scan", "SequenceMap"})
"""Operators of the default domain that hold graphs; those of other domains may too."""


OWN_DOMAIN = "ai.graphopt"
"""The domain of graphopt's own operators. Functions in it are their portable bodies: nothing of the model's own."""


def functions(model: ir.Model) -> Iterator[ir.Function]:
    """The functions of a model but the bodies of graphopt's own operators, which no pass looks into."""
    return (function for function in model.functions.values() if function.domain != OWN_DOMAIN)


def walk(model: ir.Model) -> Iterator[ir.Graph]:
    """The main graph, every subgraph, and the bodies of `functions` with theirs, outer before inner."""
    yield model.graph
    yield from inner_graphs(model.graph)
    for function in functions(model):
        yield function.graph
        yield from inner_graphs(function.graph)


def inner_graphs(graph: ir.Graph) -> Iterator[ir.Graph]:
    """The graphs in the nodes of `graph`, at any depth, outer before inner."""
    # onnx_ir's `subgraphs` looks at every attribute of every node, which takes half of the time of a short pass.
    for node in graph:
        if node.op_type in _WITH_GRAPHS or node.domain != "":
            for inner in subgraphs_of(node):
                yield inner
                yield from inner_graphs(inner)


def nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Every node of `walk(model)`, graph by graph, each in the order of its list."""
    for graph in walk(model):
        yield from graph


def sort(model: ir.Model) -> None:
    """Bring the nodes of every graph into topological order, those that are in order left as they are.

    Raises:
        ValueError: A graph has a cycle; the message names it.
    """
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        if not _in_order(graph, set()):  # which takes a fifth of the time of sorting
            try:
                graph.sort()  # and the graphs in it
            except ValueError as error:
                raise ValueError(f"the graph {graph.name!r} has a cycle, so no order of its nodes runs.") from error


def _in_order(graph: ir.Graph, made: set[ir.Node]) -> bool:
    """Whether every node of a graph, and of those in it, comes after what it reads; `made` are the nodes before it."""
    for node in graph:
        for value in node.inputs:
            if value is not None and (producer := value.producer()) is not None and producer not in made:
                return False
        if node.op_type in _WITH_GRAPHS or node.domain != "":
            for inner in subgraphs_of(node):
                if not _in_order(inner, made):
                    return False
        made.add(node)
    return True


def opset(model: ir.Model) -> int:
    """The version of the default domain that the main graph imports (0 where it imports none)."""
    imports = model.graph.opset_imports
    return imports.get("", imports.get("ai.onnx", 0))


class Names:
    """All names in use in a model, to make new ones that clash with none."""

    def __init__(self, model: ir.Model) -> None:
        self._used: set[str] = set()
        for graph in walk(model):
            self._used.update(v.name for v in graph.inputs if v.name)
            self._used.update(graph.initializers)
            for node in graph:
                if node.name:
                    self._used.add(node.name)
                self._used.update(v.name for v in node.outputs if v.name)

    def fresh(self, base: str) -> str:
        """`base`, or `base_2`, `base_3`, ... where it is taken; the result counts as taken."""
        name, count = base, 1
        while name in self._used:
            count += 1
            name = f"{base}_{count}"
        self._used.add(name)
        return name


class Editor:
    """Writes to a model on behalf of one pass.

    `at(node)` sets the site: new nodes are inserted before that node and are named after it.
    """

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self._function_graphs = {f.graph for f in model.functions.values()}
        for function in model.functions.values():
            self._function_graphs.update(function.subgraphs())
        self._site: ir.Node | None = None
        self._touched: dict[ir.Node, None] = {}
        self._made: list[ir.Node] = []
        self._for_load = False

    @functools.cached_property
    def names(self) -> Names:
        """The names in use, gathered when the first new one is asked for: most passes change nothing."""
        return Names(self.model)

    @property
    def opset(self) -> int:
        """Version of the default domain at the site (a function has imports of its own)."""
        if self._site is not None and self._site.graph in self._function_graphs:
            for function in self.model.functions.values():
                if self._site.graph is function.graph or self._site.graph in set(function.subgraphs()):
                    return function.opset_imports.get("", opset(self.model))
        return opset(self.model)

    def at(self, node: ir.Node) -> None:
        """Make `node` the site of the edits that follow."""
        self._site = node

    # ---- making things

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        domain: str = "",
        outputs: int = 1,
        like: ir.Value | None = None,
    ) -> ir.Value:
        """Insert a node before the site and return its first output.

        Args:
            op_type: The operator.
            inputs: Its inputs; None for an omitted optional one.
            attributes: Python values; None values are left out.
            domain: The operator's domain.
            outputs: How many outputs the node has.
            like: A value whose type and shape the first output takes over.
        """
        site = self._require_site()
        base = self.names.fresh(f"{site.name or site.op_type}/{op_type}")
        values = [ir.Value(name=self.names.fresh(f"{base}:{i}")) for i in range(outputs)]
        node = ir.node(
            op_type,
            list(inputs),
            {k: v for k, v in (attributes or {}).items() if v is not None},
            domain=domain,
            outputs=values,
            name=base,
        )
        if self._for_load:
            node.metadata_props[AT_LOAD] = ""
        if like is not None:
            values[0].type = like.type
            values[0].shape = None if like.shape is None else ir.Shape(like.shape)
        assert site.graph is not None
        site.graph.insert_before(site, node)
        self._touched[node] = None
        self._made.append(node)
        return values[0]

    @contextlib.contextmanager
    def for_load(self) -> Iterator[None]:
        """Within it nodes are made on constants, for sessions to compute when they are loaded: no pass folds them."""
        before, self._for_load = self._for_load, True
        try:
            yield
        finally:
            self._for_load = before

    def made(self) -> int:
        """How many nodes `op` has made: a mark for `discard`."""
        return len(self._made)

    def discard(self, mark: int) -> None:
        """Remove the nodes made since `mark` that nothing uses: a rewrite that fails halfway leaves nothing behind."""
        for node in reversed(self._made[mark:]):
            if node.graph is not None:
                self.remove_dead(node)
        del self._made[mark:]
        self._touched = {node: None for node in self._touched if node.graph is not None}

    def constant(self, array: npt.NDArray[Any] | ir.TensorProtocol, name: str = "constant") -> ir.Value:
        """A new constant visible at the site: an initializer, or a Constant node inside a function."""
        site = self._require_site()
        label = self.names.fresh(f"{site.name or site.op_type}/{name}")
        tensor = ir.tensor(np.asarray(array, order="C"), name=label) if isinstance(array, np.ndarray) else array
        graph = site.graph
        assert graph is not None
        if graph in self._function_graphs:
            node = ir.node(
                "Constant",
                [],
                {"value": tensor},
                outputs=[ir.Value(name=label, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()))],
                name=self.names.fresh(f"{label}/Constant"),
            )
            graph.insert_before(site, node)
            return node.outputs[0]
        value = ir.Value(
            name=label, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
        )
        graph.register_initializer(value)
        return value

    # ---- replacing things

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Let `new` take the place of `old` everywhere; a graph output keeps its name and declared type.

        The producer of `old`, and whatever becomes dead with it, is removed.
        """
        self._touch_around(old)
        self._touch_around(new)
        producer = old.producer()
        if old.is_graph_output():
            new = self._as_output(old, new)
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        if new.type is None:
            new.type = old.type
        if new.shape is None:
            new.shape = old.shape
        if producer is not None:
            self.remove_dead(producer)

    def _as_output(self, old: ir.Value, new: ir.Value) -> ir.Value:
        """A value that may stand in `old`'s place among the graph outputs, under `old`'s name."""
        graph, producer = old.graph, new.producer()
        taken = (
            producer is None
            or producer.graph is not graph
            or new.is_graph_output()
            or new.is_graph_input()
            or new.is_initializer()
        )
        if taken:
            # An input, an initializer, an outer value or another output can't be renamed.
            site, self._site = self._site, old.producer() or self._site
            new = self.op("Identity", [new], like=old)
            self._site = site
        name = old.name
        old.name = self.names.fresh(f"{name}/replaced")
        new.name = name
        # Not the shape that `new` declares where `old` declares none: in real files such shapes are false at times.
        new.type, new.shape = old.type or new.type, old.shape
        return new

    def set_input(self, node: ir.Node, index: int, value: ir.Value | None) -> None:
        """Replace one input of `node`; the old producer, or the old initializer, is removed where it became dead."""
        old = node.inputs[index]
        node.replace_input_with(index, value)
        self._touched[node] = None
        if value is not None:
            self._touch_around(value)
        if old is None:
            return
        if (producer := old.producer()) is not None:
            self.remove_dead(producer)
        else:
            self._drop_unused_initializer(old)

    def remove_dead(self, node: ir.Node) -> None:
        """Remove `node` and its ancestors as far as nothing uses them (also initializers left unused)."""
        stack = [node]
        while stack:
            current = stack.pop()
            if current.graph is None or any(out.uses() or out.is_graph_output() for out in current.outputs):
                continue
            inputs = [v for v in current.inputs if v is not None]
            captured = list(captured_values(current))
            for graph in subgraphs_of(current):
                # Detach the bodies, nested ones too, so that what they captured no longer counts as used or given out.
                for inner in list(graph.all_nodes()):
                    for i in range(len(inner.inputs)):
                        inner.replace_input_with(i, None)
                for body in (graph, *graph.subgraphs()):
                    body.outputs.clear()
            current.graph.remove(current, safe=True)
            for value in dict.fromkeys(inputs + captured):
                if (producer := value.producer()) is not None:
                    stack.append(producer)
                    self._touch_around(value)
                else:
                    self._drop_unused_initializer(value)

    def _drop_unused_initializer(self, value: ir.Value) -> None:
        if value.is_initializer() and not (value.uses() or value.is_graph_output() or value.is_graph_input()):
            owner = value.graph
            if owner is not None and value.name is not None:
                owner.initializers.pop(value.name, None)

    # ---- the work list

    def _touch_around(self, value: ir.Value) -> None:
        if (producer := value.producer()) is not None:
            self._touched[producer] = None
        for consumer, _ in value.uses():
            self._touched[consumer] = None

    def drain_touched(self) -> Iterable[ir.Node]:
        """The nodes beside the edits since the last call; the record is emptied."""
        touched, self._touched = self._touched, {}
        return touched

    def _require_site(self) -> ir.Node:
        if self._site is None or self._site.graph is None:
            raise RuntimeError("Editor.at(node) must name a node of the graph before an edit is made.")
        return self._site


def subgraphs_of(node: ir.Node) -> Iterator[ir.Graph]:
    """The graphs in the attributes of one node (not those nested deeper)."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref():
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS and not attribute.is_ref():
            yield from attribute.as_graphs()


def captured_values(node: ir.Node) -> Iterator[ir.Value]:
    """Values of outer graphs that the subgraphs of `node` use, at any depth."""
    for graph in subgraphs_of(node):
        inside = {graph, *graph.subgraphs()}
        for inner in graph.all_nodes():
            for value in inner.inputs:
                if value is not None and value.graph is not None and value.graph not in inside:
                    yield value
        for value in graph.outputs:
            if value.graph is not None and value.graph not in inside:
                yield value
