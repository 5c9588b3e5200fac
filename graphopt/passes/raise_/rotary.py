"""raise-rotary: every spelling of rotary position embedding becomes `RotaryEmbedding`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import onnx_ir as ir

from graphopt.analysis.algebra import is_op, source
from graphopt.graph.edits import Editor, walk
from graphopt.passes.raise_.rotary_forms import Forms, Table
from graphopt.passes.raise_.rotary_tables import Rotation, Sizes, TableWriter, rotation
from graphopt.passes.raise_.shape_rules import ShapeRulePass

OPSET = 23
_ROOTS = ("Add", "Sub", "Concat", "Reshape")
_MOVES = ("Slice", "Split", "Gather", "Reshape")
_ON_THE_WAY = (*_MOVES, "Add", "Sub", "Mul", "Neg", "Concat", "Squeeze", "Unsqueeze", "Transpose", "Cast", "Identity")
_MAX_NODES = 40
_SWAPPED = (0, 2, 1, 3)


@dataclasses.dataclass
class _Found:
    """A rotation in the graph.

    Attributes:
        root: The node that makes the rotated vector.
        x: The vector.
        rotation: What is done to it.
        heads: The axis of x that is of heads.
        nodes: The nodes between.
    """

    root: ir.Node
    x: ir.Value
    rotation: Rotation
    heads: int
    nodes: dict[ir.Node, None]


class RaiseRotary(ShapeRulePass):
    """Write rotary position embedding as `RotaryEmbedding`.

    (page to be completed)
    """

    name: ClassVar[str] = "raise-rotary"
    family: ClassVar[str] = "raise"
    paper: ClassVar[str] = "RoFormer: Enhanced Transformer with Rotary Position Embedding"
    anchors: ClassVar[tuple[str, ...]] = _ROOTS

    def apply(self, model: ir.Model) -> bool:
        """Find all rotations of a graph first, the widest before those inside it; then write them in order."""
        edit = Editor(model)
        self.prepare(model, edit)
        changed = False
        for graph in walk(model):
            while self._graph(graph, edit):
                changed = True
        return changed

    def rewrite(self, node: ir.Node, edit: Editor) -> bool:
        """Not by single nodes: see `apply`."""
        raise NotImplementedError

    def _graph(self, graph: ir.Graph, edit: Editor) -> bool:
        reasons = self.sites
        self.sites = []
        tables: dict[Table, int] = {}
        found: list[_Found] = []
        inside: set[ir.Node] = set()
        for node in reversed(graph):
            if node not in inside and is_op(node, *_ROOTS):
                site = self._site(node, tables, edit)
                if site is not None:
                    found.append(site)
                    inside.update(site.nodes)
        if found or not reasons:
            self.sites = [*reasons, *(s for s in self.sites)]
        else:
            self.sites = reasons + self.sites
        writer, sizes = TableWriter(self._facts, tables), Sizes(self._facts, edit.model)
        for site in reversed(found):
            self._write(site, writer, sizes, edit)
        return bool(found)

    # ---- finding

    def _site(self, node: ir.Node, tables: dict[Table, int], edit: Editor) -> _Found | None:
        y = node.outputs[0]
        for x in _candidates(node):
            shape, result = self.dims(x), self.dims(y)
            if shape is None or result is None or len(shape) != len(result) or shape[-1] != result[-1]:
                continue
            if shape[-1].value is None:
                continue
            forms = Forms(self._facts, x, tables)
            form = forms.of(y, len(shape) - 1)
            turned = None if form is None else rotation(form)
            if turned is None:
                continue
            if isinstance(turned, str):
                self.left(node, turned)
                return None
            return self._fitting(_Found(node, x, turned, 0, forms.nodes), tables, edit)
        return None

    def _fitting(self, site: _Found, tables: dict[Table, int], edit: Editor) -> _Found | None:
        """`site` with its layout, or the reason why it can't be written."""
        node, x = site.root, site.x
        shape, result = self.dims(x), self.dims(node.outputs[0])
        assert shape is not None
        assert result is not None
        edit.at(node)
        if edit.opset < OPSET:
            self.left(node, f"needs opset {OPSET}, the model has {edit.opset}: run convert-opset first")
            return None
        dtype = self.dtype(x)
        if dtype is None or dtype == ir.DataType.DOUBLE:
            self.left(node, "it computes in float64, and RotaryEmbedding doesn't" if dtype else "x has no known type")
            return None
        if len(shape) != 4:
            self.left(node, f"x has {len(shape)} axes, not batch, heads, positions and elements")
            return None
        for own, after in zip(shape, result, strict=True):
            if own != after and own.value is not None:
                self.left(node, f"{x.name!r} is broadcast to the shape of the tables")
                return None
        writer = TableWriter(self._facts, tables)
        for half in (site.rotation.cos, site.rotation.sin):
            why = writer.obstacle(half)
            if why is not None:
                self.left(node, why)
                return None
        moving = writer.axes(site.rotation.cos, 3) | writer.axes(site.rotation.sin, 3)
        if {1, 2} <= moving:
            self.left(node, "the angles differ from head to head")
            return None
        if moving & {1, 2}:
            site.heads = 2 if 1 in moving else 1
        else:
            site.heads = 2 if _transposed(node.outputs[0]) else 1
        return site

    # ---- writing

    def _write(self, site: _Found, writer: TableWriter, sizes: Sizes, edit: Editor) -> None:
        node, x, turned = site.root, site.x, site.rotation
        edit.at(node)
        shape = self.dims(x)
        assert shape is not None
        axes = (0, 3 - site.heads)
        wanted = (shape[0], shape[axes[1]])
        cos, sin = (
            sizes.fitted(writer.write(half, *axes, 3, edit), wanted, x, axes, edit) for half in (turned.cos, turned.sin)
        )
        attributes = {
            "interleaved": 1 if turned.interleaved else None,
            "rotary_embedding_dim": None if shape[-1] == turned.size else turned.size,
        }
        detail = f"{turned.size} of {shape[-1]} elements, {'interleaved' if turned.interleaved else 'in halves'}"
        old = node.outputs[0]
        if site.heads == 1:
            edit.replace(old, edit.op("RotaryEmbedding", [x, cos, sin], attributes, like=old))
            self.applied(node, detail)
            return
        moved = edit.op("Transpose", [x], {"perm": _SWAPPED})
        new = edit.op("RotaryEmbedding", [moved, cos, sin], attributes)
        self.applied(node, detail)
        for user in [user for user, _ in old.uses()]:
            perm = _perm(user)
            if perm is not None:
                order = [_SWAPPED.index(axis) for axis in perm]
                edit.at(user)
                result = user.outputs[0]
                if order == [0, 1, 2, 3]:
                    edit.replace(result, new)
                else:
                    edit.replace(result, edit.op("Transpose", [new], {"perm": order}, like=result))
        if node.graph is not None:
            edit.at(node)
            edit.replace(old, edit.op("Transpose", [new], {"perm": _SWAPPED}, like=old))


