"""raise-attention: every spelling of softmax(q·kᵀ)·v becomes `Attention`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analysis.algebra import attribute_int
from graphopt.analysis.attention_form import AttentionForm, NotAttention, Operand, concatenated, operands, read
from graphopt.analysis.attention_sites import OTHERS, of_another_kind
from graphopt.analysis.layout import NotAView, Stage
from graphopt.analysis.shapes import ShapeFacts, lazily
from graphopt.graph.edits import Editor, nodes, sort
from graphopt.passes.base import LOWERED, RulePass
from graphopt.passes.raise_.attention_mask import mask_of
from graphopt.passes.raise_.rearrange import Rearrangement

OPSET = 23
_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


class RaiseAttention(RulePass):
    """Write attention that an exporter took apart as one `Attention`.

        y = softmax(softcap · tanh(s · q kᵀ / softcap) + mask) · v          (the cap only where there is one)

    Paper: Attention Is All You Need (Vaswani et al., 2017); grouped heads: GQA (Ainslie et al., 2023).

    A site is read from its Softmax outward. What lies between the two products and what the operands are made of is
    followed by layout algebra (`graphopt.analysis.layout`): each axis is a list of atoms that views move, split or
    repeat, so that batch, heads, sequence and depth are known whatever mixture of Reshape, Transpose, Squeeze,
    Unsqueeze, Expand, Tile and Gather an exporter wrote. Taken as the same:

    1. The scale s: at the scores, at the queries, at the keys or in parts of it at several places, as Mul or Div, also
       in front of the views that make the heads. A factor of length 1 along queries and keys (a learned temperature)
       multiplies the queries.
    2. Keys and values of fewer heads: repeated by Expand and Reshape, Tile, Gather or a Concat of themselves, or
       broadcast by the product. They lose the repetition.
    3. Heads in an axis of their own, or in one axis with the batch; a single head without an axis; windows in front.
    4. Masks: any number of values added, and of choices (Where) between a score and a number of at most −10,000, in any
       order, at any rank. A choice of −∞ becomes a boolean mask. Weights that aren't numbers, set to 0 behind the
       Softmax (IsNaN, Where): the operator does the same.
    5. The KV cache: `Concat(past, new)` along the sequence, with the past an input of the graph, becomes `past_key`,
       `past_value`, and its results `present_key`, `present_value`.
    6. An `Attention` that is there already, with repeated keys and values or a cache in front, as torch.export writes
       it for opset 23.
    7. Scores as kᵀ·q and results as vᵀ·wᵀ, transposed afterwards.

    **Needs:** opset 23. **Guarantees:** the same function. Where all keys are hidden by −∞ the spelled-out form gives
    NaN and the operator 0. Hidden by a finite number, they have equal weights in both: the lowest float32, which ONNX
    Runtime 1.31 takes for −∞, is written as −3e38 (a score of a size below 1e30 doesn't change either). A choice of
    a number between −10,000 and −1e30 is taken for one that hides the key: scores below it would differ.
    ONNX Runtime's kernel refuses a batch or a sequence of no elements, which the products take.
    Sizes that the signature declares equal by name in two inputs are taken as equal; the operator checks them when it
    runs. A mask or keys of another batch than the queries, which a product would broadcast, make it fail.

    **Left alone, with the reason:** weights or scores that something else reads (attention maps as outputs); further
    scores beside those of the keys (attention sinks); scores through something else than the above; heads repeated in
    another order than group by group; one set of keys for the whole batch; float64 and bfloat16, for which ONNX Runtime
    has no kernel. A Softmax that isn't between two products is no site.

    Why not ONNX Runtime's or onnxscript's fusions: on fresh exports of decoders they find none, because they match
    chains of operators as one exporter wrote them.

    **When not to use it:** for a runtime without `Attention` (opset below 23); `lower-attention` writes it out again.
    """

    name: ClassVar[str] = "raise-attention"
    family: ClassVar[str] = "raise"
    paper: ClassVar[str] = "Attention Is All You Need"
    anchors: ClassVar[tuple[str, ...]] = ("Softmax", "Attention", *OTHERS)

    def prepare(self, model: ir.Model, edit: Editor) -> None:
        """Know what is known already."""
        self._facts: ShapeFacts = lazily(model, believe_names=True)
        self._order = {node: float(place) for place, node in enumerate(nodes(model))}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """As `Pass.call`; facts don't outlive it, and what reads a cache comes after the operator that makes it."""
        try:
            result = super().call(model)
        finally:
            for name in ("_facts", "_order"):
                self.__dict__.pop(name, None)
        if result.modified:
            sort(model)
        return result

    def rewrite(self, node: ir.Node, edit: Editor) -> bool:
        """See the class."""
        if node.op_type in OTHERS:
            if of_another_kind(node, self._facts):
                self.left(
                    node, f"attention isn't raised: {node.op_type} instead of a softmax, which no operator computes"
                )
            return False
        mark = edit.made()
        try:
            if node.op_type == "Attention":
                return self._rewrite_operator(node, edit)
            if node.meta.get(LOWERED):
                return False
            form = read(node, self._facts)
            if form is None:
                return False
            if edit.opset < OPSET:
                raise NotAttention(f"needs opset {OPSET}, the model has {edit.opset}: run convert-opset first")
            return self.applied(node, _write(form, self._facts, edit, self._order))
        except (NotAttention, NotAView) as reason:
            edit.discard(mark)
            return self.left(node, f"attention isn't raised: {reason}")

    def _rewrite_operator(self, node: ir.Node, edit: Editor) -> bool:
        inputs = [*node.inputs, *[None] * 6][:6]
        shapes = [None if value is None else self._facts.shape(value) for value in inputs[:3]]
        if any(shape is None or len(shape) != 4 for shape in shapes) or inputs[4] is not None:
            return False
        if any(a.is_ref() for a in node.attributes.values()) or any(out.uses() for out in node.outputs[1:]):
            return False
        q, k, v = operands(node, self._facts)
        edit.at(node)
        writer = _Writer((q, k, v), self._facts, edit, self._order)
        if not _repeated(k) and not _repeated(v):
            assert inputs[1] is not None
            assert inputs[2] is not None
            if causal(node) or writer.cache(inputs[1], inputs[2], [inputs[0], inputs[3]]) is None:
                return False
        keys, values = (writer.placed(operand, number=False)[0] for operand in (k, v))
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        y, cached = writer.operator(
            inputs[0], keys, values, inputs[3], attributes, node.outputs[0], cache=not causal(node)
        )
        edit.replace(node.outputs[0], y)
        writer.finish()
        return self.applied(node, f"wrote Attention{_heads(q, k)}" + (" with a cache" if cached else ""))


def causal(node: ir.Node) -> bool:
    """Whether an `Attention` hides the keys behind a query by itself."""
    return attribute_int(node, "is_causal", 0) != 0


def _repeated(operand: Operand) -> bool:
    return any(atom.repeat for axis in operand.stages[0].settled() for atom in axis)


def _write(form: AttentionForm, facts: ShapeFacts, edit: Editor, order: Mapping[ir.Node, float]) -> str:
    edit.at(form.path.weighted)
    dtype = facts.dtype(form.q.stages[0].value)
    if dtype not in _TYPES:
        raise NotAttention(f"it computes in {'an unknown type' if dtype is None else dtype.name}")
    writer = _Writer((form.q, form.k, form.v), facts, edit, order)
    scores = form.scores
    mask = mask_of(form, facts, edit, writer.views, dtype)
    q, q_factor = writer.placed(form.q)
    k, k_factor = writer.placed(form.k)
    v, _ = writer.placed(form.v, number=False)
    for temperature in scores.temperatures:
        shape = facts.shape(temperature)
        if len(scores.axes) != 4 or shape is None or len(shape) > 4:
            raise NotAttention(f"the axes of the temperature {temperature.name!r} aren't those of the queries")
        q = edit.op("Mul", [q, temperature], like=q)
    precision = scores.precision
    attributes = {
        "scale": float(np.float32(scores.scale * q_factor * k_factor)),
        "softcap": float(np.float32(scores.softcap)) or None,
        "softmax_precision": precision.value if precision not in (None, dtype) else None,
    }
    y, cached = writer.operator(q, k, v, mask, attributes, None)
    result = writer.views.to(y, form.output_roles, form.output_axes)
    if result is y:
        y.type, y.shape = form.output.type, form.output.shape
    edit.replace(form.output, result)
    writer.finish()
    parts = (("a mask", mask is not None), ("a cache", cached), ("a cap", bool(scores.softcap)))
    extras = [name for name, there in parts if there]
    return f"wrote Attention{_heads(form.q, form.k)}" + (f", with {' and '.join(extras)}" if extras else "")


def _heads(q: Operand, k: Operand) -> str:
    heads, kv_heads = q.sizes[1].value, k.sizes[1].value
    if heads is None:
        return ""
    return f" of {heads} heads" + (f" on {kv_heads} of keys and values" if kv_heads not in (None, heads) else "")


class _Writer:
    """Writes one operator, at the site of `edit`; `order` says where the nodes stood before the pass."""

    def __init__(
        self, parts: Sequence[Operand], facts: ShapeFacts, edit: Editor, order: Mapping[ir.Node, float]
    ) -> None:
        self.facts, self.edit, self.order = facts, edit, order
        self.views = Rearrangement(edit, facts, [stage for operand in parts for stage in operand.stages])
        self._replaced: list[tuple[ir.Value, ir.Value]] = []

    def operator(
        self,
        q: ir.Value | None,
        k: ir.Value,
        v: ir.Value,
        mask: ir.Value | None,
        attributes: Mapping[str, Any],
        like: ir.Value | None,
        cache: bool = True,
    ) -> tuple[ir.Value, bool]:
        """The result of a new Attention, and whether it has the cache."""
        found = self.cache(k, v, [q, mask]) if cache else None
        inputs: list[ir.Value | None] = [q, k, v, mask]
        if found is not None:
            (past_k, new_k), (past_v, new_v) = found
            inputs = [q, new_k, new_v, mask, past_k, past_v]
        while inputs[-1] is None:
            inputs.pop()
        y = self.edit.op("Attention", inputs, attributes, outputs=1 if found is None else 3, like=like)
        if found is not None:
            node = y.producer()
            assert node is not None
            for old, new in ((k, node.outputs[1]), (v, node.outputs[2])):
                new.type, new.shape = old.type, old.shape
                self._replaced.append((old, new))
        return y, found is not None

    def finish(self) -> None:
        """Let what read the cache read the results of the operator, and take out what the scale has taken over."""
        for old, new in self._replaced:
            self.edit.replace(old, new)

    def placed(self, operand: Operand, number: bool = True) -> tuple[ir.Value, float]:
        """An operand as [batch, head, sequence, depth], and the number to multiply it by."""
        stages = [stage for stage in operand.stages if number or stage.factor == 1.0]
        chosen: Stage | None = None
        for stage in stages:
            if stage.settled() == operand.roles:
                chosen = stage
        if chosen is not None:
            value = chosen.value
        else:
            value, chosen = self.views.first(stages, operand.roles)
        factor = chosen.factor
        if number:
            factor *= self._taken_out(stages, chosen)
        return value, factor

    def _taken_out(self, stages: Sequence[Stage], chosen: Stage) -> float:
        """The product of the numbers that `chosen` is multiplied by further up, taken out of there."""
        factor = 1.0
        later = stages[stages.index(chosen) :]
        for before, after in itertools.pairwise(later):
            if len(before.value.uses()) > 1 or before.value.is_graph_output():
                break
            if len(after.scales) > len(before.scales):
                factor *= after.factor / before.factor
                self._replaced.append((before.value, after.value))
        return factor

    def cache(
        self, k: ir.Value, v: ir.Value, others: Sequence[ir.Value | None]
    ) -> tuple[tuple[ir.Value, ir.Value], tuple[ir.Value, ir.Value]] | None:
        """((past, new) of the keys, of the values), where both are appended to inputs and nothing needs them first."""
        keys, values = concatenated(k), concatenated(v)
        if keys is None or values is None or k is v or self._reach([*others, *keys, *values], {k, v}):
            return None
        return keys, values

    def _reach(self, starts: Sequence[ir.Value | None], targets: set[ir.Value]) -> bool:
        """Whether one of `targets` is needed to compute `starts`; what stands before all of them can't need them."""
        first = min(self._place(target) for target in targets)
        stack = [value for value in starts if value is not None]
        seen: set[ir.Node] = set()
        while stack:
            value = stack.pop()
            if value in targets:
                return True
            node = value.producer()
            if node is None or node in seen or self.order.get(node, math.inf) < first:
                continue
            seen.add(node)
            stack.extend(v for v in node.inputs if v is not None)
        return False

    def _place(self, value: ir.Value) -> float:
        node = value.producer()
        return 0.0 if node is None else self.order.get(node, 0.0)
