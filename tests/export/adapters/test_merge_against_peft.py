"""Every method merged as peft's own merge_and_unload merges it, on tiny random models and random adapters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_cases import (
    InMemory,
    attention_module,
    bert,
    convolutions,
    gpt2,
    gpt_oss,
    llama,
    merged_by_peft,
    mixtral,
    randomise,
    save_adapter,
    square_mixtral,
)

from graphopt.export.adapters import AdaptedWeights

pytestmark = pytest.mark.export
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
peft = pytest.importorskip("peft", reason="peft isn't installed, so nothing is compared with its merge_and_unload")

TOLERANCE = 1e-5
ATTENTION = ["q_proj", "k_proj"]
TWO = ["q_proj", "down_proj"]
EXPERTS = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]

Make = Callable[[], Any]


def case(name: str, make: Make, config: Callable[[], Any], **how: Any) -> Any:
    return pytest.param(make, config, how, id=name)


def lora(**settings: Any) -> Callable[[], Any]:
    return lambda: peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": TWO, **settings})


def of(kind: str, **settings: Any) -> Callable[[], Any]:
    return lambda: getattr(peft, f"{kind}Config")(**{"target_modules": TWO, **settings})


def bdlora() -> Any:
    from peft.tuners.lora.config import BdLoraConfig

    return BdLoraConfig(target_modules_bd_a=["q_proj"], target_modules_bd_b=["o_proj"], nblocks=2)


CASES = [
    case("lora", llama, lora()),
    case("lora-bfloat16", llama, lora(), dtype="bfloat16"),
    case("lora-rank-stabilised", llama, lora(use_rslora=True)),
    case("lora-patterns", llama, lora(rank_pattern={"layers.1.*down_proj": 2}, alpha_pattern={"q_proj": 3})),
    case("lora-some-layers", llama, lora(layers_to_transform=[1])),
    case("lora-excluded", llama, lora(exclude_modules=[".*layers.0.*q_proj"])),
    case("lora-embedding-and-head", llama, lora(target_modules=["embed_tokens", "lm_head", "o_proj"])),
    case("lora-bias", bert, lora(target_modules=["query", "dense"], lora_bias=True)),
    case("lora-trained-biases", bert, lora(target_modules=["query"], bias="lora_only")),
    case("lora-all-biases", bert, lora(target_modules=["query"], bias="all")),
    case("lora-classifier", bert, lora(target_modules=["query"], task_type="SEQ_CLS")),
    case("lora-saved-module", llama, lora(modules_to_save=["lm_head"])),
    case("lora-tokens", llama, lora(trainable_token_indices=[1, 5])),
    case("lora-conv1d", gpt2, lora(target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)),
    case("lora-convolutions", convolutions, lora(target_modules=["one", "two", "along", "head"])),
    case("lora-multihead", attention_module, lora(target_modules=["attn"])),
    case("lora-experts", mixtral, lora(target_modules=["q_proj"], target_parameters=EXPERTS)),
    case("lora-one-of-experts", mixtral, lora(target_modules=[], target_parameters=EXPERTS[:1], use_rslora=True)),
    case("lora-experts-turned", gpt_oss, lora(target_modules=[], target_parameters=EXPERTS)),
    case("lora-square-experts", square_mixtral, lora(target_modules=[], target_parameters=EXPERTS)),
    case("lora-router", mixtral, lora(target_modules=[], target_parameters=["mlp.gate.weight"])),
    case("dora", llama, lora(use_dora=True)),
    case("dora-embedding", llama, lora(use_dora=True, target_modules=["embed_tokens", "v_proj"])),
    case("dora-conv1d", gpt2, lora(use_dora=True, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    case("dora-convolutions", convolutions, lora(use_dora=True, target_modules=["one", "two", "along"])),
    case("pissa", llama, lora(init_lora_weights="pissa")),
    case("pissa-conv1d", gpt2, lora(init_lora_weights="pissa", target_modules=["c_attn"], fan_in_fan_out=True)),
    case("olora", llama, lora(init_lora_weights="olora")),
    case("orthogonal", llama, lora(init_lora_weights="orthogonal")),
    case("mica", llama, lora(init_lora_weights="mica")),
    case("kasa", llama, lambda: lora(kasa_config=peft.KasaConfig())()),
    case("lora-block-diagonal", llama, lambda: lora(use_bdlora=bdlora(), target_modules=["q_proj", "o_proj"])()),
    case("adalora", llama, of("AdaLora", init_r=6, target_r=4, total_step=10, lora_alpha=12)),
    case("vera", llama, of("Vera", r=4)),
    case("vera-made-again", llama, of("Vera", r=4, save_projection=False, projection_prng_key=7)),
    case("pvera", llama, of("Pvera", r=4)),
    case("randlora", llama, of("RandLora", r=4, target_modules=["q_proj", "down_proj", "up_proj"])),
    case("randlora-made-again", llama, of("RandLora", r=3, save_projection=False, randlora_alpha=20)),
    case("randlora-sparse", llama, of("RandLora", r=4, save_projection=False, sparse=True, randlora_alpha=20)),
    case(
        "randlora-very-sparse", llama, of("RandLora", r=4, save_projection=False, very_sparse=True, randlora_alpha=20)
    ),
    case("vblora", llama, of("VBLoRA", r=4, num_vectors=10, vector_length=4)),
    case("vblora-indices", llama, of("VBLoRA", r=4, num_vectors=10, vector_length=4, save_only_topk_weights=True)),
    case("unilora", llama, of("UniLora", r=4, save_indices=True)),
    case("delora", llama, of("Delora", r=4)),
    case("miss", llama, of("Miss", r=5)),
    case("miss-mini", llama, of("Miss", r=4, mini_r=8, init_weights="mini")),
    case("miss-bat", llama, of("Miss", r=4, init_weights="bat")),
    case("loha", llama, of("LoHa", r=4)),
    case("loha-convolutions", convolutions, of("LoHa", r=4, target_modules=["one", "two", "along"])),
    case("loha-core", convolutions, of("LoHa", r=4, use_effective_conv2d=True, target_modules=["one", "two", "along"])),
    case("lokr", llama, of("LoKr", r=4)),
    case("lokr-decomposed", llama, of("LoKr", r=1, decompose_both=True, alpha_pattern={"q_proj": 3})),
    case("lokr-factor", llama, of("LoKr", r=2, decompose_factor=2, rank_pattern={"down_proj": 1})),
    case("lokr-convolutions", convolutions, of("LoKr", r=1, target_modules=["one", "two", "along"])),
    # Not of the 1-d convolution: there peft's own merge stops in torch.kron.
    case("lokr-core", convolutions, of("LoKr", r=1, use_effective_conv2d=True, target_modules=["one", "two"])),
    case("ia3", llama, of("IA3", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])),
    case("ia3-bias", bert, of("IA3", target_modules=["key", "output.dense"], feedforward_modules=["output.dense"])),
    case("ia3-conv1d", gpt2, of("IA3", target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"])),
    case("ia3-convolutions", convolutions, of("IA3", target_modules=["one", "two"], feedforward_modules=["two"])),
    case("oft", llama, of("OFT", oft_block_size=4)),
    case("oft-exact", llama, of("OFT", oft_block_size=4, use_cayley_neumann=False)),
    case("oft-three-terms", llama, of("OFT", oft_block_size=4, num_cayley_neumann_terms=3)),
    case("oft-eight-terms", llama, of("OFT", oft_block_size=4, num_cayley_neumann_terms=8), scale=0.1),
    case("oft-shared", llama, of("OFT", oft_block_size=4, block_share=True)),
    case("oft-constrained", llama, of("OFT", oft_block_size=4, coft=True, eps=0.1)),
    case("oft-embedding", llama, of("OFT", oft_block_size=4, target_modules=["embed_tokens"])),
    case("oft-convolutions", convolutions, of("OFT", oft_block_size=4, target_modules=["one", "two", "head"])),
    case("boft", llama, of("BOFT", boft_block_size=4)),
    case("boft-convolutions", convolutions, of("BOFT", boft_block_size=4, target_modules=["one", "two"])),
    case("hra", llama, of("HRA", r=4)),
    case("hra-orthogonalised", llama, of("HRA", r=4, apply_GS=True)),
    case("hra-convolutions", convolutions, of("HRA", r=4, target_modules=["one", "two"])),
    case("fourierft", llama, of("FourierFT", n_frequency=30)),
    case("fourierft-conv1d", gpt2, of("FourierFT", n_frequency=30, target_modules=["c_attn"], fan_in_fan_out=True)),
    case("layer-norms", llama, of("LNTuning", target_modules=["input_layernorm", "norm"])),
    case("c3a", llama, of("C3A", block_size=8)),
    case("shira", llama, of("Shira", r=1)),
    case("road-1", llama, of("Road", variant="road_1", group_size=8)),
    case("road-2", bert, of("Road", variant="road_2", group_size=4, target_modules=["query"])),
    case("road-4", bert, of("Road", variant="road_4", group_size=8, target_modules=["query"])),
    case("tokens", llama, of("TrainableTokens", target_modules=["embed_tokens"], token_indices=[1, 4])),
    case("gralora", llama, of("Gralora", r=4, gralora_k=2)),
    case("gralora-hybrid", llama, of("Gralora", r=4, gralora_k=4, hybrid_r=2)),
    case("hira", llama, of("Hira", r=4)),
    case("hira-embedding", llama, of("Hira", r=4, target_modules=["embed_tokens"])),
    case("hira-convolutions", convolutions, of("Hira", r=4, target_modules=["one", "two"])),
    case("glora", bert, of("Glora", r=2, target_modules=["query", "key"])),
    case(
        "glora-vectors",
        bert,
        of("Glora", config_A_B="vector", config_C="vector", config_D_E="vector", target_modules=["query"]),
    ),
    case("beft", bert, of("Beft", target_modules=["value"])),
    case("deft", llama, of("Deft", r=4)),
    case("deft-qr", llama, of("Deft", r=4, decomposition_method="qr", alpha=8)),
    case("deft-para", llama, of("Deft", r=4, para=True)),
    case("supertuning", llama, of("Supertuning", sparsity=0.9)),
    case("supertuning-and-rank", llama, of("Supertuning", sparsity=0.9, r=2, lora_alpha=4)),
    case("osf", llama, of("OSF")),
]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize(("make", "config", "how"), CASES)
def test_as_peft_merges(tmp_path: Path, make: Make, config: Callable[[], Any], how: dict[str, Any]) -> None:
    dtype = getattr(torch, how["dtype"]) if "dtype" in how else None
    folder = save_adapter(tmp_path / "adapter", make, config(), scale=how.get("scale", 0.3), dtype=dtype)
    expected = merged_by_peft(make, folder)
    base = InMemory(make())
    weights = AdaptedWeights(base, folder)
    assert set(weights.names()) == set(expected) == set(base.names())
    assert weights.notes == []
    before = {n: v.float().numpy() for n, v in base.state.items()}
    changed = 0
    for name in weights.names():
        tensor = weights.tensor(name)
        assert tuple(tensor.shape) == expected[name].shape
        found = tensor.numpy()
        error = np.abs(found - expected[name]).max() / max(1.0, np.abs(expected[name]).max())
        assert error <= TOLERANCE, f"{name}: {error}"
        differs = not np.array_equal(before[name], expected[name])
        changed += differs
        assert name in weights.changed() or not differs
    assert changed >= 1


def state(weights: AdaptedWeights) -> dict[str, Any]:
    return {n: torch.from_numpy(np.array(weights.tensor(n).numpy(), np.float32)) for n in weights.names()}


def close(found: Any, expected: Any) -> None:
    scale = max(1.0, float(expected.abs().max()))
    assert float((found - expected).abs().max()) / scale <= TOLERANCE


@pytest.mark.parametrize("kind", ["multihead", "dora", "miss", "oft", "ia3", "road", "randlora", "hra", "glora"])
def test_as_the_unmerged_model_computes(tmp_path: Path, kind: str) -> None:
    """What the adapter does as peft runs it, without anything merged."""
    query = ["query", "output.dense"]
    config = {
        "multihead": lora(target_modules=["attn"]),
        "dora": lora(target_modules=query, use_dora=True),
        "miss": of("Miss", r=4, target_modules=query),
        "oft": of("OFT", oft_block_size=4, target_modules=query),
        "ia3": of("IA3", target_modules=query, feedforward_modules=["output.dense"]),
        "road": of("Road", variant="road_4", group_size=4, target_modules=query),
        "randlora": of("RandLora", r=4, randlora_alpha=20, target_modules=["query", "intermediate.dense"]),
        "hra": of("HRA", r=4, target_modules=query),
        "glora": of("Glora", r=2, target_modules=query),
    }[kind]
    make = attention_module if kind == "multihead" else bert
    folder = save_adapter(tmp_path / "adapter", make, config())
    generator = torch.Generator().manual_seed(3)
    if kind == "multihead":
        inputs = torch.randn(2, 5, 16, generator=generator)
    else:
        inputs = torch.randint(0, 40, (2, 5), generator=generator)
    run = (lambda m: m(inputs)) if kind == "multihead" else (lambda m: m(input_ids=inputs).logits)
    with torch.no_grad():
        base = run(make())
        expected = run(peft.PeftModel.from_pretrained(make(), str(folder)).eval())
        model = make()
        model.load_state_dict(state(AdaptedWeights(InMemory(model), folder)))
        close(run(model), expected)
        assert (base - expected).abs().max() > 1000 * TOLERANCE


def test_butterfly_factors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several factors are only trained where peft's CUDA extension is built; block_diag does the same."""
    from peft.tuners.boft import layer

    class BlockDiagonal:
        @staticmethod
        def apply(blocks: Any) -> Any:
            return torch.stack([torch.block_diag(*torch.unbind(factor)) for factor in blocks])

    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(layer, "FastBlockDiag", BlockDiagonal)
    config = peft.BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=3, target_modules=TWO)
    folder = save_adapter(tmp_path / "adapter", llama, config)
    expected = merged_by_peft(llama, folder)
    weights = AdaptedWeights(InMemory(llama()), folder)
    name = "model.layers.0.self_attn.q_proj.weight"
    np.testing.assert_allclose(weights.tensor(name).numpy(), expected[name], atol=TOLERANCE)
    assert weights.tensor(name).numpy().std() > 0


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_half_precision_is_rounded_once(tmp_path: Path, stored: str) -> None:
    """The sum is made in float32 and rounded to the base's type, where peft rounds ΔW first."""
    dtype = getattr(torch, stored)
    folder = save_adapter(tmp_path / "adapter", llama, lora(use_dora=True)())
    weights = AdaptedWeights(InMemory(llama(), dtype), folder)
    exact = AdaptedWeights(InMemory(llama().to(dtype).float()), folder)
    for name in weights.changed():
        tensor = weights.tensor(name)
        assert tensor.dtype.name.lower() == stored
        expected = torch.from_numpy(exact.tensor(name).numpy()).to(dtype)
        assert np.array_equal(tensor.numpy().astype(np.float32), expected.float().numpy())


