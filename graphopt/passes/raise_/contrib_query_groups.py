"""What GroupQueryAttention of com.microsoft computes, as formulas around `Attention` and `RotaryEmbedding`."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from graphopt.analysis.algebra import is_op, producer
from graphopt.analysis.dims import Dim
from graphopt.graph.constants import constant_array, constant_tensor, scalar
from graphopt.passes.raise_.contrib_attention_rules import AttentionCall, Heads, Need, joined, parts_of, scale_of, split
from graphopt.passes.raise_.contrib_rules import Formulas
from graphopt.passes.raise_.expression import Expression, Operand, added, ints, op
from graphopt.passes.raise_.root_mean_square import NotRaised

_VIEWS = ("Cast", "Expand", "Identity", "Reshape", "Squeeze", "Unsqueeze")
_REFUSED = {
    9: "it has position_ids, of which the kernel takes the first only in a first prompt",
    11: "it has a sink beside the keys (head_sink), which Attention hasn't",
    12: "its cache is quantized",
    13: "its cache is quantized",
}
_OFF = {
    "smooth_softmax": (0, -1), "qk_output": (0,), "k_quant_type": ("NONE",), "v_quant_type": ("NONE",),
    "kv_cache_bit_width": (0,),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Packed:
    """A product by constant weights that lie side by side."""

    x: ir.Value
    weight: ir.Value
    bias: ir.Value | None

    def parts(self, sizes: list[int]) -> list[Operand]:
        """A product for each of them."""
        products = [op("MatMul", self.x, part) for part in parts_of(self.weight, sizes)]
        biases = [None] * len(sizes) if self.bias is None else parts_of(self.bias, sizes)
        return [added(product, bias) for product, bias in zip(products, biases, strict=True)]


@dataclasses.dataclass(frozen=True)
class _Site:
    """Sizes of a site that its parts have in common.

    Attributes:
        call: The site.
        q: Its queries, or queries, keys and values side by side.
        past: The keys in its cache.
        packed: What makes them side by side, where it is to be taken apart.
    """

    call: AttentionCall
    q: ir.Value
    past: ir.Value | None
    packed: _Packed | None

    def sizes(self, start: int, end: int) -> Expression:
        """Batch and new tokens; not of what is to be taken apart, which would stay for it."""
        return op("Shape", self.q if self.packed is None else self.packed.x, start=start, end=end)

    @property
    def key(self) -> tuple[Dim, Dim]:
        """What sites with equal places have in common: the numbers of past and new tokens."""
        past = Dim.of(0) if self.past is None else self.call.dims(self.past, 4)[2]
        return past, self.call.dims(self.q, 3)[1]

    def length(self) -> Expression:
        """Past and new tokens as an int64 scalar. Not what the operator reads: that may count a mask."""

        def make() -> Expression:
            new = self.sizes(1, 2)
            return op("Squeeze", new if self.past is None else op("Add", self._before(self.past), new))

        return self.call.shared(("length", *self.key), make)

    def places(self) -> Expression:
        """Where the new tokens are among all, int64 [S]."""

        def make() -> Expression:
            first = np.asarray(0, dtype=np.int64) if self.past is None else op("Squeeze", self._before(self.past))
            return op("Range", first, self.length(), np.asarray(1, dtype=np.int64))

        return self.call.shared(("places", *self.key), make)

    def _before(self, past: ir.Value) -> Expression:
        return self.call.shared(("past", self.key[0]), lambda: op("Shape", past, start=2, end=3))

    def positions(self) -> Expression:
        """The same for each row of the batch, [B, S]."""
        sizes = self.sizes(0, 2)
        key = ("positions", *self.key, self.call.dims(self.q, 3)[0])
        return self.call.shared(key, lambda: op("Expand", op("Unsqueeze", self.places(), ints(0)), sizes))

    def window(self, width: int) -> Expression:
        """Which keys a query sees: none behind it, and the last `width` up to its own. [S, T]."""

        def make() -> Expression:
            keys = op("Range", np.asarray(0, dtype=np.int64), self.length(), np.asarray(1, dtype=np.int64))
            distance = op("Sub", op("Unsqueeze", self.places(), ints(1)), op("Unsqueeze", keys, ints(0)))
            near = op("Less", distance, np.asarray(width, dtype=np.int64))
            return op("And", op("GreaterOrEqual", distance, np.asarray(0, dtype=np.int64)), near)

        return self.call.shared(("window", width, *self.key), make)


def query_groups(call: AttentionCall) -> Formulas:
    """GroupQueryAttention: causal, its queries in groups over fewer keys, rotated inside where it is told to."""
    call.refuse(_REFUSED)
    for name, off in _OFF.items():
        given = call.attribute(name, off[0])
        if given not in off:
            raise NotRaised(f"its {name} is {given}, which Attention hasn't")
    packed = _packed(call[0]) if call.get(1) is None else None
    if packed is not None and call.rank(packed.x) != 3:
        packed = None
    past, past_v = call.get(3), call.get(4)
    site = _Site(call, call[0], past, packed)
    if (past is None) != (past_v is None):
        raise NotRaised("it has one of past_key and past_value")
    _count(site)
    q, k, v = _projected(site)
    if call.attribute("do_rotary", 0):
        q, k = _rotated(site, q), _rotated(site, k)
    window, bias = int(call.attribute("local_window_size", -1)), call.get(10)
    if window > 0 and bias is not None:
        raise NotRaised("it has a window beside a bias")
    mask: Operand | None = site.window(window) if window > 0 else bias
    y = op(
        "Attention", q.operand, k.operand, v.operand, mask, past, past_v,
        scale=scale_of(call, q.depth), softcap=float(call.attribute("softcap", 0.0)) or None,
        is_causal=None if window > 0 else 1, outputs=1 if past is None else 3,
    )  # fmt: skip
    result: dict[int, Operand] = {0: joined(y, q.depth * call.heads())}
    presents = {1: k.operand, 2: v.operand} if past is None else {1: y[1], 2: y[2]}
    return result | presents


def _projected(site: _Site) -> tuple[Heads, Heads, Heads]:
    call, q = site.call, site.q
    heads, groups = call.heads(), call.heads("kv_num_heads")
    call.dims(q, 3)
    if call.get(1) is not None:
        k, v = call[1], call[2]
        call.dims(k, 3)
        call.dims(v, 3)
        return (
            split(call, q, call.width(q), heads),
            split(call, k, call.width(k), groups),
            split(call, v, call.width(v), groups),
        )
    depth, rest = divmod(call.width(q), heads + 2 * groups)
    if rest:
        raise NotRaised(f"{call.width(q)} elements aren't {heads} + 2 · {groups} equal heads")
    sizes = [heads * depth, groups * depth, groups * depth]
    if site.packed is not None:
        parts = site.packed.parts(sizes)
    else:
        whole = op("Split", q, ints(*sizes), axis=-1, outputs=3)
        parts = [whole, whole[1], whole[2]]
    queries, keys, values = (
        split(call, x, n, h) for x, n, h in zip(parts, sizes, (heads, groups, groups), strict=True)
    )
    return queries, keys, values


def _packed(value: ir.Value) -> _Packed | None:
    """The product that `value` is, where nothing else reads it."""
    bias = None
    addition = producer(value, "Add") if _alone(value) else None
    if addition is not None:
        for term, other in (addition.inputs, addition.inputs[::-1]):
            tensor = constant_tensor(other)
            if tensor is not None and term is not None and len(tensor.shape) == 1:
                value, bias = term, other
                break
    node = producer(value, "MatMul") if _alone(value) else None
    if node is None or node.inputs[0] is None or node.inputs[1] is None:
        return None
    weight = constant_tensor(node.inputs[1])
    if weight is None or len(weight.shape) != 2:
        return None
    return _Packed(node.inputs[0], node.inputs[1], bias)


def _alone(value: ir.Value) -> bool:
    return len(value.uses()) == 1 and not value.is_graph_output()


def _rotated(site: _Site, x: Heads) -> Heads:
    call = site.call
    cos, sin = call[7], call[8]
    shape = call.shape(cos)
    if shape is None or len(shape) != 2 or shape[1] is None:
        raise NotRaised("the size of its tables of cosines isn't known")
    size = 2 * shape[1]
    turned = op(
        "RotaryEmbedding", x.operand, cos, sin, site.positions(),
        interleaved=int(call.attribute("rotary_interleaved", 0)) or None,
        rotary_embedding_dim=size if size < x.depth else None,
    )  # fmt: skip
    return Heads(turned, x.depth)


# ---- how many tokens there are


def _count(site: _Site) -> None:
    """See that each row of the batch has as many tokens as the cache and the new ones together, or what says so.

    The operator takes the past to end at seqlens_k + 1 - S in each row, whatever the size of its cache is.
    """
    call = site.call
    past, new = site.key
    every = past + new
    last, total = _bare(call[5]), call.number_of(call[6])
    if total == every and call.number_of(last) == every - 1:
        return
    less = _less_one(last)
    if less is None:
        raise NotRaised("what its seqlens_k counts isn't known: one less than the tokens of each row")
    counted = _bare(less)
    mask = _summed(counted) or _measured(counted)
    lengths = _measured(_bare(call[6]))
    if mask is None or (lengths is not mask and total != call.dims(mask, 2)[1]):
        raise NotRaised("its seqlens_k and total_sequence_length aren't known to be the tokens of one mask")
    if not mask.is_graph_input():
        raise NotRaised(f"the mask {mask.name!r} that it counts is no input of the model, so nothing can check it")
    problem = "rows that the mask shortens have a cache of their own length, which Attention hasn't"
    reason = "Attention takes the cache of each row to be full"
    call.needs.append(Need("no-padding", {"mask": mask.name or ""}, reason, problem))


def _bare(value: ir.Value) -> ir.Value:
    """The value of whose numbers `value` consists."""
    node = producer(value, *_VIEWS)
    while node is not None and node.inputs[0] is not None:
        value = node.inputs[0]
        node = producer(value, *_VIEWS)
    return value


def _less_one(value: ir.Value) -> ir.Value | None:
    """The x of x - 1."""
    node = producer(value, "Sub", "Add")
    if node is None or None in node.inputs:
        return None
    a, b = node.inputs
    if is_op(node, "Sub"):
        return a if scalar(b) == 1 else None
    return a if scalar(b) == -1 else b if scalar(a) == -1 else None


def _summed(value: ir.Value) -> ir.Value | None:
    """The mask [B, T] of which `value` is the sum of each row."""
    node = producer(value, "ReduceSum")
    axes = None if node is None or len(node.inputs) < 2 else constant_array(node.inputs[1])
    if node is None or node.inputs[0] is None or axes is None or axes.tolist() not in ([1], [-1]):
        return None
    return _mask(node.inputs[0])


def _measured(value: ir.Value) -> ir.Value | None:
    """The mask [B, T] of which `value` is T."""
    node = producer(value, "Gather")
    if node is not None:
        shape, which = producer(node.inputs[0], "Shape"), scalar(node.inputs[1])
        if shape is None or shape.attributes or shape.inputs[0] is None or which not in (1, -1):
            return None
        return _mask(shape.inputs[0])
    node = producer(value, "Shape")
    if node is None or node.inputs[0] is None:
        return None
    start, end = (node.attributes.get(name) for name in ("start", "end"))
    last = end is None or end.as_int() == 2
    return _mask(node.inputs[0]) if start is not None and start.as_int() in (1, -1) and last else None


def _mask(value: ir.Value) -> ir.Value | None:
    node = producer(value, "Cast", "Identity")
    while node is not None and node.inputs[0] is not None:
        value = node.inputs[0]
        node = producer(value, "Cast", "Identity")
    return value if value.shape is not None and len(value.shape) == 2 else None
