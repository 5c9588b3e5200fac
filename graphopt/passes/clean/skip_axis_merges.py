"""skip-axis-merges: a transpose between two reshapes, on the axes as they were before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import onnx_ir as ir

from graphopt.analysis.algebra import producer
from graphopt.analysis.dims import ONE, Dim
from graphopt.analysis.shapes import Shape, ShapeFacts, infer
from graphopt.graph.edits import Editor
from graphopt.passes.base import RulePass


class SkipAxisMerges(RulePass):
    """Transpose a tensor itself where it is reshaped, transposed, and reshaped back.

    Where a Reshape only merges neighbouring axes, a transpose of the merged axes moves each group as a whole. With the
    groups G of axes that become one, and the permutation p of groups,

        Reshape(Transpose(Reshape(x, merged), p), split) = Transpose(x, p′),   p′ = the axes of G[p[0]], G[p[1]], ...

    if `split` takes each group apart into the sizes that it had. torch.export writes the transposed keys of
    `scaled_dot_product_attention` so: batch and heads are merged, two axes exchanged, batch and heads split again. That
    costs computed shapes too. all-MiniLM-L6 of torch.export takes 0.98 of the time without (ONNX Runtime 1.31, CPU).

    **Needs:** symbolic shapes that prove that the sizes are the same. **Guarantees:** the same numbers, bit for bit.

    **Left alone, with the reason:** nothing is reported where sizes differ: most reshapes around a transpose are no
    merges.

    **When not to use it:** never.
    """

    name: ClassVar[str] = "skip-axis-merges"
    family: ClassVar[str] = "clean"
    bitwise: ClassVar[bool] = True
    anchors: ClassVar[tuple[str, ...]] = ("Reshape",)

    def prepare(self, model: ir.Model, edit: Editor) -> None:
        """See the base class."""
        self._facts: ShapeFacts = infer(model)

    def rewrite(self, node: ir.Node, edit: Editor) -> bool:
        """See the class."""
        transpose = producer(node.inputs[0], "Transpose")
        merge = producer(transpose.inputs[0], "Reshape") if transpose is not None else None
        if transpose is None or merge is None or merge.inputs[0] is None:
            return False
        source = merge.inputs[0]
        before, merged = self._facts.shape(source), self._facts.shape(merge.outputs[0])
        wanted, perm = self._facts.shape(node.outputs[0]), transpose.attributes.get("perm")
        if before is None or merged is None or wanted is None or (perm is not None and perm.is_ref()):
            return False
        order = list(range(len(merged)))[::-1] if perm is None else list(perm.as_ints())
        groups = merged_axes(before, merged)
        if groups is None or len(order) != len(groups):
            return False
        axes = [axis for i in order for axis in groups[i]]
        if [before[axis] for axis in axes] != list(wanted):
            return False
        self.applied(node, f"a Transpose {axes} of {source.name!r}, whose axes were merged and split again")
        moved = edit.op("Transpose", [source], {"perm": axes}, like=node.outputs[0])
        edit.replace(node.outputs[0], moved)
        return True


def merged_axes(before: Shape, merged: Sequence[Dim]) -> list[list[int]] | None:
    """Which axes of `before` make each axis of `merged`, in their order; None where that isn't proven."""
    groups: list[list[int]] = []
    axis = 0
    for size in merged:
        group: list[int] = []
        product = ONE
        while axis < len(before) and (not group or product != size):
            group.append(axis)
            product = product * before[axis]
            axis += 1
        if product != size:
            return None
        groups.append(group)
    # What is left over are axes of size 1, if anything.
    if any(dim != ONE for dim in before[axis:]):
        return None
    if axis < len(before) and groups:
        groups[-1].extend(range(axis, len(before)))
    return groups if axis <= len(before) and (groups or not before) else None