def test_several_are_summed(tmp_path: Path) -> None:
    one = save_adapter(tmp_path / "one", llama, lora()())
    two = save_adapter(
        tmp_path / "two", llama, lora(r=2, use_rslora=True, target_modules=["q_proj", "up_proj"])(), seed=2
    )
    model = peft.PeftModel.from_pretrained(llama(), str(one), adapter_name="one")
    model.load_adapter(str(two), adapter_name="two")
    model.add_weighted_adapter(["one", "two"], [0.7, 0.4], "both", combination_type="cat")
    model.set_adapter("both")
    expected = {n: v.numpy() for n, v in model.merge_and_unload().state_dict().items()}
    weights = AdaptedWeights(InMemory(llama()), [(one, 0.7), (two, 0.4)])
    for name in weights.names():
        np.testing.assert_allclose(weights.tensor(name).numpy(), expected[name], atol=TOLERANCE)


def test_pruned_ranks(tmp_path: Path) -> None:
    """AdaLoRA saves only what its budget left of each module, and keeps the scale of the rank that it began with."""
    model = peft.get_peft_model(llama(), of("AdaLora", init_r=6, target_r=3, total_step=10)())
    randomise(model, 0.3, 1)
    kept = {n: [i % 2 == 0 for i in range(6)] for n, _ in model.named_parameters() if "lora_E" in n}
    model.peft_config["default"].rank_pattern = {n.removeprefix("base_model.model."): v for n, v in kept.items()}
    folder = tmp_path / "adapter"
    model.save_pretrained(str(folder))
    expected = merged_by_peft(llama, folder)
    weights = AdaptedWeights(InMemory(llama()), folder)
    assert {s[0] for s in weights._adapters[0][0].shapes.values() if s[-1] == 1} == {3}
    for name in weights.names():
        np.testing.assert_allclose(weights.tensor(name).numpy(), expected[name], atol=TOLERANCE)


