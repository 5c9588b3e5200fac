"""quantize-static: convolutions and products on 8-bit codes, with ranges found on calibration data."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from exactness import op_types, parse_weighted
from hypothesis import given, settings
from hypothesis import strategies as st

import graphopt
from graphopt.errors import InputDataError, UsageError
from graphopt.graph.edits import sort
from graphopt.models import catalogue
from graphopt.pass_manager import PassManager
from graphopt.passes.quantize.region_scales import outward
from graphopt.passes.quantize.static import QuantizeStatic
from graphopt.passes.quantize.value_ranges import ValueRange, seen
from graphopt.recipe import load
from graphopt.runtime_ops.memory_session import make_session, run
from graphopt.verification.structure import check_structure

HEAD = '<ir_version: 10, opset_import: ["": 21]>'
CONV = "<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>"
BLOCK = f"""{HEAD} g (float[n, 8, h, w] x) => (float[n, 8, h, w] y)
<float[16, 8, 3, 3] w1, float[16] b1, float[16, 16, 3, 3] w2, float[16] b2, float[8, 16, 3, 3] w3> {{
  c1 = Conv {CONV} (x, w1, b1)
  r1 = Relu(c1)
  c2 = Conv {CONV} (r1, w2, b2)
  s = Add(c2, r1)
  r2 = Relu(s)
  y = Conv {CONV} (r2, w3)
}}"""


def images(*shape: int, count: int = 4, seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.normal(size=shape).astype(np.float32)} for _ in range(count)]


def written(before: ir.Model, samples: Any, **options: Any) -> tuple[ir.Model, QuantizeStatic]:
    after = before.clone()
    rule = QuantizeStatic(**{"keep_last": False, **options})
    rule.calibration = samples
    assert rule(after).modified
    sort(after)
    assert check_structure(after) == []
    return after, rule


def error(before: ir.Model, after: ir.Model, feeds: dict[str, Any]) -> float:
    """The largest relative error of an output's norm."""
    found = [run(make_session(model, threads=1), feeds) for model in (before, after)]
    return max(float(np.linalg.norm(b - a) / np.linalg.norm(a)) for a, b in zip(*found, strict=True))


