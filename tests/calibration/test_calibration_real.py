"""Calibration of real models: SmolLM2, whose first token takes most of the attention, and a MiniLM from TorchScript."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from calibration.small_models import activations, value
from graphopt.analysis.attention_sites import attention_sites
from graphopt.analysis.linear_sites import linear_sites
from graphopt.analysis.shapes import infer
from graphopt.api import canonical
from graphopt.calibration.calibration import Calibration
from graphopt.calibration.data import ArrayDataset
from graphopt.calibration.request import Request, TokenWeights
from graphopt.calibration.statistics import MeanVariance, SecondMoment
from graphopt.calibration.text import TextDataset, tokenize
from graphopt.calibration.token_feeds import TokenInputs
from graphopt.graph import load
from graphopt.models.catalogue import fetch

pytestmark = pytest.mark.real
TEXT = (
    "The Norman conquest of England was an invasion led by the Duke of Normandy in the autumn of 1066. He landed on the "
    "south coast while the English army was still marching back from a battle in the north, built castles, and waited. "
)
SINK = 10
"""How many times as much as the mean the first token receives, at least, in most layers."""


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> tuple[ir.Model, TextDataset]:
    pytest.importorskip("torch", reason="PyTorch isn't installed")
    pytest.importorskip("transformers", reason="transformers isn't installed")
    from graphopt.export import export_model

    folder = tmp_path_factory.mktemp("smollm2")
    model = load(export_model(fetch("smollm2"), folder, verify="none"))
    return canonical(model), TextDataset(tokenize(TEXT, folder), 24)


@pytest.mark.export
def test_smollm2(smollm2: tuple[ir.Model, TextDataset]) -> None:
    model, data = smollm2
    attention = attention_sites(model, infer(model))
    sites = linear_sites(model, attention)
    assert len(attention) == 30
    by_x = {site.x: site for site in sites if site.role not in ("embed", "head") and site.x is not None}
    assert len(by_x) == 120
    readers = iter(attention)
    requests = []
    for x, site in by_x.items():
        requests.append(Request(x, SecondMoment()))
        if site.role in ("q", "k", "v"):
            requests.append(Request(x, SecondMoment(), TokenWeights(next(readers).node, "received")))
    found, shares = {}, []
    for stage in Calibration(data, piece_bytes=64 << 20).stages(model, requests):
        assert stage.count > 8
        found.update(stage.summaries)
        shares += [float(a[0] / a.mean()) for a in stage.received.values()]
    assert len(found) == len(requests)
    # The first token is the sink of most layers.
    assert len(shares) == 30
    assert sum(share > SINK for share in shares) > 15, shares
    chosen = [requests[0], requests[len(requests) // 2], requests[-1]]
    names = [request.value.name or "" for request in chosen]
    expected = activations(model, list(data.feeds(model)), names)
    for request, name in zip(chosen, names, strict=True):
        rows = np.concatenate([a.reshape(-1, a.shape[-1]) for a in expected[name]]).astype(np.float64)
        moment = rows.T @ rows / len(rows)
        if request.weights is None:
            error = np.abs(found[request].array - moment).max() / np.abs(moment).max()
            assert error < 1e-4, name


def test_an_encoder_with_padding(tmp_path: Path) -> None:
    model = canonical(load(fetch("paraphrase-minilm")))
    inputs = TokenInputs.read(model)
    rng = np.random.default_rng(0)
    valid = np.arange(12) < np.asarray([[12], [7]])
    feeds = [inputs.feeds(rng.integers(1000, 20000, (2, 12)), valid) for _ in range(2)]
    x = next(s.x for s in reversed(linear_sites(model, attention_sites(model, infer(model)))) if s.role == "fc2")
    assert x is not None
    request = Request(value(model, x.name or ""), MeanVariance())
    stages = list(Calibration(ArrayDataset(feeds), piece_bytes=1 << 20, cache=tmp_path).stages(model, [request]))
    assert len(stages) > 3
    summary = stages[-1][request]
    rows = np.concatenate([a[valid] for a in activations(model, feeds, [x.name or ""])[x.name or ""]])
    assert summary.rows == len(rows) == 38
    np.testing.assert_allclose(summary["mean"], rows.mean(axis=0), rtol=1e-3, atol=1e-4)
