"""Decoders with their cache: what is traced, what is repeated, and what comes out of it."""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from graphopt.api import canonical
from graphopt.errors import ModelError, UsageError, VerificationError
from graphopt.export import ExportReport, export_report, layers
from graphopt.export import cache as caches
from graphopt.export.attention import NAME, attention
from graphopt.export.decoder import CALLS, cache_slots, causal_lm, padded
from graphopt.export.loaded import Loaded
from graphopt.export.modules import without_weights

pytestmark = pytest.mark.export
torch = pytest.importorskip("torch")
ort = pytest.importorskip("onnxruntime")
transformers = pytest.importorskip("transformers")

TINY = {
    "vocab_size": 53, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def build(config: str = "Llama", seed: int = 0, **settings: Any) -> Any:
    made = getattr(transformers, f"{config}Config")(**{**TINY, **settings})
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(made).eval()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama of six layers, the fewest of which some are repeated."""
    folder = tmp_path_factory.mktemp("llama")
    save(build(num_hidden_layers=6), folder)
    return folder


@pytest.fixture(scope="module")
def exported(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportReport:
    """It, exported."""
    return export_report(llama, tmp_path_factory.mktemp("exported"), finish=canonical)


def save(model: Any, folder: Path, **options: Any) -> Path:
    with contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(folder, **options)
    return folder


def run(path: Path, ids: np.ndarray, past: int) -> np.ndarray:
    """Logits of `ids` [1, tokens], of which the first `past` are put into the cache by a run of their own."""
    session = ort.InferenceSession(path)
    cache = {i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32) for i in session.get_inputs()[3:]}
    names = [o.name for o in session.get_outputs()]
    logits = np.zeros(0)
    for start, end in ((0, past), (past, ids.shape[1])) if past else ((0, ids.shape[1]),):
        feeds = {"input_ids": ids[:, start:end], "attention_mask": np.ones((1, end), np.int64)}
        feeds["position_ids"] = np.arange(start, end)[None]
        logits, *present = session.run(names, {**feeds, **cache})
        cache = dict(zip(cache, present, strict=True))
    return logits


class TestExport:
    def test_layers_are_repeated_and_the_numbers_are_pytorchs(self, llama: Path, exported: ExportReport) -> None:
        report = exported
        assert report.way.implementation == NAME
        assert report.notes == ()
        assert report.max_relative_error < 1e-5
        assert report.inputs["past_key_values.5.key"] == ("batch", 2, "past", 8)
        assert report.outputs["logits"] == ("batch", "sequence", 53)
        assert report.outputs["present.5.value"] == ("batch", 2, "total", 8)
        model = onnx.load(report.path)
        onnx.checker.check_model(model, full_check=True)
        assert sum(node.op_type == "Attention" for node in model.graph.node) == 6
        weights = {tensor.name for tensor in model.graph.initializer}
        assert {f"model.layers.{i}.self_attn.q_proj.weight/transposed" for i in range(6)} <= weights
        ids = np.random.default_rng(0).integers(0, 53, (1, 11))
        with torch.no_grad():
            expected = transformers.AutoModelForCausalLM.from_pretrained(llama)(torch.from_numpy(ids)).logits.numpy()
        np.testing.assert_allclose(run(report.path, ids, 0), expected, atol=1e-5)
        np.testing.assert_allclose(run(report.path, ids, 6), expected[:, 6:], atol=1e-5)

    def test_every_layer_traced_gives_the_same_graph(self, llama: Path, exported: ExportReport, tmp_path: Path) -> None:
        whole = export_report(llama, tmp_path / "b.onnx", verify="none", repeat=False, finish=canonical)
        a, b = (onnx.load(r.path).graph for r in (exported, whole))
        assert [v.name for v in a.input] == [v.name for v in b.input]
        assert [v.name for v in a.output] == [v.name for v in b.output]
        assert Counter(n.op_type for n in a.node) == Counter(n.op_type for n in b.node)
        ids = np.random.default_rng(1).integers(0, 53, (1, 9))
        np.testing.assert_allclose(run(exported.path, ids, 4), run(whole.path, ids, 4), atol=1e-6)

    def test_logits_of_the_last_position_compared_on_the_first_layers(
        self, llama: Path, exported: ExportReport, tmp_path: Path
    ) -> None:
        last = export_report(llama, tmp_path / "m.onnx", verify="layers", finish=canonical, last_logits=True)
        assert 0 < last.max_relative_error < 1e-5
        assert last.notes == ("compared with PyTorch on its first 4 layers of 6",)
        assert [f.name for f in tmp_path.iterdir()] == ["m.onnx"]
        assert last.outputs["logits"] == ("batch", 1, 53)
        ids = np.random.default_rng(1).integers(0, 53, (1, 9))
        np.testing.assert_allclose(run(last.path, ids, 4), run(exported.path, ids, 4)[:, -1:], atol=1e-6)

    def test_tied_weights_in_half_precision_are_one_initializer(self, tmp_path: Path) -> None:
        folder = save(build(tie_word_embeddings=True, num_hidden_layers=6), tmp_path / "tied")
        report = export_report(folder, tmp_path / "m.onnx", dtype="float16")
        model = onnx.load(report.path)
        large = [t.name for t in model.graph.initializer if list(t.dims) == [53, 32]]
        assert large == ["model.embed_tokens.weight"]
        assert model.graph.initializer[0].data_type == onnx.TensorProto.FLOAT16
        assert report.max_relative_error < 2e-2

    def test_windows_and_several_kinds_of_layers(self, tmp_path: Path) -> None:
        kinds = ["sliding_attention", "full_attention"] * 6
        model = build("Qwen3", num_hidden_layers=12, head_dim=8, sliding_window=4, use_sliding_window=True,
                      layer_types=kinds, max_window_layers=0)  # fmt: skip
        report = export_report(save(model, tmp_path / "qwen"), tmp_path / "m.onnx")
        assert report.notes == ()
        # Past the window a layer that isn't repeated as its own kind would be off.
        assert report.max_relative_error < 1e-5
        assert report.inputs["past_key_values.0.key"][2] == "past"

    def test_wrong_numbers_are_found(self, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # A repetition that gives every layer the weights of one.
        fill = Loaded.fill

        def wrong(self: Loaded, model: Any, source: Any) -> None:
            fill(self, model, source)
            values, up = model.graph.initializers, "model.layers.{}.mlp.up_proj.weight".format
            values[up(5)].const_value = values[up(4)].const_value

        monkeypatch.setattr(Loaded, "fill", wrong)
        with pytest.raises(VerificationError, match="is off by"):
            export_report(llama, tmp_path / "m.onnx", exporter="dynamo", attention="eager")
        assert not (tmp_path / "m.onnx").exists()

    def test_same_bytes_twice(self, llama: Path, exported: ExportReport, tmp_path: Path) -> None:
        again = export_report(llama, tmp_path, verify="none", finish=canonical)
        assert again.path.read_bytes() == exported.path.read_bytes()

    def test_a_missing_weight(self, tmp_path: Path) -> None:
        from safetensors.torch import load_file, save_file

        folder = save(build(), tmp_path / "m")
        path = folder / "model.safetensors"
        kept = {k: v for k, v in load_file(path).items() if "layers.1.mlp.down" not in k}
        save_file(kept, path, {"format": "pt"})
        with pytest.raises(
            ModelError, match=r"no weights for 1 parameters of LlamaForCausalLM \(model.layers.1.mlp.down"
        ):
            export_report(folder, tmp_path / "m.onnx")

    def test_options_that_cannot_be(self, llama: Path, tmp_path: Path) -> None:
        for options, message in (
            ({"keep_adapters": True}, "there are no adapters to keep"),
            ({"keep_quantized": True}, "isn't a GGUF file"),
            ({"verify": "some"}, "no verification 'some'"),
            ({"runtime": "other"}, "no layout for 'other'"),
        ):
            with pytest.raises(UsageError, match=message):
                export_report(llama, tmp_path / "m.onnx", **options)


class TestLayers:
    def test_kinds_tell_settings_apart_but_not_numbers(self) -> None:
        plan = layers.plan(build(num_hidden_layers=8))
        assert plan is not None
        assert (plan.path, plan.count, plan.kept) == ("model.layers", 8, 4)
        assert set(plan.kinds) == {0}
        assert plan.templates == (2, 2, 2, 2)

    def test_an_odd_layer_at_the_end_is_traced_whole(self) -> None:
        model = build(num_hidden_layers=8)
        model.model.layers[7].self_attn.scaling = 0.5
        assert layers.plan(model) is None
        model.model.layers[7].self_attn.scaling = model.model.layers[0].self_attn.scaling
        model.model.layers[6].input_layernorm.variance_epsilon = 1e-3
        assert layers.plan(model) is None

    def test_short_lists_are_traced_whole(self) -> None:
        assert layers.plan(build(num_hidden_layers=5)) is None

    def test_a_cut_is_taken_back(self) -> None:
        model = build(num_hidden_layers=8)
        plan = layers.plan(model)
        assert plan is not None
        inside = []

        def fails() -> None:
            with layers.cut(model, plan):
                inside.append((len(model.model.layers), model.config.num_hidden_layers))
                raise KeyError

        with pytest.raises(KeyError):
            fails()
        assert inside == [(4, 4)]
        assert (len(model.model.layers), model.config.num_hidden_layers) == (8, 8)

    def test_layers_that_depend_on_their_number(self, tmp_path: Path) -> None:
        # GPT-2 may scale its scores by the number of the layer.
        settings = {"num_hidden_layers": 6, "scale_attn_by_inverse_layer_idx": True}
        folder = save(build("GPT2", **settings), tmp_path / "gpt2")
        report = export_report(folder, tmp_path / "m.onnx")
        assert report.max_relative_error < 1e-5
        assert onnx.load(report.path).graph.input[-1].name == "past_key_values.5.value"


class TestCache:
    def test_there_and_back(self) -> None:
        model = build()
        slots = cache_slots("it", model)
        assert [slot.name for slot in slots] == ["0.key", "0.value", "1.key", "1.value"]
        assert slots[0].dims == ("batch", 2, "past", 8)
        assert slots[0].present == ("batch", 2, "total", 8)
        tensors = {slot.name: torch.randn(2, 2, 3, 8) for slot in slots}
        rebuilt = caches.rebuild(model.config, tensors)
        assert rebuilt.get_seq_length() == 3
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in caches.flatten(rebuilt))

    def test_windows_do_not_shorten_it(self) -> None:
        model = build("Mistral", sliding_window=4)
        assert all("past" in slot.dims for slot in cache_slots("it", model))

    def test_two_caches_of_an_encoder_decoder(self) -> None:
        config = transformers.T5Config(num_layers=1, d_model=16, num_heads=2, d_kv=8)
        names = ["0.decoder.key", "0.decoder.value", "0.encoder.key", "0.encoder.value"]
        tensors = {name: torch.randn(1, 2, 3, 8) for name in names}
        rebuilt = caches.rebuild(config, tensors)
        assert [name for name, _ in caches.flatten(rebuilt)] == names
        assert rebuilt.is_updated[0]

    def test_a_model_without_one(self) -> None:
        model = transformers.BertModel(
            transformers.BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
        ).eval()
        with pytest.raises(UsageError, match="gives out no cache"):
            causal_lm("it", model)


class TestAttention:
    """The function against PyTorch's own, on the inputs that transformers gives it."""

    @pytest.mark.parametrize("form", ["none", "boolean", "added", "causal", "cap", "bias", "sinks", "values"])
    def test_equal_to_the_formula(self, form: str) -> None:
        torch.manual_seed(0)
        q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 6 if form == "values" else 8)
        module = torch.nn.Module()
        module.is_causal = form == "causal"
        keep = torch.rand(2, 1, 5, 5) > 0.3
        keep |= torch.eye(5, dtype=torch.bool)
        bias, sinks = torch.randn(1, 4, 5, 5), torch.randn(4)
        scores = q @ k.repeat_interleave(2, 1).transpose(2, 3) * 0.3
        if form == "cap":
            scores = 2.0 * torch.tanh(scores / 2.0)
        if form == "bias":
            scores = scores + bias
        if form in ("boolean", "bias", "sinks"):
            scores = scores.masked_fill(~keep, float("-inf"))
        if form == "added":
            scores = scores + bias
        if form == "causal":
            scores = scores.masked_fill(~torch.ones(5, 5).tril().bool(), float("-inf"))
        if form == "sinks":
            extra = sinks.reshape(1, 4, 1, 1).expand(2, 4, 5, 1)
            weights = torch.cat([scores, extra], -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        expected = (weights @ v.repeat_interleave(2, 1)).transpose(1, 2)
        mask = {"boolean": keep, "bias": keep, "sinks": keep, "added": bias}.get(form)
        found, _ = attention(
            module, q, k, v, mask, scaling=0.3, softcap=2.0 if form == "cap" else None,
            position_bias=bias if form == "bias" else None, s_aux=sinks if form == "sinks" else None,
        )  # fmt: skip
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_parameters_take_no_memory() -> None:
    config = transformers.LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=40)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    module = without_weights(lambda _: transformers.LlamaForCausalLM(config))
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    assert size > 100e9
    assert resident() - before < 1e9
    frequencies = module.model.rotary_emb.inv_freq
    assert frequencies[0] == 1
    assert not module.training


def test_masks_of_the_calls() -> None:
    assert padded(3, 4, "left").tolist() == [[0, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]]
    assert padded(3, 4, "right").tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert padded(1, 2, None).tolist() == [[1, 1]]
    assert {(batch, bool(past)) for batch, _, past, _ in CALLS} == {(1, False), (3, False), (1, True), (3, True)}