def fused(model: ir.Model, folder: Any) -> list[str]:
    """The operators that ONNX Runtime runs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "run.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    return [node.op_type for node in onnx.load(folder / "run.onnx").graph.node]


def test_a_block_of_convolutions(tmp_path: Any) -> None:
    before = parse_weighted(BLOCK)
    data = images(2, 8, 9, 7)
    after, rule = written(before, data)
    # Both Relus became the ranges of codes; every convolution and the addition run on integers.
    assert "Relu" not in op_types(after)
    run_by = fused(after, tmp_path)
    assert run_by.count("QLinearConv") == 3
    assert run_by.count("QLinearAdd") == 1
    assert error(before, after, images(3, 8, 5, 11, seed=9)[0]) < 0.05
    assert {s.op_type: s.outcome for s in rule.sites} == {"Conv": "applied", "Add": "applied"}
    assert [v.name for v in after.graph.outputs] == ["y"]
    weights = [v.const_value for v in after.graph.initializers.values() if v.const_value.dtype == ir.DataType.INT8]
    assert sorted(tuple(t.shape.numpy()) for t in weights if len(t.shape) == 4) == [
        (8, 16, 3, 3), (16, 8, 3, 3), (16, 16, 3, 3)
    ]  # fmt: skip
    assert not any(v.const_value.size > 16 for v in after.graph.initializers.values()
                   if v.const_value.dtype == ir.DataType.FLOAT)  # fmt: skip


def test_the_last_convolution_stays() -> None:
    before = parse_weighted(BLOCK)
    after, rule = written(before, images(1, 8, 8, 8), keep_last=True)
    assert [s.detail for s in rule.sites if s.outcome == "left"] == [
        "it is one of the last layers, and keep_last is set"
    ]
    assert error(before, after, images(1, 8, 8, 8, seed=5)[0]) < 0.05


def test_a_layer_that_stays_in_floats_is_left_so_by_the_runtime(tmp_path: Any) -> None:
    before = parse_weighted(BLOCK)
    before.graph.node("Conv_1" if any(n.name == "Conv_1" for n in before.graph) else 2).name = "second"
    after, _ = written(before, images(1, 8, 9, 7), exclude=["second"])
    run_by = fused(after, tmp_path)
    assert run_by.count("QLinearConv") == 2
    assert sum(name.endswith("Conv") for name in run_by) == 3


def test_the_layer_that_costs_most_stays_in_floats() -> None:
    layers = "\n".join(f"c{i + 1} = Conv {CONV} (c{i}, w{i})" for i in range(9))
    weights = ", ".join(f"float[8, 8, 3, 3] w{i}" for i in range(9))
    before = parse_weighted(f"""{HEAD} g (float[n, 8, h, w] c0) => (float[n, 8, h, w] c9) <{weights}> {{ {layers} }}""")
    for i in range(9):
        weight = before.graph.initializers[f"w{i}"].const_value.numpy() / 8
        if i == 0:  # channel 0 goes to channel 0 alone, and no further
            weight[1:, 0] = 0
        if i == 1:
            weight[:, 0] = 0
        before.graph.initializers[f"w{i}"].const_value = ir.tensor(weight)
    data = [{"c0": one["x"]} for one in images(1, 8, 9, 9)]
    for one in data:
        one["c0"][0, 0, 4, 4] = 300
    after, rule = written(before, data, float_share=0.25)
    plain, _ = written(before, data, float_share=0.0)
    left = [s.detail for s in rule.sites if s.outcome == "left"]
    assert left
    assert all("less than half" in detail for detail in left)
    assert error(before, after, data[1]) < 0.5 * error(before, plain, data[1])


def test_codes_move_through_pooling_and_reshapes(tmp_path: Any) -> None:
    before = parse_weighted(f"""{HEAD} g (float[n, 8, 12, 12] x) => (float[n, 10] y)
    <float[16, 8, 3, 3] w1, float[16, 16, 3, 3] w2, float[144, 10] w3, float[10] c,
     int64[2] to = {{0, -1}}, int64[2] halves = {{8, 8}}> {{
      c1 = Conv {CONV} (x, w1)
      g1, g2 = Split <axis = 1> (c1, halves)
      g = Concat <axis = 1> (g2, g1)
      p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (g)
      c2 = Conv {CONV} (p, w2)
      m = Clip(c2)
      q = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (m)
      f = Reshape(q, to)
      y = Gemm(f, w3, c)
    }}""")
    after, rule = written(before, images(2, 8, 12, 12))
    assert error(before, after, images(1, 8, 12, 12, seed=3)[0]) < 0.05
    assert {s.op_type for s in rule.sites if s.outcome == "applied"} >= {"Split", "Concat", "MaxPool", "Reshape"}
    assert "MatMulIntegerToFloat" in op_types(after)
    assert "QLinearConcat" in fused(after, tmp_path)


def test_products_keep_floats_as_results() -> None:
    before = parse_weighted(f"""{HEAD} g (float[b, s, 64] x) => (float[b, s, 48] y)
    <float[64, 80] w, float[80] c, float[80, 48] w2> {{
      p = MatMul(x, w)
      q = Add(c, p)
      h = Gelu(q)
      y = MatMul(h, w2)
    }}""")
    after, _ = written(before, images(2, 6, 64))
    assert op_types(after).count("MatMulIntegerToFloat") == 2
    assert "Add" not in op_types(after)
    assert error(before, after, images(1, 9, 64, seed=4)[0]) < 0.05


def test_a_swish_between_convolutions(tmp_path: Any) -> None:
    before = parse_weighted(f"""{HEAD} g (float[n, 8, h, w] x) => (float[n, 8, h, w] y)
    <float[16, 8, 3, 3] w1, float[8, 16, 3, 3] w2> {{
      c = Conv {CONV} (x, w1)
      s = Sigmoid(c)
      m = Mul(c, s)
      y = Conv {CONV} (m, w2)
    }}""")
    after, _ = written(before, images(1, 8, 10, 10))
    assert {"QLinearSigmoid", "QLinearMul"} <= set(fused(after, tmp_path))
    assert error(before, after, images(1, 8, 10, 10, seed=8)[0]) < 0.05


def test_the_last_digits_of_activations_change_nothing() -> None:
    before = parse_weighted(f"""{HEAD} g (float[n, 8, h, w] x) => (float[n, 8, h, w] y)
    <float[16, 8, 3, 3] w1, float[8, 16, 3, 3] w2> {{
      c = Conv {CONV} (x, w1)
      s = Sigmoid(c)
      m = Mul(c, s)
      y = Conv {CONV} (m, w2)
    }}""")
    data = images(1, 8, 10, 10)
    moved = [{"x": one["x"] * np.float32(1 + 2e-6)} for one in data]
    first, second = (written(before, samples)[0] for samples in (data, moved))
    assert not np.array_equal(data[0]["x"], moved[0]["x"])
    assert ir.to_proto(first).SerializeToString() == ir.to_proto(second).SerializeToString()


@pytest.mark.parametrize("second", ["LeakyRelu(d)", "Relu(d)", "Sigmoid(d)"])
def test_what_a_concat_alone_reads_has_its_scale(second: str) -> None:
    before = parse_weighted(f"""{HEAD} g (float[n, 8, h, w] x) => (float[n, 8, h, w] y)
    <float[8, 8, 3, 3] w1, float[8, 8, 3, 3] w2, float[8, 8, 3, 3] w3, float[8, 24, 3, 3] w4> {{
      a = Conv {CONV} (x, w1)
      b = Conv {CONV} (a, w2)
      d = Conv {CONV} (a, w3)
      e = {second}
      z = Concat <axis = 1> (a, b, e)
      y = Conv {CONV} (z, w4)
    }}""")
    for name, factor in {"w1": 1 / 30, "w2": 1 / 6, "w3": 1 / 6}.items():  # inputs of the Concat of about the same size
        weight = before.graph.initializers[name].const_value
        before.graph.initializers[name].const_value = ir.tensor(weight.numpy() * np.float32(factor))
    after, _ = written(before, images(1, 8, 9, 9))
    (concat,) = [node for node in after.graph if node.op_type == "Concat"]
    (whole,) = [use.node for use in concat.outputs[0].uses()]

    def scale(node: Any) -> tuple[float, int]:
        return tuple(v.const_value.numpy().item() for v in node.inputs[1:])  # type: ignore[return-value]

    a, b, e = (scale(value.producer()) for value in concat.inputs)
    # Two layers read the first one too; a gate has steps of its own, and codes below 0 would let through what a Relu
    # doesn't.
    assert b == scale(whole)
    assert a != scale(whole)
    assert (e == scale(whole)) == (second == "LeakyRelu(d)")
    assert error(before, after, images(2, 8, 9, 9, seed=3)[0]) < 0.05


@pytest.mark.parametrize("far", [0.0, -500.0])
def test_what_a_swish_makes_zero_takes_no_steps(far: float) -> None:
    before = parse_weighted(f"""{HEAD} g (float[n, 4, h, w] c) => (float[n, 8, h, w] y)
    <float[4, 4, 1, 1] w1, float[4] b, float[8, 4, 3, 3] w2> {{
      p = Conv <kernel_shape = [1, 1]> (c, w1, b)
      s = Sigmoid(p)
      m = Mul(p, s)
      y = Conv {CONV} (m, w2)
    }}""")
    before.graph.initializers["w1"].const_value = ir.tensor(np.eye(4, dtype=np.float32).reshape(4, 4, 1, 1))
    before.graph.initializers["b"].const_value = ir.tensor(np.array([0, 0, 0, far], np.float32))
    data = [{"c": one["x"]} for one in images(1, 4, 12, 12)]
    after, _ = written(before, data, min_weights=1)
    assert error(before, after, data[1]) < 0.03


@given(st.floats(-1e30, 1e30, allow_subnormal=False))
def test_ends_of_ranges(end: float) -> None:
    found = outward(end)
    assert abs(end) <= abs(found) <= abs(end) * (1 + 2.0**-6)
    assert found * end >= 0
    assert outward(found) == found


MASKED = f"""{HEAD} g (float[n, 8, h, w] x, float[n, 1, h, w] mask) => (float[n, 8, h, w] y)
<float[8, 8, 3, 3] w1, float[8, 8, 3, 3] w2> {{
  c = Conv {CONV} (x, w1)
  %s
  y = Conv {CONV} (%s, w2)
}}"""


@pytest.mark.parametrize("hidden", [-np.inf, np.float32(-3e38), np.float32(-1e36)])
def test_masks_are_refused(hidden: float) -> None:
    before = parse_weighted(MASKED % ("m = Add(c, mask)\n  z = Relu(m)", "z"))
    data = images(1, 8, 6, 6)
    for one in data:
        one["mask"] = np.where(np.arange(36).reshape(1, 1, 6, 6) % 5 == 0, hidden, 0).astype(np.float32)
    after, rule = written(before, data)
    assert "Add" in op_types(after)
    reasons = [s.detail for s in rule.sites if s.op_type == "Add"]
    assert len(reasons) == 1
    assert "mask's constant" in reasons[0]
    assert error(before, after, data[0]) < 0.05


def test_a_mask_that_hid_nothing_in_the_data_is_refused() -> None:
    """A scale by which only 0 was seen would take a mask's constant for 0."""
    before = parse_weighted(MASKED % ("m = Add(c, mask)\n  z = Relu(m)", "z"))
    data = images(1, 8, 6, 6)
    for one in data:
        one["mask"] = np.zeros((1, 1, 6, 6), np.float32)
    after, rule = written(before, data)
    assert [s.detail for s in rule.sites if s.op_type == "Add"] == [
        "of 'mask' only 0 was seen, which says nothing of its range"
    ]
    hiding = np.where(np.arange(36).reshape(1, 1, 6, 6) % 5 == 0, -1e4, 0).astype(np.float32)
    assert error(before, after, {**data[0], "mask": hiding}) < 0.05


