"""Bypassing residual branches: x + f(x) becomes x, and all that served f alone goes, its cache included."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import onnx_ir as ir

from graphopt.analysis.branches import reads
from graphopt.analysis.depth_units import DepthUnit, DepthUnits, exclusive, same_shape
from graphopt.analysis.shapes import ShapeFacts
from graphopt.graph.edits import Editor
from graphopt.graph.importance import read_importance
from graphopt.graph.kept_layers import note_kept
from graphopt.graph.kv_edits import forget_pairs

Norms = Literal["remove", "keep"]
"""What becomes of the normalization of a post-LN branch's sum."""


Pieces = tuple[tuple[ir.Value, int] | int, ...]
"""Sizes: an axis of a value each, or what it always is."""


@dataclasses.dataclass(frozen=True)
class Bypassed:
    """What `bypass` did.

    Attributes:
        inputs: Names of the cache inputs that are gone.
        outputs: Names of the cache outputs that are gone.
        renamed: Name before → name now of the cache inputs and outputs that stayed.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    renamed: dict[str, str]


class _Plan:
    """What a graph is without some branches, found without an edit.

    Attributes:
        obstacles: Why units can't go, by unit.
        moves: The Shape nodes that read what goes, each with where its sizes can be read instead.
        gone: The cache inputs that go.
    """

    def __init__(self, model: ir.Model, found: DepthUnits, units: Sequence[DepthUnit], facts: ShapeFacts) -> None:
        self.obstacles: dict[DepthUnit, str] = {}
        self.moves: dict[ir.Node, Pieces] = {}
        self._facts = facts
        inputs = {value.name: value for value in model.graph.inputs}
        outputs = {value.name: value for value in model.graph.outputs}
        caches = [pair for unit in units for pair in unit.caches]
        self.gone = [inputs[pair.past] for pair in caches]
        self.lost = [outputs[pair.present] for pair in caches if pair.present is not None]
        told = read_importance(model.metadata_props)
        layers = {pair.layer for pair in caches if found.interface is not None and pair in found.interface.pairs}
        if told is not None:
            self.lost += [outputs[name] for layer, name in told.outputs.items() if layer in layers]
        self._owner: dict[ir.Value, DepthUnit] = {}
        for unit in units:
            for node in unit.branch.nodes:
                self._owner.update(dict.fromkeys(node.outputs, unit))
            self._owner.update({inputs[pair.past]: unit for pair in unit.caches})
        self._redirected = {unit.total: unit.remainder for unit in units}
        interface = found.interface
        pairs = () if interface is None else (*interface.pairs, *interface.cross)
        stay = [inputs[pair.past] for pair in pairs if inputs[pair.past] not in self._owner]
        self._substitutes = [*stay, *inputs.values()]
        own = () if interface is None else interface.pairs
        if own and all(inputs[pair.past] in self._owner for pair in own):
            self.obstacles[units[-1]] = "no cache would be left to tell how many tokens came before"
        self._look(model)

    def _look(self, model: ir.Model) -> None:
        """Follow what the outputs are made of; what goes and is met was needed."""
        lost = set(self.lost)
        pending = [self._standing_in(value) for value in model.graph.outputs if value not in lost]
        seen: dict[ir.Value, None] = dict.fromkeys(pending)
        while pending:
            value = pending.pop()
            if (node := value.producer()) is None:
                continue
            for read in reads(node):
                source = self._moved(node, read)
                if (unit := self._owner.get(source)) is not None:
                    self.obstacles.setdefault(
                        unit, f"{source.name!r} of it is read by {node.name or node.op_type!r}, which stays"
                    )
                elif source not in seen:
                    seen[source] = None
                    pending.append(source)
        for value in model.graph.outputs:
            if value not in lost and (unit := self._owner.get(value)) is not None:
                self.obstacles.setdefault(unit, f"{value.name!r} of it is an output of the model")

    def _standing_in(self, value: ir.Value) -> ir.Value:
        """What takes the place of a sum that goes."""
        while value in self._redirected:
            value = self._redirected[value]
        return value

    def _moved(self, node: ir.Node, read: ir.Value) -> ir.Value:
        """What `node` reads in place of `read`."""
        read = self._standing_in(read)
        if read not in self._owner or node.op_type != "Shape" or node.domain != "":
            return read
        if node not in self.moves and (pieces := self._pieces(node, read)) is not None:
            self.moves[node] = pieces
        # What the pieces are read of are inputs, or sums of the stream, which are followed where they are needed.
        return next((one[0] for one in self.moves.get(node, ()) if not isinstance(one, int)), read)

    def _pieces(self, node: ir.Node, read: ir.Value) -> Pieces | None:
        """Where the sizes that a Shape of `read` gives can be read instead; None where that isn't known."""
        shape = self._facts.shape(read)
        if shape is None:
            return None
        start, end = (node.attributes.get(name) for name in ("start", "end"))
        axes = range(len(shape))[
            start.as_int() if start is not None else None : end.as_int() if end is not None else None
        ]
        # What enters the branch is made before whatever reads a size of the branch.
        entering = self._standing_in(self._owner[read].remainder)
        substitutes = [v for v in (*self._substitutes, entering) if v not in self._owner]
        for other in substitutes:
            if same_shape(other, read, self._facts):
                return tuple((other, axis) for axis in axes)
        pieces: list[tuple[ir.Value, int] | int] = []
        for axis in axes:
            if (fixed := shape[axis].value) is not None:
                pieces.append(fixed)
                continue
            found = next(
                (
                    (other, place)
                    for other in substitutes
                    for place, size in enumerate(self._facts.shape(other) or ())
                    if size == shape[axis]
                ),
                None,
            )
            if found is None:
                return None
            pieces.append(found)
        return tuple(pieces)


