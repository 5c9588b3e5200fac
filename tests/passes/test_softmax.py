"""raise-softmax: the spellings of Softmax and LogSoftmax, along which axes, and what stays."""

from __future__ import annotations

import collections

import numpy as np
import onnx_ir as ir
import pytest
from exactness import assert_exact, op_types, parse
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from graphopt.models import catalogue
from graphopt.passes import registry
from graphopt.passes.raise_.softmax import RaiseSoftmax

CONSTANTS = """<int64[1] last = {-1}, int64[1] second = {1}, int64[1] third = {2}, int64[2] both = {-2, -1},
  float one = {1.0}, float minus = {-1.0}, float eps = {0.001}, float lowest = {-inf}, int64[3] whole = {0, 0, 1},
  int64[3] wide = {1, 1, 8}>""".replace("-inf", "-3.4028234e38")
EXP = "m = ReduceMax(x, last)  d = Sub(x, m)  e = Exp(d)"
SUM = "s = ReduceSum(e, last)"
SOFTMAX = [
    f"{EXP} {SUM} y = Div(e, s)",
    f"{EXP} {SUM} r = Reciprocal(s)  y = Mul(e, r)",
    f"{EXP} {SUM} r = Div(one, s)  y = Mul(r, e)",
    f"{EXP} {SUM} r = Pow(s, minus)  y = Mul(e, r)",
    f"e = Exp(x) {SUM} y = Div(e, s)",
    f"{EXP} t = ReduceSum<keepdims=0>(e, last)  s = Unsqueeze(t, last)  y = Div(e, s)",
    f"{EXP} t = ReduceSum<keepdims=0>(e, last)  s = Reshape(t, whole)  y = Div(e, s)",
    f"{EXP} t = ReduceSum(e, last)  s = Expand(t, wide)  y = Div(e, s)",
    "t = ReduceMax<keepdims=0>(x, last)  m = Unsqueeze(t, last)  d = Sub(x, m)  e = Exp(d) " + f"{SUM} y = Div(e, s)",
    "t = ReduceMax(x, last)  m = Expand(t, wide)  d = Sub(x, m)  e = Exp(d) " + f"{SUM} y = Div(e, s)",
    f"m = ReduceMax(x, third)  d = Sub(x, m)  e = Exp(d) {SUM} y = Div(e, s)",
    "l = ReduceLogSumExp(x, last)  d = Sub(x, l)  y = Exp(d)",
    "d = LogSoftmax<axis=-1>(x)  y = Exp(d)",
]
LOG = [
    f"{EXP} {SUM} l = Log(s)  y = Sub(d, l)",
    f"{EXP} {SUM} l = Log(s)  n = Neg(l)  y = Add(n, d)",
    f"{EXP} {SUM} l = Log(s)  t = Add(l, m)  y = Sub(x, t)",
    f"{EXP} {SUM} l = Log(s)  t = Sub(x, l)  y = Sub(t, m)",
    f"e = Exp(x) {SUM} l = Log(s)  y = Sub(x, l)",
    "l = ReduceLogSumExp(x, last)  y = Sub(x, l)",
    "t = ReduceLogSumExp<keepdims=0>(x, last)  l = Unsqueeze(t, last)  y = Sub(x, l)",
    "m = ReduceMax(x, last)  d = Sub(x, m)  l = ReduceLogSumExp(d, last)  y = Sub(d, l)",
]


def graph(
    body: str,
    *,
    opset: int = 18,
    x: str = "float[B, S, 8] x",
    y: str = "float[B, S, 8] y",
    constants: str = CONSTANTS,
) -> ir.Model:
    lines = "\n".join(body.replace("  ", "\n").replace(") s", ")\ns").replace(") y", ")\ny").splitlines())
    for name in "tlremd":
        lines = lines.replace(f") {name} =", f")\n{name} =")
    return parse(f'<ir_version: 10, opset_import: ["" : {opset}]> g ({x}) => ({y}) {constants} {{ {lines} }}')


def axis(model: ir.Model) -> int:
    return model.graph.node(0).attributes["axis"].as_int()


@pytest.mark.parametrize("body", SOFTMAX)
def test_softmax(body: str) -> None:
    after = assert_exact(graph(body), RaiseSoftmax())
    assert op_types(after) == ["Softmax"]
    assert axis(after) == -1
    assert after.graph.node(0).inputs[0].name == "x"


@pytest.mark.parametrize("body", LOG)
def test_log_softmax(body: str) -> None:
    after = assert_exact(graph(body), RaiseSoftmax())
    assert op_types(after) == ["LogSoftmax"]
    assert axis(after) == -1
    assert after.graph.node(0).inputs[0].name == "x"


@pytest.mark.parametrize(("few", "length", "raised"), [(4, 5, True), (4, 4, False), (0, 2, True), (8, 8, False)])
def test_inner_axis(few: int, length: int, raised: bool) -> None:
    body = "m = ReduceMax(x, second)  d = Sub(x, m)  e = Exp(d)  s = ReduceSum(e, second)  y = Div(e, s)"
    rule = RaiseSoftmax(few=few)
    model = graph(body, x=f"float[B, {length}, S] x", y=f"float[B, {length}, S] y")
    after = assert_exact(model, rule)
    assert (op_types(after) == ["Softmax"]) is raised
    rule(model)
    assert raised or f"only {length} elements of an inner axis" in rule.sites[-1].detail