def test_a_concat_of_scores_and_coordinates_is_refused() -> None:
    between = f"""k = Constant <value_float = 0.01> ()
      d = Conv {CONV} (x, w1)
      f = Mul(d, k)
      z = Concat <axis = 1> (f, c)"""
    before = parse_weighted(MASKED.replace("float[8, 8, 3, 3] w2", "float[8, 16, 3, 3] w2") % (between, "z"))
    data = images(1, 8, 6, 6)
    for one in data:
        one["mask"] = np.zeros((1, 1, 6, 6), np.float32)
    _, rule = written(before, data)
    (reason,) = [s.detail for s in rule.sites if s.op_type == "Concat"]
    assert "of the 255 steps" in reason


@pytest.mark.parametrize(
    ("weight", "attributes", "channels", "reason"),
    [
        ("float[64, 2, 3, 3]", "", 2, "of 2 channels"),
        ("float[16, 4, 3, 3]", "group = 2, ", 8, "with 2 groups"),
        ("float[8, 8, 1, 1]", "", 8, "64 numbers"),
    ],
)
def test_left_with_the_reason(weight: str, attributes: str, channels: int, reason: str) -> None:
    kernel = weight[-2]
    before = parse_weighted(f"""{HEAD} g (float[1, {channels}, 6, 6] x) => (float[n, m, h, w] y)
    <{weight} w> {{ y = Conv <{attributes}kernel_shape = [{kernel}, {kernel}]> (x, w) }}""")
    rule = QuantizeStatic(keep_last=False)
    rule.calibration = images(1, channels, 6, 6)  # type: ignore[assignment]
    assert not rule(before).modified
    assert [reason in s.detail for s in rule.sites] == [True]


