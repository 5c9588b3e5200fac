"""Healing without training: the layer before a removed branch is refitted so that it writes what is missing too.

    T = argmin_T Σ_t |(s_t − x_t) − y_t T|² / |s_t|² + λ |T − I|²,   W' = W T

with y = h W what the last linear layer of the branch before writes, x the stream that it is added to, and s the stream
of the original behind the removed branches: T makes of what is written there what is written and missing together, as
far as the one tells the other. Nothing is added to the graph. The error of a token counts in proportion to its stream,
since a norm follows: else the first token, whose stream is thousands of times as large, would be all that counts.

ReplaceMe: Network Simplification via Layer Pruning and Linear Transformations (Shopkhoev et al., 2025) puts a map
before a removed run of layers into the projection of the MLP before it in this way. Where a normalization stands
between (post-LN), the branch behind the removed ones is refitted to its own sum instead.

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
from graphopt.calibration.request import Request
from graphopt.calibration.statistics import SecondMoment, Summary
from graphopt.graph.constants import constant_tensor
from graphopt.graph.edits import Editor
from graphopt.passes.depth.bypass import Norms
from graphopt.passes.depth.refit import factors, linear_map, of_written

Heal = Literal["none", "affine", "linear"]
"""Nothing; T diagonal; any T. A bias is refitted with either, where there is one."""


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
    def shift(self) -> ir.Value | None:
        """The constant that is added."""
        if self.bias is None:
            return None
        return next(v for v in self.bias.inputs if constant_tensor(v) is not None)


@dataclasses.dataclass(frozen=True)
class Healed:
    """What `heal` did.

    Attributes:
        writers: The refitted layers, each with how much of the squared error before is left, of 0 to 1.
        left: Units that weren't, each with the reason.
    """

    writers: tuple[tuple[DepthUnit, float], ...]
    left: tuple[tuple[DepthUnit, str], ...]


@dataclasses.dataclass(frozen=True)
class _Fit:
    """A layer of the second half: what is observed of it, and its constants there."""

    request: Request
    inputs: int
    weight: ir.Value
    shift: ir.Value | None


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
        ridge: λ, in parts of each channel's mean of y²; 0: as generalised cross-validation picks it.
        norms: As of `bypass`.

    Raises:
        InputDataError: The data doesn't fit the model.
    """
    writers: dict[DepthUnit, Writer] = {}
    ends: dict[DepthUnit, DepthUnit] = {}
    left = []
    for run in _runs(units, removed):
        fitted, end = _beside(units, run, set(removed), norms)
        writer = None if fitted is None else Writer.of(fitted)
        if fitted is None or writer is None:
            left.append((run[0], "no linear layer with a constant weight is the last of a branch beside it"))
        elif fitted not in writers:
            writers[fitted], ends[fitted] = writer, end
    if form == "none" or not writers:
        return Healed((), tuple(left))
    twin = model.clone()
    theirs = depth_units(twin, infer(twin, believe_names=True)).units
    pairs = {unit.name: unit for unit in theirs}
    fits = _Twin(twin, norms).write(
        [pairs[u.name] for u in removed], {pairs[u.name]: pairs[end.name] for u, end in ends.items()}
    )
    wanted = {fits[pairs[unit.name]].request: unit for unit in writers}
    edit = Editor(model)
    done: list[tuple[DepthUnit, float]] = []
    for stage in calibration.stages(twin, list(wanted), sequential=True, grain="site"):
        for request in stage.summaries:
            if request not in wanted:
                continue
            unit = wanted[request]
            fit, writer = fits[pairs[unit.name]], writers[unit]
            weight, shift, rest = _refitted(stage[request], fit, form, ridge)
            done.append((unit, rest))
            kind = _dtype(writer.weight)
            fit.weight.const_value = ir.tensor(weight.astype(kind), name=fit.weight.name)
            before = (writer.weight, writer.shift)
            edit.at(writer.node)
            writer.node.replace_input_with(1, edit.constant(weight.astype(kind), "healed"))
            if fit.shift is not None and shift is not None and writer.bias is not None:
                fit.shift.const_value = ir.tensor(shift.astype(kind), name=fit.shift.name)
                place = next(i for i, v in enumerate(writer.bias.inputs) if constant_tensor(v) is not None)
                edit.at(writer.bias)
                writer.bias.replace_input_with(place, edit.constant(shift.astype(kind), "healed_bias"))
            for old in before:
                if old is not None and old.is_initializer() and not old.uses() and not old.is_graph_output():
                    model.graph.initializers.pop(old.name or "", None)
    return Healed(tuple(done), tuple(left))


