"""How close what leaves a part of the residual stream is to what enters it, per token, on data.

Everything is reduced over features within a copy of the graph, so that no activation leaves it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.depth_units import DepthUnit, depth_units
from graphopt.analysis.shapes import infer
from graphopt.calibration.calibration import Calibration
from graphopt.calibration.token_feeds import TokenAxes
from graphopt.errors import InputDataError, VerificationError, first_line
from graphopt.graph.edits import Editor
from graphopt.passes.depth.bypass import Norms
from graphopt.runtime_ops.memory_session import make_session, run

Array = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Span:
    """A stretch of the stream: from before one unit to behind another, or the same one."""

    first: DepthUnit
    last: DepthUnit


@dataclasses.dataclass(frozen=True)
class Closeness:
    """What a span does to the stream, each the mean over tokens.

    Attributes:
        cosine: cos(x, y) of what enters and what leaves.
        angle: arccos of it over π, of 0 to 1.
        change: |y − x| / |x|.
    """

    cosine: float
    angle: float
    change: float


def closeness(
    model: ir.Model, spans: Sequence[Span], calibration: Calibration, samples: int, *, norms: Norms = "keep"
) -> list[Closeness]:
    """What each span does to the stream, on the first samples of the data; padded tokens don't count.

    Args:
        model: The model, which stays as it is.
        spans: Stretches of its streams.
        calibration: The data.
        samples: How many of its samples.
        norms: As of `bypass`: whether the normalization of a post-LN branch's sum belongs to the branch.

    Raises:
        InputDataError: There is no sample.
        VerificationError: The model doesn't run on the data.
    """
    session = make_session(_measuring(model, spans, norms), threads=calibration.threads)
    axes = TokenAxes.read(model)
    sums = np.zeros((len(spans), 3))
    count = np.zeros(len(spans))
    number = -1
    for number, feeds in zip(range(samples), calibration.feeds(model), strict=False):
        if calibration.progress is not None:
            calibration.progress("measuring the residual stream", number, samples)
        try:
            outputs = run(session, feeds)
        except Exception as error:
            raise VerificationError(f"The model doesn't run on the calibration data: {first_line(error)}.") from error
        valid = axes.valid(feeds)
        for index in range(len(spans)):
            product, before, after, moved = (_tokens(y, valid) for y in outputs[4 * index : 4 * index + 4])
            cosine = np.clip(product / np.maximum(np.sqrt(before * after), 1e-30), -1.0, 1.0)
            change = np.sqrt(moved / np.maximum(before, 1e-30))
            sums[index] += cosine.sum(), np.arccos(cosine).sum() / np.pi, change.sum()
            count[index] += cosine.size
    if number < 0:
        raise InputDataError("There is no sample to measure the residual stream on.")
    return [Closeness(*(float(v) for v in row)) for row in sums / np.maximum(count, 1)[:, None]]


def _tokens(output: npt.NDArray[np.float32], valid: npt.NDArray[np.bool_] | None) -> Array:
    """The numbers of those tokens that count, flat."""
    array = output.astype(np.float64)
    return array[valid] if valid is not None and valid.shape == array.shape else array.reshape(-1)


def _measuring(model: ir.Model, spans: Sequence[Span], norms: Norms) -> ir.Model:
    """A copy whose outputs are, for each span in turn, x·y, |x|², |y|² and |y − x|² of every token."""
    copy = model.clone()
    edit = Editor(copy)
    units = {unit.name: unit for unit in depth_units(copy, infer(copy, believe_names=True)).units}
    outputs = []
    for span in spans:
        first, last = units[span.first.name], units[span.last.name]
        x, y = first.remainder, last.result(norms == "remove")
        node = y.producer()
        assert node is not None
        assert node.graph is not None
        # Behind the last node of the span stands another one before which the reductions are made.
        marker = ir.node("Identity", [y], name=edit.names.fresh("measured"))
        node.graph.insert_after(node, marker)
        edit.at(marker)
        axis = edit.constant(np.asarray([1 if last.kind == "conv" else -1]), "axis")
        x, y = (edit.op("Cast", [value], {"to": int(ir.DataType.FLOAT)}) for value in (x, y))
        pairs = ((x, y), (x, x), (y, y), (moved := edit.op("Sub", [y, x]), moved))
        for a, b in pairs:
            total = edit.op("ReduceSum", [edit.op("Mul", [a, b]), axis], {"keepdims": 0})
            total.type = ir.TensorType(ir.DataType.FLOAT)
            outputs.append(total)
        node.graph.remove(marker, safe=True)
    copy.graph.outputs[:] = outputs
    # Unused outputs stay: ONNX Runtime's Attention fails with a past and without a present.
    for node in reversed(copy.graph):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            copy.graph.remove(node, safe=True)
    return copy
