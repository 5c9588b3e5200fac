"""raise-layer-norm: the spellings, what stays as it is and why, precision, subgraphs, a real model."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from exactness import assert_exact, op_types, parse

from graphopt.passes.raise_.layer_norm import RaiseLayerNorm
from graphopt.passes.raise_.rms_norm import RaiseRmsNorm

CONSTANTS = """<float eps = {0.00001}, float two = {2.0}, float half = {0.5}, float mhalf = {-0.5}, float one = {1.0},
  float minus = {-1.0}, float four = {4.0}, float quarter = {0.25}, int64[1] last = {-1}, int64[1] second = {2},
  float[4] g = {1.5, 0.5, -2.0, 1.0}, float[4] b = {0.1, 0.2, -0.3, 0.4}, float[1,1,4] g3 = {1.5, 0.5, -2.0, 1.0},
  float[1,1,4] b3 = {0.1, 0.2, -0.3, 0.4}, float gs = {3.0}, float[1] eps1 = {0.00001}>"""

MEAN = "m = ReduceMean<axes=[-1]>(x)  d = Sub(x, m)"
VARIANCE = "q = Pow(d, two)  v = ReduceMean<axes=[-1]>(q)"
ROOT = "e = Add(v, eps)  s = Sqrt(e)"
PLAIN = f"{MEAN} {VARIANCE} {ROOT} n = Div(d, s)"
AFFINE = "h = Mul(n, g)  y = Add(h, b)"


def graph(body: str, *, opset: int = 17, x: str = "float[B, S, 4] x", y: str = "float[B, S, 4] y") -> ir.Model:
    lines = "\n".join(body.replace("  ", "\n").splitlines())
    return parse(f'<ir_version: 10, opset_import: ["" : {opset}]> g ({x}) => ({y}) {CONSTANTS} {{ {lines} }}')


def check(body: str, **options: object) -> ir.Node:
    after = assert_exact(graph(body, **options), RaiseLayerNorm())
    assert op_types(after) == ["LayerNormalization"]
    return after.graph.node(0)


def reason(body: str, **options: object) -> str:
    model = graph(body, **options)
    before = op_types(model)
    rule = RaiseLayerNorm()
    assert not rule(model).modified
    assert op_types(model) == before
    (site,) = rule.sites
    assert site.outcome == "left"
    return site.detail


@pytest.mark.parametrize(
    "body",
    [
        f"{PLAIN} {AFFINE}",
        f"{PLAIN} h = Mul(g, n)  y = Add(b, h)",
        f"{PLAIN} h = Mul(n, g3)  y = Add(h, b3)",
        # The square.
        f"{MEAN} q = Mul(d, d)  v = ReduceMean<axes=[-1]>(q) {ROOT} n = Div(d, s) {AFFINE}",
        f"{MEAN} a = Abs(d)  q = Pow(a, two)  v = ReduceMean<axes=[-1]>(q) {ROOT} n = Div(d, s) {AFFINE}",
        f"{MEAN} t = ReduceSumSquare<axes=[-1]>(d)  v = Div(t, four) {ROOT} n = Div(d, s) {AFFINE}",
        # The mean as a sum.
        f"t = ReduceSum(x, last)  m = Div(t, four)  d = Sub(x, m) {VARIANCE} {ROOT} n = Div(d, s) {AFFINE}",
        f"{MEAN} q = Pow(d, two)  t = ReduceSum(q, last)  v = Mul(quarter, t) {ROOT} n = Div(d, s) {AFFINE}",
        # x - mean(x) twice, as TorchScript writes it, with one mean or two.
        f"{MEAN} d2 = Sub(x, m) {VARIANCE} {ROOT} n = Div(d2, s) {AFFINE}",
        f"{MEAN} m2 = ReduceMean<axes=[-1]>(x)  d2 = Sub(x, m2) {VARIANCE} {ROOT} n = Div(d2, s) {AFFINE}",
        # Epsilon and the root.
        f"{MEAN} {VARIANCE} e = Add(eps, v)  s = Sqrt(e)  n = Div(d, s) {AFFINE}",
        f"{MEAN} {VARIANCE} e = Add(v, eps1)  s = Sqrt(e)  n = Div(d, s) {AFFINE}",
        f"{MEAN} {VARIANCE} e = Add(v, eps)  s = Pow(e, half)  n = Div(d, s) {AFFINE}",
        f"{MEAN} {VARIANCE} {ROOT} r = Reciprocal(s)  n = Mul(d, r) {AFFINE}",
        f"{MEAN} {VARIANCE} {ROOT} r = Div(one, s)  n = Mul(r, d) {AFFINE}",
        f"{MEAN} {VARIANCE} {ROOT} r = Pow(s, minus)  n = Mul(r, d) {AFFINE}",
        f"{MEAN} {VARIANCE} e = Add(v, eps)  r = Pow(e, mhalf)  n = Mul(d, r) {AFFINE}",
        f"{MEAN} {VARIANCE} e = Add(v, eps)  i = Reciprocal(e)  r = Sqrt(i)  n = Mul(d, r) {AFFINE}",
        # The gain inside, as Keras writes it.
        f"{MEAN} {VARIANCE} {ROOT} r = Reciprocal(s)  k = Mul(r, g)  n = Mul(d, k)  y = Add(n, b)",
        f"{MEAN} {VARIANCE} {ROOT} r = Reciprocal(s)  k = Mul(r, g)  p = Mul(x, k)  o = Mul(m, k)  w = Sub(b, o)  "
        "y = Add(p, w)",
        f"{MEAN} {VARIANCE} {ROOT} r = Reciprocal(s)  p = Mul(x, r)  o = Mul(m, r)  n = Sub(p, o) {AFFINE}",
        # Casts that change nothing.
        f"{PLAIN} c = Cast<to=1>(n)  h = Mul(c, g)  y = Add(h, b)",
    ],
)
def test_spellings(body: str) -> None:
    node = check(body)
    assert node.attributes["axis"].value == -1
    assert node.attributes["epsilon"].value == pytest.approx(1e-5)
    gain, bias = (value.const_value.numpy() for value in node.inputs[1:])
    np.testing.assert_array_equal(gain, np.float32([1.5, 0.5, -2.0, 1.0]))
    np.testing.assert_array_equal(bias, np.float32([0.1, 0.2, -0.3, 0.4]))


def test_names_of_output_gain_and_bias_stay() -> None:
    model = graph(f"{PLAIN} {AFFINE}")
    RaiseLayerNorm()(model)
    assert [value.name for value in model.graph.outputs] == ["y"]
    assert [value.name for value in model.graph.node(0).inputs] == ["x", "g", "b"]


def test_axes_as_input() -> None:
    check(
        "m = ReduceMean(x, last)  d = Sub(x, m)  q = Pow(d, two)  v = ReduceMean(q, second)  "
        f"{ROOT} n = Div(d, s) {AFFINE}",
        opset=18,
    )


def test_absent_gain_is_ones() -> None:
    node = check(PLAIN.replace("n = Div", "y = Div"))
    np.testing.assert_array_equal(node.inputs[1].const_value.numpy(), np.ones(4, np.float32))
    assert len(node.inputs) == 2


def test_absent_gain_with_bias() -> None:
    node = check(f"{PLAIN} y = Add(n, b)")
    np.testing.assert_array_equal(node.inputs[1].const_value.numpy(), np.ones(4, np.float32))


def test_scalar_gain_is_expanded() -> None:
    node = check(f"{PLAIN} h = Mul(n, gs)  y = Add(h, b)")
    np.testing.assert_array_equal(node.inputs[1].const_value.numpy(), np.full(4, 3, np.float32))


def test_no_epsilon() -> None:
    node = check(f"{MEAN} {VARIANCE} s = Sqrt(v)  n = Div(d, s) {AFFINE}")
    assert node.attributes["epsilon"].value == 0.0


def test_several_axes() -> None:
    body = f"{PLAIN} {AFFINE}".replace("axes=[-1]", "axes=[-2, -1]").replace("g)", "g2)").replace("b)", "b2)")
    gain = "float[2,4] g2 = {1, 2, 3, 4, 5, 6, 7, 8}, float[1, 2, 4] b2 = {1, 2, 3, 4, 5, 6, 7, 8}>"
    text = f"""<ir_version: 10, opset_import: ["" : 17]> g (float[B, 2, 4] x) => (float[B, 2, 4] y)
    {CONSTANTS[:-1]}, {gain} {{ {body} }}"""
    after = assert_exact(parse(text), RaiseLayerNorm())
    assert op_types(after) == ["LayerNormalization"]
    assert after.graph.node(0).attributes["axis"].value == -2
    assert after.graph.node(0).inputs[2].shape == ir.Shape([2, 4])


def test_positive_axes_where_the_rank_is_known() -> None:
    check(f"{PLAIN} {AFFINE}".replace("axes=[-1]", "axes=[2]"))


def test_a_gain_that_only_one_branch_takes() -> None:
    # After common subexpressions are merged two norms of one value share everything but their gains.
    model = graph(f"{PLAIN} y = Mul(n, g)  z = Mul(n, b)", y="float[B, S, 4] y, float[B, S, 4] z")
    assert op_types(assert_exact(model, RaiseLayerNorm())) == ["LayerNormalization", "Mul", "Mul"]


def test_mean_used_elsewhere_stays() -> None:
    model = graph(f"{PLAIN} {AFFINE}", y="float[B, S, 4] y, float[B, S, 1] m")
    assert op_types(assert_exact(model, RaiseLayerNorm())) == ["ReduceMean", "LayerNormalization"]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (f"{MEAN} {VARIANCE} r = Sqrt(v)  s = Add(r, eps)  n = Div(d, s) {AFFINE}", "added after the square root"),
        (
            f"{MEAN} q = Pow(d, two)  t = ReduceSum(q, last)  v = Div(t, gs) {ROOT} n = Div(d, s) {AFFINE}",
            "a sum over 4 elements is divided by 3",
        ),
        (f"{MEAN} {VARIANCE} w = Mul(v, gs)  e = Add(w, eps)  s = Sqrt(e)  n = Div(d, s) {AFFINE}", "Bessel"),
        (f"{MEAN} {VARIANCE} e = Max(v, eps)  s = Sqrt(e)  n = Div(d, s) {AFFINE}", "bounded by Max"),
        (f"{MEAN} {VARIANCE} r = Sqrt(v)  s = Max(r, eps)  n = Div(d, s) {AFFINE}", "bounded by Max"),
        (
            "m = ReduceMean<axes=[-1]>(x)  x2 = Mul(x, x)  q = ReduceMean<axes=[-1]>(x2)  m2 = Mul(m, m)  "
            f"v = Sub(q, m2) {ROOT} d = Sub(x, m)  n = Div(d, s) {AFFINE}",
            "cancels",
        ),
        (f"{PLAIN} {AFFINE}".replace("axes=[-1]", "axes=[1]"), "over axes [-2], not over the last"),
        (f"{PLAIN} {AFFINE}".replace("axes=[-1]", "axes=[-1, -3]"), "over axes [-3, -1], not over the last"),
        (f"{MEAN} {VARIANCE} {ROOT} n = Div(x, s) {AFFINE}", "isn't what was squared"),
        (
            f"m = ReduceMean<axes=[-2, -1]>(x)  d = Sub(x, m) {VARIANCE} {ROOT} n = Div(d, s) {AFFINE}",
            "over different axes",
        ),
    ],
)
def test_left_with_reason(body: str, why: str) -> None:
    assert why in reason(body)


def test_left_where_the_variance_is_an_output() -> None:
    assert "'v' inside it is used elsewhere" in reason(f"{PLAIN} {AFFINE}", y="float[B, S, 4] y, float[B, S, 1] v")


def test_left_below_opset_17() -> None:
    assert "needs opset 17, the model has 13" in reason(f"{PLAIN} {AFFINE}", opset=13)


def test_left_where_the_rank_is_unknown() -> None:
    body = f"x = Reshape(i, dims)  {PLAIN} {AFFINE}".replace("axes=[-1]", "axes=[2]")
    assert "the rank isn't known" in reason(body, x="float[N] i, int64[K] dims")


def test_left_where_the_axes_are_not_constant() -> None:
    body = f"{MEAN} q = Pow(d, two)  v = ReduceMean(q, some) {ROOT} n = Div(d, s) {AFFINE}"
    body = body.replace("ReduceMean<axes=[-1]>(x)", "ReduceMean(x, last)")
    assert "aren't constant" in reason(body, opset=18, x="float[B, S, 4] x, int64[1] some")


def test_left_where_the_axes_are_dropped() -> None:
    body = f"{MEAN} q = Pow(d, two)  v = ReduceMean<axes=[-1], keepdims=0>(q) {ROOT} n = Div(d, s) {AFFINE}"
    assert "keepdims=0" in reason(body, x="float[4, 4] x", y="float[4, 4] y")


def test_left_where_the_length_is_unknown() -> None:
    # A gain of four elements could broadcast an axis of length 1.
    assert "length of the normalised axis" in reason(f"{PLAIN} {AFFINE}", x="float[B, D] x", y="float[B, D] y")


def test_gain_that_broadcasts_stays_behind() -> None:
    model = graph(f"{PLAIN} y = Mul(n, g)", x="float[B, 1] x", y="float[B, 4] y")
    after = assert_exact(model, RaiseLayerNorm())
    assert op_types(after) == ["LayerNormalization", "Mul"]


def test_gain_of_higher_rank_stays_behind() -> None:
    model = graph(f"{PLAIN} y = Mul(n, g3)", x="float[B, 4] x", y="float[1, B, 4] y")
    after = assert_exact(model, RaiseLayerNorm())
    assert op_types(after) == ["LayerNormalization", "Mul"]


def test_left_in_float64() -> None:
    text = f"g (float[B, 4] x) => (float[B, 4] y) {CONSTANTS} {{ {PLAIN} {AFFINE} }}".replace("float", "double")
    model = parse(f'<ir_version: 10, opset_import: ["" : 17]> {text}')
    rule = RaiseLayerNorm()
    assert not rule(model).modified
    assert "float64" in rule.sites[0].detail


CHANNELS = """<float eps = {0.00001}, float two = {2.0}, int64[1] second = {1}, float[6, 1, 1] g = {1, 2, 3, -1, -2, 0.5},
  float[1, 6, 1, 1] b = {1, 2, 3, 4, 5, 6}, int64[4] kept = {6, 1, 6, 6}>"""
FIRST = "m = ReduceMean<axes=[1]>(x)  d = Sub(x, m)  q = Pow(d, two)  v = ReduceMean<axes=[1]>(q)"


def channels_first(body: str, shape: str = "float[B, 6, H, W]") -> ir.Model:
    lines = "\n".join(body.replace("  ", "\n").splitlines())
    return parse(f'<ir_version: 10, opset_import: ["" : 17]> g ({shape} x) => ({shape} y) {CHANNELS} {{ {lines} }}')


@pytest.mark.parametrize(
    "body",
    [
        f"{FIRST}  {ROOT}  n = Div(d, s)  {AFFINE}",
        f"{FIRST}  {ROOT}  n = Div(d, s)  y = Mul(n, g)",
        f"{FIRST}  {ROOT}  y = Div(d, s)",
        f"{FIRST.replace('axes=[1]>(q)', 'axes=[-3], keepdims=0>(q)').replace('v =', 'w =')}  v = Unsqueeze(w, second)  "
        f"{ROOT}  n = Div(d, s)  {AFFINE}",
    ],
)
def test_channels_first(body: str) -> None:
    after = assert_exact(channels_first(body), RaiseLayerNorm(channels=6))
    assert op_types(after) == ["Transpose", "LayerNormalization", "Transpose"]
    assert [list(after.graph.node(i).attributes["perm"].value) for i in (0, 2)] == [[0, 2, 3, 1], [0, 3, 1, 2]]
    gain = after.graph.node(1).inputs[1].const_value.numpy()
    np.testing.assert_array_equal(gain, np.float32([1, 2, 3, -1, -2, 0.5] if "g)" in body else np.ones(6)))


@pytest.mark.parametrize(
    ("shape", "why"), [("float[B, 6, H, W]", "only 6 elements"), ("float[B, C, H, W]", "an unknown number of elements")]
)
def test_few_channels_first_stay(shape: str, why: str) -> None:
    rule = RaiseLayerNorm()
    assert not rule(channels_first(f"{FIRST}  {ROOT}  y = Div(d, s)", shape)).modified
    assert why in rule.sites[0].detail


def test_mean_over_an_axis_that_another_view_put_back_stays() -> None:
    """Reduced over axis 2 and seen as [6, 1, 6, 6], it broadcasts in another way."""
    body = FIRST.replace("axes=[1]>(q)", "axes=[2], keepdims=0>(q)").replace("v =", "w =")
    rule = RaiseLayerNorm(channels=6)
    model = channels_first(f"{body}  v = Reshape(w, kept)  {ROOT}  y = Div(d, s)", "float[6, 6, 6, 6]")
    assert not rule(model).modified
    assert "aren't kept" in rule.sites[0].detail


def test_mean_of_squares_alone_is_no_site() -> None:
    model = graph(f"{MEAN} {VARIANCE} y = Add(v, eps)", y="float[B, S, 1] y")
    rule = RaiseLayerNorm()
    assert not rule(model).modified
    assert rule.sites == []


def test_rms_norm_is_no_site_and_the_other_way_round() -> None:
    rule = RaiseLayerNorm()
    model = graph("q = Pow(x, two)  v = ReduceMean<axes=[-1]>(q)  e = Add(v, eps)  s = Sqrt(e)  y = Div(x, s)")
    assert not rule(model).modified
    assert rule.sites == []
    other = RaiseRmsNorm()
    assert not other(graph(f"{PLAIN} {AFFINE}")).modified
    assert other.sites == []


@pytest.mark.parametrize(
    "body",
    [
        PLAIN.replace("two", "deep"),
        PLAIN.replace("eps", "deep"),
        f"t = ReduceSum(x, last)  m = Div(t, deep4)  d = Sub(x, m) {VARIANCE} {ROOT} n = Div(d, s)",
        f"{MEAN} {VARIANCE} {ROOT} r = Div(deep1, s)  n = Mul(d, r)",
    ],
)
def test_left_where_a_constant_adds_an_axis(body: str) -> None:
    deep = "float[1,1,1,1] deep = {2}, float[1,1,1,1] deep4 = {4}, float[1,1,1,1] deep1 = {1}>"
    text = f"""<ir_version: 10, opset_import: ["" : 17]> g (float[B, S, 4] x) => (float[1, B, S, 4] y)
    {CONSTANTS[:-1]}, {deep} {{ {body}  {AFFINE} }}"""
    rule = RaiseLayerNorm()
    assert not rule(parse("\n".join(text.replace("  ", "\n").splitlines()))).modified
    assert "a constant of rank 4 may broadcast" in rule.sites[0].detail


def test_inside_a_branch() -> None:
    text = f"""<ir_version: 10, opset_import: ["" : 17]>
    g (bool c, float[B, S, 4] x) => (float[B, S, 4] y) {CONSTANTS} {{
      y = If (c) <
        then_branch = t () => (float[B, S, 4] ty) {{ {PLAIN} h = Mul(n, g)  ty = Add(h, b) }},
        else_branch = f () => (float[B, S, 4] fy) {{ fy = Identity(x) }}
      >
    }}"""
    after = assert_exact(parse(text), RaiseLayerNorm())
    branch = after.graph.node(0).attributes["then_branch"].as_graph()
    assert [n.op_type for n in branch] == ["LayerNormalization"]


def test_half_precision_with_casts_becomes_one_operator() -> None:
    ort = pytest.importorskip("onnxruntime")
    text = """<ir_version: 10, opset_import: ["" : 17]> g (float16[B, 64] x) => (float16[B, 64] y)
    <float eps = {0.00001}, float two = {2.0}> {
      w = Cast<to=1>(x)  m = ReduceMean<axes=[-1]>(w)  d = Sub(w, m)  q = Pow(d, two)  v = ReduceMean<axes=[-1]>(q)
      e = Add(v, eps)  s = Sqrt(e)  n = Div(d, s)  c = Cast<to=10>(n)  h = Mul(c, g)  y = Add(h, b)
    }"""
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=64).astype(np.float16) for name in "gb"}
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, k) for k, a in arrays.items())
    model = ir.from_proto(proto)
    assert RaiseLayerNorm()(model).modified
    (node,) = model.graph
    assert node.op_type == "LayerNormalization"
    assert node.attributes["stash_type"].value == 1
    assert node.inputs[0].name == "x"
    assert node.inputs[1].dtype == ir.DataType.FLOAT16
    feed = {"x": (100 * rng.normal(size=(8, 64))).astype(np.float16)}
    got, expected = (
        ort.InferenceSession(p.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feed)[0].astype(float)
        for p in (ir.to_proto(model), proto)
    )
    np.testing.assert_allclose(got, expected, rtol=2e-3, atol=2e-3)


def test_half_precision_gain_before_the_cast_stays_in_float32() -> None:
    text = """<ir_version: 10, opset_import: ["" : 17]> g (float16[B, 4] x) => (float16[B, 4] y)
    <float eps = {0.00001}, float two = {2.0}, float[4] g = {1, 2, 3, 4}> {
      w = Cast<to=1>(x)  m = ReduceMean<axes=[-1]>(w)  d = Sub(w, m)  q = Pow(d, two)  v = ReduceMean<axes=[-1]>(q)
      e = Add(v, eps)  s = Sqrt(e)  n = Div(d, s)  h = Mul(n, g)  y = Cast<to=10>(h)
    }"""
    assert op_types(assert_exact(parse(text), RaiseLayerNorm())) == ["Cast", "LayerNormalization", "Cast"]
