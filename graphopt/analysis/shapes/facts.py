"""Sound shapes, element types and small contents of every value of a model.

"Sound" means: in every run that the ONNX standard allows, a proven fact is true. So nothing is taken from a file
that ONNX Runtime doesn't enforce (measured on 1.31). Declared shapes of intermediate values and outputs are ignored.
Of graph inputs the element type, the rank (unless 0) and the constant sizes are trusted; every other size is a symbol
of its own, also where two share a `dim_param`, because real files declare one name for different sizes and ONNX
Runtime doesn't check them. An input declared as a scalar is accepted with any shape, so its shape is unknown.

Why not the package onnx-shape-inference 0.2 (also symbolic, also on onnx_ir): on real models it gave no shape to 213 of
354 values of a TorchScript MiniLM, raised on a dim_param "?", and takes equal dim_params for equal sizes. Why not
`onnx.shape_inference`: it merges declared shapes, needs protobufs under 2 GB, and knows no symbolic arithmetic.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from graphopt.analysis.dims import Dim
from graphopt.analysis.shapes import control, fallback
from graphopt.analysis.shapes.reduction import tensor_fact
from graphopt.analysis.shapes.rule import (
    MAX_CONTENT,
    NOTHING,
    RULES,
    Content,
    Entry,
    Fact,
    Op,
    Result,
    Shape,
    TypeSource,
    UnknownShapeError,
)
from graphopt.graph.edits import opset, subgraphs_of, walk

MAX_CALLS = 2_000
"""Nodes of function bodies that are followed through their calls; further calls are unknown."""

KEPT_KEY = "graphopt.shapes.kept"
"""`model.meta` key of facts that are known to hold still. The next `infer` takes and returns them: whoever changes the
model and asks again gets new ones."""
MADE_KEY = "graphopt.shapes.made"
"""`model.meta` key of the facts that were made last, where somebody keeps them there, whether or not the model has
changed since: new ones take from them what they say of nodes that read the same as then."""

RULE_FAULTS = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError)
"""What a rule may meet in a malformed node (missing inputs, wrong ranks, bad attributes): the node is then unknown."""


class ShapeFacts:
    """What is known of the values of one model. Made by `infer`.

    Values that a pass adds later are inferred when they are asked for. Facts stay right while a pass replaces values
    by equal ones; a pass that changes what an existing value *means* makes new facts.

    Attributes:
        faults: Nodes whose rule failed in an unexpected way (malformed nodes, or faults of a rule), for tests.
    """

    def __init__(self, model: ir.Model, *, believe_names: bool = False, earlier: ShapeFacts | None = None) -> None:
        self.model = model
        self.faults: list[str] = []
        self._facts: dict[ir.Value, Fact] = {}
        self._inferred: dict[ir.Node, _Inferred] = {}
        self._sources: dict[ir.Value, tuple[ir.TensorProtocol, Fact]] = {}
        if earlier is None and not believe_names:
            earlier = model.meta.get(MADE_KEY)
        self._earlier = ({}, {}) if earlier is None else (earlier._inferred, earlier._sources)
        self._opset = opset(model)
        self._opsets: dict[object, int] = {}
        self._calls = 0
        self._active: set[ir.Node] = set()
        # Of graphopt's own operators a rule says more than their bodies, which are written for any sizes.
        self._functions = {
            key: function for key, function in model.functions.items() if f"{key[0]}::{key[1]}" not in RULES
        }
        for function in model.functions.values():
            version = function.opset_imports.get("", self._opset)
            for graph in (function.graph, *function.subgraphs()):
                self._opsets[graph] = version
        for value in model.graph.inputs:
            fact = _input_fact(value, believe_names)
            self._facts[value] = fact if earlier is None else _kept(earlier._facts.get(value), fact)

    # ---- what is known

    def fact(self, value: ir.Value | None) -> Fact:
        """Everything known of `value`; inferred now where it is new. Never raises."""
        if value is None:
            return NOTHING
        known = self._facts.get(value)
        if known is None:
            producer = value.producer()
            if producer is None:
                known = self._facts[value] = self._source(value)
            else:
                self.infer_node(producer)
                known = self._facts.get(value, NOTHING)
        return known

    def dtype(self, value: ir.Value | None) -> ir.DataType | None:
        """The element type of `value`; None where unknown or where it is no tensor."""
        return self.fact(value).dtype

    def shape(self, value: ir.Value | None) -> Shape | None:
        """The dimensions of `value`; None where its rank isn't known."""
        return self.fact(value).shape

    def data(self, value: ir.Value | None) -> Content | None:
        """The elements of an integer or bool tensor of at most 64 elements, as an array of `Dim` of its shape.

        None where they aren't known. Don't write into the array; `.tolist()` gives nested lists, `.flat` the elements.
        """
        return self.fact(value).content

    def learn(self, value: ir.Value, fact: Fact) -> None:
        """Record a fact proven elsewhere, for example that of a value which `value` replaces."""
        self._facts[value] = fact

    def basis(self, node: ir.Node) -> object | None:
        """An object that stays the same in later facts while `node`, what it reads and what is known of that do.

        None where that can't be told (control flow, calls of functions).
        """
        return self._inferred.get(node)

    def values(self) -> Iterable[tuple[ir.Value, Fact]]:
        """All values met so far with their facts, in the order in which they were met."""
        return self._facts.items()

    # ---- inferring

    def infer_node(self, node: ir.Node) -> None:
        """Infer the outputs of `node`, and first whatever they depend on that isn't known yet."""
        if self._unchanged(node):
            return
        stack = [node]
        while stack:
            current = stack[-1]
            if all(out in self._facts for out in current.outputs) and current.outputs:
                stack.pop()
                continue
            if current not in self._active and (waiting := self._producers(current)):
                self._active.add(current)
                waiting = [p for p in waiting if p not in self._active]
                if waiting:
                    stack.extend(reversed(waiting))
                    continue
            stack.pop()
            self._active.discard(current)
            if not self._unchanged(current):
                self._infer(current)

    def _unchanged(self, node: ir.Node) -> bool:
        """Take from the earlier facts what they say of `node`, where it is and reads the same as then.

        That is: the very objects, since attributes and facts never change.
        """
        earlier = self._earlier[0].get(node)
        if earlier is None or node.inputs != earlier.inputs:
            return False
        for value, fact in zip(earlier.inputs, earlier.facts, strict=True):
            if value is not None:
                known = self._facts.get(value)
                if known is None:
                    if value.producer() is not None:
                        return False  # it has to be inferred first
                    known = self._facts[value] = self._source(value)
                if known is not fact:
                    return False
        attributes = node.attributes.data.values()
        if len(attributes) != len(earlier.attributes) or not all(map(operator.is_, attributes, earlier.attributes)):
            return False
        if earlier.operator != (node.domain, node.op_type, len(node.outputs), self._version(node)):
            return False
        if self._functions and node.op_identifier() in self._functions:
            return False
        for value, fact in zip(node.outputs, earlier.outputs, strict=True):
            self._facts.setdefault(value, fact)
        self._inferred[node] = earlier
        return True

    def _infer(self, node: ir.Node) -> None:
        inputs = [None if v is None else self.fact_if_known(v) for v in node.inputs]
        version = self._version(node)
        outputs = self.apply(node, inputs, version, {})
        # Control flow and calls depend on more than what they are and read.
        if node.op_type not in control.RULES and not (self._functions and node.op_identifier() in self._functions):
            earlier = self._earlier[0].get(node)
            # A reader may look at the numbers of a Constant.
            if earlier is not None and len(earlier.outputs) == len(outputs) and node.op_type != "Constant":
                outputs = list(map(_kept, earlier.outputs, outputs))
            self._inferred[node] = _Inferred(
                tuple(node.inputs),
                inputs,
                tuple(node.attributes.data.values()),
                (node.domain, node.op_type, len(node.outputs), version),
                outputs,
            )
        for value, fact in zip(node.outputs, outputs, strict=True):
            self._facts.setdefault(value, fact)

    def _version(self, node: ir.Node) -> int:
        """The opset of the default domain at `node`."""
        if not self._opsets or node.graph is None:
            return self._opset
        return self._opsets.get(node.graph, self._opset)

    def fact_if_known(self, value: ir.Value) -> Fact:
        """As `fact`, but without inferring a producer (nothing is known inside a cycle)."""
        known = self._facts.get(value)
        if known is None and value.producer() is None:
            known = self._facts[value] = self._source(value)
        return known or NOTHING

    def _source(self, value: ir.Value) -> Fact:
        """Of a value that no node makes: an initializer; an input of a subgraph or function, of which nothing is known.

        The fact of a tensor stays the same object, so that the readers of another one, whose numbers may differ where
        nothing of it is followed, aren't taken for unchanged.
        """
        tensor = value.const_value
        if tensor is None or not value.is_initializer() or value.is_graph_input():
            return NOTHING
        earlier = self._earlier[1].get(value)
        made = earlier if earlier is not None and earlier[0] is tensor else (tensor, tensor_fact(tensor))
        self._sources[value] = made
        return made[1]

    def _producers(self, node: ir.Node) -> list[ir.Node]:
        """Nodes whose outputs `node` reads and that aren't inferred yet; what its subgraphs read comes by itself."""
        result = []
        for value in node.inputs:
            if value is not None and value not in self._facts and (producer := value.producer()) is not None:
                result.append(producer)
        return result

    def apply(
        self, node: ir.Node, inputs: Sequence[Fact | None], version: int, attributes: Mapping[str, ir.Attr]
    ) -> list[Fact]:
        """The facts of the outputs of `node` for given facts of its inputs.

        Args:
            node: Any node.
            inputs: A fact for each input, None for an input that isn't given.
            version: The opset of the default domain at the node.
            attributes: The attributes of the call, where the node is in the body of a function that is called.
        """
        count = len(node.outputs)
        op = Op(node, inputs, version, attributes)
        try:
            if (function := self._functions.get(node.op_identifier())) is not None:
                return self._call(op, function)
            if node.op_type in control.RULES and node.domain in ("", "ai.onnx"):
                return _padded(control.RULES[node.op_type](self, op), count)
            key = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"
            entry = RULES.get(key)
            if entry is None:
                return _padded(fallback.infer(op, version), count)
        except UnknownShapeError:
            return [NOTHING] * count
        except RULE_FAULTS as error:
            self.faults.append(f"{node.op_type} {node.name!r}: {type(error).__name__}: {error}")
            return [NOTHING] * count
        return self._by_rule(op, entry, count)

    def _by_rule(self, op: Op, entry: Entry, count: int) -> list[Fact]:
        try:
            result = entry.rule(op)
        except UnknownShapeError:
            result = None
        except RULE_FAULTS as error:
            self.faults.append(f"{op.node.op_type} {op.node.name!r}: {type(error).__name__}: {error}")
            result = None
        results = result if isinstance(result, list) else [result]
        results = results[:count] + [None] * (count - len(results))
        return [_fact(single, entry.types[min(i, len(entry.types) - 1)], op) for i, single in enumerate(results)]

    def _call(self, op: Op, function: ir.Function) -> list[Fact]:
        """A call of a model-local function: its body on the facts of the arguments, in a frame of its own."""
        body = list(function.graph)
        self._calls += len(body)
        if self._calls > MAX_CALLS or any(True for node in body for _ in subgraphs_of(node)):
            raise UnknownShapeError
        attributes = {**function.attributes, **op.node.attributes}
        frame: dict[ir.Value, Fact] = {formal: op.fact(i) for i, formal in enumerate(function.inputs)}
        for node in body:
            inputs = [None if v is None else frame.get(v, NOTHING) for v in node.inputs]
            outputs = self.apply(node, inputs, function.opset_imports.get("", self._opset), attributes)
            frame.update(zip(node.outputs, outputs, strict=True))
        return _padded([frame.get(value, NOTHING) for value in function.outputs], len(op.node.outputs))


