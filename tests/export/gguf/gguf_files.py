"""Tiny random models of the families, and their GGUF files as llama.cpp's converter writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as Type

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 96,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8, "tie_word_embeddings": True}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 32}),
    "phi3": ("Phi3ForCausalLM", {"sliding_window": 8}),
    "gemma2": ("Gemma2ForCausalLM", GEMMA),
    "gemma3": ("Gemma3ForCausalLM", {**GEMMA, "num_hidden_layers": 6}),
}
"""By llama.cpp's name: the transformers class and its settings."""


def tiny(family: str, **settings: object) -> Any:
    """A random model with every parameter random, norms and biases too."""
    name, more = FAMILIES[family]
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**{**SMALL, **more, **settings})).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def write(path: Path, family: str, model: Any, kind: Type = Type.F32, **metadata: object) -> Path:
    """Write the model; matrices are of the type `kind`, everything else float32.

    Further metadata are given without the architecture; `tensors` (name to array) are added, and those of `without`
    left out.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, family)
    writer.add_uint32(f"{family}.vocab_size", config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    parameters = config.rope_parameters
    writer.add_rope_freq_base(parameters.get("full_attention", parameters)["rope_theta"])
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head)
    writer.add_value_length(head)
    partial = parameters.get("partial_rotary_factor", 1.0)
    writer.add_rope_dimension_count(int(head * partial))
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    if family == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    added, without = metadata.pop("tensors", {}), metadata.pop("without", ())
    for key, value in metadata.items():
        key = f"{family}.{key.replace('__', '.')}"
        {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)](key, value)
    names = gguf.get_tensor_name_map(
        next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == family), config.num_hidden_layers
    )
    for name, tensor in model.state_dict().items():
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if (name == "lm_head.weight" and config.tie_word_embeddings) or stored in without:
            continue
        array = tensor.numpy().copy()
        if family.startswith("gemma") and "norm" in name:
            array += 1
        if family == "llama" and any(f"{part}_proj.weight" in name for part in "qk"):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            array = array.reshape(heads, 2, head // 2, -1).swapaxes(1, 2).reshape(array.shape)
        add(writer, stored, array, kind if array.ndim == 2 else Type.F32)
    for name, array in added.items():
        add(writer, name, array, Type.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: gguf.GGUFWriter, name: str, array: np.ndarray, kind: Type) -> None:
    """Add a tensor; of the types that the gguf package can't quantize to, random blocks."""
    try:
        stored = gguf.quantize(array, kind)
    except NotImplementedError:
        stored = blocks(kind, *array.shape, seed=len(name))
    writer.add_tensor(name, stored, raw_dtype=kind)


SCALES = {
    Type.Q2_K: (80, 82),
    Type.Q3_K: (108,),
    Type.Q4_K: (0, 2),
    Type.Q5_K: (0, 2),
    Type.Q6_K: (208,),
    Type.Q4_0: (0,),
    Type.Q4_1: (0, 2),
    Type.Q5_0: (0,),
    Type.Q5_1: (0, 2),
    Type.Q8_0: (0,),
}
"""Where in a block the float16 numbers are."""


def blocks(kind: Type, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Random blocks: every bit pattern in the integers, scales of the size of real ones."""
    size, stored = gguf.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(seed)
    found = generator.integers(0, 256, (rows, columns // size, stored), dtype=np.uint8)
    for at in SCALES[kind]:
        scales = generator.normal(0, 0.01, found.shape[:2]).astype(np.float16)
        found[..., at : at + 2] = scales[..., None].view(np.uint8)
    return found.reshape(rows, -1)
