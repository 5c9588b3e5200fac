"""convert-opset: the model is brought to a recent opset, so that later passes meet one spelling of each operator."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import ClassVar

import onnx
import onnx_ir as ir

from graphopt.analysis.shapes import ShapeFacts
from graphopt.errors import UsageError
from graphopt.graph.edits import Editor, nodes
from graphopt.passes.base import Pass, Site
from graphopt.passes.raise_ import opset_adapters as _registered  # noqa: F401 - fills the tables
from graphopt.passes.raise_.opset_steps import (
    ADAPTERS,
    ASKS_TYPES,
    COMPATIBLE,
    OBSTACLES,
    OF_THE_RUNTIME,
    RENAMED,
    WITHOUT_KERNEL,
    Conversion,
    Step,
)

OLDEST, NEWEST = 7, 24
MIN_IR_VERSION = 10


class ConvertOpset(Pass):
    """Rewrite a model of opset 7 to 22 into one of opset `version`, and its IR version to at least 10.

    Later passes then meet one spelling of each operator instead of one for every year.

    For every node of the default domain the pass asks the operator registry of ONNX which redefinitions lie between
    the two opsets. Each is known to mean the same for a node as written, or has an adapter that rewrites the node,
    for example:

    1. Attributes that became inputs: `axes` of Squeeze, Unsqueeze and the Reduce operators, `pads`, `k`, `min`, ...
    2. `Softmax`, `LogSoftmax`, `Hardmax` below opset 13, which took all dimensions from `axis` on as one row:
       the last dimension stays as it is, any other becomes Flatten, Softmax, Reshape.
    3. `Upsample`, and `Resize` of opset 10, to `Resize` with its coordinates spelled out; `Scatter` to
       `ScatterElements`; `GroupNormalization` with a scale for each channel; `Scan` without its batch.

    Everything is checked before anything is rewritten: an opset holds for a whole model, so one node whose change
    isn't known leaves the model as it was. Subgraphs and functions are converted with the model (a function may import
    an opset of its own, but ONNX Runtime then fails at the first operator that changed in between).

    **Options:** `version` (an opset, 8 to 24, default 23): what the model is brought to.

    **Needs:** nothing; weights are neither read nor copied. **Guarantees:** the same function, bit for bit in ONNX
    Runtime but for `AveragePool`, whose newer kernel adds in another order.

    **Left alone, with the reason:** the whole model, where a node's operator or its change isn't known, or where its
    old form has no new one (the mask of a Dropout, batch normalization in training form, some coordinates of Resize).
    A few operators have no kernel in ONNX Runtime in the form that opset 22 gave them (`RoiAlign`, the `Random`
    operators, ...): a model with one of those is brought to opset 21 only. A model at `version` or above is left: this
    pass never lowers an opset.

    **When not to use it:** when the model is meant for a runtime that doesn't know the opset.
    """

    # Why not onnx.version_converter (onnx 1.23): it serializes the model with its weights (4.1 GB and 14 s for the
    # 540 MB SmolLM2 graph, which takes 0.05 s here) and refuses one above 2 GB. Of 1,459 node and model tests of onnx
    # 1.2, 1.5 and 1.7 that ONNX Runtime runs it changed the results of 11 (Resize-10, Hardmax) and made 14 unloadable
    # (Resize-11 with sizes, Scan-8, RoiAlign). onnxscript's ConvertVersionPass (0.7) knows opset 18 and up and hands
    # older models to that converter: the same 25 break. Their real-model results are right, as far as was tried.

    name: ClassVar[str] = "convert-opset"
    family: ClassVar[str] = "raise"

    def __init__(self, version: int = 23) -> None:
        super().__init__()
        if not OLDEST < version <= NEWEST:
            raise UsageError(
                f"convert-opset can't write opset {version}: choose a version from {OLDEST + 1} to {NEWEST}."
            )
        self.version = version

    def apply(self, model: ir.Model) -> bool:
        """See the class."""
        target = self._runnable(model)
        functions = {f.identifier() for f in model.functions.values()}
        facts = ShapeFacts(model)
        plans: list[tuple[ir.Graph | ir.Function, int, _Plan]] = []
        parts: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
        for part in parts:
            current = _imported(part.opset_imports)
            if current is None or current >= target:
                continue
            graphs = [part if isinstance(part, ir.Graph) else part.graph, *part.subgraphs()]
            try:
                plan = self._plan(graphs, current, target, functions, facts)
            except _NotConverted as refusal:
                where = "" if part is model.graph else f"in function '{part.name}', "
                return self.left(refusal.node, f"not converted: {where}{refusal}")
            plans.append((part, current, plan))
        edit = Editor(model)
        for part, current, plan in plans:
            self._rewrite(plan, Conversion(edit, facts, target))
            part.opset_imports.pop("ai.onnx", None)
            part.opset_imports[""] = target
            what = "model" if part is model.graph else "function"
            self.sites.append(Site(part.name or "", what, "applied", f"opset {current} to {target}"))
        if plans and model.ir_version < MIN_IR_VERSION:
            model.ir_version = MIN_IR_VERSION
        return bool(plans)

    def _runnable(self, model: ir.Model) -> int:
        """The opset to reach: `version`, or less where ONNX Runtime couldn't run the result."""
        target = self.version
        for node in nodes(model):
            for op_type, opset in WITHOUT_KERNEL if node.domain == "" else ():
                if node.op_type == op_type and target >= opset:
                    target = opset - 1
                    self.left(
                        node,
                        f"not converted beyond opset {target}: node '{node.name}' uses {op_type}, "
                        f"whose form of opset {opset} ONNX Runtime has no kernel for",
                    )
        return target

    def _plan(
        self,
        graphs: Iterable[ir.Graph],
        current: int,
        target: int,
        functions: set[ir.OperatorIdentifier],
        facts: ShapeFacts,
    ) -> _Plan:
        """The steps of every node that has some; raises `_NotConverted` where a node can't be converted."""
        todo: _Plan = []
        for graph in graphs:
            for node in graph:
                if node.domain != "" or node.op_identifier() in functions:
                    continue
                if current < OLDEST:
                    raise _NotConverted(node, f"opset {current} is older than {OLDEST}")
                steps = _steps(node.op_type, current, target)
                if isinstance(steps, str):
                    raise _NotConverted(node, f"node '{node.name}' uses {steps}")
                if steps:
                    todo.append((node, steps))
        for node, steps in todo:
            for step in steps:
                if step in ASKS_TYPES:
                    facts.fact(node.inputs[0])  # learnt now, while the graph still is what its opset says
                # Steps after a change of name find what an adapter wrote, not what the file says.
                for obstacle in OBSTACLES.get(step, ()) if step[0] == node.op_type else ():
                    if (reason := obstacle(node, facts, target)) is not None:
                        raise _NotConverted(node, f"node '{node.name}' ({node.op_type} of opset {current}) {reason}")
        return todo

    def _rewrite(self, plan: _Plan, to: Conversion) -> None:
        for node, steps in plan:
            adapters = [step for step in steps if step in ADAPTERS]
            for step in adapters:
                if node.graph is not None:
                    to.edit.at(node)
                    ADAPTERS[step](node, to)
            if adapters:
                self.applied(node, "rewritten for " + ", ".join(f"{op}-{opset}" for op, opset in adapters))
            if node.version is not None:
                node.version = None  # the model's import says it


