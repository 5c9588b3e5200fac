"""Graphs in which channels can be scaled: a gated MLP, and attention in two spellings; all in float64."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

HEAD = '<ir_version: 10, opset_import: ["": 23]>\n'


def gated(activation: str = "s = Sigmoid(a)\n  act = Mul(a, s)") -> str:
    """A gated MLP behind a norm, in float64."""
    return f"""{HEAD}g (double[batch, seq, 16] x) => (double[batch, seq, 16] y)
<double[16] gain, double[16, 24] gate, double[16, 24] up, double[24, 16] down> {{
  n = RMSNormalization<axis = -1>(x, gain)
  a = MatMul(n, gate)
  {activation}
  b = MatMul(n, up)
  h = Mul(act, b)
  z = MatMul(h, down)
  y = Add(x, z)
}}"""


ATTENTION = f"""{HEAD}g (double[batch, seq, 16] x) => (double[batch, seq, 16] y)
<double[16] gain, double[16] shift, double[16, 16] wq, double[16, 8] wk, double[16, 8] wv, double[8] bv, double[16, 16] wo> {{
  n = LayerNormalization<axis = -1>(x, gain, shift)
  q = MatMul(n, wq)
  k = MatMul(n, wk)
  v0 = MatMul(n, wv)
  v = Add(v0, bv)
  a = Attention<q_num_heads = 4, kv_num_heads = 2>(q, k, v)
  y = MatMul(a, wo)
}}"""

SPELLED_OUT = f"""{HEAD}g (double[2, seq, 16] x) => (double[2, seq, 16] y)
<double[16, 24] packed, double[24] bias, double[16, 16] wo> {{
  all0 = MatMul(x, packed)
  all = Add(all0, bias)
  sizes = Constant<value_ints = [16, 4, 4]>()
  q, k, v = Split<axis = -1>(all, sizes)
  qs = Constant<value_ints = [0, 0, 4, 4]>()
  ks = Constant<value_ints = [0, 0, 1, 4]>()
  q4 = Reshape(q, qs)
  k4 = Reshape(k, ks)
  v4 = Reshape(v, ks)
  qt = Transpose<perm = [0, 2, 1, 3]>(q4)
  kt = Transpose<perm = [0, 2, 3, 1]>(k4)
  vt = Transpose<perm = [0, 2, 1, 3]>(v4)
  times = Constant<value_ints = [1, 4, 1, 1]>()
  kr = Tile(kt, times)
  vr = Tile(vt, times)
  scores = MatMul(qt, kr)
  p = Softmax(scores)
  o4 = MatMul(p, vr)
  ot = Transpose<perm = [0, 2, 1, 3]>(o4)
  os = Constant<value_ints = [0, 0, 16]>()
  o = Reshape(ot, os)
  y = MatMul(o, wo)
}}"""


def numbers_of(value: ir.Value) -> Any:
    """The numbers of an initializer."""
    assert value.const_value is not None
    return value.const_value.numpy()
