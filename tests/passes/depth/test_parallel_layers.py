"""parallel-layers: lanes that read one input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from tied_models import ALL, DECODERS, assert_same, given, made
from tiny_decoders import decoder
from zeroed import outputs, units_of, zero

import graphopt
import graphopt.pass_manager
import graphopt.recipe
from graphopt.calibration.calibration import Calibration
from graphopt.calibration.data import ArrayDataset
from graphopt.errors import UsageError
from graphopt.graph.save import save
from graphopt.passes.depth.lanes import switched
from graphopt.passes.depth.parallel_layers import ParallelLayers

PRE = [name for name in ALL if name != "bert"]


@pytest.mark.export
@pytest.mark.parametrize("name", PRE)
def test_behind_a_layer_that_adds_nothing_nothing_changes(name: str, tmp_path: Path) -> None:
    model = made(name)
    zero(model, ["0"])
    side = model.clone()
    step = ParallelLayers(groups=[[0, 1]])
    assert step(side).modified
    save(side, tmp_path / "side.onnx")
    onnx.checker.check_model(tmp_path / "side.onnx")
    assert [v.name for v in side.graph.inputs] == [v.name for v in model.graph.inputs]
    assert_same(outputs(side, given(name)), outputs(model, given(name)))
    assert step.groups == ([["attention+mlp.0", "attention+mlp.1"]] if name == "neox" else [["0", "1"]])


@pytest.mark.export
@pytest.mark.parametrize("name", [n for n in PRE if n != "neox"])
def test_behind_an_attention_that_adds_nothing_its_mlp_stays(name: str) -> None:
    model = made(name)
    zero(model, ["attention.1"])
    side = model.clone()
    assert ParallelLayers(groups=[["mlp.1", "attention.1"]])(side).modified
    assert_same(outputs(side, given(name)), outputs(model, given(name)))


@pytest.mark.export
@pytest.mark.parametrize("name", ["llama", "gpt2", "vit", "neox"])
def test_parallel_layers_add_what_each_adds_alone(name: str) -> None:
    """x + f₁(x) + f₂(x), each f told by the model without the other layer."""
    model = made(name)
    final = units_of(model).units[-1].branch.add
    last = max(unit.layer for unit in units_of(model).units)
    zero(model, [str(last)] if last > 1 else [])

    def stream(silent: list[str], side: bool) -> np.ndarray:
        one = model.clone()
        zero(one, silent)
        if side:
            ParallelLayers(groups=[[0, 1]])(one)
        total = next(node for node in one.graph if node.name == final.name).outputs[0]
        one.graph.outputs[:] = [total]
        return next(iter(outputs(one, given(name)).values()))

    start = stream(["0", "1"], side=False)
    alone = [stream([layer], side=False) for layer in ("0", "1")]
    together = stream([], side=True)
    np.testing.assert_allclose(together - start, (alone[0] - start) + (alone[1] - start), rtol=1e-3, atol=2e-4)


@pytest.mark.export
def test_switches_are_what_the_pass_does() -> None:
    model = made("llama")
    lanes = units_of(model).layers
    laned = switched(model, lanes)
    arrays = given("llama")
    assert_same(outputs(laned.model, arrays), outputs(model, arrays), 0)
    for joined, groups in (([1], [[0, 1]]), ([2], [[1, 2]]), ([1, 2], [[0, 1, 2]])):
        one = laned.model.clone()
        for name in laned.joined(joined):
            one.graph.initializers[name].const_value = ir.tensor(np.asarray(True), name=name)
        side = model.clone()
        ParallelLayers(groups=groups)(side)  # type: ignore[arg-type]
        assert_same(outputs(one, arrays), outputs(side, arrays))


@pytest.mark.export
@pytest.mark.parametrize(("granularity", "expected"), [("layer", [["0", "1"]]), ("branch", [["attention.1", "mlp.1"]])])
def test_the_group_that_loses_nothing_is_found(granularity: str, expected: list[list[str]]) -> None:
    model = made("llama")
    zero(model, ["0"] if granularity == "layer" else ["attention.1"])
    step = ParallelLayers(granularity=granularity, first=0, last=-1, samples=1)  # type: ignore[arg-type]
    step.calibration = Calibration(ArrayDataset([given("llama")]), threads=1)
    before = outputs(model, given("llama"))
    assert step(model).modified
    assert step.groups == expected
    assert step.option_values()["expected_divergence"] == pytest.approx(0, abs=1e-6)
    assert len(step.scores) == (2 if granularity == "layer" else 3)
    assert_same(outputs(model, given("llama")), before)


@pytest.mark.export
def test_a_decoder_with_parallel_layers_generates(tmp_path: Path) -> None:
    model = made("llama")
    zero(model, ["0"])
    save(model, tmp_path / "row.onnx")
    ParallelLayers(groups=[[0, 1, 2]])(model)
    zero(model, ["1"])
    save(model, tmp_path / "side.onnx")
    for file in ("row", "side"):
        tokens = graphopt.Generator(tmp_path / f"{file}.onnx", threads=1).generate([[5, 6, 7]], max_new_tokens=5)
        assert len(next(iter(tokens))) == 5


@pytest.mark.export
def test_layers_whose_sums_are_normalised_stay_in_a_row() -> None:
    model = made("bert")
    with pytest.raises(UsageError, match=r"the sum of .* is normalised"):
        ParallelLayers(groups=[[0, 1]])(model)
    step = ParallelLayers(first=0, last=-1)
    step.calibration = Calibration(ArrayDataset([given("bert")]), threads=1)
    assert not step(model).modified
    assert len(step.sites) == 2
    assert {site.outcome for site in step.sites} == {"left"}


@pytest.mark.export
def test_equal_norms_let_products_of_a_layer_be_joined() -> None:
    model = made("llama")
    ParallelLayers(groups=[["attention.1", "mlp.1"]])(model)
    before = outputs(model, given("llama"))
    report = graphopt.pass_manager.PassManager(graphopt.recipe.load("fold-norms").passes(), verify="none")(model)
    assert report.records
    readers = max(
        len([user for user, _ in node.outputs[0].uses() if user.op_type == "MatMul"])
        for node in model.graph
        if "Norm" in node.op_type
    )
    assert readers == 5
    assert_same(outputs(model, given("llama")), before, 1e-4)


def test_wrong_options_are_told() -> None:
    for options, message in (
        ({"granularity": "head"}, "granularity is one of"),
        ({"size": 1}, "size 2"),
        ({"count": 0}, "at least 1"),
        ({"groups": [[1]]}, "two names"),
    ):
        with pytest.raises(ValueError, match=message):
            ParallelLayers(**options)  # type: ignore[arg-type]
    model = ir.from_proto(decoder("attention", layers=3))
    for groups, message in (
        ([[0, 9]], "no branch '9'"),
        ([[0, 2]], "something stands between"),
        ([[0, 1], [1, 2]], "stands in two lanes"),
    ):
        with pytest.raises(UsageError, match=message):
            ParallelLayers(groups=groups)(model.clone())  # type: ignore[arg-type]


def test_decoders_are_many() -> None:
    assert len({*DECODERS, *PRE} - {"llama"}) >= 8
