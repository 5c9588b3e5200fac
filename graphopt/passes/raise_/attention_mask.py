"""The mask of one `Attention`, of whatever was added to the scores and chosen instead of them."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from graphopt.analysis.attention_form import AttentionForm, Bias, Keep, NotAttention
from graphopt.analysis.layout import Axes, settled, total
from graphopt.analysis.shapes import ShapeFacts
from graphopt.graph.constants import constant_tensor
from graphopt.graph.edits import Editor
from graphopt.passes.raise_.rearrange import Rearrangement

HIDDEN = -3e38
"""Written for a finite number that hides a key: ONNX Runtime 1.31 takes the lowest float32 for −∞."""
_NEAR_LOWEST = 0.999
_DEPTH = 60


def mask_of(
    form: AttentionForm, facts: ShapeFacts, edit: Editor, views: Rearrangement, dtype: ir.DataType
) -> ir.Value | None:
    """The mask, boolean or to be added, of a shape that broadcasts to [batch, head, query, key] and has the last two
    axes in full (ONNX Runtime broadcasts the others only); None where there is none.

    Raises:
        NotAttention: Its axes or its type don't fit.
    """
    return _Mask(form, facts, edit, views, dtype).write()


class _Mask:
    def __init__(
        self, form: AttentionForm, facts: ShapeFacts, edit: Editor, views: Rearrangement, dtype: ir.DataType
    ) -> None:
        self.form, self.facts, self.edit, self.views, self.dtype = form, facts, edit, views, dtype
        q, k = form.q.roles, form.k.roles
        self.roles: Axes = settled((q[0], q[1], q[2], k[2]))

    def write(self) -> ir.Value | None:
        terms, rekept = self.form.scores.terms, self.form.path.rekept
        keeps = [term for term in terms if isinstance(term, Keep)]
        known = {(keep.condition, keep.kept) for keep in keeps}
        if any(again not in known for again in rekept):
            raise NotAttention("weights are set to 0 where the scores weren't hidden")
        for keep in keeps:
            if math.isfinite(keep.fill) and self.dtype != ir.DataType.FLOAT:
                raise NotAttention(f"scores are hidden by a finite number in {self.dtype.name}")
        # A key that is surely hidden has no weight, also in rows where all are hidden.
        sure = [not math.isfinite(keep.fill) or (keep.condition, keep.kept) in rekept for keep in keeps]
        if not terms:
            return None
        if len(keeps) == len(terms) and all(sure):
            return self._full(self._all([self._condition(keep) for keep in keeps]))
        mask: ir.Value | None = None
        for term in terms:
            if isinstance(term, Keep):
                hidden = self._number(-math.inf if sure[keeps.index(term)] else HIDDEN)
                zero = self._number(0.0)
                condition = self._condition(term)
                if term.added and mask is not None:
                    mask = self.edit.op("Add", [mask, self.edit.op("Where", [condition, zero, hidden])])
                else:
                    mask = self.edit.op("Where", [condition, zero if mask is None else mask, hidden])
            elif isinstance(term, Bias):
                bias = self._bias(term)
                mask = bias if mask is None else self.edit.op("Add", [mask, bias])
            elif mask is not None:
                mask = self.edit.op("Max", [mask, self._number(HIDDEN)])
        return None if mask is None else self._full(mask)

    def _condition(self, keep: Keep) -> ir.Value:
        condition = self._aligned(keep.condition, keep.axes)
        return condition if keep.kept else self.edit.op("Not", [condition], like=condition)

    def _all(self, conditions: list[ir.Value]) -> ir.Value:
        result = conditions[0]
        for condition in conditions[1:]:
            result = self.edit.op("And", [result, condition])
        return result

    def _bias(self, bias: Bias) -> ir.Value:
        value = self._aligned(bias.value, bias.axes)
        found = self.facts.dtype(bias.value) or bias.value.dtype
        if found != self.dtype:
            raise NotAttention(f"{bias.value.name!r} is added in another type than that of the queries")
        if may_be_lowest(bias.value):
            if self.dtype != ir.DataType.FLOAT:
                raise NotAttention(f"scores are hidden by a finite number in {self.dtype.name}")
            lowest = self.edit.constant(np.array(np.finfo(np.float32).min, dtype=np.float32), "lowest")
            equal = self.edit.op("Equal", [value, lowest])
            value = self.edit.op("Where", [equal, self._number(HIDDEN), value], like=value)
        if bias.factor == -1.0:
            return self.edit.op("Neg", [value], like=value)
        if bias.factor != 1.0:
            return self.edit.op("Mul", [value, self._number(bias.factor)], like=value)
        return value

    def _number(self, number: float) -> ir.Value:
        return self.edit.constant(np.array(number, dtype=self.dtype.numpy()), "number")

    def _aligned(self, value: ir.Value, axes: Axes) -> ir.Value:
        """`value`, which stands beside scores with `axes`, so that it stands beside [batch, head, query, key]."""
        shape = self.facts.shape(value)
        axes = settled(axes)
        if axes == self.roles:
            if shape is None or len(shape) > 4:
                raise NotAttention(f"the rank of the mask {value.name!r} isn't known")
            return value
        if shape is None or len(shape) > len(axes):
            raise NotAttention(f"the rank of the mask {value.name!r} isn't known")
        own: Axes = tuple(
            () if size == 1 else axis for size, axis in zip(shape, axes[len(axes) - len(shape) :], strict=True)
        )
        there = {atom for axis in own for atom in axis}
        wanted: list[tuple[object, ...]] = []
        missing: list[object] = []
        for role in self.roles:
            inside = tuple(atom for atom in role if atom in there)
            if inside and inside != role:
                missing.extend(atom for atom in role if atom not in there)
                inside = role
            wanted.append(inside)
        if missing:
            value, own = self._repeated(value, own, axes, missing)
        return self.views.to(value, own, tuple(wanted))  # type: ignore[arg-type]

    def _repeated(self, value: ir.Value, own: Axes, axes: Axes, missing: list[object]) -> tuple[ir.Value, Axes]:
        """`value` repeated along the axes of the scores that consist of atoms in `missing`."""
        full = ((),) * (len(axes) - len(own)) + own
        if any(atom in missing for axis, mine in zip(axes, full, strict=True) if mine for atom in axis):
            raise NotAttention(f"the mask {value.name!r} covers a part of an axis")
        entries: list[int | ir.Value] = []
        result = []
        for axis, mine in zip(axes, full, strict=True):
            repeated = bool(axis) and all(atom in missing for atom in axis)
            entries.append(self.views.length(axis) if repeated else 1)
            result.append(axis if repeated else mine)
        return self.edit.op("Expand", [value, self.views.sizes(entries)]), tuple(result)

    def _full(self, mask: ir.Value) -> ir.Value:
        """`mask` with the last two axes in full."""
        shape = self.facts.shape(mask)
        if shape is None:
            raise NotAttention(f"the shape of the mask {mask.name!r} isn't known")
        entries: list[int | ir.Value] = []
        for place, role in ((-2, self.roles[2]), (-1, self.roles[3])):
            # The length of the query axis has to be certain: the operator doesn't broadcast it.
            short = len(shape) < -place or shape[place] == 1 or (place == -2 and shape[place] != total(role))
            entries.append(self.views.length(role) if short and total(role) != 1 else 1)
        if entries == [1, 1]:
            return mask
        return self.edit.op("Expand", [mask, self.views.sizes(entries)])


def may_be_lowest(value: ir.Value) -> bool:
    """Whether the lowest float32 may be among the numbers of `value`, as far as the constants behind it tell."""
    stack = [value]
    seen: set[ir.Value] = set()
    while stack and len(seen) < _DEPTH:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        tensor = constant_tensor(current)
        if tensor is not None:
            if tensor.dtype == ir.DataType.FLOAT and tensor.size <= 1 << 22:
                array = tensor.numpy()
                finite = array[np.isfinite(array)]
                if finite.size and finite.min() <= np.finfo(np.float32).min * _NEAR_LOWEST:
                    return True
            continue
        node = current.producer()
        if node is None:
            if current.dtype is None or current.dtype.is_floating_point():
                return True
            continue
        if node.op_type in ("MatMul", "Gemm", "Gather", "Conv"):
            continue
        stack.extend(v for v in node.inputs if v is not None)
    return False
