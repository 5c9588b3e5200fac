"""lift-constants: every constant in one place."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir
import onnx_ir.passes.common as common

from graphopt.passes.base import Pass


class LiftConstants(Pass):
    """Turn Constant nodes into initializers of the graph they stand in.

    Exporters write the same constant as an initializer, as a Constant node with a tensor, or with `value_int`,
    `value_floats`, ...; Paddle's keep all their weights in Constant nodes. After this pass a rule meets one form only.

    **Needs:** nothing. **Guarantees:** the same numbers, bit for bit. A constant that is a graph output, one made by a
    function's attribute reference, and those in function bodies (which have no initializers) stay nodes.

    **Implementation:** `onnx_ir.passes.common.LiftConstantsToInitializersPass`.

    **When not to use it:** where a reader of the file wants the constants beside their uses.
    """

    name: ClassVar[str] = "lift-constants"
    family: ClassVar[str] = "clean"
    bitwise: ClassVar[bool] = True

    def apply(self, model: ir.Model) -> bool:
        """See the class."""
        return common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model).modified
