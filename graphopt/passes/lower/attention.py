"""lower-attention: `Attention` is written as what the target runs fastest."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from graphopt.analysis.shapes import ShapeFacts
from graphopt.graph.edits import Editor, sort
from graphopt.passes.base import LOWERED
from graphopt.passes.lower.attention_forms import Forms
from graphopt.passes.lower.attention_site import Merged, NotLowered, Site, may_hide_all, merged, read
from graphopt.passes.lower.packed_attention import packed, write
from graphopt.passes.raise_.shape_rules import ShapeRulePass


class LowerAttention(ShapeRulePass):
    """Write `Attention` in the form that the target runs fastest.

        y = softmax(cap · tanh(s · q kᵀ / cap) + mask) · v

    1. `attention`: the operator itself. Where queries, keys and values are heads that a Reshape and a Transpose have
       just split off, and the result is merged again at once, it gets [batch, sequence, heads · depth] and splits the
       heads off by itself, which saves the four transposes.
    2. `spelled-out`: MatMul, Mul, Add, Softmax, MatMul, as ONNX Runtime optimizes them best: the factor behind the
       product, which takes it over; keys transposed once, or by the product itself; for query heads that share keys,
       the queries of a group one behind the other, so that keys and values aren't repeated. A mask is made into
       numbers once for all layers, and so is what tells the queries that see no key, whose result is 0.
    3. `contrib-attention`: the operator of that name in ONNX Runtime's own domain, with the layers that make queries,
       keys and values of one value: their weights lie side by side. In float32, without cache, cap or groups, and with
       a mask of finite numbers or none: it gives NaN for a query that sees no key.

    With no target profile the form is `attention` from ONNX Runtime 1.29 on, and `spelled-out` before: up to 1.27 the
    operator gives queries that see no key the mean of the values, or NaN. With one, it is what the profile prefers for
    the choice `attention` at the width of the site; `attention` is then used before 1.29 only where every query is
    known to see a key, and there is no cap. `contrib-attention` is the fastest form of few tokens (at 1 × 16, width 256
    to 768: 0.73 to 0.95 of the spelled-out form, `attention` 0.82 to 1.0) and loses to it from 128 on (0.90 to 1.01
    against 0.92 to 0.97; at 8 × 64 0.95 to 1.11 against 0.88 to 0.96): a profile takes it where the graph fixes a small
    number of tokens. ONNX Runtime's `MultiHeadAttention` (0.89 to 1.03) was behind `attention` at every point.

    Measured on ONNX Runtime 1.31 (CPU time over that of the same graph without `raise-attention`, 1 and 2 threads, on a
    busy machine: an A/A control gave 0.91 to 1.05), at 1 × 16, 1 × 128 and 8 × 64 tokens: all-MiniLM-L6 with sdpa
    attention, both exporters, 0.92 to 0.97, 0.94 to 0.97, 0.97 to 0.98; with eager attention 0.97 to 1.01, 0.95 to 1.0,
    0.95 to 1.04; on 1.29 and 1.30 (one export) 0.92 to 0.98. Single attentions of 1 to 12 heads, windows of Swin and
    SHViT's single heads among them, 0.61 to 0.98 of the spelled-out form. On operands whose heads can't be left unsplit
    the operator takes 0.93 to 1.09 of it from 16 tokens on, and with a cache (SmolLM2) 0.84 to 0.98 of the source.
    Spelled out again after `raise-attention`, the four exports take 0.95 to 1.05, within the noise.

    **Options:** `form` (`spelled-out`, `attention` or `contrib-attention`; default: as above): one form for all sites,
    where it can be.

    **Needs:** rank and type of the operands; for `spelled-out` the numbers of heads. **Guarantees:** the same function.
    Axes that the model's inputs declare under one name are taken to be equally long.

    **Left alone, with the reason:** scores that are read; lengths of the keys for each sequence; attributes that the
    caller of a function sets; a mask of another type or length; bfloat16 in the spelled-out form.

    **Targets:** cpu.

    **When not to use it:** on providers with a kernel of their own for `Attention`.
    """

    name: ClassVar[str] = "lower-attention"
    family: ClassVar[str] = "lower"
    paper: ClassVar[str] = "Attention Is All You Need"
    targets: ClassVar[tuple[str, ...]] = ("cpu",)
    anchors: ClassVar[tuple[str, ...]] = ("Attention",)

    def __init__(self, form: str = "") -> None:
        super().__init__()
        self.form = form

    def prepare(self, model: ir.Model, edit: Editor) -> None:
        """Know what is known already."""
        self._facts = ShapeFacts(model, believe_names=True)
        self._forms = Forms(edit, self._facts)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """As `Pass.call`; what layers share comes before the first of them."""
        try:
            result = super().call(model)
        finally:
            self.__dict__.pop("_forms", None)
        if result.modified:
            sort(model)
        return result

    def rewrite(self, node: ir.Node, edit: Editor) -> bool:
        """See the class."""
        try:
            site = read(node, self._facts)
            wanted = self._wanted(site)
            found = merged(site, self._facts)
            if wanted == "contrib-attention":
                if (done := self._packed(site, found, edit)) is not None:
                    return done
                wanted = self._otherwise(site)
            if wanted == "spelled-out":
                softmax = self._forms.spelled_out(site)
                softmax.meta[LOWERED] = True
                return self.applied(node, "spelled out")
        except NotLowered as reason:
            return self.left(node, f"not lowered: {reason}")
        if found is None or site.merged:
            return False
        self._forms.merged(site, found)
        return self.applied(node, "the operator splits the heads off by itself")

    def _packed(self, site: Site, found: Merged | None, edit: Editor) -> bool | None:
        if found is None:
            return None
        try:
            layers = packed(site, found, self._facts, self._forms.bounds)
        except NotLowered:
            return None
        write(site, found, layers, edit).meta[LOWERED] = True
        return self.applied(site.node, "ONNX Runtime's own operator makes queries, keys and values too")

    def _wanted(self, site: Site) -> str:
        if self.form:
            return self.form
        wanted = self.prefers("attention", site.width, self._rows(site))
        return self._otherwise(site) if wanted == "attention" else wanted

    def _otherwise(self, site: Site) -> str:
        """`attention`, where the runtime's operator does what the standard says; else `spelled-out`."""
        default = self.prefers("attention") if self.profile is None else self.profile.default("attention")
        if self.form or default == "attention":
            return "attention"
        hides = site.softcap or may_hide_all(site, self._facts, self._forms.bounds)
        return "spelled-out" if hides else "attention"

    def _rows(self, site: Site) -> int | None:
        """Tokens of the batch, where the graph fixes them."""
        shape = self.shape(site.operand("q"))
        if shape is None:
            return None
        batch, queries = shape[0], shape[1 if site.merged else 2]
        return batch * queries if batch and queries else None
