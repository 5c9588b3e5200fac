"""How much attention a token receives, and what weights are made of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from calibration.small_models import activations, parse, value
from graphopt.calibration.calibration import Calibration
from graphopt.calibration.data import ArrayDataset
from graphopt.calibration.request import Request, TokenWeights
from graphopt.calibration.stages import stages
from graphopt.calibration.statistics import MeanAbs, SecondMoment
from graphopt.errors import ModelError, UsageError

HEADS, KV_HEADS, SIZE, TOKENS = 4, 2, 3, 6

FUSED = f"""
g (int64[b, t] input_ids, int64[b, total] attention_mask, float[b, {KV_HEADS}, past, {SIZE}] past_k,
   float[b, {KV_HEADS}, past, {SIZE}] past_v)
  => (float[b, t, 12] y, float[b, {KV_HEADS}, total, {SIZE}] present_k, float[b, {KV_HEADS}, total, {SIZE}] present_v) {{
    kept = Cast<to = 9>(attention_mask) row = Unsqueeze(kept, middle)
    sizes = Shape(attention_mask) total_ = Gather(sizes, one) places = Range(zero, total_, one)
    column = Unsqueeze(places, last) causal = LessOrEqual(places, column) mask = And(row, causal)
    x = Gather(table, input_ids)
    q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv)
    a, present_k, present_v = Attention<q_num_heads = {HEADS}, kv_num_heads = {KV_HEADS}>(q, k, v, mask, past_k, past_v)
    y = MatMul(a, wo)
}}"""

SPELLED = """
g (float[b, t, 12] e) => (float[b, t, 12] y) {
    x = MatMul(e, we)
    q_ = MatMul(x, wq) k_ = MatMul(x, wk) v_ = MatMul(x, wv)
    q3 = Reshape(q_, heads) k3 = Reshape(k_, heads) v3 = Reshape(v_, heads)
    q = Transpose<perm = [0, 2, 1, 3]>(q3) k = Transpose<perm = [0, 2, 3, 1]>(k3) v = Transpose<perm = [0, 2, 1, 3]>(v3)
    s = MatMul(q, k) p = Softmax(s) a_ = MatMul(p, v) at = Transpose<perm = [0, 2, 1, 3]>(a_) a = Reshape(at, flat)
    y = MatMul(a, wo)
}"""


def weights(*names: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    width = {"wq": HEADS * SIZE, "wo": 12, "we": 12}
    return {name: (rng.normal(size=(12, width.get(name, 6))) * 0.7).astype(np.float32) for name in names}


def fused() -> ir.Model:
    table = (np.random.default_rng(1).normal(size=(500, 12))).astype(np.float32)
    whole = {"middle": [1, 2], "one": 1, "zero": 0, "last": [-1]}
    held = {name: np.asarray(array, np.int64) for name, array in whole.items()}
    return parse(FUSED, {"table": table, **weights("wq", "wk", "wv", "wo"), **held}, opset=23)


def feeds(padded: bool) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(2)
    made = []
    for _ in range(3):
        mask = np.ones((2, TOKENS), np.int64)
        mask[1, 4:] = not padded
        past = np.zeros((2, KV_HEADS, 0, SIZE), np.float32)
        ids = rng.integers(0, 500, (2, TOKENS))
        made.append({"input_ids": ids, "attention_mask": mask, "past_k": past, "past_v": past})
    return made


def received(model: ir.Model, data: list[dict[str, np.ndarray]]) -> list[np.ndarray]:
    """The mean of the probabilities over heads and queries that count, [batch, tokens] for each sample."""
    found = activations(model, data, ["q", "k"])
    result = []
    for q, k, feed in zip(found["q"], found["k"], data, strict=True):
        mask = feed["attention_mask"] != 0
        heads = [a.reshape(2, TOKENS, -1, SIZE).transpose(0, 2, 1, 3).astype(np.float64) for a in (q, k)]
        scores = heads[0] @ heads[1].repeat(HEADS // KV_HEADS, axis=1).transpose(0, 1, 3, 2) / SIZE**0.5
        allowed = mask[:, None, None, :] & np.tri(TOKENS, dtype=bool)
        e = np.where(allowed, np.exp(scores), 0)
        probabilities = (e / e.sum(axis=-1, keepdims=True)).mean(axis=1)
        share = mask / mask.sum(axis=1, keepdims=True)
        result.append(np.einsum("bq,bqk->bk", share, probabilities))
    return result


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("form", ["received", "linear"])
def test_grouped_heads_with_a_cache_and_a_mask(padded: bool, form: str) -> None:
    model, data = fused(), feeds(padded)
    attention = value(model, "a").producer()
    assert attention is not None
    by = TokenWeights(attention, form, 0.01)  # type: ignore[arg-type]
    requests = [Request(value(model, name), SecondMoment(), by) for name in ("x", "a")]
    summaries = {}
    for stage in stages(model, requests, ArrayDataset(data), piece_bytes=1, grain="site"):
        summaries |= stage.summaries
    attended = received(model, data)
    expected = activations(model, data, ["x", "a"])
    for request in requests:
        total, weight = np.zeros((12, 12)), 0.0
        for array, seen, feed in zip(expected[request.value.name or ""], attended, data, strict=True):
            for row, s, kept in zip(array, seen, feed["attention_mask"] != 0, strict=True):
                s, rows = s[kept], row[kept].astype(np.float64)
                r = s / s.mean() if form == "received" else 0.01 + 0.99 * (s - s.min()) / (s.max() - s.min())
                total += (rows * r[:, None]).T @ rows
                weight += r.sum()
        np.testing.assert_allclose(summaries[request].array, total / weight, rtol=1e-4, atol=1e-5)
        assert summaries[request].weight == pytest.approx(weight, rel=1e-5)
    np.testing.assert_allclose(stage.received[attention], np.concatenate(attended).mean(axis=0), rtol=1e-5, atol=1e-6)
    # The node itself is as it was.
    assert len(attention.outputs) == 3
    assert "qk_matmul_output_mode" not in attention.attributes


def test_the_output_of_an_attention_sees_what_changed_before_it(tmp_path: Path) -> None:
    """In a sequential run by sites, also where it goes on after an interruption."""
    data = feeds(True)

    def run(stop: int | None) -> tuple[ir.Model, list[np.ndarray]]:
        model = fused()
        attention = value(model, "a").producer()
        assert attention is not None
        by = TokenWeights(attention, "received")
        requests = [Request(value(model, name), SecondMoment(), by) for name in ("x", "a")]
        found = []
        for stage in stages(model, requests, ArrayDataset(data), sequential=True, grain="site", cache=tmp_path):
            assert stage.count == 2
            assert list(stage.received) == [attention]
            found += [summary.array for summary in stage.summaries.values()]
            if stage.index == stop:
                break
            for name in ("wq", "wk", "wv") if stage.index == 0 else ():
                weight = model.graph.initializers[name]
                assert weight.const_value is not None
                weight.const_value = ir.tensor(weight.const_value.numpy() * np.float32(1.5))
        return model, found

    model, found = run(None)
    total, weight = np.zeros((12, 12)), 0.0
    for array, seen, feed in zip(activations(model, data, ["a"])["a"], received(model, data), data, strict=True):
        for row, s, kept in zip(array, seen, feed["attention_mask"] != 0, strict=True):
            r = s[kept] / s[kept].mean()
            total += (row[kept].astype(np.float64) * r[:, None]).T @ row[kept]
            weight += r.sum()
    np.testing.assert_allclose(found[1], total / weight, rtol=1e-4, atol=1e-5)
    for path in tmp_path.glob("*.npz"):
        path.unlink()
    run(0)
    _, again = run(None)
    np.testing.assert_array_equal(again, found)


def test_a_spelled_out_attention_without_tokens() -> None:
    held = weights("we", "wq", "wk", "wv", "wo")
    held |= {name: weights("wq")["wq"] * scale for name, scale in (("wk", 0.5), ("wv", 2))}
    shapes = {"heads": np.asarray([0, 0, HEADS, SIZE]), "flat": np.asarray([0, 0, HEADS * SIZE])}
    model = parse(SPELLED, {**held, **shapes})
    rng = np.random.default_rng(3)
    data = [{"e": rng.normal(size=(2, TOKENS, 12)).astype(np.float32)} for _ in range(2)]
    softmax = value(model, "p").producer()
    assert softmax is not None
    request = Request(value(model, "x"), MeanAbs(), TokenWeights(softmax, "received"))
    found = Calibration(ArrayDataset(data)).gather(model, [request])[request]
    expected = activations(model, data, ["x", "p"])
    seen = np.concatenate([p.mean(axis=(1, 2), dtype=np.float64) for p in expected["p"]])
    r = seen / seen.mean(axis=1, keepdims=True)
    rows = np.abs(np.concatenate(expected["x"]))
    np.testing.assert_allclose(found.array, np.einsum("bt,btc->c", r, rows) / r.sum(), rtol=1e-5)


def test_what_gives_no_probabilities() -> None:
    model = fused()
    matmul = value(model, "q").producer()
    assert matmul is not None
    with pytest.raises(ModelError, match="MatMul doesn't give its probabilities"):
        list(stages(model, [Request(value(model, "x"), MeanAbs(), TokenWeights(matmul))], ArrayDataset(feeds(False))))
    attention = value(model, "a").producer()
    assert attention is not None
    with pytest.raises(UsageError, match="Tokens can't be weighted"):
        list(
            stages(
                model,
                [Request(value(model, "places"), MeanAbs(), TokenWeights(attention))],
                ArrayDataset(feeds(False)),
            )
        )
