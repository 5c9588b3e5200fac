"""The residual stream: y = s + F(s), once for every branch.

Found by dataflow alone. An addition is residual where one operand (the skip) is what the other (the branch) was
computed from, and the branch does real work (weights or a softmax). Chains of such additions are one stream, whatever
stands between two of them on the main path: nothing (pre-LN), a normalization (post-LN), an activation (ResNet), or a
convolution on the shortcut where the shape changes (Deep Residual Learning for Image Recognition).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import onnx_ir as ir

from graphopt.analysis.algebra import is_op
from graphopt.analysis.branches import (
    BETWEEN,
    CONVOLUTIONS,
    NORMALIZATIONS,
    Branch,
    BranchFinder,
    Placement,
    main_path,
    reads,
)
from graphopt.analysis.feature_space import FeatureSpace, feature_space
from graphopt.analysis.shapes import ShapeFacts


@dataclasses.dataclass
class Stream:
    """One residual stream.

    Attributes:
        origin: The value that it starts with: the embedded tokens or patches.
        branches: Its branches, in the order in which they are added.
        final: The sum of all: the output of the last addition.
        space: The feature space of the last sum, None where its shape isn't known: its writers and readers are those
            of the whole stream in a pre-LN model, and those of the last sum in a post-LN one.
    """

    origin: ir.Value
    branches: list[Branch]
    final: ir.Value
    space: FeatureSpace | None

    @property
    def placement(self) -> Placement:
        """The placement of most branches."""
        return Counter(b.placement for b in self.branches).most_common(1)[0][0]

    @property
    def layers(self) -> list[list[Branch]]:
        """The branches by layer: attention (and cross-attention) with the MLP that follows; any other by itself."""
        result: list[list[Branch]] = []
        for branch in self.branches:
            open_ = result[-1] if result else None
            if open_ and branch.kind in ("attention", "mlp") and open_[-1].kind == "attention":
                open_.append(branch)
            else:
                result.append([branch])
        return result

    def to_dict(self) -> dict[str, Any]:
        """What `inspect` tells of it."""
        space = self.space
        return {
            "origin": self.origin.name,
            "final": self.final.name,
            "features": None if space is None else space.size,
            "placement": self.placement,
            "layers": len(self.layers),
            "branches": dict(Counter(b.kind for b in self.branches)),
            "shortcuts": sum(bool(b.shortcut) for b in self.branches),
            "writers": {} if space is None else dict(Counter(w.kind for w in space.writers)),
            "readers": {} if space is None else dict(Counter(r.kind for r in space.readers)),
        }


def residual_streams(model: ir.Model, facts: ShapeFacts) -> list[Stream]:
    """The residual streams of the main graph, longest first.

    The work is linear in the nodes where branches are local, as they are in every layered model.
    """
    return _chained(BranchFinder(model.graph, facts).branches(), facts)


def _chained(branches: list[Branch], facts: ShapeFacts) -> list[Stream]:
    """Branches put together to streams by what lies between one addition and the next."""
    by_sum = {branch.add.outputs[0]: branch for branch in branches}
    groups: dict[ir.Node, list[Branch]] = {}
    heads: dict[ir.Node, ir.Value] = {}
    root_of: dict[ir.Node, ir.Node] = {}
    for branch in branches:
        previous = branch.beside or by_sum.get(branch.skip)
        passed: list[ir.Node] = []
        if previous is None:
            for source, node in main_path(branch.skip, BETWEEN):
                passed.append(node)
                if source in by_sum:
                    previous = by_sum[source]
                    break
        root = branch.add if previous is None else root_of[previous.add]
        root_of[branch.add] = root
        groups.setdefault(root, []).append(branch)
        if previous is None:
            heads[root] = branch.skip
        elif any(is_op(node, *NORMALIZATIONS) for node in passed):
            previous.placement = "post"
    streams = []
    for root, members in groups.items():
        for branch in members:
            branch.placement = _placement(branch)
        final = members[-1].add.outputs[0]
        streams.append(Stream(heads[root], members, final, feature_space(final, _feature_axis(members), facts)))
    streams.sort(key=lambda s: -len(s.branches))
    return streams


def _feature_axis(branches: list[Branch]) -> int:
    """The last axis, or the channels of images."""
    convolved = next((n for b in branches for n in b.nodes if is_op(n, *CONVOLUTIONS) and len(n.inputs) > 1), None)
    if all(b.kind == "conv" for b in branches) and convolved is not None:
        weight = convolved.inputs[1]
        if weight is not None and weight.shape is not None:
            return 1 - len(weight.shape)
    return -1


def _placement(branch: Branch) -> Placement:
    inside = set(branch.nodes)
    entries = [n for n in branch.nodes if any(v is branch.skip for v in reads(n))]
    pre = bool(entries) and all(is_op(n, *NORMALIZATIONS) for n in entries)
    last = branch.output.producer()
    for _ in range(3):  # a scale or a cast may follow the norm
        if last is not None and is_op(last, "Mul", "Cast", "Identity", "Dropout") and last in inside:
            last = next((v.producer() for v in last.inputs if v is not None and v.producer() in inside), None)
    leaves = last is not None and last in inside and is_op(last, *NORMALIZATIONS)
    total = branch.add.outputs[0]
    post = branch.placement == "post"
    if not post and not total.is_graph_output() and len(total.uses()) == 1 and not pre:
        post = all(is_op(user, *NORMALIZATIONS) for user, _ in total.uses())
    if pre and leaves:
        return "sandwich"
    if post:
        return "both" if pre else "post"
    return "pre" if pre else "none"
