"""Valid nodes of each operator, which are run in other versions of ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Example = tuple[list[Any], dict[str, Any]]
"""The inputs, an array each, and the attributes."""

FACTOR = np.array([[1, 2, 0], [0.5, -1, 1], [0, 1, 1]], np.float32)
EMPTY = np.zeros(0, np.float32)
NO_BYTES = np.zeros(0, np.uint8)


def numbers(*shape: int, dtype: Any = np.float32, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def raw(*shape: int) -> Any:
    return np.random.default_rng(1).integers(0, 256, shape, np.uint8)


def hadamard_transform(dtype: Any) -> list[Example]:
    x, one = numbers(3, 48, dtype=dtype), np.ones((1, 1), np.float32)
    return [([x, FACTOR], {"group_size": 24, "scale": 0.25}), ([x, one], {"group_size": 16, "scale": 0.25})]


def hadamard_quantize(dtype: Any) -> list[Example]:
    more = {"clip": 1.0, "largest": 127}
    return [(inputs, {**attributes, **more}) for inputs, attributes in hadamard_transform(dtype)]


def kronecker_transform(dtype: Any) -> list[Example]:
    return [([numbers(3, 12, dtype=dtype), FACTOR, numbers(4, 4)], {})]


def kronecker_quantize(dtype: Any) -> list[Example]:
    return [(inputs, {"clip": 1.0, "largest": 127}) for inputs, _ in kronecker_transform(dtype)]


def codebook_matmul(dtype: Any) -> list[Example]:
    x, scales, none = numbers(2, 64, dtype=dtype), numbers(3, 2, seed=3), np.zeros(0, np.int32)
    outliers = [np.array([0, 1, 1, 2], np.int32), np.array([3, 60], np.int32), np.array([2, -3], np.float32)]
    selectors = np.array([[0, 1], [1, 1], [0, 0]], np.uint8)
    plain = [x, raw(3, 32), numbers(1, 16, 1, 1, seed=2), scales, NO_BYTES, *outliers, numbers(3, dtype=dtype)]
    vectors = [x, raw(3, 12), numbers(2, 8, 1, 2, seed=2), scales, selectors, none, none, EMPTY, EMPTY.astype(dtype)]
    return [
        (plain, {"bits": 4, "columns": 64, "group_size": 32, "activation_block": 0}),
        (vectors, {"bits": 3, "columns": 64, "group_size": 32, "activation_block": 16}),
    ]


def weight(rows: int, columns: int, bits: int = 4, minimums: bool = False) -> list[Any]:
    blocks = columns // 32
    scales = np.abs(numbers(rows, blocks, seed=4)) / (3 << bits)
    zeros = NO_BYTES if minimums else raw(rows, (blocks * bits + 7) // 8)
    return [raw(rows, blocks, 4 * bits), scales, zeros, numbers(rows, blocks, seed=5) / 50 if minimums else EMPTY]


def quantized_linear(dtype: Any) -> list[Example]:
    x, common = numbers(2, 64, dtype=dtype), {"block_size": 32, "epsilon": 1e-5}
    whole = [x, numbers(64), *weight(6, 64), numbers(6), numbers(2, 6, dtype=dtype)]
    bare = [x, EMPTY, *weight(6, 64, 2, minimums=True), EMPTY, EMPTY.astype(dtype)]
    return [(whole, {"bits": 4, "activation_bits": 16, **common}), (bare, {"bits": 2, "activation_bits": 8, **common})]


def quantized_mlp(dtype: Any) -> list[Example]:
    inputs = [numbers(2, 64, dtype=dtype), numbers(64), *weight(64, 64, 8), *weight(64, 32, 8)]
    attributes = {"bits": 8, "block_size": 32, "activation_bits": 16, "epsilon": 1e-5}
    return [(inputs, {**attributes, "activation": activation}) for activation in range(4)]


def turns(dtype: Any = np.float32) -> list[Any]:
    angles = np.arange(20)[:, None] / np.array([1.0, 10.0])
    return [np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)]


def new_tokens(count: int, dtype: Any) -> list[Any]:
    sizes = (16, 8, 8)
    return [numbers(1, count, size, dtype=dtype, seed=seed) for seed, size in enumerate(sizes)]


def quantized_kv_attention(dtype: Any) -> list[Example]:
    """Prompts of 9 tokens into an empty cache; two of each fill a block."""
    width, window, depth = 4, 4, 8
    found: list[Example] = []
    for key_bits, value_bits, per_channel, at_read in ((8, 8, 1, 0), (4, 2, 1, 1), (3, 4, 0, 0)):
        codes, by_token = width * depth * (key_bits + value_bits) // 8, width
        scales = 2 * ((depth if per_channel else by_token) + by_token)
        cache = [np.zeros((1, 2, 1, codes), np.uint8), np.zeros((1, 2, 1, scales), np.float16)]
        cache.append(np.zeros((1, 1, 2, window + width, depth), np.float16))
        attributes = {"num_heads": 2, "kv_num_heads": 1, "scale": 0.4, "block_size": width, "window": window}
        attributes |= {"key_bits": key_bits, "value_bits": value_bits, "key_per_channel": per_channel}
        attributes |= {"rotate_at_read": at_read, "rotary_interleaved": at_read, "softcap": 5.0 * at_read}
        found.append(([*new_tokens(9, dtype), *cache, np.array([8], np.int32), *turns()], attributes))
    return found


def cached_attention(dtype: Any) -> list[Example]:
    past = [numbers(1, 1, 6, 8, dtype=dtype, seed=3), numbers(1, 1, 6, 8, dtype=dtype, seed=4)]
    lengths = [np.array([5], np.int32), np.array(6, np.int32)]
    packed = [np.concatenate(new_tokens(2, dtype), axis=2), EMPTY.astype(dtype), EMPTY.astype(dtype)]
    nothing = [np.zeros((0, 0), dtype)] * 2
    heads = {"num_heads": 2, "kv_num_heads": 1}
    return [
        ([*new_tokens(2, dtype), *past, *lengths, *turns(dtype)], {**heads, "rotary_interleaved": 1}),
        ([*packed, *past, *lengths, *nothing], {**heads, "softcap": 3.0, "local_window_size": 3}),
    ]


EXAMPLES: dict[str, Callable[[Any], list[Example]]] = {
    "CachedAttention": cached_attention,
    "CodebookMatMul": codebook_matmul,
    "HadamardQuantize": hadamard_quantize,
    "HadamardTransform": hadamard_transform,
    "KroneckerQuantize": kronecker_quantize,
    "KroneckerTransform": kronecker_transform,
    "QuantizedKVAttention": quantized_kv_attention,
    "QuantizedLinear": quantized_linear,
    "QuantizedMlp": quantized_mlp,
}