def test_depthwise_and_one_dimension() -> None:
    before = parse_weighted(f"""{HEAD} g (float[n, 32, t] x) => (float[n, 16, u] y)
    <float[32, 1, 9] w1, float[32] b, float[16, 32, 1] w2> {{
      c = Conv <kernel_shape = [9], group = 32, pads = [4, 4]> (x, w1, b)
      y = Conv <kernel_shape = [1]> (c, w2)
    }}""")
    after, _ = written(before, images(1, 32, 21))
    assert "QuantizeLinear" in op_types(after)
    assert error(before, after, images(2, 32, 17, seed=3)[0]) < 0.05


def test_what_gptq_does_not_see_as_rows_is_rounded_to_nearest() -> None:
    before = parse_weighted(f"""{HEAD} g (float[n, 32, h, w] x) => (float[n, 16, h, w] y)
    <float[32, 1, 3, 3] w1, float[16, 32, 3, 3] w2> {{
      c = Conv <kernel_shape = [3, 3], group = 32, pads = [1, 1, 1, 1]> (x, w1)
      y = Conv {CONV} (c, w2)
    }}""")
    after, rule = written(before, images(1, 32, 9, 9), rounding="gptq")
    first, second = [site for site in rule.sites if site.op_type == "Conv"]
    assert {first.outcome, second.outcome} == {"applied"}
    assert "rounded to nearest" in first.detail
    assert "nearest" not in second.detail
    assert error(before, after, images(2, 32, 7, 7, seed=3)[0]) < 0.05


def test_a_bias_that_no_int32_holds() -> None:
    before = parse_weighted(BLOCK)
    weight = before.graph.initializers["w2"].const_value.numpy().copy()
    weight[3] *= 1e-12
    before.graph.initializers["w2"].const_value = ir.tensor(weight)
    after, _ = written(before, images(1, 8, 9, 7))
    assert error(before, after, images(1, 8, 9, 7, seed=2)[0]) < 0.05


