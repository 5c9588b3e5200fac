"""The accuracy level of a product: what rounding its inputs loses, beside what the weight lost."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from exactness import parse_weighted
from fake_profiles import fake
from smollm2_layers import calibration, first_layers
from smollm2_matrices import matrices

from graphopt.analysis.profile import Profile
from graphopt.calibration.data import ArrayDataset
from graphopt.calibration.extreme_rows import ExtremeRows
from graphopt.graph.edits import sort
from graphopt.pass_manager import PassManager
from graphopt.passes.quantize.activation_level import (
    CHOICE,
    SMALL,
    ActivationErrors,
    activation_errors,
    fastest_inputs,
    rounded_inputs,
    some_rows,
)
from graphopt.passes.quantize.quantize_weights import QuantizeWeights
from graphopt.passes.quantize.setting import Setting
from graphopt.runtime_ops.memory_session import make_session

HEAD = '<ir_version: 10, opset_import: ["": 21]>\n'
ONE = HEAD + "g (float[batch, 64] x) => (float[batch, 48] y) <float[64, 48] w> { z = MatMul(x, w)  y = Abs(z) }"
BAD, GOOD = ActivationErrors(0.2, 0.01), ActivationErrors(0.02, 0.01)


def data(outlier: float) -> ArrayDataset:
    """A few samples, in the first row of each a number that stands out in all blocks."""
    rng = np.random.default_rng(5)
    samples = []
    for _ in range(4):
        x = rng.standard_normal((300, 64)).astype(np.float32)
        x[0, ::32] = outlier
        samples.append({"x": x})
    return ArrayDataset(samples)


def quiet() -> ir.Model:
    """A product that reads hardly anything where the numbers stand out."""
    model = parse_weighted(ONE)
    weight = model.graph.initializers["w"].const_value
    assert weight is not None
    array = weight.numpy().copy()
    array[::32] *= 1e-4
    model.graph.initializers["w"].const_value = ir.tensor(array, name="w")
    return model


def quantized(model: ir.Model, outlier: float, profile: Profile | None = None, **options: object) -> QuantizeWeights:
    pass_ = QuantizeWeights(rounding="gptq", **options)  # type: ignore[arg-type]
    PassManager([pass_], calibration=data(outlier), profile=profile, verify="none")(model)
    sort(model)
    return pass_


def levels(model: ir.Model) -> list[int]:
    return [node.attributes["accuracy_level"].as_int() for node in model.graph if node.op_type == "MatMulNBits"]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [16, 32, 64])
def test_the_rounding_is_that_of_the_operator(bits: int, block: int) -> None:
    model = parse_weighted(ONE)
    weight = np.ascontiguousarray(model.graph.initializers["w"].const_value.numpy().T)
    expected = Setting(bits, block).round(weight).weight.dequantized()
    PassManager([QuantizeWeights(bits=bits, group_size=block, level=4)], verify="none")(model)
    x = np.random.default_rng(3).standard_normal((7, 64)).astype(np.float32)
    y = make_session(model).run(None, {"x": x})[0]
    rounded, exact = np.abs(rounded_inputs(x, block) @ expected.T), np.abs(x @ expected.T)
    assert np.linalg.norm(y - rounded) < 0.1 * np.linalg.norm(y - exact)


@pytest.mark.parametrize(("bits", "used"), [(4, {0}), (8, {4})])
def test_what_8_bits_lose_is_seen_in_the_rows_that_a_sample_lacks(bits: int, used: set[int]) -> None:
    first = data(3000.0)
    x = next(iter(first.feeds(quiet())))["x"]
    error = {}
    for level in (4, "auto"):
        model = quiet()
        pass_ = quantized(model, 3000.0, bits=bits, level=level)
        before, after = (make_session(one).run(None, {"x": x})[0][0] for one in (quiet(), model))
        error[level] = np.linalg.norm(after - before) / np.linalg.norm(before)
    assert set(levels(model)) == used
    assert error["auto"] < error[4] / 4
    (detail,) = [site.detail for site in pass_.sites if site.outcome == "applied"]
    assert "8 bits would lose" in detail
    assert "inputs in 8 bits twice" in detail or "inputs in float32" in detail


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_8_bits_stay_where_nothing_stands_out(bits: int) -> None:
    model = parse_weighted(ONE)
    pass_ = quantized(model, 1.0, bits=bits)
    assert levels(model) == [4]
    assert all("inputs" not in site.detail for site in pass_.sites)


def test_a_level_that_was_asked_for() -> None:
    model = quiet()
    quantized(model, 3000.0, level=4)
    assert levels(model) == [4]
    model = parse_weighted(ONE)
    PassManager([QuantizeWeights(level=0)], verify="none")(model)
    assert levels(model) == [0]
    with pytest.raises(ValueError, match="level is auto, 4 or 0"):
        QuantizeWeights(level=2)


def test_the_fastest_that_is_accurate_enough() -> None:
    slow, fast = (fake(CHOICE, ratio, alternative="float32") for ratio in (2.0, 0.8))
    twice = fake(CHOICE, 0.8, alternative="int8x2")
    assert fastest_inputs(None, 4, True, 512, None) == "int8"
    assert fastest_inputs(GOOD, 4, True, 512, slow) == "int8"
    assert fastest_inputs(GOOD, 4, True, 512, fast) == "float32"
    assert fastest_inputs(None, 4, True, 512, fast) == "float32"
    assert fastest_inputs(GOOD, 8, True, 512, fast) == "int8"
    assert fastest_inputs(BAD, 4, True, 512, None) == "float32"
    assert fastest_inputs(BAD, 8, True, 512, None) == "int8x2"
    # Without a kernel for another level 8 bits stay, whatever they lose.
    assert fastest_inputs(BAD, 8, False, 512, None) == "int8"
    assert fastest_inputs(BAD, 2, True, 512, twice) == "int8"


def test_extreme_rows() -> None:
    rng = np.random.default_rng(0)
    whole = rng.standard_normal((1000, 24)).astype(np.float32)
    at = [3, 400, 401, 999]
    whole[at, [0, 5, 7, 23]] = [50, -70, 60, 55]
    whole[17] = 0
    found = ExtremeRows(4).accumulator()
    for start in range(0, 1000, 300):
        found.add(whole[start : start + 300])
    np.testing.assert_array_equal(found.summary()["rows"], whole[at])
    few = ExtremeRows(16).accumulator()
    few.add(whole[:5])
    np.testing.assert_array_equal(few.summary()["rows"], whole[:5])


@pytest.mark.real
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_8_bits_lose_little_beside_few_bits_of_real_weights(bits: int) -> None:
    rng = np.random.default_rng(bits)
    weight = matrices()["down"]
    rounded = Setting(bits, 32).round(weight).weight
    x = rng.standard_normal((32, weight.shape[1])).astype(np.float32)
    sink = x[:1].copy()
    sink[0, 300] = 3000.0
    numbers = some_rows(rounded, 4).dequantized()
    np.testing.assert_array_equal(numbers, rounded.dequantized()[::4])
    plain = activation_errors(x, weight[::4], numbers, 32)
    assert plain.acceptable
    assert plain.inputs < SMALL
    # A number that stands out spoils its own block alone, and drowns it.
    assert activation_errors(sink, weight[::4], numbers, 32).acceptable
    # All else is lost where the outputs don't read it.
    deaf = weight[::4].copy()
    deaf[:, 300] = 0
    lost = np.abs(rounded_inputs(sink, 32) - sink)
    assert lost[0, 288:320].max() > 1
    assert lost[0, :288].max() < 0.05
    assert not activation_errors(sink, deaf, deaf, 32).acceptable


@pytest.mark.real
def test_real_layers_keep_level_4_at_4_bits() -> None:
    model = first_layers(1)
    pass_ = QuantizeWeights(group_size=32, rounding="gptq")
    PassManager([pass_], calibration=calibration(), verify="none")(model)
    assert set(levels(model)) == {4}
