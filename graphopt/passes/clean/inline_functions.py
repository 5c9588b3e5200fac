"""inline-functions: the bodies of model-local functions in place of their calls."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import ClassVar

import onnx_ir as ir
import onnx_ir.passes.common as common

from graphopt.graph.edits import OWN_DOMAIN, opset
from graphopt.passes.base import Pass

KEPT_DOMAINS = frozenset({OWN_DOMAIN})


class InlineFunctions(Pass):
    """Replace calls of model-local functions by their bodies.

    torch.export writes some operators as functions, and what stands in a function body can't be fused with what
    stands outside. Functions of the domain `ai.graphopt` are the portable bodies of graphopt's own operators and stay.

    **Needs:** nothing. **Guarantees:** the same numbers, bit for bit. A function whose body is written for another
    opset than the model's can't be inlined before conversion; it stays, with the reason.

    **Implementation:** `onnx_ir.passes.common.InlinePass` and `RemoveUnusedFunctionsPass`.

    **When not to use it:** where the functions carry a backend's own kernels.
    """

    name: ClassVar[str] = "inline-functions"
    family: ClassVar[str] = "clean"
    bitwise: ClassVar[bool] = True

    def apply(self, model: ir.Model) -> bool:
        """See the class."""
        if not model.functions:
            return False
        wanted: dict[ir.OperatorIdentifier, bool] = {}
        imports = dict(model.graph.opset_imports)
        for identifier, function in model.functions.items():
            wanted[identifier] = identifier[0] not in KEPT_DOMAINS and _same_opsets(imports, function)
            if wanted[identifier]:
                imports.update(function.opset_imports)
        for node in ir.traversal.RecursiveGraphIterator(model.graph):
            called = model.functions.get(node.op_identifier())
            if called is None or called.domain in KEPT_DOMAINS:
                continue
            if wanted[called.identifier()]:
                self.applied(node, "inlined")
            else:
                self.left(
                    node, f"the function is written for opset {called.opset_imports.get('')}, the model for another"
                )
        if not any(wanted.values()):
            return False
        inner = _stems(model.graph.subgraphs())
        everywhere = inner | _stems([model.graph])
        for identifier, function in model.functions.items():
            if wanted[identifier]:
                _pass_on_by_copy(function, opset(model))
                _rename(function, inner, everywhere)
        modified = common.InlinePass(criteria=lambda f: wanted[f.identifier()])(model).modified
        return common.RemoveUnusedFunctionsPass()(model).modified or modified  # type: ignore[no-untyped-call]


def _same_opsets(imports: Mapping[str, int], function: ir.Function) -> bool:
    return all(imports.get(domain, version) == version for domain, version in function.opset_imports.items())


def _pass_on_by_copy(function: ir.Function, version: int) -> None:
    """Let Identity make outputs that are inputs, or the same twice.

    InlinePass (onnx_ir 1.1) would rename an input of the caller, and give two outputs one name.
    """
    seen = set(function.inputs)
    for index, output in enumerate(function.outputs):
        if output in seen:
            copy = ir.node("Identity", [output], outputs=[ir.Value(name=f"{output.name}/copy", type=output.type)])
            function.graph.append(copy)
            function.outputs[index] = copy.outputs[0]
            function.opset_imports.setdefault("", version)
        seen.add(output)


def _rename(function: ir.Function, inner: set[str], everywhere: set[str]) -> None:
    """Give values of the body names that hide nothing where it is inlined.

    InlinePass numbers names that it has met already. It hasn't met those of subgraphs that come later, `inner`, and
    leaves the inputs and initializers of the body's own subgraphs alone.
    """
    for graph in (function.graph, *function.subgraphs()):
        for value in (v for node in graph for v in node.outputs if v.name):
            while value.name in inner:
                value.name = f"{function.name}/{value.name}"
        if graph is not function.graph:
            for value in [*graph.inputs, *graph.initializers.values()]:
                value.name = f"{function.name}/{value.name}"
                while value.name in everywhere:
                    value.name = f"{function.name}/{value.name}"


def _stems(graphs: Iterable[ir.Graph]) -> set[str]:
    """The names of all values, also without the number that InlinePass could have given them."""
    names: set[str] = set()
    for graph in graphs:
        values = [*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)]
        names.update(v.name for v in values if v.name)
    return names | {re.sub(r"(_\d+)+$", "", name) for name in names}
