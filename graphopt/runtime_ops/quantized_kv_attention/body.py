"""The portable body of QuantizedKVAttention."""

# mypy: ignore-errors
# ruff: noqa: D103
import functools

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass
from onnxscript import opset18 as op
from onnxscript import script
from onnxscript.values import Opset

from graphopt.runtime_ops.operator import DOMAIN, VERSION

_THIS = Opset(DOMAIN, VERSION)


@script(_THIS, default_opset=op)
def Rotated(x, positions, cos_cache, sin_cache, interleaved: int):
    """x [B, T, heads, D] rotated by positions [B, T]; as it is where the tables have no columns."""
    half = op.Shape(cos_cache, start=1, end=2)
    rotary = half + half
    channel = op.Range(0, op.Squeeze(op.Shape(x, start=3, end=4)), 1)
    odd = op.Mod(channel, 2)
    is_interleaved = op.Equal(op.Constant(value_int=interleaved), 1)
    is_rotated = op.Less(channel, rotary)
    partner = op.Where(
        is_interleaved, channel + 1 - odd - odd, op.Mod(channel + half, op.Max(rotary, op.Constant(value_ints=[1])))
    )
    column = op.Where(is_interleaved, channel / 2, op.Mod(channel, op.Max(half, op.Constant(value_ints=[1]))))
    is_first = op.Less(
        op.Where(is_interleaved, odd, channel), op.Where(is_interleaved, op.Constant(value_ints=[1]), half)
    )
    partner = op.Where(is_rotated, partner, channel)
    # One more row and column, so that there is something to gather where there is no table.
    column = op.Where(is_rotated, column, half)
    row = op.Max(op.Min(positions, op.Shape(cos_cache, start=0, end=1)), op.Constant(value_ints=[0]))
    pads = op.Constant(value_ints=[0, 0, 1, 1])
    cos = op.Unsqueeze(op.Gather(op.Gather(op.Pad(cos_cache, pads), row, axis=0), column, axis=2), [2])
    sin = op.Unsqueeze(op.Gather(op.Gather(op.Pad(sin_cache, pads), row, axis=0), column, axis=2), [2])
    rotated = x * cos + op.Gather(x, partner, axis=3) * op.Where(is_first, op.Neg(sin), sin)
    return op.Where(is_rotated, rotated, x)


@script(_THIS, default_opset=op)
def Quantized(x, groups, bits: int):
    """x viewed as [M, a, b, c] = `groups`, quantized over the axis of b: codes as x, scales and minimums [M, a · c]."""
    grouped = op.Reshape(x, groups)
    least = op.ReduceMin(grouped, [2], keepdims=1)
    # A little less than the least number, so that rounding to half precision never ends above it.
    least = op.Cast(op.Cast(least - op.Abs(least) * 0.00048828125, to=10), to=1)
    levels = op.Cast(op.BitShift(op.Cast(op.Constant(value_int=1), to=13), op.Cast(op.Constant(value_int=bits), to=13),
                                 direction="LEFT"), to=1) - 1.0  # fmt: skip
    scale = op.Cast(op.Cast((op.ReduceMax(grouped, [2], keepdims=1) - least) / levels, to=10), to=1)
    step = op.Where(op.Equal(scale, 0.0), op.Constant(value_float=1.0), scale)
    codes = op.Cast(op.Min(op.Max(op.Round((grouped - least) / step), 0.0), levels), to=6)
    numbers = op.Concat(op.Constant(value_ints=[-1]), op.Slice(groups, [1], [2]) * op.Slice(groups, [3], [4]), axis=0)
    return op.Reshape(codes, op.Shape(x)), op.Reshape(scale, numbers), op.Reshape(least, numbers)


@script(_THIS, default_opset=op)
def Planes(bits: int):
    """Three bits are two and one: whether there are three [1], how many codes of the lower bits fit a byte [1], and two
    to the power of their number and of each one's place in the byte [parts, 1], int32."""
    width = op.Constant(value_int=bits)
    three = op.Cast(op.Equal(width, 3), to=7)
    low = width - three
    one = op.Constant(value_ints=[1])
    parts = op.Reshape(8 / low, one)
    modulus = op.Cast(op.Pow(2.0, op.Cast(low, to=1)), to=6)
    powers = op.Cast(op.Pow(2.0, op.Cast(op.Range(0, op.Squeeze(parts), 1) * low, to=1)), to=6)
    return op.Reshape(three, one), parts, modulus, op.Unsqueeze(powers, one)


