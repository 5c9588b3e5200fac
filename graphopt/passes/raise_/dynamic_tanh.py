"""raise-dynamic-tanh: the norms without reduction, Dynamic Tanh and elementwise LayerNorm, in one form each."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.algebra import constant_rank, escaping
from graphopt.analysis.elementwise_norms import ANCHORS, ElementwiseNorm, read_norm
from graphopt.graph.edits import Editor
from graphopt.passes.raise_.shape_rules import ShapeRulePass


class RaiseDynamicTanh(ShapeRulePass):
    """Write an element-wise norm with each of its constants once, in one order.

        Dynamic Tanh:             y = γ · tanh(α x) + β
        elementwise LayerNorm:    y = γ · x / √(x² + c) + β

    Papers: Transformers without Normalization (Zhu, Chen, He, LeCun, Liu, 2025); Elementwise Layer Normalization
    (Stollenwerk, 2025; later Dynamic Inverse Square Root Unit), which derives both from what one element sees of a
    LayerNorm: the root exactly, the tanh by an approximation.

    ONNX has no operator for either, so the canonical form is

    1. `Mul(x, α)` → `Tanh` → `Mul(·, γ)` → `Add(·, β)`, α > 0 (tanh is odd: its sign goes to γ),
    2. `Mul(x, x)` → `Add(·, c)` → `Sqrt` → `Div(x, ·)` → `Mul(·, γ)` → `Add(·, β)`,

    each of the constants left out where it is 1, or 0. Scales before the tanh are multiplied; scales and shifts behind
    it, in any order and as `Mul`, `Div`, `Add`, `Sub` or `Neg`, are composed to one γ and one β; a square as `Pow`,
    roots as `Pow ±0.5`, quotients by `Reciprocal`, p x / √(k x² + c) become rule 2 with c/k and p/√k. So the passes
    that fold γ and β into the layers behind meet one form.

    **Needs:** constants that are scalars, or run along one axis; α and c are scalars. The rank of x where one has axes.
    **Guarantees:** the same function; constants are merged in float64 and rounded once to their type.

    **Left alone, with the reason:** a part that something else reads; merged constants that the type can't hold. A tanh
    without a gain for each channel is an activation, and no site.

    **When not to use it:** never.
    """

    name: ClassVar[str] = "raise-dynamic-tanh"
    family: ClassVar[str] = "raise"
    paper: ClassVar[str] = "Transformers without Normalization"
    anchors: ClassVar[tuple[str, ...]] = ANCHORS

    def rewrite(self, node: ir.Node, edit: Editor) -> bool:
        """See the class."""
        norm = read_norm(node)
        if norm is None or norm.is_canonical:
            return False
        dtype = self.dtype(norm.x)
        if dtype is None or not dtype.is_floating_point():
            return self.left(node, "the type isn't known")
        used = escaping(norm.nodes, norm.root)
        if used is not None:
            return self.left(node, f"{used.name!r} inside it is used elsewhere too")
        rank = max(constant_rank(norm.nodes), norm.gain.ndim, norm.bias.ndim)
        if not self.has_rank(norm.x, rank):
            return self.left(node, f"a constant of rank {rank} may broadcast the result, whose rank isn't known")
        gain, bias, constant = (_rounded(n, dtype) for n in (norm.gain, norm.bias, np.asarray(norm.constant)))
        if gain is None or bias is None or constant is None:
            return self.left(node, f"its constants, merged, are out of the range of {dtype.name.lower()}")
        edit.at(norm.root)
        self._write(norm, gain, bias, constant, edit)
        what = "α" if norm.kind == "tanh" else "c"
        return self.applied(node, f"{norm.kind} form, {what} = {norm.constant:.6g}")

    @staticmethod
    def _write(
        norm: ElementwiseNorm,
        gain: npt.NDArray[Any],
        bias: npt.NDArray[Any],
        constant: npt.NDArray[Any],
        edit: Editor,
    ) -> None:
        x, old = norm.x, norm.root.outputs[0]
        if norm.kind == "tanh":
            scaled = x if norm.constant == 1.0 else edit.op("Mul", [x, edit.constant(constant, "alpha")], like=x)
            value = edit.op("Tanh", [scaled], like=x)
        else:
            shifted = edit.op("Add", [edit.op("Mul", [x, x], like=x), edit.constant(constant, "c")], like=x)
            value = edit.op("Div", [x, edit.op("Sqrt", [shifted], like=x)], like=x)
        if (norm.gain != 1).any():
            value = edit.op("Mul", [value, edit.constant(gain, "gain")], like=old)
        if (norm.bias != 0).any():
            value = edit.op("Add", [value, edit.constant(bias, "bias")], like=old)
        edit.replace(old, value)


def _rounded(numbers: npt.NDArray[Any], dtype: ir.DataType) -> npt.NDArray[Any] | None:
    """`numbers` in a type; None where one becomes infinite, or zero without being it."""
    with np.errstate(over="ignore", under="ignore"):
        array = np.asarray(numbers.astype(dtype.numpy()))
    again = array.astype(np.float64)
    return array if np.isfinite(again).all() and ((again == 0) == (numbers == 0)).all() else None
