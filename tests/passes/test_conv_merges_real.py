"""The merges of convolutions on real models and on what torch exports, with the same outputs in ONNX Runtime."""

from __future__ import annotations

import collections
import io
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphopt.models import catalogue
from graphopt.pass_manager import PassManager
from graphopt.passes import registry

RNG = np.random.default_rng(0)
IMAGE = RNG.normal(size=(2, 3, 96, 64)).astype(np.float32)
CLEAN = [
    "inline-functions",
    "lift-constants",
    "eliminate-identities",
    "convert-opset",
    "fold-constants",
    "fold-batch-norm",
]
MERGES = ["merge-convs", "merge-parallel-convs"]

# What is merged, and how often each reason not to is given, by a word of it.
REAL = [
    # Two pointwise convolutions, 384 → 360 → 96 channels; three that get narrower between, which would cost more.
    ("ppocr-v4-det", IMAGE, {"384 → 96 channels, 1×1": 1}, {"times the operations": 3, "no bias of the first": 1}),
    ("ppocr-cls", IMAGE[:, :, :48], {"8 → 24 channels, 1×1": 1}, {"read by 2 nodes": 3}),
    (
        "ppocr-v6-rec",
        IMAGE[:, :, :48],
        {},
        {"times the operations": 2, "read by 2 nodes": 6, "no bias of the first": 2},
    ),
    ("open-nsfw", RNG.normal(size=(1, 224, 224, 3)).astype(np.float32), {}, {}),
]


def outputs(source: bytes | str, feed: dict[str, np.ndarray]) -> list[Any]:
    ort = pytest.importorskip("onnxruntime")
    quiet = ort.SessionOptions()
    quiet.log_severity_level = 3
    return ort.InferenceSession(source, quiet, providers=["CPUExecutionProvider"]).run(None, feed)


def merge(model: ir.Model) -> list[Any]:
    """Clean and merge `model`; the sites of the merges, each node's last."""
    report = PassManager([registry.make(name) for name in [*CLEAN, *MERGES]], verifier_of=None)(model)
    assert not report.rolled_back
    return [site for record in report.records if record.name in MERGES and record.round == 1 for site in record.sites]


@pytest.mark.real
@pytest.mark.parametrize(("key", "data", "merged", "left"), REAL, ids=[case[0] for case in REAL])
def test_real_model(key: str, data: np.ndarray, merged: dict[str, int], left: dict[str, int]) -> None:
    path = catalogue.fetch(key)
    model = ir.load(path)
    sites = merge(model)
    assert all(any(words in site.detail for words in (*merged, *left)) for site in sites)
    for words, count in (merged | left).items():
        assert sum(words in site.detail for site in sites) == count, words
    feed = {model.graph.inputs[0].name: data}
    before = outputs(str(path), feed)
    for one, other in zip(before, outputs(ir.to_proto(model).SerializeToString(), feed), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-3, atol=2e-5)


def blocks() -> dict[str, Any]:
    """Small torch modules and the operators that remain of each."""
    import torch
    from torch import nn

    class RepVgg(nn.Module):
        def __init__(self, groups: int = 1) -> None:
            super().__init__()
            self.wide = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=groups, bias=False), nn.BatchNorm2d(8))
            self.point = nn.Sequential(nn.Conv2d(8, 8, 1, groups=groups, bias=False), nn.BatchNorm2d(8))
            self.same = nn.BatchNorm2d(8)

        def forward(self, x: Any) -> Any:
            return torch.relu(self.wide(x) + self.point(x) + self.same(x))

    class ResNeXt(nn.Module):
        """A block as Aggregated Residual Transformations draws it first: every branch by itself."""

        def __init__(self, end: str) -> None:
            super().__init__()
            self.end = end
            self.branches = nn.ModuleList(self.branch() for _ in range(4))
            self.last = nn.Conv2d(16, 8, 1)

        def branch(self) -> Any:
            layers = [nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()]
            return nn.Sequential(*layers, *([nn.Conv2d(4, 8, 1)] if self.end == "sum" else []))

        def forward(self, x: Any) -> Any:
            found = [branch(x) for branch in self.branches]
            return torch.relu(sum(found) + x if self.end == "sum" else self.last(torch.cat(found, 1)) + x)

    separable = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 16, 1), nn.ReLU())
    return {
        "RepVGG": (RepVgg(), {"Conv": 1, "Relu": 1}),
        "RepVGG in groups": (RepVgg(4), {"Conv": 1, "Relu": 1}),
        "ResNeXt, added": (ResNeXt("sum"), {"Conv": 3, "Relu": 3, "Add": 1}),
        "ResNeXt, concatenated": (ResNeXt("cat"), {"Conv": 3, "Relu": 3, "Add": 1}),
        "pointwise pair": (nn.Sequential(nn.Conv2d(8, 16, 1), nn.Conv2d(16, 4, 1)), {"Conv": 1}),
        "padded pair": (nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(8, 16, 3), nn.Conv2d(16, 4, 1)), {"Conv": 1}),
        "separable": (separable, {"Conv": 2, "Relu": 1}),
    }


@pytest.mark.export
@pytest.mark.parametrize("dynamo", [True, False], ids=["torch.export", "TorchScript"])
@pytest.mark.parametrize(
    "name", ["RepVGG", "RepVGG in groups", "ResNeXt, added", "ResNeXt, concatenated", "pointwise pair", "padded pair", "separable"]
)  # fmt: skip
def test_exported(name: str, dynamo: bool, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    module, expected = blocks()[name]
    for layer in module.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2.0)
    x = torch.randn(2, 8, 12, 10)
    path = tmp_path / "block.onnx"
    if dynamo:
        shapes = ({0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO},)
        torch.onnx.export(
            module.eval(), (x,), path, dynamo=True, verbose=False, dynamic_shapes=shapes, external_data=False
        )
    else:
        buffer = io.BytesIO()
        torch.onnx.export(module.eval(), (x,), buffer, dynamo=False, dynamic_axes={"x": [0, 2]}, input_names=["x"])
        onnx.save(onnx.load_from_string(buffer.getvalue()), path)
    model = ir.load(path)
    sites = merge(model)
    counts = collections.Counter(node.op_type for node in model.graph if node.op_type != "Constant")
    assert counts == expected, [site.detail for site in sites]
    feed = {model.graph.inputs[0].name: x.numpy()}
    (before,), (after,) = outputs(str(path), feed), outputs(ir.to_proto(model).SerializeToString(), feed)
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)
    if name == "separable":
        assert ["it would cost 5.8 times the operations" in site.detail for site in sites] == [True]
