"""What ONNX Runtime's attention operators compute, as formulas around `Attention` of ai.onnx.

Read off the kernels and schemas of ONNX Runtime 1.31 (CPU), and held to its kernels by tests.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.analysis.dims import Dim
from graphopt.analysis.shapes import Shape
from graphopt.graph.computed import columns
from graphopt.graph.constants import constant_tensor
from graphopt.passes.raise_.attention_mask import HIDDEN, may_be_lowest
from graphopt.passes.raise_.contrib_rules import Call, Formulas
from graphopt.passes.raise_.expression import Expression, Operand, added, ints, op
from graphopt.passes.raise_.root_mean_square import NotRaised
from graphopt.passes.raise_.shape_rules import ShapeRulePass

SWAPPED = [0, 2, 1, 3]
_LOWEST = float(np.finfo(np.float32).min)


@dataclasses.dataclass(frozen=True)
class Need:
    """What has to be assumed for a site.

    Attributes:
        assumption: Its name.
        inputs: Names of the model's inputs by role.
        reason: What needs it.
        problem: What is so without it.
    """

    assumption: str
    inputs: Mapping[str, str]
    reason: str
    problem: str


class AttentionCall(Call):
    """A call whose masks and positions are shared with other sites, and whose sizes can be compared."""

    def __init__(self, node: ir.Node, facts: ShapeRulePass, shared: dict[Hashable, Expression]) -> None:
        super().__init__(node, facts)
        self._shared = shared
        self.needs: list[Need] = []

    def dims(self, value: ir.Value, rank: int) -> Shape:
        """The sizes of the axes of a value of a rank."""
        dims = self._facts.dims(value)
        if dims is None:
            raise NotRaised(f"the rank of {value.name!r} isn't known")
        if len(dims) != rank:
            raise NotRaised(f"{value.name!r} has {len(dims)} axes, not {rank}")
        return dims

    def width(self, value: ir.Value) -> int:
        """The size of the last axis, which must be known."""
        shape = self.shape(value)
        if not shape or shape[-1] is None:
            raise NotRaised(f"the size of the last axis of {value.name!r} isn't known")
        return shape[-1]

    def shared(self, key: Hashable, make: Callable[[], Expression]) -> Expression:
        """An expression that is written once for all sites of one graph with the same key."""
        place = (self.node.graph, key)
        if place not in self._shared:
            self._shared[place] = make()
        return self._shared[place]

    def number_of(self, value: ir.Value) -> Dim | None:
        """The one integer that a value consists of, as an expression."""
        content = self._facts.data(value)
        return content.flat[0] if content is not None and content.size == 1 else None

    def heads(self, name: str = "num_heads") -> int:
        """An attribute that counts heads."""
        heads = int(self.attribute(name, 0))
        if heads <= 0:
            raise NotRaised(f"its {name} isn't given")
        return heads

    def refuse(self, names: Mapping[int, str]) -> None:
        """Raise where one of these inputs is given."""
        for index, why in names.items():
            if self.get(index) is not None:
                raise NotRaised(why)


@dataclasses.dataclass(frozen=True)
class Heads:
    """Queries, keys or values as [batch, heads, tokens, depth].

    Attributes:
        operand: The vectors.
        depth: Their size.
    """

    operand: Operand
    depth: int


def split(call: AttentionCall, x: Operand, width: int, heads: int) -> Heads:
    """[batch, tokens, heads · depth] as heads."""
    if width % heads:
        raise NotRaised(f"{width} elements aren't {heads} equal heads")
    depth = width // heads
    return Heads(op("Transpose", op("Reshape", x, ints(0, 0, heads, depth)), perm=SWAPPED), depth)


def joined(y: Operand, width: int) -> Operand:
    """Heads as [batch, tokens, width]."""
    return op("Reshape", op("Transpose", y, perm=SWAPPED), ints(0, 0, width))


def scale_of(call: AttentionCall, depth: int) -> float:
    """The factor of the scores; 0 stands for the usual one."""
    return float(call.attribute("scale", 0.0)) or 1.0 / math.sqrt(depth)


def parts_of(value: ir.Value, sizes: Sequence[int]) -> list[Operand | None]:
    """A vector or matrix cut along its last axis; None for a part of a constant vector that is all 0."""
    tensor = constant_tensor(value)
    if tensor is None:
        whole = op("Split", value, ints(*sizes), axis=-1, outputs=len(sizes))
        return [whole, *(whole[index] for index in range(1, len(sizes)))]
    if int(tensor.shape.numpy()[-1]) != sum(sizes):
        raise NotRaised(f"{value.name!r} doesn't hold {sum(sizes)} columns")
    stops = np.cumsum(sizes).tolist()
    parts: list[Operand | None] = []
    for stop, size in zip(stops, sizes, strict=True):
        part = columns(tensor, stop - size, stop)
        parts.append(None if len(tensor.shape) == 1 and not part.numpy().any() else part)
    return parts


# ---- masks


def mask_of(
    call: AttentionCall, place: int, bias: int, q: ir.Value, keys: ir.Value, past: ir.Value | None
) -> Operand | None:
    """The padding mask at input `place` and the bias at input `bias` as numbers to add, [batch, 1, queries, keys].

    masked keys get `mask_filter_value` (-10000 unless it says otherwise), also in rows where all are masked
    """
    mask, scores = call.get(place), call.get(bias)
    if call.attribute("unidirectional", 0):
        _check_causal(call, scores, q, keys)
    padding = None if mask is None else _padding(call, mask, q, keys, past)
    return padding if scores is None else added(_bias(call, scores), padding)


def _check_causal(call: AttentionCall, scores: ir.Value | None, q: ir.Value, keys: ir.Value) -> None:
    if scores is not None:
        raise NotRaised("it is unidirectional beside a bias, and rows that the bias hides see other keys then")
    if call.dims(keys, call.rank(keys))[_tokens(call, keys)] != call.dims(q, 3)[1]:
        # The kernel masks all rows but the last, which then sees keys behind it.
        raise NotRaised("it is unidirectional, and its keys aren't known to be as many as its queries")


def _tokens(call: AttentionCall, keys: ir.Value) -> int:
    """The axis of the tokens."""
    return 1 if call.rank(keys) == 3 else 2


def _padding(call: AttentionCall, mask: ir.Value, q: ir.Value, keys: ir.Value, past: ir.Value | None) -> Expression:
    dtype, fill = call.dtype(q), float(call.attribute("mask_filter_value", -10000.0))
    queries, rank = call.dims(q, 3)[1], call.rank(mask)
    if rank not in (1, 2, 3):
        raise NotRaised(f"its mask has {rank} axes, which ONNX Runtime's CPU doesn't take")
    if fill <= _LOWEST * 0.5:
        if dtype != ir.DataType.FLOAT:
            raise NotRaised(f"its mask_filter_value is the lowest of float32, in {dtype.name}")
        if call.attribute("unidirectional", 0):
            raise NotRaised("it is unidirectional, and what its mask hides is as low as what lies ahead")
        fill = max(fill, HIDDEN)
    zero, hidden = (np.asarray(number, dtype=dtype.numpy()) for number in (0.0, fill))
    if not np.isfinite(hidden):
        raise NotRaised("its mask_filter_value isn't finite in the type of the scores")
    if rank == 2 and call.dims(mask, 2)[1] == 1:
        raise NotRaised("its mask of one column may be the one that ONNX Runtime ignores")
    if rank == 1:
        if past is not None:
            raise NotRaised("it counts the keys of each row, beside a past")
        if call.dims(mask, 1)[0] != call.dims(q, 3)[0]:
            raise NotRaised("its mask of one axis isn't known to be one count for each row")

    def seen() -> Operand:
        if rank > 1:
            kept = op("Greater", mask, np.zeros((), dtype=call.dtype(mask).numpy()))
            return op("Unsqueeze", kept, ints(1, 2) if rank == 2 else ints(1))
        axis = _tokens(call, keys)
        length = op("Squeeze", op("Shape", keys, start=axis, end=axis + 1))
        places = op("Range", np.asarray(0, dtype=np.int64), length, np.asarray(1, dtype=np.int64))
        counts = op("Unsqueeze", op("Cast", mask, to=ir.DataType.INT64), ints(1, 2, 3))
        return op("Less", places, counts)

    def make() -> Expression:
        bias = op("Where", seen(), zero, hidden)
        if rank == 3 or queries == 1:
            return bias
        # ONNX Runtime's Attention doesn't broadcast the axis of the queries.
        sizes = op("Concat", ints(1, 1), op("Shape", q, start=1, end=2), ints(1), axis=0)
        return op("Expand", bias, sizes)

    length = call.dims(keys, call.rank(keys))[_tokens(call, keys)] if rank == 1 else None
    return call.shared(("padding", mask, dtype, fill, queries, length), make)


def _bias(call: AttentionCall, scores: ir.Value) -> Operand:
    """The bias, its lowest numbers raised a little: ONNX Runtime's `Attention` takes the lowest float32 for -∞."""
    if call.dtype(scores) != ir.DataType.FLOAT or not may_be_lowest(scores):
        return scores
    lowest = np.asarray(_LOWEST, dtype=np.float32)
    return call.shared(
        ("bias", scores),
        lambda: op("Where", op("Equal", scores, lowest), np.asarray(HIDDEN, dtype=np.float32), scores),
    )


