"""expand-group-norm: `GroupNormalization` becomes an instance normalization of its groups, where that is faster."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.graph.constants import constant_array
from graphopt.graph.edits import Editor
from graphopt.passes.raise_.shape_rules import ShapeRulePass

_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


class ExpandGroupNorm(ShapeRulePass):
    r"""Write `GroupNormalization` as an `InstanceNormalization` over its groups, then a scale and a bias by channel.

        GroupNormalization(x; γ, β)[n, c, …] = γ[c] · (x − mean_g) / √(var_g + ε) + β[c],   g = ⌊c G / C⌋
                                             = γ[c] · InstanceNormalization(Reshape(x, [N, G, −1]); 1, 0) + β[c]

    Paper: Group Normalization (Wu, He, 2018).

    ONNX Runtime 1.31 has no CPU kernel for the operator, which torch.export writes from opset 21 on, and runs its
    definition of some 25 operators instead. Measured there (CPU time of the normalization and a 1 × 1 convolution after
    it, expanded over standard): 0.54 to 0.56 at 64 channels of 8 × 8, 0.65 to 0.76 at 32 × 32 and 64 × 64.

    1. As many groups as channels: one `InstanceNormalization` with γ and β, no reshape.
    2. Otherwise as above; the product with γ is left out where γ is constant 1, the sum where β is constant 0.
    3. A target profile that prefers `standard` for the choice `group-norm` at the channels and pixels of the site
       leaves the operator alone.

    **Needs:** opset 21 (γ and β by channel), float32 or float16, a known rank. **Guarantees:** the same function up to
    rounding.

    **Targets:** cpu.

    **When not to use it:** where the runtime has a kernel for `GroupNormalization`.
    """

    name: ClassVar[str] = "expand-group-norm"
    family: ClassVar[str] = "lower"
    paper: ClassVar[str] = "Group Normalization"
    targets: ClassVar[tuple[str, ...]] = ("cpu",)
    anchors: ClassVar[tuple[str, ...]] = ("GroupNormalization",)

    def rewrite(self, node: ir.Node, edit: Editor) -> bool:
        """See the class."""
        if len(node.inputs) != 3 or any(v is None for v in node.inputs):
            return False  # not a valid node
        x, scale, bias = (v for v in node.inputs if v is not None)
        if any(a.is_ref() for a in node.attributes.values()):
            return self.left(node, "an attribute is set by the caller of its function: inline functions first")
        if edit.opset < 21:
            return self.left(node, "its scale is by group before opset 21: convert the opset first")
        dtype, stash = self.dtype(x), node.attributes.get_int("stash_type", ir.DataType.FLOAT.value)
        if dtype not in _TYPES:
            what = "an unknown type" if dtype is None else dtype.name.lower()
            return self.left(node, f"it computes in {what}, for which ONNX Runtime has no InstanceNormalization")
        if dtype == ir.DataType.FLOAT16 and stash != ir.DataType.FLOAT:
            return self.left(node, "stash_type asks for half precision, in which ONNX Runtime doesn't compute")
        sizes = self.shape(x)
        if sizes is None:
            return self.left(node, "the rank of its input isn't known")
        channels = sizes[1] if len(sizes) > 1 else None
        pixels = math.prod(n for n in sizes[2:] if n) if all(sizes[2:]) else None
        if self.prefers("group-norm", channels, pixels) == "standard":
            return self.left(node, "the target profile says that the operator itself is not slower")
        groups = node.attributes.get_int("num_groups")
        epsilon = node.attributes.get_float("epsilon", 1e-5)
        old = node.outputs[0]
        if channels == groups:
            edit.replace(old, edit.op("InstanceNormalization", [x, scale, bias], {"epsilon": epsilon}, like=old))
            return self.applied(node, "one group a channel: an InstanceNormalization")
        assert groups is not None
        ones = edit.constant(np.ones(groups, dtype.numpy()), "ones")
        zeros = edit.constant(np.zeros(groups, dtype.numpy()), "zeros")
        grouped = edit.op("Reshape", [x, edit.constant(np.asarray([0, groups, -1], np.int64), "groups")])
        normal = edit.op("InstanceNormalization", [grouped, ones, zeros], {"epsilon": epsilon})
        result = edit.op("Reshape", [normal, edit.op("Shape", [x])], like=x)
        if not _is_all(scale, 1.0):
            result = edit.op("Mul", [result, _by_channel(edit, scale, len(sizes), "scale")], like=x)
        if not _is_all(bias, 0.0):
            result = edit.op("Add", [result, _by_channel(edit, bias, len(sizes), "bias")], like=x)
        edit.replace(old, result)
        return self.applied(node, f"an InstanceNormalization of {groups} groups, scale and bias")


def _by_channel(edit: Editor, value: ir.Value, rank: int, label: str) -> ir.Value:
    """A vector by channel in a shape that broadcasts over the axes after the channels."""
    shape = [-1] + [1] * (rank - 2)
    array = constant_array(value)
    if array is not None:
        return edit.constant(array.reshape(shape), label)
    return edit.op("Reshape", [value, edit.constant(np.asarray(shape, np.int64), f"{label}_shape")])


def _is_all(value: ir.Value, number: float) -> bool:
    array = constant_array(value)
    return array is not None and bool(np.all(array == number))
