"""layer-norm-to-rms-norm: where the residual stream can be kept centred, LayerNorm is RMSNorm."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from graphopt.analysis.algebra import is_op
from graphopt.analysis.feature_space import FeatureSpace, feature_spaces, normalizes_last
from graphopt.analysis.shapes import ShapeFacts
from graphopt.graph.constants import constant_array
from graphopt.graph.edits import Editor, opset, walk
from graphopt.passes.base import Pass
from graphopt.passes.fold.centring import Plan, centre, described, plan_centring


class LayerNormToRmsNorm(Pass):
    """Re-centre everything that is written into a residual stream, and turn its LayerNorms into RMSNorms.

        LayerNorm(x) = γ · (x − μ) / √(mean((x − μ)²) + ε) + β        μ = mean(x)
        x − μ = x where every writer of x is centred:  W ← W − mean_out(W),  b ← b − mean(b),  E ← E − mean(E)
        LayerNorm(x) = RMSNorm(x; γ, ε) + β                           then, exactly

    Paper: Pre-RMSNorm and Pre-CRMSNorm Transformers: Equivalent and Efficient Pre-LN Transformers.

    LayerNorm doesn't see the mean of its input, so no one may write it. The stream is found by dataflow (its *feature
    space*: all values connected by operators that treat features alike), not by names:

    1. Readers: every one must be a LayerNormalization over the features.
    2. Writers: weights of MatMul, Gemm and Conv, biases, tables of embeddings and positions, class tokens are
       re-centred where they are stored. A writer that no constant makes (an activation, a graph input) or whose table
       is tied to an lm_head is centred by a ReduceMean and a Sub; at most one such for every four norms.
    3. Each norm becomes `RMSNormalization`; a bias β that isn't zero stays as an Add behind it.

    **Options:** `min_norms` (default 2): a stream that fewer norms read is left alone. `add_bias` (default true): take
    norms with a bias too; false in recipes that run `fold-norm-affine` before, where the Add would cost what the norm
    gains.

    **Needs:** opset 23; sizes of the features. **Guarantees:** the same function; weights are centred in float64 and
    rounded once, large ones when they are saved.

    **Left alone, with the reason:** a stream that something else reads, or that is an output of the graph (the mean is
    then seen); post-LN, whose norms write what linear layers read; grouped convolutions as writers; quantized weights.

    Measured on ONNX Runtime 1.31, one CPU thread: `RMSNormalization` takes 0.5 to 0.8 of the time of
    `LayerNormalization` (16 to 512 tokens of width 384 to 2048).

    **When not to use it:** where hidden states are to be read from the stream later, or for a runtime without
    `RMSNormalization` (opset below 23).
    """

    name: ClassVar[str] = "layer-norm-to-rms-norm"
    family: ClassVar[str] = "fold"
    paper: ClassVar[str] = "Pre-RMSNorm and Pre-CRMSNorm Transformers: Equivalent and Efficient Pre-LN Transformers"

    opset: ClassVar[int] = 23

    def __init__(self, min_norms: int = 2, add_bias: bool = True) -> None:
        super().__init__()
        self.min_norms = min_norms
        self.add_bias = add_bias

    def apply(self, model: ir.Model) -> bool:
        """See the class."""
        facts = ShapeFacts(model)
        norms = [n for g in walk(model) for n in g if is_op(n, "LayerNormalization") and normalizes_last(n, facts)]
        if not norms:
            return False
        seeds = [(norm.inputs[0], -1) for norm in norms if norm.inputs[0] is not None]
        edit = Editor(model)
        changed = False
        for space in feature_spaces(seeds, facts):
            changed |= self._rewrite(space, model, edit)
        return changed

    def _rewrite(self, space: FeatureSpace, model: ir.Model, edit: Editor) -> bool:
        norms = [r.node for r in space.readers if r.kind == "norm" and r.node is not None]
        norms = [norm for norm in norms if is_op(norm, "LayerNormalization")]
        plan = self.plan(space, norms, model)
        if isinstance(plan, str):
            for norm in norms:
                self.left(norm, plan)
            return False
        self.carry_out(plan, norms, edit)
        return True

    def carry_out(self, plan: Plan, norms: list[ir.Node], edit: Editor) -> None:
        """Centre the writers and replace the norms."""
        centre(plan, edit)
        for norm in norms:
            self._replace(norm, edit)

    def plan(self, space: FeatureSpace, norms: list[ir.Node], model: ir.Model) -> Plan | str:
        """How the space of these norms is centred, or why it can't be."""
        if space.conflict is not None:
            return space.conflict
        for reader in space.readers:
            if reader.node not in norms:
                return f"the mean of {reader.value.name!r} is seen by {described(reader.node)}"
        if len(norms) < self.min_norms:
            return f"only {len(norms)} norm reads the stream (min_norms {self.min_norms})"
        for norm in norms:
            if any(out.uses() or out.is_graph_output() for out in norm.outputs[1:]):
                return f"the mean or deviation that {norm.name!r} gives out is used"
            if any(a.is_ref() for a in norm.attributes.values()):
                return f"{norm.name!r} takes an attribute from the function that it is in"
            if not self.add_bias and has_bias(norm):
                return f"the bias of {norm.name!r} would stay as an Add: run fold-norm-affine first, or set add_bias"
        if opset(model) < self.opset:
            return f"needs opset {self.opset}, the model has {opset(model)}: run convert-opset first"
        plan = plan_centring(space)
        if isinstance(plan, Plan) and len(plan.at_run_time) > len(norms) // 4:
            writer = plan.at_run_time[0]
            what = described(writer.value.producer() or writer.node)
            return (
                f"{len(plan.at_run_time)} of its {len(space.writers)} writers, for example {what}, would have to be "
                f"centred at run time, for {len(norms)} norms"
            )
        return plan

    def _replace(self, norm: ir.Node, edit: Editor) -> None:
        edit.at(norm)
        x, gain = norm.inputs[:2]
        bias = norm.inputs[2] if has_bias(norm) else None
        epsilon = norm.attributes.get_float("epsilon", 1e-5)
        old = norm.outputs[0]
        stash = norm.attributes.get_int("stash_type", 1)
        new = edit.op("RMSNormalization", [x, gain], {"axis": -1, "epsilon": epsilon, "stash_type": stash}, like=old)
        if bias is not None:
            new = edit.op("Add", [new, bias], like=old)
        self.applied(norm, f"RMSNormalization of a centred stream, ε = {epsilon:.6g}")
        edit.replace(old, new)


def has_bias(norm: ir.Node) -> bool:
    """Whether a LayerNormalization adds a bias that isn't zero."""
    if len(norm.inputs) < 3 or norm.inputs[2] is None:
        return False
    array = constant_array(norm.inputs[2])
    return array is None or bool(array.any())