# ---- the operators


def multi_head(call: AttentionCall) -> Formulas:
    """MultiHeadAttention: queries, keys and values of equally many heads, from projections or a cache."""
    call.refuse({
        8: "its past is a buffer shared with the present, which the standard's operator of opset 23 hasn't",
        9: "its beams choose from the cache (cache_indirection)",
    })  # fmt: skip
    q, heads = call[0], call.heads()
    if call.rank(q) == 5 or call.get(1) is None or call.get(2) is None:
        raise NotRaised("its queries, keys and values are packed by heads, for which ONNX Runtime's CPU has no kernel")
    k, v, bias = call[1], call[2], call.get(3)
    past, past_v = call.get(6), call.get(7)
    if (past is None) != (past_v is None):
        raise NotRaised("it has one of past_key and past_value")
    call.dims(q, 3)
    width, crossed = call.width(q), call.rank(k) == 4
    if crossed and past is not None:
        raise NotRaised("it has keys by heads beside a past")
    value_width = call.width(v) * (heads if crossed else 1)
    sizes = [width, width, value_width]
    biases = [None] * 3 if bias is None else parts_of(bias, sizes)
    queries = split(call, added(q, biases[0]), width, heads)
    if crossed:
        # ONNX Runtime adds the bias to the queries only: that of keys and values is in them already.
        call.dims(v, 4)
        keys, values = Heads(k, queries.depth), Heads(v, call.width(v))
    else:
        call.dims(k, 3)
        call.dims(v, 3)
        keys = split(call, added(k, biases[1]), width, heads)
        values = split(call, added(v, biases[2]), value_width, heads)
    y = op(
        "Attention", queries.operand, keys.operand, values.operand, mask_of(call, 4, 5, q, k, past), past, past_v,
        scale=scale_of(call, queries.depth), is_causal=int(call.attribute("unidirectional", 0)) or None,
        outputs=1 if past is None else 3,
    )  # fmt: skip
    result: dict[int, Operand] = {0: joined(y, value_width)}
    if past is None:
        return result | {1: keys.operand, 2: values.operand}
    return result | {1: y[1], 2: y[2]}


