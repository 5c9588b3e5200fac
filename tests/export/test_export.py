"""Export through torch: verified, dynamic, and nothing written where it fails."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from graphopt.errors import ModelError, UsageError, VerificationError
from graphopt.export import export_model, export_report
from graphopt.export import exporter as exporter_module

pytestmark = pytest.mark.export
torch = pytest.importorskip("torch")
ort = pytest.importorskip("onnxruntime")
transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def factories(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def save_tiny(folder: Path, name: str, **settings: object) -> Path:
    """A tiny random model of a transformers class, saved as a Hugging Face folder."""
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = model_class(model_class.config_class(**{**small, **settings}))
    model.save_pretrained(folder)
    return folder


BERT = {"vocab_size": 60, "max_position_embeddings": 64}


class TestFactories:
    @pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
    def test_cnn(self, tmp_path: Path, exporter: str) -> None:
        report = export_report("export_factories:cnn", tmp_path / "cnn.onnx", exporter=exporter)
        assert report.inputs == {"image": ("batch", 1, 28, 28)}
        assert report.outputs == {"logits": ("batch", 10)}
        assert report.max_relative_error < 1e-5
        assert report.files == (tmp_path / "cnn.onnx",)
        assert os.listdir(tmp_path) == ["cnn.onnx"]
        model = onnx.load(report.path)
        onnx.checker.check_model(model, full_check=True)
        assert model.graph.output[0].type.tensor_type.shape.dim[0].dim_param == "batch"
        # Exported in eval mode: no Dropout, and BatchNormalization gives no statistics.
        assert "Dropout" not in {n.op_type for n in model.graph.node}
        assert all(len(n.output) == 1 for n in model.graph.node if n.op_type == "BatchNormalization")
        session = ort.InferenceSession(report.path)
        assert session.run(None, {"image": np.zeros((5, 1, 28, 28), np.float32)})[0].shape == (5, 10)

    @pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
    def test_vit(self, tmp_path: Path, exporter: str) -> None:
        report = export_report("export_factories:vit", tmp_path / "vit.onnx", exporter=exporter)
        assert report.outputs == {"output": ("batch", 10)}
        assert report.max_relative_error < 1e-5

    def test_square_example_keeps_height_and_width_apart(self, tmp_path: Path) -> None:
        report = export_report("export_factories:fully_convolutional", tmp_path / "f.onnx", exporter="torchscript")
        assert report.outputs == {"map": ("batch", 8, "height", "width")}

    def test_smaller_probes_where_the_module_takes_no_larger(self, tmp_path: Path) -> None:
        report = export_report("export_factories:positions", tmp_path / "p.onnx", exporter="torchscript")
        assert report.inputs == {"ids": ("batch", "sequence"), "scale": ()}
        assert report.outputs == {"hidden": ("batch", "sequence", 8), "mean": ("batch", 8)}

    def test_a_wrong_trace_is_found_and_nothing_written(self, tmp_path: Path) -> None:
        with pytest.raises(VerificationError, match=r"at batch 1 the output output .* is off by 0.33 .*constants"):
            export_model("export_factories:depends_on_batch", tmp_path / "new" / "m.onnx", exporter="torchscript")
        assert os.listdir(tmp_path) == []

    def test_a_failure_leaves_the_old_file(self, tmp_path: Path) -> None:
        (tmp_path / "m.onnx").write_text("old")
        with pytest.raises(VerificationError):
            export_model("export_factories:depends_on_batch", tmp_path / "m.onnx", exporter="torchscript")
        assert (tmp_path / "m.onnx").read_text() == "old"
        assert os.listdir(tmp_path) == ["m.onnx"]

    def test_an_input_that_vanishes_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="doesn't use its input y"):
            export_model("export_factories:ignores_one", tmp_path / "m.onnx", exporter="torchscript")

    def test_dynamo_tells_why_it_fails(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"couldn't export .* with dynamo at opset 23 \(.*\); try .* torchscript"):
            export_model("export_factories:depends_on_batch", tmp_path / "m.onnx")

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("export_factories:missing", "no callable export_factories:missing: .*no attribute"),
            ("no_such_module:make", "no callable no_such_module:make: No module named"),
            ("export_factories:bfloat16", "tensors that ONNX Runtime can't be given .*BFloat16"),
            ("export_factories:value", "is a int, not a callable"),
            ("export_factories:not_a_module", r"must return \(torch.nn.Module.*not \(str, NoneType\)"),
            ("export_factories:fails", r"failed with RuntimeError: no weights here$"),
            ("export_factories:bad_axes", "dynamic axes are given for 'picture', but the inputs are image"),
            ("export_factories:bad_names", r"gives 1 example inputs, but the input names are \['a', 'b'\]"),
        ],
    )
    def test_wrong_factories(self, tmp_path: Path, name: str, message: str) -> None:
        with pytest.raises(UsageError, match=message):
            export_model(name, tmp_path / "m.onnx")

    def test_what_a_factory_cannot_be_told(self, tmp_path: Path) -> None:
        for option in ({"dtype": "float16"}, {"attention": "eager"}):
            with pytest.raises(UsageError, match="are for Hugging Face models"):
                export_model("export_factories:cnn", tmp_path / "m.onnx", **option)

    def test_large_weights_go_beside_the_model(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(exporter_module, "INLINE_BYTES", 1000)
        report = export_report("export_factories:vit", tmp_path / "model.onnx", exporter="torchscript")
        assert report.files == (tmp_path / "model.onnx", tmp_path / "model.onnx.data")
        ort.InferenceSession(report.path)

    def test_same_bytes_twice(self, tmp_path: Path) -> None:
        import export_factories

        def make() -> object:
            torch.manual_seed(0)
            return export_factories.cnn()

        export_factories.seeded = make
        for name in ("a.onnx", "b.onnx"):
            export_model("export_factories:seeded", tmp_path / name)
        assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()

    def test_quiet_and_without_paths_of_this_machine(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        path = export_model("export_factories:cnn", tmp_path / "m.onnx")
        with pytest.raises(ModelError):
            export_model("export_factories:vit", tmp_path / "n.onnx", exporter="torchscript", opset=8)
        assert capfd.readouterr() == ("", "")
        assert sys.prefix.encode() not in path.read_bytes()
        assert b"export_factories.py" not in path.read_bytes()


class TestHuggingFace:
    def test_bert_has_what_its_configuration_tells(self, tmp_path: Path) -> None:
        folder = save_tiny(tmp_path / "bert", "BertModel", **BERT)
        (folder / "tokenizer.json").write_text("{}")
        said: list[str] = []
        report = export_report(folder, tmp_path / "out", exporter="torchscript", progress=said.append)
        dims = ("batch", "sequence")
        assert report.inputs == {"input_ids": dims, "attention_mask": dims, "token_type_ids": dims}
        assert report.outputs == {"last_hidden_state": (*dims, 16), "pooler_output": ("batch", 16)}
        assert [f.name for f in report.files] == ["model.onnx", "config.json", "tokenizer.json"]
        assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.onnx", "tokenizer.json"]
        assert report.max_relative_error < 1e-5
        assert said[0].startswith("loading")

    def test_dynamo_with_dynamic_sizes(self, tmp_path: Path) -> None:
        folder = save_tiny(tmp_path / "bert", "BertForSequenceClassification", **BERT, num_labels=3)
        report = export_report(folder, tmp_path / "m.onnx", exporter="dynamo")
        assert report.outputs == {"logits": ("batch", 3)}
        assert os.listdir(tmp_path / "bert") != []
        assert not (tmp_path / "config.json").exists()
        session = ort.InferenceSession(report.path)
        for batch, sequence in ((1, 1), (4, 33)):
            feeds = {name: np.ones((batch, sequence), np.int64) for name in report.inputs}
            assert session.run(None, feeds)[0].shape == (batch, 3)

    def test_into_its_own_folder(self, tmp_path: Path) -> None:
        folder = save_tiny(tmp_path / "bert", "BertModel", **BERT)
        (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()), indent=7))
        before = (folder / "config.json").read_bytes()
        report = export_report(folder, folder, exporter="torchscript")
        assert (folder / "config.json").read_bytes() == before
        assert [f.name for f in report.files] == ["model.onnx"]

    def test_a_tokenizer_without_token_types(self, tmp_path: Path) -> None:
        folder = save_tiny(tmp_path / "bert", "BertModel", **BERT)
        (folder / "tokenizer_config.json").write_text('{"model_input_names": ["input_ids", "attention_mask"]}')
        report = export_report(folder, tmp_path / "m.onnx", exporter="torchscript")
        assert list(report.inputs) == ["input_ids", "attention_mask"]

    def test_vit_takes_its_image_size(self, tmp_path: Path) -> None:
        folder = save_tiny(tmp_path / "vit", "ViTForImageClassification", image_size=24, patch_size=8, num_labels=4)
        report = export_report(folder, tmp_path / "m.onnx", exporter="torchscript", attention="eager")
        assert report.inputs == {"pixel_values": ("batch", 3, 24, 24)}
        assert report.outputs == {"logits": ("batch", 4)}

    def test_no_pooler_weights(self, tmp_path: Path) -> None:
        folder = save_tiny(tmp_path / "bert", "BertModel", **BERT)
        self.drop(folder, "pooler.")
        report = export_report(folder, tmp_path / "m.onnx", exporter="torchscript")
        assert list(report.outputs) == ["last_hidden_state"]
        assert "no pooler" in report.notes[0]

    def test_other_missing_weights_are_an_error(self, tmp_path: Path) -> None:
        folder = save_tiny(tmp_path / "bert", "BertForSequenceClassification", **BERT)
        self.drop(folder, "classifier.")
        with pytest.raises(
            ModelError, match=r"no weights for 2 parameters of .*\(classifier.bias, classifier.weight\)"
        ):
            export_model(folder, tmp_path / "m.onnx")

    def test_broken_folders(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"has no config\.json"):
            export_model(tmp_path, tmp_path / "m.onnx")
        folder = save_tiny(tmp_path / "bert", "BertModel", **BERT)
        (folder / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
        with pytest.raises(ModelError, match=r"model.safetensors is truncated"):
            export_model(folder, tmp_path / "m.onnx")
        (folder / "model.safetensors").unlink()
        with pytest.raises(UsageError, match="has no weights"):
            export_model(folder, tmp_path / "m.onnx")
        (folder / "config.json").write_text("{")
        (folder / "model.safetensors").write_bytes(b"")
        with pytest.raises(ModelError, match=r"config.json can't be used"):
            export_model(folder, tmp_path / "m.onnx")
        with pytest.raises(UsageError, match=r"there is no folder \./nothing"):
            export_model("./nothing", tmp_path / "m.onnx")

    def test_the_hub_out_of_reach(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import huggingface_hub

        def refuse(name: str, **options: object) -> str:
            raise OSError("no connection")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
        with pytest.raises(UsageError, match=r"some/model is no folder here, .* \(no connection\); download the model"):
            export_model("some/model", tmp_path / "m.onnx")
        folder = save_tiny(tmp_path / "bert", "BertModel", **BERT)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: str(folder))
        assert export_model("some/model", tmp_path / "m.onnx", exporter="torchscript").is_file()

    @staticmethod
    def drop(folder: Path, prefix: str) -> None:
        """Take the weights with this prefix out of a model's folder."""
        from safetensors.numpy import load_file, save_file

        path = folder / "model.safetensors"
        save_file({k: v for k, v in load_file(path).items() if not k.startswith(prefix)}, path, {"format": "pt"})


