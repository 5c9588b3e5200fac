"""Whether a run can get past a node, if something is assumed of a value before it.

Real files hold branches that no successful run takes: TorchScript writes `squeeze` as an If on the size of the axis,
and the branch that keeps the axis hands a tensor of another rank to an LSTM, which refuses it. `why_fails` follows an
assumption forward through the nodes that certainly run, until an operator can't take what it would get.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import dropwhile

import onnx_ir as ir

from graphopt.analysis.shapes import Fact, ShapeFacts
from graphopt.graph.edits import captured_values, subgraphs_of

MAX_NODES = 400
"""Nodes that are looked at for one assumption, so that many Ifs in a long graph stay linear."""

RECURRENT = frozenset({"LSTM", "GRU", "RNN"})
CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})


def why_fails(facts: ShapeFacts, node: ir.Node, assumed: Mapping[ir.Value, Fact], version: int) -> str | None:
    """Why no run succeeds in which `assumed` holds of the outputs of `node`; None where one may.

    Args:
        facts: What is known of the model; not changed but for values that it infers.
        node: The node behind which the search begins. What stands before it in its graph isn't looked at.
        assumed: Facts to assume, by value.
        version: The opset at `node`.
    """
    following = dropwhile(lambda other: other is not node, node.graph or ())
    next(following, None)
    return _Search(facts, version).walk(following, dict(assumed))


class _Search:
    def __init__(self, facts: ShapeFacts, version: int) -> None:
        self._facts, self._version, self._left = facts, version, MAX_NODES

    def walk(self, nodes: Iterable[ir.Node], known: dict[ir.Value, Fact]) -> str | None:
        """Why the nodes can't all run where `known` holds; `known` grows by what follows of their outputs."""
        for node in nodes:
            self._left -= 1
            if self._left < 0:
                return None
            if node.domain not in ("", "ai.onnx"):
                continue
            if node.op_type == "If":
                reason = self._branches(node, known)
            elif any(True for _ in subgraphs_of(node)) or not any(v in known for v in node.inputs if v is not None):
                continue
            else:
                inputs = [None if v is None else self._fact(v, known) for v in node.inputs]
                reason = _refusal(node, inputs) if is_live(node) else None
                if reason is None:
                    for value, fact in zip(
                        node.outputs, self._facts.apply(node, inputs, self._version, {}), strict=True
                    ):
                        if fact.shape is not None:
                            known[value] = fact
            if reason is not None:
                return reason
        return None

    def _branches(self, node: ir.Node, known: dict[ir.Value, Fact]) -> str | None:
        """As `walk`, for the branches of an If: it fails where each that may be taken does."""
        condition = node.inputs[0]
        if condition not in known and not any(value in known for value in captured_values(node)):
            return None
        attributes = [node.attributes.get(name) for name in ("then_branch", "else_branch")]
        if any(a is None or a.is_ref() for a in attributes) or not is_live(node):
            return None
        branches = [a.as_graph() for a in attributes if a is not None]
        content = None if condition is None else self._fact(condition, known).content
        if content is not None and content.size and (decided := content.flat[0].value) is not None:
            branches = branches[:1] if decided else branches[1:]
        reason, possible = None, []
        for branch in branches:
            inner = dict(known)
            found = self.walk(branch, inner)
            reason = reason or found
            if found is None:
                possible.append([self._fact(value, inner) for value in branch.outputs])
        if not possible:
            return reason
        if len(possible) == 1:
            known.update((v, fact) for v, fact in zip(node.outputs, possible[0], strict=True) if fact.shape is not None)
        return None

    def _fact(self, value: ir.Value, known: Mapping[ir.Value, Fact]) -> Fact:
        return known.get(value) or self._facts.fact(value)


def _refusal(node: ir.Node, inputs: list[Fact | None]) -> str | None:
    """Why an operator that computes can't take its inputs: their ranks, which every runtime has to check.

    Operators that only move elements aren't asked: a runtime may drop them without having looked at their input.
    """
    ranks = [None if fact is None or fact.shape is None else len(fact.shape) for fact in inputs]
    label = f"{node.op_type} {node.name!r}"
    if node.op_type in RECURRENT and ranks[0] not in (None, 3):
        return f"{label} takes a sequence of rank 3 and would get rank {ranks[0]}"
    if node.op_type in CONVOLUTIONS and len(ranks) > 1 and None not in ranks[:2] and ranks[0] != ranks[1]:
        return f"{label} with a weight of rank {ranks[1]} would get rank {ranks[0]}"
    if node.op_type == "Gemm" and any(rank is not None and rank > 2 for rank in ranks[:2]):
        return f"{label} takes matrices and would get rank {max(rank or 0 for rank in ranks[:2])}"
    return None


def is_live(node: ir.Node) -> bool:
    """Whether an output of `node` leads to an output of its graph, so that no runtime drops it."""
    seen: set[ir.Node] = {node}
    stack = [node]
    while stack and len(seen) < MAX_NODES:
        for value in stack.pop().outputs:
            if value.is_graph_output():
                return True
            fresh = [user for user in _users(value) if user not in seen]
            seen.update(fresh)
            stack.extend(fresh)
    return False


def _users(value: ir.Value) -> Iterator[ir.Node]:
    return (user for user, _ in value.uses())
