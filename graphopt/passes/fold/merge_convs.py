"""merge-convs: two convolutions in a row become one, and a zero Pad goes into the convolution behind it."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analysis.algebra import producer
from graphopt.analysis.windows import window_of
from graphopt.graph.constants import constant_array
from graphopt.graph.edits import Editor
from graphopt.passes.fold.convolutions import Convolution, ConvRulePass, overflow
from graphopt.passes.fold.kernels import Kernel, composed
from graphopt.passes.fold.layers import Numbers, sole_reader


class MergeConvs(ConvRulePass):
    """Merge two convolutions with nothing between them into one, and fold a zero Pad into a convolution's padding.

        h[i] = Σₐ V[a] · x[s₁·i + d₁·a − p₁] + c          the first: stride s₁, dilation d₁, padding p₁
        y[o] = Σ_b W[b] · h[s₂·o + d₂·b − p₂] + b         the second
             = Σ_{a,b} (W[b]·V[a]) · x[s₁·s₂·o + (s₁·d₂·b + d₁·a) − (p₁ + s₁·p₂)] + (b + Σ_b W[b]·c)

    Paper: Efficient Latency-Aware CNN Depth Compression via Two-Stage Dynamic Programming (2023), which merges
    convolutions once an activation is gone, and notes that the merged one is not equal at the border where the second
    pads its input: it reads zeros there, where the merged kernel reads what the first one makes of the border. So this
    pass asks when that is zero too.

    The rules, for any number of spatial axes, groups, strides and dilations (the merged dilation is the greatest common
    divisor of the two steps, the merged number of groups that of the two numbers):

    1. Conv, then Conv without padding: always equal.
    2. Conv without bias, then Conv with padding: equal where every position that the second pads would read nothing but
       zeros of the first, so that padding first or last is the same: d₁·(K₁ − 1) − p₁ < s₁ at the beginning and
       p₁ ≥ d₁·(K₁ − 1) at the end (or what the known size says), on each axis that is padded. A pointwise first
       convolution is one such, a first convolution with full padding another.
    3. Pad with zeros (mode `constant`, no negative pads, spatial axes only), then Conv: the pads are added to those of
       the Conv, whatever its weights.

    The pair is merged only where neither its multiplications nor its weights grow, since most pairs in real models are
    there to save both: a depthwise convolution and its pointwise one cost about as much as the pointwise one alone, and
    merged K² times that. A pair of wide pointwise convolutions, or a wide one before a narrow one, gets cheaper.

    **Needs:** constant weights and biases in float64, float32, float16 or bfloat16. **Guarantees:** the same function,
    at the borders too: the new weights are computed in float64 and rounded once. Large ones are computed when they are
    saved.

    **Options:** `max_growth` (ratio, default 1.0): how many times the multiplications and the weights of the pair
    the merged convolution may have. The number of positions of the value between counts where its size is known;
    elsewhere it is taken as the stride's multiple, as in a large image.

    **Left alone, with the reason:** a value between that something else reads or that is a graph output; a border that
    would differ; weights that three or more nodes share; padding `SAME_UPPER` or `SAME_LOWER` with a stride and an
    unknown size; a pair that would cost more; weights that would overflow, or lose bits in float16; a Pad of another
    mode or value or of computed pads.

    **When not to use it:** before training goes on.
    """

    name: ClassVar[str] = "merge-convs"
    family: ClassVar[str] = "fold"
    paper: ClassVar[str] = "Efficient Latency-Aware CNN Depth Compression via Two-Stage Dynamic Programming"
    anchors: ClassVar[tuple[str, ...]] = ("Conv",)

    def __init__(self, max_growth: float = 1.0) -> None:
        super().__init__()
        self.max_growth = max_growth

    def rewrite(self, node: ir.Node, edit: Editor) -> bool:
        """See the class."""
        x = node.inputs[0] if node.inputs else None
        before = producer(x, "Conv", "Pad")
        if x is None or before is None:
            return False
        if before.op_type == "Pad":
            pads = self._pads(before, node)
            if isinstance(pads, str):
                return self.left(node, f"Pad {before.name!r} before it stays: {pads}")
            half = len(pads) // 2
            node.attributes.pop("auto_pad", None)
            node.attributes["pads"] = ir.AttrInt64s("pads", pads)
            edit.set_input(node, 0, before.inputs[0])
            return self.applied(node, f"Pad {before.name!r} folded into its padding, now {pads[:half]}, {pads[half:]}")
        merged = self._merged(before, node)
        if isinstance(merged, str):
            return self.left(node, f"not merged with Conv {before.name!r} before it: {merged}")
        kernel, bias = merged
        with_bias = len(before.inputs) > 2 or len(node.inputs) > 2
        one = self.conv(before.inputs[0], kernel, bias if with_bias else None, node.outputs[0], edit)
        detail = f"merged with Conv {before.name!r} before it: {kernel.describe()}"
        edit.replace(node.outputs[0], one)
        return self.applied(node, detail)

    # ---- two convolutions

    def _merged(self, before: ir.Node, node: ir.Node) -> tuple[Kernel, Numbers] | str:
        """The kernel and the bias of the one convolution, or why there is none."""
        first, second = self.convolution(before), self.convolution(node)
        if isinstance(first, str):
            return first
        if isinstance(second, str):
            return second
        one, two = first.kernel, second.kernel
        if one.shape[0] != two.inputs or len(one.shape) != len(two.shape) or one.dtype != two.dtype:
            return "their weights don't fit each other"
        if before.graph is not node.graph:
            return "it is in an outer graph"
        if two.window.padded and first.bias.any():
            return "the second pads its input with zeros, which have no bias of the first"
        if two.window.padded and not one.window.zero_outside(two.window, self.sizes(before.inputs[0], len(one.shape))):
            return "the second pads its input with zeros, where the merged kernel would read the border of the image"
        if (why := sole_reader(before.outputs[0])) is not None:
            return why
        kernel = composed(one, two)
        bias = second.bias + second.layer.response(first.bias)
        why = self._dearer(first, second, kernel) or first.shared or second.shared
        why = why or kernel.problem() or overflow(bias, kernel.dtype)
        return (kernel, bias) if why is None else why

    def _dearer(self, first: Convolution, second: Convolution, kernel: Kernel) -> str | None:
        """Why one convolution with `kernel` costs more than the two."""
        one, two = first.kernel, second.kernel
        between, after = (self.sizes(c.layer.node.outputs[0], len(kernel.shape)) for c in (first, second))
        each = 1.0  # positions of the value between for each position of the output
        for inner, outer, stride in zip(between, after, two.window.strides, strict=True):
            each *= inner / outer if inner and outer else stride
        operations = one.size * each + two.size
        if kernel.size > self.max_growth * operations:
            return f"it would cost {kernel.size / operations:.1f} times the operations"
        if kernel.size > self.max_growth * (one.size + two.size):
            return f"it would take {kernel.size / (one.size + two.size):.1f} times the weights"
        return None

    # ---- a Pad

    def _pads(self, pad: ir.Node, node: ir.Node) -> list[int] | str:
        """The padding of `node` with that of the Pad before it, or why it can't take it."""
        attributes = (*pad.attributes.values(), *node.attributes.values())
        if any(a.is_ref() for a in attributes):
            return "an attribute comes from the function that it is in"
        mode = pad.attributes.get("mode")
        if mode is not None and mode.as_string() != "constant":
            return f"it pads by {mode.as_string()}, not with zeros"
        x = pad.inputs[0]
        rank = self.rank(x) if x is not None else None
        if rank is None and (weight := node.inputs[1]) is not None:
            rank = self.rank(weight)
        given = _given_pads(pad, rank)
        if isinstance(given, str):
            return given
        if rank is None or len(given) != 2 * rank:
            return "the rank isn't known, or its pads don't fit it"
        if min(given) < 0:
            return "its pads are negative, which is cropping"
        half = len(given) // 2
        if any((*given[:2], *given[half : half + 2])):
            return "it pads the batch or the channels"
        weight = node.inputs[1]
        shape = None if weight is None else self.shape(weight)
        kernel = (shape or (None,) * rank)[2:]
        padded = pad.outputs[0]
        if any(k is None for k in kernel):
            if "auto_pad" in node.attributes:
                return f"the size of the kernel of {node.name!r} isn't known"
            kernel = tuple(node.attributes["kernel_shape"].as_ints()) if "kernel_shape" in node.attributes else ()
            kernel = kernel or (1,) * (rank - 2)
        window = window_of(node, [k or 1 for k in kernel], lambda: self.sizes(padded, rank))
        if isinstance(window, str):
            return window
        own = (*window.begin, *window.end)
        return [a + b for a, b in zip(own, (*given[2:half], *given[half + 2 :]), strict=True)]


