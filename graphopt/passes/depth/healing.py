"""Healing without training: what writes to the stream behind a removed branch is refitted to the original's stream.

    W' = argmin_W Σ_t |(s_t − x_t) − h_t W|² / |s_t|² + λ |W − W₀|²

with s the sum after that branch in the original, x the stream that enters its sum in the model without the removed
branches, and h what its last linear layer reads there. The missing contribution and what it changed downstream are made
up for together, as far as h shows them; nothing is added to the graph. The error of a token counts in proportion to its
stream, since a norm follows: else the first token, whose stream is thousands of times as large, would be all that
counts.

The original and the model without the branches stand side by side in one graph, which runs piece by piece; each
refitted layer sees those before it as they were refitted.
"""

from __future__ import annotations

import dataclasses
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
from graphopt.calibration.statistics import SecondMoment
from graphopt.graph.constants import constant_tensor
from graphopt.graph.edits import Editor, subgraphs_of
from graphopt.passes.depth.bypass import Norms

Heal = Literal["none", "affine", "linear"]
"""Nothing; a factor and, where there is a bias, a shift for each channel that a layer writes; its whole weight."""
Floats = npt.NDArray[np.float64]


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
    reach: int = 0,
    ridge: float = 0.01,
    norms: Norms = "remove",
) -> Healed:
    """Refit what writes behind branches that are going to be removed, in place; they are still there afterwards.

    Args:
        model: The model.
        units: All its units.
        removed: Those that will be removed.
        calibration: The data; all of it is used.
        form: "affine" or "linear".
        reach: How many writers behind each removed branch are refitted; 0: all.
        ridge: λ, in parts of the mean of h².
        norms: As of `bypass`.

    Raises:
        InputDataError: The data doesn't fit the model.
    """
    gone = set(removed)
    chosen: list[DepthUnit] = []
    for unit in removed:
        behind = [u for u in units if u.stream == unit.stream and u.index > unit.index and u not in gone]
        chosen += behind[:reach] if reach else behind
    writers, left = {}, []
    for unit in sorted(set(chosen), key=lambda u: u.index):
        writer = Writer.of(unit)
        if writer is None:
            left.append((unit, "what it adds doesn't come from a linear layer with a constant weight"))
        else:
            writers[unit] = writer
    if form == "none" or not writers:
        return Healed((), tuple(left))
    twin = model.clone()
    theirs = depth_units(twin, infer(twin, believe_names=True)).units
    pairs = {unit.name: unit for unit in theirs}
    fits = _Twin(twin, norms).write([pairs[u.name] for u in removed], [pairs[u.name] for u in writers])
    wanted = {fits[pairs[unit.name]].request: unit for unit in writers}
    edit = Editor(model)
    done: list[tuple[DepthUnit, float]] = []
    for stage in calibration.stages(twin, list(wanted), sequential=True, grain="site"):
        for request in stage.summaries:
            if request not in wanted:
                continue
            unit = wanted[request]
            fit, writer = fits[pairs[unit.name]], writers[unit]
            weight, shift, rest = _refitted(stage[request].array, fit, form, ridge)
            done.append((unit, rest))
            fit.weight.const_value = ir.tensor(weight, name=fit.weight.name)
            before = (writer.weight, writer.shift)
            edit.at(writer.node)
            kind = _dtype(writer.weight)
            writer.node.replace_input_with(1, edit.constant(weight.astype(kind), "healed"))
            if fit.shift is not None and shift is not None and writer.bias is not None:
                fit.shift.const_value = ir.tensor(shift, name=fit.shift.name)
                place = next(i for i, v in enumerate(writer.bias.inputs) if constant_tensor(v) is not None)
                edit.at(writer.bias)
                writer.bias.replace_input_with(place, edit.constant(shift.astype(kind), "healed_bias"))
            for old in before:
                if old is not None and old.is_initializer() and not old.uses() and not old.is_graph_output():
                    model.graph.initializers.pop(old.name or "", None)
    return Healed(tuple(done), tuple(left))


def _refitted(
    second: npt.NDArray[np.float32], fit: _Fit, form: Heal, ridge: float
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32] | None, float]:
    """A weight [K, N] and a shift [N] from the moments of (h, wanted, 1 / |s|), and the part of the error that is left.

    Rows are divided by |s|, so that a shift is a weight of 1 / |s|.
    """
    moments = second.astype(np.float64)
    size, last = fit.inputs, len(moments) - 1
    assert fit.weight.const_value is not None
    held = np.asarray(fit.weight.const_value.numpy(), np.float64)
    shift = None if fit.shift is None or fit.shift.const_value is None else fit.shift.const_value.numpy()
    rows = [*range(size), *([last] if shift is not None else [])]
    before = np.vstack([held, *([shift.astype(np.float64)] if shift is not None else [])])
    gram, cross = moments[np.ix_(rows, rows)], moments[np.ix_(rows, range(size, last))]
    energy = np.diag(moments)[size:last]

    def error(weight: Floats) -> float:
        return float((energy - 2 * (weight * cross).sum(0) + (weight * (gram @ weight)).sum(0)).sum())

    strength = ridge * float(np.trace(gram[:size, :size])) / size
    if form == "linear":
        penalty = np.full(len(rows), strength)
        if shift is not None:
            penalty[-1] = ridge * gram[-1, -1]
        regular = gram + np.diag(penalty)
        after = np.linalg.solve(regular, cross + penalty[:, None] * before)
    else:
        after = _affine(gram, cross, before, size, ridge)
    rest = error(after) / max(error(before), 1e-30)
    return after[:size].astype(np.float32), after[-1].astype(np.float32) if shift is not None else None, rest


