"""quantize-static at 4 bits: ranges, roundings and corrections on the weights of trained classifiers."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from exactness import op_types, parse_weighted
from hypothesis import given, settings
from hypothesis import strategies as st

import graphopt
from graphopt.calibration.data import ArrayDataset, FirstSamples
from graphopt.graph.edits import sort
from graphopt.models import fashion
from graphopt.passes.quantize.integer_weights import SignedGrid
from graphopt.passes.quantize.layer_rounding import PairMoments, round_layer
from graphopt.passes.quantize.roundings import Rounding
from graphopt.passes.quantize.static import QuantizeStatic
from graphopt.passes.quantize.value_ranges import METHODS, seen
from graphopt.recipe import load
from graphopt.runtime_ops.memory_session import make_session, run

ROUNDINGS: tuple[Rounding, ...] = ("nearest", "gptq", "comq", "gptq+comq")


def pair_of(x: Any, y: Any) -> PairMoments:
    both = np.concatenate([x, y], axis=1).astype(np.float64)
    return PairMoments(both.mean(axis=0), both.T @ both / len(both))


def rows(seed: int = 0, outputs: int = 24, inputs: int = 16, count: int = 400) -> tuple[Any, Any, Any]:
    """A weight, what a layer reads, and that in 16 levels."""
    rng = np.random.default_rng(seed)
    x = np.maximum(rng.normal(size=(count, inputs)) @ rng.normal(size=(inputs, inputs)) / 4 + 0.3, 0)
    step = x.max() / 22
    rounded = np.minimum(np.rint(x / step), 15) * step
    return rng.normal(size=(outputs, inputs)).astype(np.float32), x, rounded


def lost(weight: Any, x: Any, y: Any, **options: Any) -> tuple[float, float, float]:
    """The mean squared error of outputs, the largest of their means, and of their standard deviations."""
    found = round_layer(weight, SignedGrid(options.pop("bits", 4)), pair=pair_of(x, y), **options)
    expected, got = x @ weight.T, y @ found.numbers().T + found.shift
    means = np.abs(expected.mean(axis=0) - got.mean(axis=0)).max()
    return float(np.square(expected - got).mean()), float(means), float(np.abs(expected.std(0) / got.std(0) - 1).max())


@given(seed=st.integers(0, 999), bits=st.sampled_from([4, 8]), rounding=st.sampled_from(ROUNDINGS))
@settings(max_examples=25, deadline=None)
def test_corrections_keep_what_they_are_for(seed: int, bits: int, rounding: Rounding) -> None:
    weight, x, y = rows(seed)
    none, bias, moments, again = (
        lost(weight, x, y, bits=bits, rounding=rounding, correction=kind)
        for kind in ("none", "bias", "moments", "reconstruct")
    )
    assert max(bias[1], moments[1], again[1]) < 1e-3 < none[1]
    assert bias[0] < none[0]
    assert moments[2] < max(none[2], 1e-3)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_reconstruction_loses_less_on_the_whole(rounding: Rounding) -> None:
    # Not of every layer: what is rounded there are other weights, which may fall less well.
    for bits in (4, 8):
        bias, again = (
            sum(lost(*rows(seed), bits=bits, rounding=rounding, correction=kind)[0] for seed in range(24))
            for kind in ("bias", "reconstruct")
        )
        assert again < bias


@pytest.mark.parametrize("rounding", ROUNDINGS[1:])
def test_calibrated_roundings_lose_less(rounding: Rounding) -> None:
    weight, x, _ = rows(3)
    plain = lost(weight, x, x, rounding="nearest", correction="bias")[0]
    assert lost(weight, x, x, rounding=rounding, correction="bias")[0] < 0.8 * plain


LAYERED = """<ir_version: 10, opset_import: ["": 21]> g (float[n, 8, h, w] x) => (float[n, 10] y)
<float[16, 8, 3, 3] w1, float[16] b1, float[16, 16, 3, 3] w2, float[16, 12] w3, float[12] b3, float[10, 12] w4> {
  c1 = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, w1, b1)
  r1 = Relu(c1)
  c2 = Conv <kernel_shape = [3, 3], strides = [2, 2]> (r1, w2)
  s = GlobalAveragePool(c2)
  f = Flatten(s)
  m = MatMul(f, w3)
  a = Add(m, b3)
  y = Gemm <alpha = 0.5, transB = 1> (a, w4)
}"""


@pytest.mark.parametrize("options", [
    {"weight_bits": 4}, {"weight_bits": 4, "activation_bits": 4}, {"activation_bits": 4},
    {"weight_bits": 4, "rounding": "gptq", "correction": "bias"},
    {"weight_bits": 4, "activation_bits": 4, "rounding": "comq", "correction": "reconstruct"},
    {"rounding": "gptq+comq", "correction": "moments"},
])  # fmt: skip
def test_each_option_in_one_graph(options: dict[str, Any]) -> None:
    before = parse_weighted(LAYERED)
    data = [{"x": np.random.default_rng(i).normal(size=(4, 8, 9, 9)).astype(np.float32)} for i in range(4)]
    after = before.clone()
    rule = QuantizeStatic(keep_last=False, min_weights=1, method="mse", **options)
    rule.calibration = data  # type: ignore[assignment]
    assert rule(after).modified
    sort(after)
    sizes = {value.const_value.dtype for value in after.graph.initializers.values() if value.const_value is not None}
    assert (ir.DataType.INT4 in sizes) == (options.get("weight_bits") == 4)
    assert ("Clip" in op_types(after)) == (options.get("activation_bits") == 4)
    first, second = (run(make_session(model, threads=1), data[0])[0] for model in (before, after))
    limit = 0.05 if 4 not in options.values() else 0.6
    assert np.linalg.norm(first - second) < limit * np.linalg.norm(first)


def test_the_first_samples() -> None:
    data = ArrayDataset([{"x": np.full(2, i, np.float32)} for i in range(3)])
    few = FirstSamples(data, 2)
    assert len(few) == 2
    assert few.fingerprint != data.fingerprint


def clothes(kind: fashion.Kind, split: fashion.Split, count: int) -> Any:
    if not fashion.available() or not fashion.trained(kind):
        pytest.skip(f"a classifier of Fashion-MNIST isn't here: python -m graphopt.models.fashion {kind} makes it")
    return fashion.images(split, count)


@pytest.mark.real
@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_searched_ranges_of_real_activations_lose_less_in_16_levels(kind: fashion.Kind) -> None:
    pixels, _ = clothes(kind, "train", 128)
    model = graphopt.optimize(fashion.model(kind), verify="none").model
    values = [node.inputs[0] for node in model.graph if node.op_type in ("Conv", "FusedConv", "Gemm", "MatMul")]
    chosen = [value for value in dict.fromkeys(values) if value is not None and not value.is_graph_input()]
    held = seen(model, chosen, [{"image": pixels}])
    better = {method: 0 for method in METHODS}
    for one in held.values():
        plain = one.range("minmax", levels=16)
        for method in METHODS[2:]:
            better[method] += one.range(method, levels=16).snr >= plain.snr - 0.1
    assert better["mse"] == len(held)
    assert better["entropy"] >= 0.5 * len(held)


@pytest.mark.real
@pytest.mark.parametrize("kind", ["cnn", "vit"])
@pytest.mark.parametrize(("recipe", "most"), [("int8-static", 0.01), ("w4a8", 0.015), ("w4a4", 0.025)])
def test_classifiers(kind: fashion.Kind, recipe: str, most: float) -> None:
    pixels, _ = clothes(kind, "train", 128)
    shown, labels = clothes(kind, "test", 2000)
    path = fashion.model(kind)
    data = [{"image": pixels[start : start + 64]} for start in (0, 64)]
    exact = graphopt.optimize(path, verify="none").model
    small = graphopt.optimize(path, load(recipe), verify="none", calibration=data).model
    right = [
        (run(make_session(model, threads=1), {"image": shown})[0].argmax(axis=1) == labels).mean()
        for model in (exact, small)
    ]
    assert right[1] > right[0] - most
