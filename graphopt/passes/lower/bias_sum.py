"""bias-sum: the bias before a Gelu stays out of ONNX Runtime's `BiasGelu` where that is slower."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from graphopt.graph.constants import is_constant
from graphopt.graph.edits import Editor
from graphopt.passes.lower.addition import AdditionPass


class BiasSum(AdditionPass):
    """Write the addition of a bias before a Gelu as a `Sum` of two where a target profile says that this is faster.

    ONNX Runtime fuses `Add` of a vector + `Gelu` into its own `BiasGelu`. With version 1.31 on a processor with AVX-512
    that kernel is the slower one: `Sum` + `Gelu` take 0.76 to 0.96 of its CPU time from 16 tokens on, and the same at
    one token. On all-MiniLM-L6 and other small encoders that is under 2 % of the whole.

    1. With no target profile nothing is done.
    2. With one, the addition becomes what the profile prefers for the choice `gelu` at the width of the site, at the
       usual numbers of tokens or those that the graph fixes: `Sum`, or `Add` (and ONNX Runtime fuses it).

    **Needs:** a target profile (`graphopt target --measure`); float32; three axes or more. **Guarantees:** the same
    numbers, bit for bit.

    **Left alone, with the reason:** a rank that isn't known: of two axes, ONNX Runtime makes a `Gemm` of the product
    and the bias, which is faster than either.

    **Targets:** cpu.

    **When not to use it:** for other providers, where the fused kernel is the faster one.
    """

    name: ClassVar[str] = "bias-sum"
    family: ClassVar[str] = "lower"
    bitwise: ClassVar[bool] = True
    targets: ClassVar[tuple[str, ...]] = ("cpu",)
    anchors: ClassVar[tuple[str, ...]] = ("Gelu",)
    choice: ClassVar[str] = "gelu"

    def rewrite(self, node: ir.Node, edit: Editor) -> bool:
        """See the class."""
        if self.profile is None or node.attributes.get_string("approximate", "none") != "none":
            return False
        addition = self.addition(node.inputs[0])
        # ONNX Runtime doesn't fuse an addition that something else reads.
        if addition is None or len(addition.outputs[0].uses()) != 1 or addition.outputs[0].is_graph_output():
            return False
        if self.dtype(addition.outputs[0]) != ir.DataType.FLOAT:
            return False  # ONNX Runtime has no kernel of Gelu for other types
        bias = next((v for v in addition.inputs if v is not None and is_constant(v)), None)
        if bias is None or self.rank(bias) != 1:
            return False
        rank = self.rank(addition.outputs[0])
        if rank is None and addition.op_type == "Add":
            return self.left(node, "the rank of its input isn't known; of a matrix the bias belongs into a Gemm")
        if rank is None or rank < 3:
            return False
        return self.rewrite_addition(node, addition, bias, edit)
