"""raise-group-norm: an instance normalization between two reshapes becomes `GroupNormalization`."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.algebra import is_op, other_operand, producer, users
from graphopt.analysis.moments import folded
from graphopt.graph.edits import Editor
from graphopt.passes.raise_.root_mean_square import NotRaised
from graphopt.passes.raise_.shape_rules import ShapeRulePass

OPSET = 21
_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


class RaiseGroupNorm(ShapeRulePass):
    """Write a group normalization as one `GroupNormalization`.

        y = (x − mean) / √(variance + ε) · gain[c] + bias[c]        (over C/G channels, a group, and all positions)

    Paper: Group Normalization (Wu, He, 2018).

    1. x [N, C, ...] → Reshape to [N, G, ...] → `InstanceNormalization` → Reshape to the shape of x → `Mul` → `Add`
       (what PyTorch's exporters write) becomes a `GroupNormalization` of G groups. Gain and bias may also stand before
       the second Reshape, as [G, C/G, 1, ...], in the InstanceNormalization, one for each group, or be absent. Means
       and variances that are spelled out become the InstanceNormalization by `raise-instance-norm`, which comes first.
    2. G = C → `InstanceNormalization` of x itself.

    **Options:** `operator` (boolean, default true): rule 1. Without it the five operators are the canonical form. A
    recipe that holds `expand-group-norm` switches it off, so that a second run finds nothing to do.

    **Needs:** opset 21 for rule 1; the numbers of channels and groups; that the second shape is that of x; constants
    for gain and bias. **Guarantees:** the same function.

    **Left alone, with the reason:** a result that isn't reshaped back; types other than float32 and float16; values
    in between that something else reads.

    **When not to use it:** rule 1 on ONNX Runtime's CPU provider, which has no kernel for `GroupNormalization`: what it
    makes of the operator takes 1.7 to 2 times as long as the five operators.
    """

    name: ClassVar[str] = "raise-group-norm"
    family: ClassVar[str] = "raise"
    paper: ClassVar[str] = "Group Normalization"
    anchors: ClassVar[tuple[str, ...]] = ("InstanceNormalization",)

    def __init__(self, operator: bool = True) -> None:
        super().__init__()
        self.operator = operator

    def rewrite(self, node: ir.Node, edit: Editor) -> bool:
        """See the class."""
        epsilon = node.attributes.get("epsilon")
        if epsilon is not None and epsilon.is_ref():
            return self.left(node, "epsilon is set by the caller of its function: inline functions first")
        try:
            found = self._match(node)
        except NotRaised as reason:
            return self.left(node, str(reason))
        if found is None or (not self.operator and found.groups != found.channels):
            return False
        if found.groups != found.channels and edit.opset < OPSET:
            return self.left(node, f"needs opset {OPSET}, the model has {edit.opset}: run convert-opset first")
        edit.at(found.root)
        old = found.root.outputs[0]
        inputs = [found.x, edit.constant(found.gain, "gain"), edit.constant(found.bias, "bias")]
        attributes: dict[str, Any] = {"epsilon": 1e-5 if epsilon is None else epsilon.as_float()}
        if found.groups == found.channels:
            edit.replace(old, edit.op("InstanceNormalization", inputs, attributes, like=old))
            return self.applied(node, "one group for each channel: InstanceNormalization")
        attributes["num_groups"] = found.groups
        edit.replace(old, edit.op("GroupNormalization", inputs, attributes, like=old))
        return self.applied(node, f"GroupNormalization of {found.groups} groups of {found.channels} channels")

    def _match(self, node: ir.Node) -> _Groups | None:
        view = node.inputs[0]
        before = producer(view, "Reshape")
        x = None if before is None else before.inputs[0]
        if view is None or before is None or x is None:
            return None
        whole, rows = self._facts.shape(x), self._facts.shape(view)
        if whole is None or rows is None or len(whole) < 3 or len(rows) < 3:
            return None
        channels, groups = whole[1].value, rows[1].value
        if rows[0] != whole[0] or not channels or not groups or channels % groups:
            return None
        dtype = self.dtype(x)
        if dtype not in _TYPES:
            raise NotRaised(f"it computes in {'an unknown type' if dtype is None else dtype.name.lower()}")
        size = channels // groups
        scale, shift = (folded(value) for value in node.inputs[1:])
        if scale is None or shift is None or scale.shape != (groups,) or shift.shape != (groups,):
            raise NotRaised("its scale and bias aren't constant")
        found = _Groups(x, groups, channels, np.repeat(scale, size), np.repeat(shift, size), None)
        end = node
        while (user := _sole_user(end)) is not None:
            if is_op(user, "Reshape") and found.end is None and user.inputs[0] is end.outputs[0]:
                back = self._facts.shape(user.outputs[0])
                if back is None or list(back) != list(whole):
                    raise NotRaised("the result isn't reshaped to the shape of what was reshaped, as far as is known")
                found.end = user
            elif is_op(user, "Mul", "Add"):
                array = folded(other_operand(user, end.outputs[0]))
                inside = rows if found.end is None else whole
                numbers = None if array is None else _per_channel(array, [d.value for d in inside], channels, groups)
                if numbers is None or not found.absorb(user.op_type, numbers):
                    break
                if found.end is not None:
                    found.end = user
            else:
                break
            end = user
        if found.end is None:
            raise NotRaised("what normalises groups isn't reshaped back, or read elsewhere before it is")
        return found


@dataclasses.dataclass
class _Groups:
    """A group normalization, with what was multiplied and added on the way."""

    x: ir.Value
    groups: int
    channels: int
    gain: npt.NDArray[Any]
    bias: npt.NDArray[Any]
    end: ir.Node | None

    @property
    def root(self) -> ir.Node:
        """The last node."""
        assert self.end is not None
        return self.end

    def absorb(self, op_type: str, numbers: npt.NDArray[Any]) -> bool:
        """Take over a factor where there is none yet, and no bias; a summand where there is none yet."""
        if self.bias.any() or (op_type == "Mul" and (self.gain != 1).any()):
            return False
        if op_type == "Mul":
            self.gain = numbers
        else:
            self.bias = numbers
        return True


def _per_channel(
    array: npt.NDArray[Any], sizes: list[int | None], channels: int, groups: int
) -> npt.NDArray[Any] | None:
    """The numbers of an array that broadcasts to [N, C, ...] or [N, G, (C/G,) ...], by channel."""
    if array.ndim > len(sizes):
        return None
    shape = (1,) * (len(sizes) - array.ndim) + array.shape
    if sizes[1] == channels:  # also where each channel is a group
        if any(size != 1 for axis, size in enumerate(shape) if axis != 1):
            return None
        return np.array(np.broadcast_to(array.reshape(-1), (channels,)))
    split = len(sizes) > 3 and sizes[2] == channels // groups
    if any(size != 1 for axis, size in enumerate(shape) if axis != 1 and not (axis == 2 and split)):
        return None
    both = array.reshape(shape[1], shape[2] if split else 1)
    return np.array(np.broadcast_to(both, (groups, channels // groups)).reshape(-1))


def _sole_user(node: ir.Node) -> ir.Node | None:
    value = node.outputs[0]
    found = [] if value.is_graph_output() else users(value)
    return found[0] if len(found) == 1 and found[0].graph is node.graph else None
