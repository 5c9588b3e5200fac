"""From a mean square up to the product with its inverse root: the part that every normalization layer shares.

    mean(v²) → + ε → 1/√ → v · (…)

in whatever order the exporter took it apart.
"""

from __future__ import annotations

import abc
import dataclasses

import onnx_ir as ir

from graphopt.analysis.algebra import is_op, other_operand, same, users
from graphopt.analysis.moments import Centred, Mean, centred, folded
from graphopt.graph.constants import constant_tensor, scalar


class NotRaised(Exception):
    """The site looks like the pattern but a fact is missing; the message is the reason for the report."""


@dataclasses.dataclass
class Product:
    """v/√(…): the node that makes it, and a gain and a bias that were multiplied and added on the way."""

    root: ir.Node
    gain: ir.Value | None
    bias: ir.Value | None


class RootWalk(abc.ABC):
    """The walk, and what it met.

    Attributes:
        inside: The nodes that belong to the pattern.
        beside: The nodes of means that the pattern reads, which may stay.
        epsilon: ε, 0 where none is added.
        dtype: The type of ε, which is the type of the computation; None where none is added.
    """

    def __init__(self) -> None:
        self.inside: dict[ir.Node, None] = {}
        self.beside: list[ir.Node] = []
        self.epsilon = 0.0
        self.dtype: ir.DataType | None = None

    @abc.abstractmethod
    def axes_of(self, mean: Mean, x: ir.Value) -> tuple[int, ...]:
        """The axes that a mean of x, or of something of its shape, is over; the same for the same axes.

        Raises:
            NotRaised: They aren't known, or aren't kept.
        """

    def take(self, *nodes: ir.Node) -> None:
        """Count `nodes` as part of the pattern."""
        self.inside.update(dict.fromkeys(nodes))

    def inverse_root(self, value: ir.Value) -> tuple[ir.Value, bool] | None:
        """From the mean square to 1/√(mean square + ε), or to the root itself (then True) where v is divided by it."""
        value = self._add_epsilon(value)
        for user in users(value):
            if is_op(user, "Sqrt") or self._is_power(user, value, 0.5):
                self.take(user)
                self._explain_root(user.outputs[0])
                inverse = self._reciprocal(user.outputs[0])
                return (user.outputs[0], True) if inverse is None else (inverse, False)
            if self._is_power(user, value, -0.5):
                self.take(user)
                return user.outputs[0], False
        inverse = self._reciprocal(value)
        for user in [] if inverse is None else users(inverse):
            if is_op(user, "Sqrt") or self._is_power(user, inverse, 0.5):
                self.take(user)
                return user.outputs[0], False
        return None

    def _add_epsilon(self, value: ir.Value) -> ir.Value:
        for user in users(value):
            other = other_operand(user, value)
            tensor, number = constant_tensor(other), scalar(other)
            if other is None or tensor is None or number is None:
                bound = is_op(user, "Clip")
            elif is_op(user, "Add"):
                self.take(user)
                self.epsilon, self.dtype = number, tensor.dtype
                return user.outputs[0]
            else:
                bound = is_op(user, "Max")
                if is_op(user, "Mul", "Div") and self._is_rooted(user.outputs[0]):
                    raise NotRaised(
                        f"the mean square is scaled ({user.op_type} {number:g}, as Bessel's correction in torch.std "
                        "does), which the operator can't say"
                    )
            if bound and self._is_rooted(user.outputs[0]):
                raise NotRaised(f"the mean square is bounded by {user.op_type} instead of an added epsilon")
        return value

    @staticmethod
    def _is_rooted(value: ir.Value) -> bool:
        """Whether a root is taken of `value`, or of its sum with something."""
        near = users(value)
        near += [above for user in near if is_op(user, "Add") for above in users(user.outputs[0])]
        return any(is_op(u, "Sqrt") or (is_op(u, "Pow") and scalar(u.inputs[1]) in (0.5, -0.5)) for u in near)

    @staticmethod
    def _explain_root(root: ir.Value) -> None:
        for user in users(root):
            if is_op(user, "Add") and scalar(other_operand(user, root)) is not None:
                raise NotRaised("epsilon is added after the square root: that is another function")
            if is_op(user, "Max", "Clip"):
                raise NotRaised(f"the root is bounded by {user.op_type} instead of an epsilon added inside it")

    @staticmethod
    def _is_power(node: ir.Node, base: ir.Value | None, exponent: float) -> bool:
        return is_op(node, "Pow") and node.inputs[0] is base and scalar(node.inputs[1]) == exponent

    def _reciprocal(self, value: ir.Value) -> ir.Value | None:
        """1 / value: Reciprocal, Div(1, value) or Pow(value, -1)."""
        for user in users(value):
            divided = is_op(user, "Div") and user.inputs[1] is value and scalar(user.inputs[0]) == 1.0
            if divided or is_op(user, "Reciprocal") or self._is_power(user, value, -1.0):
                self.take(user)
                return user.outputs[0]
        return None

    def product(self, inverse: ir.Value, is_root: bool, v: ir.Value, centre: Centred | None) -> Product | None:
        """The node that makes v/√(…), None where nothing is divided by the root.

        Raises:
            NotRaised: Something else is divided by it.
        """
        gain: ir.Value | None = None
        for user in users(inverse):
            other = other_operand(user, inverse)
            if is_op(user, "Mul") and not is_root and folded(other) is not None and len(users(inverse)) == 1:
                self.take(user)
                gain, inverse = other, user.outputs[0]
        divided = False
        for user in users(inverse):
            if is_op(user, "Div") and is_root and user.inputs[1] is inverse:
                number = user.inputs[0]
            elif is_op(user, "Mul") and not is_root:
                number = other_operand(user, inverse)
            else:
                continue
            divided = True
            if self._is_v(number, v, centre):
                self.take(user)
                return Product(user, gain, None)
        if centre is not None and (spread := self._distributed(inverse, centre)) is not None:
            return Product(spread[0], gain, spread[1])
        if divided:
            raise NotRaised("what is divided by the root mean square isn't what was squared")
        return None

    def _distributed(self, inverse: ir.Value, centre: Centred) -> tuple[ir.Node, ir.Value | None] | None:
        """x·s − mean·s or x·s + (bias − mean·s): how Keras and TensorFlow write (x − mean)·s + bias."""
        scaled = shift = None
        for user in users(inverse):
            other = other_operand(user, inverse) if is_op(user, "Mul") else None
            if same(other, centre.x):
                scaled = user
            elif same(other, centre.mean.value):
                shift = user
        if scaled is None or shift is None:
            return None
        for minus in users(shift.outputs[0]):
            if not is_op(minus, "Sub") or minus.inputs[1] is not shift.outputs[0]:
                continue
            if same(minus.inputs[0], scaled.outputs[0]):
                self.take(scaled, shift, minus)
                return minus, None
            for plus in users(minus.outputs[0]):
                if is_op(plus, "Add") and same(other_operand(plus, minus.outputs[0]), scaled.outputs[0]):
                    self.take(scaled, shift, minus, plus)
                    return plus, minus.inputs[0]
        return None

    def _is_v(self, value: ir.Value | None, v: ir.Value, centre: Centred | None) -> bool:
        if same(value, v):
            return True
        again = None if centre is None else centred(value)
        if again is None or centre is None or not same(again.x, centre.x):
            return False
        # TorchScript writes x − mean(x) twice; both means must be the same.
        a, b = again.mean, centre.mean
        if a.count != b.count or self.axes_of(a, centre.x) != self.axes_of(b, centre.x):
            return False
        self.take(again.node)
        self.beside.extend(a.nodes)
        return True
