"""raise-gelu: every spelling of a GELU becomes `Gelu`."""

from __future__ import annotations

import math
from typing import ClassVar

import onnx_ir as ir

from graphopt.analysis.algebra import Expansion, Terms, above, below, constant_rank, escaping, expand
from graphopt.graph.edits import Editor
from graphopt.passes.raise_.shape_rules import ShapeRulePass

OPSET = 20
_ROOT_HALF = math.sqrt(0.5)
_ERF_ARGUMENT: Terms = {(1,): _ROOT_HALF}
_TANH_ARGUMENT: Terms = {(1,): math.sqrt(2 / math.pi), (3,): 0.044715 * math.sqrt(2 / math.pi)}
_PRODUCT: Terms = {(1, 0): 0.5, (1, 1): 0.5}


class RaiseGelu(ShapeRulePass):
    """Write a GELU that an exporter took apart as one `Gelu`.

        Gelu(x) = ½ x (1 + erf(x / √2))
        Gelu(x) = ½ x (1 + tanh(√(2/π) (x + 0.044715 x³)))        approximate="tanh"

    Paper: Gaussian Error Linear Units (GELUs) (Hendrycks, Gimpel, 2016).

    Both are compared as polynomials, in x and in x and the erf or tanh, so every order of operands, every way to
    multiply them out and every way to write the constants (÷ √2 or · √½; x³ as `Pow` or as products; constants
    multiplied together) is the same.

    **Needs:** opset 20. The rank of x where a constant isn't a rank-0 scalar. **Guarantees:** the same function with
    constants that equal √½, √(2/π) and 0.044715 to the rounding of the type they are written in (2⁻²² relative in
    float32); `Gelu` holds them more exactly. In float64 graphs that is 1e-12.

    **Options:** `double` (default false): raise the tanh form in float64 too, for runtimes whose `Gelu` computes with
    constants of float64; ONNX Runtime 1.31 takes those of the standard's function body, float32 (off by 2.5e-9).

    **Left alone, with the reason:** a constant that was written with too few digits (1.41421); an erf or tanh that
    something else reads too; a product without the ½.

    The sigmoid form x · sigmoid(1.702 x) is `Swish` with alpha = 1.702 in ONNX: see `raise-silu`.

    **When not to use it:** for a runtime without `Gelu` (opset below 20).
    """

    name: ClassVar[str] = "raise-gelu"
    family: ClassVar[str] = "raise"
    paper: ClassVar[str] = "Gaussian Error Linear Units (GELUs)"
    anchors: ClassVar[tuple[str, ...]] = ("Erf", "Tanh")

    def __init__(self, double: bool = False) -> None:
        super().__init__()
        self.double = double

    def rewrite(self, node: ir.Node, edit: Editor) -> bool:
        """See the class."""
        argument = node.inputs[0]
        if argument is None:
            return False
        target = _ERF_ARGUMENT if node.op_type == "Erf" else _TANH_ARGUMENT
        solved, why = _solve(argument, target, node.op_type)
        if solved is None:
            return self.left(node, why) if why else False
        x, inner = solved
        if node.op_type == "Tanh" and inner.dtype == ir.DataType.DOUBLE and not self.double:
            return self.left(node, "it computes in float64, and Gelu holds 0.044715 in float32 (option double)")
        root, outer = _find_product(x, node.outputs[0])
        if root is None or outer is None:
            return self.left(node, f"it isn't multiplied to ½·x·(1 + {node.op_type.lower()}(…))")
        nodes = [*inner.nodes, node, *outer.nodes]
        rank = constant_rank(nodes)
        if not self.has_rank(x, rank):
            return self.left(node, f"a constant of rank {rank} may broadcast x, whose rank isn't known")
        used = escaping(nodes, root)
        if used is not None:
            return self.left(node, f"{used.name!r} inside the GELU is used elsewhere too")
        if edit.opset < OPSET:
            return self.left(node, f"needs opset {OPSET}, the model has {edit.opset}: run convert-opset first")
        edit.at(root)
        old = root.outputs[0]
        approximate = None if node.op_type == "Erf" else "tanh"
        edit.replace(old, edit.op("Gelu", [x], {"approximate": approximate}, like=old))
        return self.applied(node, "Gelu" if approximate is None else "Gelu, tanh approximation")


def _solve(argument: ir.Value, target: Terms, op_type: str) -> tuple[tuple[ir.Value, Expansion] | None, str]:
    """The x for which the argument is `target`, or the reason where it nearly is."""
    near = ""
    for candidate in below(argument):
        expansion = expand(argument, [candidate])
        if expansion is None or candidate is argument:
            continue
        if expansion.equals(target):
            return (candidate, expansion), ""
        terms = expansion.terms
        if terms.keys() == target.keys() and all(abs(terms[k] / c - 1) < 1e-2 for k, c in target.items()):
            written = ", ".join(f"{number:.9g}" for number in terms.values())
            exact = ", ".join(f"{number:.9g}" for number in target.values())
            near = f"the argument of {op_type} has the constant {written}, not {exact} to the rounding of its type"
    return None, near


def _find_product(x: ir.Value, gate: ir.Value) -> tuple[ir.Node | None, Expansion | None]:
    """The node that makes ½·x·(1 + gate)."""
    for node in above(gate):
        expansion = expand(node.outputs[0], [x, gate])
        if expansion is not None and expansion.equals(_PRODUCT):
            return node, expansion
    return None, None
