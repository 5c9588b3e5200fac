"""fold-weight-subgraphs: weights that are computed from weights become the weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.shapes import ShapeFacts
from graphopt.graph.computed import LAZY_BYTES, computed, identity
from graphopt.graph.constants import constant_tensor, left_for_load
from graphopt.graph.edits import Editor, opset
from graphopt.passes.base import Pass
from graphopt.passes.clean.eliminate_common_subexpressions import is_random
from graphopt.passes.clean.fold_constants import (
    LAZY_TYPES,
    computable,
    evaluate,
    frozen_copy,
    has_nan,
    signature,
    static_sizes,
)

CONNECTING_BYTES = 1 << 10
"""Constants from this size on count, and join the sub-graphs that read them; a shared epsilon doesn't."""

_QUANTIZED = frozenset({"DequantizeLinear", "QuantizeLinear", "DynamicQuantizeLinear"})


@dataclasses.dataclass(frozen=True)
class _Step:
    """One operator of a program: what it is, and the slots that it reads and writes (None: not given)."""

    node: ir.Node
    inputs: tuple[int | None, ...]
    outputs: tuple[int | None, ...]


@dataclasses.dataclass(frozen=True)
class _Program:
    """How one weight is computed. Slots hold the constants first, then the results of the steps."""

    version: int
    constants: tuple[ir.TensorProtocol, ...]
    steps: tuple[_Step, ...]
    shapes: tuple[tuple[tuple[int, ...], ir.DataType] | None, ...]
    result: int

    def run(self, *, check: bool = False) -> npt.NDArray[Any] | str:
        """Compute the weight; with `check`, or say what speaks against it. No result is kept longer than needed."""
        slots: dict[int, npt.NDArray[Any]] = {}
        last = {slot: i for i, step in enumerate(self.steps) for slot in step.inputs if slot is not None}
        for i, step in enumerate(self.steps):
            for slot in step.inputs:
                if slot is not None and slot not in slots:
                    slots[slot] = self.constants[slot].numpy()
            arrays = [None if slot is None else slots[slot] for slot in step.inputs]
            if check and step.node.op_type.startswith("Reduce") and arrays[0] is not None and arrays[0].size == 0:
                return "runtimes disagree on what an empty tensor reduces to"
            results = evaluate(step.node, arrays, self.version)
            named = [slot for slot in step.outputs if slot is not None]
            if results is None:
                return f"ONNX's reference implementation can't compute {step.node.op_type}"
            for slot, array in zip(named, results, strict=True):
                if self.shapes[slot] != (array.shape, ir.DataType.from_numpy(array.dtype)):
                    return f"ONNX's reference implementation of {step.node.op_type} gives another shape or type"
                if check and has_nan(array):
                    return "it has a NaN, on which runtimes disagree"
                slots[slot] = array
            del arrays, results
            for slot in step.inputs:
                if slot is not None and last[slot] == i and slot != self.result:
                    slots.pop(slot, None)
        return slots[self.result]

    def tensor(self) -> ir.TensorProtocol:
        """What `run` gives, as a tensor."""
        array = self.run()
        if isinstance(array, str):
            raise RuntimeError(f"a weight couldn't be computed: {array}")
        return ir.tensor(np.ascontiguousarray(array))

    @property
    def origin(self) -> tuple[Any, ...]:
        """All that decides the result."""
        steps = tuple((*signature(step.node), step.inputs, step.outputs) for step in self.steps)
        return ("program", self.version, steps, self.result, *map(identity, self.constants))


