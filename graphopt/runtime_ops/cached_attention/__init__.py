"""CachedAttention: causal attention of grouped heads over a float key/value cache that is written in place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from graphopt.runtime_ops.operator import Attribute, Cost, Operator, Parameter, Shapes


def _cost(shapes: Shapes, attributes: Mapping[str, Any]) -> Cost:
    (batch, new, _), past = shapes[0], shapes[3]
    heads, kv_heads = attributes["num_heads"], attributes["kv_num_heads"]
    depth, total = past[3], past[2] + new
    window = attributes["local_window_size"]
    seen = min(window, total) if window > 0 else total
    # Each query sees what is before it: of the new tokens, half.
    pairs = new * seen if window > 0 else new * (past[2] + (new + 1) / 2)
    cache = 2 * batch * kv_heads * seen * depth
    return Cost(flops=int(4 * batch * heads * depth * pairs), bytes=4 * (cache + 2 * math.prod(shapes[0])))


OPERATOR = Operator(
    name="CachedAttention",
    summary="Causal attention of grouped heads over a key/value cache, with rotation and append, in one dispatch.",
    description=r"""
$y_i = \sum_j \operatorname{softmax}_j\bigl(s\, R(q_i)\cdot R(k_j)\bigr)\, v_j$ over the keys $j \le i$, of the last
`local_window_size` of them where there is a window. Each head of keys and values serves `num_heads / kv_num_heads`
query heads. With a softcap $c$ a score $x$ becomes $c \tanh(x / c)$.

It stands where ONNX Runtime's `GroupQueryAttention` does, with the same inputs. The new tokens of row $b$ take the
places from $t_b = \max(0, \text{seqlens\_k}_b + 1 - S)$ on. Shorter rows of a first run are padded at their end; what
stands there is overwritten by the next tokens. Rows with different lengths may get several new tokens after a past.

`present_key` and `present_value` have $L = \max(C, \text{total\_sequence\_length})$ rows: the past's, the new ones
in their places, and zeros beyond. Bound to the memory of the past, they are written in place and nothing is copied.

The rotation $R$ turns the first $r = 2 \cdot \text{columns}$ features of queries and keys by the row of the tables that
is the token's place: feature $i$ with $i + r / 2$, or as interleaved pairs $2i$ with $2i + 1$. Keys are stored rotated.

The kernel reads each row of the cache once for all query heads that share it, and divides long caches over the threads
however few the heads are. There is no CUDA kernel: flash attention stands behind `GroupQueryAttention` there.
""",
    inputs=(
        Parameter("query", "T", "[B, S, H · D]", "queries; or queries, keys and values side by side"),
        Parameter("key", "T", "[B, S, KV · D]", "new keys; empty where they stand beside the queries"),
        Parameter("value", "T", "[B, S, KV · D]", "new values; empty where they stand beside the queries"),
        Parameter("past_key", "T", "[B, KV, C, D]", "keys up to now, rotated"),
        Parameter("past_value", "T", "[B, KV, C, D]", "values up to now"),
        Parameter("seqlens_k", "int32", "[B]", "tokens of each row with the new ones, less one"),
        Parameter("total_sequence_length", "int32", "[]", "the most tokens of a row"),
        Parameter("cos_cache", "T", "[P, r / 2]", "cosine of each place and pair of features; [0, 0]: no rotation"),
        Parameter("sin_cache", "T", "[P, r / 2]", "sines"),
    ),
    outputs=(
        Parameter("output", "T", "[B, S, H · D]", "the result"),
        Parameter("present_key", "T", "[B, KV, L, D]", "the keys with the new ones"),
        Parameter("present_value", "T", "[B, KV, L, D]", "the values with the new ones"),
    ),
    attributes=(
        Attribute("num_heads", "int", "query heads H"),
        Attribute("kv_num_heads", "int", "heads of keys and values KV, a divisor of H"),
        Attribute("scale", "float", "the scale s; 0: one divided by the root of D", 0.0),
        Attribute("softcap", "float", "the cap of scores; 0: none", 0.0),
        Attribute("local_window_size", "int", "keys that a query sees, its own included; not positive: all", -1),
        Attribute("rotary_interleaved", "int", "1: pairs of neighbouring features are turned", 0),
    ),
    cost=_cost,
    source="GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints",
)
