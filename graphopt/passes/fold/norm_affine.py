"""fold-norm-affine: gain and bias of a normalization go into the linear layers that read it."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.algebra import attribute_int, is_op
from graphopt.analysis.moments import folded
from graphopt.graph.constants import is_constant
from graphopt.graph.edits import Editor
from graphopt.passes.fold.channel_affine import Affine, added_columns, same_axis
from graphopt.passes.fold.layers import FLOATS
from graphopt.passes.fold.neighbours import AffinePass, Neighbours

_TOKEN = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
_MAP = ("InstanceNormalization", "GroupNormalization")


@dataclasses.dataclass(frozen=True)
class _Gain:
    """What a normalization multiplies by and adds: the map, and the shape and type that the gain is written in."""

    affine: Affine
    shape: tuple[int, ...]
    dtype: npt.DTypeLike


class FoldNormAffine(AffinePass):
    """Move the gain and the bias of a normalization into the group of linear layers that reads it.

        W (γ ⊙ n(x) + β) + b = (W·diag(γ)) n(x) + (b + W β)

    The normalization stays, with γ = 1 and without bias; all of one width share one array of ones. The numbers that
    the layers read then have mean square 1, which is what a rotation of the residual stream and the equations of
    Pre-RMSNorm and Pre-CRMSNorm Transformers: Equivalent and Efficient Pre-LN Transformers (2023) ask for.

    1. `LayerNormalization`, `RMSNormalization` and ONNX Runtime's `SimplifiedLayerNormalization` over the last axis,
       where every reader is a MatMul or Gemm with constant weights: q, k and v; gate and up; fc1; the output layer. A
       gain may be a sum, product or cast of constants that nobody folded yet: Gemma's 1 + w.
    2. `InstanceNormalization`, and `GroupNormalization` of opset 21, where every reader is a Conv without padding
       (with padding only where β = 0).

    Between the two may stand what only moves numbers: the Gather or Slice of one token, Transpose, Reshape. The
    element-wise norms (a Mul and Add behind a Tanh) have no operator of their own: `fold-affine` takes them.

    **Needs:** a constant gain and bias; float64, float32, float16 or bfloat16. **Guarantees:** the same function: the
    new weights are computed in float64 and rounded once. Large ones are computed when they are saved.

    **Left alone, with the reason:** a norm that anything but a layer reads too, as in post-norm networks, whose
    residual addition reads it; one that is a graph output; weights that another node reads too, such as an output
    layer tied to the embedding, whose table would have to be kept twice; weights that would overflow or lose bits in
    float16; more than one normalised axis.

    **Options:** `untie` (boolean, default False): give a layer whose weights are shared a copy of its own. A tied
    output layer makes the model larger by the size of the embedding. `new_bias` (boolean, default True): let β become
    an addition of its own behind a MatMul that has no bias; False leaves such a norm alone. `only_biased` (boolean,
    default False): leave norms without β alone, without a word: what they would gain is for the passes that ask for
    it, and every weight that reads them would be written anew.

    **When not to use it:** for speed alone: the kernels multiply by the gain whatever it is. ONNX Runtime 1.31 takes
    the same time for an RMSNormalization with ones, and 0.91 to 0.95 of the time for a LayerNormalization that lost
    its β (width 384, 1 × 16 to 8 × 64 rows, one thread); a new addition behind a MatMul costs more than that.
    """

    name: ClassVar[str] = "fold-norm-affine"
    family: ClassVar[str] = "fold"
    paper: ClassVar[str] = "Pre-RMSNorm and Pre-CRMSNorm Transformers: Equivalent and Efficient Pre-LN Transformers"
    anchors: ClassVar[tuple[str, ...]] = (*_TOKEN, "com.microsoft::SimplifiedLayerNormalization", *_MAP)

    def __init__(self, untie: bool = False, new_bias: bool = True, only_biased: bool = False) -> None:
        super().__init__()
        self.untie = untie
        self.new_bias = new_bias
        self.only_biased = only_biased

    def prepare(self, model: ir.Model, edit: Editor) -> None:
        """No ones yet."""
        super().prepare(model, edit)
        self._shared: dict[tuple[Any, ...], ir.Value] = {}

    def rewrite(self, node: ir.Node, edit: Editor) -> bool:
        """See the class."""
        gain = self._gain(node, edit)
        if gain is None:
            return False
        if isinstance(gain, str):
            return self.left(node, gain)
        affine, y = gain.affine, node.outputs[0]
        if not affine.shifts and (self.only_biased or (affine.scale == 1).all()):
            return False
        for user, _ in y.uses():
            if is_op(user, "Add", "Sum") and not any(is_constant(value) for value in user.inputs):
                return self.left(node, f"post-norm: the addition {user.name!r} reads it and needs the gain")
        changes = Neighbours(self, sharers=1 << 30 if self.untie else 0).behind(y, affine, node.graph)
        if isinstance(changes, str):
            return self.left(node, changes)
        if not self.new_bias and added_columns(changes):
            return self.left(node, "its bias would become additions behind layers without bias, and new_bias is off")
        for change in changes:
            change.apply(edit)
        edit.at(node)
        edit.set_input(node, 1, self._constant(edit, node, 1, gain))
        if len(node.inputs) > 2:
            if is_op(node, *_MAP):
                edit.set_input(node, 2, self._constant(edit, node, 0, gain))
            else:
                edit.set_input(node, 2, None)
                node.resize_inputs(2)
        return self.applied(node, f"folded into {', '.join(change.layer.name for change in changes)}")

    def _gain(self, node: ir.Node, edit: Editor) -> _Gain | str | None:
        """The map behind the normalization, None where the node isn't valid, or why there is none."""
        if any(a.is_ref() for a in node.attributes.values()):
            return "it takes an attribute from the function that it is in"
        x, given = node.inputs[0], [value for value in node.inputs[1:3] if value is not None]
        arrays = [folded(value) for value in given]
        if x is None or not given:
            return None
        if any(array is None for array in arrays):
            return "its gain or bias isn't constant"
        gain, bias = np.asarray(arrays[0]), np.asarray(arrays[1] if len(arrays) > 1 else 0)
        dtype = ir.DataType.from_numpy(gain.dtype)
        if dtype not in FLOATS:
            return None
        if is_op(node, "GroupNormalization") and edit.opset < 21:
            return "its gain is one number a group before opset 21: run convert-opset first"
        axis = 1 if is_op(node, *_MAP) else -1
        if axis == -1:
            written = attribute_int(node, "axis", -1)
            if written is None or not same_axis(written, -1, self.rank(x)):
                return "it normalises more than one axis, or its rank isn't known"
        width = max(gain.size, bias.size)
        if any(a.ndim and a.shape[-1] != a.size for a in (gain, bias)) or {gain.size, bias.size} - {1, width}:
            return "its gain isn't one number a channel"
        scale, shift = (np.asarray(a, dtype=np.float64).reshape(-1) for a in (gain, bias))
        return _Gain(Affine(scale, shift, axis), gain.shape, gain.dtype)

    def _constant(self, edit: Editor, node: ir.Node, number: int, like: _Gain) -> ir.Value:
        """An array of `number`, one for all norms of a graph that need it."""
        key = (node.graph, number, like.shape, like.dtype)
        if key not in self._shared:
            name = "ones" if number else "zeros"
            value = edit.constant(np.full(like.shape, number, dtype=like.dtype), name)
            if not value.is_initializer():
                return value  # in a function it is a node, which comes before this norm but not before all
            self._shared[key] = value
        return self._shared[key]
