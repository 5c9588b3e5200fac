"""Weights out of GGUF files: bit for bit transformers', and the model that the file was made of."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.export
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

from gguf import GGMLQuantizationType as Type  # noqa: E402
from gguf_files import FAMILIES, SMALL, tiny, write  # noqa: E402

from graphopt.errors import ModelError, UsageError  # noqa: E402
from graphopt.export.dependencies import quiet, require  # noqa: E402
from graphopt.export.gguf import from_gguf  # noqa: E402
from graphopt.export.gguf.names import Processor, names, skeleton  # noqa: E402

KINDS = [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1]


def by_transformers(path: Path, config: object) -> dict[str, torch.Tensor]:
    with quiet():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, config=config, dtype=torch.float32
        )
    return model.state_dict()


def assert_equals_transformers(path: Path) -> None:
    made = from_gguf(path)
    expected = by_transformers(path, made.config)
    tied = {"lm_head.weight"} if made.config.tie_word_embeddings else set()
    assert set(made.weights.names()) == set(expected) - tied
    for name in made.weights.names():
        tensor = made.weights.tensor(name)
        assert tuple(tensor.shape) == tuple(expected[name].shape)
        assert tensor.numpy().tobytes() == expected[name].numpy().tobytes(), name
        streamed = io.BytesIO()
        tensor.tofile(streamed)
        assert streamed.getvalue() == tensor.tobytes() == expected[name].numpy().tobytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_bit_for_bit_as_transformers_reads_them(tmp_path: Path, family: str) -> None:
    path = write(tmp_path / "m.gguf", family, tiny(family), Type.Q4_1)
    assert_equals_transformers(path)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_type_as_transformers_reads_it(tmp_path: Path, kind: Type) -> None:
    assert_equals_transformers(write(tmp_path / "m.gguf", "llama", tiny("llama"), kind))


@pytest.mark.parametrize("kind", [Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K], ids=lambda kind: kind.name)
def test_k_quants_as_transformers_reads_them(tmp_path: Path, kind: Type) -> None:
    model = tiny("llama", hidden_size=256, num_attention_heads=8, intermediate_size=256)
    assert_equals_transformers(write(tmp_path / "m.gguf", "llama", model, kind))


def load(path: Path) -> object:
    """The module of a file, its weights from the file."""
    made = from_gguf(path)
    with quiet():
        module = made.model_class(made.config).eval().requires_grad_(False)
    state = {name: torch.from_numpy(made.weights.tensor(name).numpy().copy()) for name in made.weights.names()}
    missing, unexpected = module.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    module.tie_weights()
    return module


def assert_same_logits(model: object, other: object) -> None:
    ids = torch.arange(3, 3 + 24)[None] % SMALL["vocab_size"]
    expected, found = model(input_ids=ids).logits, other(input_ids=ids).logits
    assert torch.allclose(found, expected, rtol=0, atol=2e-5 * expected.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_that_the_file_was_made_of(tmp_path: Path, family: str) -> None:
    model = tiny(family)
    assert_same_logits(model, load(write(tmp_path / "m.gguf", family, model)))


def test_attention_biases_of_llama(tmp_path: Path) -> None:
    model = tiny("llama", attention_bias=True)
    for layer in model.model.layers:  # llama.cpp has no place for this one
        layer.self_attn.o_proj.bias.zero_()
    heads = {"q": 4, "k": 2}
    state = model.state_dict()
    permuted = {
        f"blk.{layer}.attn_{part}.bias": state[f"model.layers.{layer}.self_attn.{part}_proj.bias"]
        .numpy()
        .reshape(heads[part], 2, 8)
        .swapaxes(1, 2)
        .reshape(-1)
        for layer in range(2)
        for part in heads
    }
    path = write(tmp_path / "m.gguf", "llama", model, tensors=permuted, without=set(permuted))
    assert_same_logits(model, load(path))


def test_scaling_of_llama_3_comes_from_its_factors(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = tiny("llama", rope_parameters=rope, head_dim=64)
    plain = 1 / 500000.0 ** (np.arange(0, 64, 2) / 64)
    factors = (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    assert factors.max() == pytest.approx(8)
    path = write(tmp_path / "m.gguf", "llama", model, tensors={"rope_freqs.weight": factors})
    other = load(path)
    assert torch.allclose(other.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq, rtol=1e-6)
    assert_same_logits(model, other)
    path = write(tmp_path / "n.gguf", "llama", model, tensors={"rope_freqs.weight": factors[::-1].copy()})
    with pytest.raises(UsageError, match=r"n\.gguf divides the frequencies .* by rope_freqs\.weight, which isn't"):
        from_gguf(path)


def test_long_context_of_phi_comes_from_its_factors(tmp_path: Path) -> None:
    long, short = (np.linspace(1, top, 6, dtype=np.float32) for top in (9, 2))
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.75,
        "long_factor": long.tolist(),
        "short_factor": short.tolist(),
        "original_max_position_embeddings": 16,
    }
    model = tiny("phi3", rope_parameters=rope, original_max_position_embeddings=16)
    path = write(
        tmp_path / "m.gguf",
        "phi3",
        model,
        tensors={"rope_factors_long.weight": long, "rope_factors_short.weight": short},
        rope__scaling__original_context_length=16,
        rope__scaling__type="longrope",
    )
    assert_same_logits(model, load(path))


def test_linear_scaling_of_gemma_3(tmp_path: Path) -> None:
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    model = tiny("gemma3", rope_parameters=rope)
    path = write(tmp_path / "m.gguf", "gemma3", model, rope__scaling__type="linear", rope__scaling__factor=8.0)
    assert_same_logits(model, load(path))


@pytest.mark.parametrize("family", FAMILIES)
def test_names_are_those_of_transformers_walk_over_all_submodules(tmp_path: Path, family: str) -> None:
    path = write(tmp_path / "m.gguf", family, tiny(family))
    made = from_gguf(path)
    module = skeleton(made.model_class, made.config)
    processor = Processor(made.weights.file, made.config)
    walked = require("transformers.modeling_gguf_pytorch_utils").get_gguf_hf_weights_map(module, processor.inner)
    found = names(module, processor)
    assert {k: found.get(k) for k in made.weights.file.tensors} == {k: walked.get(k) for k in made.weights.file.tensors}


def test_head_is_tied_where_the_file_has_none(tmp_path: Path) -> None:
    model = tiny("llama", tie_word_embeddings=True)
    made = from_gguf(write(tmp_path / "m.gguf", "llama", model))
    assert made.config.tie_word_embeddings
    assert "lm_head.weight" not in made.weights.names()
    with pytest.raises(ModelError, match=r"has no tensor for the parameter lm_head\.weight"):
        made.weights.tensor("lm_head.weight")
    assert_same_logits(model, load(tmp_path / "m.gguf"))


def test_the_same_name_gives_the_same_tensor(tmp_path: Path) -> None:
    made = from_gguf(write(tmp_path / "m.gguf", "llama", tiny("llama")))
    name = "model.embed_tokens.weight"
    assert made.weights.tensor(name) is made.weights.tensor(name)


def test_stored_rows_of_permuted_queries(tmp_path: Path) -> None:
    model = tiny("llama")
    made = from_gguf(write(tmp_path / "m.gguf", "llama", model))
    stored, rows = made.weights.stored("model.layers.0.self_attn.q_proj.weight")
    assert stored.name == "blk.0.attn_q.weight"
    assert not np.array_equal(rows, np.arange(64))
    assert np.array_equal(stored.values()[rows], model.model.layers[0].self_attn.q_proj.weight.numpy())
    assert made.weights.stored("model.norm.weight") is None


def test_a_file_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    made = from_gguf(write(tmp_path / "m.gguf", "qwen2", tiny("qwen2")))
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "other.txt").write_text("kept")
    files, notes = made.write_companions(folder)
    assert [file.name for file in files] == ["config.json", "generation_config.json"]
    assert notes == ["m.gguf holds no tokenizer, so none is beside the model"]
    config = transformers.AutoConfig.from_pretrained(folder)
    assert config.architectures == ["Qwen2ForCausalLM"]
    generation = transformers.GenerationConfig.from_pretrained(folder)
    assert (generation.bos_token_id, generation.eos_token_id) == (1, 2)


class TestBadInput:
    def test_a_missing_tensor(self, tmp_path: Path) -> None:
        path = write(tmp_path / "m.gguf", "llama", tiny("llama"), without={"blk.1.ffn_up.weight"})
        with pytest.raises(
            ModelError,
            match=r"has no tensor for 1 parameters of LlamaForCausalLM \(blk\.1\.ffn_up\.weight for model\.layers\.1",
        ):
            from_gguf(path)

    def test_a_tensor_without_a_place(self, tmp_path: Path) -> None:
        more = {"blk.0.attn_sinks.weight": np.zeros(4, np.float32)}
        path = write(tmp_path / "m.gguf", "llama", tiny("llama"), tensors=more)
        with pytest.raises(UsageError, match=r"has 1 tensors for which LlamaForCausalLM has no place \(blk\.0\.attn_s"):
            from_gguf(path)

    def test_a_tensor_of_another_size(self, tmp_path: Path) -> None:
        name = "blk.0.ffn_up.weight"
        more = {name: np.zeros((32, 64), np.float32)}
        path = write(tmp_path / "m.gguf", "llama", tiny("llama"), without={name}, tensors=more)
        with pytest.raises(ModelError, match=r"blk\.0\.ffn_up\.weight has the dimensions \[32, 64\], where model\."):
            from_gguf(path)

    def test_an_unknown_architecture(self, tmp_path: Path) -> None:
        path = tmp_path / "m.gguf"
        writer = gguf.GGUFWriter(path, "clip")
        writer.add_block_count(2)
        writer.add_tensor("a", np.zeros((2, 2), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(
            UsageError, match=r"m\.gguf holds the architecture clip, which transformers .* doesn't read"
        ):
            from_gguf(path)


@pytest.mark.real
def test_smollm2(tmp_path: Path) -> None:
    from graphopt.models.catalogue import fetch

    path = fetch("smollm2")
    made = from_gguf(path)
    assert made.config.architectures == ["LlamaForCausalLM"]
    assert made.config.tie_word_embeddings
    expected = by_transformers(path, made.config)
    for name in made.weights.names():
        assert made.weights.tensor(name).tobytes() == expected[name].numpy().tobytes()
    files, notes = made.write_companions(tmp_path)
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= {file.name for file in files}
    assert notes == []
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode(tokenizer("The capital of France").input_ids) == "The capital of France"
