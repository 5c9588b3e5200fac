"""Models in which some residual branches add zero, so that removing them must change nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.analysis.depth_units import DepthUnits, depth_units
from graphopt.analysis.shapes import infer
from graphopt.graph.edits import Editor
from graphopt.runtime_ops.memory_session import make_session, run


def units_of(model: ir.Model) -> DepthUnits:
    return depth_units(model, infer(model, believe_names=True))


def zero(model: ir.Model, names: Iterable[str]) -> None:
    """Multiply what some branches add by 0."""
    edit = Editor(model)
    for unit in units_of(model).named(names):
        add = unit.branch.add
        edit.at(add)
        nothing = edit.constant(np.zeros((), dtype=np.float32), "zero")
        add.replace_input_with(1 - unit.branch.operand, edit.op("Mul", [unit.branch.output, nothing]))


def outputs(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs of a model by name; inputs that it doesn't have are left out."""
    session = make_session(model.clone(), threads=1)
    names: list[Any] = [output.name for output in session.get_outputs()]
    return dict(zip(names, run(session, feeds), strict=True))