def _affine(gram: Floats, cross: Floats, before: Floats, size: int, ridge: float) -> Floats:
    """For each channel y = h w the factor a, and the shift b, of least error of a y + b, with a ridge towards 1."""
    held = before[:size]
    power = (held * (gram[:size, :size] @ held)).sum(0)
    along = (held * cross[:size]).sum(0)
    if len(before) == size:
        return np.asarray(held * (along + ridge * power) / np.maximum((1 + ridge) * power, 1e-30))
    ones, tilt, wanted = gram[-1, -1], gram[-1, :size] @ held, cross[-1]
    # Two equations for each channel: of the factor and of the shift.
    determinant = np.maximum((1 + ridge) * power * ones - tilt**2, 1e-30)
    factor = ((along + ridge * power) * ones - tilt * wanted) / determinant
    return np.vstack([held * factor, (wanted - factor * tilt) / ones])


def _dtype(value: ir.Value) -> np.dtype[Any]:
    tensor = constant_tensor(value)
    assert tensor is not None
    return tensor.dtype.numpy()


class _Twin:
    """Writes the model without some branches beside a graph: every node behind the first of them a second time."""

    def __init__(self, twin: ir.Model, norms: Norms) -> None:
        self._graph, self._edit, self._norms = twin.graph, Editor(twin), norms
        self._half: dict[ir.Value, ir.Value] = {}

    def write(self, removed: Sequence[DepthUnit], fitted: Sequence[DepthUnit]) -> dict[DepthUnit, _Fit]:
        edit = self._edit
        skipped = {unit.result(self._norms == "remove").producer(): unit for unit in removed}
        dead = {node for unit in removed for node in unit.branch.nodes}
        writers = {unit.branch.add: unit for unit in fitted}
        own = {writer.node: writer for unit in fitted if (writer := Writer.of(unit)) is not None}
        biases = {writer.bias: writer for writer in own.values() if writer.bias is not None}
        constants: dict[ir.Node, ir.Value] = {}
        found: dict[DepthUnit, _Fit] = {}
        for node in list(self._graph):
            edit.at(node)
            if (unit := skipped.get(node)) is not None:
                stream = unit.remainder
                self._half[unit.result(self._norms == "remove")] = self._half.get(stream, stream)
                continue
            if node in dead or not any(v in self._half for v in node.inputs if v is not None):
                continue
            if list(subgraphs_of(node)):
                continue
            inputs = [None if v is None else self._half.get(v, v) for v in node.inputs]
            place = None
            if node in own:
                place = 1
            elif node in biases:
                place = next(i for i, v in enumerate(node.inputs) if constant_tensor(v) is not None)
            if place is not None:
                tensor = constant_tensor(node.inputs[place])
                assert tensor is not None
                inputs[place] = constants[node] = edit.constant(np.array(tensor.numpy(), np.float32), "half")
            if node in writers:
                found[writers[node]] = self._observed(writers[node], constants)
            self._again(node, inputs)
        return found

    def _observed(self, unit: DepthUnit, constants: dict[ir.Node, ir.Value]) -> _Fit:
        """Observe (h, wanted, 1) / |s| of a writer, before its sum."""
        edit = self._edit
        writer = Writer.of(unit)
        assert writer is not None
        h, stream = writer.node.inputs[0], unit.remainder
        assert h is not None
        h, stream = self._half.get(h, h), self._half.get(stream, stream)
        # The original's sum stands behind its addition; here it is made once more.
        total = edit.op("Add", list(unit.branch.add.inputs), like=unit.total)
        square = edit.op("Mul", [total, total])
        mean = edit.op("ReduceMean", [square, edit.constant(np.array([-1]), "axis")], {"keepdims": 1})
        size = edit.op("Sqrt", [edit.op("Add", [mean, edit.constant(np.array(1e-12, np.float32), "tiny")])])
        inverse = edit.op("Reciprocal", [size])
        wanted = edit.op("Sub", [total, stream])
        scaled = [edit.op("Mul", [v, inverse]) for v in (h, wanted)]
        pair = edit.op("Concat", [*scaled, inverse], {"axis": -1})
        pair.type = ir.TensorType(ir.DataType.FLOAT)
        weight = constants[writer.node]
        assert weight.shape is not None
        inputs, outputs = (int(n) for n in weight.shape.numpy())
        if total.shape is not None:
            pair.shape = ir.Shape([*list(total.shape)[:-1], inputs + outputs + 1])
        return _Fit(
            Request(pair, SecondMoment()),
            inputs,
            weight,
            constants.get(writer.bias) if writer.bias is not None else None,
        )

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
