"""Attentions as converters write them that aren't run here, spelled by hand after their habits, in ONNX text.

Importing this adds them to `matrix_models.MODELS`; their one variant is `text`.

- tf2onnx: Einsum, or MatMul with explicit Transpose; shapes by Cast, Slice, Squeeze and Concat; dense layers as Reshape
  to two axes, MatMul and Add; masks as (1 - m)·-10000.
- paddle2onnx: q, k, v by Slice and Squeeze of one packed tensor of rank 5, Scale as Mul and Add of zero.
- keras2onnx: heads merged into the batch, a mask by Where with -1e9 of the full shape.
- tokens first: projections packed and interleaved by head, as MXNet had them.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
from matrix_models import WIDTH, add
from onnx import numpy_helper

TEXTS: dict[str, tuple[str, int]] = {}
"""The graph of each text, and its opset. Weights are the initializers named in it as `w_...`, drawn at random."""

_SHAPES: dict[str, dict[str, tuple[int, ...]]] = {}


def _text(
    name: str, form: str, opset: int, body: str, weights: dict[str, tuple[int, ...]], masked: bool = True
) -> None:
    key = f"onnx:{name}"
    TEXTS[key] = body, opset
    _SHAPES[key] = weights
    add(key, "masked" if masked else "sequence", 1, form, lambda: text_model(key), implementations=())


def text_model(key: str) -> onnx.ModelProto:
    """The model of a text, with its weights."""
    body, opset = TEXTS[key]
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}]>\n{body}')
    rng = np.random.default_rng(0)
    for name, shape in _SHAPES[key].items():
        weight = rng.normal(size=shape) * 0.3
        model.graph.initializer.append(numpy_helper.from_array(weight.astype(np.float32), name))
    onnx.checker.check_model(model)
    return model


_SQUARE = {f"w_{n}": (WIDTH, WIDTH) for n in "qkvo"} | {f"b_{n}": (WIDTH,) for n in "qkvo"}
_INPUTS = "float[batch, tokens, 32] x, bool[batch, tokens] mask"

_text(
    "tf2onnx-bert",
    "dense layers on two axes, shapes computed, penalty",
    13,
    f"""
g ({_INPUTS}) => (float[batch, tokens, 32] y)
<int64[2] flat = {{-1, 32}}, int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] two = {{2}},
 int32[1] heads = {{4}}, int32[1] size = {{8}},
 int32[1] width = {{32}}, float unit = {{1.0}}, float penalty = {{-10000.0}}, float scale = {{0.35355338}},
 int64[1] a1 = {{1}}, int64[1] a2 = {{2}}>
{{
  s = Shape (x)
  s32 = Cast <to = 6> (s)
  b = Slice (s32, zero, one, zero)
  bs = Squeeze (b, zero)
  t = Slice (s32, one, two, zero)
  ts = Squeeze (t, zero)
  bu = Unsqueeze (bs, zero)
  tu = Unsqueeze (ts, zero)
  split32 = Concat <axis = 0> (bu, tu, heads, size)
  split = Cast <to = 7> (split32)
  merged32 = Concat <axis = 0> (bu, tu, width)
  merged = Cast <to = 7> (merged32)
  x2 = Reshape (x, flat)
  q2 = MatMul (x2, w_q)
  q1 = Add (q2, b_q)
  q4 = Reshape (q1, split)
  q = Transpose <perm = [0, 2, 1, 3]> (q4)
  k2 = MatMul (x2, w_k)
  k1 = Add (k2, b_k)
  k4 = Reshape (k1, split)
  kt = Transpose <perm = [0, 2, 3, 1]> (k4)
  v2 = MatMul (x2, w_v)
  v1 = Add (v2, b_v)
  v4 = Reshape (v1, split)
  v = Transpose <perm = [0, 2, 1, 3]> (v4)
  m = Cast <to = 1> (mask)
  mu = Unsqueeze (m, a1)
  mu2 = Unsqueeze (mu, a2)
  inverse = Sub (unit, mu2)
  added = Mul (inverse, penalty)
  raw = MatMul (q, kt)
  scaled = Mul (raw, scale)
  scores = Add (scaled, added)
  p = Softmax <axis = 3> (scores)
  c = MatMul (p, v)
  ct = Transpose <perm = [0, 2, 1, 3]> (c)
  c2 = Reshape (ct, flat)
  o = MatMul (c2, w_o)
  ob = Add (o, b_o)
  y = Reshape (ob, merged)
}}""",
    _SQUARE,
)

_text(
    "tf2onnx-keras",
    "all products as Einsum, the mask one axis later",
    13,
    f"""
