"""Operators of ONNX Runtime by their definition, for the reference evaluator, in the type of their inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from exactness import Erf, Gelu, GroupNormalization
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

Array = np.ndarray


def rotated(x: Array, cos: Array, sin: Array, interleaved: bool) -> Array:
    """x [B, H, S, D] rotated by tables [S, R/2]."""
    half = cos.shape[-1]
    y = x.copy()
    first = slice(0, 2 * half, 2) if interleaved else slice(0, half)
    second = slice(1, 2 * half, 2) if interleaved else slice(half, 2 * half)
    y[..., first] = x[..., first] * cos - x[..., second] * sin
    y[..., second] = x[..., second] * cos + x[..., first] * sin
    return y


class GroupQueryAttention(OpRun):
    """As ONNX Runtime 1.31 computes it on the CPU, and with its refusals."""

    op_domain = "com.microsoft"

    def _run(
        self, query: Array, key: Array | None, value: Array | None, past_key: Array, past_value: Array,
        last: Array, total: Array, cos: Array | None = None, sin: Array | None = None, num_heads: int | None = None,
        kv_num_heads: int | None = None, scale: float | None = None, softcap: float | None = None,
        local_window_size: int | None = None, do_rotary: int | None = None, rotary_interleaved: int | None = None,
    ) -> tuple[Array, ...]:  # fmt: skip
        assert num_heads
        assert kv_num_heads
        batch, tokens = query.shape[:2]
        past = past_key.shape[2]
        if batch > 1 and tokens > 1 and past:
            raise RuntimeError("batch_size must be 1 when sequence_length > 1 and past context is given.")
        if key is None or value is None:
            depth = query.shape[2] // (num_heads + 2 * kv_num_heads)
            query, key, value = np.split(query, [num_heads * depth, (num_heads + kv_num_heads) * depth], axis=2)
        split = [x.reshape(batch, tokens, n, -1).transpose(0, 2, 1, 3) for x, n in (
            (query, num_heads), (key, kv_num_heads), (value, kv_num_heads),
        )]  # fmt: skip
        q, k, v = split
        assert int(np.ravel(total)[0]) == past + tokens
        assert (last == past + tokens - 1).all()
        if do_rotary:
            assert cos is not None
            assert sin is not None
            assert len(cos) >= past + tokens
            rows = slice(past, past + tokens)
            q, k = (rotated(x, cos[rows], sin[rows], bool(rotary_interleaved)) for x in (q, k))
        k, v = np.concatenate([past_key, k], axis=2), np.concatenate([past_value, v], axis=2)
        repeated = [np.repeat(x, num_heads // kv_num_heads, axis=1) for x in (k, v)]
        scores = q @ repeated[0].transpose(0, 1, 3, 2) * (scale or 1 / math.sqrt(q.shape[-1]))
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        distance = np.arange(tokens)[:, None] + past - np.arange(past + tokens)
        seen = distance >= 0
        if local_window_size is not None and local_window_size > 0:
            seen &= distance < local_window_size
        scores = np.where(seen, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        y = weights / weights.sum(-1, keepdims=True) @ repeated[1]
        return y.transpose(0, 2, 1, 3).reshape(batch, tokens, -1).astype(query.dtype), k, v


class SkipSimplifiedLayerNormalization(OpRun):
    """The normalized sum, and the sum."""

    op_domain = "com.microsoft"

    def _run(self, x: Array, skip: Array, scale: Array, epsilon: float | None = None) -> tuple[Any, ...]:
        total = x + skip
        mean = (total * total).mean(-1, keepdims=True)
        scaled = 1 / np.sqrt(mean + (epsilon or 0.0))
        return total * scaled * scale, mean, scaled, total


def contrib_outputs(model: ir.Model, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Outputs by name."""
    operators = [Erf, Gelu, GroupNormalization, GroupQueryAttention, SkipSimplifiedLayerNormalization]
    evaluator = ReferenceEvaluator(ir.to_proto(model), new_ops=operators)
    return dict(zip(evaluator.output_names, evaluator.run(None, dict(feeds)), strict=True))
