"""rotate-residual: the residual stream, and the heads of the values, in a basis without outliers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.algebra import is_op
from graphopt.analysis.feature_space import NORMS, feature_spaces, normalizes_last
from graphopt.analysis.shapes import ShapeFacts, infer
from graphopt.graph.constants import constant_tensor
from graphopt.graph.edits import Editor, nodes, opset
from graphopt.passes.base import Guarantee, Pass
from graphopt.passes.fold.centring import set_constant
from graphopt.passes.fold.layers import Layer, layer_of
from graphopt.passes.quantize.channel_folds import ChannelFold, ChannelFolds, ReaderGroup, outputs_first
from graphopt.passes.quantize.factor_numbers import Numbers as FactorNumbers
from graphopt.passes.quantize.rotation_plan import RotationPlan, plan_rotation
from graphopt.passes.quantize.rotations import KINDS, Kind, Rotation, hadamard, orthogonal, random_rotation, rotated
from graphopt.runtime_ops.hadamard_transform.factors import hadamard_factor
from graphopt.runtime_ops.operator import DOMAIN, OLDEST_OPSET, add_body, operators

TRANSFORM = "HadamardTransform"


class RotateResidual(Pass):
    """Multiply the residual stream by a random orthogonal matrix, and weights by its inverse: the same function.

        x ← x Q:     E ← E Q,   W_out ← W_out Q,   b ← b Q     what writes the stream
                     W_in ← Qᵀ W_in                            what reads it, behind norms: n(x Q) = n(x) Q
        v ← v R:     W_v ← W_v R,   W_o ← Rᵀ W_o               every head of the values, through the attention

    A few channels of the stream are far larger than the others, and take the range of every token that is rounded.
    After a rotation by a Hadamard matrix all channels are alike.

    Papers: QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs; SpinQuant: LLM Quantization with Learned Rotations
    (whose rotations are learnt, these are random).

    1. The stream is a feature space: all values that additions, gathers and views connect. Every writer and every
       reader turns in its constants: tables, weights of MatMul, Gemm and Conv, biases, class tokens.
    2. An RMSNormalization commutes with Q where its gain is one number. fold-norm-affine moves gains into the layers
       behind, layer-norm-to-rms-norm makes such norms of LayerNormalization: run both before.
    3. A table that the embedding shares with the output layer turns as a whole where the last norm has no gain.
       Where it has one, the table stays, and both are rotated when the model runs: a MatMul behind the embedding and
       one before the last norm (`online`).
    4. `heads`: each head of the values is rotated by one more Q, through the attention; a cache then holds rotated
       values. `online_down`: a `HadamardTransform` is put before the last layer of each MLP, whose weights take its
       inverse: the products of gate and up have outliers of their own, which nothing linear makes.

    **Options:** `kind` (default "hadamard"): random signs and a Hadamard matrix of 2ᵏ·m rows (a random rotation of the
    odd part where there is none), or "orthogonal": any rotation; `seed` (default 0): of the signs, or of the rotation;
    `residual` (default true): rotate streams; `heads` (default true): rotate the heads of values; `online_down`
    (default false): rotate before the last layer of each MLP, when the model runs; `online` (default 2): rotations of
    a stream that may be computed when the model runs.

    **Needs:** for `online_down` opset 18. **Guarantees:** LOSSY by name only: outputs are the same up to rounding (each
    weight is turned in float64 and rounded once), but a cache of rotated values can't be continued from the original's.

    **Left alone, with the reason:** a stream that is read by more norms with gains, or LayerNormalizations, than
    `online` allows (post-norm networks); that an output of the graph or a subgraph reads; grouped convolutions; heads
    whose channels don't lie side by side.

    **When not to use it:** where a cache of the original model is to be continued; where the model is tied, norms have
    gains and every kilobyte counts: two matrices are added. Weights alone gain by it too, also where they have no
    outliers: SmolLM2-135M rounded to nearest in 4 bits and groups of 128 has a perplexity of 38.0 for 42.2 without
    (eight windows, 21.5 in floats).
    """

    name: ClassVar[str] = "rotate-residual"
    family: ClassVar[str] = "quantize"
    guarantee: ClassVar[Guarantee] = Guarantee.LOSSY
    paper: ClassVar[str] = "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs"

    def __init__(
        self,
        kind: str = "hadamard",
        seed: int = 0,
        residual: bool = True,
        heads: bool = True,
        online_down: bool = False,
        online: int = 2,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind is one of {', '.join(KINDS)}, not {kind!r}")
        self.kind, self.seed, self.online = kind, seed, online
        self.residual, self.heads, self.online_down = residual, heads, online_down

    def apply(self, model: ir.Model) -> bool:
        """See the class. A second run does nothing: it would rotate what is rotated already."""
        if model.graph.meta.get(self.name) == self.option_values():
            return False
        edit, changed = Editor(model), False
        if self.residual:
            changed |= self._streams(model, infer(model), edit)
        if self.heads or self.online_down:
            folds = ChannelFolds(model, infer(model))
            for group in folds.groups():
                if not isinstance(group, ReaderGroup):
                    continue
                if self.heads and group.roles == ["o"]:
                    changed |= self._heads(group, folds.fold(group), edit)
                if self.online_down and group.roles in (["down"], ["fc2"]):
                    changed |= self._down(group, edit)
        if changed:
            model.graph.meta[self.name] = self.option_values()
        return changed

    def _rotation(self, features: int) -> Rotation:
        kind: Kind = "hadamard" if self.kind == "hadamard" else "orthogonal"
        return random_rotation(features, kind, self.seed)

    # ---- the stream

    def _streams(self, model: ir.Model, facts: ShapeFacts, edit: Editor) -> bool:
        norms = [n for n in nodes(model) if is_op(n, *NORMS) and normalizes_last(n, facts)]
        changed = False
        for space in feature_spaces([(n.inputs[0], -1) for n in norms if n.inputs[0] is not None], facts):
            first = next((r.node for r in space.readers if r.kind == "norm" and r.node is not None), None)
            if first is None or not space.adds:
                continue
            plan = plan_rotation(space, facts, self.online)
            if isinstance(plan, str):
                self.left(first, plan)
                continue
            self._rotate(plan, facts, edit)
            detail = f"{len(plan.constants)} constants of a stream of {space.size} features rotated"
            if plan.why:
                detail += f", {len(plan.why)} rotations at run time ({'; '.join(plan.why)})"
            changed = self.applied(first, detail)
        return changed

    def _rotate(self, plan: RotationPlan, facts: ShapeFacts, edit: Editor) -> None:
        rotation = self._rotation(plan.space.size)
        for value, uses in plan.constants.items():
            tensor = constant_tensor(value)
            assert tensor is not None
            set_constant(value, [(u.node, u.index) for u in uses], rotated(tensor, uses[0].axis, rotation), edit)
        for value in plan.forth:
            self._at_run_time(value, [(use.node, use.idx) for use in value.uses()], rotation.matrix, facts, edit)
        back: dict[ir.Value, list[tuple[ir.Node, int]]] = {}
        for node, index in plan.back:
            read = node.inputs[index]
            assert read is not None
            back.setdefault(read, []).append((node, index))
        for value, readers in back.items():
            self._at_run_time(value, readers, rotation.matrix.T, facts, edit)

    def _at_run_time(
        self,
        value: ir.Value,
        readers: Sequence[tuple[ir.Node, int]],
        matrix: npt.NDArray[np.float64],
        facts: ShapeFacts,
        edit: Editor,
    ) -> None:
        inside = {node for node, _ in readers}
        graph = readers[0][0].graph
        assert graph is not None
        edit.at(next(node for node in graph if node in inside))
        dtype = facts.dtype(value) or value.dtype or ir.DataType.FLOAT
        turn = edit.constant(np.ascontiguousarray(matrix).astype(dtype.numpy()), "rotation")
        new = edit.op("MatMul", [value, turn], like=value)
        for node, index in readers:
            node.replace_input_with(index, new)

    # ---- heads

    def _heads(self, group: ReaderGroup, fold: ChannelFold | str, edit: Editor) -> bool:
        node = group.readers[0]
        if isinstance(fold, str):
            return self.left(node, f"its heads aren't rotated: {fold}")
        if not fold.linear or fold.depth < 2:
            return self.left(node, "its heads aren't rotated: something besides views lies between V and O")
        places: list[tuple[Layer, list[int]]] = []
        for taker in fold.takers:
            made, blocks = layer_of(taker.node), _blocks(taker.numbers, fold)
            if taker.index >= 0 or isinstance(made, str) or blocks is None:
                return self.left(node, "its heads aren't rotated: the channels of a head of V don't lie side by side")
            places.append((made, blocks))
        own = _blocks(fold.numbers, fold)
        if own is None:
            return self.left(node, "its heads aren't rotated: the channels of a head don't lie side by side before O")
        rotation = self._rotation(fold.depth)
        for layer, blocks in places:
            _turn(layer.node, 1, -2 if outputs_first(layer) else -1, rotation, blocks, edit)
            if layer.add is not None:
                index = next(i for i, v in enumerate(layer.add.inputs) if constant_tensor(v) is not None)
                _turn(layer.add, index, -1, rotation, blocks, edit)
            elif len(layer.node.inputs) > 2 and layer.node.inputs[2] is not None:
                _turn(layer.node, 2, -1, rotation, blocks, edit)
        for layer in group.layers():
            _turn(layer.node, 1, -1 if outputs_first(layer) else -2, rotation, own, edit)
        return self.applied(node, f"heads of {fold.depth} rotated" + ", and its cache" * fold.cached)

    # ---- before the last layer of an MLP

    def _down(self, group: ReaderGroup, edit: Editor) -> bool:
        node = group.readers[0]
        if opset(edit.model) < OLDEST_OPSET:
            return self.left(node, f"{TRANSFORM} needs opset {OLDEST_OPSET}")
        layer, size = group.layers()[0], group.channels
        # The operator makes H x of x, here x Hᵀ of rows.
        rotation = Rotation(orthogonal(hadamard(size).astype(np.float64)).T)
        _turn(node, 1, -1 if outputs_first(layer) else -2, rotation, None, edit)
        add_body(edit.model, TRANSFORM)
        edit.at(node)
        attributes = operators()[TRANSFORM].attributes_of(group_size=size, scale=size**-0.5)
        factor = edit.constant(hadamard_factor(size), "factor")
        turned = edit.op(TRANSFORM, [group.x, factor], attributes, domain=DOMAIN, like=group.x)
        edit.set_input(node, 0, turned)
        return self.applied(node, f"a Hadamard transform of {size} features before it")


def _blocks(numbers: FactorNumbers, fold: ChannelFold) -> list[int] | None:
    """Which blocks of `depth` channels are heads, each in order; None where the channels of one lie apart."""
    depth = fold.depth
    if len(numbers) % depth:
        return None
    rows = numbers.reshape(-1, depth)
    heads = [index for index, row in enumerate(rows) if (row < fold.count).any()]
    whole = all((rows[i] == rows[i, 0] + np.arange(depth)).all() and rows[i, 0] % depth == 0 for i in heads)
    return heads if whole else None


def _turn(node: ir.Node, index: int, axis: int, rotation: Rotation, blocks: list[int] | None, edit: Editor) -> None:
    """Rotate blocks of a constant along an axis."""
    value = node.inputs[index]
    tensor = constant_tensor(value)
    assert value is not None
    assert tensor is not None
    set_constant(value, [(node, index)], rotated(tensor, axis, rotation, blocks), edit, "rotated")