class FoldWeightSubgraphs(Pass):
    """Compute the parts of a graph that read nothing but constants, as a whole, where the file doesn't grow by it.

        W' = W + s·B·A      W' = g · V / ‖V‖      W' = round(W / s) · s      W' = ψ(W)      W' = P·z

    Such parts are left behind by LoRA adapters that weren't merged, weight normalization (Weight Normalization: A
    Simple Reparameterization), weight standardization, fake quantization spelled in float operators, companded weights
    (Weight Compander), weights that a hypernetwork makes of an embedding or a code (Hyperformer; D'OH: Decoder-Only
    Random Hypernetworks), and recurrent weights that are cut into gates and put together in another order.

    `fold-constants` looks at one operator at a time and leaves B·A, which is larger than B and A. Here the sub-graph is
    taken from its constants to the values that the rest of the graph reads, and only these are stored:

    1. All sub-graphs that have a weight in common are taken together if the results have no more bytes than the
       constants that nothing else reads.
    2. Otherwise each result is taken by itself if it alone has no more bytes than the constants that it frees.

    Every operator rounds in the type that the graph gives it, as it would at run time. A result of 1 MiB or more is
    computed once now, to be sure that it can be, and again when the model is saved, one at a time, so that memory
    doesn't grow with the number of layers.

    **Needs:** static shapes of all results. **Guarantees:** equal up to the rounding of the one evaluation (ONNX's
    reference implementation). The weights of the file don't grow.

    **Left alone, with the reason:** results larger than what they free (weights unpacked from int8 or from float16, a
    weight that something else reads too); what `DequantizeLinear` or `QuantizeLinear` makes of a constant, which stays
    quantized for the runtime; random operators; bfloat16; NaN; operators that the reference implementation doesn't
    have; bodies of functions (`inline-functions` first). Results of less than `min_bytes` are `fold-constants`'.

    **Options:** `min_bytes` (bytes, default 16384): sub-graphs whose results have fewer bytes together are left to
    `fold-constants`. `max_temporary` (bytes, default 1073741824): the largest result on the way that is computed.

    **Why not an extension of fold-constants:** that pass folds shapes as it goes, one operator after the other, and
    stores each result; here a whole sub-graph is judged before anything is computed.

    **When not to use it:** before adapters are to be exchanged, or training goes on.
    """

    name: ClassVar[str] = "fold-weight-subgraphs"
    family: ClassVar[str] = "fold"
    paper: ClassVar[str] = "Weight Compander: A Simple Weight Reparameterization for Regularization"

    def __init__(self, min_bytes: int = 16384, max_temporary: int = 1 << 30) -> None:
        super().__init__()
        self.min_bytes = min_bytes
        self.max_temporary = max_temporary

    def apply(self, model: ir.Model) -> bool:
        """See the class."""
        edit, facts, version = Editor(model), ShapeFacts(model), opset(model)
        changed = False
        for graph in (model.graph, *model.graph.subgraphs()):
            while True:
                # What is left is looked at again after an edit, and reported once.
                before = len(self.sites)
                nodes = self._constant_nodes(graph, version, facts)
                if not any([self._fold(group, version, facts, edit) for group in _groups(nodes)]):
                    break
                self.sites[before:] = [site for site in self.sites[before:] if site.outcome == "applied"]
                changed = True
        return changed

    def _constant_nodes(self, graph: ir.Graph, version: int, facts: ShapeFacts) -> list[ir.Node]:
        """The nodes of a graph that depend on constants only, in order; says why not where quantization ends it."""
        found: dict[ir.Node, None] = {}
        quantized: dict[ir.Value, str] = {}
        for node in graph:
            given = [v for v in node.inputs if v is not None]
            if node.op_type == "Constant" or left_for_load(node):
                continue
            if is_random(node, version) and not given:
                quantized.update((out, f"the random numbers of {node.op_type}") for out in node.outputs)
            open_ = [v for v in given if constant_tensor(v) is None and v.producer() not in found]
            if any(v not in quantized for v in open_) or not given:
                continue
            if not open_ and computable(node, version):
                found[node] = None
            elif not open_ and node.op_type in _QUANTIZED and node.domain == "":
                quantized[node.outputs[0]] = f"what {node.op_type} makes of a constant: the weights stay quantized"
            elif open_ and computable(node, version) and self._bytes(node.outputs, facts) >= self.min_bytes:
                self.left(node, f"reads {quantized[open_[0]]}")
        return list(found)

    @staticmethod
    def _bytes(values: Iterable[ir.Value], facts: ShapeFacts) -> int:
        """Bytes of the values as far as they are known."""
        total = 0
        for value in values:
            sizes, dtype = static_sizes(facts.shape(value)), facts.dtype(value)
            if sizes is not None and dtype is not None and dtype != ir.DataType.STRING:
                total += math.ceil(math.prod(sizes) * dtype.bitwidth / 8)
        return total

    # ---- one group of nodes that share weights

    def _fold(self, nodes: Sequence[ir.Node], version: int, facts: ShapeFacts, edit: Editor) -> bool:
        inside = set(nodes)
        roots = [
            out
            for node in nodes
            for out in node.outputs
            if out.is_graph_output() or any(user not in inside for user, _ in out.uses())
        ]
        if self._bytes(roots, facts) < self.min_bytes:
            return False
        if self._bytes(roots, facts) <= _freed(nodes, set(roots)) and not isinstance(
            self._fold_roots(roots, nodes, version, facts, edit), str
        ):
            return True
        changed = False
        for root in roots:
            cone = _cone(root, inside)
            size = self._bytes([root], facts)
            grown = size - _freed(cone, {root})
            producer = root.producer()
            if size < self.min_bytes or producer is None:
                continue
            why = (
                f"storing its result would make the file {grown / 1e6:.3g} MB larger"
                if grown > 0
                else self._fold_roots([root], cone, version, facts, edit)
            )
            changed |= why is None
            if why is not None:
                self.left(producer, f"constant, but {why}")
        return changed

    def _fold_roots(
        self, roots: Sequence[ir.Value], nodes: Sequence[ir.Node], version: int, facts: ShapeFacts, edit: Editor
    ) -> str | None:
        """Compute all of `roots`, or none of them and say why: leaving one out would keep its constants."""
        inside = set(nodes)
        made: list[tuple[ir.Value, _Program, npt.NDArray[Any] | None, int]] = []
        for root in roots:
            producer = root.producer()
            assert producer is not None
            cone = _cone(root, inside)
            program = self._program(root, cone, version, facts)
            if isinstance(program, str):
                return program
            array = program.run(check=True)
            if isinstance(array, str):
                return array
            made.append((root, program, array if array.nbytes < LAZY_BYTES else None, len(cone)))
            del array
        for root, program, small, count in made:
            producer = root.producer()
            assert producer is not None
            edit.at(producer)
            when = "" if small is not None else ", when the model is saved"
            self.applied(producer, f"computed from {count} operators{when} ({self._bytes([root], facts)} bytes)")
            if small is not None:
                value = edit.constant(small, "weight")
            else:
                sizes, dtype = static_sizes(facts.shape(root)), facts.dtype(root)
                assert sizes is not None
                assert dtype is not None
                tensor = computed(program.tensor, dtype, sizes, origin=program.origin)
                value = edit.constant(tensor, "weight")
                tensor.name = value.name
            edit.replace(root, value)
        return None

    def _program(self, root: ir.Value, cone: Sequence[ir.Node], version: int, facts: ShapeFacts) -> _Program | str:
        constants = dict.fromkeys(
            v for node in cone for v in node.inputs if v is not None and constant_tensor(v) is not None
        )
        slots = {value: slot for slot, value in enumerate(constants)}
        tensors = tuple(t for v in constants if (t := constant_tensor(v)) is not None)
        shapes: list[tuple[tuple[int, ...], ir.DataType] | None] = [None] * len(tensors)
        for tensor in tensors:
            if tensor.dtype not in LAZY_TYPES:
                return f"computed from {tensor.dtype.name.lower()}, which the reference implementation doesn't take"
        steps = []
        for node in cone:
            for out in node.outputs:
                if not out.name:
                    continue
                sizes, dtype = static_sizes(facts.shape(out)), facts.dtype(out)
                if sizes is None or dtype is None:
                    return f"the shape or type of the result of {node.op_type} isn't known before computing it"
                if dtype not in LAZY_TYPES:
                    return f"computed through {dtype.name.lower()}, which the reference implementation doesn't take"
                if (size := self._bytes([out], facts)) > self.max_temporary:
                    return f"the result of {node.op_type} on the way would take {size / 1e6:.3g} MB"
                slots[out] = len(shapes)
                shapes.append((sizes, dtype))
            inputs = tuple(None if v is None else slots[v] for v in node.inputs)
            outputs = tuple(slots[out] if out.name else None for out in node.outputs)
            steps.append(_Step(frozen_copy(node), inputs, outputs))
        return _Program(version, tensors, tuple(steps), tuple(shapes), slots[root])


