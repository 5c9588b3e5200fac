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
    """Write attention of ONNX Runtime's domain `com.microsoft` as `Attention` of ai.onnx."""

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
