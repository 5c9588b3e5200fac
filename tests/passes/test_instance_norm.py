"""raise-instance-norm: its spellings, where LayerNormalization has precedence, and what stays."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from exactness import assert_exact, op_types, parse

from graphopt.passes.raise_.instance_norm import RaiseInstanceNorm
from graphopt.passes.raise_.layer_norm import RaiseLayerNorm

CONSTANTS = """<float eps = {0.00001}, float two = {2.0}, float three = {3.0}, float six = {6.0},
  int64[2] sp = {2, 3}, int64[1] last = {-1}, float[3, 1, 1] g = {1.5, 0.5, -2.0},
  float[1, 3, 1, 1] b = {0.1, 0.2, -0.3}, float[3, 1] g2 = {1.5, 0.5, -2.0}, float[2, 3] inner = {1, 2, 3, 4, 5, 6},
  float[4] gd = {1, 2, 3, 4}, int64[4] kept = {0, 3, 1, 1}, int64[3] rows = {0, 3, -1}>"""
MEAN = "m = ReduceMean<axes=[2, 3]>(x)  d = Sub(x, m)"
REST = "q = Mul(d, d)  v = ReduceMean<axes=[-1, -2]>(q)  e = Add(v, eps)  s = Sqrt(e)  n = Div(d, s)"
AFFINE = "h = Mul(n, g)  y = Add(h, b)"


def graph(
    body: str,
    *,
    opset: int = 17,
    x: str = "float[B, 3, 2, 3] x",
    y: str = "float[B, 3, 2, 3] y",
    constants: str = CONSTANTS,
) -> ir.Model:
    lines = "\n".join(body.replace("  ", "\n").splitlines())
    return parse(f'<ir_version: 10, opset_import: ["" : {opset}]> g ({x}) => ({y}) {constants} {{ {lines} }}')


@pytest.mark.parametrize(
    "body",
    [
        f"{MEAN}  {REST}  {AFFINE}",
        f"{MEAN}  {REST}  h = Mul(g, n)  y = Add(b, h)",
        f"{MEAN}  q = Pow(d, two)  t = ReduceSum(q, sp)  v = Div(t, six)  e = Add(v, eps)  s = Sqrt(e)  "
        f"r = Reciprocal(s)  n = Mul(d, r)  {AFFINE}",
        f"{MEAN}  {REST.replace('s = Sqrt(e)  n = Div(d, s)', 's = Sqrt(e)  r = Reciprocal(s)  k = Mul(r, g)')}  "
        "p = Mul(d, k)  y = Add(p, b)",
        # torch.export: var keeps no axes, and gets them back by a Reshape.
        f"{MEAN}  {REST.replace('v = ReduceMean<axes=[-1, -2]>(q)', 'w = ReduceMean<axes=[2, 3], keepdims=0>(q)')}".replace(
            "e = Add(v", "v = Reshape(w, kept)  e = Add(v"
        )
        + f"  {AFFINE}",
    ],
)
def test_spellings(body: str) -> None:
    after = assert_exact(graph(body), RaiseInstanceNorm())
    assert op_types(after) == ["InstanceNormalization"]
    node = after.graph.node(0)
    assert node.attributes["epsilon"].value == pytest.approx(1e-5)
    gain, bias = (value.const_value.numpy() for value in node.inputs[1:])
    np.testing.assert_array_equal(gain, np.float32([1.5, 0.5, -2.0]))
    np.testing.assert_array_equal(bias, np.float32([0.1, 0.2, -0.3]))


def test_without_gain_and_bias_and_of_unknown_positions() -> None:
    body = f"{MEAN}  {REST.replace('n = Div', 'y = Div')}"
    after = assert_exact(graph(body, x="float[B, 3, H, W] x", y="float[B, 3, H, W] y"), RaiseInstanceNorm())
    node = after.graph.node(0)
    np.testing.assert_array_equal(node.inputs[1].const_value.numpy(), np.ones(3, np.float32))
    np.testing.assert_array_equal(node.inputs[2].const_value.numpy(), np.zeros(3, np.float32))


ROWS = "m = ReduceMean<axes=[-1]>(x)  d = Sub(x, m)  q = Mul(d, d)  v = ReduceMean<axes=[2]>(q)  e = Add(v, eps)  s = Sqrt(e)  n = Div(d, s)"


def test_one_axis_with_a_gain_for_each_channel() -> None:
    body = f"{ROWS}  y = Mul(n, g2)"
    after = assert_exact(graph(body, x="float[B, 3, 4] x", y="float[B, 3, 4] y"), RaiseInstanceNorm())
    assert op_types(after) == ["InstanceNormalization"]


@pytest.mark.parametrize("end", ["y = Mul(n, gd)", "y = Identity(n)", "y = Mul(n, three)", "y = Add(n, gd)"])
def test_layer_norms_are_no_sites(end: str) -> None:
    model = graph(f"{ROWS}  {end}", x="float[B, 3, 4] x", y="float[B, 3, 4] y")
    rule = RaiseInstanceNorm()
    assert not rule(model).modified
    assert rule.sites == []
    assert "LayerNormalization" in op_types(assert_exact(model, RaiseLayerNorm()))


def test_gain_over_the_positions_is_a_layer_norm() -> None:
    rule = RaiseInstanceNorm()
    assert not rule(graph(f"{MEAN}  {REST}  y = Mul(n, inner)")).modified
    assert rule.sites == []


def test_core_of_a_group_norm() -> None:
    body = f"x = Reshape(i, rows)  {ROWS}  h = Shape(i)  y = Reshape(n, h)"
    model = graph(body, x="float[B, 6, H, W] i", y="float[B, 6, H, W] y")
    after = assert_exact(model, RaiseInstanceNorm())
    assert sorted(op_types(after)) == ["InstanceNormalization", "Reshape", "Reshape", "Shape"]


@pytest.mark.parametrize(
    ("body", "x", "why"),
    [
        (f"{MEAN}  {REST}  {AFFINE}", "float[B, C, H, W] x", "length of the axis of the channels isn't known"),
        (
            f"{MEAN}  q = Mul(d, d)  v = ReduceMean<axes=[2, 3]>(q)  w = Mul(v, three)  e = Add(w, eps)  s = Sqrt(e)  "
            f"n = Div(d, s)  {AFFINE}",
            "float[B, 3, H, W] x",
            None,  # Bessel's correction: refused before the axes are looked at, and reported by raise-layer-norm
        ),
    ],
)
def test_left(body: str, x: str, why: str | None) -> None:
    rule = RaiseInstanceNorm()
    assert not rule(graph(body, x=x, y=x.replace(" x", " y"))).modified
    assert [site.detail for site in rule.sites if why is None or why not in site.detail] == []


def test_left_where_something_inside_is_read() -> None:
    rule = RaiseInstanceNorm()
    assert not rule(graph(f"{MEAN}  {REST}  {AFFINE}", y="float[B, 3, 2, 3] y, float[B, 3, 1, 1] v")).modified
    assert "'v' inside it is used elsewhere" in rule.sites[0].detail


def test_left_in_float64() -> None:
    text = f"g (float[B, 3, 2, 3] x) => (float[B, 3, 2, 3] y) {CONSTANTS} {{ {MEAN}  {REST}  {AFFINE} }}"
    text = "\n".join(text.replace("float", "double").split("  "))
    rule = RaiseInstanceNorm()
    assert not rule(parse(f'<ir_version: 10, opset_import: ["" : 17]> {text}')).modified
    assert "computes in double" in rule.sites[0].detail


def test_half_precision_agrees_in_onnx_runtime() -> None:
    ort = pytest.importorskip("onnxruntime")
    lines = f"{MEAN}  {REST}".replace("n = Div", "y = Div").replace("  ", "\n")
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 17]> g (float16[B, 3, H, W] x) => (float16[B, 3, H, W] y) {{ {lines} }}'
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.float16(1e-3), "eps"))
    model = ir.from_proto(proto)
    assert RaiseInstanceNorm()(model).modified
    assert op_types(model) == ["InstanceNormalization"]
    feed = {"x": np.random.default_rng(0).normal(2, 3, size=(2, 3, 8, 9)).astype(np.float16)}
    got, expected = (
        ort.InferenceSession(p.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feed)[0].astype(float)
        for p in (ir.to_proto(model), proto)
    )
    np.testing.assert_allclose(got, expected, rtol=5e-3, atol=5e-3)


def test_large_mean_in_onnx_runtime() -> None:
    """The kernel centres before it squares, as the graph did."""
    ort = pytest.importorskip("onnxruntime")
    before = graph(f"{MEAN}  {REST}  {AFFINE}", x="float[B, 3, H, W] x", y="float[B, 3, H, W] y")
    after = before.clone()
    assert RaiseInstanceNorm()(after).modified
    feed = {"x": np.random.default_rng(0).normal(1000, 1, size=(2, 3, 32, 32)).astype(np.float32)}
    one, other = (
        ort.InferenceSession(ir.to_proto(m).SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feed)[0]
        for m in (before, after)
    )
    np.testing.assert_allclose(other, one, rtol=2e-3, atol=2e-3)


def test_inside_a_branch() -> None:
    text = f"""<ir_version: 10, opset_import: ["" : 17]>
    g (bool c, float[B, 3, 2, 3] x) => (float[B, 3, 2, 3] y) {CONSTANTS} {{
      y = If (c) <
        then_branch = t () => (float[B, 3, 2, 3] ty) {{ {MEAN}  {REST}  h = Mul(n, g)  ty = Add(h, b) }},
        else_branch = f () => (float[B, 3, 2, 3] fy) {{ fy = Identity(x) }}
      >
    }}"""
    after = assert_exact(parse("\n".join(text.replace("  ", "\n").splitlines())), RaiseInstanceNorm())
    assert [n.op_type for n in after.graph.node(0).attributes["then_branch"].as_graph()] == ["InstanceNormalization"]