_Plan = list[tuple[ir.Node, tuple[Step, ...]]]


class _NotConverted(Exception):
    """Why a graph keeps its opset."""

    def __init__(self, node: ir.Node, reason: str) -> None:
        super().__init__(reason)
        self.node = node


def _imported(imports: dict[str, int]) -> int | None:
    """The opset of the default domain, which goes by two names."""
    return imports.get("", imports.get("ai.onnx"))


@functools.cache
def _steps(op_type: str, current: int, target: int) -> tuple[Step, ...] | str:
    """The redefinitions of an operator above `current` up to `target`; the operator's version where one isn't known."""
    since = _since(op_type, current)
    if since is None:
        return f"{op_type}, which opset {current} of the ONNX standard doesn't have"
    steps: list[Step] = []
    for opset in range(current + 1, target + 1):
        if _since(op_type, opset) == opset or (op_type, opset) in RENAMED:
            step = (op_type, opset)
            if step not in COMPATIBLE and step not in ADAPTERS:
                return f"{op_type}-{since}, whose change in opset {opset} graphopt doesn't know"
            steps.append(step)
            op_type = RENAMED.get(step, op_type)
            since = opset
    return tuple(steps)


def _since(op_type: str, opset: int) -> int | None:
    """The opset that defined the operator as `opset` has it."""
    try:
        return int(onnx.defs.get_schema(op_type, opset, "").since_version)
    except onnx.defs.SchemaError:
        return 1 if op_type in OF_THE_RUNTIME else None
