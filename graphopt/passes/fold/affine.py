"""fold-affine: constant scales and shifts go into the layers beside them."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.algebra import is_op, producer, users
from graphopt.graph.constants import is_constant
from graphopt.graph.edits import Editor
from graphopt.passes.fold.channel_affine import (
    Affine,
    Change,
    added_columns,
    constant_operand,
    is_swallowed,
    rank_of,
    read,
    replace,
    rounded_to,
    same_axis,
)
from graphopt.passes.fold.layers import LAYERS, Layer, layer_of, sole_reader_of_numbers
from graphopt.passes.fold.neighbours import AffinePass, Neighbours, is_product

_VIEWS = ("Transpose", "Reshape", "RotaryEmbedding", "Expand", "Identity")
_NEAR = 8
"""Views looked through between a scale and a product."""


class FoldAffine(AffinePass):
    """Fold multiplications and additions of constants into the weights and bias of the layer before or behind them.

        y = s ⊙ x + t, with one s and t for each channel, or one for all of them
        before:   s·(W x + b) + t = (s·W) x + (s·b + t)
        behind:   W (s·x + t) + b = (W·s) x + (b + Σ W·t)

    What this meets in networks: LayerScale, x + γ·f(x) (Going Deeper with Image Transformers, 2021); the learned
    residual scalars of LAuReL, α·f(x) + g(x) (LAuReL: Learned Augmented Residual Layer, 2024); the gain and bias of
    element-wise norms, γ·tanh(αx) + β (Transformers without Normalization, 2025); the ÷ 6 of a hard swish; means and
    deviations of the input; scales 1/√d of queries.

    1. Mul, Div, Add or Sub with such a constant behind a MatMul of any rank (with or without a bias Add), Gemm, Conv
       or ConvTranspose, which nothing else reads: into that layer.
    2. The same before layers alone: into all of them. A shift not into a Conv that pads, nor where it would become
       additions of more numbers than before, behind MatMuls without bias.
    3. A scale, then a shift that can't go behind: s·x + t = s·(x + t/s), and the scale goes into the layers alone.
    4. Two Mul or Div, or two Add or Sub, in a row: one.

    Between the two may stand what only moves numbers (Transpose, Reshape, Slice, Gather, Split, Concat of layers'
    outputs), pooling, and Relu and LeakyRelu for scales not below 0 without shift.

    **Needs:** constant weights; float64, float32, float16 or bfloat16. The rank where the constant has more axes than
    one. **Guarantees:** the same function: the new weights are computed in float64 and rounded once. Large ones are
    computed when they are saved.

    **Left alone, with the reason:** a value between the two that something else reads, or that is a graph output;
    weights that three or more nodes share (with two, one copy is made at most); a division by 0; weights that would
    overflow or lose bits in float16; an ε that the bias or the other constant would swallow (`Log(x + 1e-10)` needs its
    1e-10); the end of a GELU or a normalization that is still written out, because runtimes fuse the whole of it (run
    `raise-gelu`, `raise-layer-norm` and `raise-rms-norm` first). A multiplication by 0, which isn't 0 for every x, is
    no scale. What has no layer near isn't reported, such as scale and shift of a pre-activation residual unit, which
    read a sum and feed an activation.

    Measured on ONNX Runtime 1.31 (CPU time, one thread, interleaved, median ratio to the default recipe without it, two
    runs on a busy machine): PP-OCRv4 detector 0.87, recognizer 0.84 and 0.90, PicoDet layout 0.86, PP-OCR direction
    classifier 0.93 and 1.01; PP-LCNet, where one site folds, 1.00. An A/A control gave 0.95 to 1.02.

    **Options:** `attention` (boolean, default False): also fold the scale of attention scores, or of the queries or
    keys, into their projection: through the product of queries and keys, Transpose, Reshape and RotaryEmbedding.

    **When not to use it:** `attention` for ONNX Runtime, which takes that scale, and a transpose of the keys with it,
    into its own `FusedMatMul` at no cost. Without the scale it does not: all-MiniLM-L6 took 0.95 to 1.04 of the time
    in four exports and three sizes, one thread.
    """

    name: ClassVar[str] = "fold-affine"
    family: ClassVar[str] = "fold"
    paper: ClassVar[str] = "LAuReL: Learned Augmented Residual Layer"
    anchors: ClassVar[tuple[str, ...]] = ("Mul", "Div", "Add", "Sub")

    def __init__(self, attention: bool = False) -> None:
        super().__init__()
        self.attention = attention

    def rewrite(self, node: ir.Node, edit: Editor) -> bool:
        """See the class."""
        found = read(node, self)
        if found is None or (is_op(node, "Add") and isinstance(layer_of(node), Layer)):
            return False  # the bias of a layer is where it belongs
        x, affine = found
        if not affine.scale.any():
            return False
        if not self.attention and _scales_attention(node, x):
            return self.left(
                node, "it scales attention, which ONNX Runtime's fusions take for free: the option `attention` is off"
            )
        if (formula := _formula(x)) is not None:
            return self.left(node, f"it ends a {formula} that is written out, which runtimes know as one operator")
        neighbours = Neighbours(self, products=self.attention)
        before = neighbours.before(x, affine, node.graph)
        if not isinstance(before, str) and _moves_bias(x, before):
            before = "the shift would become an addition to more numbers than it has now"
        if not isinstance(before, str):
            replace(node, x, before, edit)
            return self.applied(node, f"folded into {', '.join(c.layer.name for c in before)} before it")
        behind = self._behind(node, x, affine, neighbours)
        if not isinstance(behind, str):
            replace(node, x, behind, edit)
            return self.applied(node, f"folded into {', '.join(c.layer.name for c in behind)} behind it")
        if self._swapped(node, x, affine, neighbours, edit):
            return True
        merged = self._merged(node, x, affine)
        if not isinstance(merged, str):
            first = x.producer()
            assert first is not None
            self.applied(node, f"merged with {first.op_type} {first.name!r}")
            inputs = [merged[0], edit.constant(merged[1], "merged")]
            op_type = "Mul" if is_op(node, "Mul", "Div") else "Add"
            edit.replace(node.outputs[0], edit.op(op_type, inputs, like=node.outputs[0]))
            return True
        if any(is_op(user, *LAYERS) and is_constant(user.inputs[1]) for user, _ in node.outputs[0].uses()):
            behind = f"behind it: {behind}"
        else:
            behind = ""  # no layer is near
        reasons = [f"before it: {before}" if before else "", behind, merged]
        return self.left(node, "; ".join(filter(None, reasons))) if any(reasons) else False

    def _behind(self, node: ir.Node, x: ir.Value, affine: Affine, neighbours: Neighbours) -> list[Change] | str:
        """What all layers behind become, or why not."""
        shape = self.shape(x)
        if affine.size > 1 and (shape is None or shape[affine.axis] != affine.size):
            return f"its input isn't known to have {affine.size} channels"
        changes = neighbours.behind(node.outputs[0], affine, node.graph)
        if not isinstance(changes, str) and added_columns(changes) > max(c.layer.inputs for c in changes):
            return "the shift would become additions to more numbers than it has now"
        return changes

    def _swapped(self, node: ir.Node, x: ir.Value, affine: Affine, neighbours: Neighbours, edit: Editor) -> bool:
        """Rule 3: s·z + t = s·(z + t/s), so that the scale reaches the layers that the shift can't go into."""
        first = x.producer()
        found = None if first is None else read(first, self)
        if first is None or found is None or not is_op(node, "Add", "Sub") or (affine.scale != 1).any():
            return False
        z, scale = found
        if not is_op(first, "Mul", "Div") or first.graph is not node.graph or sole_reader_of_numbers(x) is not None:
            return False
        if not self._along(scale, affine, x) or not (np.isfinite(scale.scale) & (scale.scale != 0)).all():
            return False
        shift = rounded_to(affine.shift / scale.scale, constant_operand(node).dtype)
        changes = "" if shift is None else self._behind(node, z, scale, neighbours)
        if shift is None or isinstance(changes, str):
            return False
        self.applied(node, f"the scale before it folded into {', '.join(c.layer.name for c in changes)} behind it")
        moved = edit.op("Add", [z, edit.constant(self._shaped(shift, first, node), "shift")], like=node.outputs[0])
        for change in changes:
            change.apply(edit)
        edit.at(node)
        edit.replace(node.outputs[0], moved)
        return True

    def _along(self, a: Affine, b: Affine, value: ir.Value) -> bool:
        """Whether two maps on `value` have their channels along the same axis."""
        if a.size == 1 or b.size == 1:
            return True
        return a.size == b.size and same_axis(a.axis, b.axis, rank_of(value, self))

    @staticmethod
    def _shaped(numbers: npt.NDArray[Any], *nodes: ir.Node) -> npt.NDArray[Any]:
        """`numbers` in the shape of that constant of the nodes that has so many."""
        if numbers.size == 1:
            return numbers.reshape(())
        return numbers.reshape(next(t.shape.numpy() for t in map(constant_operand, nodes) if t.size == numbers.size))

    def _merged(self, node: ir.Node, x: ir.Value, affine: Affine) -> tuple[ir.Value, npt.NDArray[Any]] | str:
        """The operand and the constant of the one operator that `node` and the one before it are, or why not.

        Nothing where they are no two of a kind.
        """
        first = x.producer()
        found = None if first is None else read(first, self)
        if first is None or found is None or first.graph is not node.graph or sole_reader_of_numbers(x) is not None:
            return ""
        z, inner = found
        kinds = [(a.scale == 1).all() if is_op(n, "Add", "Sub") else None for n, a in ((first, inner), (node, affine))]
        if kinds[0] != kinds[1] or False in kinds:
            return ""
        if not self._along(inner, affine, x):
            return ""
        total, dtype = inner.then(affine), constant_operand(node).dtype
        numbers = total.scale if kinds[0] is None else total.shift
        rounded = rounded_to(numbers, dtype)
        if rounded is None:
            return "" if not np.isfinite(numbers).all() else f"its constant and the one before would leave {dtype.name}"
        pair = (inner.shift, affine.shift)
        if kinds[0] and (is_swallowed(*pair, dtype) or is_swallowed(*pair[::-1], dtype)):
            return "one of the two constants would swallow the other"
        return z, self._shaped(rounded, first, node)