def _candidates(root: ir.Node) -> Iterator[ir.Value]:
    """What may be the vector that is turned: what is taken apart above `root`, nearest first."""
    seen: dict[ir.Node, None] = {root: None}
    found: dict[ir.Value, None] = {}
    multiplied = False
    queue = [root]
    for node in queue:
        if is_op(node, *_MOVES) and node is not root and node.inputs[0] is not None:
            found[source(node.inputs[0])] = None
        multiplied |= node.op_type == "Mul"
        for value in node.inputs:
            above = None if value is None else value.producer()
            if above is not None and above not in seen and len(seen) < _MAX_NODES and is_op(above, *_ON_THE_WAY):
                seen[above] = None
                queue.append(above)
    if multiplied:
        yield from found


def _perm(node: ir.Node) -> list[int] | None:
    attribute = node.attributes.get("perm")
    if not is_op(node, "Transpose") or attribute is None or attribute.is_ref():
        return None
    perm = list(attribute.as_ints())
    return perm if len(perm) == 4 else None


def _transposed(value: ir.Value) -> bool:
    """Whether everything that reads `value` exchanges heads and positions first."""
    perms = [_perm(user) for user, _ in value.uses()]
    return bool(perms) and not value.is_graph_output() and all(p is not None and p[1] == 2 for p in perms)
