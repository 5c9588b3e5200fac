"""The portable body of CachedAttention."""

# mypy: ignore-errors
# ruff: noqa: D103
from onnxscript import opset18 as op
from onnxscript import script
from onnxscript.values import Opset

from graphopt.runtime_ops.operator import DOMAIN, VERSION


@script(Opset(DOMAIN, VERSION), default_opset=op)
def Rotated(x, cos_cache, sin_cache, places, interleaved: int):
    # x [B, heads, S, D], places [B, S].
    if op.Size(cos_cache) > 0:
        half = op.Shape(cos_cache, start=1, end=2)
        depth = op.Shape(x, start=3, end=4)
        pairs = op.Constant(value_int=interleaved)
        # The features that are turned together: 2i and 2i + 1, or i and i + R / 2.
        number = op.Range(0, op.Squeeze(half), 1)
        first = number * (pairs + 1)
        second = first + pairs + half * (1 - pairs)
        rest = op.Range(op.Squeeze(half) * 2, op.Squeeze(depth), 1)
        cos = op.Unsqueeze(op.Gather(op.Cast(cos_cache, to=1), places), [1])
        sin = op.Unsqueeze(op.Gather(op.Cast(sin_cache, to=1), places), [1])
        a = op.Gather(x, first, axis=-1)
        b = op.Gather(x, second, axis=-1)
        turned = op.Concat(a * cos - b * sin, b * cos + a * sin, op.Gather(x, rest, axis=-1), axis=-1)
        order = op.Concat(first, second, rest, axis=0)
        back = op.ScatterElements(order, order, op.Range(0, op.Squeeze(depth), 1))
        y = op.Gather(turned, back, axis=-1)
    else:
        y = op.Identity(x)
    return y


@script(Opset(DOMAIN, VERSION), default_opset=op)
def Appended(past, new, places, total):
    # past [B, heads, C, D], new [B, heads, S, D] at `places` [B, S].
    rows = op.Shape(past, start=2, end=3)
    longer = op.Max(total - rows, op.Constant(value_ints=[0]))
    behind = op.Concat(op.Shape(past, start=0, end=2), longer, op.Shape(past, start=3, end=4), axis=0)
    buffer = op.Concat(past, op.Expand(op.CastLike(0.0, past), behind), axis=2)
    index = op.Expand(op.Unsqueeze(places, [1, 3]), op.Shape(new))
    return op.ScatterElements(buffer, index, op.CastLike(new, past), axis=2)


@script(Opset(DOMAIN, VERSION), default_opset=op)
def CachedAttention(
    query, key, value, past_key, past_value, seqlens_k, total_sequence_length, cos_cache, sin_cache,
    num_heads: int, kv_num_heads: int, scale: float, softcap: float, local_window_size: int, rotary_interleaved: int,
):  # fmt: skip
    one = op.Constant(value_ints=[1])
    heads = op.Reshape(op.Constant(value_int=num_heads), one)
    kv_heads = op.Reshape(op.Constant(value_int=kv_num_heads), one)
    rows = op.Shape(query, start=0, end=1)
    new = op.Shape(query, start=1, end=2)
    depth = op.Shape(past_key, start=3, end=4)
    # Keys and values beside the queries, where they aren't there already: then no numbers are missing.
    missing = ((heads + kv_heads + kv_heads) * depth - op.Shape(query, start=2, end=3)) / 2
    apart = op.Concat(rows, new, missing, axis=0)
    packed = op.Concat(
        query, op.Reshape(key, apart, allowzero=1), op.Reshape(value, apart, allowzero=1), axis=2
    )  # fmt: skip
    by_head = op.Concat(rows, new, heads + kv_heads + kv_heads, depth, axis=0)
    every = op.Transpose(op.Reshape(op.Cast(packed, to=1), by_head, allowzero=1), perm=[0, 2, 1, 3])
    lengths = op.Reshape(op.Cast(seqlens_k, to=7), op.Concat(rows, one, axis=0), allowzero=1) + 1
    start = op.Max(lengths - new, op.Constant(value_ints=[0]))
    places = start + op.Range(0, op.Squeeze(new), 1)
    total = op.Reshape(op.Cast(total_sequence_length, to=7), one)
    q, k, v = op.Split(every, op.Concat(heads, kv_heads, kv_heads, axis=0), axis=1)
    q = Rotated(q, cos_cache, sin_cache, places, interleaved=rotary_interleaved)
    k = Rotated(k, cos_cache, sin_cache, places, interleaved=rotary_interleaved)
    present_key = Appended(past_key, k, places, total)
    present_value = Appended(past_value, v, places, total)

    length = op.Shape(present_key, start=2, end=3)
    grouped = op.Concat(rows, kv_heads, heads / kv_heads * new, depth, axis=0)
    keys = op.Transpose(op.Cast(present_key, to=1), perm=[0, 1, 3, 2])
    products = op.MatMul(op.Reshape(q, grouped, allowzero=1), keys)
    given = op.Constant(value_float=scale)
    factor = op.Where(given == 0.0, op.Reciprocal(op.Sqrt(op.Cast(depth, to=1))), given)
    scores = op.Reshape(products, op.Concat(rows, heads, new, length, axis=0), allowzero=1) * factor
    cap = op.Constant(value_float=softcap)
    scores = op.Where(cap > 0.0, op.Tanh(scores / op.Max(cap, 1e-30)) * cap, scores)
    window = op.Constant(value_int=local_window_size)
    distance = op.Unsqueeze(places, [2]) - op.Range(0, op.Squeeze(length), 1)
    seen = op.And(distance >= 0, op.Or(distance < window, window <= 0))
    weights = op.Softmax(op.Where(op.Unsqueeze(seen, [1]), scores, op.Constant(value_float=float("-inf"))), axis=-1)
    # What no token has filled yet may be no number.
    filled = op.Unsqueeze(op.Range(0, op.Squeeze(length), 1) < start + new, [1, 3])
    values = op.Where(filled, op.Cast(present_value, to=1), 0.0)
    by_group = op.Concat(rows, kv_heads, heads / kv_heads * new, length, axis=0)
    made = op.MatMul(op.Reshape(weights, by_group, allowzero=1), values)
    result = op.Transpose(
        op.Reshape(made, op.Concat(rows, heads, new, depth, axis=0), allowzero=1), perm=[0, 2, 1, 3]
    )  # fmt: skip
    joined = op.Reshape(result, op.Concat(rows, new, heads * depth, axis=0), allowzero=1)
    return op.CastLike(joined, query), present_key, present_value


BODY = CachedAttention
PARTS = (Rotated, Appended)