def test_in_a_branch_and_older_opsets() -> None:
    old = parse_weighted(BLOCK.replace('"": 21', '"": 11'))
    rule = QuantizeStatic()
    assert not rule(old).modified
    assert all("needs opset 13" in s.detail for s in rule.sites)


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse", "entropy"])
def test_methods(method: str) -> None:
    before = parse_weighted(BLOCK)
    data = images(1, 8, 9, 7)
    data[0]["x"][0, 0, 0, 0] = 300  # one number in 2000
    after, _ = written(before, data, method=method, fraction=0.999)
    found = error(before, after, images(1, 8, 9, 7, seed=9)[0])
    # The squared error of that one number counts as much as all others' with "mse".
    assert found < {"minmax": 0.6, "percentile": 0.15, "mse": 0.45, "entropy": 0.45}[method]


def ranges(model: ir.Model, values: list[ir.Value], data: Any) -> dict[ir.Value, ValueRange]:
    return {value: one.range() for value, one in seen(model, values, data).items()}


def test_ranges() -> None:
    model = parse_weighted(BLOCK)
    values = {v.name: v for node in model.graph for v in node.outputs} | {"x": model.graph.inputs[0]}
    data = images(2, 8, 9, 7)
    found = ranges(model, [values["r1"], values["x"]], data)
    assert found[values["r1"]].low == 0.0
    assert found[values["x"]].high == max(float(one["x"].max()) for one in data)
    assert 30 < found[values["x"]].snr < 60
    assert found[values["x"]].excluded == 0
    data[0]["x"][0, 0, 0, :3] = [np.inf, -np.inf, np.nan]
    assert ranges(model, [values["x"]], data)[values["x"]].excluded == 3
    with pytest.raises(UsageError, match="no sample"):
        ranges(model, [values["x"]], [])
    with pytest.raises(InputDataError, match="calibration data"):
        ranges(model, [values["x"]], [{"x": np.zeros((1, 3, 4, 4), np.float32)}])


def test_data_is_needed() -> None:
    with pytest.raises(UsageError, match="needs calibration data"):
        PassManager([QuantizeStatic()])


@pytest.mark.parametrize(
    "options",
    [
        {"method": "median"},
        {"weight_bits": 5},
        {"rounding": "up"},
        {"fraction": 0.1},
        {"samples": 0},
        {"float_share": 1.0},
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"method|fraction|weight_bits|rounding|samples|float_share"):
        QuantizeStatic(**options)


@given(st.integers(4, 12), st.integers(4, 12), st.integers(1, 3), st.integers(0, 2), st.integers(0, 2**31))
@settings(max_examples=12, deadline=None)
def test_any_convolution(channels: int, outputs: int, kernel: int, pad: int, seed: int) -> None:
    before = parse_weighted(
        f"""{HEAD} g (float[n, {channels}, h, w] x) => (float[n, {outputs}, p, q] y)
        <float[{outputs}, {channels}, {kernel}, {kernel}] k, float[{outputs}] b> {{
          y = Conv <kernel_shape = [{kernel}, {kernel}], pads = [{pad}, {pad}, {pad}, {pad}]> (x, k, b)
        }}""",
        seed,
    )
    data = images(2, channels, 6, 5, count=1, seed=seed)
    after, _ = written(before, data, min_weights=1)
    assert error(before, after, data[0]) < 0.04


@pytest.mark.real
def test_the_recogniser_from_its_opset_12_file() -> None:
    path = catalogue.fetch("ppocr-v4-rec")
    rng = np.random.default_rng(0)
    lines = []
    for width in (160, 320):  # dark bars on light paper
        line = np.ones((1, 3, 48, width), np.float32)
        for start in range(8, width - 8, 12):
            line[:, :, 8:40, start : start + int(rng.integers(2, 8))] = -1
        lines.append({"x": line + rng.normal(0, 0.05, line.shape).astype(np.float32)})
    exact = graphopt.optimize(path, verify="none").model
    small = graphopt.optimize(path, "int8-static", verify="none", calibration=lines).model
    sizes = [sum(v.const_value.nbytes for v in m.graph.initializers.values()) for m in (exact, small)]
    assert sizes[1] < 0.32 * sizes[0]
    first, second = (run(make_session(m, threads=1), lines[1])[0][0] for m in (exact, small))
    # The letters that it reads, and how sure it is of each.
    assert (first.argmax(1) == second.argmax(1)).mean() > 0.9
    assert np.abs(first.max(1) - second.max(1)).mean() < 0.1


def test_the_recipe() -> None:
    assert "quantize-static" in [getattr(p, "name", "") for p in load("int8-static").passes("cpu")]
