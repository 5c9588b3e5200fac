"""prune-zero-edges: what is multiplied by 0 and added is left out."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analysis.algebra import attribute_int, is_op, producer
from graphopt.graph.constants import constant_array
from graphopt.graph.edits import Editor
from graphopt.passes.fold.channel_affine import Affine, constant_operand, rank_of, read, rounded_to
from graphopt.passes.fold.layers import FLOATS, sole_reader
from graphopt.passes.raise_.shape_rules import ShapeRulePass


class PruneZeroEdges(ShapeRulePass):
    """Drop the terms of weighted sums whose constant weight is 0, and merge the terms of one value.

        y + 0·x = y        a·x + b·x = (a + b)·x

    Paper: DenseFormer: Enhancing Information Flow in Transformers via Depth Weighted Averaging (2024). After each block
    it averages the outputs of all blocks so far with learned weights; where one is 0, that edge of the network and
    often a copy of the activation go. Sparse learned skips and gates of other networks look the same.

    1. Add, Sub or Sum where one term is a Mul by a constant of zeros, or a Div of one: without that term. (0·x − y
       becomes −y.)
    2. The same average written as a product with a stack: MatMul or Einsum "ij,jk->ik" of a constant with columns of
       zeros and a Reshape of a Concat along axis 0: without these columns and these inputs of the Concat.
    3. Add or Sub of two multiples of one value: one multiple. A chain of two Mul or two Add is merged by `fold-affine`,
       and a weight of exactly 1 goes by `eliminate-identities`.

    **Needs:** constant weights; proof that the sum has the shape of what remains. **Guarantees:** the same function of
    finite numbers. An infinity or NaN in x that the zero turned into NaN no longer reaches the sum, and −0 + 0 gives −0
    instead of +0: that is why this is no part of `eliminate-identities`, which keeps every bit.

    **Left alone, with the reason:** a term that may widen the sum by broadcasting; a stack that something else reads.
    A sum of zeros alone stays.

    **When not to use it:** where a network spreads NaN on purpose, as a mark of missing values.
    """

    name: ClassVar[str] = "prune-zero-edges"
    family: ClassVar[str] = "fold"
    paper: ClassVar[str] = "DenseFormer: Enhancing Information Flow in Transformers via Depth Weighted Averaging"
    anchors: ClassVar[tuple[str, ...]] = ("Add", "Sub", "Sum", "MatMul", "Einsum")

    def rewrite(self, node: ir.Node, edit: Editor) -> bool:
        """See the class."""
        if is_op(node, "MatMul", "Einsum"):
            return self._stack(node, edit)
        return self._terms(node, edit) or (is_op(node, "Add", "Sub") and self._multiples(node, edit))

    def _terms(self, node: ir.Node, edit: Editor) -> bool:
        """Rule 1."""
        terms = [value for value in node.inputs if value is not None]
        kept = [index for index, value in enumerate(terms) if not self._is_zero(value)]
        if len(kept) in (0, len(terms)):
            return False
        rest, output = [terms[index] for index in kept], node.outputs[0]
        # Of several terms, one with all of the shape is enough.
        if not any(self._same_shape(value, output) for value in rest):
            return self.left(node, "the term that is 0 may give the sum more elements than the others have")
        self.applied(node, f"{len(terms) - len(kept)} of {len(terms)} terms is 0")
        if len(rest) > 1:
            edit.replace(output, edit.op("Sum", rest, like=output))
        elif is_op(node, "Sub") and kept == [1]:
            edit.replace(output, edit.op("Neg", rest, like=output))
        else:
            edit.replace(output, rest[0])
        return True

    def _is_zero(self, value: ir.Value, depth: int = 4) -> bool:
        """Whether `value` is a product with zeros, or a sum of such products."""
        node = producer(value, "Mul", "Div", "Add", "Sub", "Sum")
        if node is None:
            return False
        if is_op(node, "Add", "Sub", "Sum"):
            return depth > 0 and all(v is not None and self._is_zero(v, depth - 1) for v in node.inputs)
        for factor in node.inputs[: 2 if node.op_type == "Mul" else 1]:
            array = constant_array(factor)
            if array is not None and array.size and ir.DataType.from_numpy(array.dtype) in FLOATS and not array.any():
                return True
        return False

    def _same_shape(self, value: ir.Value, output: ir.Value) -> bool:
        shape = self.dims(value)
        return shape is not None and shape == self.dims(output)

    def _stack(self, node: ir.Node, edit: Editor) -> bool:
        """Rule 2."""
        if is_op(node, "Einsum"):
            equation = node.attributes.get("equation")
            if equation is None or equation.is_ref() or "".join(equation.as_string().split()) != "ij,jk->ik":
                return False
        if len(node.inputs) != 2:
            return False
        reshape = producer(node.inputs[1], "Reshape")
        stack = None if reshape is None else producer(reshape.inputs[0], "Concat")
        weights = constant_array(node.inputs[0])
        if reshape is None or stack is None or weights is None or weights.ndim != 2:
            return False
        kept = np.flatnonzero(weights.any(axis=0))
        target = constant_array(reshape.inputs[1])
        if not 0 < len(kept) < weights.shape[1] or len(stack.inputs) != weights.shape[1]:
            return False
        allowed = attribute_int(reshape, "allowzero", 0)
        layers = [value for value in stack.inputs if value is not None]
        rows = [self.shape(value) for value in layers]
        if attribute_int(stack, "axis", 1) != 0 or any(not row or row[0] != 1 for row in rows):
            return False
        if target is None or allowed is None or target.shape != (2,) or target[0] not in (weights.shape[1], -1):
            return self.left(node, "the shape in which it reads the stack isn't constant")
        for value in (stack.outputs[0], reshape.outputs[0]):
            if value.is_graph_output() or len(value.uses()) > 1:
                return self.left(node, f"the stack {value.name!r} is read by something else too")
        if target[1] == 0 and not allowed:
            return False
        self.applied(node, f"{weights.shape[1] - len(kept)} of {weights.shape[1]} weights are 0")
        fewer = edit.op("Concat", [layers[index] for index in kept], {"axis": 0})
        shape = edit.constant(np.array([len(kept) if target[0] > 0 else -1, target[1]], dtype=np.int64), "shape")
        matrix = edit.op("Reshape", [fewer, shape], {"allowzero": 1} if allowed else {})
        left = edit.constant(np.ascontiguousarray(weights[:, kept]), "weights")
        output, attributes = node.outputs[0], {name: a.value for name, a in node.attributes.items()}
        edit.replace(output, edit.op(node.op_type, [left, matrix], attributes, like=output))
        return True

    def _multiples(self, node: ir.Node, edit: Editor) -> bool:
        """Rule 3."""
        first, second = node.inputs
        if first is None or second is None or first is second:
            return False
        pairs = ((a, b) for a in self._multiples_of(first) for b in self._multiples_of(second))
        pair = next(((a, b) for a, b in pairs if a[0] is b[0]), None)
        if pair is None:
            return False
        (x, one, _), (_, other, _) = pair
        rank = rank_of(x, self)
        if one.size > 1 < other.size and not (one.size == other.size and other.on(one.axis, rank)):
            return False
        total = one.scale + (-other.scale if is_op(node, "Sub") else other.scale)
        multiples = [made for _, _, made in pair if made is not None]
        constants = [constant_operand(made) for made in multiples]
        scale = rounded_to(total, constants[0].dtype)
        if scale is None or not scale.all() or all(sole_reader(made.outputs[0]) for made in multiples):
            return False
        shape = next((t.shape.numpy() for t in constants if t.size == scale.size and scale.size > 1), ())
        self.applied(node, f"two multiples of {x.name!r} as one")
        output = node.outputs[0]
        edit.replace(output, edit.op("Mul", [x, edit.constant(scale.reshape(shape), "weight")], like=output))
        return True

    def _multiples_of(self, value: ir.Value) -> list[tuple[ir.Value, Affine, ir.Node | None]]:
        """What `value` is a constant multiple of, by how much, and the node that says so; `value` itself first."""
        multiples: list[tuple[ir.Value, Affine, ir.Node | None]] = [(value, Affine(np.ones(1), np.zeros(1)), None)]
        node = producer(value, "Mul", "Div")
        found = None if node is None else read(node, self)
        if found is not None and np.isfinite(found[1].scale).all():
            multiples.append((*found, node))
        return multiples