def test_the_axis_is_the_last_where_the_rank_says_so() -> None:
    body = "m = ReduceMax(x, third)  d = Sub(x, m)  e = Exp(d)  s = ReduceSum(e, third)  y = Div(e, s)"
    assert axis(assert_exact(graph(body), RaiseSoftmax())) == -1


def test_another_shift_stays() -> None:
    """x − c at c = 10⁹ isn't x in float32, so only the maximum may go."""
    body = f"d = Sub(x, z)  e = Exp(d) {SUM} y = Div(e, s)"
    model = graph(body, x="float[B, S, 8] x, float[B, S, 1] z")
    assert op_types(assert_exact(model, RaiseSoftmax())) == ["Sub", "Softmax"]


def test_maximum_over_another_axis_stays() -> None:
    body = f"m = ReduceMax(x, second)  d = Sub(x, m)  e = Exp(d) {SUM} y = Div(e, s)"
    assert op_types(assert_exact(graph(body), RaiseSoftmax())) == ["ReduceMax", "Sub", "Softmax"]


def test_maximum_used_elsewhere_stays_beside() -> None:
    model = graph(SOFTMAX[0], y="float[B, S, 8] y, float[B, S, 1] m")
    assert op_types(assert_exact(model, RaiseSoftmax())) == ["ReduceMax", "Softmax"]


def test_logarithm_of_a_softmax() -> None:
    body = "s = Softmax<axis=-1>(x)  y = Log(s)"
    rule = RaiseSoftmax()
    assert not rule(graph(body)).modified
    assert "where it underflows" in rule.sites[0].detail
    assert op_types(assert_exact(graph(body), RaiseSoftmax(underflow=True))) == ["LogSoftmax"]


@pytest.mark.parametrize("op_type", ["Softmax", "LogSoftmax"])
def test_between_transposes(op_type: str) -> None:
    body = f"t = Transpose<perm=[0,2,1]>(x)  s = {op_type}<axis=-1>(t)  y = Transpose<perm=[0,2,1]>(s)"
    after = assert_exact(graph(body), RaiseSoftmax())
    assert op_types(after) == [op_type]
    assert axis(after) == 1


def test_transposes_that_do_not_undo_each_other_stay() -> None:
    body = "t = Transpose<perm=[2,0,1]>(x)  s = Softmax<axis=-1>(t)  y = Transpose<perm=[2,0,1]>(s)"
    rule = RaiseSoftmax()
    assert not rule(graph(body, y="float[S, 8, B] y")).modified
    assert rule.sites == []


@pytest.mark.parametrize(("op_type", "number"), [("Softmax", 1.0), ("LogSoftmax", 0.0)])
def test_axis_of_length_1(op_type: str, number: float) -> None:
    model = graph(f"y = {op_type}<axis=1>(x)", x="float[B, 1, S] x", y="float[B, 1, S] y")
    after = assert_exact(model, RaiseSoftmax())
    assert op_types(after) == ["Shape", "ConstantOfShape"]
    assert after.graph.node(1).attributes["value"].as_tensor().numpy() == number


@pytest.mark.parametrize(
    ("body", "y", "why"),
    [
        (SOFTMAX[0], "float[B, S, 8] y, float[B, S, 8] e", "'e' inside the softmax is used elsewhere"),
        ("e = Exp(x)  s = ReduceSum(e, both)  y = Div(e, s)", "float[B, S, 8] y", "is over axes [-2, -1]"),
        ("e = Exp(x)  s = ReduceSum(e)  y = Div(e, s)", "float[B, S, 8] y", "all or unknown axes"),
        (f"e = Exp(x) {SUM} p = Add(s, eps)  y = Div(e, p)", "float[B, S, 8] y", "changed by Add (0.001)"),
        ("d = LogSoftmax(x)  y = Exp(d)", "float[B, S, 8] y, float[B, S, 8] d", "both are wanted"),
        (
            "t = Transpose<perm=[0,2,1]>(x)  s = Softmax<axis=-1>(t)  y = Transpose<perm=[0,2,1]>(s)",
            "float[B, S, 8] y, float[B, 8, S] t",
            "'t' between two transposes is used elsewhere",
        ),
    ],
)
def test_left_with_reason(body: str, y: str, why: str) -> None:
    rule = RaiseSoftmax()
    model = graph(body, y=y)
    before = op_types(model)
    assert not rule(model).modified
    assert op_types(model) == before
    (site,) = rule.sites
    assert why in site.detail


def test_left_where_the_axis_is_not_kept() -> None:
    rule = RaiseSoftmax()
    body = "e = Exp(x)  s = ReduceSum<keepdims=0>(e, last)  y = Div(e, s)"
    assert not rule(graph(body, x="float[B, B] x", y="float[B, B] y")).modified
    assert "isn't kept" in rule.sites[0].detail


