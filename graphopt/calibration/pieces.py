"""Cutting a model into consecutive pieces that are run one after the other.

A cut is made where little crosses it. Three sorts of nodes are told apart: what is computed from constants alone and
what is computed from the inputs without a weight (masks, positions, rotary tables made of them) is computed again in
every piece that needs it; everything else lies in exactly one piece, and its results are carried over the cuts.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal

import onnx_ir as ir

from graphopt.analysis.shapes import infer
from graphopt.graph.edits import captured_values, inner_graphs, subgraphs_of

Grain = Literal["layer", "site"]
"""How finely a model may be cut: only where as little crosses as between layers, or between any two observed values."""

DYNAMIC = 64
"""What a dimension is taken for whose size isn't known."""
_UNKNOWN_BYTES = 1 << 26
_NEVER = math.inf
_NEAR = 8
"""Cuts on either side that one is compared with."""
_SLACK = 1.1
"""How much more may cross than over the narrowest cut nearby."""
_ONCE = 16
"""How much more than over the narrowest cut may cross right behind an observed value, where a run is sequential: the
weights that read the value then change before they run, and nothing runs twice."""
_WEIGHT_ELEMENTS = 4096
"""Constants from this size on are weights, which aren't read again in every piece."""
_CARRIED = frozenset({
    "MatMul", "Gemm", "Conv", "ConvTranspose", "MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv", "Einsum",
    "LSTM", "GRU", "RNN", "Attention", "If", "Loop", "Scan", "SequenceMap", "RandomNormal", "RandomNormalLike",
    "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli", "Dropout",
})  # fmt: skip
"""Operators that are never computed twice: dear, or random."""
_RANDOM = frozenset({"RandomNormal", "RandomUniform"})
_NO_TENSORS = ("Sequence", "SplitToSequence", "Optional", "StringSplit")


@dataclasses.dataclass(frozen=True)
class Piece:
    """Consecutive nodes of the main graph.

    Attributes:
        nodes: Those that lie in this piece alone.
        wanted: Observed values that it makes.
        entering: Values of earlier pieces that it, or a later one, reads.
        made: Values that it makes and a later piece reads.
        leaving: What is carried on to the next piece: `made`, and what only passes through.
        weights: Initializers that its own nodes read.
    """

    nodes: tuple[ir.Node, ...]
    wanted: tuple[ir.Value, ...]
    entering: tuple[ir.Value, ...]
    made: tuple[ir.Value, ...]
    leaving: tuple[ir.Value, ...]
    weights: tuple[ir.Value, ...]


def cut(
    model: ir.Model,
    wanted: Mapping[ir.Value, int],
    ahead: Iterable[ir.Value] = (),
    *,
    empty: Collection[str] = (),
    limit_bytes: int | None,
    grain: Grain = "layer",
) -> list[Piece]:
    """The pieces of a model up to the last one that makes an observed value.

    Args:
        model: The model, its nodes in order.
        wanted: The observed values of the main graph, each with the bytes that observing it takes.
        ahead: Values that pieces may compute besides, although a later piece makes them: what that takes is carried.
        empty: Inputs that hold nothing, such as the cache of a decoder before its first token.
        limit_bytes: What weights and statistics of one piece may take together, except that a piece is never cut up
            further than `grain` says; None: as many pieces as possible, each with an observed value at least.
        grain: How finely it may be cut.
    """
    flow = Flow(model)
    if not flow.order:  # nothing is carried: all is computed from the inputs without a weight
        return [Piece((), tuple(wanted), (), (), (), ())] if wanted else []
    at = {value: flow.place(value) for value in wanted}
    last = max(at.values(), default=-1)
    end = max([last, *(flow.place(value) for value in ahead)]) + 1
    costs = flow.costs(end, empty)
    ends = _ends(flow, costs, sorted(set(at.values())), last + 1, grain, early=grain == "site" and limit_bytes is None)
    bytes_at: dict[int, int] = {}
    for value, count in wanted.items():
        bytes_at[at[value]] = bytes_at.get(at[value], 0) + count
    ends = _merged(flow, ends, bytes_at, limit_bytes)
    pieces, begin = [], 0
    for stop in ends:
        entering = flow.crossing(begin - 1, end)
        leaving = flow.crossing(stop, end) if stop < last else ()
        old = set(entering)
        pieces.append(
            Piece(
                nodes=tuple(flow.order[begin : stop + 1]),
                wanted=tuple(value for value, place in at.items() if begin <= place <= stop),
                entering=entering,
                made=tuple(value for value in leaving if value not in old),
                leaving=leaving,
                weights=tuple(dict.fromkeys(w for node in flow.order[begin : stop + 1] for w in flow.weights[node])),
            )
        )
        begin = stop + 1
    return pieces


