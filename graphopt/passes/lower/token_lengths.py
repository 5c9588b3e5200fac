"""How many tokens there are, as `GroupQueryAttention` wants it, made once for all layers."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from graphopt.analysis.dims import Dim
from graphopt.analysis.shapes import ShapeFacts
from graphopt.graph.edits import Editor
from graphopt.passes.lower.cached_site import CachedSite


@dataclasses.dataclass
class Lengths:
    """Sizes as values of the graph.

    Attributes:
        all: Past and new tokens, int64 [1].
        total: The same, int32 [1].
        last: One less for each row of the batch, int32 [B].
    """

    all: ir.Value
    total: ir.Value
    last: ir.Value


class TokenLengths:
    """Writes lengths where they are first needed.

    With a mask [batch, tokens] its length counts, so that the cache may be a buffer longer than what is in it.
    """

    def __init__(self, facts: ShapeFacts, edit: Editor) -> None:
        self._facts, self._edit = facts, edit
        self._known: dict[tuple[object, ...], Lengths] = {}
        self._new: dict[tuple[object, ...], ir.Value] = {}
        self._past: dict[Dim, ir.Value] = {}

    def past(self, site: CachedSite) -> ir.Value | None:
        """An input of the model that shows how long the cache is, the same for all sites of that length."""
        shape = self._facts.shape(site.past_key)
        if shape is None:
            return None
        if shape[2] not in self._past and site.past_key.is_graph_input():
            self._past[shape[2]] = site.past_key
        return self._past.get(shape[2])

    def of(self, site: CachedSite, mask: ir.Value | None) -> Lengths:
        """The lengths at a site; the site of the editor is that of the attention."""
        key = (site.node.graph, mask, site.batch, site.total)
        if key not in self._known:
            self._known[key] = self._write(site, mask)
        return self._known[key]

    def new(self, site: CachedSite) -> ir.Value:
        """The number of new tokens, int64 [1]."""
        key = (site.node.graph, site.tokens)
        if key not in self._new:
            self._new[key] = self._size(*self._tokens(site))
        return self._new[key]

    def _tokens(self, site: CachedSite) -> tuple[ir.Value, int]:
        """A value with an axis of the new tokens: an input of the model where there is one."""
        for value in self._edit.model.graph.inputs:
            shape = self._facts.shape(value)
            if shape is not None and len(shape) > 1 and shape[1] == site.tokens and not value.is_initializer():
                return value, 1
        return site.q.value, 2 if site.q.layout == "heads" else 1

    def _size(self, value: ir.Value, axis: int) -> ir.Value:
        return self._edit.op("Shape", [value], {"start": axis, "end": axis + 1})

    def _write(self, site: CachedSite, mask: ir.Value | None) -> Lengths:
        edit = self._edit
        if mask is not None:
            every = self._size(mask, 1)
        else:
            every = edit.op("Add", [self._size(site.past_key, 2), self.new(site)])
        total = edit.op("Cast", [every], {"to": ir.DataType.INT32.value})
        last = edit.op("Sub", [total, edit.constant(np.array([1], dtype=np.int32), "one")])
        if site.batch != 1:
            last = edit.op("Expand", [last, self._size(mask if mask is not None else site.past_key, 0)])
        return Lengths(every, total, last)
