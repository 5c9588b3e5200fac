"""Healing without training: the layer before a removed branch is refitted so that it writes what is missing too.

    T = argmin_T Σ_t |(s_t − x_t) − y_t T|² / |s_t|² + λ |T − I|²,   W' = W T

with y = h W what the last linear layer of the branch before writes, x the stream that it is added to, and s the stream
of the original behind the removed branches: T makes of what is written there what is written and missing together, as
far as the one tells the other. Nothing is added to the graph. The error of a token counts in proportion to its stream,
since a norm follows: else the first token, whose stream is thousands of times as large, would be all that counts.

ReplaceMe: Network Simplification via Layer Pruning and Linear Transformations (Shopkhoev et al., 2025) puts a map
before a removed run of layers into the projection of the MLP before it in this way. Where a normalization stands
between (post-LN), the branch behind the removed ones is refitted to its own sum instead. Where none follows, or T is
diagonal, the last normalization that they leave behind gets the scale and shift for each channel with which it comes
nearest to what it gave, n_i ↦ a_i n_i + b_i.

The original and the model without the branches stand side by side in one graph, which runs piece by piece; each
refitted layer sees those before it as they were refitted.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.algebra import is_op
from graphopt.analysis.depth_units import DepthUnit, depth_units
from graphopt.analysis.shapes import infer
from graphopt.calibration.calibration import Calibration
from graphopt.calibration.halves import HALVES, HalvedMoment
from graphopt.calibration.request import Request
from graphopt.calibration.statistics import Summary
from graphopt.graph.constants import constant_tensor
from graphopt.graph.edits import Editor
from graphopt.passes.depth.bypass import Norms
from graphopt.passes.depth.refit import factors, linear_map, of_written

Heal = Literal["none", "affine", "linear"]
"""Nothing; T diagonal; any T. A bias is refitted with either, where there is one."""


Place = tuple[ir.Node, int]
"""An input of a node, by its number."""


@dataclasses.dataclass(frozen=True)
class Writer:
    """The last linear layer of a branch.

    Attributes:
        node: The MatMul.
        weight: Its constant weight [K, N].
        bias: The Add behind it of a constant [N], None where there is none.
    """

    node: ir.Node
    weight: ir.Value
    bias: ir.Node | None

    @classmethod
    def of(cls, unit: DepthUnit) -> Writer | None:
        """That of a unit; None where something else stands between it and the sum."""
        value, bias = unit.branch.output, None
        node = value.producer()
        if node is not None and is_op(node, "Add"):
            constant = [v for v in node.inputs if constant_tensor(v) is not None]
            others = [v for v in node.inputs if v is not None and v not in constant]
            if len(constant) != 1 or len(others) != 1 or len(value.uses()) != 1:
                return None
            bias, value = node, others[0]
            node = value.producer()
        if node is None or not is_op(node, "MatMul") or len(value.uses()) != 1 or node not in unit.branch.nodes:
            return None
        weight = node.inputs[1]
        tensor = constant_tensor(weight)
        if weight is None or tensor is None or len(tensor.shape) != 2 or not tensor.dtype.is_floating_point():
            return None
        if bias is not None:
            held = next(t for v in bias.inputs if (t := constant_tensor(v)) is not None)
            if held.size != tensor.shape[1]:
                return None
        return cls(node, weight, bias)

    @property
    def places(self) -> tuple[Place, ...]:
        """Where the weight and the bias are read."""
        if self.bias is None:
            return ((self.node, 1),)
        held = next(i for i, v in enumerate(self.bias.inputs) if constant_tensor(v) is not None)
        return (self.node, 1), (self.bias, held)


@dataclasses.dataclass(frozen=True)
class Norm:
    """A normalization over channels with a scale for each, and perhaps a shift."""

    node: ir.Node

    @classmethod
    def of(cls, unit: DepthUnit) -> Norm | None:
        """That of a unit's sum; None where there is none of this form."""
        node = unit.norm
        if node is None or not is_op(node, "LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"):
            return None
        tensors = [constant_tensor(value) for value in node.inputs[1:] if value is not None]
        if not all(t is not None and len(t.shape) == 1 and t.dtype.is_floating_point() for t in tensors):
            return None
        return cls(node)

    @property
    def places(self) -> tuple[Place, ...]:
        """Where the scale and the shift are read."""
        return tuple((self.node, i) for i, value in enumerate(self.node.inputs) if i and value is not None)


