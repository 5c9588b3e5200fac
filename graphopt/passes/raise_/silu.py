"""raise-silu: every spelling of a SiLU becomes `Swish`, or x · Sigmoid(x) below opset 24."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.algebra import (
    as_float32,
    below,
    constant_rank,
    escaping,
    expand,
    is_op,
    other_operand,
    producer,
    same,
    source,
    users,
)
from graphopt.graph.constants import scalar
from graphopt.graph.edits import Editor
from graphopt.passes.raise_.shape_rules import ShapeRulePass

OPSET = 24


class RaiseSilu(ShapeRulePass):
    """Write a SiLU (Swish), and the sigmoid in it, in one way.

        Swish(x) = x · sigmoid(α x),  sigmoid(z) = 1 / (1 + exp(−z))

    Paper: Searching for Activation Functions (Ramachandran, Zoph, Le, 2017).

    1. `n / (1 + exp(−z))` → `n · Sigmoid(z)`, and `Sigmoid(z)` where n is 1 or it is a `Reciprocal`; −z is a `Neg`, a
       subtraction from 0 or a product with a negative constant.
    2. `Sigmoid(x · 1)` → `Sigmoid(x)` where x is what it is multiplied with (PaddlePaddle writes swish so).
    3. Opset 24 and up: `x · Sigmoid(α x)` → `Swish(x)` with alpha = α. α = 1.702 is the sigmoid form of GELU.

    Below opset 24, and without `operator`, `x · Sigmoid(α x)` is the canonical form itself.

    **Options:** `operator` (default true): write `Swish` where the opset has it. A recipe that ends in `expand-swish`
    switches it off, so that a second run finds nothing to do.

    **Needs:** the rank of x where a constant isn't a rank-0 scalar. **Guarantees:** the same function. Where exp(−z)
    overflows, n / ∞ and n · 0 are the same zero.

    **Left alone, with the reason:** an exponential or gate that something else reads too; an α that is no float32,
    which the attribute is.

    **When not to use it:** on graphs of opset 24 whose runtime has no `Swish` kernel, unless `expand-swish` follows:
    ONNX Runtime 1.31 on CPU takes `Swish` apart after its fusions, and YOLOv8n then takes 1.20 times as long.
    """

    name: ClassVar[str] = "raise-silu"
    family: ClassVar[str] = "raise"
    paper: ClassVar[str] = "Searching for Activation Functions"
    anchors: ClassVar[tuple[str, ...]] = ("Sigmoid", "Exp")

    def __init__(self, operator: bool = True) -> None:
        super().__init__()
        self.operator = operator

    def rewrite(self, node: ir.Node, edit: Editor) -> bool:
        """See the class."""
        return self._rewrite_exp(node, edit) if node.op_type == "Exp" else self._rewrite_gate(node, edit)

    # ---- rule 1

    def _rewrite_exp(self, node: ir.Node, edit: Editor) -> bool:
        exponential = node.outputs[0]
        for plus in users(exponential):
            if not is_op(plus, "Add") or scalar(other_operand(plus, exponential)) != 1.0:
                continue
            total = plus.outputs[0]
            for divide in users(total):
                if is_op(divide, "Reciprocal") or (is_op(divide, "Div") and divide.inputs[1] is total):
                    return self._write_sigmoid(node, plus, divide, edit)
        return False

    def _write_sigmoid(self, node: ir.Node, plus: ir.Node, divide: ir.Node, edit: Editor) -> bool:
        argument = node.inputs[0]
        assert argument is not None
        found = self._negated(argument)
        if found is None:
            return self.left(node, "the argument of exp isn't the negative of something")
        z, factor, nodes = found
        nodes += [node, plus]
        numerator = divide.inputs[0] if divide.op_type == "Div" else None
        plain = numerator is None or scalar(numerator) == 1.0
        if numerator is plus.outputs[0] or (numerator is not None and producer(source(numerator), "Exp") is not None):
            return self.left(node, "an exponential is divided: the product with the sigmoid would be ∞ · 0")
        if not self.has_rank(z, constant_rank([*nodes, divide] if plain else nodes)):
            return self.left(node, "a constant may broadcast its argument, whose rank isn't known")
        used = escaping(nodes, divide)
        if used is not None:
            return self.left(node, f"{used.name!r} inside the sigmoid is used elsewhere too")
        edit.at(divide)
        old = divide.outputs[0]
        if factor is not None:
            z = edit.op("Mul", [z, edit.constant(factor, "alpha")], like=z)
        gate = edit.op("Sigmoid", [z], like=z)
        edit.replace(old, gate if plain else edit.op("Mul", [numerator, gate], like=old))
        return self.applied(node, "1 / (1 + exp(−z)) as Sigmoid(z)")

    @staticmethod
    def _negated(value: ir.Value) -> tuple[ir.Value, npt.NDArray[Any] | None, list[ir.Node]] | None:
        """z, the constant to multiply it with (None for 1), and the nodes on the way, where `value` is −z."""
        for candidate in below(value):
            expansion = None if candidate is value else expand(value, [candidate])
            if expansion is None or expansion.terms.keys() != {(1,)} or expansion.terms[(1,)] >= 0:
                continue
            alpha = -expansion.terms[(1,)]
            if alpha == 1.0:
                return candidate, None, list(expansion.nodes)
            if expansion.dtype is not None:
                factor = np.asarray(alpha, dtype=expansion.dtype.numpy())
                if float(factor) == alpha:
                    return candidate, factor, list(expansion.nodes)
        return None

    # ---- rules 2 and 3

    def _rewrite_gate(self, node: ir.Node, edit: Editor) -> bool:
        argument, gate = node.inputs[0], node.outputs[0]
        assert argument is not None
        for product in users(gate):
            x = other_operand(product, gate)
            if not is_op(product, "Mul") or x is None or x is gate:
                continue
            alpha, nodes = 1.0, []
            if not same(x, argument):
                expansion = expand(argument, [x])
                if expansion is None or expansion.terms.keys() != {(1,)}:
                    continue
                alpha, nodes = expansion.terms[(1,)], list(expansion.nodes)
                if not self.has_rank(x, constant_rank(nodes)):
                    return self.left(node, "a constant may broadcast its argument, whose rank isn't known")
            if edit.opset < OPSET or not self.operator:
                if alpha != 1.0 or not nodes:
                    return False
                # Not x itself: a copy of the value that the argument is made of may be made later, or in a subgraph.
                edit.set_input(node, 0, source(x))
                return self.applied(node, "Sigmoid(1 · x) as Sigmoid(x)")
            if as_float32(alpha) is None:
                return self.left(node, f"alpha {alpha!r} isn't a float32, which the attribute is")
            used = escaping([*nodes, node], product)
            if used is not None:
                return self.left(node, f"{used.name!r} inside the SiLU is used elsewhere too")
            edit.at(product)
            old = product.outputs[0]
            edit.replace(old, edit.op("Swish", [x], {"alpha": alpha if alpha != 1.0 else None}, like=old))
            return self.applied(node, f"Swish, alpha = {alpha:g}")
        return False
