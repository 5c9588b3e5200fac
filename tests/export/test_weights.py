"""The weights of a checkpoint: as from_pretrained loads them, bit for bit, and one clear sentence where it is broken."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.errors import ModelError, UsageError
from graphopt.graph.load import load
from graphopt.graph.save import save

pytestmark = pytest.mark.export
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

from graphopt.export.torch_tensors import as_torch  # noqa: E402
from graphopt.export.weights import (  # noqa: E402
    CheckpointWeights,
    cast,
    cast_like,
    checkpoint_weights,
    load_into,
    not_finite,
    shared_names,
)

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SMALL, "num_key_value_heads": 1}
MIXTURE = {**GROUPED, "num_experts": 4, "moe_intermediate_size": 8, "num_experts_per_tok": 2}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
ONE_STEP = {"conv_dim": (8,), "conv_stride": (2,), "conv_kernel": (3,), "num_feat_extract_layers": 1}


def llava_onevision() -> Any:
    return transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**VISION, image_size=16, patch_size=8),
        text_config=transformers.Qwen2Config(**GROUPED),
        image_token_index=60,
        video_token_index=61,
    )


def qwen2_vl() -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    text = {**GROUPED, "rope_parameters": rope}
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 8}
    return transformers.Qwen2VLConfig(text_config=text, vision_config=vision)


CONFIGS: dict[str, Callable[[], Any]] = {
    "LlamaForCausalLM": lambda: transformers.LlamaConfig(**GROUPED),
    "LlamaForCausalLM tied": lambda: transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "MixtralForCausalLM": lambda: transformers.MixtralConfig(**GROUPED, num_local_experts=4),
    "Qwen2MoeForCausalLM": lambda: transformers.Qwen2MoeConfig(**MIXTURE, shared_expert_intermediate_size=8),
    "GPT2LMHeadModel": lambda: transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=16),
    "BertModel": lambda: transformers.BertConfig(**SMALL, max_position_embeddings=16),
    "BertForMaskedLM": lambda: transformers.BertConfig(**SMALL, max_position_embeddings=16),
    "T5ForConditionalGeneration": lambda: transformers.T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2
    ),
    "FalconForCausalLM": lambda: transformers.FalconConfig(
        **{k: v for k, v in SMALL.items() if k != "intermediate_size"}
    ),
    "Phi3ForCausalLM": lambda: transformers.Phi3Config(**GROUPED),
    "Wav2Vec2Model": lambda: transformers.Wav2Vec2Config(
        **SMALL, **ONE_STEP, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2
    ),
    "Dinov2Model": lambda: transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8, use_swiglu_ffn=True
    ),
    "LlavaOnevisionForConditionalGeneration": llava_onevision,
    "Qwen2VLForConditionalGeneration": qwen2_vl,
}


def make(key: str) -> Any:
    """A model of random numbers, its gains and biases too."""
    torch.manual_seed(0)
    model = getattr(transformers, key.split()[0])(CONFIGS[key]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def blank(key: str) -> Any:
    """The same model without memory for its parameters."""
    with torch.device("meta"):
        return getattr(transformers, key.split()[0])(CONFIGS[key]())


def rename(folder: Path, *pairs: tuple[str, str]) -> None:
    """Rename the tensors of a folder's one file by regular expressions, the first that matches each."""
    file = folder / "model.safetensors"
    renamed = {}
    for name, tensor in safetensors_torch.load_file(file).items():
        found = next((re.sub(a, b, name) for a, b in pairs if re.search(a, name)), name)
        renamed[found] = tensor.clone()
    safetensors_torch.save_file(renamed, file, {"format": "pt"})


def assert_as_loaded(folder: Path, key: str, weights: CheckpointWeights) -> None:
    """Every weight is what from_pretrained loads."""
    loaded = getattr(transformers, key.split()[0]).from_pretrained(folder).state_dict()
    assert set(weights.names()) == set(loaded)
    for name, expected in loaded.items():
        tensor = weights.tensor(name)
        found = as_torch(tensor)
        assert found.dtype == expected.dtype
        assert tuple(tensor.shape.numpy()) == tuple(expected.shape), name
        assert torch.equal(found, expected), name


