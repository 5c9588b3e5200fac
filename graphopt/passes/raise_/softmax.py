"""raise-softmax: every spelling of a softmax becomes `Softmax` or `LogSoftmax`."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analysis.algebra import (
    Terms,
    above,
    attribute_int,
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
from graphopt.analysis.moments import reduced_axes, shape_arithmetic
from graphopt.graph.constants import scalar
from graphopt.graph.edits import Editor
from graphopt.passes.raise_.root_mean_square import NotRaised
from graphopt.passes.raise_.shape_rules import ShapeRulePass

OPSET = 13
_FORMS = 8
_DIFFERENCE: Terms = {(1, 0): 1.0, (0, 1): -1.0}
_DIFFERENCES: Terms = {(1, 0, 0): 1.0, (0, 1, 0): -1.0, (0, 0, 1): -1.0}


class RaiseSoftmax(ShapeRulePass):
    """Write a softmax, and its logarithm, that an exporter took apart as one operator.

        Softmax(x) = exp(x) / Σ exp(x),  LogSoftmax(x) = x − log Σ exp(x)        (sums over one axis)

    Both are the same for x and for x − c where c is one number along the axis, such as max(x), which keeps exp(x)
    finite; the operators subtract it themselves.

    1. exp(d) / Σ exp(d) → `Softmax(d)`: `Div`, or a product with `Reciprocal`, `Div(1, ·)` or `Pow −1`. exp(d −
       ReduceLogSumExp(d)) and exp(LogSoftmax(d)) too.
    2. d − log Σ exp(d), and x − max(x) − log Σ exp(x − max(x)) in every order, → `LogSoftmax`; d −
       ReduceLogSumExp(d) too.
    3. `Softmax(x − max(x))` → `Softmax(x)`, where the maximum is over the axis of the softmax.
    4. `Softmax` between two transposes that undo each other → `Softmax` over the axis that stood last.
    5. `Softmax` over an axis of length 1 → ones, `LogSoftmax` → zeros.

    The reduced axis is kept, or dropped and put back by Unsqueeze, Reshape or Expand; max(−∞, ·) around a maximum
    (JAX) is looked through.

    **Options:** `few` (elements, default 4): leave a spelled-out softmax over an inner axis of at most so many
    elements as it is. ONNX Runtime 1.31 (CPU) transposes twice for an inner axis, and its parts then take 0.45 to 0.65
    of the time of the operator; from 8 elements on, and over the last axis, the operator is the faster one (0.2 to
    0.9). 0 raises all. `underflow` (boolean, default false): Log(Softmax(x)) → `LogSoftmax(x)` too.

    **Needs:** opset 13; that the reduced axis is kept (its shape, where that isn't written down).
    **Guarantees:** the same function. Without the subtraction of max(x), exp(x) overflows beyond 88 in float32, and the
    quotient was NaN where the operator is right; the same for rows of −∞ that rule 5 meets.

    **Left alone, with the reason:** a sum over several axes; a softmax over few elements of an inner axis; a sum that
    something is added to, or something else reads; Log(Softmax(x)), which is −∞ where x is 104 below the maximum
    (float32) and LogSoftmax is not, so that masked entries change.

    **When not to use it:** never.
    """

    name: ClassVar[str] = "raise-softmax"
    family: ClassVar[str] = "raise"
    anchors: ClassVar[tuple[str, ...]] = ("Exp", "ReduceLogSumExp", "Softmax", "LogSoftmax")

    def __init__(self, few: int = 4, underflow: bool = False) -> None:
        super().__init__()
        self.few = few
        self.underflow = underflow

    def rewrite(self, node: ir.Node, edit: Editor) -> bool:
        """See the class."""
        if any(attribute.is_ref() for attribute in node.attributes.values()):
            return False
        try:
            if node.op_type == "Exp":
                return self._rewrite_exp(node, edit)
            if node.op_type == "ReduceLogSumExp":
                return self._rewrite_log_sum_exp(node, edit)
            return self._rewrite_operator(node, edit)
        except NotRaised as reason:
            return self.left(node, str(reason))

    # ---- rule 1 and 2

    def _rewrite_exp(self, node: ir.Node, edit: Editor) -> bool:
        d, e = node.inputs[0], node.outputs[0]
        assert d is not None
        if (inner := producer(source(d), "LogSoftmax")) is not None:
            if edit.opset < OPSET:
                raise NotRaised(f"needs opset {OPSET}, the model has {edit.opset}: run convert-opset first")
            if (used := escaping([inner], node)) is None:
                edit.replace(e, edit.op("Softmax", [inner.inputs[0]], {"axis": _axis_of(inner)}, like=e))
                return self.applied(node, "Exp of LogSoftmax as Softmax")
            raise NotRaised(f"{used.name!r} is used elsewhere too, so both are wanted")
        for reduction in users(e):
            if not is_op(reduction, "ReduceSum"):
                continue
            for total, between in self._kept_forms(reduction):
                nodes = [node, reduction, *between]
                if (found := _quotient(e, total)) is not None:
                    return self._write("Softmax", d, reduction, total, [*nodes, *found[1]], found[0], edit)
                for log in users(total):
                    if is_op(log, "Log") and (found := self._difference(d, log.outputs[0])) is not None:
                        return self._write("LogSoftmax", d, reduction, total, [*nodes, log, *found[1]], found[0], edit)
                self._explain(e, total)
        return False

    def _rewrite_log_sum_exp(self, node: ir.Node, edit: Editor) -> bool:
        x = node.inputs[0]
        assert x is not None
        for total, between in self._kept_forms(node):
            found = self._difference(x, total)
            if found is not None:
                return self._write("LogSoftmax", x, node, total, [node, *between, *found[1]], found[0], edit)
        return False

    @staticmethod
    def _difference(d: ir.Value, log: ir.Value) -> tuple[ir.Node, list[ir.Node]] | None:
        """The node that makes d − log, or x − max − log where d is x − max, and the arithmetic that it ends."""
        shift = producer(source(d), "Sub")
        parts = [] if shift is None else [v for v in shift.inputs if v is not None]
        for root in above(log):
            for atoms, target in (([d, log], _DIFFERENCE), ([*parts, log], _DIFFERENCES)):
                found = expand(root.outputs[0], atoms)
                if found is not None and found.equals(target):
                    return root, list(found.nodes)
        return None

    def _kept_forms(self, reduction: ir.Node) -> list[tuple[ir.Value, list[ir.Node]]]:
        """The value of a reduction, and what Unsqueeze, Reshape and Expand make of it, with the nodes in between."""
        forms: list[tuple[ir.Value, list[ir.Node]]] = [(reduction.outputs[0], [])]
        for value, nodes in forms:
            if len(forms) < _FORMS:
                views = [user for user in users(value) if is_op(user, "Unsqueeze", "Reshape", "Expand")]
                forms.extend(
                    (view.outputs[0], [*nodes, *shape_arithmetic(value, view), view])
                    for view in views
                    if view.inputs[0] is value
                )
        return forms

    def _write(
        self,
        op_type: str,
        x: ir.Value,
        reduction: ir.Node,
        total: ir.Value,
        nodes: list[ir.Node],
        root: ir.Node,
        edit: Editor,
    ) -> bool:
        axis = self._kept_axis(reduction, total)
        if axis is None:
            raise NotRaised("the summed axis isn't kept, or not known to be: the division broadcasts differently")
        if any(node.graph is not root.graph for node in nodes):
            raise NotRaised("it is spread over an outer graph and a subgraph")
        rank = constant_rank(nodes)
        if not self.has_rank(x, rank):
            raise NotRaised(f"a constant of rank {rank} may broadcast the result, whose rank isn't known")
        if (used := escaping(nodes, root)) is not None:
            raise NotRaised(f"{used.name!r} inside the softmax is used elsewhere too")
        if edit.opset < OPSET:
            raise NotRaised(f"needs opset {OPSET}, the model has {edit.opset}: run convert-opset first")
        self._check_few(x, axis)
        axis = -1 if axis + 1 == self.rank(x) else axis
        edit.at(root)
        old = root.outputs[0]
        edit.replace(old, edit.op(op_type, [x], {"axis": axis}, like=old))
        return self.applied(reduction, f"{op_type} over axis {axis}")

    def _kept_axis(self, reduction: ir.Node, value: ir.Value) -> int | None:
        """The one axis that `value` is reduced over, where it keeps that axis; None where it isn't known to."""
        operand, axes = reduction.inputs[0], reduced_axes(reduction)
        assert operand is not None
        if axes is None or len(axes) != 1:
            written = "all or unknown axes" if axes is None else f"axes {list(axes)}"
            raise NotRaised(f"{reduction.op_type} is over {written}, a softmax over one")
        (axis,) = axes
        if value is reduction.outputs[0] and attribute_int(reduction, "keepdims", 1) == 1:
            return axis
        if self.keeps_axes(value, operand, axes):
            return axis
        # Expanded to the length of the axis is as good.
        whole, full = self._facts.shape(value), self._facts.shape(operand)
        return axis if whole is not None and full is not None and list(whole) == list(full) else None

    def _check_few(self, x: ir.Value, axis: int) -> None:
        shape = self.shape(x)
        if self.few == 0 or axis == -1 or (shape is not None and axis in (len(shape) - 1, -1)):
            return
        length = None if shape is None or not -len(shape) <= axis < len(shape) else shape[axis]
        if length is None or length <= self.few:
            many = "an unknown number of" if length is None else f"only {length}"
            raise NotRaised(
                f"it is over {many} elements of an inner axis, where the operator may be slower (option few)"
            )

    def _explain(self, e: ir.Value, total: ir.Value) -> None:
        for plus in users(total):
            other = other_operand(plus, total)
            if is_op(plus, "Add", "Max", "Clip") and _quotient(e, plus.outputs[0]) is not None:
                what = f"{scalar(other):g}" if scalar(other) is not None else "something"
                raise NotRaised(f"the sum is changed by {plus.op_type} ({what}) before the division")

    # ---- rules 3, 4 and 5

    def _rewrite_operator(self, node: ir.Node, edit: Editor) -> bool:
        x, y = node.inputs[0], node.outputs[0]
        if x is None or edit.opset < OPSET:
            return False
        axis = _axis_of(node)
        if (inner := self._without_maximum(x, axis)) is not None:
            # Not set_input: the operator must not read what is made later, or in a subgraph.
            edit.replace(y, edit.op(node.op_type, [inner], {"axis": axis}, like=y))
            return self.applied(node, "the subtraction of the maximum is left to the operator")
        shape = self.shape(x)
        if shape is not None and -len(shape) <= axis < len(shape) and shape[axis] == 1:
            return self._write_constant(node, x, edit)
        if (log := next((u for u in users(y) if is_op(u, "Log")), None)) is not None and node.op_type == "Softmax":
            return self._rewrite_log(node, log, edit)
        return self._rewrite_transposed(node, axis, edit)

    def _write_constant(self, node: ir.Node, x: ir.Value, edit: Editor) -> bool:
        dtype = self.dtype(x)
        if dtype is None:
            raise NotRaised("it is over an axis of length 1, but its type isn't known")
        number = 1.0 if node.op_type == "Softmax" else 0.0
        fill = ir.tensor(np.full(1, number, dtype=dtype.numpy()))
        old = node.outputs[0]
        edit.replace(old, edit.op("ConstantOfShape", [edit.op("Shape", [x])], {"value": fill}, like=old))
        return self.applied(node, f"over an axis of length 1: {number:g}")

    def _without_maximum(self, d: ir.Value, axis: int) -> ir.Value | None:
        """x where `d` is x − max(x) over the axis."""
        minus = producer(source(d), "Sub")
        x = None if minus is None else minus.inputs[0]
        value = None if minus is None else minus.inputs[1]
        if x is None or value is None:
            return None
        shift = value
        for _ in range(5):
            node = source(value).producer()
            if node is None or node.domain not in ("", "ai.onnx"):
                return None
            operands = [v for v in node.inputs if v is not None]
            if node.op_type == "ReduceMax":
                return x if same(operands[0], x) and self._is_over(node, shift, axis) else None
            if node.op_type in ("Unsqueeze", "Reshape", "Expand"):
                value = operands[0]
            elif node.op_type == "Max" and len(operands) == 2:
                rest = [v for v in operands if scalar(v) != -np.inf]
                if len(rest) != 1:
                    return None
                value = rest[0]
            else:
                return None
        return None

    def _is_over(self, reduction: ir.Node, value: ir.Value, axis: int) -> bool:
        """Whether `value` is the reduction over that axis, and keeps it."""
        try:
            found = self._kept_axis(reduction, value)
        except NotRaised:
            return False
        rank = self.rank(reduction.outputs[0] if reduction.inputs[0] is None else reduction.inputs[0])
        return found == axis or (found is not None and rank is not None and (found - axis) % rank == 0)

    def _rewrite_log(self, node: ir.Node, log: ir.Node, edit: Editor) -> bool:
        if not self.underflow:
            return self.left(node, "its logarithm is −∞ where it underflows, LogSoftmax isn't (option underflow)")
        if (used := escaping([node], log)) is not None:
            return self.left(node, f"{used.name!r} is used elsewhere too, so both are wanted")
        edit.at(log)
        old = log.outputs[0]
        edit.replace(old, edit.op("LogSoftmax", [node.inputs[0]], {"axis": _axis_of(node)}, like=old))
        return self.applied(node, "Log of Softmax as LogSoftmax")

    def _rewrite_transposed(self, node: ir.Node, axis: int, edit: Editor) -> bool:
        first = producer(node.inputs[0], "Transpose")
        for second in users(node.outputs[0]) if first is not None else []:
            if first is None or not is_op(second, "Transpose"):
                continue
            p, q = _permutation(first), _permutation(second)
            if p is None or q is None or len(p) != len(q) or [p[i] for i in q] != list(range(len(p))):
                continue
            if (used := escaping([first, node], second)) is not None:
                return self.left(node, f"{used.name!r} between two transposes is used elsewhere too")
            edit.at(second)
            old, over = second.outputs[0], p[axis]
            over = -1 if over == len(p) - 1 else over
            edit.replace(old, edit.op(node.op_type, [first.inputs[0]], {"axis": over}, like=old))
            return self.applied(node, f"between two transposes: over axis {over}")
        return False


def _axis_of(node: ir.Node) -> int:
    attribute = node.attributes.get("axis")
    return -1 if attribute is None else attribute.as_int()


def _permutation(node: ir.Node) -> list[int] | None:
    perm = node.attributes.get("perm")
    return None if perm is None or perm.is_ref() else list(perm.as_ints())


def _quotient(e: ir.Value, total: ir.Value) -> tuple[ir.Node, list[ir.Node]] | None:
    """The node that makes e / total, and the reciprocal on the way where there is one."""
    for user in users(total):
        if is_op(user, "Div") and user.inputs[1] is total:
            if user.inputs[0] is e:
                return user, []
            inverse = scalar(user.inputs[0]) == 1.0
        else:
            power = is_op(user, "Pow") and user.inputs[0] is total and scalar(user.inputs[1]) == -1.0
            inverse = power or is_op(user, "Reciprocal")
        for product in users(user.outputs[0]) if inverse else []:
            if is_op(product, "Mul") and other_operand(product, user.outputs[0]) is e:
                return product, [user]
    return None