class _Inferred(NamedTuple):
    """What the facts of the outputs of a node were made of, and the facts themselves."""

    inputs: tuple[ir.Value | None, ...]
    facts: list[Fact | None]
    attributes: tuple[ir.Attr, ...]
    operator: tuple[str, str, int, int]
    """Domain, operator, number of outputs, opset."""
    outputs: list[Fact]


def _kept(old: Fact | None, new: Fact) -> Fact:
    """`old` where it says the same as `new`, so that what was made of it counts as unchanged."""
    if old is None or old.dtype != new.dtype or old.shape != new.shape:
        return new
    if old.content is None or new.content is None:
        return old if old.content is new.content else new
    same = old.content.shape == new.content.shape and all(
        a == b for a, b in zip(old.content.flat, new.content.flat, strict=True)
    )
    return old if same else new


def infer(model: ir.Model, *, believe_names: bool = False, earlier: ShapeFacts | None = None) -> ShapeFacts:
    """Shapes, element types and small contents of all values of `model`, in time linear in its nodes.

    Args:
        model: The model; it isn't changed.
        believe_names: Take sizes of two inputs with the same `dim_param` for equal (not two sizes of one input: files
            call height and width alike). ONNX Runtime doesn't check that, so the facts are then true only of runs that
            keep to the names: for finding structure, and for operators that check the sizes themselves when they run.
        earlier: Facts of the model as it was at some time, made with the same `believe_names`; None: those made last,
            where `model.meta` has them. The result is the same and comes sooner.

    Works with any order of nodes, in subgraphs (what If branches agree on; Loop and Scan bodies with unknown inputs)
    and in function bodies (with unknown inputs; a call is followed with the facts of its arguments). An operator
    without a rule gives values of which nothing is known.
    """
    kept: ShapeFacts | None = None if believe_names else model.meta.pop(KEPT_KEY, None)
    if kept is not None:
        return kept
    facts = ShapeFacts(model, believe_names=believe_names, earlier=earlier)
    if not believe_names and MADE_KEY in model.meta:
        model.meta[MADE_KEY] = facts
    for graph in walk(model):
        for node in graph:
            facts.infer_node(node)
    facts._earlier = ({}, {})  # all has been taken over; without this the facts of each state would hold the last one's
    return facts