def obstacles(
    model: ir.Model, found: DepthUnits, units: Iterable[DepthUnit], facts: ShapeFacts
) -> dict[DepthUnit, str]:
    """Why some units can't be bypassed together, by unit; empty where they can.

    Args:
        model: The model.
        found: Its units.
        units: Those that are to go.
        facts: Its shapes; with `believe_names`.
    """
    chosen = _ordered(found, units)
    return _Plan(model, found, chosen, facts).obstacles if chosen else {}


def bypass(
    model: ir.Model,
    found: DepthUnits,
    units: Iterable[DepthUnit],
    facts: ShapeFacts,
    *,
    norms: Norms = "keep",
) -> Bypassed:
    """Remove branches in place: each sum becomes its skip, and what served them alone goes with them.

    Cache inputs and outputs of an attention go too; those that stay are numbered without the gap, in the exporter's own
    pattern. What reads only the size of a cache that goes reads that of another.

    Args:
        model: The model.
        found: Its units, which no longer hold afterwards.
        units: Those that go.
        facts: Its shapes, with `believe_names`; they no longer hold either.
        norms: Whether the normalization of a post-LN branch's sum goes with it.

    Raises:
        ValueError: They can't be bypassed together; see `obstacles`.
    """
    chosen = _ordered(found, units)
    if not chosen:
        return Bypassed((), (), {})
    plan = _Plan(model, found, chosen, facts)
    for unit, reason in plan.obstacles.items():
        raise ValueError(f"{unit.name} can't be removed: {reason}")
    edit = Editor(model)
    for node, pieces in plan.moves.items():
        _read_elsewhere(node, pieces, edit)
    lost = set(plan.lost)
    model.graph.outputs[:] = [value for value in model.graph.outputs if value not in lost]
    inside = [node for unit in chosen for node in exclusive(unit.branch)]
    for unit in chosen:
        edit.at(unit.branch.add)
        edit.replace(unit.result(norms == "remove"), unit.remainder)
    behind = [value.producer() for value in plan.lost]
    for dead in (*behind, *reversed(inside)):
        if dead is not None and dead.graph is not None:
            _remove_onward(dead, edit)
    caches = [pair for unit in chosen for pair in unit.caches]
    if found.interface is None or not found.interface.pairs:
        if len({unit.stream for unit in found.units}) == 1:
            note_kept(model, [u.layer for u in found.units], [u.layer for u in found.units if u not in chosen])
        return Bypassed((), (), {})
    if not caches:
        return Bypassed((), (), {})
    renamed = forget_pairs(model, found.interface, caches)
    lost_names = tuple(pair.present for pair in caches if pair.present is not None)
    return Bypassed(tuple(pair.past for pair in caches), lost_names, renamed)


def _ordered(found: DepthUnits, units: Iterable[DepthUnit]) -> list[DepthUnit]:
    chosen = set(units)
    return [unit for unit in found.units if unit in chosen]


def _read_elsewhere(node: ir.Node, pieces: Pieces, edit: Editor) -> None:
    """Let a Shape node give the same sizes, read of other values."""
    edit.at(node)
    first = pieces[0] if pieces else 0
    if not isinstance(first, int) and all(
        not isinstance(one, int) and one[0] is first[0] and one[1] == first[1] + i for i, one in enumerate(pieces)
    ):
        span = {"start": first[1], "end": first[1] + len(pieces)}
        edit.replace(node.outputs[0], edit.op("Shape", [first[0]], span, like=node.outputs[0]))
        return
    parts = [
        edit.constant(np.asarray([one]), "size")
        if isinstance(one, int)
        else edit.op("Shape", [one[0]], {"start": one[1], "end": one[1] + 1})
        for one in pieces
    ]
    edit.replace(node.outputs[0], edit.op("Concat", parts, {"axis": 0}, like=node.outputs[0]))


def _remove_onward(node: ir.Node, edit: Editor) -> None:
    """Remove a node that leads to no output, with what reads it and what served it."""
    for output in node.outputs:
        for user, _ in tuple(output.uses()):
            if user.graph is not None:
                _remove_onward(user, edit)
    edit.remove_dead(node)