def _groups(nodes: Sequence[ir.Node]) -> list[list[ir.Node]]:
    """The nodes that are joined by a value or by a constant of some size, in the order of the graph."""
    leader: dict[object, object] = {}

    def find(key: object) -> object:
        root = key
        while (above := leader.setdefault(root, root)) is not root:
            root = above
        while leader[key] is not root:
            leader[key], key = root, leader[key]
        return root

    inside = set(nodes)
    for node in nodes:
        for value in node.inputs:
            if value is None:
                continue
            producer = value.producer()
            tensor = constant_tensor(value)
            if producer in inside:
                leader[find(node)] = find(producer)
            elif tensor is not None and tensor.nbytes >= CONNECTING_BYTES:
                leader[find(node)] = find(value)
    groups: dict[object, list[ir.Node]] = {}
    for node in nodes:
        groups.setdefault(find(node), []).append(node)
    return list(groups.values())


def _cone(root: ir.Value, inside: set[ir.Node]) -> list[ir.Node]:
    """The nodes of `inside` that `root` is computed from, each after those that it reads."""
    order: dict[ir.Node, None] = {}
    stack: list[tuple[ir.Node | None, bool]] = [(root.producer(), False)]
    while stack:
        node, ready = stack.pop()
        if node is None or node not in inside or node in order:
            continue
        if ready:
            order[node] = None
            continue
        stack.append((node, True))
        stack.extend((value.producer(), False) for value in reversed(node.inputs) if value is not None)
    return list(order)


def _freed(nodes: Sequence[ir.Node], roots: set[ir.Value]) -> int:
    """Bytes of the constants that nothing reads once `roots` are constants; `nodes` in topological order."""
    dead: set[ir.Node] = set()
    for node in reversed(nodes):
        if all(
            out in roots or (not out.is_graph_output() and all(user in dead for user, _ in out.uses()))
            for out in node.outputs
        ):
            dead.add(node)
    total = 0
    for value in dict.fromkeys(v for node in nodes if node in dead for v in node.inputs if v is not None):
        tensor = constant_tensor(value)
        if tensor is None or tensor.nbytes < CONNECTING_BYTES or value.is_graph_output():
            continue
        if all(user in dead for user, _ in value.uses()):
            total += tensor.nbytes
    return total
