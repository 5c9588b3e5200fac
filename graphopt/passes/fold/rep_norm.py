"""fold-rep-norm: normalizations that became affine maps when training ended."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analysis.algebra import attribute_int, is_op, producer, same
from graphopt.analysis.dims import Dim
from graphopt.analysis.moments import Mean, read_mean, squared
from graphopt.graph.constants import constant_array, scalar
from graphopt.graph.edits import Editor
from graphopt.passes.fold.batch_norm import normalization
from graphopt.passes.fold.channel_affine import Affine, rank_of, read, rounded_to, same_axis
from graphopt.passes.fold.layers import FLOATS, sole_reader_of_numbers
from graphopt.passes.fold.neighbours import AffinePass, Neighbours

_NORMS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
_VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity")
_REPEATS = ("Expand", "Tile")
_DEPTH = 6
"""Operators looked through, one after the other."""


@dataclasses.dataclass(frozen=True)
class _Step:
    """A value that another is a map of.

    Attributes:
        value: The value.
        map: What the other makes of it.
        norm: The batch normalization that is part of the map.
        shared: Why what lies between can't go: something else reads it.
    """

    value: ir.Value
    map: Affine
    norm: ir.Node | None
    shared: str | None


class FoldRepNorm(AffinePass):
    """Reduce re-parameterized batch norms and power norms to what they are at inference, and fold that.

        RepBN(x) = BN(x) + α·x = s·x + t        s = γ / √(σ² + ε) + α, t = β − μ·γ / √(σ² + ε), one pair a channel
        PowerNorm(x) = r(x) / √(φ + ε) · w + b   r(x) = x / √(mean(x²) + ε) over groups of the channels of one token

    Papers: SLAB: Efficient Transformers with Simplified Linear Attention and Progressive Re-parameterized Batch
    Normalization (2024); PowerNorm: Rethinking Batch Normalization in Transformers (2020), of the norm-folding family.

    1. The sum or difference of a batch normalization and a multiple of its input, each with constant scales and shifts
       behind it: one `BatchNormalization` of mean 0, variance 1 and ε = 0. `fold-batch-norm` puts that into the linear
       layers behind it.
    2. The root mean square of a PowerNorm of one group: the mean square, which is repeated for each channel by Expand
       or Tile, is broadcast instead. `raise-rms-norm` then finds an RMSNorm.
    3. A constant scale behind a `RMSNormalization` or `LayerNormalization`, such as w / √(φ + ε): into its gain. A
       shift behind a `LayerNormalization`: into its bias. Between the two may stand what only moves numbers.

    The bias b of a PowerNorm, and all of a PowerNorm without r, goes into the next layer by `fold-affine`.

    **Needs:** constant statistics, scales and shifts. Rule 2: the number of channels, and proof that the other sizes
    are the same. **Guarantees:** the same function: constants are computed in float64 and rounded once.

    **Left alone, with the reason:** a value in between that something else reads; a mean square over groups smaller
    than the channels, which is no RMSNorm; numbers that the type of the constants can't hold. Batch normalization in
    training form is no site.

    **When not to use it:** before training goes on.
    """

    name: ClassVar[str] = "fold-rep-norm"
    family: ClassVar[str] = "fold"
    paper: ClassVar[str] = (
        "SLAB: Efficient Transformers with Simplified Linear Attention and Progressive "
        "Re-parameterized Batch Normalization"
    )
    anchors: ClassVar[tuple[str, ...]] = ("Add", "Sub", "Mul", "Div")

    def rewrite(self, node: ir.Node, edit: Editor) -> bool:
        """See the class."""
        if (found := read(node, self)) is not None:
            return self._into_norm(node, *found, edit)
        if is_op(node, "Add", "Sub"):
            return self._sum_of_maps(node, edit)
        return is_op(node, "Div") and self._one_group(node, edit)

    # ---- BN(x) + α·x

    def _sum_of_maps(self, node: ir.Node, edit: Editor) -> bool:
        """Rule 1."""
        first, second = node.inputs
        if first is None or second is None or first is second or edit.opset < 9:
            return False
        others = {step.value: step for step in self._steps(second, edit)}
        pair = next(((step, others[step.value]) for step in self._steps(first, edit) if step.value in others), None)
        norm = None if pair is None else pair[0].norm or pair[1].norm
        if pair is None or norm is None:
            return False
        one, other = pair
        if (why := one.shared or other.shared) is not None:
            return self.left(node, why)
        gain, mean = (constant_array(norm.inputs[index]) for index in (1, 3))
        assert gain is not None
        assert mean is not None
        x, size, sign = one.value, gain.size, -1.0 if is_op(node, "Sub") else 1.0
        rank = rank_of(x, self)
        if not all(part.map.on(1, rank) and part.map.size in (1, size) for part in pair):
            return self.left(node, "the scales of its two parts aren't one number a channel")
        total = one.map.plus(Affine(sign * other.map.scale, sign * other.map.shift))
        dtype = ir.DataType.from_numpy(gain.dtype)
        scale, shift = rounded_to(total.scale, dtype), rounded_to(total.shift, dtype)
        if scale is None or shift is None:
            return self.left(node, f"its scales would leave {dtype.name.lower()}")
        self.applied(node, f"one batch normalization with {norm.name!r}")
        arrays = {"scale": scale, "shift": shift, "mean": np.zeros(1, mean.dtype), "variance": np.ones(1, mean.dtype)}
        inputs = [x, *(edit.constant(np.broadcast_to(array, size), name) for name, array in arrays.items())]
        new = edit.op("BatchNormalization", inputs, {"epsilon": 0.0}, like=node.outputs[0])
        edit.replace(node.outputs[0], new)
        return True

    def _steps(self, value: ir.Value, edit: Editor) -> list[_Step]:
        """`value`, and the values that it is a map of, nearest first."""
        steps = [_Step(value, Affine(np.ones(1), np.zeros(1)), None, None)]
        while len(steps) <= _DEPTH:
            last = steps[-1]
            node = last.value.producer()
            norm = node if node is not None and is_op(node, "BatchNormalization") else None
            if norm is not None:
                x, inner = norm.inputs[0], normalization(norm, edit.opset)
            else:
                x, inner = (node is not None and read(node, self)) or (None, "")
            if x is None or isinstance(inner, str):
                break
            if inner.size > 1 < last.map.size and not (
                inner.size == last.map.size and same_axis(inner.axis, last.map.axis, rank_of(x, self))
            ):
                break
            shared = last.shared or sole_reader_of_numbers(last.value)
            steps.append(_Step(x, inner.then(last.map), norm or last.norm, shared))
        return steps

    # ---- the root mean square of one group

    def _one_group(self, node: ir.Node, edit: Editor) -> bool:
        """Rule 2."""
        x, sqrt = node.inputs[0], producer(node.inputs[1], "Sqrt")
        total = None if sqrt is None else producer(sqrt.inputs[0], "Add")
        if x is None or total is None:
            return False
        index = 1 if scalar(total.inputs[0]) is not None else 0
        walk: list[ir.Node] = []
        repeated = value = total.inputs[index]
        while (view := producer(value, *_VIEWS, *_REPEATS)) is not None and len(walk) < _DEPTH:
            walk.append(view)
            value = view.inputs[0]
        made = producer(value, "ReduceMean") if scalar(total.inputs[1 - index]) is not None and walk else None
        mean = None if made is None else read_mean(made)
        square = None if mean is None else squared(mean.operand)
        if mean is None or square is None or repeated is None:
            return False
        v = square[0]
        for _ in range(_DEPTH):
            view = None if same(v, x) else producer(v, *_VIEWS)
            if view is None or view.inputs[0] is None:
                break
            v = view.inputs[0]
        if not same(v, x):
            return False
        if (why := self._no_mean_of_a_token(x, square[0], mean, walk, repeated)) is not None:
            return self.left(node, why)
        self.applied(node, "the mean square of a token is broadcast, no longer repeated")
        inputs, attributes = [edit.op("Mul", [x, x], like=x)], {"keepdims": 1, "axes": [-1]}
        if edit.opset >= 18:
            inputs.append(edit.constant(np.array(attributes.pop("axes"), dtype=np.int64), "axes"))
        total_of_token = edit.op("Add", [edit.op("ReduceMean", inputs, attributes), total.inputs[1 - index]])
        root = edit.op("Sqrt", [total_of_token])
        edit.replace(node.outputs[0], edit.op("Div", [x, root], like=node.outputs[0]))
        return True

    def _no_mean_of_a_token(
        self, x: ir.Value, v: ir.Value, mean: Mean, walk: list[ir.Node], repeated: ir.Value
    ) -> str | None:
        """Why `repeated` isn't, at each channel of x, the mean square of all channels of that token."""
        shape, inner, start, end = (self.dims(value) for value in (x, v, mean.value, repeated))
        if shape is None or inner is None or start is None or end is None or not shape or mean.axes is None:
            return "its shapes aren't known"
        if [axis % len(inner) for axis in mean.axes] != [len(inner) - 1] or shape[-1].value is None:
            return "its mean isn't over the last axis, or the size of that isn't known"
        if inner[-1] != shape[-1]:
            return "its mean is over groups of the channels, so it is no RMSNorm"
        times = Dim.of(1)
        for node in reversed(walk):
            assert node.inputs[0] is not None
            before, after = self.dims(node.inputs[0]), self.dims(node.outputs[0])
            if before is None or after is None:
                return "its shapes aren't known"
            if not is_op(node, *_REPEATS) or before == after:
                continue
            # Row by row, a number is followed by its copies only where nothing but ones comes after the first copied.
            first = next((i for i, pair in enumerate(zip(before, after, strict=False)) if pair[0] != pair[1]), 0)
            if len(before) != len(after) or any(size != 1 for size in before[first:]) or times != 1:
                return "its mean isn't repeated number by number"
            times = math.prod(after[first:], start=Dim.of(1))
        if (end == shape and times == shape[-1]) or (end == (*shape[:-1], 1) and times == 1):
            return None
        return "its mean isn't known to be repeated for each channel"

    # ---- into the norm before

    def _into_norm(self, node: ir.Node, x: ir.Value, affine: Affine, edit: Editor) -> bool:
        """Rule 3."""
        norm, here, value = x.producer(), affine, x
        neighbours = Neighbours(self)
        for _ in range(_DEPTH):
            if norm is None or norm.graph is not node.graph or sole_reader_of_numbers(value) is not None:
                return False
            if norm.op_type in _NORMS:
                break
            moved = neighbours.back(norm, value, here)
            if moved is None or len(moved) != 1:
                return False
            ((value, here),) = moved
            norm = value.producer()
        if norm is None or norm.op_type not in _NORMS or any(a.is_ref() for a in norm.attributes.values()):
            return False
        source, arrays = norm.inputs[0], [constant_array(operand) for operand in norm.inputs[1:3]]
        gain, bias = arrays[0], arrays[1] if len(arrays) > 1 else None
        shifts = is_op(norm, "LayerNormalization")
        if here.shifts and not shifts:
            return False
        if gain is None or (bias is None and len(arrays) > 1 and norm.inputs[2] is not None):
            return self.left(node, f"the gain or bias of {norm.op_type} {norm.name!r} isn't constant")
        axis, dtype = attribute_int(norm, "axis", -1), ir.DataType.from_numpy(gain.dtype)
        rank = None if source is None else self.rank(source)
        width = gain.shape[-1] if gain.ndim else 1
        if dtype not in FLOATS or axis is None or not same_axis(axis, -1, rank) or gain.size != width:
            return False
        if not here.on(-1, rank) or here.size not in (1, width) or not np.isfinite(here.scale).all():
            return False
        old = np.zeros(1) if bias is None else bias.astype(np.float64)
        numbers: dict[int, Any] = {1: gain.astype(np.float64) * here.scale}
        if shifts and (bias is not None or here.shifts):
            numbers[2] = np.broadcast_to(old * here.scale + here.shift, gain.shape)
        rounded = {index: rounded_to(array, dtype) for index, array in numbers.items()}
        if any(array is None for array in rounded.values()):
            return self.left(node, f"the gain or bias of {norm.op_type} {norm.name!r} would leave {dtype.name.lower()}")
        edit.at(norm)
        if len(norm.inputs) < 3 and 2 in rounded:
            norm.resize_inputs(3)
        for index, array in rounded.items():
            assert array is not None
            if not (index == 1 and (here.scale == 1).all()):
                edit.set_input(
                    norm, index, edit.constant(np.ascontiguousarray(array), "gain" if index == 1 else "bias")
                )
        edit.at(node)
        edit.replace(node.outputs[0], x)
        return self.applied(node, f"folded into the gain or bias of {norm.op_type} {norm.name!r}")
