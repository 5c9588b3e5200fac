"""The first layers of SmolLM2-135M-Instruct with its true weights, as canonical operators."""

from __future__ import annotations

import functools

import numpy as np
import onnx
import onnx_ir as ir

from graphopt.calibration.calibration import Calibration
from graphopt.calibration.data import ArrayDataset
from graphopt.export.gguf.reader import read
from graphopt.models.catalogue import fetch

VOCABULARY, HEADS, KV_HEADS, SIZE, LONGEST = 2048, 9, 3, 64, 128
_LAYER = """
  n{i} = RMSNormalization<axis = -1, epsilon = 0.00001>(x{i}, attn_norm{i})
  q{i} = MatMul(n{i}, attn_q{i})
  k{i} = MatMul(n{i}, attn_k{i})
  v{i} = MatMul(n{i}, attn_v{i})
  qr{i} = RotaryEmbedding<num_heads = 9, interleaved = 1>(q{i}, cos, sin, places)
  kr{i} = RotaryEmbedding<num_heads = 3, interleaved = 1>(k{i}, cos, sin, places)
  a{i} = Attention<q_num_heads = 9, kv_num_heads = 3, is_causal = 1>(qr{i}, kr{i}, v{i})
  o{i} = MatMul(a{i}, attn_output{i})
  y{i} = Add(x{i}, o{i})
  m{i} = RMSNormalization<axis = -1, epsilon = 0.00001>(y{i}, ffn_norm{i})
  gate{i} = MatMul(m{i}, ffn_gate{i})
  sig{i} = Sigmoid(gate{i})
  act{i} = Mul(gate{i}, sig{i})
  up{i} = MatMul(m{i}, ffn_up{i})
  h{i} = Mul(act{i}, up{i})
  down{i} = MatMul(h{i}, ffn_down{i})
  x{j} = Add(y{i}, down{i})"""


_CACHED = (
    (" a{i} = ", " a{i}, present_key_{i}, present_value_{i} = "),
    ("(qr{i}, kr{i}, v{i})", "(qr{i}, kr{i}, v{i}, , past_key_{i}, past_value_{i})"),
)
"""What is another in a layer with a cache."""


@functools.lru_cache(maxsize=2)
def _proto(layers: int, cached: bool = False) -> bytes:
    tensors = read(fetch("smollm2")).tensors

    def stored(name: str) -> np.ndarray:
        array = np.asarray(tensors[name].values(), np.float32)
        return np.ascontiguousarray(array.T) if name.startswith("blk") and array.ndim == 2 else array

    layer, pasts, presents = _LAYER, "", ""
    for old, new in _CACHED if cached else ():
        layer = layer.replace(old, new)
    for i in range(layers) if cached else ():
        for part in ("key", "value"):
            pasts += f", float[batch, {KV_HEADS}, past, {SIZE}] past_{part}_{i}"
            presents += f", float[batch, {KV_HEADS}, total, {SIZE}] present_{part}_{i}"
    body = "".join(layer.format(i=i, j=i + 1) for i in range(layers))
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 23]>
g (int64[batch, seq] ids, int64[batch, seq] places{pasts}) => (float[batch, seq, {VOCABULARY}] logits{presents}) {{
  x0 = Gather(table, ids){body}
  last = RMSNormalization<axis = -1, epsilon = 0.00001>(x{layers}, output_norm)
  turned = Transpose<perm = [1, 0]>(table)
  logits = MatMul(last, turned)
}}"""
    )
    weights = {"table": stored("token_embd.weight")[:VOCABULARY], "output_norm": stored("output_norm.weight")}
    for i in range(layers):
        for name in ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output"):
            weights[f"{name}{i}"] = stored(f"blk.{i}.{name}.weight")
        for name in ("ffn_norm", "ffn_gate", "ffn_up", "ffn_down"):
            weights[f"{name}{i}"] = stored(f"blk.{i}.{name}.weight")
    angles = np.arange(LONGEST)[:, None] * 100000.0 ** (-np.arange(SIZE // 2) / (SIZE / 2))
    weights |= {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
    for name, array in weights.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    proto: bytes = model.SerializeToString()
    return proto


def first_layers(layers: int = 2, *, cached: bool = False) -> ir.Model:
    """The embedding of the first 2,048 tokens, some layers, the last norm and the head that is tied to the embedding;
    with a cache of keys and values where it is asked for."""
    return ir.from_proto(onnx.load_from_string(_proto(layers, cached)))


def token_ids(seed: int, batch: int = 2, tokens: int = 64) -> dict[str, np.ndarray]:
    """Tokens behind the one that every text begins with."""
    ids = np.random.default_rng(seed).integers(3, VOCABULARY, (batch, tokens))
    ids[:, 0] = 1
    return {"ids": ids, "places": np.broadcast_to(np.arange(tokens), (batch, tokens)).copy()}


def calibration(samples: int = 3) -> Calibration:
    """Data of its own: other tokens than `token_ids(0)`."""
    return Calibration(ArrayDataset([token_ids(seed + 1) for seed in range(samples)]))
