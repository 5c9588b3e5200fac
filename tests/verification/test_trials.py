"""Trials: weights exchanged within one session."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from tiny_decoders import decoder

from graphopt.errors import InputDataError, UsageError, VerificationError
from graphopt.runtime_ops.memory_session import make_session
from graphopt.verification.trials import Trials

TEXT = """
<ir_version: 10, opset_import: ["" : 20]>
agraph (float[n, 8] x) => (float[n, 4] y) {
    h = MatMul (x, a)
    y = MatMul (h, b)
}
"""


def model() -> ir.Model:
    return weighted(ir.from_onnx_text(TEXT))


def weighted(made: ir.Model) -> ir.Model:
    rng = np.random.default_rng(0)
    for name, shape in (("a", (8, 8)), ("b", (8, 4))):
        value = next(v for node in made.graph for v in node.inputs if v is not None and v.name == name)
        value.const_value = ir.tensor(rng.standard_normal(shape).astype(np.float32), name=name)
        made.graph.initializers[name] = value
    return made


def test_a_trial_costs_what_the_changed_model_differs_by() -> None:
    made = model()
    weights = list(made.graph.initializers.values())
    x = np.random.default_rng(1).standard_normal((5, 8)).astype(np.float32)
    trials = Trials(made, weights, [{"x": x}])
    a, b = (w.const_value.numpy() for w in weights if w.const_value is not None)
    changed = b + np.float32(0.1)
    p, q = (x @ a @ m for m in (b, changed))
    logp, logq = (y - np.log(np.exp(y).sum(1, keepdims=True)) for y in (p, q))
    classes = float((np.exp(logp) * (logp - logq)).sum(1).mean())
    numbers = float(np.square(p - q).sum() / np.square(p).sum())
    assert trials.loss({}) == pytest.approx(0, abs=1e-9)
    assert min(abs(trials.loss({"b": changed}) - value) for value in (classes, numbers)) < 1e-4
    assert trials.loss({}) == pytest.approx(0, abs=1e-9)
    assert list(made.graph.initializers) == ["a", "b"]


def classifier(last: str) -> ir.Model:
    made = ir.from_onnx_text(
        TEXT.replace("agraph", "classes").replace("y = MatMul (h, b)", f"z = MatMul (h, b) {last}")
    )
    made.metadata_props["task"] = "classify"
    return weighted(made)


@pytest.mark.parametrize("last", ["y = Identity (z)", "y = Softmax <axis = -1> (z)"])
def test_classes_are_judged_by_their_probabilities_however_they_are_given(last: str) -> None:
    made = classifier(last)
    weights = list(made.graph.initializers.values())
    x = np.random.default_rng(1).standard_normal((5, 8)).astype(np.float32) / 4
    a, b = (w.const_value.numpy() for w in weights if w.const_value is not None)
    changed = b * np.float32(0.9)
    logp, logq = (x @ a @ m - np.log(np.exp(x @ a @ m).sum(1, keepdims=True)) for m in (b, changed))
    wanted = float((np.exp(logp) * (logp - logq)).sum(1).mean())
    assert Trials(made, weights, [{"x": x}]).loss({"b": changed}) == pytest.approx(wanted, rel=1e-3)


def test_an_embedder_is_judged_by_its_embeddings() -> None:
    made = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 20]>
        states (int64[n, t] input_ids, int64[n, t] attention_mask) => (float[n, t, 4] last_hidden_state) {
            h = Gather (a, input_ids)
            last_hidden_state = MatMul (h, b)
        }""")
    made = weighted(made)
    a, b = (made.graph.initializers[name] for name in "ab")
    assert a.const_value is not None
    assert b.const_value is not None
    a.shape = ir.Shape(a.const_value.shape.numpy())
    ids = np.array([[1, 2, 3], [4, 5, 0]], np.int64)
    mask = np.array([[1, 1, 1], [1, 1, 0]], np.int64)
    trials = Trials(made, [b], [{"input_ids": ids, "attention_mask": mask}])
    held = b.const_value.numpy()
    # How long an embedding is counts for nothing.
    assert trials.loss({"b": held * np.float32(3)}) == pytest.approx(0, abs=1e-6)
    changed = held + np.float32(0.5)
    y, z = (
        np.stack([(a.const_value.numpy()[row[:n]] @ m).mean(0) for row, n in zip(ids, (3, 2), strict=True)])
        for m in (held, changed)
    )
    cosines = (y * z).sum(1) / np.linalg.norm(y, axis=1) / np.linalg.norm(z, axis=1)
    assert trials.loss({"b": changed}) == pytest.approx(1 - cosines.mean(), rel=1e-4)


def test_by_perplexity_the_tokens_that_came_count_alone() -> None:
    made = ir.from_proto(decoder("concat", layers=1))
    head = max(made.graph.initializers.values(), key=lambda value: value.const_value.size)  # type: ignore[union-attr]
    ids = np.array([[1, 2, 3, 4, 5], [0, 0, 5, 1, 2]], np.int64)
    mask = np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]], np.int64)
    empty = np.zeros((2, 2, 0, 16), np.float32)
    sample = {"input_ids": ids, "attention_mask": mask}
    sample |= {f"past_key_values.0.{kind}": empty for kind in ("key", "value")}
    trials = Trials(made, [head], [sample], judge="perplexity")
    assert trials.loss({}) == 0
    changed = head.const_value.numpy() * np.linspace(0.5, 1.5, head.const_value.shape[-1], dtype=np.float32)
    after = made.clone()
    after.graph.initializers[head.name].const_value = ir.tensor(changed, name=head.name)
    surprise = []
    for model in (made, after):
        logits = make_session(model, threads=1).run(["logits"], sample)[0].astype(np.float64)
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        surprise.append([-logp[i, j, ids[i, j + 1]] for i in (0, 1) for j in range(4) if i == 0 or j > 1])
    wanted = np.mean(surprise[1]) - np.mean(surprise[0])
    assert abs(wanted) > 1e-3
    assert trials.loss({head.name: changed}) == pytest.approx(wanted, rel=1e-4)


def test_no_perplexity_of_what_foretells_no_text() -> None:
    made = model()
    with pytest.raises(UsageError, match="of a decoder"):
        Trials(made, [made.graph.initializers["b"]], [{"x": np.ones((2, 8), np.float32)}], judge="perplexity")


def test_what_cant_be_tried_is_said() -> None:
    made = model()
    weights = list(made.graph.initializers.values())
    with pytest.raises(InputDataError, match="no sample"):
        Trials(made, weights, [])
    with pytest.raises(VerificationError, match="doesn't run"):
        Trials(made, weights, [{"x": np.zeros((5, 7), np.float32)}])


def test_what_is_no_number_is_no_small_loss() -> None:
    made = model()
    b = made.graph.initializers["b"]
    trials = Trials(made, [b], [{"x": np.ones((2, 8), np.float32)}])
    assert trials.loss({"b": np.full((8, 4), np.nan, np.float32)}) == float("inf")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the system doesn't list what is open")
def test_samples_share_one_of_the_files_that_a_process_may_have_open() -> None:
    made, rng = model(), np.random.default_rng(2)
    before = len(list(Path("/proc/self/fd").iterdir()))
    samples = [{"x": rng.standard_normal((2048, 8)).astype(np.float32)} for _ in range(40)]
    trials = Trials(made, [made.graph.initializers["b"]], samples)
    assert len(list(Path("/proc/self/fd").iterdir())) - before < 10
    assert trials.loss({}) == 0
