"""Caches that hold something else than keys and values, from which these are rebuilt where they are read."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.shapes import ShapeFacts
from graphopt.errors import InputDataError
from graphopt.graph.edits import Editor
from graphopt.graph.importance import read_importance
from graphopt.graph.kv_edits import forget_pairs
from graphopt.passes.base import Guarantee, Pass
from graphopt.passes.kv.cache_rows import CacheRows, Samples, rows_of
from graphopt.passes.kv.cached_layers import CachedLayer, Caches
from graphopt.passes.kv.coded_writer import CodedWriter, Coding, Member
from graphopt.passes.kv.feature_bases import Floats
from graphopt.passes.kv.position_tables import PositionTables
from graphopt.passes.kv.sharing_heal import place_of
from graphopt.passes.lower.cached_site import NotTaken, read, whole_mask
from graphopt.passes.lower.rotary_table import COUNTED, RotaryTables
from graphopt.passes.lower.token_lengths import TokenLengths

_AT_ONCE = 1 << 30
"""Bytes of keys and values that are gathered in one run."""


class CodedKV(Pass):
    """What passes share that store features or codes in place of keys and values: which layers can be written, and how.

    Args:
        samples: Of the data.
        keep: Layers that stay as they are, counted from 0 among those with a cache.

    Attributes:
        window: Tokens before a run that groups which are written `together` keep exact.
    """

    window: int = 0

    family: ClassVar[str] = "kv"
    guarantee: ClassVar[Guarantee] = Guarantee.LOSSY
    needs = ("text",)

    def __init__(self, samples: int, keep: Sequence[int] | None) -> None:
        super().__init__()
        if samples < 1:
            raise ValueError(f"samples must be positive, not {samples}")
        self.samples, self.keep = samples, list(keep or ())

    @abc.abstractmethod
    def codings(
        self, model: ir.Model, groups: Sequence[Sequence[Member]], samples: Samples, facts: ShapeFacts
    ) -> list[tuple[Coding, Coding]]:
        """What the caches of keys and of values of each group hold, told as `applied`."""

    def grouped(self, members: Mapping[int, Member]) -> list[list[Member]]:
        """The layers that have one cache, by number; each has its own unless a pass says otherwise."""
        return [[member] for member in members.values()]

    def together(self, members: Sequence[Member]) -> bool:
        """Whether a group is written so that the new tokens of a run are each layer's own."""
        return False

    def problem(self, member: Member) -> str:
        """Why a layer that can be written isn't; "": it is."""
        return ""

    def apply(self, model: ir.Model) -> bool:
        """See the base."""
        caches = Caches.of(self, model)
        if caches is None:
            return False
        layers, facts, edit = caches.layers, caches.facts, Editor(model)
        if read_importance(model.metadata_props) is not None:
            for layer in layers.values():
                self.left(layer.node, "its cache stays: tokens may be dropped from it (evictable-kv)")
            return False
        rotations = RotaryTables(facts, edit, self.assumptions, TokenLengths(facts, edit))
        positions = PositionTables(rotations, edit, self.assumptions)
        groups = self.grouped(self._members(model, layers, facts, rotations, positions))
        if not groups or self.calibration is None:
            return False
        samples = list(self.calibration.feeds(model, self.samples))
        if not samples:
            raise InputDataError(f"{self.name}: the data holds no sample.")
        writer = CodedWriter(facts, edit, positions, self.window)
        gone = []
        for members, (keys, values) in zip(groups, self.codings(model, groups, samples, facts), strict=True):
            for need in (need for member in members if member.table is not None for need in member.table.needs):
                self.rely_on(model, need.assumption, need.inputs, need.reason)
            if self.together(members):
                writer.together(members, keys, values)
                gone += [pair for member in members[1:] for pair in member.layer.pairs]
            else:
                writer.alone(members[0], keys, values)
        if gone:
            forget_pairs(model, caches.interface, gone)
        return True

    def rows(
        self, model: ir.Model, members: Sequence[Member], samples: Samples, *, attended: bool
    ) -> Iterator[CacheRows]:
        """Keys and values of each layer token by token, in as few runs as memory allows; see `rows_of`."""
        assert self.calibration is not None
        tokens = sum(max(array.size for array in sample.values()) for sample in samples)
        widest = max(member.site.kv_heads * member.site.depth for member in members)
        count = max(1, _AT_ONCE // (8 * tokens * widest))
        for begin in range(0, len(members), count):
            some = members[begin : begin + count]
            sites = [member.site for member in some]
            found = rows_of(model, sites, samples, self.calibration.threads, attended=attended)
            for member, rows in zip(some, found, strict=True):
                told = (rows.keys, rows.values, rows.counts, rows.asked)
                self.require_finite([member], *(array for array in told if array is not None))
                yield rows

    def require_finite(self, members: Sequence[Member], *arrays: npt.NDArray[Any]) -> None:
        """Refuse data on which what was found of some layers isn't finite.

        Raises:
            InputDataError: It isn't.
        """
        if not all(np.isfinite(array).all() for array in arrays):
            numbers = ", ".join(str(member.layer.number) for member in members)
            raise InputDataError(
                f"{self.name}: on this data keys, values or queries of layer {numbers} aren't finite numbers."
            )

    def _members(
        self,
        model: ir.Model,
        layers: Mapping[int, CachedLayer],
        facts: ShapeFacts,
        rotations: RotaryTables,
        positions: PositionTables,
    ) -> dict[int, Member]:
        """The layers that can be worked on, by number."""
        found: dict[int, Member] = {}
        for number, layer in sorted(layers.items()):
            if number in self.keep:
                continue
            member = self._member(model, layer, facts, rotations, positions)
            reason = member if isinstance(member, str) else self.problem(member)
            if isinstance(member, str) or reason:
                self.left(layer.node, f"its cache stays: {reason}")
            else:
                found[number] = member
        return found

    def _member(
        self, model: ir.Model, layer: CachedLayer, facts: ShapeFacts, rotations: RotaryTables, positions: PositionTables
    ) -> Member | str:
        """A layer with what its writing needs, or why it can't be written."""
        try:
            site = read(layer.node, facts)
        except NotTaken as reason:
            return str(reason)
        if site is None or site.shared is not None:
            return "it has none of its own"
        mask = whole_mask(model, site, facts)
        table = None
        if (turn := site.k.rotation) is not None:
            cos, sin, indices = (*turn.inputs, None)[1:4]
            if cos is None or sin is None:
                return "its rotation has no cosines and sines"
            if not self.assumptions.holds(COUNTED):
                return f"the positions of what is cached aren't known: --assume {COUNTED}"
            if indices is None:
                cos, sin = rotations.bare(cos), rotations.bare(sin)
            table = positions.plan_from(cos, sin, indices, site, mask)
            if table is None:
                return "its rotations don't follow from the position ids alone"
        member = Member(layer, site, table, mask)
        return member.problem() or member


def undivided(channels: int, member: Member) -> str:
    """Why so many channels can't have a byte together in a layer; "": they can."""
    depth = member.site.depth
    return f"{channels} channels a byte don't divide a head of {depth}" if depth % channels else ""


def read_by(group: Sequence[Member], facts: ShapeFacts) -> Floats | None:
    """Σ W_o W_oᵀ over the query heads that read each KV head, [heads, D, D]; None where W_o isn't known."""
    found = []
    for member in group:
        place, site = place_of(member.layer, facts), member.site
        if isinstance(place, str):
            return None
        weight = place.output.weight.numpy().astype(np.float64)
        by_head = weight.reshape(site.kv_heads, -1, site.depth, weight.shape[1])
        found.append(np.einsum("hgin,hgjn->hij", by_head, by_head, optimize=True))
    return np.concatenate(found)
