"""raise-rms-norm: the spellings, look-alikes that stay, casts, ONNX Runtime's own operator, real models."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from exactness import assert_exact, op_types, parse

from graphopt.passes.raise_.rms_norm import RaiseRmsNorm

CONSTANTS = """<float eps = {0.000001}, float two = {2.0}, float half = {0.5}, float mhalf = {-0.5}, float one = {1.0},
  float four = {4.0}, float quarter = {0.25}, float[4] g = {1.5, 0.5, -2.0, 1.0}, float[4] w = {0.5, -0.5, -3.0, 0.0},
  float[1,1,4] g3 = {1.5, 0.5, -2.0, 1.0}, float[4] b = {0.1, 0.2, -0.3, 0.4}, int64[1] last = {-1}>"""
SQUARE = "q = Pow(x, two)  v = ReduceMean(q, last)"
ROOT = "e = Add(v, eps)  s = Sqrt(e)"
RSQRT = f"{ROOT} r = Reciprocal(s)  n = Mul(x, r)"


def graph(body: str, *, opset: int = 23, x: str = "float[B, S, 4] x", y: str = "float[B, S, 4] y") -> ir.Model:
    lines = "\n".join(body.replace("  ", "\n").splitlines())
    return parse(f'<ir_version: 10, opset_import: ["" : {opset}]> g ({x}) => ({y}) {CONSTANTS} {{ {lines} }}')


def reason(body: str, **options: object) -> str:
    model = graph(body, **options)
    before = op_types(model)
    rule = RaiseRmsNorm()
    assert not rule(model).modified
    assert op_types(model) == before
    (site,) = rule.sites
    return site.detail


@pytest.mark.parametrize(
    "body",
    [
        f"{SQUARE} {RSQRT} y = Mul(n, g)",
        f"{SQUARE} {RSQRT} y = Mul(g, n)",
        f"{SQUARE} {RSQRT} y = Mul(n, g3)",
        f"q = Mul(x, x)  v = ReduceMean(q, last) {RSQRT} y = Mul(n, g)",
        f"q = Mul(x, x)  t = ReduceSum(q, last)  v = Div(t, four) {RSQRT} y = Mul(n, g)",
        f"q = Mul(x, x)  t = ReduceSum(q, last)  v = Mul(t, quarter) {RSQRT} y = Mul(n, g)",
        f"t = ReduceSumSquare(x, last)  v = Div(t, four) {RSQRT} y = Mul(n, g)",
        f"{SQUARE} {ROOT} n = Div(x, s)  y = Mul(n, g)",
        f"{SQUARE} {ROOT} r = Div(one, s)  n = Mul(x, r)  y = Mul(n, g)",
        f"{SQUARE} e = Add(eps, v)  s = Pow(e, half)  n = Div(x, s)  y = Mul(n, g)",
        f"{SQUARE} e = Add(eps, v)  r = Pow(e, mhalf)  n = Mul(r, x)  y = Mul(n, g)",
        f"{SQUARE} {ROOT} r = Reciprocal(s)  k = Mul(g, r)  y = Mul(x, k)",
        # Llama in float32: a cast back that changes nothing, before the gain or after it.
        f"{SQUARE} {RSQRT} c = Cast<to=1>(n)  y = Mul(g, c)",
        f"{SQUARE} {RSQRT} c = Mul(g, n)  y = Cast<to=1>(c)",
        # Gemma: 1 + w, not folded.
        f"p = Add(one, w) {SQUARE} {RSQRT} y = Mul(n, p)",
    ],
)
def test_spellings(body: str) -> None:
    after = assert_exact(graph(body), RaiseRmsNorm())
    kinds = [kind for kind in op_types(after) if kind != "Cast"]
    assert kinds == ["RMSNormalization"]
    node = next(n for n in after.graph if n.op_type == "RMSNormalization")
    assert node.attributes["axis"].value == -1
    assert node.attributes["epsilon"].value == pytest.approx(1e-6)
    np.testing.assert_array_equal(node.inputs[1].const_value.numpy(), np.float32([1.5, 0.5, -2.0, 1.0]))


def test_absent_gain_is_ones() -> None:
    after = assert_exact(graph(f"{SQUARE} {RSQRT}".replace("n = Mul", "y = Mul")), RaiseRmsNorm())
    np.testing.assert_array_equal(after.graph.node(0).inputs[1].const_value.numpy(), np.ones(4, np.float32))


def test_a_sum_that_follows_is_no_bias() -> None:
    after = assert_exact(graph(f"{SQUARE} {RSQRT} h = Mul(n, g)  y = Add(h, b)"), RaiseRmsNorm())
    assert op_types(after) == ["RMSNormalization", "Add"]


def test_data_dependent_gain_stays_behind() -> None:
    # Adaptive norms scale by a projection of the condition.
    model = graph(f"{SQUARE} {RSQRT} y = Mul(n, c)", x="float[B, S, 4] x, float[B, 1, 4] c")
    assert op_types(assert_exact(model, RaiseRmsNorm())) == ["RMSNormalization", "Mul"]


@pytest.mark.parametrize(
    "body",
    [
        # L2 normalization: x / max(‖x‖, ε), by ReduceL2, by LpNormalization's parts, by a sum of squares.
        "l = ReduceL2(x, last)  m = Max(l, eps)  y = Div(x, m)",
        "l = ReduceL2(x, last)  m = Clip(l, eps)  y = Div(x, m)",
        "q = Mul(x, x)  t = ReduceSum(q, last)  l = Sqrt(t)  m = Max(l, eps)  y = Div(x, m)",
        "q = Mul(x, x)  t = ReduceSum(q, last)  l = Sqrt(t)  m = Clip(l, eps)  y = Div(x, m)",
        "q = Mul(x, x)  t = ReduceSum(q, last)  e = Add(t, eps)  l = Sqrt(e)  y = Div(x, l)",
        "t = ReduceSumSquare(x, last)  e = Add(t, eps)  l = Sqrt(e)  y = Div(x, l)",
        # The root mean square as a level, divided by nothing.
        "q = Mul(x, x)  v = ReduceMean(q, last)  e = Add(v, eps)  l = Sqrt(e)  y = Add(x, l)",
    ],
)
def test_look_alikes_are_no_sites(body: str) -> None:
    model = graph(body)
    rule = RaiseRmsNorm()
    assert not rule(model).modified
    assert rule.sites == []


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (f"{SQUARE} r = Sqrt(v)  s = Add(r, eps)  y = Div(x, s)", "after the square root"),
        (f"{SQUARE} e = Max(v, eps)  s = Sqrt(e)  y = Div(x, s)", "bounded by Max"),
        (f"{SQUARE} {ROOT} y = Div(z, s)", "isn't what was squared"),
        (f"q = Pow(x, two)  v = ReduceMean<keepdims=1>(q) {ROOT} y = Div(x, s)", "aren't constant, or not given"),
    ],
)
def test_left_with_reason(body: str, why: str) -> None:
    assert why in reason(body, x="float[B, S, 4] x, float[B, S, 4] z")


def test_left_where_the_root_is_used_elsewhere() -> None:
    assert "'s' inside it is used elsewhere" in reason(
        f"{SQUARE} {ROOT} y = Div(x, s)", y="float[B, S, 4] y, float[B, S, 1] s"
    )


def test_left_below_opset_23() -> None:
    assert "needs opset 23, the model has 18: run convert-opset first" in reason(
        f"{SQUARE} {RSQRT} y = Mul(n, g)", opset=18
    )


def half(body: str) -> tuple[onnx.ModelProto, ir.Model]:
    """The graph with a half-precision gain of 64, before and after."""
    text = f"""<ir_version: 10, opset_import: ["" : 23]> g (float16[B, 64] i) => (float16[B, 64] y)
    <float eps = {{0.000001}}, float two = {{2.0}}, int64[1] last = {{-1}}> {{ {body} }}"""
    proto = onnx.parser.parse_model("\n".join(text.replace("  ", "\n").splitlines()))
    gain = np.random.default_rng(1).normal(size=64).astype(np.float16)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(gain, "g"))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(gain.astype(np.float32), "g32"))
    after = ir.from_proto(proto)
    assert RaiseRmsNorm()(after).modified
    return proto, after


@pytest.mark.parametrize(
    ("tail", "left"),
    [
        ("c = Cast<to=10>(n)  y = Mul(g, c)", ["RMSNormalization"]),  # Llama
        ("h = Mul(n, g32)  y = Cast<to=10>(h)", ["Cast", "RMSNormalization", "Cast"]),  # Gemma
    ],
)
def test_half_precision(tail: str, left: list[str]) -> None:
    ort = pytest.importorskip("onnxruntime")
    before, after = half(f"x = Cast<to=1>(i) {SQUARE} {RSQRT} {tail}")
    assert op_types(after) == left
    feed = {"i": (300 * np.random.default_rng(0).normal(size=(8, 64))).astype(np.float16)}  # its square overflows fp16
    got, expected = (
        ort.InferenceSession(p.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feed)[0].astype(float)
        for p in (ir.to_proto(after), before)
    )
    assert np.all(np.isfinite(got))
    np.testing.assert_allclose(got, expected, rtol=2e-3, atol=2e-3)


def simplified(outputs: str) -> ir.Model:
    text = f"""<ir_version: 10, opset_import: ["" : 23]> g (float[B, 4] x) => ({outputs})
    <float[4] g = {{1.5, 0.5, -2.0, 1.0}}> {{
      y, i = SimplifiedLayerNormalization<axis=-1, epsilon=0.000001, stash_type=1>(x, g)
    }}"""
    return ir.from_proto(onnx.parser.parse_model(text))


def test_simplified_layer_normalization() -> None:
    ort = pytest.importorskip("onnxruntime")
    model = simplified("float[B, 4] y")
    before = ir.to_proto(model)
    assert RaiseRmsNorm()(model).modified
    assert op_types(model) == ["RMSNormalization"]
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    feed = {"x": np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)}
    got, expected = (
        ort.InferenceSession(p.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feed)[0]
        for p in (ir.to_proto(model), before)
    )
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_simplified_layer_normalization_whose_root_is_used() -> None:
    model = simplified("float[B, 4] y, float[B, 1] i")
    rule = RaiseRmsNorm()
    assert not rule(model).modified
    assert "inverse root is used too" in rule.sites[0].detail


def test_bfloat16_without_a_gain_stays_in_float32() -> None:
    """ONNX Runtime's CPU provider has no bfloat16 product, and only the gain would need one."""
    body = f"x = Cast<to=1>(h)  {SQUARE}  {RSQRT}  c = Cast<to=16>(n)  y = Cast<to=1>(c)"
    after = graph(body, x="bfloat16[B, S, 4] h")
    assert RaiseRmsNorm()(after).modified
    assert op_types(after) == ["Cast", "RMSNormalization", "Cast", "Cast"]