@dataclasses.dataclass(frozen=True)
class Healed:
    """What `heal` did.

    Attributes:
        writers: The units of which the last linear layer was refitted, each with how much of the squared error before
            is left, of 0 to 1.
        norms: The removed units of which the normalization, which stays, was refitted, with the same.
        left: Units that weren't, each with the reason.
    """

    writers: tuple[tuple[DepthUnit, float], ...]
    norms: tuple[tuple[DepthUnit, float], ...]
    left: tuple[tuple[DepthUnit, str], ...]


@dataclasses.dataclass(frozen=True)
class _Fit:
    """What is refitted, in the second half: what is observed of it, and its constants there, the weight first."""

    request: Request
    constants: tuple[ir.Value, ...]
    norm: bool = False


def heal(
    model: ir.Model,
    units: Sequence[DepthUnit],
    removed: Sequence[DepthUnit],
    calibration: Calibration,
    *,
    form: Heal = "linear",
    ridge: float = 0.0,
    norms: Norms = "keep",
) -> Healed:
    """Refit what writes beside branches that are going to be removed, in place; they are still there afterwards.

    Args:
        model: The model.
        units: All its units.
        removed: Those that will be removed.
        calibration: The data; all of it is used.
        form: "affine" or "linear".
        ridge: λ, in parts of each channel's mean of y²; 0: of a whole map as cross-validation over halves of the
            samples picks it (of one sample generalised cross-validation), of factors none.
        norms: As of `bypass`.

    Raises:
        InputDataError: The data doesn't fit the model.
    """
    parts: dict[DepthUnit, Writer | Norm] = {}
    ends: dict[DepthUnit, DepthUnit] = {}
    left = []
    for run in _runs(units, removed):
        fitted, end = _beside(units, run, set(removed), norms)
        writer = None if fitted is None else Writer.of(fitted)
        # What is refitted before the run makes up for all of it, and a whole map needs no other scales: in MiniLM it
        # loses more with them.
        alone = fitted is None or (end is fitted and form == "affine")
        norm = Norm.of(run[-1]) if norms == "keep" and alone else None
        if norm is not None:
            parts[run[-1]] = norm
        if fitted is not None and writer is not None and fitted not in parts:
            parts[fitted], ends[fitted] = writer, end
        elif writer is None and norm is None:
            left.append((run[0], "no linear layer with a constant weight is the last of a branch beside it"))
    if form == "none" or not parts:
        return Healed((), (), tuple(left))
    twin = model.clone()
    theirs = depth_units(twin, infer(twin, believe_names=True)).units
    pairs = {unit.name: unit for unit in theirs}
    fits = _Twin(twin, norms).write(
        [pairs[u.name] for u in removed],
        {pairs[u.name]: pairs[end.name] for u, end in ends.items()},
        [pairs[u.name] for u in parts if u not in ends],
    )
    wanted = {fits[pairs[unit.name]].request: unit for unit in parts}
    edit = Editor(model)
    done: dict[DepthUnit, float] = {}
    for stage in calibration.stages(twin, list(wanted), sequential=True, grain="site"):
        for request in stage.summaries:
            if request not in wanted:
                continue
            unit = wanted[request]
            fit = fits[pairs[unit.name]]
            made, done[unit] = _refitted(stage[request], fit, form, ridge)
            for (node, place), constant, array in zip(parts[unit].places, fit.constants, made, strict=True):
                old = node.inputs[place]
                new = array.astype(_held(old).dtype)
                constant.const_value = ir.tensor(new, name=constant.name)
                edit.at(node)
                node.replace_input_with(place, edit.constant(new, "healed"))
                if old is not None and old.is_initializer() and not old.uses() and not old.is_graph_output():
                    model.graph.initializers.pop(old.name or "", None)
    writers = tuple((unit, rest) for unit, rest in done.items() if unit in ends)
    return Healed(writers, tuple((unit, rest) for unit, rest in done.items() if unit not in ends), tuple(left))


