"""raise-linear: a linear layer becomes MatMul and Add on the value as it is, without transposes and flattening."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analysis.algebra import attribute_int, is_op, producer
from graphopt.graph.computed import transposed
from graphopt.graph.constants import constant_tensor
from graphopt.graph.edits import Editor
from graphopt.passes.fold.layers import Layer, Numbers, layer_of, multiplied, sole_reader
from graphopt.passes.raise_.shape_rules import ShapeRulePass

_UNARY = (
    "Abs", "Celu", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Mish", "Neg",
    "Relu", "Selu", "Sigmoid", "Softplus", "Softsign", "Sqrt", "Swish", "Tanh", "ThresholdedRelu",
)  # fmt: skip
_BINARY = ("Add", "Sub", "Mul", "Div")


@dataclasses.dataclass(frozen=True)
class _Step:
    """A node on the way from one Reshape to the other, and which of its inputs comes from the one before."""

    node: ir.Node
    index: int


@dataclasses.dataclass(frozen=True)
class _Gemm:
    """A Gemm with constant weights.

    Attributes:
        layer: The node with its weight.
        alpha: What the product is multiplied by.
        turned: Whether the weight is transposed.
        bias: c = β · C, one number a column, None where there is none.
        as_is: Whether C is c already.
    """

    layer: Layer
    alpha: float
    turned: bool
    bias: Numbers | None
    as_is: bool

    def write(self, x: ir.Value, like: ir.Value | None, edit: Editor) -> ir.Value:
        """The same of `x`, which may have more axes, as MatMul and Add before the site."""
        node, tensor = self.layer.node, self.layer.weight
        weight = node.inputs[1]
        if self.alpha != 1.0:
            tensor = multiplied(tensor, np.full((1, 1), self.alpha))
        if self.turned:
            tensor = transposed(tensor)
        if tensor is not self.layer.weight:
            weight = edit.constant(tensor, "weight")
        product = edit.op("MatMul", [x, weight], like=like)
        if self.bias is None:
            return product
        shift = node.inputs[2] if self.as_is else edit.constant(self.bias.astype(tensor.dtype.numpy()), "bias")
        return edit.op("Add", [product, shift], like=like)


class RaiseLinear(ShapeRulePass):
    """Write a linear layer as `MatMul` and `Add`.

        Gemm(x, B, C) = x · W + c        W = α · B (or α · Bᵀ), c = β · C
        Reshape(f(Reshape(x, [-1, K])), [..., N]) = f(x)        f: linear layers and element-wise operators

    1. A Gemm whose weight and bias are constant: its transpose, α and β go into them. A bias of one number becomes one
       number a column.
    2. Linear layers, constants of one number a column, and element-wise operators between two Reshapes (or Flatten)
       that merge the leading axes and part them again, as onnxsim and frameworks with matrices only write them: they
       work on the value of more axes as it is.

    A MatMul with a transposed constant is left to `fold-constants`, which stores the transposed weight where the
    file doesn't grow by it: a weight that an embedding is tied to stays one object.

    **Needs:** for rule 2, shapes that prove that the second Reshape restores the leading axes of the first.
    **Guarantees:** the same function; where α or β isn't 1, weights are multiplied in float64 and rounded once. Large
    weights are rewritten when they are saved, one at a time.

    Measured on ONNX Runtime 1.31 (CPU time): it makes the same Gemm of MatMul and Add on matrices again when it loads
    the model (0.97 to 1.06, A/A 0.94 to 1.06). Rule 2 took 0.85 to 0.99 at one row and 0.95 to 1.05 from 16 rows on; on
    MiniLM as onnxsim writes it, with the rest of the exact recipe, 0.92 to 0.95.

    **Options:** `keep_plain` (default false): leave a Gemm with α and β 1 and a bias of one number a column, unless
    rule 2 takes it, for recipes that hold `lower-linear`, which would write it again.

    **Left alone, with the reason:** a weight or bias that isn't constant; a weight that must be changed while something
    else reads it (tied or shared); a bias of one number a row; a transposed input; float64 and integers, whose MatMul
    and Add ONNX Runtime doesn't join; α that would overflow the type.

    **When not to use it:** for runtimes that are slower on MatMul and Add than on Gemm and don't join them.
    """

    name: ClassVar[str] = "raise-linear"
    family: ClassVar[str] = "raise"
    anchors: ClassVar[tuple[str, ...]] = ("Gemm", "Reshape")

    def __init__(self, keep_plain: bool = False) -> None:
        super().__init__()
        self.keep_plain = keep_plain

    def rewrite(self, node: ir.Node, edit: Editor) -> bool:
        """See the class."""
        return self._rewrite_gemm(node, edit) if node.op_type == "Gemm" else self._rewrite_reshape(node, edit)

    # ---- rule 1

    def _rewrite_gemm(self, node: ir.Node, edit: Editor) -> bool:
        found = self._read_gemm(node, edit.opset)
        if isinstance(found, str):
            return self.left(node, found)
        if self.keep_plain and found.alpha == 1.0 and found.as_is:
            return False
        x, old = node.inputs[0], node.outputs[0]
        assert x is not None
        if x.shape is None and x.type is not None and not (x.is_graph_input() or x.is_graph_output()):
            x.shape = ir.Shape([None, found.layer.inputs])  # a Gemm says that it is a matrix, a MatMul doesn't
        edit.replace(old, found.write(x, old, edit))
        return self.applied(node, "MatMul" if found.bias is None else "MatMul + Add")

    def _read_gemm(self, node: ir.Node, opset: int) -> _Gemm | str:
        """The parts of a Gemm, or why it isn't written as MatMul and Add."""
        if opset < 7:
            return "needs opset 7, whose Add lays a bias along the rows: run convert-opset first"
        layer = layer_of(node)
        if isinstance(layer, str):
            return layer
        numbers = {name: float(a.value) for name, a in node.attributes.items() if name in ("alpha", "beta")}
        alpha, beta = numbers.get("alpha", 1.0), numbers.get("beta", 1.0)
        bias = self._bias(layer, beta)
        if isinstance(bias, str):
            return bias
        turned = bool(attribute_int(node, "transB", 0))
        if (why := self._obstacle(layer, alpha, turned)) is not None:
            return why
        given = node.inputs[2] if len(node.inputs) > 2 else None
        as_is = given is not None and beta == 1.0 and self.shape(given) == (layer.outputs,)
        return _Gemm(layer, alpha, turned, bias, as_is)

    @staticmethod
    def _bias(layer: Layer, beta: float) -> Numbers | str | None:
        """c, of one number a column; None where there is none. A reason where it is anything else."""
        if len(layer.node.inputs) < 3 or layer.node.inputs[2] is None:
            return None
        numbers = layer.bias()
        if isinstance(numbers, str):
            return numbers
        if numbers.ndim > 1:
            return f"the bias of {layer.name} has one number a row"
        if beta == 0.0 or (numbers.size == 1 and not numbers.any()):
            return None
        with np.errstate(over="ignore"):
            if not np.isfinite(numbers.astype(layer.weight.dtype.numpy()).astype(np.float64)).all():
                return f"the bias of {layer.name} would overflow"
        return np.broadcast_to(numbers, (layer.outputs,))

    @staticmethod
    def _obstacle(layer: Layer, alpha: float, turned: bool) -> str | None:
        node, weight = layer.node, layer.node.inputs[1]
        assert weight is not None
        if layer.weight.dtype == ir.DataType.DOUBLE:
            return "it computes in float64, in which ONNX Runtime joins no MatMul with its Add"
        if attribute_int(node, "transA", 0):
            return "it transposes its input"
        if not turned and alpha == 1.0:
            return None
        if len(weight.uses()) > 1 or weight.is_graph_output():
            readers = sorted({user.op_type for user, _ in weight.uses() if user is not node})
            with_whom = f"tied with {' and '.join(readers)}" if readers else "read twice"
            return f"its weight {weight.name!r} is {with_whom}: changing it would make a second copy"
        return None if alpha == 1.0 else layer.problem(np.full((1, 1), alpha))

    # ---- rule 2

    def _rewrite_reshape(self, node: ir.Node, edit: Editor) -> bool:
        chain = self._chain(node)
        if chain is None:
            return False
        opening, steps = chain
        x, old = opening.inputs[0], node.outputs[0]
        assert x is not None
        before, after = self._facts.shape(x), self._facts.shape(old)
        if before is None or after is None:
            return self.left(node, f"the shapes around the linear layer behind {opening.name!r} aren't known")
        if len(before) != len(after) or before[:-1] != after[:-1]:
            last = self._facts.shape(steps[-1].node.outputs[0])
            if len(before) == len(after) and last is not None and last[-1] == after[-1]:
                return self.left(node, f"it isn't proven to restore the leading axes that {opening.name!r} merges")
            return False
        why = self._blocked(opening, steps, len(before))
        if why is not None:
            return self.left(node, why)
        gemms = {step.node: self._read_gemm(step.node, edit.opset) for step in steps if is_op(step.node, "Gemm")}
        if (why := next((found for found in gemms.values() if isinstance(found, str)), None)) is not None:
            return self.left(node, why)
        value = x
        for step in steps:
            edit.at(step.node)
            like = old if step is steps[-1] else None
            gemm = gemms.get(step.node)
            if isinstance(gemm, _Gemm):
                value = gemm.write(value, like, edit)
                value.type = x.type if value.type is None else value.type
                continue
            inputs = list(step.node.inputs)
            inputs[step.index] = value
            attributes = {name: attribute.value for name, attribute in step.node.attributes.items()}
            value = edit.op(step.node.op_type, inputs, attributes, like=like)
            value.type = x.type if value.type is None else value.type
        edit.replace(old, value)
        return self.applied(node, f"{len(steps)} nodes work on {len(before)} axes, not flattened by {opening.name!r}")

    def _chain(self, closing: ir.Node) -> tuple[ir.Node, list[_Step]] | None:
        """From a Reshape back to the one that flattened, with the nodes between; None where that isn't what it is."""
        steps: list[_Step] = []
        value = closing.inputs[0]
        while value is not None:
            node = producer(value, "MatMul", "Gemm", "Reshape", "Flatten", *_BINARY, *_UNARY)
            if node is None or node.graph is not closing.graph:
                return None
            if node.op_type in ("Reshape", "Flatten"):
                linear = any(step.node.op_type in ("MatMul", "Gemm") for step in steps)
                return (node, steps[::-1]) if linear and node.inputs[0] is not None else None
            index = 0
            if is_op(node, *_BINARY):
                constants = [constant_tensor(operand) is not None for operand in node.inputs]
                if sum(constants) != 1:
                    return None
                index = constants.index(False)
            elif is_op(node, "MatMul", "Gemm"):
                weight = constant_tensor(node.inputs[1])
                if weight is None or len(weight.shape) != 2:
                    return None
            if any(attribute.is_ref() for attribute in node.attributes.values()):
                return None
            steps.append(_Step(node, index))
            value = node.inputs[index]
        return None

    def _blocked(self, opening: ir.Node, steps: list[_Step], rank: int) -> str | None:
        """Why the nodes between can't work on the value that isn't flattened."""
        x, flat = opening.inputs[0], opening.outputs[0]
        assert x is not None
        wide, narrow = self._facts.shape(x), self._facts.shape(flat)
        if wide is None or narrow is None or not wide or not narrow or wide[-1] != narrow[-1]:
            return f"{opening.name!r} isn't proven to keep the last axis"
        for step in steps:
            output = step.node.outputs[0]
            if (why := sole_reader(output)) is not None:
                return why
            if step.node.op_type in _BINARY:
                dims = constant_tensor(step.node.inputs[1 - step.index])
                shape = () if dims is None else tuple(dims.shape.numpy())
                if len(shape) > rank or any(size != 1 for size in shape[:-1]):
                    return f"the constant of {step.node.name!r} has more than one number a column"
        return None