@script(_THIS, default_opset=op)
def Packed(codes, bits: int):
    """Codes [M, N], int32, as bytes [M, N · bits / 8]."""
    count = op.Shape(codes, start=1, end=2)
    three, parts, modulus, powers = Planes(bits=bits)
    low_codes = op.Reshape(
        op.Mod(codes, modulus), op.Concat(op.Constant(value_ints=[-1]), parts, count / parts, axis=0)
    )
    low_bytes = op.ReduceSum(low_codes * powers, [1], keepdims=0)
    high_codes = op.Reshape(codes / modulus, op.Concat(op.Constant(value_ints=[-1, 8]), count / 8, axis=0))
    bit = op.Constant(value=onnx.helper.make_tensor("bit", 6, [8, 1], [1, 2, 4, 8, 16, 32, 64, 128]))
    high_bytes = op.ReduceSum(high_codes * bit, [1], keepdims=0)
    high_bytes = op.Slice(high_bytes, [0], three * (count / 8), [1])
    return op.Cast(op.Concat(low_bytes, high_bytes, axis=1), to=2)


@script(_THIS, default_opset=op)
def Unpacked(packed, count, bits: int):
    """What `Packed` packed: codes [M, N = count], int32."""
    three, parts, modulus, powers = Planes(bits=bits)
    numbers = op.Cast(packed, to=6)
    whole = op.Concat(op.Constant(value_ints=[-1]), count, axis=0)
    low_bytes = op.Unsqueeze(op.Slice(numbers, [0], count / parts, [1]), [1])
    low_codes = op.Reshape(op.Mod(low_bytes / powers, modulus), whole)
    high_bytes = op.Slice(numbers, count / parts, count / parts + three * (count / 8), [1])
    eighth = op.Concat(op.Constant(value_ints=[0, 0, 0]), (1 - three) * (count / 8), axis=0)
    bit = op.Constant(value=onnx.helper.make_tensor("bit", 6, [8, 1], [1, 2, 4, 8, 16, 32, 64, 128]))
    two = op.Constant(value=onnx.helper.make_tensor("two", 6, [], [2]))
    high_codes = op.Reshape(op.Mod(op.Unsqueeze(op.Pad(high_bytes, eighth), [1]) / bit, two), whole)
    return low_codes + high_codes * modulus


