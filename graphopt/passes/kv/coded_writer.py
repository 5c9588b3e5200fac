"""Attention over keys and values that are rebuilt from a cache of features, of lower rank or coded."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphopt.analysis.shapes import ShapeFacts
from graphopt.graph.edits import Editor
from graphopt.graph.kv_interface import asks_for_another_axis
from graphopt.passes.kv.cache_codes import Place, Store
from graphopt.passes.kv.cached_layers import CachedLayer, Sharing, new_rows
from graphopt.passes.kv.feature_bases import Basis
from graphopt.passes.kv.position_tables import PositionTable, PositionTables
from graphopt.passes.kv.recent_window import RecentWindow
from graphopt.passes.lower.cached_site import CachedSite, Operand, as_tokens, projection


@dataclasses.dataclass(frozen=True)
class Member:
    """A layer that is to be written.

    Attributes:
        layer: The layer.
        site: Its attention, with what is around it.
        table: Where the rotations of its past keys come from; None: they aren't rotated.
        mask: An input [B, past and new tokens]; None: there is none.
    """

    layer: CachedLayer
    site: CachedSite
    table: PositionTable | None
    mask: ir.Value | None

    @property
    def pasts(self) -> tuple[ir.Value, ir.Value]:
        """Its caches of keys and values, inputs of the model."""
        return self.site.past_key, self.site.past_value

    def problem(self) -> str:
        """Why its caches can't have other sizes; "": they can."""
        for past in self.pasts:
            users = [user for user, _ in past.uses() if user is not self.layer.node]
            if not all(asks_for_another_axis(user, 1) and asks_for_another_axis(user, 3) for user in users):
                return "the sizes of its cache are read"
        return ""


@dataclasses.dataclass(frozen=True)
class Coding:
    """What a cache holds of keys or values.

    Attributes:
        basis: Their features are coordinates in it; None: the keys or values themselves, all heads side by side.
        store: How features are stored.
    """

    basis: Basis | None
    store: Store