def _refitted(
    summary: Summary, fit: _Fit, form: Heal, ridge: float
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32] | None, float]:
    """A weight [K, N] and a shift [N] from the moments of (h, wanted, 1) / |s|, and the part of the error that is
    left."""
    assert fit.weight.const_value is not None
    held = np.asarray(fit.weight.const_value.numpy(), np.float64)
    shift = None if fit.shift is None or fit.shift.const_value is None else fit.shift.const_value.numpy()
    moments = of_written(summary.array, held, shifted=shift is not None, rows=summary.rows)
    outputs = held.shape[1]
    before = np.vstack([np.eye(outputs), *([shift.astype(np.float64)] if shift is not None else [])])
    after = linear_map(moments, before, ridge) if form == "linear" else factors(moments, ridge)
    rest = moments.error(after) / max(moments.error(before), 1e-30)
    made = held @ after[:outputs]
    return made.astype(np.float32), after[-1].astype(np.float32) if shift is not None else None, rest


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


def _dtype(value: ir.Value) -> np.dtype[Any]:
    tensor = constant_tensor(value)
    assert tensor is not None
    return tensor.dtype.numpy()


class _Twin:
    """Writes the model without some branches beside a graph: every node behind the first of them a second time."""

    def __init__(self, twin: ir.Model, norms: Norms) -> None:
        self._graph, self._edit, self._norms = twin.graph, Editor(twin), norms
        self._half: dict[ir.Value, ir.Value] = {}

    def write(self, removed: Sequence[DepthUnit], ends: dict[DepthUnit, DepthUnit]) -> dict[DepthUnit, _Fit]:
        """Write the second half.

        Args:
            removed: The units that it lacks.
            ends: The units that are refitted, each with the one whose sum it is refitted to.
        """
        skipped = {unit.result(self._norms == "remove").producer(): unit for unit in removed}
        dead = {node for unit in removed for node in unit.branch.nodes}
        last = {end.branch.add: unit for unit, end in ends.items()}
        writers = {unit: writer for unit in ends if (writer := Writer.of(unit)) is not None}
        # What a refitted layer writes is made in the second half behind what it is refitted by.
        own = {n: u for u, w in writers.items() for n in (w.node, w.bias, u.branch.add) if n is not None}
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
            elif node not in own and node not in dead and any(v in self._half for v in node.inputs if v is not None):
                self._again(node, [None if v is None else self._half.get(v, v) for v in node.inputs])
        return found

    def _refitted(self, unit: DepthUnit, end: DepthUnit, writer: Writer) -> _Fit:
        """Observe (h, wanted, 1) / |s| before a sum, and write the layer with a weight of its own, up to its sum."""
        edit = self._edit
        h, stream = writer.node.inputs[0], unit.remainder
        assert h is not None
        h, stream = self._half.get(h, h), self._half.get(stream, stream)
        # The original's sum stands behind its addition; here it is made once more.
        total = edit.op("Add", list(end.branch.add.inputs), like=end.total)
        h_, stream_, total_ = (edit.op("Cast", [v], {"to": int(ir.DataType.FLOAT)}) for v in (h, stream, total))
        square = edit.op("Mul", [total_, total_])
        mean = edit.op("ReduceMean", [square, edit.constant(np.array([-1]), "axis")], {"keepdims": 1})
        size = edit.op("Sqrt", [edit.op("Add", [mean, edit.constant(np.array(1e-12, np.float32), "tiny")])])
        inverse = edit.op("Reciprocal", [size])
        scaled = [edit.op("Mul", [v, inverse]) for v in (h_, edit.op("Sub", [total_, stream_]))]
        pair = edit.op("Concat", [*scaled, inverse], {"axis": -1})
        pair.type = ir.TensorType(ir.DataType.FLOAT)
        constants = []
        for node in (writer.node, writer.bias):
            if node is None:
                continue
            place = (
                1
                if node is writer.node
                else next(i for i, v in enumerate(node.inputs) if constant_tensor(v) is not None)
            )
            tensor = constant_tensor(node.inputs[place])
            assert tensor is not None
            held = edit.constant(ir.tensor(np.array(tensor.numpy())), "half")
            inputs = [None if v is None else self._half.get(v, v) for v in node.inputs]
            inputs[place] = held
            self._again(node, inputs)
            constants.append(held)
        self._again(unit.branch.add, [self._half.get(v, v) for v in unit.branch.add.inputs if v is not None])
        weight, *shift = constants
        assert weight.shape is not None
        features, outputs = (int(n) for n in weight.shape.numpy())
        if total.shape is not None:
            pair.shape = ir.Shape([*list(total.shape)[:-1], features + outputs + 1])
        return _Fit(Request(pair, SecondMoment()), features, weight, shift[0] if shift else None)

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
