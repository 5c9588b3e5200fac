"""raise-layer-norm: every spelling of a LayerNorm becomes `LayerNormalization`."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from graphopt.graph.edits import Editor
from graphopt.passes.raise_.normalization import Matcher
from graphopt.passes.raise_.root_mean_square import NotRaised
from graphopt.passes.raise_.shape_rules import ShapeRulePass

OPSET = 17


class RaiseLayerNorm(ShapeRulePass):
    """Write a LayerNorm that an exporter took apart as one `LayerNormalization`.

        d = x − mean(x),  y = d / √(mean(d²) + ε) · gain + bias        (means over the last k axes)

    Paper: Layer Normalization (Ba, Kiros, Hinton, 2016).

    Taken as the same:

    1. The square: `Pow(d, 2)`, `Mul(d, d)`, either over `Abs(d)`, or `ReduceSumSquare`.
    2. The mean: `ReduceMean`, or a sum divided by the number of elements; its axes kept, or put back by Unsqueeze or
       Reshape.
    3. x − mean(x) written once or twice.
    4. 1/√v: `Sqrt` or `Pow 0.5` with `Div`, `Reciprocal`, `Div(1, ·)` or `Pow −1`; `Pow −0.5`; the root of `1/v`.
    5. Gain and bias: constants over the normalised axes, whatever axes of length 1 are in front, or absent (the
       gain is then ones); the gain after the division or multiplied into 1/√v (`s`), also as x·s + (bias − mean·s).
    6. x cast from half precision to float32 and the quotient cast back: `stash_type` = 1 says the same.
    7. One axis of at least `channels` elements that isn't the last (the channels-first LayerNorm of ConvNeXt):
       Transpose, `LayerNormalization`, Transpose.

    **Needs:** opset 17. That the axes are the last: negative, or the rank known. The length of the normalised
    axes. **Guarantees:** the same function. A mean that something else reads too stays beside the
    operator.

    **Options:** `channels` (elements, default 96): the least number for rule 7. ONNX Runtime 1.31 (CPU) takes 0.71 of
    the time at [1, 96, 56, 56], 0.49 at [1, 384, 14, 14] and 0.36 at [1, 768, 7, 7], but 1.7 at [1, 8, 56, 56], about
    1 at 16 to 64 channels, and 4 at [1, 3, 224, 224].

    **Left alone, with the reason:** ε outside of the root; Bessel's correction (`torch.std`); a variance taken as
    E[x²] − E[x]², which cancels; other axes that aren't the last; sites in float64, because `LayerNormalization`
    computes in float32; a variance that something else reads too.

    In half precision the operator computes in float32: where the spelled-out d² overflows, it doesn't. Why not
    onnxscript's rule: see `raise-rms-norm`.

    **When not to use it:** for a runtime without `LayerNormalization` (opset below 17).
    """

    name: ClassVar[str] = "raise-layer-norm"
    family: ClassVar[str] = "raise"
    paper: ClassVar[str] = "Layer Normalization"
    anchors: ClassVar[tuple[str, ...]] = ("ReduceMean", "ReduceSum", "ReduceSumSquare")

    def __init__(self, channels: int = 96) -> None:
        super().__init__()
        self.channels = channels

    def rewrite(self, node: ir.Node, edit: Editor) -> bool:
        """See the class."""
        try:
            found = _Matcher(node, True, self).match()
        except NotRaised as reason:
            return self.left(node, str(reason))
        if found is None:
            return False
        if edit.opset < OPSET:
            return self.left(node, f"needs opset {OPSET}, the model has {edit.opset}: run convert-opset first")
        rank = 0 if found.axes[-1] == -1 else self.rank(found.x) or 0
        return self.applied(found.root, found.write(edit, "LayerNormalization", rank))


class _Matcher(Matcher):
    """Takes one axis that isn't the last as well, where it is long enough."""

    shapes: RaiseLayerNorm

    def check_axes(self, axes: tuple[int, ...], x: ir.Value) -> None:
        """See `Matcher`."""
        shape = self.shapes.shape(x)
        if len(axes) != 1 or axes == (-1,) or shape is None:
            return super().check_axes(axes, x)
        length = shape[axes[0]]
        if length is None or length < self.shapes.channels:
            raise NotRaised(
                f"the mean is over axes {list(axes)}, not over the last ones, and over "
                f"{'an unknown number of' if length is None else f'only {length}'} elements: "
                "two transposes would cost more than they save (option channels)"
            )
        return None
