"""Language models on text: the same model is perfect, and a known change gives the known numbers."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tiny_decoders import HIDDEN, VOCABULARY, decoder

from graphopt.errors import InputDataError, ModelError, UsageError
from graphopt.runtime_ops.generation import Generator
from graphopt.runtime_ops.scoring import log_sums, perplexity, scores, text_windows
from graphopt.verification.quality.language import Rows, divergence, language_quality

CALM = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""A busy machine is no failure."""


IDS = np.random.default_rng(1).integers(0, VOCABULARY, 48)


def damaged(proto: onnx.ModelProto, name: str, change: np.ndarray) -> onnx.ModelProto:
    """A copy with something added to a weight."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for tensor in copy.graph.initializer:
        if tensor.name == name:
            array = onnx.numpy_helper.to_array(tensor)
            tensor.CopyFrom(onnx.numpy_helper.from_array((array + change).astype(array.dtype), name))
    return copy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quality")
    rng = np.random.default_rng(2)
    for kind in ("group-query", "concat"):
        onnx.save(decoder(kind), folder / f"{kind}.onnx")
    noise = rng.normal(size=(HIDDEN, VOCABULARY)) * 0.02
    onnx.save(damaged(decoder("concat"), "head", noise), folder / "noisy.onnx")
    onnx.save(damaged(decoder("concat"), "head", 3 * noise), folder / "noisier.onnx")
    onnx.save(damaged(decoder("concat"), "head", np.float32("nan")), folder / "nan.onnx")
    return folder


@pytest.mark.parametrize("kind", ["group-query", "concat"])
def test_a_model_is_as_good_as_itself(folder: Path, kind: str) -> None:
    path = folder / f"{kind}.onnx"
    [found] = language_quality(path, [path], IDS, window=16)
    assert (found["kl"], found["top1"]) == (0.0, 1.0)
    assert found["ppl"] == found.metric("ppl").reference == pytest.approx(perplexity(path, IDS, 16).value, rel=1e-6)
    assert found.samples == "45 tokens in 3 windows of 16"


def test_the_numbers_are_those_of_the_formulas(folder: Path) -> None:
    """Beside all logits of a window at once, in groups of one candidate and of several."""
    paths = [folder / f"{name}.onnx" for name in ("concat", "noisy", "noisier")]
    logs = []
    for path in paths:
        generator, rows = Generator(path), []
        for window in IDS[:32].reshape(2, 16):
            logits = generator.start(1, 16).feed(window[None])[0, :-1].astype(np.float64)
            rows.append(logits - log_sums(logits)[:, None])
        logs.append(np.concatenate(rows))
    for together in (1, 2, 8):
        found = language_quality(paths[0], paths, IDS, 16, windows=2, together=together)
        for quality, ours in zip(found, logs, strict=True):
            following = np.concatenate([window[1:] for window in IDS[:32].reshape(2, 16)])
            assert quality["ppl"] == pytest.approx(np.exp(-ours[np.arange(30), following].mean()), rel=1e-6)
            kl = (np.exp(logs[0]) * (logs[0] - ours)).sum(axis=1).mean()
            assert quality["kl"] == pytest.approx(kl, rel=1e-5, abs=1e-8)
            assert quality["top1"] == (logs[0].argmax(1) == ours.argmax(1)).mean()
    same, noisy, noisier = found
    assert same["kl"] < noisy["kl"] < noisier["kl"]
    assert noisier["top1"] < 1


def test_pieces_of_a_window_are_what_the_window_is(folder: Path) -> None:
    paths = [folder / "concat.onnx", folder / "noisy.onnx"]
    [whole] = language_quality(paths[0], paths[1:], IDS, 48)
    [pieces] = language_quality(paths[0], paths[1:], IDS, 48, chunk=7)
    for name in ("ppl", "kl", "top1"):
        assert pieces[name] == pytest.approx(whole[name], rel=1e-4)


def test_a_broken_candidate_has_no_numbers(folder: Path) -> None:
    [found] = language_quality(folder / "concat.onnx", [folder / "nan.onnx"], IDS, 16)
    assert math.isnan(found["ppl"])
    assert math.isnan(found["kl"])
    assert found.to_dict()["metrics"][0]["value"] is None
    [back] = language_quality(folder / "nan.onnx", [folder / "concat.onnx"], IDS, 16)
    assert math.isnan(back["kl"])


@CALM
@given(arrays(np.float64, (2, 3, 5), elements=st.floats(-50, 50)))
def test_divergence_is_never_negative(logits: np.ndarray) -> None:
    p, q = Rows.of(logits[0]), Rows.of(logits[1])
    rows = divergence(p, q)
    assert (rows >= 0).all()
    assert (divergence(p, p) == 0).all()
    shifted = Rows.of(logits[1] + np.array([[1.0], [-20.0], [7.0]]))  # the same distributions
    assert np.allclose(divergence(p, shifted), rows, atol=1e-9)
    exact = (p.weights / p.totals[:, None] * (logits[0] - p.sums[:, None] - logits[1] + q.sums[:, None])).sum(axis=1)
    assert np.allclose(rows, exact, atol=1e-9)
    narrow = divergence(Rows.of(logits[0].astype(np.float32)), Rows.of(logits[1].astype(np.float32)))
    assert np.allclose(narrow, rows, atol=1e-4)


def test_a_small_divergence_survives_float32() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4, 50000)) * 3
    # Far from 0 and shifted as a whole, which changes no distribution.
    narrow = (logits + 30).astype(np.float32), (logits + rng.normal(size=logits.shape) * 1e-3 + 10).astype(np.float32)
    exact = divergence(*(Rows.of(array.astype(np.float64)) for array in narrow))
    assert (exact < 1e-6).all()
    assert np.allclose(divergence(*map(Rows.of, narrow)), exact, atol=2e-8)


def test_what_a_distribution_excludes() -> None:
    p, q = Rows.of(np.log([[0.5, 0.5]])), Rows.of(np.log([[0.25, 0.75]]))
    assert divergence(p, q) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    none = Rows.of(np.array([[0.0, -np.inf]]))
    assert divergence(none, p) == pytest.approx(math.log(2))
    assert divergence(p, none) == math.inf
    assert divergence(none, none) == 0
    assert np.isnan(divergence(Rows.of(np.array([[np.nan, 0.0]])), p)).all()


def test_mistakes(folder: Path, tmp_path: Path) -> None:
    path = folder / "concat.onnx"
    with pytest.raises(InputDataError, match="The text has 48 tokens, fewer than one window of 49"):
        language_quality(path, [path], IDS, 49)
    with pytest.raises(InputDataError, match="fewer than 4 windows of 16"):
        language_quality(path, [path], IDS, 16, windows=4)
    with pytest.raises(UsageError, match="At least one window"):
        language_quality(path, [path], IDS, 16, windows=0)
    with pytest.raises(UsageError, match="at least two tokens"):
        text_windows(IDS, 1)
    with pytest.raises(UsageError, match="at a time"):
        language_quality(path, [path], IDS, 16, together=0)
    with pytest.raises(UsageError, match="At least one token"):
        language_quality(path, [path], IDS, 16, chunk=0)
    with pytest.raises(InputDataError, match="two tokens"):
        scores(Generator(path), [1])
    other = decoder("concat")
    for tensor in other.graph.initializer:
        if tensor.name == "head":
            array = onnx.numpy_helper.to_array(tensor)[:, :-1]
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(array), "head"))
    other.graph.output[0].type.tensor_type.shape.dim[2].dim_value = VOCABULARY - 1
    onnx.save(other, tmp_path / "smaller.onnx")
    with pytest.raises(InputDataError, match=r"over 40 tokens, .*concat\.onnx over 41"):
        language_quality(path, [tmp_path / "smaller.onnx"], IDS, 16)
    encoder = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[4] x) => (float[4] y) { y = Tanh(x) }'
    )
    onnx.save(encoder, tmp_path / "encoder.onnx")
    with pytest.raises(ModelError, match="no decoder"):
        language_quality(path, [tmp_path / "encoder.onnx"], IDS, 16)
