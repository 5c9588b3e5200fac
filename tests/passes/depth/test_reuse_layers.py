"""reuse-layers: a layer with the weights of another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from tied_models import ALL, assert_same, given, made, weight_bytes
from tiny_decoders import decoder
from zeroed import outputs, units_of

import graphopt
from graphopt.analysis.linear_sites import linear_sites
from graphopt.calibration.calibration import Calibration
from graphopt.calibration.data import ArrayDataset
from graphopt.errors import UsageError
from graphopt.graph.save import save
from graphopt.passes.clean.deduplicate_initializers import DeduplicateInitializers
from graphopt.passes.depth.corresponding import corresponding
from graphopt.passes.depth.reuse_layers import ReuseLayers


def copied(model: ir.Model, layer: int, donor: int, *, norms: bool) -> None:
    """Write the weights of one layer over those of another, which keeps a copy of its own."""
    layers = units_of(model).layers
    for place in corresponding(layers[layer], layers[donor]):
        if norms or not place.norm:
            assert place.other.const_value is not None
            array = np.array(place.other.const_value.numpy())
            place.own.const_value = ir.tensor(array, name=place.own.name)


@pytest.mark.export
@pytest.mark.parametrize("name", ALL)
def test_a_layer_equal_to_its_donor_is_stored_once(name: str, tmp_path: Path) -> None:
    model = made(name)
    before = weight_bytes(model)
    units = units_of(model).layers[1]
    copied(model, 1, 0, norms=True)
    expected = outputs(model, given(name))
    tied = model.clone()
    step = ReuseLayers(pairs={1: 0}, norms="shared")
    assert step(tied).modified
    assert_same(outputs(tied, given(name)), expected, 0)
    own = sum(unit.bytes for unit in units)
    assert before - weight_bytes(tied) == step.saved
    # What isn't saved is what both layers read already.
    assert own * 0.95 < step.saved <= own + sum(_norm_bytes(unit.norm) for unit in units)
    save(tied, tmp_path / "tied.onnx")
    onnx.checker.check_model(tmp_path / "tied.onnx")
    assert [v.name for v in tied.graph.inputs] == [v.name for v in model.graph.inputs]
    assert list(outputs(tied, given(name))) == list(expected)
    # As much as finding equal weights would give.
    DeduplicateInitializers()(model)
    assert weight_bytes(tied) - weight_bytes(model) < 64


def _norm_bytes(norm: ir.Node | None) -> int:
    values = () if norm is None else norm.inputs[1:]
    return sum(v.const_value.nbytes for v in values if v is not None and v.const_value is not None)


@pytest.mark.export
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit"])
@pytest.mark.parametrize("norms", ["own", "shared"])
def test_the_result_is_the_model_with_copied_weights(name: str, norms: str) -> None:
    model = made(name)
    tied = model.clone()
    ReuseLayers(pairs={1: 2, 0: 1}, norms=norms)(tied)  # type: ignore[arg-type]
    for layer in (0, 1):
        copied(model, layer, 2, norms=norms == "shared")
    assert_same(outputs(tied, given(name)), outputs(model, given(name)), 0)


@pytest.mark.export
def test_a_model_of_two_equal_layers_is_halved() -> None:
    model = made("llama")
    linear = {site.weight for site in linear_sites(model, []) if site.role not in ("embed", "head")}
    ReuseLayers(pairs={1: 0, 2: 0})(model)
    left = {site.weight for site in linear_sites(model, []) if site.role not in ("embed", "head")}
    assert 3 * len(left) == len(linear)
    layers = units_of(model).layers
    assert [place.norm for place in corresponding(layers[1], layers[0])] == [True, True]


@pytest.mark.export
def test_the_pairs_that_lose_least_are_found() -> None:
    model = made("llama")
    copied(model, 2, 1, norms=False)
    whole = model.clone()
    step = ReuseLayers(samples=1)
    step.calibration = Calibration(ArrayDataset([given("llama")]), threads=1)
    assert step(model).modified
    assert step.pairs == {2: 1}
    assert step.option_values()["expected_divergence"] == pytest.approx(0, abs=1e-6)
    assert set(step.scores) == {"1: 0", "2: 1"}
    assert_same(outputs(model, given("llama")), outputs(whole, given("llama")), 0)
    # What was found can be given, and both layers then have those of the first.
    again = ReuseLayers(count=2, donors="adjacent", samples=1)
    again.calibration = step.calibration
    again(whole)
    assert again.pairs is not None
    assert len(again.pairs) == 2
    assert len(set(again.pairs.values())) == 1
    # One layer must keep its weights.
    every = ReuseLayers(count=3, donors="adjacent", samples=1)
    every.calibration = step.calibration
    with pytest.raises(UsageError, match="others that keep theirs"):
        every(made("llama"))


@pytest.mark.export
def test_a_decoder_of_one_layers_weights_generates(tmp_path: Path) -> None:
    model = made("llama")
    copied(model, 1, 0, norms=False)
    copied(model, 2, 0, norms=False)
    save(model, tmp_path / "whole.onnx")
    ReuseLayers(pairs={1: 0, 2: 0})(model)
    save(model, tmp_path / "tied.onnx")
    size = {file: (tmp_path / f"{file}.onnx").stat().st_size for file in ("whole", "tied")}
    assert size["tied"] < 0.6 * size["whole"]
    texts = [
        graphopt.Generator(tmp_path / f"{file}.onnx", threads=1).generate([[5, 6, 7]], max_new_tokens=6)
        for file in ("whole", "tied")
    ]
    assert texts[0] == texts[1]


@pytest.mark.export
def test_layers_of_another_form_are_told() -> None:
    model = made("whisper")
    with pytest.raises(UsageError, match="other branches"):
        ReuseLayers(pairs={3: 0})(model)
    step = ReuseLayers(samples=1)
    step.calibration = Calibration(ArrayDataset([given("whisper")]), threads=1)
    step(model)
    assert [site.detail for site in step.sites if site.outcome == "left"] == [
        "layer 3 keeps its weights: the layers have other branches"
    ]


def test_wrong_options_are_told() -> None:
    for options, message in (
        ({"donors": "all"}, "donors is one of"),
        ({"norms": "none"}, "norms is one of"),
        ({"count": 0}, "at least 1"),
        ({"pairs": {"a": 1}}, "such as {7: 6}"),
        ({"pairs": [1]}, "such as {7: 6}"),
    ):
        with pytest.raises(ValueError, match=message):
            ReuseLayers(**options)  # type: ignore[arg-type]
    model = ir.from_proto(decoder("attention", layers=2))
    for pairs, message in (({0: 1, 1: 0}, "its own weights again"), ({5: 0}, "no layer 5"), ({0: 0}, "own weights")):
        with pytest.raises(UsageError, match=message):
            ReuseLayers(pairs=pairs)(model.clone())  # type: ignore[arg-type]