g ({_INPUTS}) => (float[batch, tokens, 32] y)
<float unit = {{1.0}}, float penalty = {{-1000000000.0}}, float scale = {{0.35355338}}, int64[2] axes = {{1, 2}}>
{{
  q0 = Einsum <equation = "abc,cde->abde"> (x, w_q)
  q1 = Add (q0, b_q)
  q = Mul (q1, scale)
  k0 = Einsum <equation = "abc,cde->abde"> (x, w_k)
  k = Add (k0, b_k)
  v0 = Einsum <equation = "abc,cde->abde"> (x, w_v)
  v = Add (v0, b_v)
  m = Cast <to = 1> (mask)
  mu = Unsqueeze (m, axes)
  inverse = Sub (unit, mu)
  added = Mul (inverse, penalty)
  raw = Einsum <equation = "aecd,abcd->acbe"> (k, q)
  scores = Add (raw, added)
  p = Softmax (scores)
  c = Einsum <equation = "acbe,aecd->abcd"> (p, v)
  o = Einsum <equation = "abcd,cde->abe"> (c, w_o)
  y = Add (o, b_o)
}}""",
    {
        **{f"w_{n}": (WIDTH, 4, 8) for n in "qkv"},
        **{f"b_{n}": (4, 8) for n in "qkv"},
        "w_o": (4, 8, WIDTH),
        "b_o": (WIDTH,),
    },
)

_text(
    "paddle2onnx",
    "q, k, v sliced from one packed tensor of rank 5",
    11,
    """
g (float[batch, tokens, 32] x) => (float[batch, tokens, 32] y)
<int64[5] packed = {0, -1, 3, 4, 8}, int64[1] i0 = {0}, int64[1] i1 = {1}, int64[1] i2 = {2}, int64[1] i3 = {3},
 float scale = {0.35355338},
 float nothing = {0.0}, int64[3] merged = {0, -1, 32}>
{
  a = MatMul (x, w_p)
  b = Add (a, b_p)
  c = Reshape (b, packed)
  d = Transpose <perm = [2, 0, 3, 1, 4]> (c)
  q5 = Slice (d, i0, i1, i0)
  q4 = Squeeze <axes = [0]> (q5)
  q3 = Mul (q4, scale)
  q = Add (q3, nothing)
  k5 = Slice (d, i1, i2, i0)
  k = Squeeze <axes = [0]> (k5)
  v5 = Slice (d, i2, i3, i0)
  v = Squeeze <axes = [0]> (v5)
  kt = Transpose <perm = [0, 1, 3, 2]> (k)
  s = MatMul (q, kt)
  p = Softmax <axis = -1> (s)
  e = MatMul (p, v)
  f = Transpose <perm = [0, 2, 1, 3]> (e)
  h = Reshape (f, merged)
  o = MatMul (h, w_o)
  y = Add (o, b_o)
}""",
    {"w_p": (WIDTH, 3 * WIDTH), "b_p": (3 * WIDTH,), "w_o": (WIDTH, WIDTH), "b_o": (WIDTH,)},
    masked=False,
)

_text(
    "keras2onnx",
    "heads in the batch, divided by a root, Where with -1e9",
    12,
    f"""
