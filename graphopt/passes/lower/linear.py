"""lower-linear: MatMul and Add of a bias on matrices become `Gemm`."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from graphopt.analysis.algebra import is_op
from graphopt.graph.constants import constant_tensor
from graphopt.graph.edits import Editor
from graphopt.passes.fold.layers import sole_reader
from graphopt.passes.raise_.shape_rules import ShapeRulePass

_TYPES = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


class LowerLinear(ShapeRulePass):
    """Write MatMul and Add as one `Gemm` where both operands are matrices.

        x · W + b = Gemm(x, W, b)        x: [M, K], W: [K, N], b: [N]

    For runtimes that run Gemm faster and don't join the two by themselves. ONNX Runtime does when it loads a model,
    where its own shape inference finds the rank of x, in float32 and float16; so there the pass gains only on values
    whose rank it can't tell (measured on 1.31, layers of 128 × 512 and 384 × 1536, one thread: Gemm takes 0.91 to 1.01
    times the CPU time of an unjoined MatMul and Add at 1 to 128 rows) and in float64.

    On values of more than two axes nothing is done: Reshape, Gemm, Reshape is what costs others 13 to 60 %.

    **Needs:** that x is proven to be a matrix; a constant weight and bias of one number a column. **Guarantees:** the
    same function; the runtime may add the bias first.

    **Left alone, with the reason:** a product that something else reads or whose rank isn't known; other than
    floating-point types.

    **When not to use it:** in a recipe whose `raise-linear` doesn't have `keep_plain`: each would undo the other.
    """

    name: ClassVar[str] = "lower-linear"
    family: ClassVar[str] = "lower"
    anchors: ClassVar[tuple[str, ...]] = ("Add",)

    def rewrite(self, node: ir.Node, edit: Editor) -> bool:
        """See the class."""
        if edit.opset < 7:
            return False  # Add and Gemm have attributes that say how the bias lies
        for product, bias in (node.inputs, node.inputs[::-1]):
            maker = None if product is None else product.producer()
            shift = constant_tensor(bias)
            if maker is None or shift is None or not is_op(maker, "MatMul"):
                continue
            weight = constant_tensor(maker.inputs[1])
            x = maker.inputs[0]
            if weight is None or x is None or len(weight.shape) != 2 or constant_tensor(x) is not None:
                continue
            columns = int(weight.shape.numpy()[1])
            dims = tuple(shift.shape.numpy())
            if dims not in ((columns,), (1, columns)) or shift.dtype not in _TYPES:
                continue
            return self._write(node, maker, bias, edit)
        return False

    def _write(self, node: ir.Node, maker: ir.Node, bias: ir.Value | None, edit: Editor) -> bool:
        product, x = maker.outputs[0], maker.inputs[0]
        assert x is not None
        rank = self.rank(x)
        if rank is None:
            return self.left(node, f"the rank of {x.name!r} isn't known")
        if rank != 2:
            return False
        if (why := sole_reader(product)) is not None:
            return self.left(node, why)
        if maker.graph is not node.graph:
            return self.left(node, "its product is in an outer graph")
        old = node.outputs[0]
        edit.replace(old, edit.op("Gemm", [x, maker.inputs[1], bias], like=old))
        return self.applied(node, f"joined with {maker.name!r}")
