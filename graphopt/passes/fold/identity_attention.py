"""remove-identity-attention: an attention in which each token sees itself alone does nothing."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analysis.algebra import attribute_int, cast_target, is_op, producer, same, source
from graphopt.analysis.bounds import Bounds
from graphopt.analysis.diagonal import Diagonals
from graphopt.analysis.shapes import Shape
from graphopt.graph.constants import constant_array, scalar
from graphopt.graph.edits import Editor
from graphopt.passes.clean.eliminate_common_subexpressions import is_random
from graphopt.passes.raise_.shape_rules import ShapeRulePass

GAP = 2000.0
"""exp(-746) is 0 in float64, exp(-104) in float32; a score so far below the largest leaves room for rounding."""
_DEEPEST = 12


@dataclasses.dataclass(frozen=True)
class _Gap:
    """Scores under a mask.

    Attributes:
        least: How far each score off the diagonal is below the one on it; inf where a mask sets it to -inf.
        size: The value whose last two axes are the square of the mask.
        others: What is added to the scores besides, or what the mask was laid upon.
    """

    least: float
    size: ir.Value
    others: tuple[ir.Value, ...]


class RemoveIdentityAttention(ShapeRulePass):
    """Replace the output of an attention by its values where the probabilities are the identity, or a single one.

        softmax(S + M) = I      where M is 0 on the diagonal and -inf elsewhere, so   softmax(S + M)·V = V
        softmax(s) = 1          over one key, so                                      softmax(s)·V = V for each query

    Queries, keys, scores and mask die with it. Paper: MLP Can Be A Good Transformer Learner, whose training turns the
    attention of the lower blocks into the identity; the value and output projections that remain are two linear layers
    in a row (`merge-linears`).

    The rules:

    1. MatMul of a Softmax and V, the mask added (Add) or chosen (Where), under a scale, casts, an inference Dropout or
       the guard `Where(IsNaN(p), 0, p)`. The mask is a constant or made at run time: EyeLike, a range compared with
       itself as a column, and arithmetic on these. MatMul of an identity matrix is the same case without a softmax.
    2. The same for large negative numbers instead of -inf where it is proven that no score can make up for them: the
       scores are bounded because they come from a normalization, Tanh, Sigmoid, Clip, ... and constant weights.
    3. MatMul of a Softmax over an axis of one element.
    4. `Attention` (opset 23 and later) with such a mask.

    **Needs:** shapes that show that the output has the shape of V. **Guarantees:** the same numbers where scores and
    values are finite. A NaN or an infinity of one token no longer reaches the others: 0 · inf is NaN in the softmax's
    product and doesn't occur here. A query that a further mask forbids every key, whose probabilities would be NaN,
    gets its own value; where the graph guards against that NaN, the site is left alone.

    **Left alone, with the reason:** finite masks without a bound of the scores; a mask with NaN on its diagonal
    ((1 - I) · -inf is 0 · inf there); a mask that could be 1 x 1 and widened; an output that isn't known to have the
    shape of V (grouped heads, batches that are broadcast); an `Attention` that also keeps a cache, gives out its
    scores, or caps them after the mask.

    **When not to use it:** never on inference graphs.
    """

    name: ClassVar[str] = "remove-identity-attention"
    family: ClassVar[str] = "fold"
    paper: ClassVar[str] = "MLP Can Be A Good Transformer Learner"
    anchors: ClassVar[tuple[str, ...]] = ("MatMul", "Attention")

    def prepare(self, model: ir.Model, edit: Editor) -> None:
        """Know nothing yet."""
        super().prepare(model, edit)
        self._bounds, self._diagonals = Bounds(self._facts), Diagonals(self._facts)

    def rewrite(self, node: ir.Node, edit: Editor) -> bool:
        """See the class."""
        if node.op_type == "Attention":
            return self._attention(node, edit)
        for index in (0, 1):
            matrix, other = node.inputs[index], node.inputs[1 - index]
            if matrix is None or other is None:
                return False
            found = self._identity(matrix, edit.opset)
            if found is None and index == 0:
                found = self._one_key(matrix, edit.opset)
                if found == "":
                    return self._single(node, matrix, other, edit)
            if found is None:
                continue
            if found:
                return self.left(node, found)
            if not self._same_shape(node.outputs[0], matrix, other):
                return self.left(node, "its output isn't known to have the shape of the values")
            self.applied(node, "removed: the matrix is the identity")
            edit.replace(node.outputs[0], other)
            return True
        return False

    # ---- what is the identity: "" yes, a reason, or None for something else

    def _identity(self, matrix: ir.Value, opset: int) -> str | None:
        two = self._diagonals.of(matrix)
        if two is not None and two[0] == 1 and two[1] == 0:
            return ""
        softmax, guarded = self._softmax(matrix, opset)
        if softmax is None or softmax.inputs[0] is None:
            return None
        gap = self._gap(softmax.inputs[0])
        if gap is None or isinstance(gap, str):
            return gap
        if not self._is_square(softmax.inputs[0], gap.size):
            return "the mask may be smaller than the scores and widened"
        if gap.least < GAP:
            return (
                f"the mask lowers other tokens by {gap.least:.3g} at least, which is too little to make them 0 exactly"
            )
        if guarded and not all(map(self._finite, gap.others)):
            return "guarded against NaN, and another mask could forbid a token to see itself"
        return ""

    def _one_key(self, matrix: ir.Value, opset: int) -> str | None:
        softmax, guarded = self._softmax(matrix, opset)
        shape = None if softmax is None else self._facts.shape(softmax.inputs[0])
        if softmax is None or softmax.inputs[0] is None or shape is None or shape[-1].value != 1:
            return None
        if guarded and not self._finite(softmax.inputs[0]):
            return "guarded against NaN, and a mask could forbid the one key"
        return ""

    def _softmax(self, value: ir.Value, opset: int) -> tuple[ir.Node | None, bool]:
        """The Softmax over the last axis that `value` holds, and whether the graph makes a NaN of it 0."""
        guarded = False
        for _ in range(_DEEPEST):
            value = source(value)
            node = value.producer()
            if node is None or not is_op(node, "Softmax", "Where", "Dropout", "Cast"):
                break
            if node.op_type == "Softmax":
                axis = attribute_int(node, "axis", -1 if opset >= 13 else 1)
                shape = self._facts.shape(node.inputs[0])
                last = axis == -1 or (shape is not None and axis == len(shape) - 1)
                return (node if last else None), guarded
            kept = node.inputs[0]
            if node.op_type == "Where" and (test := producer(node.inputs[0], "IsNaN")) is not None:
                kept = node.inputs[2]
                if scalar(node.inputs[1]) != 0.0 or not same(test.inputs[0], kept):
                    break
                guarded = True
            elif node.op_type == "Dropout":
                if is_random(node, opset) or value is not node.outputs[0]:
                    break
            elif node.op_type == "Cast" and not (cast_target(node) or ir.DataType.INT8).is_floating_point():
                break
            if kept is None:
                break
            value = kept
        return None, False

    # ---- masks

    def _gap(self, value: ir.Value, depth: int = 0) -> _Gap | str | None:
        """How a mask lowers the scores off the diagonal; a reason, or None where there is no such mask."""
        node = source(value).producer()
        if node is None or depth > _DEEPEST or not is_op(node, "Where", "Add", "Mul", "Div", "Cast"):
            return None
        if node.op_type == "Where":
            return self._chosen(node)
        if node.op_type == "Add":
            return self._added(node, depth)
        inner = node.inputs[0]
        if inner is None:
            return None
        factor = 1.0
        if node.op_type != "Cast":
            number = scalar(node.inputs[1])
            if number is None and node.op_type == "Mul":
                number, inner = scalar(inner), node.inputs[1]
            if number is None or number <= 0 or inner is None:
                return None
            factor = number if node.op_type == "Mul" else 1 / number
        elif not (cast_target(node) or ir.DataType.INT8).is_floating_point():
            return None
        found = self._gap(inner, depth + 1)
        return dataclasses.replace(found, least=found.least * factor) if isinstance(found, _Gap) else found

    def _chosen(self, node: ir.Node) -> _Gap | str | None:
        """Where(mask, scores, low), or with mask and branches the other way round."""
        condition, *branches = node.inputs
        two = self._diagonals.of(condition)
        if condition is None or two is None or bool(two[0]) == bool(two[1]):
            return None
        scores, low = branches if two[0] else branches[::-1]
        lowest = self._diagonals.of(low)
        if scores is None or lowest is None or math.isnan(lowest[1]):
            return None
        if lowest[1] == -np.inf:
            return _Gap(math.inf, condition, (scores,))
        bound = self._bounds.of(scores)
        if bound is None:
            return f"the mask is {float(lowest[1]):.3g} and not -inf, and nothing bounds the scores"
        return _Gap(-float(lowest[1]) - bound, condition, (scores,))

    def _added(self, node: ir.Node, depth: int) -> _Gap | str | None:
        for mask, scores in (node.inputs, node.inputs[::-1]):
            if mask is None or scores is None:
                return None
            two = self._mask(mask)
            if two is None or two[0] == two[1]:
                continue
            if math.isnan(two[0]) and two[1] == -np.inf:
                return "the mask has NaN on its diagonal: 0 times an infinity"
            if not math.isfinite(two[0]):
                continue
            if two[1] == -np.inf:
                return _Gap(math.inf, mask, (scores,))
            if two[1] > two[0] or math.isnan(two[1]):
                continue
            bound = self._bounds.of(scores)
            if bound is None:
                return f"the mask is {two[1]:.3g} and not -inf, and nothing bounds the scores"
            return _Gap(two[0] - two[1] - 2 * bound, mask, (scores,))
        reason = None
        for inner, added in (node.inputs, node.inputs[::-1]):
            found = None if inner is None else self._gap(inner, depth + 1)
            if isinstance(found, _Gap) and added is not None:
                bound = 0.0 if math.isinf(found.least) else self._bounds.of(added)
                if bound is None:
                    return f"the mask isn't -inf, and nothing bounds what {node.op_type} {node.name!r} adds"
                return _Gap(found.least - 2 * bound, found.size, (*found.others, added))
            reason = reason or found
        return reason

    def _mask(self, value: ir.Value) -> tuple[float, float] | None:
        """The number on the diagonal and the other; of a constant that is -inf elsewhere, any on the diagonal."""
        two = self._diagonals.of(value)
        if two is not None:
            return float(two[0]), float(two[1])
        array = constant_array(value, 1 << 24)
        if array is None or array.ndim < 2 or array.shape[-1] != array.shape[-2] or array.shape[-1] < 2:
            return None
        if array.dtype.kind != "f" or array.size == 0 or array.reshape(-1)[1] != -np.inf:
            return None
        here = np.eye(array.shape[-1], dtype=bool)
        fits = bool((np.isneginf(array) | here).all()) and bool(np.isfinite(array[..., here]).all())
        return (0.0, -math.inf) if fits else None

    def _is_square(self, scores: ir.Value, mask: ir.Value) -> bool:
        """Whether the scores have the two axes of the mask, and not more because it is 1 x 1."""
        size, shape = self._diagonals.size(mask), self._facts.shape(scores)
        if size is None:
            return False
        # Where both are 1 x 1 the one probability is 1.
        return size.low >= 2 or (shape is not None and shape[-2:] == (size, size))

    def _finite(self, value: ir.Value) -> bool:
        """Whether a value is a product, scaled at most, into which no mask enters."""
        for _ in range(_DEEPEST):
            node = source(value).producer()
            if node is None:
                return False
            if node.op_type in ("MatMul", "Gemm", "Einsum") and node.domain == "":
                return True
            others = [v for v in node.inputs if v is not None and scalar(v) is None]
            if not is_op(node, "Mul", "Div", "Cast") or len(others) != 1:
                return False
            value = others[0]
        return False

    # ---- shapes

    def _same_shape(self, output: ir.Value, matrix: ir.Value, other: ir.Value) -> bool:
        """Whether the product with the identity `matrix` has the shape of `other`."""
        wanted, made, square = (self._facts.shape(value) for value in (other, output, matrix))
        # Where one size is the mask's and the other the sequence's, a run in which they differ fails at the product.
        if square is not None and len(square) == 2:
            return True
        if wanted is None or wanted == made:
            return wanted is not None
        return square is not None and len(wanted) >= 2 and _fits(square[:-2], wanted[:-2])

    def _single(self, node: ir.Node, matrix: ir.Value, values: ir.Value, edit: Editor) -> bool:
        """Let each query have the one value."""
        wanted, made = self._facts.shape(node.outputs[0]), self._facts.shape(values)
        if made is not None and wanted == made:
            self.applied(node, "removed: there is one key")
            edit.replace(node.outputs[0], values)
            return True
        sizes = None if wanted is None else [dim.value for dim in wanted]
        if sizes is None or made is None or len(made) < 2 or None in sizes:
            return self.left(node, "there is one key, but the shape of the output isn't known")
        self.applied(node, "there is one key: its value for every query")
        target = edit.constant(np.array(sizes, dtype=np.int64), "shape")
        edit.replace(node.outputs[0], edit.op("Expand", [values, target], like=node.outputs[0]))
        return True

    # ---- ai.onnx Attention

    def _attention(self, node: ir.Node, edit: Editor) -> bool:
        values = node.inputs[2] if len(node.inputs) > 2 else None
        mask = node.inputs[3] if len(node.inputs) > 3 else None
        keys = self._facts.shape(node.inputs[1]) if len(node.inputs) > 1 else None
        if values is None or any(a.is_ref() for a in node.attributes.values()):
            return False
        one = mask is None and keys is not None and keys[-2].value == 1
        if not one:
            two = None if mask is None else self._diagonals.of(mask)
            if two is not None and two.dtype == np.bool_:
                two = np.where(two, 0.0, -np.inf)
            elif mask is not None and (found := self._mask(mask)) is not None:
                two = np.array(found)
            if mask is None or two is None or two[0] == two[1] or not np.isfinite(two[0]) or two[1] > two[0]:
                return False
            if two[1] != -np.inf:
                return self.left(node, f"the mask is {float(two[1]):.3g} and not -inf, and nothing bounds the scores")
            size = self._diagonals.size(mask)
            queries = self._facts.shape(node.inputs[0])
            # Of four dimensions and of three the tokens are the last but one.
            if size is None or (size.low < 2 and (queries is None or queries[-2] != size)):
                return self.left(node, "the mask may be smaller than the scores and widened")
        if any(v is not None for v in node.inputs[4:]):
            return self.left(node, "it also reads a cache or the lengths of the keys")
        if any(out.uses() or out.is_graph_output() for out in node.outputs[1:]):
            return self.left(node, "it also gives out a cache or its scores")
        cap = node.attributes.get("softcap")
        if not one and cap is not None and cap.value:
            return self.left(node, "it caps the scores after the mask")
        wanted = self._facts.shape(node.outputs[0])
        heads = [attribute_int(node, name, 0) for name in ("q_num_heads", "kv_num_heads")]
        if wanted is None or wanted != self._facts.shape(values) or heads[0] != heads[1]:
            return self.left(node, "its output isn't known to have the shape of the values")
        self.applied(node, "removed: there is one key" if one else "removed: each token sees itself alone")
        edit.replace(node.outputs[0], values)
        return True


def _fits(axes: Shape, wanted: Shape) -> bool:
    """Whether `axes` broadcast to `wanted` without widening it."""
    if len(axes) > len(wanted):
        return False
    return all(a.value == 1 or a == b for a, b in zip(axes[::-1], wanted[::-1], strict=False))
