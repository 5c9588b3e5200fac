"""Tiny vision-language models with random weights, one for every way in which they differ as sources of an export."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers
from tiny_encoder_decoders import drawn

WORDS, IMAGE, PAD = 101, 5, 0
LAYER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
TEXT = {
    **LAYER,
    "vocab_size": WORDS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {**LAYER, "image_size": 32, "patch_size": 8}
SIGLIP = {**VISION, "model_type": "siglip_vision_model"}
AXES = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
GRIDS = {
    "depth": 2,
    "num_heads": 4,
    "hidden_size": 32,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
TOKENS = {"image_token_id": IMAGE, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}


def llava() -> Any:
    """Features of one of the inner layers; the method gives a list of them."""
    vision = transformers.CLIPVisionConfig(**{**VISION, "num_hidden_layers": 2})
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=transformers.LlamaConfig(**TEXT), image_token_id=IMAGE
    )
    return transformers.LlavaForConditionalGeneration(config)


def smolvlm() -> Any:
    """Several images a row, and a mask of their pixels."""
    text = {**TEXT, "model_type": "llama"}
    config = transformers.SmolVLMConfig(vision_config=VISION, text_config=text, image_token_id=IMAGE, scale_factor=2)
    return transformers.SmolVLMForConditionalGeneration(config)


def qwen2() -> Any:
    """Images of any size in one row of patches, positions along three axes."""
    vision = {**GRIDS, "embed_dim": 32, "mlp_ratio": 2}
    config = transformers.Qwen2VLConfig(vision_config=vision, text_config={**TEXT, "rope_parameters": AXES}, **TOKENS)
    return transformers.Qwen2VLForConditionalGeneration(config)


def qwen2_5() -> Any:
    """The same, with one layer that attends in windows."""
    vision = {
        **GRIDS, "intermediate_size": 48, "out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [1]
    }  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(
        vision_config=vision, text_config={**TEXT, "rope_parameters": AXES}, **TOKENS
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def qwen3() -> Any:
    """Features for deeper layers too."""
    vision = {**GRIDS, "intermediate_size": 48, "out_hidden_size": 32, "deepstack_visual_indexes": [0]}
    text = {**TEXT, "head_dim": 8, "rope_parameters": AXES}
    return transformers.Qwen3VLForConditionalGeneration(
        transformers.Qwen3VLConfig(vision_config=vision, text_config=text, **TOKENS)
    )


def gemma3() -> Any:
    """A window shorter than the prompt; an image's tokens see each other both ways."""
    types = ["sliding_attention", "full_attention"]
    text = {**TEXT, "num_hidden_layers": 2, "head_dim": 8, "sliding_window": 4, "layer_types": types}
    config = transformers.Gemma3Config(
        vision_config=SIGLIP, text_config=text, image_token_id=IMAGE, mm_tokens_per_image=4
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def paligemma() -> Any:
    """The prompt's tokens see each other both ways, which the model forgets once there is a cache."""
    config = transformers.PaliGemmaConfig(
        vision_config={**SIGLIP, "projection_dim": 32},
        text_config={**TEXT, "model_type": "gemma", "head_dim": 8},
        image_token_id=IMAGE,
        projection_dim=32,
        hidden_size=32,
    )
    return transformers.PaliGemmaForConditionalGeneration(config)


def internvl() -> Any:
    """Features shuffled into fewer and wider ones before they are projected."""
    vision = {**VISION, "image_size": [32, 32], "patch_size": [8, 8]}
    text = {**TEXT, "model_type": "qwen2"}
    return transformers.InternVLForConditionalGeneration(
        transformers.InternVLConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)
    )


def llava_next() -> Any:
    """Puts features together by the sizes of the images."""
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        image_grid_pinpoints=[[32, 64], [64, 32]],
    )
    return transformers.LlavaNextForConditionalGeneration(config)


MODELS: dict[str, Callable[[], Any]] = {
    "llava": llava,
    "smolvlm": smolvlm,
    "qwen2": qwen2,
    "qwen2_5": qwen2_5,
    "qwen3": qwen3,
    "gemma3": gemma3,
    "paligemma": paligemma,
    "internvl": internvl,
    "llava_next": llava_next,
}


def built(name: str) -> Any:
    """The model of this name, as `drawn` makes it."""
    return drawn(MODELS[name])