def test_left_below_opset_13() -> None:
    rule = RaiseSoftmax()
    body = "e = Exp(x)  s = ReduceSum<axes=[-1]>(e)  y = Div(e, s)"
    assert not rule(graph(body, opset=12)).modified
    assert "needs opset 13" in rule.sites[0].detail


@pytest.mark.parametrize(
    "body",
    [
        "y = Exp(x)",
        "y = Softmax<axis=-1>(x)",
        f"e = Exp(x) {SUM} y = Mul(e, s)",
        "s = ReduceLogSumExp(x, last)  y = Add(x, s)",
    ],
)
def test_other_exponentials_are_no_sites(body: str) -> None:
    rule = RaiseSoftmax()
    assert not rule(graph(body)).modified
    assert rule.sites == []


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_types(dtype: type) -> None:
    ort = pytest.importorskip("onnxruntime")
    name = {np.float16: "float16", np.float64: "double"}[dtype]
    before = graph(SOFTMAX[0], x=f"{name}[B, S, 8] x", y=f"{name}[B, S, 8] y", constants="<int64[1] last = {-1}>")
    model = before.clone()
    assert RaiseSoftmax()(model).modified
    assert op_types(model) == ["Softmax"]
    feed = {"x": np.random.default_rng(0).normal(0, 3, size=(2, 5, 8)).astype(dtype)}
    got, expected = (
        ort.InferenceSession(ir.to_proto(m).SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feed)[0]
        for m in (model, before)
    )
    tolerance = 4 * float(np.finfo(dtype).eps)
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


def test_inside_a_branch() -> None:
    text = f"""<ir_version: 10, opset_import: ["" : 18]>
    g (bool c, float[B, S, 8] x) => (float[B, S, 8] y) {CONSTANTS} {{
      o = Exp(x)
      y = If (c) <
        then_branch = t () => (float[B, S, 8] ty) {{ e = Exp(x)  s = ReduceSum(e, last)  ty = Div(e, s) }},
        else_branch = f () => (float[B, S, 8] fy) {{ p = ReduceSum(o, last)  fy = Div(o, p) }}
      >
    }}"""
    rule = RaiseSoftmax()
    after = assert_exact(parse("\n".join(text.replace("  ", "\n").splitlines())), rule)
    node = after.graph.node(1)
    branches = [[n.op_type for n in node.attributes[k].as_graph()] for k in ("then_branch", "else_branch")]
    assert branches == [["Softmax"], ["ReduceSum", "Div"]]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    position=st.integers(0, 3),
    negative=st.booleans(),
    log=st.booleans(),
    kept=st.booleans(),
    shifted=st.booleans(),
    seed=st.integers(0, 9),
)
def test_every_shape_and_axis(
    shape: list[int], position: int, negative: bool, log: bool, kept: bool, shifted: bool, seed: int
) -> None:
    axis = position % len(shape)
    axis = axis - len(shape) if negative else axis
    assume(not log or shape[axis] > 1)  # else all that is left of x − log(exp(x)) is rounding
    sizes = ", ".join(map(str, shape))
    shift = "m = ReduceMax(x, axes)  d = Sub(x, m)" if shifted else "d = Identity(x)"
    total = "s = ReduceSum(e, axes)" if kept else "k = ReduceSum<keepdims=0>(e, axes)  s = Unsqueeze(k, axes)"
    end = "l = Log(s)  y = Sub(d, l)" if log else "y = Div(e, s)"
    model = graph(
        f"{shift}  e = Exp(d)  {total}  {end}",
        x=f"float[{sizes}] x",
        y=f"float[{sizes}] y",
        constants=f"<int64[1] axes = {{{axis}}}>",
    )
    after = assert_exact(model, RaiseSoftmax(few=0), seeds=1)
    ones = ["Shape", "ConstantOfShape"] if shape[axis] == 1 else ["LogSoftmax" if log else "Softmax"]
    assert [op for op in op_types(after) if op != "Identity"] == ones


@pytest.mark.real
def test_real_model() -> None:
    """JAX through TensorFlow: keepdims=0 and Reshape, max(−∞, ·), Expand."""
    ort = pytest.importorskip("onnxruntime")
    path = catalogue.fetch("magika")
    model = ir.load(path)
    for name in ("lift-constants", "convert-opset", "fold-constants", "simplify-shapes"):
        registry.make(name)(model)
    rule = RaiseSoftmax()
    rule(model)
    found = collections.Counter((site.outcome, site.detail) for site in rule.sites)
    assert found == {
        ("applied", "Softmax over axis -1"): 1,
        ("applied", "the subtraction of the maximum is left to the operator"): 1,
    }
    data = np.random.default_rng(0).integers(0, 256, size=(2, 2048)).astype(np.int32)
    quiet = ort.SessionOptions()
    quiet.log_severity_level = 3
    before, after = (
        ort.InferenceSession(source, quiet, providers=["CPUExecutionProvider"]).run(None, {"bytes": data})[0]
        for source in (str(path), ir.to_proto(model).SerializeToString())
    )
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-6)