def _refitted(summary: Summary, fit: _Fit, form: Heal, ridge: float) -> tuple[list[npt.NDArray[np.float64]], float]:
    """New constants from the moments of (h, wanted, 1) / |s|, and the part of the error that is left.

    The constants are a weight [K, N], or the scale [N] of a normalization, and a shift [N] where there is one.
    """
    weight, *shift = (_held(value).astype(np.float64) for value in fit.constants)
    outputs = weight.shape[-1]
    # Of a normalization the outputs are observed themselves, their shift included.
    written = np.eye(outputs) if fit.norm else weight
    moments = of_written(summary.array, written, shifted=bool(shift), rows=summary.rows)
    halves = None
    if "rows" in summary.arrays:
        even, odd = (
            of_written(summary[name], written, shifted=bool(shift), rows=int(rows))
            for name, rows in zip(HALVES, summary["rows"], strict=True)
        )
        halves = (even, odd)
    before = np.vstack([np.eye(outputs), *(np.zeros_like(b) if fit.norm else b for b in shift)])
    linear = form == "linear" and not fit.norm
    after = linear_map(moments, before, ridge, halves) if linear else factors(moments, ridge)
    rest = moments.error(after) / max(moments.error(before), 1e-30)
    made = [weight @ after[:outputs]]
    if shift:
        made.append(after[-1] + (shift[0] @ after[:outputs] if fit.norm else 0))
    return made, rest


def _runs(units: Sequence[DepthUnit], removed: Sequence[DepthUnit]) -> list[list[DepthUnit]]:
    """The removed units, neighbours in one stream together."""
    gone, runs = set(removed), list[list[DepthUnit]]()
    for previous, unit in zip((None, *units), units, strict=False):
        if unit not in gone:
            continue
        if runs and previous in gone and previous is not None and previous.stream == unit.stream:
            runs[-1].append(unit)
        else:
            runs.append([unit])
    return runs


def _beside(
    units: Sequence[DepthUnit], run: list[DepthUnit], gone: set[DepthUnit], norms: Norms
) -> tuple[DepthUnit | None, DepthUnit]:
    """The unit that is refitted for a run, and the one whose sum in the original it is refitted to."""
    for before in units:
        if before.total is run[0].remainder and before not in gone:
            chained = all(a.result(norms == "remove") is b.remainder for a, b in itertools.pairwise(run))
            if chained and all(unit.norm is None or norms == "keep" for unit in run) and Writer.of(before) is not None:
                return before, run[-1]
    behind = [u for u in units if u.stream == run[0].stream and u.index > run[-1].index and u not in gone]
    return (behind[0], behind[0]) if behind else (None, run[-1])


def _held(value: ir.Value | None) -> npt.NDArray[Any]:
    tensor = constant_tensor(value)
    assert tensor is not None
    return np.array(tensor.numpy())


