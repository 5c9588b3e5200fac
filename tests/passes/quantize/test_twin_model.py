"""Layers rounded one after the other: each for what it reads once those before it are rounded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from calibration.small_models import HIDDEN, parse, residual

from graphopt.calibration.calibration import Calibration
from graphopt.calibration.data import ArrayDataset
from graphopt.calibration.stages import Stage
from graphopt.passes.fold.layers import Layer, layer_of
from graphopt.passes.quantize.integer_weights import SignedGrid
from graphopt.passes.quantize.layer_rounding import CORRECTIONS, Correction
from graphopt.passes.quantize.region_scales import Scale
from graphopt.passes.quantize.roundings import quantize
from graphopt.passes.quantize.twin_model import round_layers

FEEDS = [{"x": np.random.default_rng(i).normal(size=(2, 30, HIDDEN)).astype(np.float32)} for i in range(3)]
SCALE = Scale(0.05, 128)


class Watched(Calibration):
    """Calibration that remembers which models ran, and what was said."""

    def __init__(self) -> None:
        self.models: list[ir.Model] = []
        self.said: list[str] = []
        super().__init__(ArrayDataset(FEEDS), progress=lambda what, done, count: self.said.append(what))

    def stages(self, model: ir.Model, *args: Any, **options: Any) -> Iterator[Stage]:
        self.models.append(model)
        return super().stages(model, *args, **options)


def layers_of(model: ir.Model) -> dict[ir.Node, Layer]:
    found = {node: layer_of(node) for node in model.graph if node.op_type in ("MatMul", "Conv")}
    return {node: layer for node, layer in found.items() if isinstance(layer, Layer)}


def rounded_input(x: Any) -> Any:
    return (np.clip(np.rint(x / np.float32(SCALE.step)) + SCALE.zero_point, 0, 255) - SCALE.zero_point) * SCALE.step


def test_each_layer_is_rounded_for_what_it_reads_then() -> None:
    model, data = residual(2), Watched()
    layers = layers_of(model)
    found = round_layers(model, layers, dict.fromkeys(layers, SCALE), data, SignedGrid(4), "gptq", "none")
    x = np.concatenate([feed["x"].reshape(-1, HIDDEN) for feed in FEEDS]).astype(np.float64)
    inner = x
    for index, (node, layer) in enumerate(layers.items()):
        read = rounded_input(x if index % 2 == 0 else np.tanh(inner))
        weight = np.ascontiguousarray(layer.weight.numpy().T)
        hessian = (read.T @ read / len(read)).astype(np.float32)
        expected = quantize(weight, SignedGrid(4), weight.shape[1], "gptq", hessian=hessian)
        assert (found[node].weight.codes == expected.codes).mean() > 0.98
        assert not found[node].shift.any()
        made = read @ found[node].numbers().T
        if index % 2 == 0:
            inner = made
        else:
            x = x + made


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_the_original_runs_only_where_it_is_asked_about(correction: Correction) -> None:
    model, data = residual(3), Watched()
    layers = layers_of(model)
    round_layers(model, layers, dict.fromkeys(layers, SCALE), data, SignedGrid(8), "gptq", correction)
    (twin,) = data.models
    products = sum(node.op_type == "MatMul" for node in twin.graph)
    # Behind the last layer's input nothing is needed.
    assert products == len(layers) - 1 if correction == "none" else products == 2 * (len(layers) - 1)


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_only_what_reads_the_input_runs_twice(correction: Correction) -> None:
    model, data = residual(3), Watched()
    layers = layers_of(model)
    round_layers(model, layers, dict.fromkeys(layers, SCALE), data, SignedGrid(8), "gptq", correction)
    assert data.said.count("calibrating") == len(layers) * len(FEEDS)
    assert data.said.count("calibrating again") == len(FEEDS)


def test_layers_that_read_one_value_share_what_is_asked_of_it() -> None:
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(size=(HIDDEN, 12)).astype(np.float32) for name in "ab"}
    text = f"g (float[n, t, {HIDDEN}] x) => (float[n, t, 12] y) {{ p = MatMul(x, a) q = MatMul(x, b) y = Add(p, q) }}"
    model, data = parse(text, weights), Watched()
    layers = layers_of(model)
    found = round_layers(model, layers, dict.fromkeys(layers, SCALE), data, SignedGrid(8), "gptq", "none")
    assert len(found) == 2
    assert data.said == ["calibrating"] * len(FEEDS)
