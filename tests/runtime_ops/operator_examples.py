"""A valid node of each operator, which is run in other versions of ONNX Runtime."""

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


def hadamard_transform(dtype: Any) -> Example:
    return [numbers(3, 48, dtype=dtype), FACTOR], {"group_size": 24, "scale": 0.25}


def hadamard_quantize(dtype: Any) -> Example:
    inputs, attributes = hadamard_transform(dtype)
    return inputs, {**attributes, "clip": 1.0, "largest": 127}


def kronecker_transform(dtype: Any) -> Example:
    return [numbers(3, 12, dtype=dtype), FACTOR, numbers(4, 4)], {}


def kronecker_quantize(dtype: Any) -> Example:
    return kronecker_transform(dtype)[0], {"clip": 1.0, "largest": 127}


def codebook_matmul(dtype: Any) -> Example:
    outliers = [np.array([0, 1, 1, 2], np.int32), np.array([3, 60], np.int32), np.array([2, -3], np.float32)]
    inputs = [numbers(2, 64, dtype=dtype), raw(3, 32), numbers(1, 16, 1, 1, seed=2), numbers(3, 2, seed=3)]
    inputs += [NO_BYTES.reshape(0), *outliers, numbers(3, dtype=dtype)]
    return inputs, {"bits": 4, "group_size": 32, "activation_block": 0}


def weight(rows: int, columns: int) -> list[Any]:
    blocks = columns // 32
    scales = np.abs(numbers(rows, blocks, seed=4)) / 50
    return [raw(rows, blocks, 16), scales, raw(rows, (blocks * 4 + 7) // 8), EMPTY]


def quantized_linear(dtype: Any) -> Example:
    inputs = [numbers(2, 64, dtype=dtype), numbers(64), *weight(6, 64), numbers(6), numbers(2, 6, dtype=dtype)]
    return inputs, {"bits": 4, "block_size": 32, "activation_bits": 16, "epsilon": 1e-5}


def quantized_mlp(dtype: Any) -> Example:
    inputs = [numbers(2, 64, dtype=dtype), numbers(64), *weight(64, 64), *weight(64, 32)]
    return inputs, {"bits": 4, "block_size": 32, "activation_bits": 16, "activation": 0, "epsilon": 1e-5}


def quantized_kv_attention(dtype: Any) -> Example:
    """An empty cache of 8 bits and a prompt of 9 tokens, two of which go into a block."""
    width, window, depth = 4, 4, 8
    cache = [np.zeros((1, 2, 1, 2 * width * depth), np.uint8), np.zeros((1, 2, 1, 2 * (depth + width)), np.float16)]
    cache.append(np.zeros((1, 1, 2, window + width, depth), np.float16))
    angles = np.arange(20)[:, None] / np.array([1.0, 10.0])
    inputs = [
        numbers(1, 9, 16, dtype=dtype),
        numbers(1, 9, 8, dtype=dtype, seed=1),
        numbers(1, 9, 8, dtype=dtype, seed=2),
    ]
    inputs += [*cache, np.array([8], np.int32), np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)]
    attributes = {"num_heads": 2, "kv_num_heads": 1, "scale": 0.4, "block_size": width, "window": window}
    return inputs, attributes


def cached_attention(dtype: Any) -> Example:
    inputs = [
        numbers(1, 2, 16, dtype=dtype),
        numbers(1, 2, 8, dtype=dtype, seed=1),
        numbers(1, 2, 8, dtype=dtype, seed=2),
    ]
    inputs += [numbers(1, 1, 6, 8, dtype=dtype, seed=3), numbers(1, 1, 6, 8, dtype=dtype, seed=4)]
    angles = np.arange(6)[:, None] / np.array([1.0, 10.0])
    inputs += [
        np.array([5], np.int32),
        np.array(6, np.int32),
        np.cos(angles).astype(dtype),
        np.sin(angles).astype(dtype),
    ]
    return inputs, {"num_heads": 2, "kv_num_heads": 1}


EXAMPLES: dict[str, Callable[[Any], Example]] = {
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
