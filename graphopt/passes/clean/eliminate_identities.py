"""eliminate-identities: operators that pass their input on."""

from __future__ import annotations

import math
from typing import ClassVar

import onnx_ir as ir

from graphopt.analysis.shapes import ShapeFacts, infer
from graphopt.graph.constants import scalar
from graphopt.graph.edits import Editor
from graphopt.passes.base import RulePass


class EliminateIdentities(RulePass):
    """Remove operators that give back their input unchanged, whatever it is.

    1. `Identity`.
    2. `Dropout` at inference (no training mode, mask unused).
    3. `Cast` and `CastLike` to the type that the input has. A `CastLike` to another known type becomes a `Cast`, which
       doesn't wait for the value whose type it takes (torch.export casts the 0 and 1 of each `arange` like its end).
    4. `Sum`, `Max`, `Min`, `Mean` and `Concat` of one input.
    5. `Mul` or `Div` by exactly 1, and `Sub` of exactly 0, where broadcasting can't change the shape.

    Only exact ones: a constant near 1 or near 0 is a real operation (`Log(x + 1e-10)` needs its `1e-10`, onnxscript's
    optimizer drops it), and `x + 0` turns −0 into +0, so it stays too. An Identity from a graph input, an initializer
    or an outer value to a graph output stays, because such a value can't be renamed.

    **Needs:** shapes for rules 3 and 5. **Guarantees:** the same numbers, bit for bit.

    **Why not onnx_ir's IdentityEliminationPass:** it renames a value of an outer graph that an If branch passes on, and
    raises where a file declares shapes of different ranks for both sides.

    **When not to use it:** never.
    """

    name: ClassVar[str] = "eliminate-identities"
    family: ClassVar[str] = "clean"
    bitwise: ClassVar[bool] = True
    anchors: ClassVar[tuple[str, ...]] = (
        "Identity", "Dropout", "Cast", "CastLike", "Sum", "Max", "Min", "Mean", "Concat", "Mul", "Div", "Sub",
    )  # fmt: skip

    def prepare(self, model: ir.Model, edit: Editor) -> None:
        """Infer the shapes and types that rules 3 and 5 need."""
        self._facts: ShapeFacts = infer(model)

    def rewrite(self, node: ir.Node, edit: Editor) -> bool:
        """See the class."""
        passed_on = self._passed_on(node, edit)
        if passed_on is None:
            return node.op_type == "CastLike" and self._cast(node, edit)
        output = node.outputs[0]
        if output.is_graph_output() and (
            passed_on.is_graph_input()
            or passed_on.is_initializer()
            or passed_on.graph is not node.graph
            or passed_on.is_graph_output()
        ):
            if node.op_type == "Identity":
                return False
            self.applied(node, "made an Identity: a graph output can't be renamed to its source")
        else:
            self.applied(node, f"removed: it passes {passed_on.name!r} on")
        edit.replace(output, passed_on)
        return True

    def _passed_on(self, node: ir.Node, edit: Editor) -> ir.Value | None:
        inputs = [v for v in node.inputs if v is not None]
        first = node.inputs[0] if node.inputs else None
        if first is None:
            return None
        match node.op_type:
            case "Identity":
                return first
            case "Dropout":
                return first if self._inference_dropout(node, edit) else None
            case "Cast":
                to = node.attributes["to"]
                same = not to.is_ref() and self._facts.dtype(first) == ir.DataType(to.as_int())
                return first if same else None
            case "CastLike":
                wanted = self._facts.dtype(node.inputs[1])
                return first if wanted is not None and wanted == self._facts.dtype(first) else None
            case "Sum" | "Max" | "Min" | "Mean" | "Concat":
                return first if len(inputs) == 1 else None
            case "Mul" | "Div" | "Sub":
                neutral = 0.0 if node.op_type == "Sub" else 1.0
                for index in (1, 0) if node.op_type == "Mul" else (1,):
                    kept = node.inputs[1 - index]
                    if (
                        (number := scalar(node.inputs[index])) == neutral
                        and math.copysign(1.0, number) > 0  # x - (-0.0) turns -0 into +0
                        and kept is not None
                        and self._rank_at_most(node.inputs[index], kept)
                    ):
                        return kept
        return None

    def _cast(self, node: ir.Node, edit: Editor) -> bool:
        wanted = self._facts.dtype(node.inputs[1])
        if wanted is None or any(a.is_ref() for a in node.attributes.values()):
            return self.left(node, "the type of its second input isn't known")
        attributes = {"to": wanted.value, **{name: a.value for name, a in node.attributes.items()}}
        edit.replace(node.outputs[0], edit.op("Cast", [node.inputs[0]], attributes, like=node.outputs[0]))
        return self.applied(node, f"made a Cast to {wanted.name}")

    def _rank_at_most(self, constant: ir.Value | None, kept: ir.Value) -> bool:
        """Whether the one-element constant can't add dimensions to the other operand."""
        tensor = constant.const_value if constant is not None else None
        if tensor is None:
            return False
        shape = self._facts.shape(kept)
        return len(tensor.shape) == 0 or (shape is not None and len(tensor.shape) <= len(shape))

    @staticmethod
    def _inference_dropout(node: ir.Node, edit: Editor) -> bool:
        if len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output()):
            return False
        if edit.opset < 7:
            return False
        if edit.opset >= 12 and len(node.inputs) > 2 and node.inputs[2] is not None:
            return scalar(node.inputs[2]) == 0.0
        return True
