"""resolve-ifs: conditions whose other branch no run can take, or that make no difference."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from graphopt.analysis.failure import why_fails
from graphopt.graph.edits import Editor, subgraphs_of
from graphopt.passes.clean.fold_constants import inline_branch
from graphopt.passes.raise_.shape_rules import ShapeRulePass

BRANCHES = ("then_branch", "else_branch")


class ResolveIfs(ShapeRulePass):
    """Put one branch in the place of an If, where the other one computes the same or leads to an error only.

    TorchScript writes `x.squeeze(d)` as `If(Shape(x)[d] == 1, Squeeze(x), x)`, because the rank of the result depends
    on a size. The rest of the graph was traced with one rank and takes no other:

        If(c, A, B) = A   where A = B, node by node
        If(c, A, B) = A   where every run that takes B fails

    1. Both branches hold the same nodes on the same inputs: the first is taken.
    2. The shapes of what a branch returns are followed forward, through the operators behind the If and the branches
       that these shapes decide. Where a recurrent layer, a convolution or a Gemm would get a rank that it refuses,
       the branch can't be part of a run that succeeds, so the other is taken.

    What a condition looked at is then dead and goes, and so do further Ifs, whose conditions became constant
    ([simplify-shapes](simplify-shapes.md), [fold-constants](fold-constants.md)). In silero-vad one such proof removes
    six Ifs of a branch, and a tenth of the time.

    **Needs:** shapes that are certain; declared ones aren't believed. **Guarantees:** the same numbers on every input
    on which the original runs. On an input on which the original fails, the result fails too or, where the branch that
    was kept has nothing against that input, gives numbers.

    **Left alone, with the reason:** an If where both branches can be taken. Constant conditions are the work of
    fold-constants. Ifs whose branches are given by an attribute of a function aren't looked at.

    **When not to use it:** where callers rely on the original's error for inputs of a wrong size.
    """

    name: ClassVar[str] = "resolve-ifs"
    family: ClassVar[str] = "clean"
    anchors: ClassVar[tuple[str, ...]] = ("If",)

    def rewrite(self, node: ir.Node, edit: Editor) -> bool:
        """See the class."""
        attributes = [node.attributes.get(name) for name in BRANCHES]
        if any(a is None or a.is_ref() for a in attributes) or not node.inputs:
            return False
        branches = [a.as_graph() for a in attributes if a is not None]
        if _same(branches[0], branches[1]):
            self.applied(node, "both branches compute the same")
            inline_branch(node, branches[0], edit)
            return True
        facts = [[self._facts.fact(value) for value in branch.outputs] for branch in branches]
        ranks = [[None if f.shape is None else len(f.shape) for f in results] for results in facts]
        if ranks[0] == ranks[1]:
            return self.left(node, "kept: the ranks of the results don't tell which branch is taken")
        for taken, refused in ((0, 1), (1, 0)):
            assumed = {v: f for v, f in zip(node.outputs, facts[refused], strict=True) if f.shape is not None}
            reason = why_fails(self._facts, node, assumed, edit.opset) if assumed else None
            if reason is not None:
                kept, gone = (BRANCHES[i].removesuffix("_branch") for i in (taken, refused))
                self.applied(node, f"its {kept} branch taken: after the {gone} branch {reason}")
                inline_branch(node, branches[taken], edit)
                return True
        return self.left(node, "kept: nothing behind it refuses the rank of either result")


def _same(a: ir.Graph, b: ir.Graph) -> bool:
    """Whether two branches hold the same nodes in the same order, on the same outer values."""
    if len(a) != len(b) or a.initializers or b.initializers:
        return False
    twin: dict[ir.Value | None, ir.Value | None] = {}
    for x, y in zip(a, b, strict=True):
        if x.op_identifier() != y.op_identifier() or len(x.inputs) != len(y.inputs):
            return False
        if len(x.outputs) != len(y.outputs) or any(True for n in (x, y) for _ in subgraphs_of(n)):
            return False
        if [twin.get(v, v) for v in x.inputs] != list(y.inputs) or not _same_attributes(x, y):
            return False
        twin.update(zip(x.outputs, y.outputs, strict=True))
    return [twin.get(v, v) for v in a.outputs] == list(b.outputs)


def _same_attributes(x: ir.Node, y: ir.Node) -> bool:
    return x.attributes.keys() == y.attributes.keys() and all(
        not attribute.is_ref() and ir.serde.serialize_attribute(attribute) == ir.serde.serialize_attribute(other)
        for attribute, other in zip(x.attributes.values(), (y.attributes[name] for name in x.attributes), strict=True)
    )
