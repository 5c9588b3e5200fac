"""The raise passes of norms and activations on real exports: what they find, and the same outputs in ONNX Runtime."""

from __future__ import annotations

import collections

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.models import catalogue
from graphopt.passes.raise_.convert_opset import ConvertOpset
from graphopt.passes.raise_.gelu import RaiseGelu
from graphopt.passes.raise_.layer_norm import RaiseLayerNorm
from graphopt.passes.raise_.rms_norm import RaiseRmsNorm
from graphopt.passes.raise_.silu import RaiseSilu

RULES = {rule.name: rule for rule in (RaiseLayerNorm, RaiseRmsNorm, RaiseGelu, RaiseSilu)}
RNG = np.random.default_rng(0)
IDS = RNG.integers(1, 1000, size=(2, 12))
CASES = [
    # PaddlePaddle: Pow/Div norms, GELU as Div/Erf, swish as Sigmoid(1 · x).
    ("ppocr-v6-rec", {"raise-layer-norm": 5, "raise-gelu": 13}, RNG.normal(size=(2, 3, 48, 160)).astype(np.float32)),
    ("ppocr-v4-rec", {"raise-layer-norm": 5, "raise-silu": 7}, RNG.normal(size=(2, 3, 48, 160)).astype(np.float32)),
    # TorchScript.
    ("paraphrase-minilm", {"raise-gelu": 3}, IDS),
    ("openwakeword-jarvis", {"raise-layer-norm": 4}, RNG.normal(size=(1, 16, 96)).astype(np.float32)),
    # JAX through TensorFlow: GELU by tanh; its norms take the variance as E[x²] − E[x]².
    ("magika", {"raise-gelu": 2}, RNG.integers(0, 256, size=(2, 2048)).astype(np.int32)),
]


@pytest.mark.real
@pytest.mark.parametrize(("key", "expected", "data"), CASES, ids=[case[0] for case in CASES])
def test_real_model(key: str, expected: dict[str, int], data: np.ndarray) -> None:
    ort = pytest.importorskip("onnxruntime")
    path = catalogue.fetch(key)
    model = ir.load(path)
    ConvertOpset()(model)
    found: collections.Counter[str] = collections.Counter()
    for name, rule in RULES.items():
        instance = rule()
        instance(model)
        found[name] += sum(site.outcome == "applied" for site in instance.sites)
        if name == "raise-layer-norm" and key == "magika":
            assert ["cancels" in site.detail for site in instance.sites] == [True, True]
        else:
            assert [site.detail for site in instance.sites if site.outcome == "left"] == []
    assert +found == expected

    quiet = ort.SessionOptions()
    quiet.log_severity_level = 3
    sessions = [
        ort.InferenceSession(source, quiet, providers=["CPUExecutionProvider"])
        for source in (str(path), ir.to_proto(model).SerializeToString())
    ]
    feed = {i.name: data for i in sessions[0].get_inputs()}
    if key == "paraphrase-minilm":
        feed = {
            name: np.ones_like(IDS) if "mask" in name else np.zeros_like(IDS) if "type" in name else IDS
            for name in feed
        }
    before, after = (session.run(None, feed) for session in sessions)
    for one, other in zip(before, after, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=2e-5)