@pytest.mark.real
@pytest.mark.parametrize(("exporter", "attention"), [("dynamo", "sdpa"), ("torchscript", "eager")])
def test_minilm(tmp_path: Path, exporter: str, attention: str) -> None:
    from graphopt.models.catalogue import fetch

    report = export_report(fetch("minilm"), tmp_path, exporter=exporter, attention=attention)
    assert report.max_relative_error < 1e-5
    onnx.checker.check_model(report.path, full_check=True)
    folder = fetch("minilm")
    module = transformers.AutoModel.from_pretrained(folder).eval()
    session = ort.InferenceSession(report.path)
    for batch, sequence, padded in ((1, 16, 5), (3, 7, 2), (2, 1, 0), (1, 128, 100)):
        ids = torch.randint(0, 30000, (batch, sequence))
        mask = torch.ones_like(ids)
        mask[0, sequence - padded :] = 0
        types = torch.zeros_like(ids)
        with torch.no_grad():
            expected = module(input_ids=ids, attention_mask=mask, token_type_ids=types)
        feeds = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), "token_type_ids": types.numpy()}
        hidden, pooled = session.run(None, feeds)
        np.testing.assert_allclose(hidden, expected.last_hidden_state, atol=2e-5)
        np.testing.assert_allclose(pooled, expected.pooler_output, atol=2e-5)
