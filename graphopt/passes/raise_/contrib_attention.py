"""raise-contrib-attention: ONNX Runtime's own attention operators become `Attention` of ai.onnx again."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import ClassVar

import onnx_ir as ir

from graphopt.analysis.shapes import lazily
from graphopt.graph.edits import Editor
from graphopt.passes.raise_.contrib_attention_operators import RULES, why_it_stays
from graphopt.passes.raise_.contrib_attention_rules import AttentionCall, Need
from graphopt.passes.raise_.contrib_operators import DOMAIN, ContribRulePass
from graphopt.passes.raise_.contrib_rules import Formulas
from graphopt.passes.raise_.expression import Expression, Operand, expressions
from graphopt.passes.raise_.root_mean_square import NotRaised


class RaiseContribAttention(ContribRulePass):
    """Write attention of ONNX Runtime's domain `com.microsoft` as `Attention` (and `RotaryEmbedding`) of ai.onnx.

        y = softmax(s · q kᵀ + m + b) · v,   m = 0 where the mask is over 0, else its fill

    A model that ONNX Runtime's transformers optimizer or its generative builder wrote then has the same form as one
    from any exporter, and what raises, reads and lowers attention applies to it.

    1. `MultiHeadAttention`: Reshape and Transpose to heads and back, `Attention` between, biases of the projections as
       Adds beside them. Keys and values of 4 axes (cross attention) are taken as they are; their bias is in them
       already, as the kernel has it. A past goes into the operator, and the present comes out of it.
    2. `Attention`, whose weights for queries, keys and values lie side by side: three products where they are constant
       (cut when they are asked for, so that one is in memory at a time), one product and a Split elsewhere.
    3. `GroupQueryAttention`: `is_causal`, heads in groups, softcap; a window as a boolean mask; queries, keys and
       values side by side as in rule 2; its rotation as `RotaryEmbedding` with positions counted on from the past.
    4. Masks: [batch, keys], [batch, queries, keys] and counts [batch] become numbers to be added, written once for all
       layers: 0, or `mask_filter_value`. That is -10000 where nothing else is said, so that a row without any key
       still weighs its scores, as it does in the kernel; no boolean mask says that. The lowest float32, which the
       runtime's `Attention` takes for -∞, becomes -3e38, as in `raise-attention`.

    The kernel of `GroupQueryAttention` takes each row's past to end at seqlens_k + 1 - S. Where these are sums of a
    mask that is an input, rows of other lengths than the longest have a cache that no `Attention` of opset 23 has (new
    keys go behind each row's own), and a buffer longer than what is in it isn't told from a full cache. So `--assume
    no-padding` is needed; where seqlens_k and the total are computed from the sizes of the cache and the new
    tokens, nothing is.

    **Needs:** opset 23 (`convert-opset`); sizes of heads; `raise-contrib` before, which makes the counts of
    EmbedLayerNormalization's mask. Sizes that the signature declares equal by name are taken as equal, as by
    `raise-attention`.

    **Guarantees:** what the kernels of ONNX Runtime 1.31 on the CPU compute, up to the order of sums, at rows without a
    key too; beside -10000 a float32 score keeps three digits behind the point in both forms. Where something was
    assumed, it is in the model's metadata, and `graphopt.session` checks it.

    **Left alone, with the reason:** a past and present in one tensor or one buffer; queries, keys and values packed by
    heads; `unidirectional` beside a bias, beside a mask of the lowest number, or with other numbers of keys than
    queries, where the kernel leaves the last row unmasked; a mask of one column, which may be the one that the runtime
    ignores, and one by two or three numbers a row; position ids, sinks and a quantized cache of `GroupQueryAttention`;
    operators over packed, paged, sparse or quantized data, and `DecoderMaskedMultiHeadAttention`.

    **When not to use it:** for a decoder that runs in ONNX Runtime's generative extension with past and present in one
    buffer: don't assume `no-padding`, and it stays as it is.
    """

    name: ClassVar[str] = "raise-contrib-attention"
    family: ClassVar[str] = "raise"
    anchors: ClassVar[tuple[str, ...]] = tuple(f"{DOMAIN}::{operator}" for operator in RULES)

    def prepare(self, model: ir.Model, edit: Editor) -> None:
        """Masks and positions are written once for all sites. Sizes that the signature declares equal by name are taken
        as equal, as by raise-attention."""
        super().prepare(model, edit)
        self._facts = lazily(model, believe_names=True)
        self._shared: dict[Hashable, Expression] = {}
        self._needs: list[Need] = []

    def formulas(self, node: ir.Node, edit: Editor) -> Formulas:
        """The rule of the operator, where what it needs is assumed."""
        call = AttentionCall(node, self, self._shared)
        found = RULES[node.op_type](call)
        for need in call.needs:
            if not self.assumptions.holds(need.assumption):
                raise NotRaised(f"{need.problem}: --assume {need.assumption}")
        self._needs = call.needs
        return found

    def taken(self, node: ir.Node, model: ir.Model) -> None:
        """Note what was relied on."""
        for need in self._needs:
            self.rely_on(model, need.assumption, need.inputs, need.reason)

    def why_it_stays(self, node: ir.Node) -> str | None:
        """See `contrib_attention_rules`."""
        return why_it_stays(node)

    def said(self, formulas: Mapping[ir.Value, Operand]) -> str:
        """How the site is written."""
        made = [expression for expression in expressions(formulas.values()) if expression.op_type == "Attention"]
        return "Attention" + ("" if not made or len(made[0].inputs) < 4 or made[0].inputs[3] is None else ", mask")