g ({_INPUTS}) => (float[batch, tokens, 32] y)
<int64[4] split = {{0, 0, 4, 8}}, int64[3] flat = {{-1, 0, 8}}, int64[1] heads = {{4}}, float root = {{2.8284271}},
 float far = {{-1000000000.0}},
 int64[3] merged = {{0, 0, 32}}, int64[1] i0 = {{0}}, int64[1] i1 = {{1}}, int64[1] size = {{8}},
 int64[1] minus = {{-1}}, int64[4] ones = {{1, 1, 1, 1}},
 int64[1] i2 = {{2}}>
{{
  shape = Shape (x)
  batch_size = Slice (shape, i0, i1)
  length = Slice (shape, i1, i2)
  folded = Concat <axis = 0> (minus, length, size)
  unfolded = Concat <axis = 0> (batch_size, heads, length, size)
  square = Concat <axis = 0> (batch_size, heads, length, length)
  q1 = MatMul (x, w_q)
  q2 = Add (b_q, q1)
  q3 = Reshape (q2, split)
  q4 = Transpose <perm = [0, 2, 1, 3]> (q3)
  q = Reshape (q4, folded)
  k1 = MatMul (x, w_k)
  k2 = Add (b_k, k1)
  k3 = Reshape (k2, split)
  k4 = Transpose <perm = [0, 2, 1, 3]> (k3)
  k = Reshape (k4, folded)
  v1 = MatMul (x, w_v)
  v2 = Add (b_v, v1)
  v3 = Reshape (v2, split)
  v4 = Transpose <perm = [0, 2, 1, 3]> (v3)
  v = Reshape (v4, folded)
  kt = Transpose <perm = [0, 2, 1]> (k)
  raw = MatMul (q, kt)
  divided = Div (raw, root)
  s4 = Reshape (divided, square)
  m1 = Unsqueeze <axes = [1, 2]> (mask)
  m = Expand (m1, square)
  hidden = Where (m, s4, far)
  p4 = Softmax <axis = 3> (hidden)
  folded_square = Concat <axis = 0> (minus, length, length)
  p = Reshape (p4, folded_square)
  c = MatMul (p, v)
  c4 = Reshape (c, unfolded)
  ct = Transpose <perm = [0, 2, 1, 3]> (c4)
  c3 = Reshape (ct, merged)
  o = MatMul (c3, w_o)
  y = Add (o, b_o)
}}""",
    _SQUARE,
)

_text(
    "tokens-first",
    "tokens before the batch, packed and interleaved by head",
    15,
    """
g (float[batch, tokens, 32] x) => (float[batch, tokens, 32] y)
<int64[5] packed = {0, 0, 4, 3, 8}, int64[1] axis = {3}, float scale = {0.35355338}, int64[3] merged = {0, 0, 32}>
{
  xt = Transpose <perm = [1, 0, 2]> (x)
  a = MatMul (xt, w_p)
  b = Add (a, b_p)
  c = Reshape (b, packed)
  q5, k5, v5 = Split <axis = 3> (c)
  q4 = Squeeze (q5, axis)
  k4 = Squeeze (k5, axis)
  v4 = Squeeze (v5, axis)
  q3 = Mul (scale, q4)
  q = Transpose <perm = [1, 2, 0, 3]> (q3)
  kt = Transpose <perm = [1, 2, 3, 0]> (k4)
  v = Transpose <perm = [1, 2, 0, 3]> (v4)
  s = MatMul (q, kt)
  p = Softmax <axis = -1> (s)
  e = MatMul (p, v)
  f = Transpose <perm = [2, 0, 1, 3]> (e)
  h = Reshape (f, merged)
  o = MatMul (h, w_o)
  ob = Add (o, b_o)
  y = Transpose <perm = [1, 0, 2]> (ob)
}""",
    {"w_p": (WIDTH, 3 * WIDTH), "b_p": (3 * WIDTH,), "w_o": (WIDTH, WIDTH), "b_o": (WIDTH,)},
    masked=False,
)
