"""Head matrices: which columns of which weights make the queries, keys and values of each head."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.algebra import attribute_int, is_op
from graphopt.analysis.attention_sites import AttentionSite, attention_sites
from graphopt.analysis.branches import NORMALIZATIONS
from graphopt.analysis.linear_sites import LinearSite, linear_sites
from graphopt.analysis.shapes import ShapeFacts
from graphopt.graph.constants import constant_array, is_constant

_MAX_STEPS = 16
Indices = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Bias:
    """A constant of as many numbers as a product has columns, and where it is added."""

    node: ir.Node
    index: int


@dataclasses.dataclass(frozen=True)
class Piece:
    """Neighbouring columns of one weight.

    Attributes:
        node: The MatMul.
        start: The first column.
        stop: The one behind the last.
        bias: What is added behind it, with the same columns; None: nothing.
    """

    node: ir.Node
    start: int
    stop: int
    bias: Bias | None

    @property
    def weight(self) -> ir.Value:
        """The matrix [inputs, outputs]."""
        value = self.node.inputs[1]
        assert value is not None
        return value


@dataclasses.dataclass(frozen=True)
class HeadGroup:
    """What one head of keys and values is made by, with the heads of queries that read it.

    Attributes:
        layer: The number of the attention.
        group: The number of the head of keys and values in it.
        site: The attention.
        q: Columns of the queries, those of all heads that read the group.
        k: Columns of the keys.
        v: Columns of the values.
    """

    layer: int
    group: int
    site: AttentionSite
    q: tuple[Piece, ...]
    k: tuple[Piece, ...]
    v: tuple[Piece, ...]

    @property
    def name(self) -> str:
        """Layer and group, such as "7.2"."""
        return f"{self.layer}.{self.group}"

    @property
    def form(self) -> tuple[object, ...]:
        """What two groups must have in common to exchange their matrices."""
        return tuple(
            tuple((p.weight.dtype, _inputs(p), p.stop - p.start, p.bias is None) for p in pieces)
            for pieces in (self.q, self.k, self.v)
        )


def head_groups(model: ir.Model, facts: ShapeFacts) -> tuple[list[HeadGroup], list[tuple[ir.Node, str]]]:
    """The heads of all attentions by group of keys and values, and the attentions that aren't understood, with why.

    Columns are found by following numbers of columns from the product through all that stands before the attention, so
    that joined products (queries, keys and values as one, head by head or not) are understood, too.
    """
    found: list[HeadGroup] = []
    left: list[tuple[ir.Node, str]] = []
    sites = attention_sites(model, facts)
    linear = {site.node: site for site in linear_sites(model, sites)}
    for layer, site in enumerate(sites):
        heads, kv_heads = site.heads, site.kv_heads or site.heads
        if not heads or not kv_heads or heads % kv_heads:
            left.append((site.node, "the number of its heads isn't known"))
            continue
        made = [
            _columns(value, n, linear, facts) for value, n in ((site.q, heads), (site.k, kv_heads), (site.v, kv_heads))
        ]
        if (reason := next((one for one in made if isinstance(one, str)), None)) is not None:
            left.append((site.node, reason))
            continue
        each = heads // kv_heads
        for group in range(kv_heads):
            parts = []
            for one, repeat in zip(made, (each, 1, 1), strict=True):
                assert not isinstance(one, str)
                node, bias, columns = one
                parts.append(tuple(_pieces(node, bias, columns[group * repeat : (group + 1) * repeat].ravel())))
            found.append(HeadGroup(layer, group, site, *parts))
    return found, left


def _columns(
    value: ir.Value, heads: int, linear: Mapping[ir.Node, LinearSite], facts: ShapeFacts
) -> tuple[ir.Node, Bias | None, Indices] | str:
    """The product that makes an operand of an attention, what is added to it, and the columns [heads, size] of each
    head; or why they aren't known."""
    steps: list[tuple[ir.Node, int]] = []
    bias: Bias | None = None
    current: ir.Value | None = value
    site: LinearSite | None = None
    for _ in range(_MAX_STEPS):
        node = None if current is None else current.producer()
        if node is None:
            break
        if (site := linear.get(node)) is not None:
            break
        if is_op(node, "Add", "Mul") and any(is_constant(v) for v in node.inputs):
            place = 0 if is_constant(node.inputs[0]) else 1
            array = constant_array(node.inputs[place])
            if array is None or (is_op(node, "Mul") and array.size != 1) or bias is not None:
                return f"{node.name or node.op_type!r} may differ between heads"
            if is_op(node, "Add"):
                bias = Bias(node, place)
            current = node.inputs[1 - place]
            continue
        if is_op(node, "Reshape", "Transpose", "Split", "Slice"):
            assert current is not None
            steps.append((node, current.index() or 0))
        elif not is_op(node, *NORMALIZATIONS, "RotaryEmbedding", "Identity", "Cast"):
            break
        current = node.inputs[0]
    if site is None:
        return "what makes its heads isn't one product with a weight"
    weight = site.node.inputs[1]
    if not is_op(site.node, "MatMul") or weight is not site.weight or not weight.is_initializer():
        return "its heads aren't columns of a plain matrix"
    if any(user is not site.node for user, _ in weight.uses()):
        return "the matrix of its heads is read elsewhere, too"
    columns: Indices | None = np.arange(site.outputs, dtype=np.int64).reshape(1, 1, -1)
    for node, output in reversed(steps):
        columns = None if columns is None else _moved(columns, node, output, facts)
    if columns is None or columns.size % heads or (columns.ndim > 3 and columns.shape[1] != heads):
        return "the layout of its heads isn't known"
    if bias is not None:
        array = constant_array(bias.node.inputs[bias.index])
        if array is None or array.shape != (site.outputs,):
            return "what is added to its heads isn't one number a column"
    return site.node, bias, columns.reshape(heads, -1)


