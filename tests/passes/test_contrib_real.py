"""raise-contrib on what ONNX Runtime makes of real models and of fresh exports: standard again, and the same numbers."""

from __future__ import annotations

import collections
import io
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphopt.models import catalogue
from graphopt.passes.raise_.contrib import DOMAIN, RaiseContrib
from graphopt.passes.raise_.convert_opset import ConvertOpset

IDS = np.random.default_rng(0).integers(1, 1000, size=(2, 12))


def fused(source: str | bytes, target: Path) -> ir.Model:
    """The model as ONNX Runtime optimizes and saves it."""
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(target)
    ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return ir.load(target)


def contributed(model: ir.Model) -> collections.Counter[str]:
    return collections.Counter(node.op_type for node in model.graph.all_nodes() if node.domain == DOMAIN)


def raised(model: ir.Model) -> ir.Model:
    after = model.clone()
    ConvertOpset()(after)
    rule = RaiseContrib()
    assert rule(after).modified
    onnx.checker.check_model(ir.to_proto(after))
    return after


def assert_same(before: ir.Model, after: ir.Model, feeds: dict[str, np.ndarray]) -> None:
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    sessions = [
        ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
        for model in (before, after)
    ]
    for one, other in zip(*(session.run(None, feeds) for session in sessions), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=2e-5)


def text_feeds(model: ir.Model) -> dict[str, np.ndarray]:
    feeds = {}
    for value in model.graph.inputs:
        array = np.ones_like(IDS) if "mask" in value.name else np.zeros_like(IDS) if "type" in value.name else IDS
        feeds[value.name] = array.astype(value.dtype.numpy())
    return feeds


@pytest.mark.real
@pytest.mark.parametrize(
    ("key", "found", "shape"),
    [
        ("paraphrase-minilm", {"FusedMatMul": 3, "BiasGelu": 3}, None),
        ("ppocr-v4-rec", {"FusedConv": 4, "QuickGelu": 7, "FusedMatMul": 1}, (2, 3, 48, 160)),
        ("yolov8n", {"QuickGelu": 57}, (1, 3, 320, 320)),
        ("open-nsfw", {"FusedConv": 33}, (1, 224, 224, 3)),
        ("silero-vad-ifless", {"FusedConv": 10}, None),
    ],
)
def test_saved_by_a_session(key: str, found: dict[str, int], shape: tuple[int, ...] | None, tmp_path: Path) -> None:
    before = fused(str(catalogue.fetch(key)), tmp_path / "fused.onnx")
    assert contributed(before) == found
    after = raised(before)
    assert contributed(after) == {}
    if key == "silero-vad-ifless":
        feeds = {
            value.name: np.asarray(16000)
            if value.name == "sr"
            else np.random.default_rng(1)
            .normal(
                size=[2 if not isinstance(d, int) else d for d in value.shape] if value.name == "state" else (2, 576)
            )
            .astype(np.float32)
            for value in before.graph.inputs
        }
    elif shape is None:
        feeds = text_feeds(before)
    else:
        feeds = {before.graph.inputs[0].name: np.random.default_rng(1).uniform(size=shape).astype(np.float32)}
    assert_same(before, after, feeds)


@pytest.mark.real
def test_saved_by_the_transformers_optimizer(tmp_path: Path) -> None:
    optimizer = pytest.importorskip("onnxruntime.transformers.optimizer")
    source = str(catalogue.fetch("paraphrase-minilm"))
    fusion = optimizer.optimize_model(source, model_type="bert", num_heads=12, hidden_size=384, opt_level=0)
    fusion.save_model_to_file(str(tmp_path / "fused.onnx"))
    before = ir.load(tmp_path / "fused.onnx")
    found = contributed(before)
    assert {"SkipLayerNormalization", "BiasGelu", "EmbedLayerNormalization", "Attention"} <= set(found)
    after = raised(before)
    assert set(contributed(after)) == {"Attention"}
    assert_same(before, after, text_feeds(before))


@pytest.mark.export
@pytest.mark.parametrize("dynamo", [True, False], ids=["torch.export", "TorchScript"])
def test_saved_from_a_fresh_export(dynamo: bool, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.LayerNorm(16)
            self.up, self.down = torch.nn.Linear(16, 32), torch.nn.Linear(32, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.down(torch.nn.functional.gelu(self.up(x)))
            return torch.tanh(self.down(torch.relu(self.up(self.norm(x + y)[:, 0]))))

    torch.manual_seed(0)
    model, x = Block().eval(), torch.randn(2, 5, 16)
    target = tmp_path / "export.onnx"
    if dynamo:
        batch = torch.export.Dim("batch", min=1, max=64)
        torch.onnx.export(
            model, (x,), str(target), dynamo=True, opset_version=20, dynamic_shapes=({0: batch},), external_data=False
        )
    else:
        buffer = io.BytesIO()
        axes = {"x": {0: "batch"}}
        torch.onnx.export(model, (x,), buffer, dynamo=False, opset_version=17, input_names=["x"], dynamic_axes=axes)
        target.write_bytes(buffer.getvalue())
    before = fused(str(target), tmp_path / "fused.onnx")
    assert {"BiasGelu", "FusedGemm"} <= set(contributed(before))
    after = raised(before)
    assert contributed(after) == {}
    assert_same(before, after, {before.graph.inputs[0].name: x.numpy()})
