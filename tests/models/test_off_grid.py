"""Off-grid decoders: the same logits from other weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from tiny_decoders import HIDDEN, decoder
from tiny_transformers import cached_feeds, exported_cached

from graphopt.analysis.attention_sites import attention_sites
from graphopt.analysis.linear_sites import linear_sites
from graphopt.analysis.shapes import infer
from graphopt.errors import ModelError
from graphopt.graph.load import load
from graphopt.graph.save import save
from graphopt.models.off_grid import HIGH, LOW, Pair, main, off_grid, pairs


def run(path: Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    wanted = [item.name for item in session.get_inputs()]
    outputs = [item.name for item in session.get_outputs()]
    return dict(zip(outputs, session.run(None, {name: feeds[name] for name in wanted}), strict=True))


def from_nothing(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Empty caches: those of an off-grid decoder are scaled, so that another's can't be given to it."""
    empty = {name: array[:, :, :0] if name.startswith("past") else array for name, array in feeds.items()}
    return {**empty, "attention_mask": np.ones_like(feeds["input_ids"])}


def weights(model: ir.Model) -> dict[str, np.ndarray]:
    """The weights of all linear sites, each as [inputs, outputs], by number and role."""
    found = linear_sites(model, attention_sites(model, infer(model, believe_names=True)))
    stored = [site.weight.const_value.numpy() for site in found]  # type: ignore[union-attr]
    return {
        f"{index} {site.role}": array if site.orientation == "in,out" else array.T
        for index, (site, array) in enumerate(zip(found, stored, strict=True))
    }


@pytest.mark.export
@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_exported_decoders(name: str, tmp_path: Path) -> None:
    path = exported_cached(name, "torchscript")
    model = load(path)
    done = off_grid(model, seed=3)
    assert len(done.pairs) == 6, done.left
    save(model, tmp_path / "model.onnx")
    feeds = from_nothing(cached_feeds(name))
    expected, found = run(path, feeds), run(tmp_path / "model.onnx", feeds)
    scale = np.abs(expected["logits"]).max()
    np.testing.assert_allclose(found["logits"], expected["logits"], rtol=0, atol=1e-5 * scale)
    keys, values = (f"present.0.{part}" for part in ("key", "value"))
    np.testing.assert_allclose(found[keys], expected[keys], rtol=1e-4, atol=1e-4)
    factors = found[values] / expected[values]
    assert (factors > LOW - 1e-3).all()
    assert (factors < HIGH + 1e-3).all()
    np.testing.assert_allclose(factors, factors[:1, :, :1].repeat(factors.shape[2], 2).repeat(2, 0), rtol=1e-3)
    assert (done.norms, done.left) == (7, ())


def test_weights_move_and_follow_the_seed() -> None:
    made = []
    for seed in (0, 0, 1):
        model = ir.from_proto(mlp())
        off_grid(model, seed)
        made.append(weights(model))
    before = weights(ir.from_proto(mlp()))
    assert set(before) == {"0 gate", "1 up", "2 down"}
    for name, first in made[0].items():
        np.testing.assert_array_equal(first, made[1][name])
        if "gate" in name:
            np.testing.assert_array_equal(first, before[name])
        else:
            assert not np.isclose(first, before[name], rtol=1e-6).all(axis=0 if "up" in name else 1).any()
            assert (first != made[2][name]).any()


@pytest.mark.parametrize("kind", ["attention", "concat", "group-query"])
def test_heads_of_values_that_queries_share(kind: Any, tmp_path: Path) -> None:
    onnx.save(decoder(kind), tmp_path / "before.onnx")
    model = load(tmp_path / "before.onnx")
    done = off_grid(model)
    assert len(done.pairs) == 2, done.left
    save(model, tmp_path / "after.onnx")
    empty = np.zeros((2, 2, 0, 16), np.float32)
    feeds = {f"past_key_values.{layer}.{part}": empty for layer in range(2) for part in ("key", "value")}
    feeds |= {"input_ids": np.arange(10).reshape(2, 5), "attention_mask": np.ones((2, 5), np.int64)}
    expected, found = (run(tmp_path / name, feeds)["logits"] for name in ("before.onnx", "after.onnx"))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


MLP = """
<ir_version: 10, opset_import: ["": 23]>
g (float[batch, 8] x) => (float[batch, 8] y{more}) {{
  a = MatMul(x, gate)
  s = Sigmoid(a)
  g = Mul(a, s)
  u0 = {up}
  u = Add(u0, bias)
  h = Mul(g, u)
  y = {down}
  {extra}
}}
"""


def mlp(up: str = "MatMul(x, up)", down: str = "MatMul(h, down)", more: str = "", extra: str = "") -> onnx.ModelProto:
    model = onnx.parser.parse_model(MLP.format(up=up, down=down, more=more, extra=extra))
    rng = np.random.default_rng(0)
    shapes = {"gate": (8, 12), "up": (8, 12), "down": (12, 8), "bias": (12,), "upt": (12, 8), "c": (12,)}
    read = {name for node in model.graph.node for name in node.input}
    for name, shape in shapes.items():
        if name in read:
            array = rng.normal(size=shape).astype(np.float32)
            model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return model


@pytest.mark.parametrize("up", ["MatMul(x, up)", "Gemm<transB = 1>(x, upt, c)"])
def test_biases_are_scaled_too(up: str, tmp_path: Path) -> None:
    onnx.save(mlp(up), tmp_path / "before.onnx")
    model = load(tmp_path / "before.onnx")
    assert len(off_grid(model).pairs) == 1
    save(model, tmp_path / "after.onnx")
    x = {"x": np.random.default_rng(1).normal(size=(3, 8)).astype(np.float32)}
    expected, found = (run(tmp_path / name, x)["y"] for name in ("before.onnx", "after.onnx"))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (mlp(more=", float[batch, 12] z", extra="z = Neg(h)"), "isn't a product that nothing else reads"),
        (mlp(more=", float[batch, 12] z", extra="z = Neg(u)"), "up projection isn't known"),
        (mlp(more=", float[batch, 12] z", extra="z = MatMul(y, up)"), "a weight is shared"),
    ],
)
def test_what_others_read_is_left_alone(model: onnx.ModelProto, reason: str) -> None:
    graph = ir.from_proto(model)
    sites = linear_sites(graph, [])
    found = list(pairs(sites, []))
    assert len(found) == 1
    assert not isinstance(found[0], Pair)
    assert reason in found[0][1]
    with pytest.raises(ModelError, match="nothing to scale"):
        off_grid(graph)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = tmp_path / "a" / "model.onnx", tmp_path / "b" / "model.onnx"
    source.parent.mkdir()
    onnx.save(decoder("attention"), source)
    (source.parent / "tokenizer.json").write_text(json.dumps({"of": HIDDEN}))
    assert main([str(source), str(output), "--seed", "2"]) == 0
    assert "2 pairs of layers scaled (seed 2)" in capsys.readouterr().out
    assert (output.parent / "tokenizer.json").read_bytes() == (source.parent / "tokenizer.json").read_bytes()
    assert main([str(tmp_path / "none.onnx"), str(output)]) != 0
    assert capsys.readouterr().err.startswith("error: ")
