"""attention-masks: `is_causal` instead of a causal mask, no mask where nothing is masked, one mask for all layers."""

from __future__ import annotations

import math
from typing import ClassVar

import ml_dtypes
import numpy as np
import onnx_ir as ir

from graphopt.analysis.algebra import attribute_int
from graphopt.analysis.dims import ZERO, Dim
from graphopt.analysis.masks import MaskForm, Masks, NoForm
from graphopt.analysis.shapes import Shape
from graphopt.graph.edits import Editor
from graphopt.passes.raise_.shape_rules import ShapeRulePass


class AttentionMasks(ShapeRulePass):
    """Read what the mask of each `Attention` computes (`graphopt.analysis.masks`) and write it in the simplest way.

    With S query rows, P past positions and T = P + S' keys (S' of this call), a mask is evaluated at symbolic indices
    to

        allowed(b, h, i, j) = j ≤ i + offset  and  i + offset - j < window  and  P[b, j + shift] ≠ 0  and  other
        value(b, h, i, j)   = bias(b, h, i, j) where allowed, else the masked value

    whatever operators it is made of. Then:

    1. **Nothing masked.** allowed is always true and bias 0: the mask goes.
    2. **Causal and nothing else.** allowed is j ≤ i + offset with offset = P, and bias 0: `is_causal` = 1 and no mask.
       That is how the operator aligns it: query i sees key j where j ≤ i + P, also where S and S' differ (from the top
       left without a past). No row is empty, as i + P ≥ 0, so that the masked value doesn't matter as long as it is
       -∞ or close to the lowest number of its type, next to which any score vanishes.
    3. **The same mask twice.** Masks of equal numbers and shapes are read from the first one, also where each layer
       computes its own in another way.

    Rows that see no key differ by spelling, which is why no additive mask becomes a boolean one or the other way round:
    a boolean mask and -∞ give rows of 0, by the standard, its reference and ONNX Runtime 1.31 (CPU, float32 and
    float16); the lowest finite number gives the mean of the values by the standard and its reference, but 0 in ONNX
    Runtime; -10000 gives what no mask at all gives.

    **Needs:** ai.onnx `Attention` (opset 23 or later), and the lengths of queries, keys and past as expressions.

    **Guarantees:** equal numbers. A mask is only dropped where all it does is proven from the graph: two sizes that
    merely have one name in the file don't count as equal.

    **Left alone, with the reason:** masks with padding, a window, a bias, or what isn't understood (at which value, and
    why); causal masks with another offset; causal masks of a low number such as -10000, which is no -∞ for scores that
    far apart; an `Attention` whose scores are an output (`qk_matmul_output`), as they hold the masked values; one with
    `nonpad_kv_seqlen`.

    **When not to use it:** there is no reason not to. In ONNX Runtime (CPU) `is_causal` takes as long as a mask of
    [1, 1, S, T], boolean or not, and what is saved is making the mask; no mask takes half the time of a causal one
    where S = T = 128 to 512, and the same for one new token.
    """

    name: ClassVar[str] = "attention-masks"
    family: ClassVar[str] = "raise"
    anchors: ClassVar[tuple[str, ...]] = ("Attention",)

    def prepare(self, model: ir.Model, edit: Editor) -> None:
        """Nothing is evaluated before it is asked for."""
        super().prepare(model, edit)
        self._masks = Masks(self._facts)
        self._first: dict[object, ir.Value] = {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """As `Pass.call`; what was evaluated doesn't outlive it."""
        try:
            return super().call(model)
        finally:
            self.__dict__.pop("_masks", None)
            self.__dict__.pop("_first", None)

    def rewrite(self, node: ir.Node, edit: Editor) -> bool:
        """See the class."""
        mask = _given(node, 3)
        if mask is None:
            return False
        causal = attribute_int(node, "is_causal", 0)
        if causal is None or any(a.is_ref() for a in node.attributes.values()):
            return self.left(node, "mask kept: an attribute is set by the caller of the function")
        if _given(node, 6) is not None:
            return self.left(node, "mask kept: `nonpad_kv_seqlen` shortens the keys that it is for")
        lengths = self._lengths(node)
        if lengths is None:
            return self.left(node, "mask kept: the lengths of queries, keys and past aren't known")
        rows, past, columns = lengths
        plain, form = self._masks.form(mask), self._masks.form(mask, rows, columns)
        shape = self._facts.shape(mask)
        if isinstance(form, NoForm) or shape is None:
            missing = form.reason if isinstance(form, NoForm) else "its rank isn't known"
            return self.left(node, f"mask kept: {mask.name!r} isn't understood: {missing}")
        fits = edit.opset < 24 or (bool(shape) and shape[-1] == columns)  # a shorter mask hides the rest of the keys
        if fits and any(isinstance(f, MaskForm) and f.always and not f.assumptions for f in (plain, form)):
            edit.set_input(node, 3, None)
            return self.applied(node, "mask dropped: it masks nothing")
        reason = self._not_causal(node, form, past) if fits else "it may be shorter than the keys"
        if reason is None:
            node.attributes["is_causal"] = ir.AttrInt64("is_causal", 1)
            edit.set_input(node, 3, None)
            return self.applied(node, "is_causal instead of a causal mask")
        if isinstance(plain, MaskForm) and self._share(node, mask, plain, shape, edit):
            return True
        return self.left(node, f"mask kept: {reason}")

    def _lengths(self, node: ir.Node) -> tuple[Dim, Dim, Dim] | None:
        """The numbers of query rows, past positions and key columns."""
        sizes = []
        for place in (0, 1, 4):
            value = _given(node, place)
            shape = self._facts.shape(value)
            if value is None and place == 4:
                sizes.append(ZERO)
            elif shape is None or len(shape) not in (3, 4):
                return None
            else:
                sizes.append(shape[-2])
        rows, new, past = sizes
        return rows, past, past + new

    def _not_causal(self, node: ir.Node, form: MaskForm, past: Dim) -> str | None:
        """Why `is_causal` can't say what the mask says; None where it can."""
        if not form.is_only_causal:
            missing = "".join(f", {why}" for why in form.obstacles)
            return f"it is {form.describe()}{missing}"
        if form.offset != past:
            return f"it is causal with offset {form.offset!r}, and {past!r} positions are past"
        if form.equalities:
            a, b = form.equalities[0]
            return f"it is causal where {a!r} and {b!r} are equal, which isn't proven"
        if not form.boolean and not _hides(form, self._facts.dtype(form.value)):
            return f"it is causal by adding {form.masked_value:g}, which a score may outweigh"
        if len(node.outputs) > 3 and (node.outputs[3].uses() or node.outputs[3].is_graph_output()):
            return "it is causal, and the masked scores are read"
        return None

    def _share(self, node: ir.Node, mask: ir.Value, form: MaskForm, shape: Shape, edit: Editor) -> bool:
        """Read the first mask of the same numbers in the same graph."""
        first = self._first.setdefault((node.graph, form.key, self._facts.dtype(mask), shape), mask)
        if first is mask or not _alive(first):
            return False
        edit.set_input(node, 3, first)
        return self.applied(node, f"mask shared: {first.name!r} holds the same numbers")


def _given(node: ir.Node, place: int) -> ir.Value | None:
    return node.inputs[place] if place < len(node.inputs) else None


def _alive(value: ir.Value) -> bool:
    producer = value.producer()
    return producer is None or producer.graph is not None


def _hides(form: MaskForm, dtype: ir.DataType | None) -> bool:
    """Whether the masked values are so low that no score matters beside them."""
    if form.masked_value is None or dtype is None:
        return False
    kind = dtype.numpy()
    lowest = float((ml_dtypes.finfo if kind == ml_dtypes.bfloat16 else np.finfo)(kind).min)
    return form.masked_value <= lowest / 2 or form.masked_value == -math.inf