def lazily(model: ir.Model, *, believe_names: bool = False) -> ShapeFacts:
    """As `infer`, but for the values that are asked for only: for passes that look at few places."""
    if believe_names:
        return ShapeFacts(model, believe_names=True)
    kept: ShapeFacts | None = model.meta.pop(KEPT_KEY, None)
    return ShapeFacts(model) if kept is None else kept


def _fact(result: Result, source: TypeSource, op: Op) -> Fact:
    if isinstance(result, Fact):
        if source is None or (isinstance(source, int) and result.dtype is not None):
            return _small(result)
        result = result.content if result.content is not None else result.shape
    dtype = op.dtype(source) if type(source) is int else source if isinstance(source, ir.DataType) else None
    if isinstance(result, np.ndarray):
        return _small(Fact(dtype, tuple(Dim.of(n) for n in result.shape), result))
    return Fact(dtype, result)


def _small(fact: Fact) -> Fact:
    if fact.content is not None and (fact.content.size > MAX_CONTENT or not _fits(fact.content, fact.dtype)):
        return Fact(fact.dtype, fact.shape)
    return fact


def _fits(content: Content, dtype: ir.DataType | None) -> bool:
    """Whether every constant is in the range of its type; one that isn't would have wrapped round in a run."""
    low, high = _RANGES.get(dtype, _RANGES[None])
    return all(d.value is None or low <= d.value <= high for d in content.flat)


_RANGES: dict[ir.DataType | None, tuple[int, int]] = {
    None: (-(1 << 63), (1 << 63) - 1),
    ir.DataType.INT32: (-(1 << 31), (1 << 31) - 1),
    ir.DataType.UINT64: (0, (1 << 64) - 1),
}


def _padded(facts: Sequence[Fact], count: int) -> list[Fact]:
    return [*facts[:count], *[NOTHING] * (count - len(facts))]


def _input_fact(value: ir.Value, believe_names: bool) -> Fact:
    if not isinstance(value.type, ir.TensorType):
        return NOTHING
    if value.shape is None or len(value.shape) == 0:
        return Fact(value.type.dtype)
    names = [getattr(size, "value", None) for size in value.shape]
    dims = []
    for axis, (size, name) in enumerate(zip(value.shape, names, strict=True)):
        if isinstance(size, int) and size > 0:
            dims.append(Dim.of(size))
        else:
            own = f"{value.name}[{axis}]"
            believed = believe_names and name != "?" and names.count(name) == 1
            dims.append(Dim.symbol((name if believed else None) or own))
    return Fact(value.type.dtype, tuple(dims))