@script(_THIS, default_opset=op)
def QuantizedKVAttention(
    query, key, value, past_codes, past_scales, past_recent, seqlens_k, cos_cache, sin_cache,
    num_heads: int, kv_num_heads: int, scale: float, softcap: float, local_window_size: int,
    key_bits: int, value_bits: int, key_per_channel: int, block_size: int, group_size: int, window: int,
    rotate_at_read: int, rotary_interleaved: int, shared: int,
):  # fmt: skip
    # Sizes, each an int64 [1].
    one = op.Constant(value_ints=[1])
    batch, new = op.Shape(query, start=0, end=1), op.Shape(query, start=1, end=2)
    heads = op.Reshape(op.Constant(value_int=num_heads), one)
    kv_heads = op.Reshape(op.Constant(value_int=kv_num_heads), one)
    depth = op.Shape(past_recent, start=4, end=5)
    ring = op.Shape(past_recent, start=3, end=4)
    capacity = op.Shape(past_codes, start=1, end=2)
    width = op.Reshape(op.Constant(value_int=block_size), one)
    kept = op.Reshape(op.Constant(value_int=window), one)
    group = op.Where(op.Greater(group_size, 0), op.Reshape(op.Constant(value_int=group_size), one), depth)
    at_read = op.Equal(op.Constant(value_int=rotate_at_read), 1)
    is_shared = op.Equal(op.Constant(value_int=shared), 1)

    # Tokens of each row [B, 1]: all, those of the past, and of both those that are quantized.
    total = op.Unsqueeze(op.Cast(seqlens_k, to=7) + 1, [1])
    past = op.Max(total - new, op.Constant(value_ints=[0]))
    quantized_before = op.Max(past - kept, op.Constant(value_ints=[0])) / width
    quantized_after = op.Max(total - kept, op.Constant(value_ints=[0])) / width
    blocks = op.ReduceMax(
        op.Concat(op.Reshape(quantized_after, op.Constant(value_ints=[-1])), capacity, axis=0), [0], keepdims=1
    )

    # Queries and new keys, rotated; keys and values as half-precision numbers [B, T, KV, 2, D], ring and new ones.
    index = op.Range(0, op.Squeeze(new), 1)
    position = past + index
    split = op.Concat(batch, new, kv_heads, depth, axis=0)
    q = op.Reshape(op.Cast(query, to=1), op.Concat(batch, new, heads, depth, axis=0), allowzero=1)
    q = Rotated(q, position, cos_cache, sin_cache, interleaved=rotary_interleaved)
    k = op.Reshape(op.Cast(key, to=1), split, allowzero=1)
    k = op.Where(at_read, k, Rotated(k, position, cos_cache, sin_cache, interleaved=rotary_interleaved))
    v = op.Reshape(op.Cast(value, to=1), split, allowzero=1)
    fresh = op.Cast(op.Concat(op.Unsqueeze(k, [3]), op.Unsqueeze(v, [3]), axis=3), to=10)
    known = op.Concat(op.Transpose(past_recent, perm=[0, 3, 1, 2, 4]), fresh, axis=1)

    # The ring: the place of token t is t modulo its size, and each place holds the newest token that it is for.
    place = op.Range(0, op.Squeeze(ring), 1)
    in_ring = past - 1 - op.Mod(past - 1 - place, ring)
    in_ring_after = total - 1 - op.Mod(total - 1 - place, ring)
    source = op.Where(op.GreaterOrEqual(in_ring_after, past), ring + in_ring_after - past, place)
    recent = op.Transpose(op.GatherND(known, op.Unsqueeze(source, [2]), batch_dims=1), perm=[0, 2, 3, 1, 4])

    # Every block as it would be made of the tokens at hand; taken where it wasn't full before and is now.
    token = op.Range(0, op.Squeeze(blocks * width), 1)
    source = op.Where(op.Less(token, past), op.Mod(token, ring), ring + token - past)
    source = op.Min(op.Max(source, op.Constant(value_ints=[0])), ring + new - 1)
    taken = op.Cast(op.GatherND(known, op.Unsqueeze(source, [2]), batch_dims=1), to=1)
    taken = op.Reshape(
        taken, op.Concat(batch, blocks, width, kv_heads, op.Constant(value_ints=[2]), depth, axis=0), allowzero=1
    )
    each = op.Concat(op.Constant(value_ints=[-1]), depth, width, axis=0)
    taken = op.Transpose(taken, perm=[4, 0, 1, 3, 5, 2])
    keys = op.Reshape(op.Slice(taken, [0], [1]), each)
    values = op.Reshape(op.Slice(taken, [1], [2]), each)
    by_token = op.Concat(op.Constant(value_ints=[-1]), depth / group, group, width, axis=0)
    by_channel = op.Concat(op.Constant(value_ints=[-1]), depth, width, one, axis=0)
    key_groups = op.Where(op.Equal(op.Constant(value_int=key_per_channel), 1), by_channel, by_token)
    key_codes, key_scale, key_least = Quantized(keys, key_groups, bits=key_bits)
    value_codes, value_scale, value_least = Quantized(values, by_token, bits=value_bits)
    # Four channels of a key side by side, and four tokens of a value: what a dot product of small integers takes.
    whole = op.Concat(op.Constant(value_ints=[-1]), depth * width, axis=0)
    fours = op.Constant(value_ints=[4])
    key_order = op.Concat(op.Constant(value_ints=[-1]), depth / 4, fours, width, axis=0)
    value_order = op.Concat(op.Constant(value_ints=[-1]), depth, width / 4, fours, axis=0)
    key_codes = op.Reshape(op.Transpose(op.Reshape(key_codes, key_order), perm=[0, 1, 3, 2]), whole)
    value_codes = op.Reshape(op.Transpose(op.Reshape(value_codes, value_order), perm=[0, 2, 1, 3]), whole)
    made_codes = op.Concat(Packed(key_codes, bits=key_bits), Packed(value_codes, bits=value_bits), axis=1)
    made_scales = op.Concat(key_scale, key_least, value_scale, value_least, axis=1)

    number = op.Range(0, op.Squeeze(blocks), 1)
    is_made = op.And(op.GreaterOrEqual(number, quantized_before), op.Less(number, quantized_after))
    is_made = op.And(is_made, op.Not(is_shared))
    is_made = op.Unsqueeze(is_made, [2, 3])
    grown = op.Concat(
        op.Constant(value_ints=[0, 0, 0, 0, 0]), blocks - capacity, op.Constant(value_ints=[0, 0]), axis=0
    )
    lead = op.Concat(batch, blocks, kv_heads, axis=0)
    code_shape = op.Concat(lead, op.Shape(past_codes, start=3, end=4), axis=0)
    scale_shape = op.Concat(lead, op.Shape(past_scales, start=3, end=4), axis=0)
    codes = op.Where(is_made, op.Reshape(made_codes, code_shape, allowzero=1), op.Pad(past_codes, grown))
    known_scales = op.Pad(op.Cast(past_scales, to=1), grown)
    scales = op.Where(is_made, op.Reshape(made_scales, scale_shape, allowzero=1), known_scales)

    # Keys and values of all quantized tokens, [M, D, W] as above.
    flat_codes = op.Reshape(codes, op.Concat(op.Constant(value_ints=[-1]), op.Shape(codes, start=3, end=4), axis=0))
    key_bytes = depth * width * op.Reshape(op.Constant(value_int=key_bits), one) / 8
    key_read = Unpacked(op.Slice(flat_codes, [0], key_bytes, [1]), depth * width, bits=key_bits)
    value_read = Unpacked(
        op.Slice(flat_codes, key_bytes, op.Shape(flat_codes, start=1, end=2), [1]), depth * width, bits=value_bits
    )
    key_read = op.Transpose(
        op.Reshape(key_read, op.Concat(op.Constant(value_ints=[-1]), depth / 4, width, fours, axis=0)),
        perm=[0, 1, 3, 2],
    )
    value_read = op.Transpose(
        op.Reshape(value_read, op.Concat(op.Constant(value_ints=[-1]), width / 4, depth, fours, axis=0)),
        perm=[0, 2, 1, 3],
    )
    flat_scales = op.Reshape(scales, op.Concat(op.Constant(value_ints=[-1]), op.Shape(scales, start=3), axis=0))
    key_numbers = op.Slice(key_groups, [1], [2]) * op.Slice(key_groups, [3], [4])
    value_numbers = depth / group * width
    at = key_numbers + key_numbers
    key_shape = op.Concat(op.Slice(key_groups, [0], [2]), one, op.Slice(key_groups, [3], [4]), axis=0)
    value_shape = op.Concat(op.Slice(by_token, [0], [2]), one, width, axis=0)
    key_scale = op.Reshape(op.Slice(flat_scales, [0], key_numbers, [1]), key_shape)
    key_least = op.Reshape(op.Slice(flat_scales, key_numbers, at, [1]), key_shape)
    value_scale = op.Reshape(op.Slice(flat_scales, at, at + value_numbers, [1]), value_shape)
    value_least = op.Reshape(
        op.Slice(flat_scales, at + value_numbers, at + value_numbers + value_numbers, [1]), value_shape
    )
    key_read = op.Cast(op.Reshape(key_read, key_groups), to=1) * key_scale + key_least
    value_read = op.Cast(op.Reshape(value_read, by_token), to=1) * value_scale + value_least
    apart = op.Concat(lead, depth, width, axis=0)
    joined = op.Concat(batch, blocks * width, kv_heads, depth, axis=0)
    key_read = op.Transpose(op.Reshape(key_read, apart, allowzero=1), perm=[0, 1, 4, 2, 3])
    value_read = op.Transpose(op.Reshape(value_read, apart, allowzero=1), perm=[0, 1, 4, 2, 3])

    # All columns: quantized tokens, the ring, new tokens.
    recent_keys = op.Squeeze(op.Slice(known, [0], [1], [3]), [3])
    recent_values = op.Squeeze(op.Slice(known, [1], [2], [3]), [3])
    key_all = op.Concat(op.Reshape(key_read, joined, allowzero=1), op.Cast(recent_keys, to=1), axis=1)
    value_all = op.Concat(op.Reshape(value_read, joined, allowzero=1), op.Cast(recent_values, to=1), axis=1)
    quantized_at = op.Expand(token, op.Concat(batch, blocks * width, axis=0))
    # The ring of a shared cache has new tokens, which are at hand already; of others it has no more.
    in_shared = op.Where(op.Less(in_ring_after, past), in_ring_after, op.Constant(value_ints=[-1]))
    in_ring = op.Where(is_shared, in_shared, in_ring)
    gone = op.Max(op.Min(past, total - ring), op.Constant(value_ints=[0]))
    gone = op.Where(is_shared, (gone + width - 1) / width * width, op.Constant(value_ints=[0]))
    at_token = op.Concat(quantized_at, in_ring, position, axis=1)
    rotated = Rotated(key_all, at_token, cos_cache, sin_cache, interleaved=rotary_interleaved)
    key_all = op.Where(at_read, rotated, key_all)

    # What query i sees: quantized tokens as they are once it is the newest, the others after them.
    query_at = op.Unsqueeze(position, [2])
    boundary = op.Max(query_at + 1 - kept, op.Constant(value_ints=[0])) / width * width
    boundary = op.Max(boundary, op.Unsqueeze(gone, [2]))
    column_at = op.Unsqueeze(at_token, [1])
    is_quantized = op.Less(op.Range(0, op.Squeeze(op.Shape(at_token, start=1, end=2)), 1), blocks * width)
    seen = op.And(op.Equal(is_quantized, op.Less(column_at, boundary)), op.LessOrEqual(column_at, query_at))
    local = op.Constant(value_int=local_window_size)
    seen = op.And(seen, op.Or(op.Less(local, 0), op.Greater(column_at, query_at - local)))
    end = op.Where(is_quantized, quantized_after * width, total)
    is_token = op.And(op.GreaterOrEqual(at_token, 0), op.Less(at_token, end))
    is_row = op.Unsqueeze(op.Less(position, total), [1, 2, 4])

    grouped = op.Concat(batch, new, kv_heads, heads / kv_heads, depth, axis=0)
    q = op.Transpose(op.Reshape(q, grouped, allowzero=1), perm=[0, 2, 3, 1, 4])
    scores = op.MatMul(q, op.Unsqueeze(op.Transpose(key_all, perm=[0, 2, 3, 1]), [2]))
    scores = scores * op.Constant(value_float=scale)
    cap = op.Constant(value_float=softcap)
    capped = cap * op.Tanh(scores / op.Where(op.Greater(cap, 0.0), cap, op.Constant(value_float=1.0)))
    scores = op.Where(op.Greater(cap, 0.0), capped, scores)
    scores = op.Where(op.Unsqueeze(seen, [1, 2]), scores, op.Constant(value_float=float("-inf")))
    value_all = op.Where(op.Unsqueeze(is_token, [2, 3]), value_all, op.Constant(value_float=0.0))
    y = op.MatMul(op.Softmax(scores, axis=-1), op.Unsqueeze(op.Transpose(value_all, perm=[0, 2, 1, 3]), [2]))
    y = op.Transpose(op.Where(is_row, y, op.Constant(value_float=0.0)), perm=[0, 3, 1, 2, 4])
    output = op.CastLike(op.Reshape(y, op.Shape(query), allowzero=1), query)
    return output, codes, op.Cast(scales, to=10), recent


@functools.cache
def _inlined() -> onnx.FunctionProto:
    parts = (Rotated, Quantized, Planes, Packed, Unpacked, QuantizedKVAttention)
    functions = [ir.from_proto(part.to_function_proto()) for part in parts]
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 18}), ir_version=9, functions=functions)
    InlinePass(criteria=lambda function: function.name != QuantizedKVAttention.name)(model)
    (made,) = model.functions.values()
    for node in made:
        # ONNX Runtime 1.17 doesn't know the pads of a Pad where they aren't a tensor.
        numbers = node.attributes.get("value_ints") if node.op_type == "Constant" else None
        if numbers is not None:
            del node.attributes["value_ints"]
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(numbers.as_ints(), dtype=ir.DataType.INT64))
    return ir.to_proto(made)


class _Body:
    """The function with its parts put into it: a model takes one function of an operator."""

    def to_function_proto(self) -> onnx.FunctionProto:
        return _inlined()


BODY = _Body()
