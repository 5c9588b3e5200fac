"""raise-rotary: every spelling of rotary position embedding becomes `RotaryEmbedding`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analysis.algebra import is_op, producer, source
from graphopt.graph.edits import Editor, walk
from graphopt.passes.base import qualified
from graphopt.passes.raise_.root_mean_square import NotRaised
from graphopt.passes.raise_.rotary_forms import Forms, Tables
from graphopt.passes.raise_.rotary_operators import CONTRIB, from_contrib, sizes_of
from graphopt.passes.raise_.rotary_rules import RULES
from graphopt.passes.raise_.rotary_tables import Replaced, Rotation, Sizes, TableWriter, rotation
from graphopt.passes.raise_.shape_rules import ShapeRulePass

OPSET = 23
_ROOTS = ("Add", "Sub", "Concat", "Reshape")
_MOVES = ("Slice", "Split", "Gather", "Reshape")
_ON_THE_WAY = (
    *_MOVES, "Mul", "RotaryEmbedding", "Add", "Sub", "Neg", "Concat", "Squeeze", "Unsqueeze", "Transpose", "Cast",
    "Identity",
)  # fmt: skip
_MAX_NODES = 40
_SWAPPED = (0, 2, 1, 3)


@dataclasses.dataclass
class _Site:
    """A rotation in the graph.

    Attributes:
        root: The node that makes the rotated vector.
        x: The vector.
        rotation: What is done to it.
        batch: The axis of x that is the batch; None: it has none.
        heads: The axis that is the heads; None: there is one head.
        positions: The axis that is the positions.
        nodes: The nodes between x and root.
    """

    root: ir.Node
    x: ir.Value
    rotation: Rotation
    batch: int | None
    heads: int | None
    positions: int
    nodes: dict[ir.Node, None]


class RaiseRotary(ShapeRulePass):
    """Write rotary position embedding as `RotaryEmbedding`, with one pair of tables for all layers.

        y[i] = x[i] cos(p θ) - x[k] sin(p θ),   y[k] = x[k] cos(p θ) + x[i] sin(p θ)

    for pairs (i, k) of the first R of D elements of each head, at position p, with a θ for each pair.

    Paper: RoFormer: Enhanced Transformer with Rotary Position Embedding (Su et al., 2021).

    What each element of the result is made of is worked out: a sum of terms ± x[i] · table[j]. Slices, splits, gathers,
    strides, joins, reshapes, signs and the order of operands only move elements about, so all spellings are one. It is
    a rotation where the terms are those of the formula and both cosines, and both sines, of a pair are equal. Equal is
    what is the same element of the same tensor, an equal column of a constant, or computed alike from equal ones:
    tables doubled by a join, an interleaving repeat or a constant, before the cosine or after, gathered or not.

    1. Half-rotated, k = i + R/2: `x·cos + rotate_half(x)·sin`, half by half, the sign in the sine, or the difference.
    2. Interleaved, k = i + 1: strided halves stacked and flattened. Pairs taken apart and joined as halves are a Gather
       of the elements, then the half-rotated form.
    3. Partial: the elements that pass by their own slice become `rotary_embedding_dim`, also where an exporter wrote
       `RotaryEmbedding` between a slice and a join. Where the first elements pass, the others are cut out.
    4. Heads behind the positions ([batch, positions, heads, elements]): a Transpose before, and those after it go.
    5. The tables are written once, [batch, positions, R/2], from what the halves have in common; scalings, casts and
       whatever the angles are made of (inverse frequencies of any kind, also those computed from the length) stay. Rows
       of a constant gathered by positions are gathered from half of it. A scale of x stays outside.
    6. ONNX Runtime fails where tables of batch 1 meet a larger batch. Tables whose batch or length isn't known to be
       x's are expanded, once for all layers: also those of a `RotaryEmbedding` that is there already, so an opset-23
       export of PyTorch, made with positions of batch 1, then runs at any batch.
    7. `RotaryEmbedding` of com.microsoft: the standard's; one offset for positions is counted on.

    The kernel of ONNX Runtime 1.31 on the CPU takes float32 and float16; X of 4 axes, or 3 with `num_heads`; without
    positions tables of 3 axes, exactly [batch, positions, R/2]; with positions [batch, positions], exactly that size,
    each checked to be a row, tables of 2 axes with at least as many rows as there are positions.

    Measured on ONNX Runtime 1.31 (CPU time, interleaved, 9 heads of 64, median ratio to the spelled-out form at 1, 128
    and 512 tokens, one thread): half-rotated MEASURED. Slower nowhere, with two threads neither.

    **Needs:** opset 23; the size of the last axis of x. **Guarantees:** the same function up to the order of sums. The
    result has the shape of x: a run in which larger tables would broadcast x, which the shapes can't always rule out,
    now fails with a message.

    **Left alone, with the reason:** float64, which the operator doesn't have; angles that differ from head to head; x
    of other than 3 or 4 axes; a rotated half whose cosines or sines aren't known to be equal, or that is part of
    something else; a last axis of unknown size (as in the body of a function: inline it first); an operator of
    com.microsoft with a scale or a packed batch.

    **When not to use it:** for a runtime without `RotaryEmbedding` (opset below 23).
    """

    name: ClassVar[str] = "raise-rotary"
    family: ClassVar[str] = "raise"
    paper: ClassVar[str] = "RoFormer: Enhanced Transformer with Rotary Position Embedding"
    anchors: ClassVar[tuple[str, ...]] = (*_ROOTS, "RotaryEmbedding", CONTRIB)

    def apply(self, model: ir.Model) -> bool:
        """Find all rotations of a graph first, the widest before those inside it; then write them in order."""
        edit = Editor(model)
        self.prepare(model, edit)
        changed = False
        for graph in walk(model):
            # What sites share is written before the first of a sweep, so every sweep has its own.
            while self._raised(graph, Sizes(self._facts, model), edit):
                changed = True
            sizes = Sizes(self._facts, model)
            for node in list(graph):
                if qualified(node) in ("RotaryEmbedding", CONTRIB):
                    edit.at(node)
                    changed |= self._operator(node, sizes, edit)
        return changed

    def rewrite(self, node: ir.Node, edit: Editor) -> bool:
        """A rotation isn't found node by node: see `apply`."""
        raise NotImplementedError

    # ---- what is spelled out

    def _raised(self, graph: ir.Graph, sizes: Sizes, edit: Editor) -> bool:
        tables = Tables()
        found: list[_Site] = []
        reasons: list[tuple[ir.Node, dict[ir.Node, None], str]] = []
        inside: set[ir.Node] = set()
        for node in reversed(graph):
            if is_op(node, *_ROOTS) and node not in inside:
                edit.at(node)
                nodes: dict[ir.Node, None] = {}
                try:
                    site = self._site(node, tables, nodes, edit)
                except NotRaised as reason:
                    reasons.append((node, nodes, str(reason)))
                    continue
                if site is not None:
                    found.append(site)
                    inside.update(site.nodes)
        written = Replaced(edit)
        writer = TableWriter(self._facts, tables, written)
        for site in reversed(found):
            edit.at(site.root)
            self._write(site, writer, written, sizes, edit)
        if not found:
            self._say(graph, reasons)
        return bool(found)

    def _say(self, graph: ir.Graph, reasons: list[tuple[ir.Node, dict[ir.Node, None], str]]) -> None:
        """The reasons of the outermost nodes, and of halves turned for a rotation that wasn't found at all."""
        said: set[ir.Node] = set()
        for node, nodes, reason in reasons:
            if node not in said:
                self.left(node, reason)
            said.update(nodes)
        for node in graph:
            if is_op(node, "Concat") and node not in said and (x := _turned_half(node)) is not None:
                shape = self.dims(x)
                if shape is None or shape[-1].value is None:
                    self.left(node, f"the size of the last axis of {x.name!r} isn't known")
                else:
                    self.left(node, f"what it turns {x.name!r} into isn't one rotation of it")

    def _site(self, node: ir.Node, tables: Tables, nodes: dict[ir.Node, None], edit: Editor) -> _Site | None:
        y = node.outputs[0]
        result = None
        near: str | None = None
        for x in _candidates(node):
            result = result or self.dims(y)
            shape = self.dims(x)
            if shape is None or result is None or len(shape) != len(result) or shape[-1] != result[-1]:
                continue
            forms = Forms(self._facts, x, tables, RULES)
            form = forms.of(y, len(shape) - 1)
            turned = None if form is None else rotation(form)
            if isinstance(turned, str):
                near = near or turned
            elif turned is not None and _is_new(node, turned):
                nodes.update(forms.nodes)
                return self._laid_out(node, x, turned, tables, forms.nodes, edit)
            if isinstance(turned, str):
                nodes.update(forms.nodes)
        if near is not None:
            raise NotRaised(near)
        return None

    def _laid_out(
        self, node: ir.Node, x: ir.Value, turned: Rotation, tables: Tables, nodes: dict[ir.Node, None], edit: Editor
    ) -> _Site:
        """The site, or the reason why it can't be written."""
        shape, result = self.dims(x), self.dims(node.outputs[0])
        assert shape is not None
        assert result is not None
        if edit.opset < OPSET:
            raise NotRaised(f"needs opset {OPSET}, the model has {edit.opset}: run convert-opset first")
        dtype = self.dtype(x)
        if dtype is None or dtype == ir.DataType.DOUBLE:
            raise NotRaised(
                "it computes in float64, which RotaryEmbedding doesn't" if dtype else "its type isn't known"
            )
        if any(own != after and own.value is not None for own, after in zip(shape, result, strict=True)):
            raise NotRaised(f"{x.name!r} is broadcast to the shape of the tables")
        count = len(shape) - 1
        if count not in (2, 3):
            raise NotRaised(f"{x.name!r} has {len(shape)} axes, which can't be told to be batch, heads and positions")
        writer = TableWriter(self._facts, tables, Replaced(edit))
        moving = writer.axes(turned.cos, count) | writer.axes(turned.sin, count)
        if {count - 1, count - 2} <= moving and count == 3:
            raise NotRaised("the angles differ from head to head")
        swapped = count - 2 in moving or (count - 1 not in moving and _is_swapped_after(node.outputs[0]))
        batch: int | None = None if count == 2 else 0
        heads: int | None = count - 1 if swapped else count - 2
        if moving == {0, 1} and count == 2:
            batch, heads, swapped = 0, None, False
        return _Site(node, x, turned, batch, heads, count - 2 if swapped else count - 1, nodes)

    # ---- writing

    def _write(self, site: _Site, writer: TableWriter, written: Replaced, sizes: Sizes, edit: Editor) -> None:
        node, turned, old = site.root, site.rotation, site.root.outputs[0]
        x = written.now(site.x)
        shape = self.dims(x)
        assert shape is not None
        axes = (site.batch, site.positions)
        cos, sin = (
            sizes.fitted(writer.write(half, *axes, len(shape) - 1, edit), x, axes, edit)
            for half in (turned.cos, turned.sin)
        )
        partial = turned.start == 0 and shape[-1] != turned.size
        attributes = {
            "interleaved": 1 if turned.interleaved else None,
            "rotary_embedding_dim": turned.size if partial else None,
        }
        kind = "interleaved" if turned.interleaved else "in halves"
        self.applied(node, f"{turned.size} of {shape[-1]} elements, {kind}")
        if turned.order is not None:
            x = edit.op("Gather", [x, edit.constant(turned.order, "order")], {"axis": -1}, like=x)
        before, x, after = _cut(x, turned, edit)
        added = 0 if site.batch is None else 1 if site.heads is None else None
        if added is not None:
            x = edit.op("Unsqueeze", [x, sizes.vector(added, edit)])
        swapped = site.heads is not None and site.heads > site.positions
        if swapped:
            x = edit.op("Transpose", [x], {"perm": _SWAPPED})
        whole = before is None and after is None
        new = edit.op("RotaryEmbedding", [x, cos, sin], attributes)
        if swapped and added is None and whole:
            _into_transposes(old, new, written, edit)
            if node.graph is None:
                return
            edit.at(node)
        if swapped:
            new = edit.op("Transpose", [new], {"perm": _SWAPPED})
        if added is not None:
            new = edit.op("Squeeze", [new, sizes.vector(added, edit)])
        if not whole:
            new = edit.op("Concat", [part for part in (before, new, after) if part is not None], {"axis": -1})
        written.replace(old, new)

    # ---- what is one operator already

    def _operator(self, node: ir.Node, sizes: Sizes, edit: Editor) -> bool:
        try:
            if node.domain != "":
                edit.replace(node.outputs[0], from_contrib(node, self, sizes, edit))
                return self.applied(node, "from com.microsoft")
            return self._fit(node, sizes, edit) and self.applied(node, "its tables expanded to the batch")
        except NotRaised as reason:
            return self.left(node, str(reason))

    def _fit(self, node: ir.Node, sizes: Sizes, edit: Editor) -> bool:
        """Tables (or positions) of batch 1 expanded to the batch of x: ONNX Runtime wants them as large."""
        x = node.inputs[0]
        axes = None if x is None else sizes_of(self.rank(x))
        if x is None or axes is None:
            return False
        changed = False
        for place in (3,) if len(node.inputs) > 3 and node.inputs[3] is not None else (1, 2):
            value = node.inputs[place]
            if value is not None and self.rank(value) == (2 if place == 3 else 3):
                fitting = sizes.fitted(value, x, axes, edit)
                if fitting is not value:
                    edit.set_input(node, place, fitting)
                    changed = True
        return changed