class _Twin:
    """Writes the model without some branches beside a graph: every node behind the first of them a second time."""

    def __init__(self, twin: ir.Model, norms: Norms) -> None:
        self._graph, self._edit, self._norms = twin.graph, Editor(twin), norms
        self._half: dict[ir.Value, ir.Value] = {}

    def write(
        self, removed: Sequence[DepthUnit], ends: dict[DepthUnit, DepthUnit], normed: Sequence[DepthUnit]
    ) -> dict[DepthUnit, _Fit]:
        """Write the second half.

        Args:
            removed: The units that it lacks.
            ends: The units of which the writer is refitted, each with the one whose sum it is refitted to.
            normed: The removed ones of which the normalization is.
        """
        skipped = {unit.result(self._norms == "remove").producer(): unit for unit in removed}
        dead = {node for unit in removed for node in unit.branch.nodes}
        last = {end.branch.add: unit for unit, end in ends.items()}
        writers = {unit: writer for unit in ends if (writer := Writer.of(unit)) is not None}
        # What a refitted layer writes is made in the second half behind what it is refitted by.
        own = {n: u for u, w in writers.items() for n in (w.node, w.bias, u.branch.add) if n is not None}
        scaled = {norm.node: (unit, norm) for unit in normed if (norm := Norm.of(unit)) is not None}
        found: dict[DepthUnit, _Fit] = {}
        waiting: dict[ir.Value, ir.Value] = {}
        for node in list(self._graph):
            self._edit.at(node)
            if node in last:
                unit = last[node]
                found[unit] = self._refitted(unit, ends[unit], writers[unit])
            if (gone := skipped.get(node)) is not None:
                stream, whole = gone.remainder, gone.result(self._norms == "remove")
                stream = waiting.get(stream, stream)
                if any(stream is unit.total and unit not in found for unit in ends):
                    waiting[whole] = stream  # which is written at the end of the run
                else:
                    self._half[whole] = self._half.get(stream, stream)
            elif node in scaled:
                unit, norm = scaled[node]
                found[unit] = self._normed(norm)
            elif node not in own and node not in dead and any(v in self._half for v in node.inputs if v is not None):
                self._again(node, [None if v is None else self._half.get(v, v) for v in node.inputs])
        return found

    def _refitted(self, unit: DepthUnit, end: DepthUnit, writer: Writer) -> _Fit:
        """Observe what is refitted before a sum, and write the layer with constants of its own, up to its sum."""
        h, stream = writer.node.inputs[0], unit.remainder
        assert h is not None
        # The original's sum stands behind its addition; here it is made once more.
        total = self._edit.op("Add", list(end.branch.add.inputs), like=end.total)
        request = self._observed(self._half.get(h, h), self._half.get(stream, stream), total)
        constants = self._constants(writer.places)
        for node in (writer.node, writer.bias):
            if node is not None:
                self._with(node, writer.places, constants)
        self._again(unit.branch.add, [self._half.get(v, v) for v in unit.branch.add.inputs if v is not None])
        return _Fit(request, constants)

    def _normed(self, norm: Norm) -> _Fit:
        """Write a normalization with constants of its own, and observe what it gives beside the original's."""
        node = norm.node
        constants = self._constants(norm.places)
        self._with(node, norm.places, constants)
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        wanted = self._edit.op(node.op_type, list(node.inputs), attributes, domain=node.domain, like=node.outputs[0])
        return _Fit(self._observed(self._half[node.outputs[0]], None, wanted), constants, norm=True)

    def _observed(self, h: ir.Value, stream: ir.Value | None, total: ir.Value) -> Request:
        """(h, s − x, 1) / |s| of what a layer reads, the stream x that it is added to (None: 0), and the s wanted."""
        edit = self._edit
        h_, total_ = (edit.op("Cast", [v], {"to": int(ir.DataType.FLOAT)}) for v in (h, total))
        wanted = total_
        if stream is not None:
            wanted = edit.op("Sub", [total_, edit.op("Cast", [stream], {"to": int(ir.DataType.FLOAT)})])
        square = edit.op("Mul", [total_, total_])
        mean = edit.op("ReduceMean", [square, edit.constant(np.array([-1]), "axis")], {"keepdims": 1})
        size = edit.op("Sqrt", [edit.op("Add", [mean, edit.constant(np.array(1e-12, np.float32), "tiny")])])
        inverse = edit.op("Reciprocal", [size])
        pair = edit.op("Concat", [*(edit.op("Mul", [v, inverse]) for v in (h_, wanted)), inverse], {"axis": -1})
        pair.type = ir.TensorType(ir.DataType.FLOAT)
        sizes = [v.shape[-1] for v in (h, total) if v.shape is not None]
        if total.shape is not None and len(sizes) == 2 and all(isinstance(n, int) for n in sizes):
            pair.shape = ir.Shape([*list(total.shape)[:-1], sum(n for n in sizes if isinstance(n, int)) + 1])
        return Request(pair, HalvedMoment())

    def _constants(self, places: Sequence[Place]) -> tuple[ir.Value, ...]:
        """Copies of the constants that are read at some places."""
        return tuple(self._edit.constant(_held(node.inputs[place]), "half") for node, place in places)

    def _with(self, node: ir.Node, places: Sequence[Place], constants: Sequence[ir.Value]) -> None:
        """Write a node a second time, with other constants."""
        inputs = [None if v is None else self._half.get(v, v) for v in node.inputs]
        for (of, place), constant in zip(places, constants, strict=True):
            if of is node:
                inputs[place] = constant
        self._again(node, inputs)

    def _again(self, node: ir.Node, inputs: list[ir.Value | None]) -> None:
        """Write a node a second time, with other inputs."""
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        first = self._edit.op(
            node.op_type, inputs, attributes, domain=node.domain, outputs=len(node.outputs), like=node.outputs[0]
        )
        made = first.producer()
        assert made is not None
        for old, new in zip(node.outputs, made.outputs, strict=True):
            new.type, new.shape = old.type, None if old.shape is None else ir.Shape(old.shape)
            self._half[old] = new
