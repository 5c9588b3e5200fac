"""The tiny models of `matrix_models` as Hugging Face folders: what an exporter is given.

Encoder-decoders, which the attention matrix has as bare modules, get their head here, since it takes one to generate.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matrix_models import MODELS, Model, built, drawn, feeds

GENERATING = ("decoder", "seq2seq", "spectrogram")
"""Kinds of models that are called step by step, with a cache."""
ANSWER = "answer"
"""The array of the probe that isn't an input."""


def library_models() -> Iterator[Model]:
    """Those of the table that come from the transformers library."""
    import matrix_models

    # Others add to the table when they're imported; the library's are those with attention implementations to choose.
    yield from (model for model in matrix_models.MODELS.values() if model.implementations)


def prepare(_: str) -> None:
    """Import what loading a model takes, in either version of transformers, which imports most of it late."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, PreTrainedModel  # noqa: F401

    torch.set_num_threads(1)


def save(key: str, folder: str) -> None:
    """Write the model's folder, and beside it (`-v4`) the same with a config.json as transformers 4 wrote it.

    Each holds a `probe.npz`: inputs, and the module's first output. Where there are images, a preprocessor_config.json
    tells their size, as published models have it.
    """
    import transformers

    kind = MODELS[key].kind
    module = built(key)
    if kind in GENERATING and not module.can_generate():
        mappings = transformers.models.auto.modeling_auto
        mapping = {
            "seq2seq": mappings.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
            "spectrogram": mappings.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING,
        }[kind]
        config = module.config
        module = drawn(lambda: mapping[type(config)](config))
    module.save_pretrained(folder)
    inputs = feeds(MODELS[key], 1)
    if "pixel_values" in inputs:
        height, width = inputs["pixel_values"].shape[2:]
        told = {"image_processor_type": "ViTImageProcessor", "size": {"height": height, "width": width}}
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps(told))
    np.savez(Path(folder) / "probe.npz", **inputs, **{ANSWER: answer(module, inputs)})
    old = Path(f"{folder}-v4")
    shutil.copytree(folder, old, dirs_exist_ok=True)
    path = old / "config.json"
    path.write_text(json.dumps(legacy(json.loads(path.read_text())), indent=1))


def answer(module: Any, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """The first output."""
    import torch

    with torch.no_grad():
        result = module(**{name: torch.from_numpy(array) for name, array in inputs.items()})
    return (result[0] if isinstance(result, tuple) else next(iter(result.values()))).numpy()


def legacy(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration as transformers 4 spells it, which has the rotary settings at the top."""
    found = {key: legacy(value) if isinstance(value, dict) else value for key, value in config.items()}
    if "backbone_config" in found:
        found = {"use_timm_backbone": False, "use_pretrained_backbone": False, **found}
    rotary = config.get("rope_parameters")
    if not isinstance(rotary, dict):
        return found
    whole = rotary.get("full_attention", rotary) or {}
    found["rope_theta"] = whole.get("rope_theta", 10000.0)
    local = rotary.get("sliding_attention") or {}
    found["rope_local_base_freq"] = local.get("rope_theta", 10000.0)
    found["global_rope_theta"], found["local_rope_theta"] = found["rope_theta"], found["rope_local_base_freq"]
    if whole.get("partial_rotary_factor") is not None:
        found["partial_rotary_factor"] = found["rotary_pct"] = whole["partial_rotary_factor"]
    more = {k: v for k, v in whole.items() if k not in ("rope_theta", "partial_rotary_factor")}
    if more.get("rope_type") == "longrope":
        # These three and no others.
        more = {"type": more["rope_type"], **{k: more[k] for k in ("short_factor", "long_factor")}}
    found["rope_scaling"] = more if more.get("rope_type", "") != "default" else None
    return found


def load(folder: str | Path, **more: Any) -> Any:
    """The module of a folder, as its config.json names its class, in float32 and eval mode."""
    import torch
    import transformers

    config = json.loads((Path(folder) / "config.json").read_text())
    found = getattr(transformers, config["architectures"][0])
    return found.from_pretrained(folder, dtype=torch.float32, **more).eval().requires_grad_(False)