def _moved(columns: Indices, node: ir.Node, output: int, facts: ShapeFacts) -> Indices | None:
    """Where a node puts columns, for one sample and one token; None where that isn't known."""
    arrays = [constant_array(v) for v in node.inputs[1:]]
    if is_op(node, "Transpose"):
        perm = node.attributes.get("perm")
        axes = None if perm is None else perm.as_ints()
        return columns.transpose(axes) if axes is None or len(axes) == columns.ndim else None
    if is_op(node, "Reshape"):
        # The last axis may be parted; what is before it are samples and tokens, of whatever number.
        before, shape = (
            facts.shape(value) if value is not None else None for value in (node.inputs[0], node.outputs[0])
        )
        if before is None or shape is None or len(before) != 3 or len(shape) != 4 or shape[:2] != before[:2]:
            return None
        heads, size = shape[2].value, shape[3].value
        return columns.reshape(1, 1, heads, size) if heads and size and heads * size == columns.shape[-1] else None
    if is_op(node, "Split"):
        axis, count = attribute_int(node, "axis", 0), len(node.outputs)
        if axis is None or not -columns.ndim <= axis < columns.ndim:
            return None
        if arrays and arrays[0] is not None:
            edges = np.cumsum(arrays[0])[:-1]
            return np.asarray(np.split(columns, edges, axis=axis)[output]) if len(edges) == count - 1 else None
        return np.asarray(np.split(columns, count, axis=axis)[output]) if columns.shape[axis] % count == 0 else None
    if any(array is None for array in arrays) or len(arrays) < 3:
        return None
    starts, ends, axes_, strides = (
        [int(n) for n in array] for array in (*arrays, np.ones(16))[:4] if array is not None
    )
    places = [slice(None)] * columns.ndim
    for start, end, axis, stride in zip(starts, ends, axes_, strides, strict=False):
        places[axis] = slice(start, end, stride)
    return columns[tuple(places)]


def _pieces(node: ir.Node, bias: Bias | None, columns: Indices) -> Iterator[Piece]:
    """Runs of neighbouring columns, in their order."""
    cuts = [0, *(np.flatnonzero(np.diff(columns) != 1) + 1).tolist(), len(columns)]
    for begin, end in itertools.pairwise(cuts):
        yield Piece(node, int(columns[begin]), int(columns[end - 1]) + 1, bias)


def _inputs(piece: Piece) -> int | None:
    shape = piece.weight.shape
    return None if shape is None or not isinstance(shape[0], int) else shape[0]
