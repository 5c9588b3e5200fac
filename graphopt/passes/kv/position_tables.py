"""Cosines and sines of every position, for an operator that rotates what has been in its cache for long."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from graphopt.graph.assumptions import Assumptions
from graphopt.graph.constants import constant_tensor
from graphopt.graph.edits import Editor
from graphopt.passes.lower.cached_site import CachedSite
from graphopt.passes.lower.rotary_table import Need, Numbers, RotaryTables


@dataclasses.dataclass(frozen=True)
class PositionTable:
    """Where the rows of all positions come from.

    Attributes:
        sources: Cosines and sines, [B, S, R/2], or constants [positions, R/2] where `constants` holds them.
        positions: The position ids that the sources are computed from.
        constants: Cosines and sines by position, float32; None: they are computed anew in each run.
        needs: What is taken for granted.
    """

    sources: tuple[ir.Value, ir.Value]
    positions: ir.Value
    constants: tuple[Numbers, Numbers] | None
    needs: list[Need]


class PositionTables:
    """Plans and writes tables; sites with the same rotation share one."""

    def __init__(self, tables: RotaryTables, edit: Editor, assumptions: Assumptions) -> None:
        self._tables, self._edit, self._assumptions = tables, edit, assumptions
        self._known: dict[tuple[object, ...], list[ir.Value]] = {}

    def plan(self, site: CachedSite, mask: ir.Value) -> PositionTable | None:
        """The table for a site; None where no rows but those of the new tokens are known.

        Args:
            site: The site.
            mask: The attention mask [B, past and new tokens], an input of the model.
        """
        found = self._tables.sources(site)
        return None if found is None else self.plan_from(*found, site, mask)

    def plan_from(
        self, cos: ir.Value, sin: ir.Value, indices: ir.Value | None, site: CachedSite, mask: ir.Value | None
    ) -> PositionTable | None:
        """The table behind some cosines and sines of the new tokens; None where no other rows are known.

        Args:
            cos: [B, S, R/2], or [positions, R/2] with `indices`.
            sin: The same.
            indices: Rows of these [B, S], or None.
            site: The site.
            mask: The attention mask [B, past and new tokens], an input of the model; None: there is none, and the cache
                tells how many tokens there are.
        """
        counted = self._tables.counted(indices or cos, site, mask)
        if counted is None:
            return None
        positions, need = counted
        name = "" if mask is None else mask.name or ""
        shows = {"positions": positions.name or "", "mask": name} if mask is not None else need.inputs
        needs = [dataclasses.replace(need, inputs=shows, reason="each row counts its positions from 0")]
        if indices is not None:
            rows = [constant_tensor(value) for value in (cos, sin)]
            if positions is not indices or rows[0] is None or rows[1] is None:
                return None
            return PositionTable((cos, sin), positions, _pair([row.numpy() for row in rows if row is not None]), needs)
        longest = self._assumptions.max_length
        numbers = [self._tables.evaluated(value, positions, longest or 2) for value in (cos, sin)]
        if any(n is None or n.ndim != 3 or n.shape[:2] != (1, longest or 2) for n in numbers):
            return None
        if longest is None or mask is None:
            return PositionTable((cos, sin), positions, None, needs)
        needs.append(Need(f"max-length={longest}", {"mask": name}, "the table of rotations is that long", ""))
        return PositionTable((cos, sin), positions, _pair([n[0] for n in numbers if n is not None]), needs)

    def write(self, table: PositionTable, mask: ir.Value) -> list[ir.Value]:
        """[cosines, sines], each [positions, R/2], float32; the site of the editor is that of the attention. `mask` is
        any value whose second axis is as long as past and new tokens together."""
        key = (*table.sources, table.positions, mask)
        if key not in self._known:
            self._known[key] = self._write(table, mask)
        return self._known[key]

    def _write(self, table: PositionTable, mask: ir.Value) -> list[ir.Value]:
        edit = self._edit
        if table.constants is not None:
            return self._tables.stored(table.constants, table.sources, table.positions)
        first = edit.constant(np.array([0]), "first")
        count = edit.op("Squeeze", [edit.op("Shape", [mask], {"start": 1, "end": 2}), first])
        return self._tables.rows_by_position(count, table.positions, table.sources, ir.DataType.FLOAT)


def _pair(numbers: list[Numbers]) -> tuple[Numbers, Numbers]:
    cos, sin = (np.ascontiguousarray(n, dtype=np.float32) for n in numbers)
    return cos, sin