def _given_pads(pad: ir.Node, rank: int | None) -> list[int] | str:
    """The pads of a Pad node for all axes, begins before ends, where it pads with zeros."""
    attribute = pad.attributes.get("pads")
    if attribute is not None:  # before opset 11
        value = pad.attributes.get("value")
        if value is not None and value.as_float() != 0.0:
            return "it pads with a number other than 0"
        return list(attribute.as_ints())
    array = constant_array(pad.inputs[1]) if len(pad.inputs) > 1 else None
    if array is None:
        return "its pads aren't constant"
    if len(pad.inputs) > 2 and pad.inputs[2] is not None:
        number = constant_array(pad.inputs[2], 1)
        if number is None or float(np.asarray(number, dtype=np.float64).reshape(())) != 0.0:
            return "it pads with a number other than 0"
    pads = [int(n) for n in array.reshape(-1)]
    if len(pad.inputs) > 3 and pad.inputs[3] is not None:
        axes = constant_array(pad.inputs[3])
        if axes is None or rank is None:
            return "its axes aren't constant" if axes is None else "the rank isn't known"
        if len(pads) != 2 * axes.size:
            return "its pads don't fit its axes"
        full = [0] * (2 * rank)
        for position, axis in enumerate(int(n) % rank for n in axes.reshape(-1)):
            full[axis], full[axis + rank] = pads[position], pads[position + axes.size]
        return full
    return pads
