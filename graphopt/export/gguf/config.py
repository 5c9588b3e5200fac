"""The configuration of the model in a GGUF file.

transformers' table of GGUF keys gives most of it. What that leaves out although the file says it (the size of heads,
the window of sliding attention, softcaps, how positions are scaled) is added here by GGUF's own keys, which are the
same for all architectures: without it Llama 3.1, Phi 3 with long context and the larger Gemma 3 come out wrong, and
nothing tells.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt.errors import ModelError, UsageError, first_line
from graphopt.export.dependencies import quiet, require
from graphopt.export.gguf.reader import GGUFFile

_KEYS = {
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope.freq_base_swa": "rope_local_base_freq",
}
"""Keys of GGUF, after the architecture, and the attributes of configurations that they mean."""
_BIASES = {"blk.0.attn_q.bias": "attention_bias", "blk.0.ffn_gate.bias": "mlp_bias"}
"""Tensors that are in the file where an attribute of the configuration is true."""

FACTORS = "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
POSITIONS = (FACTORS, LONG, SHORT)
"""Tensors of a file that belong to its configuration: by what the frequencies of positions are divided."""

_LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_GEMMA_27B = (46, 62)
"""Numbers of layers of the two Gemma models whose queries llama.cpp scales by hidden size / heads."""


def configuration(file: GGUFFile) -> Any:
    """The transformers configuration.

    Raises:
        UsageError: An architecture that transformers doesn't read from GGUF, or a scaling of positions that its
            configuration can't say.
        ModelError: The metadata contradict themselves, or some are missing.
    """
    transformers, known = require("transformers"), require("transformers.modeling_gguf_pytorch_utils")
    try:
        with quiet():
            found, _ = transformers.PreTrainedConfig.get_config_dict(file.path.parent, gguf_file=file.path.name)
            config_class = require("transformers.models.auto.configuration_auto").CONFIG_MAPPING[found["model_type"]]
            config = config_class.from_dict(dict(found))
    except Exception as error:
        if "not supported" in str(error) or isinstance(error, KeyError):
            supported = ", ".join(sorted(known.GGUF_SUPPORTED_ARCHITECTURES))
            raise UsageError(
                f"{file.path} holds the architecture {file.architecture}, which transformers "
                f"{transformers.__version__} doesn't read from GGUF ({supported}); export its safetensors instead"
            ) from error
        raise ModelError(f"{file.path} has unusable metadata: {first_line(error)}") from error
    added = _added(file, config)
    if added:
        try:
            with quiet():
                config = config_class.from_dict({**found, **added})
        except Exception as error:
            raise ModelError(f"{file.path} has unusable metadata: {first_line(error)}") from error
    return config


def _added(file: GGUFFile, config: Any) -> dict[str, Any]:
    """Settings that the file says and transformers' table leaves out."""
    added: dict[str, Any] = {}
    table = require("transformers.modeling_gguf_pytorch_utils").GGUF_TO_TRANSFORMERS_MAPPING["config"]
    known = {**table.get(file.architecture, {}), **table.get(config.model_type, {})}
    for key, attribute in _KEYS.items():
        value = file.of_architecture(key)
        takes = hasattr(config, attribute) or attribute == "rope_local_base_freq"
        if value is not None and takes and not known.get(key):
            added[attribute] = value
    for tensor, attribute in _BIASES.items():
        if tensor in file.tensors and hasattr(config, attribute):
            added[attribute] = True
    # No file says it: llama.cpp knows the two models whose queries aren't scaled by the size of their heads.
    if hasattr(config, "query_pre_attn_scalar"):
        wide = config.num_hidden_layers in _GEMMA_27B
        size = added.get("head_dim", config.head_dim)
        added["query_pre_attn_scalar"] = config.hidden_size // config.num_attention_heads if wide else size
    rotated = file.of_architecture("rope.dimension_count")
    if rotated and not known.get("rope.dimension_count") and hasattr(config, "num_attention_heads"):
        size = added.get("head_dim") or getattr(config, "head_dim", None)
        size = size or config.hidden_size // config.num_attention_heads
        if rotated < size:
            added["partial_rotary_factor"] = rotated / size
    # transformers' defaults are one checkpoint's: an index behind the vocabulary would be refused.
    if (config.pad_token_id or 0) >= (getattr(config, "vocab_size", None) or 2**31):
        added["pad_token_id"] = None
    scaling = _scaling(file, config)
    if scaling:
        added["rope_scaling"] = scaling
        if "original_max_position_embeddings" in scaling and hasattr(config, "original_max_position_embeddings"):
            added["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]
    return added


def _scaling(file: GGUFFile, config: Any) -> dict[str, Any] | None:
    """How positions are scaled, as transformers' `rope_scaling`; None where they aren't."""
    kind = file.of_architecture("rope.scaling.type")
    factor = file.of_architecture("rope.scaling.factor")
    original = file.of_architecture("rope.scaling.original_context_length")
    if FACTORS in file.tensors:
        return _llama_3(file, config)
    if LONG in file.tensors and SHORT in file.tensors:
        scaling: dict[str, Any] = {
            "rope_type": "longrope",
            "long_factor": file.tensors[LONG].values().ravel().tolist(),
            "short_factor": file.tensors[SHORT].values().ravel().tolist(),
        }
        if original:
            scaling["original_max_position_embeddings"] = int(original)
        attention = file.of_architecture("rope.scaling.attn_factor")
        return {**scaling, "attention_factor": attention} if attention else scaling
    if kind in (None, "none") or (kind in ("linear", "yarn") and not factor):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        scaling = {"rope_type": "yarn", "factor": factor}
        return {**scaling, "original_max_position_embeddings": int(original)} if original else scaling
    raise UsageError(
        f"{file.path} scales positions by {kind} without the tensors for it; export the model's safetensors instead"
    )


def _llama_3(file: GGUFFile, config: Any) -> dict[str, Any]:
    """Llama 3.1's scaling, of which the file has the factors by frequency that follow from it.

    Raises:
        UsageError: The factors follow from something else.
    """
    stored = file.tensors[FACTORS].values().ravel()
    base = file.of_architecture("rope.freq_base") or 10000.0
    scaling = {"rope_type": "llama3", "factor": float(stored.max()), **_LLAMA_3}
    if not np.allclose(_llama_3_factors(scaling, float(base), 2 * stored.size), stored, rtol=1e-4):
        raise UsageError(
            f"{file.path} divides the frequencies of positions by {FACTORS}, which isn't the scaling of Llama 3; "
            "export the model's safetensors instead"
        )
    return scaling


def _llama_3_factors(scaling: dict[str, Any], base: float, size: int) -> npt.NDArray[np.float64]:
    """By what Llama 3.1 divides each frequency: `factor` for long waves, 1 for short ones, a mixture between."""
    length = 2 * np.pi * base ** (np.arange(0, size, 2) / size)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = np.clip((scaling["original_max_position_embeddings"] / length - low) / (high - low), 0, 1)
    factors: npt.NDArray[np.float64] = 1 / ((1 - smooth) / scaling["factor"] + smooth)
    return factors