def test_converted_start(tmp_path: Path) -> None:
    """An adapter that began with a changed base, saved as the difference to how it began, is an ordinary LoRA."""
    model = peft.get_peft_model(llama(), lora(init_lora_weights="pissa_niter_4")())
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(tmp_path / "start"))
    model.peft_config["default"].init_lora_weights = "pissa_niter_4"
    randomise(model, 0.3, 1)
    folder = tmp_path / "adapter"
    model.save_pretrained(str(folder), path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    expected = model.merge_and_unload().state_dict()
    weights = AdaptedWeights(InMemory(llama()), folder)
    for name in weights.names():
        close(torch.from_numpy(weights.tensor(name).numpy()), expected[name])


def test_a_body_trained_alone_and_a_whole_model(tmp_path: Path) -> None:
    """The names differ by a prefix where the adapter was trained on the body, or is used on it."""
    body = save_adapter(tmp_path / "body", lambda: llama().model, lora()())
    whole = save_adapter(tmp_path / "whole", llama, lora()())
    on_whole, on_body = AdaptedWeights(InMemory(llama()), body), AdaptedWeights(InMemory(llama().model), whole)
    name = "layers.1.mlp.down_proj.weight"
    expected = merged_by_peft(llama, whole)[f"model.{name}"]
    np.testing.assert_allclose(on_whole.tensor(f"model.{name}").numpy(), expected, atol=TOLERANCE)
    np.testing.assert_allclose(on_body.tensor(name).numpy(), expected, atol=TOLERANCE)


def tied() -> Any:
    return llama(tie_word_embeddings=True)


def test_tokens_of_tied_embeddings(tmp_path: Path) -> None:
    """The head gets the new rows too, and stays tied."""
    folder = save_adapter(tmp_path / "adapter", tied, lora(trainable_token_indices=[1, 5])())
    expected = merged_by_peft(tied, folder)
    weights = AdaptedWeights(InMemory(tied()), folder)
    assert weights.untied == ()
    for name in weights.names():
        np.testing.assert_allclose(weights.tensor(name).numpy(), expected[name], atol=TOLERANCE)
    assert not np.array_equal(expected["lm_head.weight"][1], tied().lm_head.weight.detach().numpy()[1])


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_one_of_two_tied_weights(tmp_path: Path, target: str) -> None:
    """It differs from the other afterwards, as it does where peft runs the adapter unmerged."""
    folder = save_adapter(tmp_path / "adapter", tied, lora(target_modules=[target, "q_proj"])())
    weights = AdaptedWeights(InMemory(tied()), folder)
    assert len(weights.untied) == 1
    assert set(weights.untied[0]) == {"model.embed_tokens.weight", "lm_head.weight"}
    inputs = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        expected = peft.PeftModel.from_pretrained(tied(), str(folder)).eval()(input_ids=inputs).logits
        model = llama()
        model.load_state_dict(state(weights))
        close(model(input_ids=inputs).logits, expected)


def test_square_conv1d_weights(tmp_path: Path) -> None:
    """Shapes don't tell how a square weight is stored; the configuration does, or the caller."""
    folder = save_adapter(tmp_path / "adapter", gpt2, lora(target_modules=["attn.c_proj"], fan_in_fan_out=True)())
    name = "transformer.h.0.attn.c_proj.weight"
    expected = merged_by_peft(gpt2, folder)[name]
    np.testing.assert_allclose(AdaptedWeights(InMemory(gpt2()), folder).tensor(name).numpy(), expected, atol=TOLERANCE)
    path = folder / "adapter_config.json"
    path.write_text(path.read_text().replace('"fan_in_fan_out": true', '"fan_in_fan_out": false'))
    told = AdaptedWeights(InMemory(gpt2()), folder, turned=[name])
    np.testing.assert_allclose(told.tensor(name).numpy(), expected, atol=TOLERANCE)
