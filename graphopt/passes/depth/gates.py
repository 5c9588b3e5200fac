"""Gates: a copy of a model in which each residual branch can be switched off by an initializer, for trials."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.depth_units import DepthUnit, depth_units
from graphopt.analysis.shapes import infer
from graphopt.graph.edits import Editor
from graphopt.passes.depth.bypass import Norms


@dataclasses.dataclass(frozen=True)
class GatedModel:
    """A model whose branches can be switched off.

    Attributes:
        model: The copy. With all gates open it gives the original's numbers, bit for bit.
        gates: The initializers, bool scalars, by the name of the unit: true where the branch is added.
    """

    model: ir.Model
    gates: dict[str, ir.Value]

    def closed(self, units: Iterable[DepthUnit]) -> dict[str, npt.NDArray[np.bool_]]:
        """What `Trials.loss` is given for a model without these units."""
        return {self.gates[unit.name].name or "": np.asarray(False) for unit in units}


def gated(model: ir.Model, units: Iterable[DepthUnit], *, norms: Norms = "keep") -> GatedModel:
    """A copy of a model with a choice behind the addition of each unit: Where(gate, x + f(x), x).

    Args:
        model: The model, which stays as it is.
        units: Its units that get a gate.
        norms: As of `bypass`: whether a post-LN branch goes with its normalization.
    """
    wanted = {unit.name for unit in units}
    copy = model.clone()
    edit = Editor(copy)
    gates = {}
    for unit in depth_units(copy, infer(copy, believe_names=True)).units:
        if unit.name not in wanted:
            continue
        whole = unit.result(norms == "remove")
        last = whole.producer()
        assert last is not None
        edit.at(last)
        gate = edit.constant(np.asarray(True), f"gate.{unit.name}")
        chosen = edit.op("Where", [gate, whole, unit.remainder], like=whole)
        node = chosen.producer()
        assert node is not None
        assert last.graph is not None
        last.graph.remove(node)
        last.graph.insert_after(last, node)
        for user, place in tuple(whole.uses()):
            if user is not node:
                user.replace_input_with(place, chosen)
        if whole.is_graph_output():
            outputs = copy.graph.outputs
            name, whole.name = whole.name, edit.names.fresh(f"{whole.name}/open")
            chosen.name = name
            outputs[:] = [chosen if value is whole else value for value in outputs]
        gates[unit.name] = gate
    return GatedModel(copy, gates)
