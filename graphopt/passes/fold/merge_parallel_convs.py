"""merge-parallel-convs: convolutions side by side become one."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analysis.algebra import attribute_int, is_op, producer
from graphopt.analysis.windows import merged
from graphopt.graph.constants import constant_array
from graphopt.graph.edits import Editor
from graphopt.passes.fold.batch_norm import normalization
from graphopt.passes.fold.branches import Branches, NoBranches, signature
from graphopt.passes.fold.convolutions import Convolution, ConvRulePass, overflow
from graphopt.passes.fold.kernels import Kernel, added, delta
from graphopt.passes.fold.layers import Numbers, sole_reader


@dataclasses.dataclass(frozen=True)
class _Term:
    """One term of a sum, as a convolution of `x`.

    Attributes:
        value: The term.
        kernel: Its kernel, of size 1 for x itself and for a scale of its channels.
        bias: What it adds to each channel.
        conv: The Conv that it is, None for a scale.
    """

    value: ir.Value
    kernel: Kernel
    bias: Numbers
    conv: Convolution | None = None


class MergeParallelConvs(ConvRulePass):
    """Merge convolutions that stand side by side: those of one input that are added, and equal branches.

        Σᵢ (Wᵢ ∗ x + bᵢ) = (Σᵢ Wᵢ) ∗ x + Σᵢ bᵢ         each Wᵢ set into zeros so that the taps align
        s · x + t = (s · δ) ∗ x + t                   δ the kernel of one 1 in the middle, for each channel
        Σᵢ Wᵢ ∗ f(Vᵢ ∗ x)  = [W₁ W₂ …] ∗ f([V₁; V₂; …] ∗ x)         f: element by element
        Concat(f(Vᵢ ∗ x))  = f([V₁; V₂; …] ∗ x)
        Concat(Vᵢ ∗ Split(x)ᵢ) = [V₁; V₂; …] ∗ x in groups

    Paper: RepVGG: Making VGG-style ConvNets Great Again (2021), whose block of a 3×3, a 1×1 and an identity becomes one
    3×3; Aggregated Residual Transformations for Deep Neural Networks (2016), whose block of many equal branches becomes
    a pointwise, a grouped, and a pointwise convolution.

    The rules, tried at each sum (Add and Sum, nested ones as one) and at each Concat:

    1. Convolutions of one value with equal strides whose taps align (the centres of odd kernels under half padding, but
       also dilated, asymmetric and causal ones): their kernels are added. x itself, a batch normalization of it, and a
       product of it with constants of one number a channel join a convolution of as many output channels.
    2. Equal branches that are added: each ends in a convolution without groups, and, walked back in lock-step over
       activations, constants of a number a channel, pooling and convolutions, all begin at one value. The first
       convolutions are stacked, those in the middle become groups, the last one adds up. The same for MatMul, with two
       layers.
    3. Equal branches that are concatenated along the channels: the same without the last one. A Split before them
       goes too: the grouped convolution that an old exporter took apart is one again.

    The kernels of rule 1 are added only where the weights, and with them the multiplications, don't grow: a pointwise
    and a depthwise convolution stay two. Rules 2 and 3 keep both.

    **Needs:** constant weights and biases in float64, float32, float16 or bfloat16. **Guarantees:** the same function,
    at the borders too: all read the same zeros. Sums are taken in another order. New weights are computed in float64
    and rounded once, large ones when they are saved.

    Measured on ONNX Runtime 1.31 (CPU time, one thread and two, median ratio): kernels added in blocks of RepVGG 0.8 to
    0.9 (depthwise 0.6); ResNeXt of 32 branches of 4 channels 0.11 to 0.14, of 8 of 8 0.3, of 4 of 16 0.6, of 2 of 32
    0.9 to 1.0; stacked convolutions before a Concat 0.4 to 0.9; branches of MatMul 0.6 to 1.0. Grouped convolutions are
    slower where the channels of a group are no multiple of 16 and not much else is saved: with two added branches of 24
    channels 1.2, three concatenated 1.2, a Split into groups of 8 1.4. By default those stay.

    **Options:** `max_growth` (ratio, default 1.0): how many times the weights of the added convolutions their one
    kernel may have. `any_width` (boolean, default false): make grouped convolutions of any width.

    **Left alone, with the reason:** outputs whose sizes differ for some size of the input; taps that don't align or
    whose joint kernel costs more; a value inside a branch that something else reads; weights that others read; narrow
    groups; weights that would overflow, or lose bits in float16.

    **When not to use it:** before training goes on: the branches are what trains better.
    """

    name: ClassVar[str] = "merge-parallel-convs"
    family: ClassVar[str] = "fold"
    paper: ClassVar[str] = "Aggregated Residual Transformations for Deep Neural Networks"
    anchors: ClassVar[tuple[str, ...]] = ("Add", "Sum", "Concat")

    def __init__(self, max_growth: float = 1.0, any_width: bool = False) -> None:
        super().__init__()
        self.max_growth = max_growth
        self.any_width = any_width

    def rewrite(self, node: ir.Node, edit: Editor) -> bool:
        """See the class."""
        if node.op_type == "Concat":
            return self._concatenated(node, edit)
        output = node.outputs[0]
        if sole_reader(output) is None and any(
            is_op(use.node, "Add", "Sum") and use.node.graph is node.graph for use in output.uses()
        ):
            return False  # a part of a larger sum, at whose end all of it is looked at
        terms, sums = _terms(node)
        if sum(producer(term, "Conv", "MatMul") is not None for term in terms) == 0:
            return False
        done = self._kernels_added(node, terms, edit) or self._branches_added(node, terms, sums, edit)
        if done:  # what else was looked at is looked at again
            self.sites = [site for site in self.sites if site.outcome == "applied"]
        return done

    # ---- rule 1

    def _kernels_added(self, node: ir.Node, terms: list[ir.Value], edit: Editor) -> bool:
        by_input: dict[ir.Value, list[ir.Node]] = defaultdict(list)
        for term in terms:
            conv = producer(term, "Conv")
            if conv is not None and conv.graph is node.graph and (x := conv.inputs[0]) is not None:
                by_input[x].append(conv)
        scaled: dict[ir.Value, list[ir.Value]] = defaultdict(list)
        for term, count in Counter(terms).items():
            if count == 1:
                scaled[_scaled(term)].append(term)
        for x, convs in by_input.items():
            others = scaled.get(x, [])
            if len(convs) + len(others) < 2:
                continue
            found = [self._term(conv) for conv in convs]
            reasons = [term for term in found if isinstance(term, str)]
            known = [term for term in found if isinstance(term, _Term)]
            if known:
                known += self._scales(x, others, known[0].kernel, edit.opset)
            known.sort(key=lambda term: -term.kernel.size)
            group, kernel, why = self._largest_group(known, x)
            if kernel is None:
                if reasons + why and len(known) + len(reasons) > 1:
                    self.left(node, f"its convolutions of {x.name!r} aren't merged: {(reasons + why)[0]}")
                continue
            bias = np.sum([term.bias for term in group], axis=0)
            problem = kernel.problem() or overflow(bias, kernel.dtype)
            if problem is not None:
                self.left(node, f"its convolutions of {x.name!r} aren't merged: {problem}")
                continue
            with_bias = bias.any() or any(t.conv and len(t.conv.layer.node.inputs) > 2 for t in group)
            one = self.conv(x, kernel, bias if with_bias else None, group[0].value, edit)
            gone = [term.value for term in group]
            self.applied(node, f"{len(gone)} of its terms became one convolution of {x.name!r}: {kernel.describe()}")
            self._replace(node, terms, gone, one, edit)
            return True
        return False

    def _term(self, node: ir.Node) -> _Term | str:
        if (why := sole_reader(node.outputs[0])) is not None:
            return why
        conv = self.convolution(node)
        if isinstance(conv, str):
            return conv
        return conv.shared or _Term(node.outputs[0], conv.kernel, conv.bias, conv)

    def _scales(self, x: ir.Value, values: Sequence[ir.Value], like: Kernel, opset: int) -> list[_Term]:
        """The terms that are x times one number a channel, as kernels of size 1."""
        channels = like.shape[0]
        if like.inputs != channels or any(s != 1 for s in like.window.strides):
            return []
        result = []
        for value in values:
            affine = _affine(value, x, len(like.shape), opset)
            if affine is None or any(a.size not in (1, channels) for a in affine):
                continue
            scale, shift = (np.broadcast_to(a.reshape(-1), (channels,)) for a in affine)
            result.append(_Term(value, delta(scale, len(like.shape), like.dtype), shift))
        return result

    def _largest_group(self, terms: list[_Term], x: ir.Value) -> tuple[list[_Term], Kernel | None, list[str]]:
        """The first terms, in the order given, whose kernels may be added, their kernel, and why others may not."""
        why: list[str] = []
        for start, first in enumerate(terms):
            group, kernel = [first], first.kernel
            for term in terms[start + 1 :]:
                one = term.kernel
                if one.shape[0] != kernel.shape[0] or one.inputs != kernel.inputs or one.dtype != kernel.dtype:
                    continue
                if len(one.shape) != len(kernel.shape):
                    continue
                window = merged([kernel.window, one.window], self.sizes(x, len(one.shape)))
                if window is None:
                    why.append("their strides differ, or their sizes do for some size of the input")
                    continue
                both = added([kernel, one], window)
                if both.size > self.max_growth * (kernel.size + one.size):
                    ratio = both.size / (kernel.size + one.size)
                    why.append(
                        f"the one kernel would cost {ratio:.1f} times the operations of {kernel.describe()} "
                        f"and {one.describe()}"
                    )
                    continue
                group.append(term)
                kernel = both
            if len(group) > 1 and any(term.conv is not None for term in group):
                return group, kernel, why
        return [], None, why

    # ---- rules 2 and 3

    def _branches_added(self, node: ir.Node, terms: list[ir.Value], sums: list[ir.Node], edit: Editor) -> bool:
        ends: dict[tuple[object, ...], list[ir.Node]] = defaultdict(list)
        for term in terms:
            end = producer(term, "Conv", "MatMul")
            if end is not None and end.graph is node.graph and sole_reader(term) is None:
                ends[signature(term)].append(end)
        for group in ends.values():
            if len(group) < 2:
                continue
            branches = Branches(self, edit, sums, group[0].op_type == "MatMul", self.any_width)
            try:
                build = self._plan(branches, group)
            except NoBranches as reason:
                if str(reason):
                    self.left(node, f"its {len(group)} branches aren't merged: {reason}")
                continue
            gone = [end.outputs[0] for end in group]
            self.applied(node, f"{len(gone)} equal branches became one of their joint width")
            self._replace(node, terms, gone, build(), edit)
            return True
        return False

    def _plan(self, branches: Branches, group: list[ir.Node]) -> Callable[[], ir.Value]:
        if group[0].op_type == "MatMul":
            return branches.products(group)
        convs = [conv for end in group if isinstance(conv := self.convolution(end), Convolution)]
        first = convs[0].kernel if convs else None
        if first is None or len(convs) < len(group):
            raise NoBranches
        for kernel in (conv.kernel for conv in convs):
            if kernel.group > 1 or kernel.window != first.window or kernel.shape[0] != first.shape[0]:
                raise NoBranches
        return branches.convolutions(convs, [v for end in group if (v := end.inputs[0]) is not None])

    def _concatenated(self, node: ir.Node, edit: Editor) -> bool:
        axis = attribute_int(node, "axis", 1)
        values = [value for value in node.inputs if value is not None]
        rank = self.rank(node.outputs[0]) if axis is not None and axis < 0 else None
        if axis is None or len(values) < len(node.inputs):
            return False
        if axis < 0 and rank is not None:
            axis += rank
        runs: list[list[ir.Value]] = []
        signatures: list[tuple[object, ...]] = []
        for value in values:
            mark = signature(value)
            if runs and mark and mark == signatures[-1]:
                runs[-1].append(value)
            else:
                runs.append([value])
                signatures.append(mark)
        for index, run in enumerate(runs):
            last = not any(isinstance(s, tuple) and s[0] == "Conv" for s in signatures[index])
            if len(run) < 2 or (axis not in (-1, (self.rank(node.outputs[0]) or 0) - 1) if last else axis != 1):
                continue
            branches = Branches(self, edit, [node], last, self.any_width)
            try:
                build = branches.concatenation(run)
            except NoBranches as reason:
                if str(reason):
                    self.left(node, f"its {len(run)} equal branches aren't merged: {reason}")
                continue
            self.applied(node, f"{len(run)} equal branches became one of their joint width")
            one = build()
            rest = [v for r in [*runs[:index], [one], *runs[index + 1 :]] for v in r]
            if len(rest) > 1:
                one = edit.op("Concat", rest, {"axis": axis}, like=node.outputs[0])
            edit.replace(node.outputs[0], one)
            return True
        return False

    # ---- sums

    def _replace(
        self, node: ir.Node, terms: list[ir.Value], gone: Sequence[ir.Value], new: ir.Value, edit: Editor
    ) -> None:
        """Let the sum at `node` be that of its terms with `new` in the place of those that are gone."""
        removed = set(gone)
        rest = [new if term is gone[0] else term for term in terms if term is gone[0] or term not in removed]
        total = rest[0]
        for position, term in enumerate(rest[1:], 2):
            total = edit.op("Add", [total, term], like=node.outputs[0] if position == len(rest) else None)
            total.type = node.outputs[0].type
        edit.replace(node.outputs[0], total)


def _terms(root: ir.Node) -> tuple[list[ir.Value], list[ir.Node]]:
    """The terms of a sum in order, and its nodes: sums that nothing else reads are part of it."""
    terms: list[ir.Value] = []
    sums: list[ir.Node] = []
    pending: list[ir.Value | ir.Node] = [root]
    while pending:
        current = pending.pop()
        if isinstance(current, ir.Value):
            inner = producer(current, "Add", "Sum")
            if inner is None or inner.graph is not root.graph or sole_reader(current) is not None:
                terms.append(current)
                continue
            current = inner
        sums.append(current)
        pending.extend(value for value in reversed(current.inputs) if value is not None)
    return terms, sums


def _scaled(value: ir.Value) -> ir.Value:
    """The x of which `value` may be a multiple for each channel; `value` itself where it is no such node."""
    node = producer(value, "BatchNormalization", "Mul", "Div")
    if node is None or sole_reader(value) is not None:
        return value
    operands = [v for v in node.inputs[:2] if v is not None]
    if node.op_type != "Mul" or constant_array(operands[0]) is None:
        return operands[0]
    return operands[1]


def _affine(value: ir.Value, x: ir.Value, rank: int, opset: int) -> tuple[Numbers, Numbers] | None:
    """Scale and shift, one number a channel or one for all, by which `value` is made of `x`."""
    if value is x:
        return np.ones(1), np.zeros(1)
    node = producer(value, "BatchNormalization", "Mul", "Div")
    if node is None:
        return None
    if node.op_type == "BatchNormalization":
        affine = normalization(node, opset)
        return None if isinstance(affine, str) else (affine.scale, affine.shift)
    array = constant_array(node.inputs[1 if node.inputs[0] is x else 0])
    if (
        array is None
        or array.ndim > rank
        or any(n != 1 for i, n in enumerate(array.shape) if i != array.ndim - rank + 1)
    ):
        return None
    numbers = array.astype(np.float64)
    with np.errstate(divide="ignore"):
        scale = 1 / numbers if node.op_type == "Div" else numbers
    return (scale, np.zeros(1)) if np.isfinite(scale).all() else None
