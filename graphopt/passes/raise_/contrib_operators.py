"""What the passes that raise ONNX Runtime's own operators have in common: rules that give formulas."""

from __future__ import annotations

import abc
from collections.abc import Mapping

import onnx_ir as ir

from graphopt.graph.edits import Editor, nodes, sort
from graphopt.passes.base import LOWERED
from graphopt.passes.raise_.contrib_rules import Call, Formulas
from graphopt.passes.raise_.expression import Expression, Operand, expressions, needed_opset, write
from graphopt.passes.raise_.root_mean_square import NotRaised
from graphopt.passes.raise_.shape_rules import ShapeRulePass

DOMAIN = "com.microsoft"


class ContribRulePass(ShapeRulePass):
    """A pass of rules that say by which formulas operators of `com.microsoft` are replaced."""

    def prepare(self, model: ir.Model, edit: Editor) -> None:
        """Say of the operators without a rule why they stay."""
        super().prepare(model, edit)
        self._functions = set(model.functions)
        self._made: dict[Expression, ir.Value] = {}
        if not any(domain.startswith(DOMAIN) for domain in model.graph.opset_imports):
            return
        for node in nodes(model):
            if node.domain.startswith(DOMAIN) and node.op_identifier() not in self._functions:
                reason = self.why_it_stays(node)
                if reason is not None:
                    self.left(node, reason)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """As `Pass.call`; what was written doesn't outlive it."""
        try:
            return super().call(model)
        finally:
            self.__dict__.pop("_made", None)

    def apply(self, model: ir.Model) -> bool:
        """Rewrite what has a rule, and import the domain no longer where that was all of it."""
        changed = super().apply(model)
        if changed:
            sort(model)  # an expression that sites share lies before the site that was looked at first
        named = (domain for domain, *_ in model.functions)
        if changed and DOMAIN not in named and all(node.domain != DOMAIN for node in nodes(model)):
            model.graph.opset_imports.pop(DOMAIN, None)
            for function in model.functions.values():
                function.opset_imports.pop(DOMAIN, None)
        return changed

    def rewrite(self, node: ir.Node, edit: Editor) -> bool:
        """See the class."""
        if node.op_identifier() in self._functions or node.meta.get(LOWERED):
            return False
        if any(attribute.is_ref() for attribute in node.attributes.values()):
            return self.left(node, "the caller of its function sets an attribute of it: inline functions first")
        try:
            formulas = self._by_output(node, self.formulas(node, edit))
        except NotRaised as reason:
            return self.left(node, str(reason))
        if not formulas:
            return False  # nothing reads it
        opset = needed_opset(formulas.values())
        if edit.opset < opset:
            return self.left(node, f"needs opset {opset}, the model has {edit.opset}: run convert-opset first")
        self.taken(node, edit.model)
        written = write(formulas, edit, self._made)
        for old, new in written.items():
            edit.replace(old, new)
        return self.applied(node, self.said(formulas))

    @abc.abstractmethod
    def formulas(self, node: ir.Node, edit: Editor) -> Formulas:
        """What may stand for the outputs of a node that has a rule; raises `NotRaised` where nothing may."""

    @abc.abstractmethod
    def why_it_stays(self, node: ir.Node) -> str | None:
        """The reason why a node of the domain has no rule; None where it has one, or where that is for another pass."""

    def taken(self, node: ir.Node, model: ir.Model) -> None:
        """Called before a node is replaced."""

    def said(self, formulas: Mapping[ir.Value, Operand]) -> str:
        """What the report says was done."""
        return " ".join(expression.op_type for expression in expressions(formulas.values())) or "removed"

    def _by_output(self, node: ir.Node, found: Formulas) -> dict[ir.Value, Operand]:
        """What may stand for each output that is read."""
        call = Call(node, self)
        by_index = found if isinstance(found, dict) else {0: found}
        for index, output in enumerate(node.outputs):
            if index not in by_index and call.uses(index):
                raise NotRaised(f"its output {index}, {output.name!r}, is used too, which no standard operator gives")
        return {output: by_index[i] for i, output in enumerate(node.outputs) if call.uses(i)}