def _candidates(root: ir.Node) -> Iterator[ir.Value]:
    """What may be the vector that is turned: what is taken apart above `root`, nearest first."""
    seen: dict[ir.Node, None] = {root: None}
    found: dict[ir.Value, None] = {}
    queue = [root]
    for node in queue:
        if is_op(node, *_MOVES) and node is not root and node.inputs[0] is not None:
            found[source(node.inputs[0])] = None
        for value in node.inputs:
            above = None if value is None else value.producer()
            if above is not None and above not in seen and len(seen) < _MAX_NODES and is_op(above, *_ON_THE_WAY):
                seen[above] = None
                queue.append(above)
    if sum(is_op(node, "Mul") for node in queue) > 1 or any(is_op(node, "RotaryEmbedding") for node in queue):
        yield from found


def _is_new(root: ir.Node, turned: Rotation) -> bool:
    """Whether a rotation that doesn't begin at the first element isn't written as one of the operands already."""
    return turned.start == 0 or (
        len(root.inputs) > 2 and all(producer(v, "RotaryEmbedding") is None for v in root.inputs)
    )


def _turned_half(node: ir.Node) -> ir.Value | None:
    """The x of Concat(-x[half:], x[:half]) that is multiplied with something."""
    if len(node.inputs) != 2 or not any(is_op(user, "Mul") for user, _ in node.outputs[0].uses()):
        return None
    for one, other in (node.inputs, node.inputs[::-1]):
        negative = producer(one, "Neg")
        first = None if negative is None else producer(negative.inputs[0], "Slice", "Split")
        second = producer(other, "Slice", "Split")
        if first is not None and second is not None and first.inputs[0] is second.inputs[0]:
            return first.inputs[0]
    return None