def reads(node: ir.Node) -> list[ir.Value]:
    """The values that a node and the graphs in it read from the graph around it."""
    found = [value for value in node.inputs if value is not None]
    found += captured_values(node)
    return list(dict.fromkeys(found))


class Flow:
    """What is carried through the main graph of a model.

    Attributes:
        order: The nodes whose results are carried, in order.
        weights: The initializers that each of them reads, itself or through what is computed from constants.
    """

    def __init__(self, model: ir.Model) -> None:
        self.order: list[ir.Node] = []
        self.weights: dict[ir.Node, tuple[ir.Value, ...]] = {}
        self._constants: dict[ir.Value, tuple[ir.Value, ...]] = {}
        self._position: dict[ir.Node, int] = {}
        self._free: set[ir.Value] = {v for v in model.graph.inputs if not v.is_initializer()}
        self._last: dict[ir.Value, list[int]] = {}
        self._facts = infer(model)
        for node in model.graph:
            self._add(node)
        self._first_use: dict[ir.Value, int] = {}

    def _add(self, node: ir.Node) -> None:
        used = reads(node)
        constant = [v for v in used if v.is_initializer() or v in self._constants]
        weights = tuple(dict.fromkeys(w for v in constant for w in self._constants.get(v, (v,))))
        rest = [v for v in used if v not in constant]
        if not rest and node.op_type not in _RANDOM:
            self._constants.update(dict.fromkeys(node.outputs, weights))
        elif node.op_type not in _CARRIED and node.domain == "" and self._cheap(weights, rest):
            self._free.update(node.outputs)
        else:
            self._position[node] = len(self.order)
            for value in rest:
                if value not in self._free:
                    self._last.setdefault(value, []).append(len(self.order))
            self.order.append(node)
            self.weights[node] = weights

    def _cheap(self, weights: Sequence[ir.Value], rest: Sequence[ir.Value]) -> bool:
        small = all(w.const_value is None or w.const_value.size < _WEIGHT_ELEMENTS for w in weights)
        return small and all(value in self._free for value in rest)

    def place(self, value: ir.Value) -> int:
        """Where in `order` a value is made; one that isn't carried, where it is first used (0 if never)."""
        node = value.producer()
        if node is not None and node in self._position:
            return self._position[node]
        if not self._first_use:
            for index, user in enumerate(self.order):
                self._note(user, index, self._first_use)
        return self._first_use.get(value, 0)

    def _note(self, node: ir.Node, index: int, places: dict[ir.Value, int]) -> None:
        """Enter into `places` the values that aren't carried that a node reads, and what they are made of."""
        pending = [v for v in reads(node) if v in self._free]
        while pending:
            value = pending.pop()
            if value not in places:
                places[value] = index
                maker = value.producer()
                if maker is not None:
                    pending += [v for v in reads(maker) if v in self._free]

    def costs(self, end: int, empty: Collection[str] = ()) -> list[float]:
        """About how many bytes cross the cut behind each of the first `end` carried nodes, inputs of the model
        included, but those that are `empty`."""
        changes = [0.0] * (end + 1)
        last_use: dict[ir.Value, int] = {}
        for index in reversed(range(end)):
            self._note(self.order[index], index, last_use)
        for value, last in last_use.items():
            if value.producer() is None and value.name not in empty:
                changes[0] += self._bytes(value)
                changes[last] -= self._bytes(value)
        forbidden = [0] * (end + 1)
        for value, users in self._last.items():
            maker = value.producer()
            last = max((user for user in users if user < end), default=-1)
            if maker is None or self._position[maker] >= last:
                continue
            made = self._position[maker]
            if self._no_tensor(value):
                forbidden[made] += 1
                forbidden[last] -= 1
            else:
                size = self._bytes(value)
                changes[made] += size
                changes[last] -= size
        found: list[float] = []
        total, never = 0.0, 0
        for change, no in zip(changes[:end], forbidden, strict=False):
            total, never = total + change, never + no
            found.append(_NEVER if never else total)
        return found

    def crossing(self, stop: int, end: int) -> tuple[ir.Value, ...]:
        """The carried values that are made up to place `stop` and read behind it, before place `end`."""
        return tuple(
            value
            for value, users in self._last.items()
            if (maker := value.producer()) is not None
            and self._position[maker] <= stop
            and any(stop < user < end for user in users)
        )

    def weight_bytes(self, begin: int, stop: int) -> int:
        """Bytes of the weights that the nodes from place `begin` to `stop`, inclusive, read."""
        found = dict.fromkeys(w for node in self.order[begin : stop + 1] for w in self.weights[node])
        total = sum(w.const_value.nbytes for w in found if w.const_value is not None)
        for node in self.order[begin : stop + 1]:
            for graph in subgraphs_of(node):
                for inner in (graph, *inner_graphs(graph)):
                    total += sum(v.const_value.nbytes for v in inner.initializers.values() if v.const_value is not None)
        return total

    def is_anchor(self, index: int) -> bool:
        """Whether the node at a place reads a matrix."""
        return any(w.shape is not None and len(w.shape) > 1 for w in self.weights[self.order[index]])

    def _bytes(self, value: ir.Value) -> float:
        shape = self._facts.shape(value)
        if shape is None:
            return float(_UNKNOWN_BYTES)
        dtype = self._facts.dtype(value) or ir.DataType.FLOAT
        return math.prod((DYNAMIC if dim.value is None else dim.value) for dim in shape) * dtype.bitwidth / 8

    def _no_tensor(self, value: ir.Value) -> bool:
        if value.type is not None and not isinstance(value.type, ir.TensorType):
            return True
        maker = value.producer()
        return maker is not None and maker.domain == "" and maker.op_type.startswith(_NO_TENSORS)


