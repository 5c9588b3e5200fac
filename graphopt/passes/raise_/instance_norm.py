"""raise-instance-norm: every spelling of an instance normalization becomes `InstanceNormalization`."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analysis.algebra import is_op, other_operand, producer, users
from graphopt.analysis.moments import folded
from graphopt.graph.edits import Editor
from graphopt.passes.raise_.normalization import Affine, Matcher
from graphopt.passes.raise_.root_mean_square import NotRaised
from graphopt.passes.raise_.shape_rules import ShapeRulePass

_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


class RaiseInstanceNorm(ShapeRulePass):
    """Write an instance normalization that an exporter took apart as one `InstanceNormalization`.

        d = x − mean(x),  y = d / √(mean(d²) + ε) · gain[c] + bias[c]        (means over all axes behind the channels)

    Paper: Instance Normalization: The Missing Ingredient for Fast Stylization (Ulyanov, Vedaldi, Lempitsky, 2016).

    x is [N, C, ...] of rank 3 or more. Taken as the same: the spellings of the square, the mean, the root and the
    affine part that `raise-layer-norm` lists; a gain of one number a channel ([C, 1, 1], or a scalar), or none. So is
    the core of a group normalization, [N, G, ...] between two reshapes, whose gain stands behind them.

    What could be a `LayerNormalization` as well is one: the last axis alone, unless it has a gain for each channel or
    stands between two reshapes; anything whose gain runs along the normalised axes.

    Measured on ONNX Runtime 1.31 (CPU, 1 and 2 threads): 0.27 to 0.35 of the time of its parts at [1, 64, 64, 64]; a
    group normalization [1, 320, 32, 32] of 32 groups 0.71.

    **Needs:** the rank of x and the number of channels. **Guarantees:** the same function.

    **Left alone, with the reason:** what `raise-layer-norm` leaves; types other than float32 and float16, in which ONNX
    Runtime has no kernel.

    **When not to use it:** after `raise-layer-norm`, which would take the cores of group normalizations.
    """

    name: ClassVar[str] = "raise-instance-norm"
    family: ClassVar[str] = "raise"
    paper: ClassVar[str] = "Instance Normalization: The Missing Ingredient for Fast Stylization"
    anchors: ClassVar[tuple[str, ...]] = ("ReduceMean", "ReduceSum", "ReduceSumSquare")

    def rewrite(self, node: ir.Node, edit: Editor) -> bool:
        """See the class."""
        matcher = _Matcher(node, True, self)
        try:
            found = matcher.match()
        except _AnotherNorm:
            return False
        except NotRaised as reason:
            # Whatever was refused before the axes were known is a reason of raise-layer-norm's too.
            return matcher.fits and self.left(node, str(reason))
        if found is None:
            return False
        return self.applied(found.root, found.write(edit, "InstanceNormalization"))

    def between_reshapes(self, x: ir.Value, root: ir.Node) -> bool:
        """Whether x is a view of something whose shape the result gets back."""
        before, after = producer(x, "Reshape"), users(root.outputs[0])
        if before is None or before.inputs[0] is None or len(after) != 1 or not is_op(after[0], "Reshape"):
            return False
        first, last = self._facts.shape(before.inputs[0]), self._facts.shape(after[0].outputs[0])
        return first is not None and last is not None and list(first) == list(last)


class _AnotherNorm(Exception):
    """It is a normalization, but no instance normalization."""


class _Matcher(Matcher):
    """Means over all axes behind the channels; gain and bias along the channels."""

    shapes: RaiseInstanceNorm
    stashes = False
    of_gain = "the axis of the channels"
    fits = False

    def check_axes(self, axes: tuple[int, ...], x: ir.Value) -> None:
        """See `Matcher`."""
        rank = self.shapes.rank(x)
        if rank is None or rank < 3 or axes != tuple(range(2 - rank, 0)):
            raise _AnotherNorm
        self.fits = len(axes) > 1

    def affine_axes(self, axes: tuple[int, ...], x: ir.Value) -> tuple[int, ...]:
        """See `Matcher`."""
        return (axes[0] - 1,)

    def check_site(self, x: ir.Value, root: ir.Node, gain: Affine | None, dtype: ir.DataType) -> None:
        """See `Matcher`."""
        per_channel = gain is not None and gain.array.size > 1 and bool((gain.array != gain.array.flat[0]).any())
        rank = self.shapes.rank(x) or 0
        single = rank == 3
        if not per_channel:
            for user in users(root.outputs[0]):
                operand = other_operand(user, root.outputs[0]) if is_op(user, "Mul", "Add") else None
                affine = folded(operand)
                if affine is not None and affine.size > 1 and np.shape(affine)[-1] > 1:
                    raise _AnotherNorm
            if single and not self.shapes.between_reshapes(x, root):
                raise _AnotherNorm
        self.fits = True
        if dtype not in _TYPES:
            raise NotRaised(f"it computes in {dtype.name.lower()}, for which ONNX Runtime has no kernel")