def _cut(x: ir.Value, turned: Rotation, edit: Editor) -> tuple[ir.Value | None, ir.Value, ir.Value | None]:
    """What comes before the turned elements, these, and what comes after, where the first isn't turned."""
    if turned.start == 0:
        return None, x, None
    end, count = turned.start + turned.size, np.iinfo(np.int64).max

    def part(start: int, stop: int) -> ir.Value:
        return edit.op("Slice", [x, *(edit.constant(np.array([n], dtype=np.int64)) for n in (start, stop, -1))])

    rest = None if turned.last else part(end, count)
    return part(0, turned.start), part(turned.start, end), rest


def _into_transposes(old: ir.Value, new: ir.Value, written: Replaced, edit: Editor) -> None:
    """What transposes `old` reads `new` instead, in which heads and positions are exchanged already."""
    for user in [user for user, _ in old.uses()]:
        perm = _perm(user)
        if perm is None:
            continue
        order, result = [_SWAPPED.index(axis) for axis in perm], user.outputs[0]
        edit.at(user)
        same = order == [0, 1, 2, 3]
        written.replace(result, new if same else edit.op("Transpose", [new], {"perm": order}, like=result))


def _perm(node: ir.Node) -> list[int] | None:
    attribute = node.attributes.get("perm")
    if not is_op(node, "Transpose") or attribute is None or attribute.is_ref():
        return None
    perm = list(attribute.as_ints())
    return perm if len(perm) == 4 else None


def _is_swapped_after(value: ir.Value) -> bool:
    """Whether everything that reads `value` exchanges heads and positions first."""
    perms = [_perm(user) for user, _ in value.uses()]
    return bool(perms) and not value.is_graph_output() and all(perm is not None and perm[1] == 2 for perm in perms)