def _formula(x: ir.Value) -> str | None:
    """The formula that a constant behind `x` is the end of: ½·(v·(1 + erf …)), or v/√… with gain and bias."""
    product = producer(x, "Mul", "Div")
    if product is None:
        return None
    factor = next((v for v in product.inputs if is_constant(v)), None)
    if factor is not None:  # the gain, where the constant behind it is the bias
        product = next((made for v in product.inputs if (made := producer(v, "Mul", "Div")) is not None), None)
    for operand in () if product is None else product.inputs:
        if producer(operand, "Sqrt", "Reciprocal", "Pow") is not None:
            return "normalization"
        total = producer(operand, "Add")
        if total is not None and any(producer(v, "Erf", "Tanh") is not None for v in total.inputs):
            return "GELU"
    return None


def _moves_bias(x: ir.Value, changes: list[Change]) -> bool:
    """Whether a layer without bias gets one at another place than where the shift is now."""
    return any(added_columns([change]) and change.layer.output is not x for change in changes)


def _scales_attention(node: ir.Node, x: ir.Value) -> bool:
    """Whether `node` scales a product of two computed matrices, or one of its factors."""
    if is_op(node, "Add", "Sub"):
        return False
    below: ir.Value | None = x
    for _ in range(_NEAR):
        made = None if below is None else below.producer()
        if made is None or not is_op(made, *_VIEWS):
            break
        below = made.inputs[0]
    made = None if below is None else below.producer()
    if made is not None and is_product(made):
        return True
    values = [node.outputs[0]]
    for value in values:
        for user in users(value):
            if is_product(user) or is_op(user, "Attention"):
                return True
            if is_op(user, *_VIEWS) and len(values) < _NEAR:
                values.append(user.outputs[0])
    return False
