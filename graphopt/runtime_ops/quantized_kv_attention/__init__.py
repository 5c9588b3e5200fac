"""QuantizedKVAttention: grouped-query attention over a cache of keys and values that is quantized when written."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from graphopt.runtime_ops.operator import Attribute, Cost, Operator, Parameter, Shapes


@dataclasses.dataclass(frozen=True)
class CacheLayout:
    """Sizes of the cache of one layer.

    Attributes:
        kv_heads: KV heads.
        depth: Features of a head, a multiple of 4.
        key_bits: Bits of a number of a key: 2, 3, 4 or 8.
        value_bits: The same of a value.
        key_per_channel: Whether keys have a scale for each channel of a block, else for each token.
        block_size: Tokens of a block, a multiple of 4.
        group_size: Features with one scale where there is a scale for each token; 0: all of a head.
        window: Newest tokens that are never quantized.
    """

    kv_heads: int
    depth: int
    key_bits: int
    value_bits: int
    key_per_channel: bool = True
    block_size: int = 32
    group_size: int = 0
    window: int = 32

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes of a block and KV head."""
        return self.block_size * self.depth * (self.key_bits + self.value_bits) // 8

    @property
    def scale_numbers(self) -> int:
        """Scales and minimums of a block and KV head."""
        by_token = self.depth // (self.group_size or self.depth) * self.block_size
        return 2 * ((self.depth if self.key_per_channel else by_token) + by_token)

    @property
    def ring(self) -> int:
        """Tokens that the ring of unquantized ones has room for."""
        return self.window + self.block_size

    def shapes(self, batch: int, tokens: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Shapes of codes, scales and recent tokens of a cache with room for at least `tokens` tokens a row."""
        blocks = -(-max(tokens - self.ring + 1, 0) // self.block_size)
        return (
            (batch, blocks, self.kv_heads, self.code_bytes),
            (batch, blocks, self.kv_heads, self.scale_numbers),
            (batch, self.kv_heads, 2, self.ring, self.depth),
        )

    def bytes(self, tokens: int) -> int:
        """Bytes of the cache of one row with room for `tokens` tokens."""
        (_, blocks, *_), _, _ = self.shapes(1, tokens)
        per_block = self.kv_heads * (self.code_bytes + 2 * self.scale_numbers)
        return blocks * per_block + self.kv_heads * 2 * self.ring * self.depth * 2


def layout_of(attributes: Mapping[str, Any], depth: int) -> CacheLayout:
    """The layout of a node's cache, of its attributes and the features of a head."""
    named = {
        field.name: attributes[field.name] for field in dataclasses.fields(CacheLayout) if field.name in attributes
    }
    named |= {"key_per_channel": bool(attributes["key_per_channel"])}
    return CacheLayout(kv_heads=attributes["kv_num_heads"], depth=depth, **named)


def _cost(shapes: Shapes, attributes: Mapping[str, Any]) -> Cost:
    (batch, new, _), codes, recent = shapes[0], shapes[3], shapes[5]
    layout = layout_of(attributes, recent[4])
    # The buffers are taken to be full: how much is in them only the lengths tell.
    tokens = codes[1] * layout.block_size + layout.ring
    heads, depth = attributes["num_heads"], layout.depth
    read = batch * layout.bytes(tokens)
    return Cost(
        flops=4 * batch * new * heads * depth * tokens,
        bytes=read + 4 * batch * new * depth * (2 * heads + 2 * layout.kv_heads),
    )


OPERATOR = Operator(
    name="QuantizedKVAttention",
    summary="Grouped-query attention over a cache of keys and values that is quantized when it is written.",
    description=r"""
With the new tokens of each row put behind those of its past, the query at place $i$ sees the places $j \le i$ (with a
local window of $l$: $j > i - l$ alone), and

$$y_i = \sum_j p_{ij} v_j,\quad p_{ij} = \operatorname{softmax}_j (s \cdot R_i q_i \cdot R_j k_j),$$

$R$ being the rotation by position (none where the tables have no columns). With a softcap $c > 0$ each score $x$
becomes $c \tanh(x / c)$.

**What is quantized.** Tokens go in blocks of `block_size` = W. Once there are $t$ tokens in a row, its first
$W \lfloor \max(t - \text{window}, 0) / W \rfloor$ are quantized, and the others are kept as half-precision numbers. A
query sees the cache as it is when its own token is the newest, so the result doesn't depend on how a text is cut into
runs: a prompt in one piece, in pieces or token by token gives the same. (New keys and values are rounded to half
precision before anything reads them.)

**How.** Numbers $x$ that share a scale become codes of $b$ bits, with $L = 2^b - 1$ and both $m$ and $d$ rounded to
half precision ($m$ downwards):

$$m = \min x,\quad d = (\max x - m) / L,\quad u = \operatorname{clip}(\operatorname{round}((x - m) / d), 0, L),
\quad x \approx u d + m.$$

Keys share scales per channel, over the tokens of a block (`key_per_channel`), or as values do per token, over
`group_size` features of a head (0: all of them). Keys are stored after their rotation, or before it and rotated when
they are read (`rotate_at_read`): channels have steadier ranges before it.

**The cache** is three tensors of a fixed size, of which seqlens_k tells what is filled, C blocks long:

- codes [B, C, KV, W · D · (key_bits + value_bits) / 8]: the codes of the keys of one block and KV head, then of its
  values. Codes are in the order [D / 4, W, 4] (four channels of a token side by side) for keys and [W / 4, D, 4] (four
  tokens of a channel) for values. N codes of $b$ = 2, 4 or 8 bits are N b / 8 bytes: byte i holds the codes i,
  i + N b / 8, i + 2 N b / 8, ..., the first in its lowest bits. Three bits are stored as the two lower ones like this,
  then the highest bits in N / 8 bytes.
- scales [B, C, KV, 2 · (keys' + values')]: d of the keys, m of the keys, d of the values, m of the values; per channel
  these are D numbers, per token [D / group_size, W].
- recent [B, KV, 2, window + W, D]: keys (0) and values (1) of the newest tokens, token t at place t modulo window + W.

A row has room for C · W + window + W − 1 tokens at least. The outputs may be bound to the memory of the inputs
(IoBinding): then only new tokens are written, and nothing is copied. Where more blocks are needed than there are, the
outputs are longer; a bound buffer that is too short is an error. What isn't filled yet may hold anything.

**The CPU kernel** multiplies codes as integers, with queries and weights rounded to 16 bits and a step for each block
(keys that are rotated at read, and prompts, are multiplied in float32): results are within some 10⁻⁴ of the body's.
The cache is the body's to the bit.

**A shared cache.** With `shared` the cache that is given is the present of another node, which holds the new tokens
already; key and value are those that this other node was given. Nothing is written, and the present is left out. The
result is that of a node which puts the same new tokens behind the same past, with one exception: unquantized tokens of
the past are known only as far as they are still in the ring of the present. So where several new tokens follow a past,
the first of them see blocks quantized that a node of its own would still see as they were. In a prompt in one piece,
and token by token, there are none.

**Rows.** Row b holds seqlens_k[b] + 1 tokens in the end, of which the last S are new; where there are fewer than S, the
first ones of the new tokens are its text and the rest is padding, whose outputs are 0. So a batch of prompts is padded
on the right, and rows of different lengths go on from there by any number of tokens.
""",
    inputs=(
        Parameter("query", "T", "[B, S, H · D]", "queries of the new tokens"),
        Parameter("key", "T", "[B, S, KV · D]", "their keys, not rotated where there are tables; D is a multiple of 4"),
        Parameter("value", "T", "[B, S, KV · D]", "their values"),
        Parameter("past_codes", "uint8", "[B, C, KV, code bytes]", "the cache's codes"),
        Parameter("past_scales", "float16", "[B, C, KV, scale numbers]", "the cache's scales and minimums"),
        Parameter("past_recent", "float16", "[B, KV, 2, window + W, D]", "the cache's tokens that aren't quantized"),
        Parameter("seqlens_k", "int32", "[B]", "tokens of each row, past and new, less 1"),
        Parameter("cos_cache", "float", "[P, R / 2]", "cosines by position; without columns: nothing is rotated"),
        Parameter("sin_cache", "float", "[P, R / 2]", "sines; the first R features of a head are rotated"),
    ),
    outputs=(
        Parameter("output", "T", "[B, S, H · D]", "the attention's result"),
        Parameter("present_codes", "uint8", "[B, max(C, blocks needed), KV, code bytes]", "the codes of both", True),
        Parameter(
            "present_scales", "float16", "[B, max(C, blocks needed), KV, scale numbers]", "the scales of both", True
        ),
        Parameter("present_recent", "float16", "[B, KV, 2, window + W, D]", "the newest tokens", True),
    ),
    attributes=(
        Attribute("num_heads", "int", "heads H of queries, a multiple of KV"),
        Attribute("kv_num_heads", "int", "heads KV of keys and values"),
        Attribute("scale", "float", "the scale s of scores, 1/√D as a rule"),
        Attribute("softcap", "float", "the bound c of scores; 0: none", 0.0),
        Attribute("local_window_size", "int", "newest tokens that a query sees, itself included; -1: all", -1),
        Attribute("key_bits", "int", "bits of keys: 2, 3, 4 or 8", 8),
        Attribute("value_bits", "int", "bits of values: 2, 3, 4 or 8", 8),
        Attribute("key_per_channel", "int", "1: keys have scales per channel and block; 0: per token", 1),
        Attribute("block_size", "int", "tokens W of a block, a multiple of 4", 32),
        Attribute("group_size", "int", "features with one scale per token, a multiple of 4 that divides D; 0: D", 0),
        Attribute("window", "int", "newest tokens that are never quantized", 32),
        Attribute("rotate_at_read", "int", "1: keys are stored as they come and rotated when they are read", 0),
        Attribute("rotary_interleaved", "int", "1: features 2c and 2c + 1 turn together; 0: c and c + R/2", 0),
        Attribute("shared", "int", "1: the cache is another node's present, and is read alone", 0),
    ),
    cost=_cost,
    source="KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache",
)
