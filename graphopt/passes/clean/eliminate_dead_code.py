"""eliminate-dead-code: what no output depends on."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir
import onnx_ir.passes.common as common

from graphopt.passes.base import Pass


class EliminateDeadCode(Pass):
    """Remove nodes, initializers, functions and opset imports that no output depends on, and optional outputs unused.

    Also removes the `value_info` of values that are gone. Graph inputs stay, used or not: they are the interface.

    **Needs:** nothing. **Guarantees:** the same numbers, bit for bit.

    **Implementation:** `onnx_ir.passes.common.RemoveUnused{Nodes,Functions,Opsets}Pass`.

    **When not to use it:** never.
    """

    name: ClassVar[str] = "eliminate-dead-code"
    family: ClassVar[str] = "clean"
    bitwise: ClassVar[bool] = True

    def apply(self, model: ir.Model) -> bool:
        """See the class."""
        modified = False
        for remove in (
            common.RemoveUnusedNodesPass(),
            common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
            common.RemoveUnusedOpsetsPass(),
        ):
            modified |= remove(model).modified
        return modified
