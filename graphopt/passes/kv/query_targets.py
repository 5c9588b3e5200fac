"""Queries that ask of other keys what the original ones asked of theirs: weighted least squares, token by token."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.algebra import attribute_int

Array = npt.NDArray[Any]

DAMPING = 0.1
"""What is added to the diagonal of the keys' covariance, as a part of its mean."""


def query_targets(weights: Array, queries: Array, keys: Array, others: Array) -> tuple[Array, Array]:
    """For each token the query q' that makes Σⱼ aⱼ (q'·k'ⱼ − q·kⱼ + c)² least over q' and c.

    aⱼ are the weights that the token gave to the others, and c is free since a softmax doesn't see it. With the
    a-weighted covariance M of the other keys, and that of other keys and scores b, q' is M⁻¹ b, damped.

    Args:
        weights: a, [H, S, T].
        queries: q, [H, S, D].
        keys: k, [KV, T, D]; H is a multiple of KV.
        others: k', [KV', T, D]; KV is a multiple of KV'.

    Returns:
        q' [H, S, D], and what an error of it counts: the mean of the diagonal of M, [H, S]; both float32.
    """
    heads, tokens, depth = queries.shape
    group = heads // len(keys)
    targets = np.zeros((heads, tokens, depth), np.float32)
    counts = np.zeros((heads, tokens), np.float32)
    for kv in range(len(keys)):
        own = slice(kv * group, (kv + 1) * group)
        a = weights[own].reshape(group * tokens, -1).astype(np.float32)
        scores = (queries[own] @ keys[kv].T).reshape(group * tokens, -1)
        other = others[kv * len(others) // len(keys)].astype(np.float32)
        mean = a @ other
        squares = (other[:, :, None] * other[:, None, :]).reshape(len(other), -1)
        covariance = (a @ squares).reshape(-1, depth, depth) - mean[:, :, None] * mean[:, None, :]
        weighted = a * scores
        right = weighted @ other - mean * weighted.sum(axis=1, keepdims=True)
        level = np.trace(covariance, axis1=1, axis2=2) / depth
        damped = covariance + (DAMPING * level + 1e-6)[:, None, None] * np.eye(depth, dtype=np.float32)
        targets[own] = np.linalg.solve(damped, right[:, :, None])[:, :, 0].reshape(group, tokens, depth)
        counts[own] = np.maximum(level, 0).reshape(group, tokens)
    return targets, counts


def turned_back(numbers: Array, rotation: ir.Node, cosines: Array, sines: Array) -> Array:
    """What a `RotaryEmbedding` makes `numbers` of.

    Args:
        numbers: [B, H, S, D].
        rotation: The operator.
        cosines: [B, S, R/2].
        sines: The same.
    """
    half = cosines.shape[-1]
    cos, sin = cosines[:, None], sines[:, None]
    result = numbers.copy()
    if attribute_int(rotation, "interleaved", 0):
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    else:
        first, second = slice(0, half), slice(half, 2 * half)
    a, b = numbers[..., first], numbers[..., second]
    result[..., first], result[..., second] = a * cos + b * sin, b * cos - a * sin
    return result