def _ends(flow: Flow, costs: Sequence[float], wanted: list[int], end: int, grain: Grain, *, early: bool) -> list[int]:
    """The last place of each piece, as finely as `grain` allows; `early`: right behind observed values, if it may."""
    if end == 0:
        return []
    anchors = wanted
    if grain == "layer":
        anchors = sorted({*wanted, *(index for index in range(end) if flow.is_anchor(index))})
    gaps = list(itertools.pairwise(anchors))
    narrowest = [min(costs[first:second]) for first, second in gaps]
    found = []
    for index, (first, second) in enumerate(gaps):
        near = min(narrowest[max(0, index - _NEAR) : index + _NEAR + 1])
        most = _SLACK * near if grain == "layer" else _NEVER
        best = min(range(first, second), key=costs.__getitem__)
        if early and costs[first] <= _ONCE * costs[best]:
            best = first
        if costs[best] <= most and costs[best] < _NEVER:
            found.append(best)
    return [*found, end - 1]


def _merged(flow: Flow, ends: list[int], observed: Mapping[int, int], limit: int | None) -> list[int]:
    """Neighbouring pieces put together: as far as the limit allows, or until each has something observed."""
    kept: list[int] = []
    begin, previous = 0, -1
    for stop in ends:
        if limit is not None:
            total = flow.weight_bytes(begin, stop) + sum(b for p, b in observed.items() if begin <= p <= stop)
            full = total > limit and previous >= begin
        else:
            full = previous >= begin and any(begin <= place <= previous for place in observed)
            # What nobody observes goes with what comes behind it.
            full = full and any(previous < place <= stop for place in observed)
        if full:
            kept.append(previous)
            begin = previous + 1
        previous = stop
    return [*kept, ends[-1]] if ends else []
