"""Tiny transformers with random weights, one for every form of attention in the transformers library.

`MODELS` is the table: how the model is built, what it is fed, and how many attentions of softmax(q·kᵀ)·v it holds, from
its configuration alone. Every gain and bias is random, so that a rewrite that forgets one is seen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

WORDS = 101
IMAGE = 32
WIDTH = 32
Feeds = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Model:
    """One tiny model.

    Attributes:
        key: Its name in the table.
        build: Makes the module, with the weights that the library draws.
        kind: What it is fed; see `feeds`.
        sites: Attentions softmax(q·kᵀ)·v in one forward.
        others: Attentions whose scores go through something else than a softmax.
        form: What its attention is an example of.
        fixed: Of `sites`, those whose q or k comes from weights alone: a count of what runs takes them for linear.
        sizes: Sizes that its inputs depend on, by name.
        implementations: The attention implementations of transformers that it has; empty for a plain torch module.
    """

    key: str
    build: Callable[[], Any]
    kind: str
    sites: int
    form: str
    others: int = 0
    fixed: int = 0
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)
    implementations: tuple[str, ...] = ("eager", "sdpa")


MODELS: dict[str, Model] = {}


def add(key: str, kind: str, sites: int, form: str, build: Callable[[], Any], **more: Any) -> None:
    """Add a model to the table."""
    MODELS[key] = Model(key, build, kind, sites, form, **more)


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {
    **SMALL,
    "vocab_size": WORDS,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**TEXT, "num_key_value_heads": 2}
VISION = {**SMALL, "image_size": IMAGE, "patch_size": 8}


def _decoder(config: str, form: str, settings: dict[str, Any], layers: int = 2, key: str = "", **more: Any) -> None:
    def build() -> Any:
        import transformers

        made = getattr(transformers, config + "Config")(**settings)
        # Falcon takes its implementation here only.
        chosen = {"attn_implementation": "eager"} if key == "falcon-alibi" else {}
        module = transformers.AutoModelForCausalLM.from_config(made, **chosen)
        if module._can_set_experts_implementation():
            # The usual one counts tokens by expert with an operator that no exporter has.
            module.set_experts_implementation("batched_mm")
        return module

    add(key or _key(config), "decoder", layers, form, build, implementations=_implementations(key or config), **more)


def _model(config: str, kind: str, sites: int, form: str, settings: dict[str, Any], **more: Any) -> None:
    def build() -> Any:
        import transformers

        made = getattr(transformers, config + "Config")(**settings)
        return getattr(transformers, config + "Model")(made)

    add(_key(config), kind, sites, form, build, implementations=_implementations(config), **more)


_EAGER = (
    "Gemma2", "GPTNeo", "GPTJ", "CodeGen", "Bloom", "Mpt", "GptOss", "XGLM", "DebertaV2", "MPNet", "RoFormer",
    "ConvBert", "SqueezeBert", "WavLM", "Swinv2", "Pvt", "MobileViT", "MobileViTV2", "PoolFormer", "Levit",
    "Cvt", "SwiftFormer", "Blip",
)  # fmt: skip
"""Those for which transformers has no sdpa implementation (Gemma 2 and gpt-oss refuse it)."""


def _implementations(config: str) -> tuple[str, ...]:
    return ("eager",) if config in (*_EAGER, "falcon-alibi") else ("sdpa",) if config == "Falcon" else ("eager", "sdpa")


def _key(config: str) -> str:
    return config.lower().replace("_", "")


# Decoders. With `head_dim` other than hidden_size / num_attention_heads where the architecture has it.
_decoder("Llama", "rotary, grouped heads", GROUPED)
_decoder("Mistral", "sliding window of 4", {**GROUPED, "sliding_window": 4, "head_dim": 16})
_decoder("Qwen2", "biases on q, k, v", GROUPED)
_decoder("Qwen3", "norms of q and k", {**GROUPED, "head_dim": 16})
_decoder(
    "Qwen2Moe",
    "beside experts",
    {
        **GROUPED,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
)
_decoder("Mixtral", "beside experts", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2})
_decoder("Gemma", "multi-query, head size of its own", {**TEXT, "num_key_value_heads": 1, "head_dim": 16})
_decoder(
    "Gemma2",
    "capped scores, window in every other layer",
    {
        **GROUPED,
        "head_dim": 16,
        "query_pre_attn_scalar": 12,
        "sliding_window": 4,
    },
)
_decoder(
    "Gemma3Text",
    "norms of q and k, window, two rotary bases",
    {
        **GROUPED,
        "head_dim": 16,
        "query_pre_attn_scalar": 12,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    },
)
_decoder("Phi3", "packed q, k, v", GROUPED)
_decoder("Phi", "partial rotary, parallel residual", GROUPED)
_decoder(
    "GPT2",
    "packed q, k, v in one Conv1D",
    {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "vocab_size": WORDS,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
)
_decoder(
    "GPTNeo",
    "unscaled scores, local window",
    {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 4,
        "vocab_size": WORDS,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
)
_decoder("GPTNeoX", "partial rotary, packed by head, parallel residual", {**TEXT, "rotary_pct": 0.5})
_decoder(
    "GPTJ",
    "interleaved partial rotary",
    {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "rotary_dim": 4,
        "vocab_size": WORDS,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
)
_decoder(
    "CodeGen",
    "interleaved rotary, packed for four devices",
    {
        "n_embd": 32,
        "n_ctx": 64,
        "n_layer": 2,
        "n_head": 4,
        "rotary_dim": 4,
        "vocab_size": WORDS,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
)
_decoder(
    "OPT",
    "learned positions, scale on q",
    {
        **TEXT,
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
    },
)
_decoder(
    "Bloom",
    "ALiBi, packed by head",
    {
        "hidden_size": 32,
        "n_layer": 2,
        "n_head": 4,
        "vocab_size": WORDS,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
)
_decoder(
    "Falcon",
    "multi-query, packed, parallel residual",
    {
        **TEXT,
        "num_kv_heads": 1,
        "multi_query": True,
        "parallel_attn": True,
        "new_decoder_architecture": False,
    },
)
_decoder("StableLm", "partial rotary, norms by head", {**GROUPED, "qk_layernorm": True, "partial_rotary_factor": 0.5})
_decoder("Cohere", "interleaved rotary, norms of q and k", {**GROUPED, "use_qk_norm": True})
_decoder("Cohere2", "window with rotary, whole without", {**GROUPED, "sliding_window": 4, "head_dim": 8})
_decoder("Glm", "interleaved partial rotary", {**GROUPED, "head_dim": 8})
_decoder("Glm4", "interleaved partial rotary, four norms", {**GROUPED, "head_dim": 8})
_decoder("Olmo2", "norms of q and k before the heads", GROUPED)
_decoder("SmolLM3", "a layer without rotary", {**GROUPED, "no_rope_layers": [1, 0]})
_decoder("Granite", "scale of its own", {**GROUPED, "attention_multiplier": 0.21})
_decoder(
    "Mpt",
    "ALiBi, packed, clamped",
    {
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 4,
        "expansion_ratio": 2,
        "max_seq_len": 64,
        "vocab_size": WORDS,
    },
)
_decoder(
    "GPTBigCode",
    "multi-query",
    {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "vocab_size": WORDS,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
)
_decoder(
    "GptOss",
    "sinks",
    {
        **GROUPED,
        "head_dim": 8,
        "sliding_window": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention"],
    },
)
_decoder("Starcoder2", "biases, grouped heads", GROUPED)
_decoder("Nemotron", "partial rotary", {**GROUPED, "head_dim": 8})
_decoder("Persimmon", "packed by head, norms by head, partial rotary", TEXT)
_decoder(
    "DeepseekV3",
    "latent attention: values of another size than keys",
    {
        **TEXT,
        "num_key_value_heads": 4,
        "q_lora_rank": 12,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 12,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 2,
        "n_shared_experts": 1,
    },
)
_decoder(
    "XGLM",
    "learned positions, scale on q",
    {
        "vocab_size": WORDS,
        "d_model": 32,
        "ffn_dim": 48,
        "num_layers": 2,
        "attention_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
    },
)
_ROTARY = {"original_max_position_embeddings": 32, "rope_theta": 10000.0}
_decoder(
    "Llama",
    "rotary with scaled frequencies",
    {
        **GROUPED,
        "rope_parameters": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            **_ROTARY,
        },
    },
    key="llama-scaled",
)
_decoder(
    "Qwen3",
    "rotary scaled by YaRN: cos and sin times a factor",
    {
        **GROUPED,
        "head_dim": 16,
        "rope_parameters": {"rope_type": "yarn", "factor": 2.0, **_ROTARY},
    },
    key="qwen3-yarn",
)
_decoder(
    "Phi3",
    "rotary of two bases, chosen by length",
    {
        **GROUPED,
        "original_max_position_embeddings": 32,
        "rope_parameters": {
            "rope_type": "longrope",
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.5, 1.6, 1.7, 1.8],
            **_ROTARY,
        },
    },
    key="phi3-long",
)
_decoder(
    "Falcon",
    "ALiBi",
    {
        **TEXT,
        "num_kv_heads": 4,
        "multi_query": False,
        "parallel_attn": False,
        "alibi": True,
        "new_decoder_architecture": False,
    },
    key="falcon-alibi",
)

# Encoders of text.
_model("Bert", "encoder", 2, "padding mask", TEXT)
_model("Roberta", "encoder", 2, "padding mask", TEXT)
_model("XLMRoberta", "encoder", 2, "padding mask", TEXT)
_model(
    "DistilBert",
    "encoder",
    2,
    "padding mask",
    {
        "dim": 32,
        "hidden_dim": 48,
        "n_layers": 2,
        "n_heads": 4,
        "vocab_size": WORDS,
        "max_position_embeddings": 64,
    },
)
_model("Albert", "encoder", 3, "one layer's weights for all", {**TEXT, "embedding_size": 16, "num_hidden_layers": 3})
_model("Electra", "encoder", 2, "padding mask", {**TEXT, "embedding_size": 16})
_model(
    "DebertaV2",
    "encoder",
    2,
    "disentangled: two relative products added",
    {
        **TEXT,
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 8,
        "max_relative_positions": 16,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
    },
)
_model("MPNet", "encoder", 2, "bucketed relative bias", TEXT)
_model(
    "ModernBert",
    "encoder",
    3,
    "rotary, window in two of three layers",
    {
        **TEXT,
        "num_hidden_layers": 3,
        "local_attention": 6,
        "global_attn_every_n_layers": 3,
        "cls_token_id": 3,
        "sep_token_id": 4,
    },
)
_model("RoFormer", "encoder", 2, "interleaved rotary from a table", {**TEXT, "embedding_size": 32})
_model("NomicBert", "encoder", 2, "rotary, packed", TEXT)
_model(
    "ConvBert",
    "encoder",
    2,
    "beside a span-based convolution",
    {**TEXT, "embedding_size": 32, "conv_kernel_size": 3, "head_ratio": 2},
)
_model(
    "SqueezeBert",
    "encoder",
    2,
    "channels first",
    {
        **TEXT,
        "embedding_size": 32,
        "q_groups": 2,
        "k_groups": 2,
        "v_groups": 2,
        "post_attention_groups": 1,
        "intermediate_groups": 2,
        "output_groups": 2,
    },
)

# Encoder and decoder: self-attention of both and cross-attention.
_WORDS2 = {"vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
_BARTISH = {
    **_WORDS2,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
}
_model(
    "T5",
    "seq2seq",
    6,
    "relative bias, unscaled",
    {
        **_WORDS2,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 16,
    },
)
_model("Bart", "seq2seq", 6, "cross-attention", _BARTISH)
_model("Marian", "seq2seq", 6, "cross-attention, sinusoids", {**_BARTISH, "decoder_vocab_size": WORDS})
_model("Pegasus", "seq2seq", 6, "cross-attention", _BARTISH)

# Sound.
_model(
    "Whisper",
    "spectrogram",
    6,
    "cross-attention, keys without bias",
    {
        **{k: v for k, v in _BARTISH.items() if k != "max_position_embeddings"},
        "num_mel_bins": 16,
        "max_source_positions": 20,
        "max_target_positions": 32,
    },
)
_CONVS = {
    "conv_dim": [16, 16],
    "conv_kernel": [10, 3],
    "conv_stride": [5, 2],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
_SPEECH = {**{k: v for k, v in SMALL.items()}, **_CONVS, "vocab_size": 32, "apply_spec_augment": False}
_model("Wav2Vec2", "waveform", 2, "no mask", _SPEECH)
_model("Hubert", "waveform", 2, "no mask", _SPEECH)
_model("WavLM", "waveform", 2, "gated relative bias", {**_SPEECH, "num_buckets": 8, "max_bucket_distance": 16})
_model(
    "Wav2Vec2Conformer",
    "waveform",
    2,
    "relative positions shifted into place",
    {
        **_SPEECH,
        "position_embeddings_type": "relative",
        "conv_depthwise_kernel_size": 3,
    },
)
_model(
    "AST",
    "spectrum",
    2,
    "no mask",
    {**SMALL, "patch_size": 4, "max_length": 20, "num_mel_bins": 16, "frequency_stride": 4, "time_stride": 4},
)

# Images.
_model("ViT", "image", 2, "no mask", VISION)
_model("DeiT", "image", 2, "no mask, two class tokens", VISION)
_model(
    "Beit",
    "image",
    2,
    "relative bias from a table",
    {**VISION, "use_relative_position_bias": True, "use_absolute_position_embeddings": False},
)
_model(
    "Dinov2", "image", 2, "no mask", {**{k: v for k, v in VISION.items() if k != "intermediate_size"}, "mlp_ratio": 2}
)
_model(
    "Dinov2WithRegisters",
    "image",
    2,
    "register tokens",
    {**{k: v for k, v in VISION.items() if k != "intermediate_size"}, "mlp_ratio": 2, "num_register_tokens": 2},
)
_model("DINOv3ViT", "image", 2, "rotary over two axes, keys without bias", VISION)
_model("ViTMSN", "image", 2, "no mask", VISION)
_model("Yolos", "image", 2, "detection tokens", {**VISION, "image_size": [IMAGE, IMAGE], "num_detection_tokens": 5})
_model(
    "Swin",
    "image",
    4,
    "windows, shifted with a mask, relative bias",
    {
        "image_size": IMAGE,
        "patch_size": 2,
        "embed_dim": 16,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "window_size": 4,
        "mlp_ratio": 2.0,
    },
)
_model(
    "Swinv2",
    "image",
    4,
    "cosine scores with a learnt scale, windows",
    {
        "image_size": IMAGE,
        "patch_size": 2,
        "embed_dim": 16,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "window_size": 4,
        "mlp_ratio": 2.0,
    },
)
_STAGES = {
    "num_encoder_blocks": 2,
    "depths": [1, 2],
    "sr_ratios": [4, 1],
    "hidden_sizes": [16, 32],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "num_attention_heads": [1, 4],
    "mlp_ratios": [2, 2],
}
_model("Segformer", "image", 3, "keys and values from a smaller image", _STAGES)
_model(
    "Pvt",
    "image",
    3,
    "keys and values from a smaller image",
    {
        **{k: v for k, v in _STAGES.items() if k != "sr_ratios"},
        "image_size": IMAGE,
        "patch_sizes": [4, 2],
        "strides": [4, 2],
        "sequence_reduction_ratios": [4, 1],
    },
)
# At 64 the last stage would be one token, whose attention is the identity.
_model(
    "MobileViT",
    "image",
    9,
    "unfolded patches",
    {
        "image_size": 128,
        "patch_size": 2,
        "hidden_sizes": [16, 24, 32],
        "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 48],
        "num_attention_heads": 4,
        "mlp_ratio": 2.0,
        "expand_ratio": 2.0,
    },
    sizes={"image": 128},
)
_model(
    "MobileViTV2",
    "image",
    0,
    "linear attention: no product of q and k",
    {
        "image_size": 64,
        "patch_size": 2,
        "width_multiplier": 0.25,
        "n_attn_blocks": [1, 1, 1],
        "base_attn_unit_dims": [32, 32, 32],
    },
    sizes={"image": 64},
)
_model(
    "PoolFormer",
    "image",
    0,
    "pooling: no attention",
    {
        "depths": [1, 1],
        "hidden_sizes": [16, 32],
        "num_encoder_blocks": 2,
        "patch_sizes": [7, 3],
        "strides": [4, 2],
        "padding": [2, 1],
    },
)
_model(
    "Levit",
    "image",
    3,
    "bias by position, values of another size",
    {
        "image_size": 64,
        "hidden_sizes": [32, 48],
        "num_attention_heads": [2, 3],
        "depths": [1, 1],
        "key_dim": [8, 8],
        "mlp_ratio": [2, 2],
        "attention_ratio": [2, 2],
        "down_ops": [["Subsample", 8, 4, 4, 2, 2]],
    },
    sizes={"image": 64},
)
_model(
    "Cvt",
    "image",
    6,
    "projected by convolutions",
    {
        "embed_dim": [8, 16, 32],
        "num_heads": [1, 2, 4],
        "depth": [1, 2, 3],
        "patch_sizes": [7, 3, 3],
        "patch_stride": [4, 2, 1],
        "patch_padding": [2, 1, 1],
    },
)
_model(
    "SwiftFormer",
    "image",
    0,
    "efficient additive attention: no product of q and k",
    {
        "depths": [1, 1],
        "embed_dims": [16, 32],
        "mlp_ratio": 2,
        "down_patch_size": 3,
        "down_stride": 2,
        "down_pad": 1,
        "image_size": 64,
    },
    sizes={"image": 64},
)

_model(
    "SamVision",
    "image",
    2,
    "windows, relative bias computed from q",
    {
        "hidden_size": 32,
        "output_channels": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": IMAGE,
        "patch_size": 4,
        "window_size": 4,
        "global_attn_indexes": [1],
        "mlp_dim": 48,
        "num_pos_feats": 8,
    },
)

# Text beside images.
_CLIP_TEXT = {**TEXT, "projection_dim": 16, "eos_token_id": 2}
_model(
    "CLIP",
    "dual",
    4,
    "causal text beside an image",
    {"text_config": _CLIP_TEXT, "vision_config": {**VISION, "projection_dim": 16}, "projection_dim": 16},
)
_model(
    "Siglip",
    "dual",
    5,
    "pooling by attention with a learnt query",
    {"text_config": {**TEXT, "projection_size": 32}, "vision_config": VISION},
    fixed=1,
)
_model(
    "OwlViT",
    "queries",
    4,
    "causal text beside an image",
    {"text_config": _CLIP_TEXT, "vision_config": VISION, "projection_dim": 16},
)
_model(
    "Blip",
    "dual",
    4,
    "text encoder beside an image",
    {
        "text_config": {**TEXT, "projection_dim": 16, "encoder_hidden_size": 32, "is_decoder": False},
        "vision_config": VISION,
        "projection_dim": 16,
    },
)
_model(
    "Detr",
    "image",
    6,
    "cross-attention to an image, positions on q and k",
    {
        "use_timm_backbone": False,
        "use_pretrained_backbone": False,
        "backbone": None,
        "backbone_config": {
            "model_type": "resnet",
            "embedding_size": 8,
            "hidden_sizes": [8, 16],
            "depths": [1, 1],
            "layer_type": "basic",
            "out_features": ["stage2"],
        },
        "num_queries": 5,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
    },
    fixed=2,
)


def built(key: str) -> Any:
    """The model, the same at every call, with random gains and biases."""
    return drawn(MODELS[key].build)


def drawn(build: Callable[[], Any]) -> Any:
    """The module that `build` makes, in eval mode, every parameter drawn: the same at every call."""
    import torch

    torch.manual_seed(0)
    module = build()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (0.5 if parameter.ndim == 1 else 0.0))
    return module.eval().requires_grad_(False)


def feeds(model: Model, batch: int, tokens: int = 7, past: int = 0, padded: int = 0, seed: int = 0) -> Feeds:
    """What the model is fed, without a cache; the first row has `padded` masked tokens at its end."""
    rng = np.random.default_rng(seed)
    size = model.sizes.get("image", IMAGE)

    def ids(length: int) -> np.ndarray:
        return rng.integers(5, WORDS - 1, size=(batch, length))

    def mask(length: int) -> np.ndarray:
        kept = np.ones((batch, length), np.int64)
        if padded:
            kept[0, -padded:] = 0
        return kept

    image = rng.normal(size=(batch, 3, size, size)).astype(np.float32)
    match model.kind:
        case "decoder" | "encoder":
            return {"input_ids": ids(tokens), "attention_mask": mask(past + tokens)}
        case "seq2seq":
            return {"input_ids": ids(tokens), "attention_mask": mask(tokens), "decoder_input_ids": ids(tokens - 2)}
        case "spectrogram":
            return {
                "input_features": rng.normal(size=(batch, 16, 40)).astype(np.float32),
                "decoder_input_ids": ids(tokens),
                "decoder_attention_mask": mask(tokens),
            }
        case "spectrum":
            return {"input_values": rng.normal(size=(batch, 20, 16)).astype(np.float32)}
        case "waveform":
            return {"input_values": rng.normal(size=(batch, 100 + 40 * tokens)).astype(np.float32)}
        case "image":
            return {"pixel_values": image}
        case "sequence":
            return {"x": rng.normal(size=(batch, tokens, WIDTH)).astype(np.float32)}
        case "masked":
            return {"x": rng.normal(size=(batch, tokens, WIDTH)).astype(np.float32), "mask": mask(tokens).astype(bool)}
        case "series":
            return {"x": rng.normal(size=(batch, WIDTH, tokens)).astype(np.float32)}
        case "map":
            return {"x": rng.normal(size=(batch, WIDTH, 6, 6)).astype(np.float32)}
        case "conditioned":
            return {
                name: rng.normal(size=(batch, length, WIDTH)).astype(np.float32)
                for name, length in (("x", tokens), ("text", 5), ("image", 4))
            }
        case "dual" | "queries":
            return {"input_ids": ids(tokens), "pixel_values": image, "attention_mask": mask(tokens)}
    raise KeyError(model.kind)