class CodedWriter:
    """Writes caches [B, 1, tokens, width] in place of [B, H, tokens, D].

    Args:
        facts: Shapes of the model.
        edit: Its editor.
        tables: Writes the rotations of all positions.
        window: Tokens before the new ones that `together` keeps exact.
    """

    def __init__(self, facts: ShapeFacts, edit: Editor, tables: PositionTables, window: int = 0) -> None:
        self._facts, self._edit, self._tables = facts, edit, tables
        self._sharing, self._window = Sharing(edit, facts), RecentWindow(window, edit)
        self._counted: dict[tuple[object, ...], ir.Value] = {}
        self._features_of: dict[Place, ir.Value] = {}

    def alone(self, member: Member, keys: Coding, values: Coding) -> None:
        """One layer: keys and values of past and new tokens are rebuilt from the cache."""
        edit, layer, site = self._edit, member.layer, member.site
        edit.at(layer.node)
        wholes, full = [], []
        for slot, (past, operand, coding) in enumerate(
            zip(member.pasts, (site.k, site.v), (keys, values), strict=True)
        ):
            new = self._features(operand, site, coding.basis)
            if coding.store.dtype is not None:
                new = self._cast(new, self._type(site), ir.DataType.FLOAT)
            whole, features = coding.store.write(new, past, self._features_of, edit)
            self._features_of[layer.number, slot] = features
            if coding.store.dtype is not None:
                features = self._cast(features, ir.DataType.FLOAT, self._type(site))
            wholes.append(whole)
            full.append(self._rebuilt(features, coding.basis, site))
        full[0] = self._rotated(full[0], wholes[0], member, ("all", site.batch, site.total))
        y = self._sharing.write(layer, full[0], full[1])
        self._read(layer, full)
        self._store(layer, member.pasts, wholes, (keys, values))
        edit.replace(layer.node.outputs[0], y)

    def together(self, members: Sequence[Member], keys: Coding, values: Coding) -> None:
        """Neighbouring layers with one cache of features as they are: past tokens are rebuilt, new ones, and those of
        the window, are each layer's own. The first keeps its inputs and outputs; those of the others are out of use."""
        edit, first = self._edit, members[0]
        assert keys.basis is not None
        assert values.basis is not None
        bases = keys.basis, values.basis
        size = first.site.kv_heads * first.site.depth
        results: list[ir.Value] = []
        rows: tuple[list[ir.Value], list[ir.Value]] = ([], [])
        for place, member in enumerate(members):
            edit.at(member.layer.node)
            own = slice(place * size, (place + 1) * size)
            full = []
            for slot, (past, basis) in enumerate(zip(first.pasts, bases, strict=True)):
                operand = (member.site.k, member.site.v)[slot]
                rows[slot].append(as_tokens(operand, member.site.depth, edit))
                new = new_rows(member.layer, slot + 1, edit)
                older, exact = self._window.split(member.layer.pairs[slot], member.pasts[slot], past, new)
                before = self._rebuilt(older, basis.part(own), member.site)
                if not slot:
                    before = self._rotated(before, older, member, ("past", first.layer.form))
                full.append(edit.op("Concat", [before, exact], {"axis": 2}))
            results.append(self._sharing.write(member.layer, full[0], full[1]))
            self._read(member.layer, full)
        codes = []
        for parts, past, basis in zip(rows, first.pasts, bases, strict=True):
            joint = edit.op("Concat", parts, {"axis": -1})
            new = self._encoded(joint, basis, first.site)
            codes.append(edit.op("Concat", [past, new], {"axis": 2}))
        for member in members[1:]:
            for past, other in zip(member.pasts, first.pasts, strict=True):
                for user, slot in [(use.node, use.idx) for use in past.uses()]:
                    if user is not member.layer.node:
                        user.replace_input_with(slot, other)
            for present in member.layer.presents:
                edit.model.graph.outputs.remove(present)
        self._store(first.layer, first.pasts, codes, (keys, values))
        for member, y in zip(members, results, strict=True):
            edit.replace(member.layer.node.outputs[0], y)

    # ---- parts

    def _features(self, operand: Operand, site: CachedSite, basis: Basis | None) -> ir.Value:
        """Features of new tokens, [B, 1, S, r]; those of a product with a weight are another product."""
        product, edit = projection(operand), self._edit
        if basis is None:
            return edit.op("Unsqueeze", [as_tokens(operand, site.depth, edit), edit.constant(np.array([1]), "axis")])
        if product is None:
            return self._encoded(as_tokens(operand, site.depth, edit), basis, site)
        bias = product.bias()
        assert not isinstance(bias, str)
        weight = product.weight.numpy().astype(np.float64) @ basis.encoder
        source = product.node.inputs[0]
        assert source is not None
        return self._product(source, weight, (bias - basis.mean) @ basis.encoder, site)

    def _encoded(self, rows: ir.Value, basis: Basis, site: CachedSite) -> ir.Value:
        """Coordinates of rows [B, S, d], as [B, 1, S, r]."""
        return self._product(rows, basis.encoder, -basis.mean @ basis.encoder, site)

    def _product(self, rows: ir.Value, weight: np.ndarray, shift: np.ndarray, site: CachedSite) -> ir.Value:
        edit = self._edit
        product = edit.op("MatMul", [rows, self._constant(weight, "encoder", site)])
        if shift.any():
            product = edit.op("Add", [product, self._constant(shift, "shift", site)])
        return edit.op("Unsqueeze", [product, edit.constant(np.array([1]), "axis")])

    def _rebuilt(self, features: ir.Value, basis: Basis | None, site: CachedSite) -> ir.Value:
        """Keys or values [B, KV, T, D] of features [B, 1, T, r]: a product for each head."""
        edit, heads = self._edit, site.kv_heads
        blocks = None if basis is None else basis.blocks(heads)
        if basis is None or blocks is not None:
            rows = edit.op("Squeeze", [features, edit.constant(np.array([1]), "axis")])
            split = edit.op("Reshape", [rows, edit.constant(np.array([0, 0, heads, site.depth]), "heads")])
            features = edit.op("Transpose", [split], {"perm": [0, 2, 1, 3]})
        if basis is None:
            return features
        if blocks is None:
            blocks = basis.decoder.reshape(basis.rank, heads, -1).transpose(1, 0, 2)
        full = edit.op("MatMul", [features, self._constant(blocks, "decoder", site)])
        if basis.mean.any():
            full = edit.op("Add", [full, self._constant(basis.mean.reshape(heads, 1, -1), "mean", site)])
        return full

    def _rotated(self, keys: ir.Value, codes: ir.Value, member: Member, which: tuple[object, ...]) -> ir.Value:
        """Keys [B, KV, T, D] turned by the positions from 0 on; `codes` [B, 1, T, width] tell how many."""
        edit, turn, table = self._edit, member.site.k.rotation, member.table
        if turn is None or table is None:
            return keys
        cos, sin = self._tables.write(table, self._count(member))
        dtype = self._type(member.site)
        cos, sin = (self._cast(rows, ir.DataType.FLOAT, dtype) for rows in (cos, sin))
        if which not in self._counted:
            first, zero, one = (edit.constant(np.array(n), "range") for n in ([0], 0, 1))
            count = edit.op("Squeeze", [edit.op("Shape", [codes], {"start": 2, "end": 3}), first])
            rows = edit.op("Unsqueeze", [edit.op("Range", [zero, count, one]), first])
            batch = edit.op("Shape", [codes], {"start": 0, "end": 1})
            sizes = edit.op("Concat", [batch, edit.op("Shape", [codes], {"start": 2, "end": 3})], {"axis": 0})
            self._counted[which] = edit.op("Expand", [rows, sizes])
        attributes = {name: a.value for name, a in turn.attributes.items() if name != "num_heads"}
        return edit.op("RotaryEmbedding", [keys, cos, sin, self._counted[which]], attributes)

    def _count(self, member: Member) -> ir.Value:
        """A value whose second axis is as long as past and new tokens together."""
        if member.mask is not None:
            return member.mask
        key = ("total", member.site.batch, member.site.total)
        if key not in self._counted:
            edit = self._edit
            new = edit.op("Shape", [as_tokens(member.site.q, member.site.depth, edit)], {"start": 1, "end": 2})
            total = edit.op("Add", [edit.op("Shape", [member.site.past_key], {"start": 2, "end": 3}), new])
            one = edit.constant(np.array([1]), "one")
            self._counted[key] = edit.op("ConstantOfShape", [edit.op("Concat", [one, total], {"axis": 0})])
        return self._counted[key]

    def _read(self, layer: CachedLayer, full: Sequence[ir.Value]) -> None:
        """Let what reads the layer's keys and values within the graph read the rebuilt ones."""
        for present, now in zip(layer.presents, full, strict=True):
            for user, slot in [(use.node, use.idx) for use in present.uses()]:
                user.replace_input_with(slot, now)

    def _store(
        self, layer: CachedLayer, pasts: Sequence[ir.Value], wholes: Sequence[ir.Value], codings: Sequence[Coding]
    ) -> None:
        """Let what is stored take the place of a layer's keys and values among inputs and outputs."""
        outputs = self._edit.model.graph.outputs
        for past, present, whole, coding in zip(pasts, layer.presents, wholes, codings, strict=True):
            place, shape, store = outputs.index(present), present.shape, coding.store
            self._edit.replace(present, whole)
            outputs[place].shape = None if shape is None else ir.Shape([shape[0], 1, shape[2], store.width])
            if past.shape is not None:
                past.shape = ir.Shape([past.shape[0], 1, past.shape[2], store.width])
            if store.dtype is not None:
                past.type = outputs[place].type = ir.TensorType(store.dtype)

    def _type(self, site: CachedSite) -> ir.DataType:
        return self._facts.dtype(site.q.value) or ir.DataType.FLOAT

    def _cast(self, value: ir.Value, is_of: ir.DataType, to: ir.DataType) -> ir.Value:
        return value if is_of == to else self._edit.op("Cast", [value], {"to": to.value})

    def _constant(self, numbers: np.ndarray, name: str, site: CachedSite) -> ir.Value:
        return self._edit.constant(np.ascontiguousarray(numbers, dtype=self._type(site).numpy()), name)
