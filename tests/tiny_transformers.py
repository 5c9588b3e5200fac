"""Tiny transformers with random weights, exported by torch.export or TorchScript, for tests of what stands on structure."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from shared_files import made_once

SIZE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 101}
_WHISPER = {
    "encoder_layers": 3, "decoder_layers": 2, "d_model": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_mel_bins": 16, "max_source_positions": 20, "vocab_size": 101,
    "max_target_positions": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    "use_cache": False,
}  # fmt: skip


def _build(name: str) -> Any:
    import transformers as t

    wide = {**SIZE, "intermediate_size": 64}
    cached = {"use_cache": False}
    match name:
        case "gpt2":
            return t.GPT2LMHeadModel(t.GPT2Config(n_layer=3, n_embd=32, n_head=4, vocab_size=101, **cached))
        case "opt":
            return t.OPTForCausalLM(
                t.OPTConfig(**SIZE, ffn_dim=64, max_position_embeddings=64, word_embed_proj_dim=32, **cached)
            )
        case "llama":
            return t.LlamaForCausalLM(t.LlamaConfig(**wide, num_key_value_heads=2, **cached))
        case "gemma":
            return t.GemmaForCausalLM(t.GemmaConfig(**wide, num_key_value_heads=2, head_dim=8, **cached))
        case "gemma2":
            return t.Gemma2ForCausalLM(t.Gemma2Config(**wide, num_key_value_heads=2, head_dim=8, **cached))
        case "qwen3":
            return t.Qwen3ForCausalLM(t.Qwen3Config(**wide, num_key_value_heads=2, head_dim=8, **cached))
        case "neox":
            return t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**wide, **cached))
        case "bert":
            return t.BertModel(t.BertConfig(**wide, max_position_embeddings=64))
        case "vit":
            sizes = {key: value for key, value in wide.items() if key != "vocab_size"}
            return t.ViTForImageClassification(t.ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=10))
        case "whisper":
            return t.WhisperForConditionalGeneration(t.WhisperConfig(**_WHISPER))
        case "resnet":
            return t.ResNetForImageClassification(
                t.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[2, 2], layer_type="basic", num_labels=5)
            )
    raise KeyError(name)


def feeds(name: str, batch: int = 2, tokens: int = 9) -> dict[str, np.ndarray]:
    """Inputs of the model `name`."""
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 100, size=(batch, tokens))
    if name in ("vit", "resnet"):
        return {"pixel_values": rng.normal(size=(batch, 3, 32, 32)).astype(np.float32)}
    if name == "whisper":
        return {
            "input_features": rng.normal(size=(batch, 16, 40)).astype(np.float32),
            "decoder_input_ids": rng.integers(3, 100, size=(batch, 7)),
        }
    return {"input_ids": ids, "attention_mask": np.ones((batch, tokens), dtype=np.int64)}


def exported(name: str, exporter: str = "dynamo") -> Path:
    """The model `name` as "dynamo" (torch.export, opset 18) or "torchscript" (opset 17) writes it; made once a run.

    Every gain and bias is random, so that a rewrite that forgets one is seen.
    """
    return made_once(f"{name}-{exporter}.onnx", functools.partial(_export, name, exporter))


def _export(name: str, exporter: str, path: Path) -> None:
    import torch

    torch.manual_seed(0)
    model = _build(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (0.5 if parameter.ndim == 1 else 0.0))

    class Positional(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *tensors: Any) -> Any:
            return self.model(**dict(zip(inputs, tensors, strict=True)))[0]

    inputs = list(feeds(name))
    arguments = tuple(torch.from_numpy(array) for array in feeds(name).values())
    module = Positional().eval()
    model.set_attn_implementation("eager")
    tokens = inputs[0] == "input_ids"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if exporter == "dynamo":
            free = torch.export.Dim.DYNAMIC
            shapes = (tuple({0: free, 1: free} for _ in inputs),) if tokens else None
            torch.onnx.export(
                module, arguments, path, dynamo=True, dynamic_shapes=shapes, opset_version=18, external_data=False,
                input_names=inputs, output_names=["out"], verbose=False,
            )  # fmt: skip
        else:
            axes = {key: {0: "batch", 1: "tokens"} for key in inputs} if tokens else None
            torch.onnx.export(
                module, arguments, path, dynamo=False, opset_version=17, dynamic_axes=axes,
                input_names=inputs, output_names=["out"],
            )  # fmt: skip


def cached_feeds(name: str, batch: int = 2, tokens: int = 3, past: int = 4) -> dict[str, np.ndarray]:
    """Inputs of `exported_cached(name)`; those of `WITHOUT_POSITIONS` take no positions."""
    rng = np.random.default_rng(0)
    config = _build(name).config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    made = {
        "input_ids": rng.integers(3, 100, size=(batch, tokens)),
        "attention_mask": np.ones((batch, past + tokens), dtype=np.int64),
    }
    if name not in WITHOUT_POSITIONS:
        made["position_ids"] = np.broadcast_to(np.arange(past, past + tokens), (batch, tokens)).copy()
    for layer in range(config.num_hidden_layers):
        for part in ("key", "value"):
            array = rng.normal(size=(batch, heads, past, size)).astype(np.float32)
            made[f"past_key_values.{layer}.{part}"] = array
    return made


WITHOUT_POSITIONS = ("opt", "gemma")
"""Decoders that `exported_cached` gives no position_ids: one derives them from the mask, one from the cache."""


def cached_model(name: str) -> Any:
    """The decoder `name` of PyTorch with random weights, the same every time."""
    import torch

    torch.manual_seed(0)
    model = _build(name).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.2 + (0.5 if parameter.ndim == 1 else 0.0))
    model.set_attn_implementation("eager")
    return model


def exported_cached(name: str, exporter: str = "dynamo") -> Path:
    """The decoder `name` with its KV cache: past_key_values.N.key/value in, logits and present.N.key/value out."""
    return made_once(f"{name}-cached-{exporter}.onnx", functools.partial(_export_cached, name, exporter))


def _export_cached(name: str, exporter: str, path: Path) -> None:
    import torch
    import transformers

    model = cached_model(name)
    arrays = cached_feeds(name)
    inputs = list(arrays)
    fixed = [key for key in inputs if not key.startswith("past")]
    pasts = inputs[len(fixed) :]

    class WithCache(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *tensors: Any) -> Any:
            cache, past = transformers.DynamicCache(), tensors[len(fixed) :]
            for layer in range(len(past) // 2):
                cache.update(past[2 * layer], past[2 * layer + 1], layer)
            given = dict(zip(fixed, tensors[: len(fixed)], strict=True))
            result = self.model(**given, past_key_values=cache, use_cache=True)
            present = [t for layer in result.past_key_values.layers for t in (layer.keys, layer.values)]
            return (result.logits, *present)

    outputs = ["logits", *(key.replace("past_key_values", "present") for key in pasts)]
    sizes = {key: {0: "batch", 2: "past"} if key in pasts else {0: "batch", 1: "sequence"} for key in inputs}
    sizes["attention_mask"] = {0: "batch", 1: "total"}
    arguments = tuple(torch.from_numpy(array) for array in arrays.values())
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        if exporter == "dynamo":
            torch.onnx.export(
                WithCache().eval(), arguments, path, dynamo=True, dynamic_shapes=(tuple(sizes.values()),),
                opset_version=20, external_data=False, input_names=inputs, output_names=outputs, verbose=False,
            )  # fmt: skip
        else:
            axes = sizes | {key: {0: "batch", 2: "total"} for key in outputs[1:]} | {"logits": sizes["input_ids"]}
            torch.onnx.export(
                WithCache().eval(), arguments, path, dynamo=False, opset_version=17, dynamic_axes=axes,
                input_names=inputs, output_names=outputs,
            )  # fmt: skip