def packed_attention(call: AttentionCall) -> Formulas:
    """Attention: queries, keys and values of one value by weights that lie side by side."""
    call.refuse({4: "its past is one tensor of keys and values", 6: "its past is a buffer shared with the present"})
    if call.attribute("do_rotary", 0):
        raise NotRaised("it rotates, for which ONNX Runtime's CPU has no kernel")
    x, weights, bias, heads = call[0], call[1], call.get(2), call.heads()
    call.dims(x, 3)
    given = [int(size) for size in call.attribute("qkv_hidden_sizes", ())]
    total = call.width(weights)
    sizes = given or [total // 3] * 3
    if len(sizes) != 3 or sum(sizes) != total or sizes[0] != sizes[1]:
        raise NotRaised(f"its weights of {total} columns aren't {' + '.join(map(str, sizes))}")
    biases = [None] * 3 if bias is None else parts_of(bias, sizes)
    if constant_tensor(weights) is not None:
        products = [op("MatMul", x, part) for part in parts_of(weights, sizes)]
        made = [added(product, part) for product, part in zip(products, biases, strict=True)]
    else:
        whole = op("Split", added(op("MatMul", x, weights), bias), ints(*sizes), axis=-1, outputs=3)
        made = [whole, whole[1], whole[2]]
    q, k, v = (split(call, part, size, heads) for part, size in zip(made, sizes, strict=True))
    mask = mask_of(call, 3, 5, x, x, None)
    causal = int(call.attribute("unidirectional", 0)) or None
    y = op("Attention", q.operand, k.operand, v.operand, mask, scale=scale_of(call, q.depth), is_causal=causal)
    return {0: joined(y, sizes[2])}
