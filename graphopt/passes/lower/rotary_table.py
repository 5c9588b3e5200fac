"""Cosines and sines as a table by position, of which the rows of the new tokens are those that the graph computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.algebra import is_op, producer
from graphopt.analysis.shapes import ShapeFacts
from graphopt.graph.assumptions import Assumptions
from graphopt.graph.constants import constant_tensor, is_constant
from graphopt.graph.edits import Editor
from graphopt.graph.importance import read_importance
from graphopt.passes.clean.fold_constants import STORED_BYTES, computable, evaluate
from graphopt.passes.lower.cached_site import CachedSite
from graphopt.passes.lower.token_lengths import TokenLengths

COUNTED, SINGLE = "counted-positions", "batch=1"
_ALONG = ("Add", "Cast", "Cos", "Div", "Identity", "Mul", "Neg", "Sin", "Sub")
"""Operators that compute each row of a batch alike."""
_LIMIT = 64
_LARGEST = 1 << 24
"""Elements of a table."""

Numbers = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Need:
    """Something that has to be assumed.

    Attributes:
        assumption: Its name.
        inputs: The inputs that show whether it holds, by role.
        reason: What needs it, for the metadata.
        problem: What isn't certain without it, for the report.
        instead: Another assumption that would do, or "".
    """

    assumption: str
    inputs: Mapping[str, str]
    reason: str
    problem: str
    instead: str = ""


@dataclasses.dataclass
class Table:
    """Where the rows of the new tokens come from.

    Attributes:
        cos: Cosines: [B, S, R/2], or [positions, R/2] with `positions`.
        sin: Sines.
        positions: Indices [B, S] into these, or None.
        longest: Whether the row of the batch with the longest mask is to be taken, else the first.
        needs: What is taken for granted.
        fixed: [cosines, sines] of all positions that may come, where they are constant; nothing else counts then.
        counted: The position ids that numbers in `fixed` were computed from.
    """

    cos: ir.Value
    sin: ir.Value
    positions: ir.Value | None
    longest: bool
    needs: list[Need]
    fixed: list[ir.Value | Numbers] | None = None
    counted: ir.Value | None = None


class RotaryTables:
    """Plans and writes tables; sites with the same rotation share one."""

    def __init__(self, facts: ShapeFacts, edit: Editor, assumptions: Assumptions, lengths: TokenLengths) -> None:
        self._facts, self._edit, self._assumptions, self._lengths = facts, edit, assumptions, lengths
        self._known: dict[tuple[object, ...], list[ir.Value]] = {}
        self._alike: dict[ir.Value, bool] = {}
        self._numbers: dict[tuple[ir.Value, ir.Value], Numbers | None] = {}

    def sources(self, site: CachedSite) -> tuple[ir.Value, ir.Value, ir.Value | None] | None:
        """Cosines and sines of a site's rotation, [B, S, R/2], or [positions, R/2] with indices [B, S] into them; None
        where an operator for attention can't rotate by them."""
        rotation = site.rotation
        if rotation is None:
            return None
        inputs = [*rotation.inputs, None]
        cos, sin, positions = inputs[1:4]
        if cos is None or sin is None:
            return None
        shape = self._facts.shape(cos)
        half = shape[-1].value if shape else None
        if (
            shape is None
            or half is None
            or half % 8
            or 2 * half > site.depth
            or len(shape) != (3 if positions is None else 2)
        ):
            return None
        return (cos, sin, positions) if positions is not None else (self.bare(cos), self.bare(sin), None)

    def plan(self, site: CachedSite, mask: ir.Value | None) -> Table | None:
        """The table for a site; None where the operator can't rotate, as where it would do so by places in a cache that
        may have lost tokens (`evictable-kv`)."""
        losing = read_importance(self._edit.model.metadata_props) is not None
        if losing or (found := self.sources(site)) is None:
            return None
        cos, sin, positions = found
        if (fixed := self._fixed(cos, sin, positions, site, mask)) is not None:
            return fixed
        varying = [positions] if positions is not None else [cos, sin]
        if site.batch == 1 or all(self.alike(value) for value in varying):
            return Table(cos, sin, positions, False, [])
        model = self._edit.model
        if self._assumptions.holds(SINGLE):
            ids = first_input(model, self._facts, site)
            if ids is not None:
                reason = "one table of rotations serves all rows"
                return Table(cos, sin, positions, False, [Need(SINGLE, {"ids": ids.name or ""}, reason, "")])
        counted = self.counted(varying[0], site, mask)
        return None if counted is None else Table(cos, sin, positions, mask is not None, [counted[1]])

    def counted(self, value: ir.Value, site: CachedSite, mask: ir.Value | None) -> tuple[ir.Value, Need] | None:
        """The position ids that `value` is computed from, where they may be taken to count up."""
        positions = self._positions(value, site) if self._assumptions.holds(COUNTED) else None
        past = self._lengths.past(site)
        if positions is None or (mask is None and past is None):
            return None
        given = {"positions": positions, "past": past, "mask": mask}
        roles = {role: value.name or "" for role, value in given.items() if value is not None}
        return positions, Need(COUNTED, roles, "one table of rotations serves all rows", "")

    def _fixed(
        self, cos: ir.Value, sin: ir.Value, positions: ir.Value | None, site: CachedSite, mask: ir.Value | None
    ) -> Table | None:
        """The table of all positions up to the longest that is assumed: it is the same in every run."""
        longest = self._assumptions.max_length
        counted = None if longest is None else self.counted(positions or cos, site, mask)
        ids = first_input(self._edit.model, self._facts, site)
        if longest is None or counted is None or (mask is None and ids is None):
            return None
        source, need = counted
        made: list[ir.Value | Numbers] = []
        for value in (cos, sin):
            if positions is not None:
                rows = constant_tensor(value)
                if rows is None or int(rows.shape.numpy()[0]) < longest or source is not positions:
                    return None
                made.append(value)
                continue
            numbers = self.evaluated(value, source, longest)
            if numbers is None or numbers.ndim != 3 or numbers.shape[:2] != (1, longest):
                return None
            made.append(numbers[0])
        roles = {"mask": mask.name or ""} if mask is not None else {**need.inputs, "ids": ids.name or "" if ids else ""}
        roles.pop("positions", None)
        length = Need(f"max-length={longest}", roles, "the table of rotations is that long", "")
        return Table(cos, sin, positions, False, [need, length], made, source)

    def evaluated(self, value: ir.Value, positions: ir.Value, length: int) -> Numbers | None:
        """The numbers of `value` where the position ids of one row count up from 0."""
        shape = self._facts.shape(value)
        if shape is None or length * (shape[-1].value or _LARGEST) > _LARGEST:
            return None
        if (value, positions) in self._numbers:
            return self._numbers[value, positions]
        dtype = self._facts.dtype(positions)
        assert dtype is not None
        known: dict[ir.Value, Numbers | None] = {positions: np.arange(length, dtype=dtype.numpy())[None]}
        version = self._edit.opset
        stack = [value]
        while stack:
            current = stack[-1]
            if current in known:
                stack.pop()
                continue
            node = current.producer()
            if node is None or node.op_type == "Constant":
                tensor = constant_tensor(current)
                known[current] = None if tensor is None else tensor.numpy()
                continue
            waiting = [v for v in node.inputs if v is not None and v not in known]
            if waiting:
                stack.extend(waiting)
                continue
            arrays = [None if v is None else known[v] for v in node.inputs]
            missing = any(v is not None and a is None for v, a in zip(node.inputs, arrays, strict=True))
            results = None if missing or not computable(node, version) else evaluate(node, arrays, version)
            for index, output in enumerate(node.outputs):
                known[output] = None if results is None else results[index]
        self._numbers[value, positions] = known[value]
        return known[value]

    def write(self, table: Table, site: CachedSite, mask: ir.Value | None) -> list[ir.Value]:
        """[cosines, sines], each [past + new tokens, R/2]; the site of the editor is that of the attention."""
        key = (site.node.graph, table.cos, table.sin, table.positions, mask, site.total)
        if key not in self._known:
            self._known[key] = self._write(table, site, mask)
        return self._known[key]

    def _write(self, table: Table, site: CachedSite, mask: ir.Value | None) -> list[ir.Value]:
        edit = self._edit
        if table.fixed is not None:
            return self.stored(table.fixed, (table.cos, table.sin), table.counted)
        past = edit.op("Sub", [self._lengths.of(site, mask).all, self._lengths.new(site)])
        pads = edit.op("Concat", [past, edit.constant(_integers([0]), "zero")], {"axis": 0})
        axes = edit.constant(_integers([0]), "axes")
        row = edit.constant(_integers(0), "first") if not table.longest or mask is None else self._longest(mask)
        index = None if table.positions is None else edit.op("Gather", [table.positions, row], {"axis": 0})
        made = []
        for whole in (table.cos, table.sin):
            new = edit.op("Gather", [whole, row if index is None else index], {"axis": 0})
            made.append(edit.op("Pad", [new, pads, None, axes]))
        return made

    def stored(
        self, tables: Sequence[ir.Value | Numbers], sources: Sequence[ir.Value], positions: ir.Value | None
    ) -> list[ir.Value]:
        """Tables [positions, R/2] in the model: small ones as they are, larger ones as what computes them.

        A session with its usual optimizations computes the larger ones when it is loaded, and the file is smaller by
        them: 2 MB for 8192 positions of 64 features.

        Args:
            tables: Constants of the model as they are, or numbers.
            sources: What the model computes each by, [B, S, R/2], of any type of floats.
            positions: The position ids that numbers were computed from; None: there are none.
        """
        edit, made = self._edit, list(tables)
        large = {
            place: table
            for place, (table, source) in enumerate(zip(tables, sources, strict=True))
            if not isinstance(table, ir.Value) and table.nbytes > STORED_BYTES and not is_constant(source)
        }
        if large and positions is not None:
            one = next(iter(large.values()))
            count, dtype = edit.constant(_integers(len(one)), "count"), ir.DataType.from_numpy(one.dtype)
            with edit.for_load():
                rows = self.rows_by_position(count, positions, [sources[place] for place in large], dtype)
            for place, row in zip(large, rows, strict=True):
                made[place] = row
        return [table if isinstance(table, ir.Value) else edit.constant(table, "rotations") for table in made]

    def rows_by_position(
        self, count: ir.Value, positions: ir.Value, sources: Sequence[ir.Value], dtype: ir.DataType
    ) -> list[ir.Value]:
        """What the model computes from position ids, for the positions from 0 on: [count, R/2] each.

        Args:
            count: How many positions, int64 [].
            positions: The position ids.
            sources: What is computed from them, [1, S, R/2] of a row of ids.
            dtype: The type of the rows.
        """
        edit, given = self._edit, self._facts.dtype(positions)
        first = edit.constant(_integers([0]), "first")
        zero, one = (edit.constant(_integers(number), "position") for number in (0, 1))
        every = edit.op("Unsqueeze", [edit.op("Range", [zero, count, one]), first])
        if given not in (None, ir.DataType.INT64):
            every = edit.op("Cast", [every], {"to": given.value})
        copies, made = {positions: every}, []
        for source in sources:
            rows = edit.op("Squeeze", [computed_anew(edit, source, copies), first])
            made.append(rows if self._facts.dtype(source) == dtype else edit.op("Cast", [rows], {"to": dtype.value}))
        return made

    def bare(self, value: ir.Value) -> ir.Value:
        """What an Expand repeats nothing of, or only along the batch."""
        node = producer(value, "Expand")
        source = None if node is None else node.inputs[0]
        whole, part = self._facts.shape(value), self._facts.shape(source) if source is not None else None
        if source is None or whole is None or part is None or len(whole) != len(part) or whole[1:] != part[1:]:
            return value
        return source if part[0] in (1, whole[0]) else value

    def _longest(self, mask: ir.Value) -> ir.Value:
        """The row with the most ones: its positions hold wherever another row has a token."""
        edit = self._edit
        ones = mask
        if self._facts.dtype(mask) not in (ir.DataType.INT64, ir.DataType.INT32):
            ones = edit.op("Cast", [mask], {"to": ir.DataType.INT64.value})
        count = edit.op("ReduceSum", [ones, edit.constant(_integers([1]), "axis")], {"keepdims": 0})
        return edit.op("ArgMax", [count], {"axis": 0, "keepdims": 0})

    # ---- what the rows of a batch have in common

    def alike(self, value: ir.Value) -> bool:
        """Whether all rows along the first axis are proved to be the same."""
        if value in self._alike:
            return self._alike[value]
        self._alike[value] = False  # while it is looked for
        self._alike[value] = self._same_rows(value)
        return self._alike[value]

    def _same_rows(self, value: ir.Value) -> bool:
        shape = self._facts.shape(value)
        if shape is None or len(shape) < 2:
            return False
        if shape[0] == 1:
            return True
        node = value.producer()
        source = node.inputs[0] if node is not None and node.inputs else None
        if node is None or source is None:
            return False
        if is_op(node, *_ALONG, "MatMul"):
            return all(v is not None and self._part(v, len(shape)) for v in node.inputs)
        if is_op(node, "Expand"):
            return self._part(source, len(shape))
        if is_op(node, "Transpose"):
            perm = node.attributes.get("perm")
            return perm is not None and not perm.is_ref() and perm.as_ints()[0] == 0 and self.alike(source)
        if is_op(node, "Unsqueeze", "Squeeze"):
            before = self._facts.shape(source)
            return before is not None and len(before) > 1 and before[0] == shape[0] and self.alike(source)
        if is_op(node, "Concat"):
            axis = node.attributes.get("axis")
            along = axis is not None and not axis.is_ref() and axis.as_int() not in (0, -len(shape))
            return along and all(v is not None and self.alike(v) for v in node.inputs)
        if is_op(node, "Gather"):
            indices, axis = node.inputs[1], node.attributes.get("axis")
            first = axis is None or (not axis.is_ref() and axis.as_int() == 0)
            return first and indices is not None and is_constant(source) and self.alike(indices)
        return False

    def _part(self, value: ir.Value, rank: int) -> bool:
        """Whether `value`, broadcast to `rank` axes, adds nothing that differs between rows."""
        shape = self._facts.shape(value)
        return shape is not None and (len(shape) < rank or self.alike(value))

    def _positions(self, value: ir.Value, site: CachedSite) -> ir.Value | None:
        """The input [B, S] of integers, where `value` depends on it and on no other number that is fed."""
        found: dict[ir.Value, None] = {}
        seen: dict[ir.Value, None] = {value: None}
        queue = [value]
        for current in queue:
            node = current.producer()
            if node is None:
                if constant_tensor(current) is None:
                    found[current] = None
                continue
            if is_op(node, "Shape", "Size"):
                continue
            if len(seen) > _LIMIT:
                return None
            for source in node.inputs:
                if source is not None and source not in seen:
                    seen[source] = None
                    queue.append(source)
        if len(found) != 1:
            return None
        (only,) = found
        shape, dtype = self._facts.shape(only), self._facts.dtype(only)
        fits = shape is not None and tuple(shape) == (site.batch, site.tokens)
        return only if fits and dtype is not None and dtype.is_integer() and only.is_graph_input() else None


