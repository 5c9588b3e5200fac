"""raise-hard-swish: every spelling of a hard sigmoid becomes `HardSigmoid`, its product with x `HardSwish`."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analysis.algebra import (
    above,
    below,
    constant_rank,
    epsilon_of,
    escaping,
    expand,
    is_op,
    other_operand,
    same,
    users,
)
from graphopt.analysis.clamps import BOUNDS, Chain, Line, affine_of, clamped
from graphopt.graph.constants import constant_tensor
from graphopt.graph.edits import Editor
from graphopt.passes.raise_.shape_rules import ShapeRulePass

OPSET = 14
_ALPHA = float(np.float32(1 / 6))
_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


class RaiseHardSwish(ShapeRulePass):
    """Write a hard sigmoid, and a hard swish, that an exporter took apart as one operator.

        HardSigmoid(z) = max(0, min(1, α z + β))
        HardSwish(x) = x · HardSigmoid(x),  α = 1/6, β = 1/2

    Paper: Searching for MobileNetV3 (Howard et al., 2019).

    A chain of scales, shifts and bounds is one clamped line, min(max(a z + b, l), h), whatever its operators are
    (`Clip` as attributes or inputs, `Relu`, `Min`, `Max`, `Add`, `Sub`, `Mul`, `Div`, `Neg`, in any order). So:

    1. A chain whose line runs from 0 to 1 → `HardSigmoid(z)`: Clip(0.2 z + 0.5, 0, 1), Relu6(z + 3) / 6,
       Min(Relu(z + 3), 6) · (1/6), 1 − Clip(3 − z, 0, 6) / 6.
    2. A product with such a chain that is scaled outside of it, or in the other factor → `w · HardSigmoid(z)`:
       w · Clip(z + 3, 0, 6) / 6, (w / 6) · Relu6(z + 3).
    3. Opset 14 and up: `x · HardSigmoid(x)` → `HardSwish(x)` where α = 1/6 and β = 1/2.

    z is the value furthest down that nothing else reads, or the other factor of the product.

    **Options:** `operator` (default true): write `HardSwish` where the opset has it; else `x · HardSigmoid(x)` is the
    canonical form itself.

    **Needs:** constants for scales, shifts and bounds. The rank of z where one of them isn't a rank-0 scalar.
    **Guarantees:** the same function; α and β are rounded to float32, which the attributes are. Where x · 6 overflows
    before it is divided by 6, the canonical form doesn't.

    Measured on ONNX Runtime 1.31 (CPU, 1 and 2 threads): its convolutions take over a `HardSwish`, or an
    `x · HardSigmoid(x)`, as their activation and no other spelling, so PicoDet takes 0.49 and the direction classifier
    of PP-OCR 0.60 of the time. Elsewhere both take the same time, 0.6 to 0.7 of that of `x · Clip(x + 3, 0, 6) / 6`.

    **Left alone, with the reason:** a part that something else reads too; bounds that come near 0 and 1 only (a
    factor of 0.1667); types other than float32 and float16, in which ONNX Runtime has no kernel for `HardSigmoid`; an
    α near 1/6 in a product with x (PaddlePaddle's 0.1666667 is two floats off). A bound alone, Clip(z, 0, 1), is no
    hard sigmoid.

    **When not to use it:** for a runtime without `HardSigmoid`.
    """

    name: ClassVar[str] = "raise-hard-swish"
    family: ClassVar[str] = "raise"
    paper: ClassVar[str] = "Searching for MobileNetV3"
    anchors: ClassVar[tuple[str, ...]] = (*BOUNDS, "HardSigmoid")

    def __init__(self, operator: bool = True) -> None:
        super().__init__()
        self.operator = operator

    def rewrite(self, node: ir.Node, edit: Editor) -> bool:
        """See the class."""
        return self._rewrite_gate(node, edit) if node.op_type == "HardSigmoid" else self._rewrite_chain(node, edit)

    # ---- rules 1 and 2

    def _rewrite_chain(self, node: ir.Node, edit: Editor) -> bool:
        chain = clamped(node)
        if chain is None or chain.line.slope == 0.0:
            return False
        dtype = self._dtype(chain)
        near: Line | None = None
        found: tuple[ir.Node, Line, list[ir.Node]] | None = None
        root, line, nodes = node, chain.line, chain.nodes
        while True:
            if len(nodes) > 1 and (line.slope, line.offset) != (1.0, 0.0):
                found = (root, line, nodes) if _is_gate(line, dtype) else found
                near = line if _is_near_gate(line) else near
            output = root.outputs[0]
            if found is not None and (len(output.uses()) != 1 or output.is_graph_output()):
                break
            # Other readers are refused below, with the reason.
            steps = ((user, affine_of(user)) for user in users(output) if user.graph is node.graph)
            user, step = next((pair for pair in steps if pair[1] is not None), (None, None))
            if user is None or step is None:
                break
            root, line, nodes = user, line.scaled(step[1], step[2]), [*nodes, user]
        if found is not None:
            return self._write(node, found[0], None, chain.z, found[1], found[2], dtype, edit)
        bound = node.outputs[0]
        for root in above(bound):
            for operand in root.inputs:
                for w in [] if operand is None else below(operand):
                    product = None if w is bound else expand(root.outputs[0], [w, bound])
                    if product is None or product.terms.keys() != {(1, 1)}:
                        continue
                    line = chain.line.scaled(product.terms[(1, 1)])
                    if _is_gate(line, dtype):
                        return self._write(node, root, w, chain.z, line, [*chain.nodes, *product.nodes], dtype, edit)
                    near = line if _is_near_gate(line) else near
        if near is None:
            return False
        return self.left(node, f"its bounds come to {near.low:.7g} and {near.high:.7g}, not to 0 and 1")

    def _write(
        self,
        node: ir.Node,
        root: ir.Node,
        w: ir.Value | None,
        z: ir.Value,
        line: Line,
        nodes: list[ir.Node],
        dtype: ir.DataType | None,
        edit: Editor,
    ) -> bool:
        """Put HardSigmoid(z), times w where there is one, in the place of `root`."""
        if dtype not in _TYPES:
            what = "an unknown type" if dtype is None else dtype.name.lower()
            return self.left(node, f"it computes in {what}, for which ONNX Runtime has no HardSigmoid")
        rank = constant_rank(nodes)
        if not self.has_rank(z, rank):
            return self.left(node, f"a constant of rank {rank} may broadcast its argument, whose rank isn't known")
        used = escaping(nodes, root)
        if used is not None:
            return self.left(node, f"{used.name!r} inside the hard sigmoid is used elsewhere too")
        alpha, beta = float(np.float32(line.slope)), float(np.float32(line.offset))
        edit.at(root)
        old = root.outputs[0]
        if w is not None and same(w, z) and self._is_swish(alpha, beta, edit):
            edit.replace(old, edit.op("HardSwish", [z], like=old))
            return self.applied(node, "HardSwish")
        gate = edit.op("HardSigmoid", [z], {"alpha": alpha, "beta": beta}, like=z)
        edit.replace(old, gate if w is None else edit.op("Mul", [w, gate], like=old))
        return self.applied(node, f"HardSigmoid, alpha = {alpha:.7g}, beta = {beta:.7g}")

    def _dtype(self, chain: Chain) -> ir.DataType | None:
        tensors = (constant_tensor(value) for value in chain.constants)
        return next((tensor.dtype for tensor in tensors if tensor is not None), None) or self.dtype(chain.z)

    # ---- rule 3

    def _rewrite_gate(self, node: ir.Node, edit: Editor) -> bool:
        x, gate = node.inputs[0], node.outputs[0]
        if any(attribute.is_ref() for attribute in node.attributes.values()):
            return self.left(node, "an attribute is set by the caller of its function: inline functions first")
        alpha, beta = (
            float(np.float32(node.attributes[name].as_float() if name in node.attributes else default))
            for name, default in (("alpha", 0.2), ("beta", 0.5))
        )
        for product in users(gate):
            if not is_op(product, "Mul") or x is None or not same(other_operand(product, gate), x):
                continue
            if not self._is_swish(alpha, beta, edit):
                if self.operator and edit.opset >= OPSET and abs(alpha * 6 - 1) < 1e-3 and beta == 0.5:
                    return self.left(node, f"alpha is {alpha:.9g}, not 1/6 to the rounding of float32")
                return False
            if escaping([node], product) is not None:
                return self.left(node, f"{gate.name!r} inside the hard swish is used elsewhere too")
            edit.at(product)
            old = product.outputs[0]
            edit.replace(old, edit.op("HardSwish", [x], like=old))
            return self.applied(node, "HardSwish")
        return False

    def _is_swish(self, alpha: float, beta: float, edit: Editor) -> bool:
        return self.operator and edit.opset >= OPSET and alpha == _ALPHA and beta == 0.5


def _is_gate(line: Line, dtype: ir.DataType | None) -> bool:
    """Whether the line runs from 0 to 1, to the rounding of the type that its constants are in."""
    return max(abs(line.low), abs(line.high - 1.0)) <= 2 * epsilon_of(dtype)


def _is_near_gate(line: Line) -> bool:
    return abs(line.low) < 1e-2 and abs(line.high - 1.0) < 1e-2
