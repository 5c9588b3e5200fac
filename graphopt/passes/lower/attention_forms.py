"""How one `Attention` is written: spelled out, or on operands whose heads aren't split off."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.bounds import Bounds
from graphopt.analysis.dims import Dim
from graphopt.analysis.shapes import ShapeFacts
from graphopt.graph.edits import Editor
from graphopt.passes.lower.attention_site import (
    HEADS_LAST,
    Merged,
    NotLowered,
    Site,
    may_hide_all,
    source_of_transpose,
)

_SWAP_LAST = (0, 1, 3, 2)
_LARGEST_CONSTANT = 1 << 20


class Forms:
    """Writes the sites of one model; what several sites have in common is written once.

    Attributes:
        edit: Set to the site.
        facts: Shapes and types.
        bounds: How large values can be.
    """

    def __init__(self, edit: Editor, facts: ShapeFacts) -> None:
        self.edit, self.facts, self.bounds = edit, facts, Bounds(facts)
        self._shared: dict[Hashable, ir.Value] = {}
        self._graph: ir.Graph | ir.Function | None = None

    # ---- the operator on merged heads

    def merged(self, site: Site, merged: Merged) -> None:
        """`Attention` on [batch, sequence, heads · depth], with the heads as attributes."""
        assert site.heads is not None
        assert site.kv_heads is not None
        node = site.node
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        attributes |= {"q_num_heads": site.heads, "kv_num_heads": site.kv_heads}
        inputs = [merged.q, merged.k, merged.v, *node.inputs[3:]]
        wanted = [site.output(index) for index in range(len(node.outputs))]
        result = self.edit.op("Attention", inputs, attributes, outputs=len(node.outputs), like=merged.output)
        made = result.producer()
        assert made is not None
        for old, new in zip(wanted[1:], made.outputs[1:], strict=True):
            if old is not None:
                new.type, new.shape = old.type, old.shape
                self.edit.replace(old, new)
        self.edit.replace(merged.output, result)

    # ---- spelled out

    def spelled_out(self, site: Site) -> ir.Node:
        """MatMul, scale, cap, mask, Softmax, MatMul; returns the Softmax.

        Raises:
            NotLowered: It can't be written so; nothing was edited.
        """
        edit, node = self.edit, site.node
        self._graph = node.graph
        groups = site.groups
        if groups is None:
            raise NotLowered("the numbers of its heads aren't known")
        if site.dtype == ir.DataType.BFLOAT16:
            raise NotLowered("ONNX Runtime has no CPU kernels for products in bfloat16")
        bias = self._bias(site)
        dead = self._dead(bias) if bias is not None and may_hide_all(site, self.facts, self.bounds) else None
        q = self._heads(site.operand("q"), site.heads, site.depth, site)
        # In a narrow type the product of unscaled operands could overflow. Elsewhere ONNX Runtime multiplies within
        # the product if the factor stands behind it.
        first = site.dtype == ir.DataType.FLOAT16
        if first:
            q = self._times(q, site.scale, site.dtype)
        wanted = [site.output(index) for index in (1, 2)]
        keys, keys_swapped = self._keys(site, wanted[0] is not None)
        values = self._values(site)
        if groups > 1:
            q = edit.op("Reshape", [q, self._sizes(0, site.kv_heads, -1, 0)])
        scores = edit.op("MatMul", [q, keys_swapped])
        if not first:
            scores = self._times(scores, site.scale, site.dtype)
        if site.softcap:
            cap = self._number(site.softcap, site.dtype)
            scores = edit.op("Mul", [edit.op("Tanh", [edit.op("Div", [scores, cap])]), cap])
        # Heads that share keys lie one behind the other along the queries; a mask wants them apart.
        apart = groups > 1 and bias is not None
        if apart:
            scores = edit.op("Reshape", [scores, self._sizes(0, site.heads, -1, 0)])
        if bias is not None:
            scores = edit.op("Add", [scores, bias])
        if site.precision is not None:
            scores = edit.op("Cast", [scores], {"to": site.precision.value})
        weights = edit.op("Softmax", [scores], {"axis": -1})
        softmax = weights.producer()
        assert softmax is not None
        if site.precision is not None:
            weights = edit.op("Cast", [weights], {"to": site.dtype.value})
        if apart:
            weights = edit.op("Reshape", [weights, self._sizes(0, site.kv_heads, -1, 0)])
        output = node.outputs[0]
        last = dead is None and groups == 1 and not site.merged
        result = edit.op("MatMul", [weights, values], like=output if last else None)
        if groups > 1:
            result = edit.op("Reshape", [result, self._sizes(0, site.heads, -1, 0)])
        if dead is not None:
            result = edit.op("Where", [dead, self._number(0.0, site.dtype), result])
        if site.merged:
            result = edit.op("Transpose", [result], {"perm": HEADS_LAST})
            width = -1 if site.value_depth is None or site.heads is None else site.heads * site.value_depth
            result = edit.op("Reshape", [result, self._sizes(0, 0, width)])
        for old, new in zip(wanted, (keys, values), strict=True):
            if old is not None:
                assert new is not None
                edit.replace(old, new)
        edit.replace(output, result)
        return softmax

    def _heads(self, value: ir.Value, heads: int | None, depth: int | None, site: Site) -> ir.Value:
        """[batch, head, sequence, depth]."""
        if not site.merged:
            return value
        return self.edit.op("Transpose", [self._split(value, heads, depth)], {"perm": HEADS_LAST})

    def _split(self, value: ir.Value, heads: int | None, depth: int | None) -> ir.Value:
        return self.edit.op("Reshape", [value, self._sizes(0, 0, heads, -1 if depth is None else depth)])

    def _keys(self, site: Site, wanted: bool) -> tuple[ir.Value | None, ir.Value]:
        """The keys of all tokens where they are `wanted`, and with the last two axes exchanged."""
        edit, k, past = self.edit, site.operand("k"), site.input("past_k")
        if past is None and not wanted:
            if site.merged:
                split = self._split(k, site.kv_heads, site.depth)
                return None, edit.op("Transpose", [split], {"perm": tuple(HEADS_LAST[axis] for axis in _SWAP_LAST)})
            # One transpose does both, where another made the heads.
            if (found := source_of_transpose(k)) is not None:
                source, perm = found
                return None, edit.op("Transpose", [source], {"perm": tuple(perm[axis] for axis in _SWAP_LAST)})
        keys = self._heads(k, site.kv_heads, site.depth, site)
        if past is not None:
            keys = edit.op("Concat", [past, keys], {"axis": 2}, like=_declared(site, 1))
        # ONNX Runtime makes a transposed operand of a product of this.
        return keys, edit.op("Transpose", [keys], {"perm": _SWAP_LAST})

    def _values(self, site: Site) -> ir.Value:
        values = self._heads(site.operand("v"), site.kv_heads, site.value_depth, site)
        past = site.input("past_v")
        if past is None:
            return values
        return self.edit.op("Concat", [past, values], {"axis": 2}, like=_declared(site, 2))

    # ---- masks, which layers share

    def _bias(self, site: Site) -> ir.Value | None:
        """What is added to the scores.

        Raises:
            NotLowered: The mask isn't known well enough.
        """
        mask = site.input("mask")
        if mask is None:
            return self._causal(site, None) if site.causal else None
        kind, shape = self.facts.dtype(mask) or mask.dtype, self.facts.shape(mask)
        if kind is None or shape is None or not 1 <= len(shape) <= 4:
            raise NotLowered("the type or the rank of its mask isn't known")
        if kind not in (ir.DataType.BOOL, site.dtype):
            raise NotLowered(f"its mask is {kind.name}")
        if len(shape) == 3 and shape[0] != 1 and shape[0].value != site.heads:
            raise NotLowered("the first axis of its mask isn't known to be that of the heads")
        total = self._lengths(site)[1]
        if shape[-1] != total and (shape[-1].value is not None):
            raise NotLowered(f"its mask covers {shape[-1]} keys, of {total}")
        if site.causal:
            return self._causal(site, mask)
        return mask if kind != ir.DataType.BOOL else self._as_numbers(mask, None, site.dtype)

    def _as_numbers(self, kept: ir.Value, base: ir.Value | None, dtype: ir.DataType) -> ir.Value:
        """`base` (None: 0) where `kept`, else −∞."""
        key = ("numbers", self._graph, kept, base, dtype)
        if key not in self._shared:
            zero = base if base is not None else self._number(0.0, dtype)
            self._shared[key] = self.edit.op("Where", [kept, zero, self._number(-math.inf, dtype)])
        return self._shared[key]

    def _dead(self, bias: ir.Value) -> ir.Value:
        """Which queries see no key."""
        key = ("dead", self._graph, bias)
        if key not in self._shared:
            dtype = self.facts.dtype(bias) or bias.dtype or ir.DataType.FLOAT
            largest = self.edit.op("ReduceMax", [bias, self._sizes(-1)])
            self._shared[key] = self.edit.op("Equal", [largest, self._number(-math.inf, dtype)])
        return self._shared[key]

    def _causal(self, site: Site, mask: ir.Value | None) -> ir.Value:
        """The mask of queries that see the past and the keys up to their own place."""
        lengths = self._lengths(site)
        boolean = mask is not None and (self.facts.dtype(mask) or mask.dtype) == ir.DataType.BOOL
        key = ("causal", self._graph, *lengths)
        if key not in self._shared:
            self._shared[key] = self._up_to_own_place(site, *lengths)
        seen = self._shared[key]
        if boolean:
            assert mask is not None
            both = ("both", self._graph, seen, mask)
            if both not in self._shared:
                self._shared[both] = self.edit.op("And", [seen, mask])
            seen, mask = self._shared[both], None
        return self._as_numbers(seen, mask, site.dtype)

    def _up_to_own_place(self, site: Site, queries: Dim, keys: Dim, past: Dim) -> ir.Value:
        rows, columns, before = queries.value, keys.value, past.value
        if rows is not None and columns is not None and before is not None and rows * columns <= _LARGEST_CONSTANT:
            seen = np.arange(columns)[None, :] <= np.arange(rows)[:, None] + before
            return self.edit.constant(seen, "causal")
        edit, axis = self.edit, 1 if site.merged else 2
        begin, one = self._integer(0), self._integer(1)
        last, end = (self._length(site.operand(name), axis) for name in ("q", "k"))
        cache = site.input("past_k")
        first = begin
        if cache is not None:
            first = self._length(cache, 2)
            last, end = edit.op("Add", [last, first]), edit.op("Add", [end, first])
        places = edit.op("Unsqueeze", [edit.op("Range", [first, last, one]), self._sizes(1)])
        return edit.op("LessOrEqual", [edit.op("Range", [begin, end, one]), places])

    def _lengths(self, site: Site) -> tuple[Dim, Dim, Dim]:
        """Queries, keys with the past, and the past."""
        axis = 1 if site.merged else 2
        shapes = [self.facts.shape(site.operand(name)) for name in ("q", "k")]
        assert shapes[0] is not None
        assert shapes[1] is not None
        queries, keys, past = shapes[0][axis], shapes[1][axis], Dim.of(0)
        cache = site.input("past_k")
        if cache is not None:
            shape = self.facts.shape(cache)
            if shape is None or len(shape) != 4:
                raise NotLowered("the shape of its cache isn't known")
            past = shape[2]
        return queries, keys + past, past

    # ---- small things

    def _length(self, value: ir.Value, axis: int) -> ir.Value:
        return self.edit.op("Squeeze", [self.edit.op("Shape", [value], {"start": axis, "end": axis + 1})])

    def _times(self, value: ir.Value, factor: float, dtype: ir.DataType) -> ir.Value:
        return value if factor == 1.0 else self.edit.op("Mul", [value, self._number(factor, dtype)])

    def _number(self, number: float, dtype: ir.DataType) -> ir.Value:
        return self._constant(np.array(number, dtype=dtype.numpy()), "number")

    def _integer(self, number: int) -> ir.Value:
        return self._constant(np.array(number, dtype=np.int64), "integer")

    def _sizes(self, *sizes: int | None) -> ir.Value:
        return self._constant(np.array(sizes, dtype=np.int64), "sizes")

    def _constant(self, array: npt.NDArray[Any], name: str) -> ir.Value:
        key = ("constant", self._graph, array.dtype.str, array.shape, array.tobytes())
        known = self._shared.get(key)
        if known is None or (known.graph is None):
            known = self._shared[key] = self.edit.constant(array, name)
        return known


def _declared(site: Site, index: int) -> ir.Value | None:
    return site.node.outputs[index] if index < len(site.node.outputs) else None