class TestAsFromPretrained:
    @pytest.mark.parametrize("key", CONFIGS)
    @pytest.mark.parametrize("original", [True, False], ids=["original layout", "library layout"])
    def test_shards(self, tmp_path: Path, key: str, original: bool) -> None:
        make(key).save_pretrained(tmp_path, max_shard_size="10kB", save_original_format=original)
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
        module = blank(key)
        weights = checkpoint_weights(tmp_path, module)
        assert_as_loaded(tmp_path, key, weights)
        assert weights.missing(module) == []
        assert weights.unexpected == ()
        assert weights.untied == ()

    def test_experts_are_computed_one_at_a_time(self, tmp_path: Path) -> None:
        make("MixtralForCausalLM").save_pretrained(tmp_path)
        weights = checkpoint_weights(tmp_path, blank("MixtralForCausalLM"))
        tensor: Any = weights.tensor("model.layers.0.mlp.experts.gate_up_proj")
        assert [block.shape for block in tensor.blocks()] == [(1, 48, 16)] * 4
        with safetensors_torch.safe_open(tmp_path / "model.safetensors", "np") as file:
            gate, up = (file.get_tensor(f"model.layers.0.block_sparse_moe.experts.2.{n}.weight") for n in ("w1", "w3"))
        assert np.array_equal(tensor.numpy()[2], np.concatenate([gate, up]))
        with (tmp_path / "written").open("wb") as out:
            tensor.tofile(out)
        assert (tmp_path / "written").read_bytes() == tensor.tobytes() == tensor.numpy().tobytes()

    def test_what_was_fused_along_rows_is_mapped_where_it_lies(self, tmp_path: Path) -> None:
        key = "Dinov2Model"
        make(key).save_pretrained(tmp_path)
        with safetensors_torch.safe_open(tmp_path / "model.safetensors", "np") as file:
            assert "encoder.layer.0.mlp.weights_in.weight" in file.keys()  # noqa: SIM118
        weights = checkpoint_weights(tmp_path, blank(key))
        assert all(isinstance(weights.tensor(name), ir.ExternalTensor) for name in weights.names())

    @pytest.mark.parametrize(
        ("key", "pairs"),
        [
            ("LlamaForCausalLM", [(r"^model\.", "")]),
            ("BertModel", [("^", "bert.")]),
            ("BertForMaskedLM", [(r"LayerNorm\.weight$", "LayerNorm.gamma"), (r"LayerNorm\.bias$", "LayerNorm.beta")]),
            (
                "Wav2Vec2Model",
                [
                    (r"parametrizations\.weight\.original0", "weight_g"),
                    (r"parametrizations\.weight\.original1", "weight_v"),
                ],
            ),
            (
                "LlavaOnevisionForConditionalGeneration",
                [
                    (r"^lm_head", "language_model.lm_head"),
                    (r"^model\.language_model\.", "language_model.model."),
                    (r"^model\.vision_tower\.(?!vision_model)", "vision_tower.vision_model."),
                    (r"^model\.", ""),
                ],
            ),
            (
                "Qwen2VLForConditionalGeneration",
                [(r"^model\.visual\.", "visual."), (r"^model\.language_model\.", "model.")],
            ),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_names_of_older_files(self, tmp_path: Path, key: str, pairs: list[tuple[str, str]]) -> None:
        make(key).save_pretrained(tmp_path, save_original_format=False)
        rename(tmp_path, *pairs)
        module = blank(key)
        weights = checkpoint_weights(tmp_path, module)
        assert_as_loaded(tmp_path, key, weights)
        assert weights.missing(module) == []
        assert weights.unexpected == ()

    def test_the_base_model_of_a_checkpoint_with_a_head(self, tmp_path: Path) -> None:
        model = make("BertForMaskedLM")
        model.save_pretrained(tmp_path)
        module = blank("BertModel")
        weights = checkpoint_weights(tmp_path, module)
        assert torch.equal(
            as_torch(weights.tensor("encoder.layer.1.output.dense.weight")),
            model.bert.encoder.layer[1].output.dense.weight,
        )
        assert weights.missing(module) == ["pooler.dense.weight", "pooler.dense.bias"]
        assert weights.unexpected
        assert all(name.startswith("cls.predictions.") for name in weights.unexpected)

    def test_a_module_that_transformers_does_not_know(self, tmp_path: Path) -> None:
        module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
        safetensors_torch.save_file({**module.state_dict(), "2.weight": torch.ones(2)}, tmp_path / "any.safetensors")
        weights = checkpoint_weights(tmp_path, module)
        assert set(weights.names()) == set(module.state_dict())
        assert weights.unexpected == ("2.weight",)


class TestTied:
    def test_one_object_and_one_place_in_the_output(self, tmp_path: Path) -> None:
        key = "LlamaForCausalLM tied"
        make(key).save_pretrained(tmp_path)
        module = blank(key)
        weights = checkpoint_weights(tmp_path, module)
        assert shared_names(module) == [["model.embed_tokens.weight", "lm_head.weight"]]
        for given in (weights, cast(weights, "float16")):
            assert given.tensor("lm_head.weight") is given.tensor("model.embed_tokens.weight")

    def test_both_names_in_the_file(self, tmp_path: Path) -> None:
        key = "LlamaForCausalLM tied"
        make(key).save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
        tensors = safetensors_torch.load_file(file)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        safetensors_torch.save_file(tensors, file, {"format": "pt"})
        weights = checkpoint_weights(tmp_path, blank(key))
        assert weights.untied == ()
        assert weights.tensor("lm_head.weight") is weights.tensor("model.embed_tokens.weight")
        # Another number: transformers leaves them two, and so does this.
        tensors["lm_head.weight"][3, 4] += 1
        safetensors_torch.save_file(tensors, file, {"format": "pt"})
        module = blank(key)
        weights = checkpoint_weights(tmp_path, module)
        assert weights.untied == (("model.embed_tokens.weight", "lm_head.weight"),)
        assert_as_loaded(tmp_path, key, weights)


class TestLoadInto:
    @pytest.mark.parametrize("device", ["meta", "cpu"])
    @pytest.mark.parametrize("key", ["LlamaForCausalLM tied", "MixtralForCausalLM"])
    def test_the_module_computes_the_same(self, tmp_path: Path, key: str, device: str) -> None:
        model = make(key)
        model.save_pretrained(tmp_path)
        module = getattr(transformers, key.split()[0])(CONFIGS[key]()).eval()
        if device == "meta":
            rotary, module = module.model.rotary_emb, blank(key).eval()
            module.model.rotary_emb = rotary
            module.tie_weights()  # transformers 5.0 leaves it undone on the device meta.
        load_into(module, checkpoint_weights(tmp_path, module))
        ids = torch.arange(10)[None]
        with torch.no_grad():
            assert torch.equal(module(ids).logits, model(ids).logits)
        assert (module.lm_head.weight is module.model.embed_tokens.weight) == ("tied" in key)
        assert len({id(p) for p in module.parameters()}) == len(list(module.parameters()))

    def test_memory_is_the_files_until_it_is_written_to(self, tmp_path: Path) -> None:
        module = torch.nn.Linear(64, 64)
        safetensors_torch.save_file(module.state_dict(), tmp_path / "model.safetensors")
        before = (tmp_path / "model.safetensors").read_bytes()
        load_into(module, checkpoint_weights(tmp_path, module))
        with torch.no_grad():
            module.weight.zero_()
        assert (tmp_path / "model.safetensors").read_bytes() == before

    def test_other_types_are_cast_and_other_shapes_refused(self, tmp_path: Path) -> None:
        module = torch.nn.Linear(3, 4).half()
        safetensors_torch.save_file(module.state_dict(), tmp_path / "model.safetensors")
        weights = checkpoint_weights(tmp_path, module)
        wide = torch.nn.Linear(3, 4)
        load_into(wide, weights)
        assert wide.weight.dtype == torch.float32
        assert torch.equal(wide.weight, module.weight.float())
        with pytest.raises(ModelError, match=r"the weight weight is \[4, 3\], and \[5, 3\] in the module"):
            load_into(torch.nn.Linear(3, 5), weights)


def test_types_of_the_module(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4).half(), torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    safetensors_torch.save_file(module.double().state_dict(), tmp_path / "model.safetensors")
    module[0].half(), module[1].float()
    weights = cast_like(checkpoint_weights(tmp_path, module), module)
    assert {name: str(weights.tensor(name).dtype) for name in weights.names() if "weight" in name or "num" in name} == {
        "0.weight": "FLOAT16",
        "1.weight": "FLOAT",
        "2.weight": "DOUBLE",
        "2.num_batches_tracked": "INT64",
    }


def test_saved_and_loaded_again(tmp_path: Path) -> None:
    key = "MixtralForCausalLM"
    make(key).save_pretrained(tmp_path / "model", max_shard_size="10kB")
    weights = cast(checkpoint_weights(tmp_path / "model", blank(key)), "float16")
    values = [ir.Value(name=name, const_value=weights.tensor(name)) for name in weights.names()]
    node = ir.node("Identity", [values[0]])
    graph = ir.Graph([], node.outputs, nodes=[node], initializers=values, opset_imports={"": 21})
    for external in (True, False):
        save(ir.Model(graph, ir_version=10), tmp_path / "out.onnx", external_data=external)
        found = load(tmp_path / "out.onnx").graph.initializers
        for name in weights.names():
            tensor = found[name].const_value
            assert tensor is not None
            assert tensor.dtype == ir.DataType.FLOAT16
            assert np.array_equal(tensor.numpy(), weights.tensor(name).numpy()), name


class TestBroken:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        make("LlamaForCausalLM").save_pretrained(tmp_path, max_shard_size="10kB")
        return tmp_path

    def read(self, folder: Path, key: str = "LlamaForCausalLM") -> CheckpointWeights:
        return checkpoint_weights(folder, blank(key))

    def test_a_shape_that_is_another_than_the_configuration_s(self, folder: Path) -> None:
        with torch.device("meta"):
            wider = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**GROUPED, "intermediate_size": 40}))
        with pytest.raises(ModelError, match=r"mlp.*_proj.weight is \[.*24.*\] in the files, and \[.*40.*\] by config"):
            checkpoint_weights(folder, wider)

    def test_a_missing_tensor(self, folder: Path) -> None:
        module = blank("LlamaForCausalLM")
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        file = folder / index["weight_map"].pop("model.norm.weight")
        tensors = safetensors_torch.load_file(file)
        del tensors["model.norm.weight"]
        safetensors_torch.save_file(tensors, file)
        with pytest.raises(
            ModelError, match=r"00\d.safetensors doesn't hold the tensor model.norm.weight, which the index"
        ):
            checkpoint_weights(folder, module)
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        assert checkpoint_weights(folder, module).missing(module) == ["model.norm.weight"]

    def test_a_missing_expert(self, tmp_path: Path) -> None:
        make("MixtralForCausalLM").save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
        tensors = safetensors_torch.load_file(file)
        del tensors["model.layers.1.block_sparse_moe.experts.3.w2.weight"]
        safetensors_torch.save_file(tensors, file, {"format": "pt"})
        with pytest.raises(
            ModelError, match=r"layers.1.mlp.experts.down_proj is \[3, 16, 24\] in the files, and \[4, 16"
        ):
            self.read(tmp_path, "MixtralForCausalLM")
        del tensors["model.layers.1.block_sparse_moe.experts.3.w3.weight"]
        safetensors_torch.save_file(tensors, file, {"format": "pt"})
        with pytest.raises(ModelError, match=r"layers.1.mlp.experts.gate_up_proj can't be made of 7 tensors"):
            self.read(tmp_path, "MixtralForCausalLM")

    def test_only_pickled_weights(self, folder: Path) -> None:
        for file in folder.glob("*.safetensors*"):
            file.unlink()
        shutil.copy(folder / "config.json", folder / "pytorch_model.bin")
        with pytest.raises(
            UsageError, match=r"only as pytorch_model.bin, which .* write it again with save_pretrained"
        ):
            self.read(folder)

    def test_numbers_that_are_none(self, tmp_path: Path) -> None:
        model = make("LlamaForCausalLM tied").bfloat16()
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[2, 3] = float("nan")
            model.model.embed_tokens.weight[5, 0] = float("inf")
        model.save_pretrained(tmp_path)
        weights = self.read(tmp_path, "LlamaForCausalLM tied")
        names = ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"]
        assert sorted(not_finite(weights)) == sorted(names)
