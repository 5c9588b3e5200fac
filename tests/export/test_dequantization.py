"""Quantized checkpoints: what transformers dequantizes is taken over bit for bit, the rest is refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from graphopt.errors import UsageError

pytestmark = pytest.mark.export
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

from graphopt.export.torch_tensors import as_torch  # noqa: E402
from graphopt.export.weights import checkpoint_weights  # noqa: E402
from graphopt.graph.streamed import StreamedTensor  # noqa: E402

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BLOCK = 16
FP8 = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}


def fp8(name: str, weight: Any) -> dict[str, Any]:
    """Eight-bit floats with one scale for each block of 16 by 16."""
    if not name.endswith("_proj.weight"):
        return {name: weight}
    rows, columns = weight.shape
    blocks = weight.float().reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    scales = blocks.abs().amax((1, 3)) / 448
    narrow = (blocks / scales[:, None, :, None]).reshape(rows, columns).to(torch.float8_e4m3fn)
    return {name: narrow, f"{name}_scale_inv": scales}


def mxfp4(name: str, weight: Any) -> dict[str, Any]:
    """Random four-bit floats in blocks of 32 with scales of random powers of two."""
    if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return {name: weight}
    experts, inputs, outputs = weight.shape
    shape = (experts, outputs, inputs // 32)
    blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
    return {f"{name}_blocks": blocks, f"{name}_scales": torch.randint(118, 125, shape, dtype=torch.uint8)}


MODELS = {
    "fp8": ("LlamaForCausalLM", lambda: transformers.LlamaConfig(**SMALL), fp8, FP8),
    "fp8 experts": (
        "Qwen3MoeForCausalLM",
        lambda: transformers.Qwen3MoeConfig(**SMALL, num_experts=4, moe_intermediate_size=32, num_experts_per_tok=2),
        fp8,
        FP8,
    ),
    "mxfp4": (
        "GptOssForCausalLM",
        lambda: transformers.GptOssConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
        mxfp4,
        {"quant_method": "mxfp4"},
    ),
}


def save(folder: Path, key: str, settings: dict[str, Any] | None = None) -> Any:
    """Save a quantized model; returns its class."""
    name, config, quantize, usual = MODELS[key]
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    model_class(config()).to(torch.bfloat16).save_pretrained(folder)
    tensors: dict[str, Any] = {}
    for tensor_name, tensor in safetensors_torch.load_file(folder / "model.safetensors").items():
        tensors |= quantize(tensor_name, tensor)
    safetensors_torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    held = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**held, "quantization_config": settings or usual}))
    return model_class


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("key", MODELS)
def test_as_transformers_dequantizes(tmp_path: Path, key: str, dtype: str) -> None:
    model_class, kind = save(tmp_path, key), getattr(torch, dtype)
    settings = transformers.Mxfp4Config if key == "mxfp4" else transformers.FineGrainedFP8Config
    model = model_class.from_pretrained(tmp_path, dtype=kind, quantization_config=settings(dequantize=True))
    with torch.device("meta"):
        module = model_class(transformers.AutoConfig.from_pretrained(tmp_path)).to(kind)
    weights = checkpoint_weights(tmp_path, module)
    assert weights.missing(module) == []
    assert weights.unexpected == ()
    for name, expected in model.state_dict().items():
        assert torch.equal(as_torch(weights.tensor(name)).to(kind), expected), name
    if key == "fp8 experts":
        tensor = weights.tensor("model.layers.0.mlp.experts.gate_up_proj")
        assert isinstance(tensor, StreamedTensor)
        assert [block.shape for block in tensor.blocks()] == [(1, 64, 64)] * 4


@pytest.mark.parametrize(
    "settings",
    [{"quant_method": "gptq", "bits": 4, "group_size": 128}, {"quant_method": "invented"}, {"bits": 4}],
)
def test_other_ways_are_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    model_class = save(tmp_path, "fp8", settings)
    with torch.device("meta"):
        module = model_class(MODELS["fp8"][1]())
    method = settings.get("quant_method", "an unnamed method")
    with pytest.raises(UsageError, match=f"quantized with {method}, which can't be made floating-point here; give"):
        checkpoint_weights(tmp_path, module)


def test_scales_that_are_not_there(tmp_path: Path) -> None:
    model_class = save(tmp_path, "fp8")
    tensors = safetensors_torch.load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight_scale_inv"]
    safetensors_torch.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with torch.device("meta"):
        module = model_class(transformers.AutoConfig.from_pretrained(tmp_path))
    with pytest.raises(UsageError, match="quantized with fp8, which can't"):
        checkpoint_weights(tmp_path, module)