def first_input(model: ir.Model, facts: ShapeFacts, site: CachedSite) -> ir.Value | None:
    """The first input of the model whose first two axes are the batch and the new tokens of a site."""
    for value in model.graph.inputs:
        shape = facts.shape(value)
        if shape is not None and len(shape) > 1 and tuple(shape[:2]) == (site.batch, site.tokens):
            return value
    return None


def computed_anew(edit: Editor, value: ir.Value, copies: dict[ir.Value, ir.Value]) -> ir.Value:
    """What computes `value`, written anew at the editor's site from the values that `copies` has in place of others.

    Args:
        edit: The graph's editor.
        value: The value.
        copies: Values by those that they replace; what was written joins them.
    """
    stack = [value]
    while stack:
        current = stack[-1]
        node = current.producer()
        if current in copies or node is None:
            copies.setdefault(current, current)
            stack.pop()
            continue
        waiting = [v for v in node.inputs if v is not None and v not in copies]
        if waiting:
            stack.extend(waiting)
            continue
        inputs = [None if v is None else copies[v] for v in node.inputs]
        if list(node.inputs) == inputs:
            copies.update((output, output) for output in node.outputs)
            continue
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        first = edit.op(node.op_type, inputs, attributes, domain=node.domain, outputs=len(node.outputs))
        made = first.producer()
        assert made is not None
        copies.update(zip(node.outputs, made.outputs, strict=True))
    return copies[value]


def _integers(numbers: int | list[int]) -> ir.TensorProtocol:
    return ir.tensor(np.array(numbers, dtype=np.int64))
