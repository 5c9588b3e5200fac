"""Exports of real models judged on text: SmolLM2's first layers, and MiniLM."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from coarse_weights import coarsened

from graphopt.calibration.text import TextDataset, tokenize
from graphopt.errors import InputDataError
from graphopt.evaluation.data import EvaluationData
from graphopt.evaluation.judging import Options, evaluate
from graphopt.models.catalogue import fetch
from graphopt.models.texts import wikipedia

pytestmark = [pytest.mark.real, pytest.mark.export]
pytest.importorskip("torch")
LAYERS = 2


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with its first layers alone, and its tokenizer beside it."""
    from safetensors.numpy import save_file

    from graphopt.export import export_model
    from graphopt.export.gguf.source import from_gguf

    folder = tmp_path_factory.mktemp("smollm2")
    made = from_gguf(fetch("smollm2"))
    made.write_companions(folder)
    later = tuple(f"layers.{number}." for number in range(LAYERS, made.config.num_hidden_layers))
    kept = [name for name in made.weights.names() if not any(layer in name for layer in later)]
    save_file(
        {name: made.weights.tensor(name).numpy() for name in kept}, folder / "model.safetensors", {"format": "pt"}
    )
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": LAYERS}))
    export_model(folder, folder / "onnx", exporter="torchscript")
    return folder / "onnx" / "model.onnx"


def test_decoder(smollm2: Path, tmp_path: Path) -> None:
    text = EvaluationData("articles", text=wikipedia("evaluation")[:4000])
    files = [smollm2, *(coarsened(smollm2, tmp_path / f"{bits}.onnx", bits) for bits in (8, 4))]
    options = Options(window=48, samples=2, threads=1)
    same, fine, coarse = evaluate(smollm2, files, text, options)
    assert same.samples == "94 tokens in 2 windows of 48"
    assert (same["kl"], same["top1"]) == (0, 1)
    assert same["ppl"] == same.metric("ppl").reference
    assert 0 < fine["kl"] < coarse["kl"]
    assert 1 > fine["top1"] > coarse["top1"]
    # What was calibrated with doesn't judge, wherever its windows begin; another article does.
    tokens = tokenize(wikipedia("evaluation")[100:4000], smollm2.parent)
    with pytest.raises(InputDataError, match="tokens with the calibration text"):
        evaluate(smollm2, [], text, options, calibration=TextDataset(tokens, 128))
    other = tokenize(wikipedia("calibration")[:3000], smollm2.parent)
    assert evaluate(smollm2, [], text, options, calibration=TextDataset(other, 128)) == []


def test_encoder(tmp_path: Path) -> None:
    from graphopt.export import export_model

    export_model(fetch("minilm"), tmp_path, exporter="torchscript")
    model = tmp_path / "model.onnx"
    rows = ("A cat sat on the mat.", "A dog lay on the rug.", "Shares fell on Monday.", "Markets lost ground today.")
    same, coarse = evaluate(
        model, [model, coarsened(model, tmp_path / "coarse.onnx", 6)], EvaluationData("sentences", rows=rows)
    )
    assert same["spearman"] == pytest.approx(1)
    assert same["cosine"] == 1
    assert 0.5 < coarse["cosine"] < 1
    assert "hidden states in 'last_hidden_state', which are averaged over the tokens that count" in same.notes[0]
