"""Tiny encoder-decoders with random weights, one for every way in which they differ as sources of an export."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

WORDS = 101
TOKENS = {"vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
LAYERS = {
    **TOKENS,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
BART = {**LAYERS, "max_position_embeddings": 64}
ONE = {**LAYERS, "encoder_layers": 1, "decoder_layers": 1}
T5 = {
    **TOKENS,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
}
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def vision() -> Any:
    """Its decoder is narrower than its encoder, so that there is a projection between them."""
    encoder = transformers.ViTConfig(**{**SMALL, "num_hidden_layers": 1}, image_size=32, patch_size=8)
    decoder = transformers.GPT2Config(
        n_embd=24,
        n_layer=1,
        n_head=4,
        vocab_size=WORDS,
        n_positions=64,
        eos_token_id=2,
        bos_token_id=1,
        add_cross_attention=True,
        is_decoder=True,
    )
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        encoder, decoder, decoder_start_token_id=1, pad_token_id=0
    )
    return transformers.VisionEncoderDecoderModel(config)


def whisper() -> Any:
    config = {"num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 64}
    return transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**ONE, **config))


def speech() -> Any:
    config = {
        "input_feat_per_channel": 16,
        "max_source_positions": 200,
        "max_target_positions": 64,
        "conv_channels": 24,
    }
    return transformers.Speech2TextForConditionalGeneration(transformers.Speech2TextConfig(**ONE, **config))


def moonshine() -> Any:
    layers = {f"{part}_num_{count}": n for part in ("encoder", "decoder") for count, n in _MOONSHINE.items()}
    config = transformers.MoonshineConfig(
        **TOKENS, **layers, hidden_size=32, intermediate_size=48, max_position_embeddings=64
    )
    return transformers.MoonshineForConditionalGeneration(config)


_MOONSHINE = {"hidden_layers": 2, "attention_heads": 4}


def t5gemma() -> Any:
    """Windows in every other layer, shorter than what is generated."""
    part = {**SMALL, "vocab_size": WORDS, "head_dim": 8, "num_key_value_heads": 2, "sliding_window": 4}
    config = transformers.T5GemmaConfig(
        encoder=dict(part), decoder={**part, "cross_attention_hidden_size": 32}, vocab_size=WORDS
    )
    config.decoder_start_token_id = 1
    return transformers.T5GemmaForConditionalGeneration(config)


def pix2struct() -> Any:
    """Patches that say where they are."""
    text = {"vocab_size": WORDS, "hidden_size": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    vision = {**SMALL, "num_hidden_layers": 1, "d_ff": 48, "d_kv": 8, "patch_embed_hidden_size": 48, "seq_len": 64}
    config = transformers.Pix2StructConfig(text_config=text, vision_config=vision)
    return transformers.Pix2StructForConditionalGeneration(config)


def florence() -> Any:
    """Images beside the text that the encoder reads."""
    vision = {
        "embed_dim": [8, 16],
        "num_heads": [1, 2],
        "num_groups": [1, 2],
        "depths": [1, 1],
        "patch_size": [7, 3],
        "patch_stride": [4, 2],
        "patch_padding": [3, 1],
        "patch_prenorm": [False, True],
        "window_size": 4,
        "projection_dim": 32,
    }
    config = transformers.Florence2Config(
        text_config={"model_type": "bart", **BART}, vision_config=vision, image_token_id=IMAGE
    )
    return transformers.Florence2ForConditionalGeneration(config)


IMAGE = 5
"""The token in whose place features of an image are put."""

MODELS: dict[str, Callable[[], Any]] = {
    "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
    "bart": lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(**BART)),
    "marian": lambda: transformers.MarianMTModel(transformers.MarianConfig(**BART, decoder_vocab_size=WORDS)),
    "switch": lambda: transformers.SwitchTransformersForConditionalGeneration(
        transformers.SwitchTransformersConfig(**T5, num_experts=2)
    ),
    "led": lambda: transformers.LEDForConditionalGeneration(transformers.LEDConfig(**BART, attention_window=4)),
    "whisper": whisper,
    "speech2text": speech,
    "moonshine": moonshine,
    "vision": vision,
    "t5gemma": t5gemma,
    "florence": florence,
    "pix2struct": pix2struct,
}


def built(name: str) -> Any:
    """The model of this name, as `drawn` makes it."""
    return drawn(MODELS[name])


def drawn(make: Callable[[], Any]) -> Any:
    """The model, the same at every call, its gains and biases random too, its words far enough apart to differ."""
    torch.manual_seed(0)
    module = make()
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            gain = parameter.ndim == 1 and not key.endswith("bias")
            parameter.copy_(torch.randn_like(parameter) * (0.2 if parameter.ndim == 1 else 0.5) + float(gain))
    return module.eval().requires_grad_(False)
