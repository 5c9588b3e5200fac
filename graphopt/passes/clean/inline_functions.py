"""inline-functions: the bodies of model-local functions in place of their calls."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir
import onnx_ir.passes.common as common

from graphopt.passes.base import Pass

KEPT_DOMAINS = frozenset({"ai.graphopt"})


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
        for identifier, function in model.functions.items():
            wanted[identifier] = identifier[0] not in KEPT_DOMAINS and self._same_opsets(model, function)
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
        modified = common.InlinePass(criteria=lambda f: wanted[f.identifier()])(model).modified
        return common.RemoveUnusedFunctionsPass()(model).modified or modified  # type: ignore[no-untyped-call]

    @staticmethod
    def _same_opsets(model: ir.Model, function: ir.Function) -> bool:
        return all(
            model.graph.opset_imports.get(domain, version) == version
            for domain, version in function.opset_imports.items()
        )
