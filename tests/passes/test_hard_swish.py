"""raise-hard-swish: clamped lines as HardSigmoid, their products as HardSwish, and what stays."""

from __future__ import annotations

import collections

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from exactness import assert_exact, op_types, parse, random_feeds, reference_outputs
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.analysis.clamps import Line
from graphopt.models import catalogue
from graphopt.passes.raise_.convert_opset import ConvertOpset
from graphopt.passes.raise_.hard_swish import RaiseHardSwish

CONSTANTS = """<float zero = {0.0}, float one = {1.0}, float half = {0.5}, float three = {3.0}, float four = {4.0},
  float six = {6.0}, float eight = {8.0}, float eighth = {0.125}, float meighth = {-0.125}, float sixth = {0.16666667},
  float near = {0.1667}, float[1] three1 = {3.0}, float minus = {-1.0}>"""
ROUNDING = 1e-7
"""Of 1/6 in float32: what HardSigmoid and HardSwish hold, and the evaluator computes with, where the graph divides."""

# With 4 and 8 for 3 and 6 every number is a float32, and the results are equal in float64.
GATES = [
    "u = Mul(x, eighth)  v = Add(u, half)  y = Clip(v, zero, one)",
    "u = Add(x, four)  v = Clip(u, zero, eight)  y = Div(v, eight)",
    "u = Add(four, x)  v = Clip(u, zero, eight)  y = Mul(eighth, v)",
    "u = Add(x, four)  r = Relu(u)  v = Min(r, eight)  y = Div(v, eight)",
    "u = Add(x, four)  r = Max(zero, u)  v = Min(eight, r)  y = Div(v, eight)",
    "u = Add(x, four)  r = Min(u, eight)  v = Relu(r)  y = Div(v, eight)",
    "u = Add(x, four)  r = Clip(u, zero)  v = Clip(r, , eight)  y = Div(v, eight)",
    "u = Add(x, four)  r = Relu(u)  w = Div(r, eight)  y = Min(w, one)",
    "u = Sub(four, x)  v = Clip(u, zero, eight)  w = Div(v, eight)  y = Sub(one, w)",
    "u = Mul(x, meighth)  v = Sub(half, u)  y = Clip(v, zero, one)",
    "u = Neg(x)  w = Sub(u, four)  z = Neg(w)  v = Clip(z, zero, eight)  y = Mul(v, eighth)",
]
PRODUCTS = [
    "u = Add(x, three)  c = Clip(u, zero, six)  m = Mul(x, c)  y = Div(m, six)",
    "u = Add(x, three)  c = Clip(u, zero, six)  m = Mul(c, x)  y = Mul(sixth, m)",
    "u = Add(x, three1)  c = Clip(u, zero, six)  m = Mul(c, x)  y = Mul(sixth, m)",
    "u = Add(x, three)  c = Clip(u, zero, six)  d = Div(c, six)  y = Mul(x, d)",
    "u = Add(x, three)  r = Relu(u)  c = Min(r, six)  d = Div(x, six)  y = Mul(d, c)",
    "u = Add(x, three)  r = Relu(u)  c = Min(r, six)  d = Mul(x, sixth)  y = Mul(c, d)",
    "s = Mul(x, sixth)  u = Add(s, half)  c = Clip(u, zero, one)  y = Mul(x, c)",
    "c = HardSigmoid<alpha=0.16666667, beta=0.5>(x)  y = Mul(c, x)",
]


def graph(
    body: str, *, opset: int = 21, x: str = "float[B, 4] x", y: str = "float[B, 4] y", constants: str = CONSTANTS
) -> ir.Model:
    lines = "\n".join(body.replace("  ", "\n").splitlines())
    return parse(f'<ir_version: 10, opset_import: ["" : {opset}]> g ({x}) => ({y}) {constants} {{ {lines} }}')


def wide(model: ir.Model) -> dict[str, np.ndarray]:
    """Inputs on both sides of the bounds."""
    return {name: 4 * feed for name, feed in random_feeds(model, dims={"B": 9}).items()}


@pytest.mark.parametrize("body", GATES)
def test_gates(body: str) -> None:
    before = graph(body)
    after = assert_exact(before, RaiseHardSwish(), feeds=wide(before))
    assert op_types(after) == ["HardSigmoid"]
    (node,) = after.graph
    assert (node.attributes["alpha"].value, node.attributes["beta"].value) == (0.125, 0.5)


@pytest.mark.parametrize("body", PRODUCTS)
@pytest.mark.parametrize(
    ("operator", "opset", "expected"),
    [(True, 21, ["HardSwish"]), (False, 21, ["HardSigmoid", "Mul"]), (True, 13, ["HardSigmoid", "Mul"])],
)
def test_products(body: str, operator: bool, opset: int, expected: list[str]) -> None:
    before = graph(body, opset=opset)
    after = assert_exact(before, RaiseHardSwish(operator), feeds=wide(before), rtol=ROUNDING)
    assert op_types(after) == expected


@pytest.mark.parametrize(
    "body",
    [
        "u = Add(z, four)  c = Clip(u, zero, eight)  m = Mul(x, c)  y = Div(m, eight)",
        "u = Add(z, four)  c = Clip(u, zero, eight)  m = Div(x, eight)  y = Mul(c, m)",
        "u = Add(z, four)  c = Clip(u, zero, eight)  m = Div(c, eight)  y = Mul(x, m)",
    ],
)
def test_gate_of_another_value(body: str) -> None:
    """Squeeze and excitation."""
    before = graph(body, x="float[B, 4] x, float[B, 1] z")
    assert op_types(assert_exact(before, RaiseHardSwish(), feeds=wide(before))) == ["HardSigmoid", "Mul"]


def test_bounds_as_attributes() -> None:
    body = "u = Add(x, four)  c = Clip<min=0.0, max=8.0>(u)  y = Div(c, eight)"
    before = graph(body, opset=10)
    assert op_types(assert_exact(before, RaiseHardSwish(), feeds=wide(before))) == ["HardSigmoid"]


def test_argument_that_something_else_reads_stays() -> None:
    before = graph(
        "u = Add(x, four)  c = Clip(u, zero, eight)  y = Div(c, eight)  k = Neg(u)", y="float[B, 4] y, float[B, 4] k"
    )
    after = assert_exact(before, RaiseHardSwish(), feeds=wide(before))
    assert op_types(after) == ["Add", "HardSigmoid", "Neg"]


def test_overflow_of_the_product() -> None:
    before = graph(PRODUCTS[0])
    after = before.clone()
    RaiseHardSwish()(after)
    feed = {"x": np.float32([[3e38, -3e38, np.nan, 1.0]])}
    with np.errstate(over="ignore", invalid="ignore"):
        np.testing.assert_allclose(reference_outputs(after, feed)[0], np.float32([[3e38, 0, np.nan, 4 / 6]]), rtol=1e-6)


@pytest.mark.parametrize(
    ("body", "y", "why"),
    [
        (GATES[1], "float[B, 4] y, float[B, 4] v", "'v' inside the hard sigmoid is used elsewhere"),
        (PRODUCTS[0], "float[B, 4] y, float[B, 4] m", "'m' inside the hard sigmoid is used elsewhere"),
        (PRODUCTS[7], "float[B, 4] y, float[B, 4] c", "'c' inside the hard swish is used elsewhere"),
        (
            "u = Add(x, three)  c = Clip(u, zero, six)  y = Mul(c, near)",
            "float[B, 4] y",
            "0 and 1.0002, not to 0 and 1",
        ),
        (
            "u = Add(x, three)  c = Clip(u, zero, six)  m = Mul(x, c)  y = Mul(m, near)",
            "float[B, 4] y",
            "0 and 1.0002, not to 0 and 1",
        ),
        ("c = HardSigmoid<alpha=0.1666667, beta=0.5>(x)  y = Mul(c, x)", "float[B, 4] y", "alpha is 0.166666701, not"),
    ],
)
def test_left_with_reason(body: str, y: str, why: str) -> None:
    rule = RaiseHardSwish()
    model = graph(body, y=y)
    before = op_types(model)
    assert not rule(model).modified
    assert op_types(model) == before
    (site,) = rule.sites
    assert why in site.detail


@pytest.mark.parametrize(
    "body",
    [
        "y = Clip(x, zero, one)",
        "r = Max(x, zero)  y = Min(r, one)",
        "u = Add(x, three)  y = Clip(u, zero, six)",
        "u = Add(x, three)  c = Clip(u, zero, six)  y = Mul(x, c)",
        "u = Add(x, three)  y = Relu(u)",
        "y = HardSigmoid<alpha=0.16666667, beta=0.5>(x)",
        "h = HardSigmoid(x)  y = Mul(h, h)",
        "u = Add(x, three)  c = Clip(u, zero, x0)  y = Div(c, six)",
    ],
)
def test_other_bounds_are_no_sites(body: str) -> None:
    rule = RaiseHardSwish()
    assert not rule(graph(body, x="float[B, 4] x, float x0")).modified
    assert rule.sites == []


def test_overridable_bound_is_no_constant() -> None:
    """An initializer that is a graph input."""
    model = graph(GATES[1], x="float[B, 4] x, float eight")
    rule = RaiseHardSwish()
    assert not rule(model).modified
    assert rule.sites == []


@pytest.mark.parametrize(("dtype", "name"), [("double", "double"), ("bfloat16", "bfloat16")])
def test_left_in_types_without_a_kernel(dtype: str, name: str) -> None:
    rule = RaiseHardSwish()
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 21]> g ({dtype}[B, 4] x) => ({dtype}[B, 4] y) '
        "{ u = Add(x, three)\n c = Clip(u, zero, six)\n y = Div(c, six) }"
    )
    numbers = {"zero": 0.0, "three": 3.0, "six": 6.0}
    code = getattr(onnx.TensorProto, dtype.upper())
    proto.graph.initializer.extend(onnx.helper.make_tensor(k, code, [], [v]) for k, v in numbers.items())
    assert not rule(ir.from_proto(proto)).modified
    assert f"it computes in {name}" in rule.sites[0].detail


@pytest.mark.parametrize("sixth", [True, False])
def test_half_precision(sixth: bool) -> None:
    ort = pytest.importorskip("onnxruntime")
    end = "y = Mul(m, sixth)" if sixth else "y = Div(m, six)"
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21]> g (float16[B, 4] x) => (float16[B, 4] y) '
        f"{{ u = Add(x, three)\n c = Clip(u, zero, six)\n m = Mul(x, c)\n {end} }}"
    )
    numbers = {"zero": 0.0, "three": 3.0, "six": 6.0, "sixth": 1 / 6}
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(np.float16(v), k) for k, v in numbers.items() if (k == "sixth") <= sixth
    )
    model = ir.from_proto(proto)
    assert RaiseHardSwish()(model).modified
    # The float16 next to 1/6 is another number.
    assert op_types(model) == (["HardSigmoid", "Mul"] if sixth else ["HardSwish"])
    feed = {"x": np.random.default_rng(0).normal(0, 3, size=(64, 4)).astype(np.float16)}
    got, expected = (
        ort.InferenceSession(p.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feed)[0].astype(float)
        for p in (ir.to_proto(model), proto)
    )
    np.testing.assert_allclose(got, expected, rtol=2e-3, atol=2e-3)


def test_left_where_a_constant_may_add_an_axis() -> None:
    rule = RaiseHardSwish()
    body = "x = Squeeze(i)  u = Add(x, three1)  c = Clip(u, zero, six)  y = Div(c, six)"
    assert not rule(graph(body, x="float[B] i", y="float[B] y")).modified
    assert "rank isn't known" in rule.sites[0].detail


def test_inside_a_branch_and_across_graphs() -> None:
    text = f"""<ir_version: 11, opset_import: ["" : 21]> g (bool c, float[B, 4] x) => (float[B, 4] y) {CONSTANTS} {{
      o = Add(x, four)
      y = If (c) <
        then_branch = t () => (float[B, 4] ty) {{ a = Add(x, four)  b = Clip(a, zero, eight)  ty = Div(b, eight) }},
        else_branch = f () => (float[B, 4] fy) {{ d = Clip(o, zero, eight)  fy = Div(d, eight) }}
      >
    }}"""
    after = assert_exact(parse("\n".join(text.replace("  ", "\n").splitlines())), RaiseHardSwish())
    node = next(n for n in after.graph if n.op_type == "If")
    branches = [[n.op_type for n in node.attributes[k].as_graph()] for k in ("then_branch", "else_branch")]
    # The Add outside stays, where the condition may keep it from being needed twice.
    assert branches == [["HardSigmoid"], ["HardSigmoid"]]
    assert op_types(after) == ["Add", "If"]


def test_inside_a_function() -> None:
    text = """<ir_version: 10, opset_import: ["" : 21, "f" : 1]> g (float[B, 4] x) => (float[B, 4] y) { y = f.gate(x) }
    <domain: "f", opset_import: ["" : 21]> gate (a) => (b) {
      zero = Constant<value_float = 0.0>()  four = Constant<value_float = 4.0>()  eight = Constant<value_float = 8.0>()
      u = Add(a, four)  c = Clip(u, zero, eight)  b = Div(c, eight)
    }"""
    after = assert_exact(parse("\n".join(text.replace("  ", "\n").splitlines())), RaiseHardSwish())
    (function,) = after.functions.values()
    assert [n.op_type for n in function] == ["HardSigmoid"]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["affine", "bounded", "scaled"]),
            st.floats(-3, 3).filter(lambda f: abs(f) > 1e-2),
            st.floats(-3, 3),
        ),
        max_size=6,
    ),
    st.floats(-5, 5),
)
def test_a_line_is_what_the_chain_computes(steps: list[tuple[str, float, float]], z: float) -> None:
    line, function = Line(), lambda v: v
    for kind, a, b in steps:
        low, high = min(a, b), max(a, b)
        if kind == "scaled":
            line, function = line.scaled(a, b), (lambda v, f=function, a=a, b=b: a * f(v) + b)
        elif kind == "affine":
            line, function = line.of_affine(a, b), (lambda v, f=function, a=a, b=b: f(a * v + b))
        else:
            line = line.of_bounded(low, high)
            function = lambda v, f=function, low=low, high=high: f(min(max(v, low), high))  # noqa: E731
    assert line(z) == pytest.approx(function(z), abs=1e-9, rel=1e-9)


# Adds, clips, products and divisions of PaddlePaddle. `orientation` has HardSwish itself.
REAL = [
    ("ppocr-v4-det", 24, (1, 3, 96, 128), "HardSwish"),
    ("ppocr-v4-rec", 28, (2, 3, 48, 160), "HardSwish"),
    ("ppocr-cls", 18, (2, 3, 48, 192), "HardSwish"),
    ("layout", 94, None, "HardSwish"),
    ("orientation", 0, (1, 3, 224, 224), "HardSwish"),
    ("ppocr-v6-rec", 0, (1, 3, 48, 160), "HardSwish"),
]


@pytest.mark.real
@pytest.mark.parametrize(("key", "sites", "shape", "op_type"), REAL, ids=[case[0] for case in REAL])
def test_real_models(key: str, sites: int, shape: tuple[int, ...] | None, op_type: str) -> None:
    ort = pytest.importorskip("onnxruntime")
    path = catalogue.fetch(key)
    model = ir.load(path)
    ConvertOpset()(model)
    rule = RaiseHardSwish()
    rule(model)
    assert collections.Counter((s.outcome, s.detail) for s in rule.sites) == +collections.Counter(
        {("applied", op_type): sites}
    )
    quiet = ort.SessionOptions()
    quiet.log_severity_level = 3
    sessions = [
        ort.InferenceSession(source, quiet, providers=["CPUExecutionProvider"])
        for source in (str(path), ir.to_proto(model).SerializeToString())
    ]
    rng = np.random.default_rng(0)
    feed = {i.name: rng.normal(size=shape or i.shape).astype(np.float32) for i in sessions[0].get_inputs()}
    before, after = (session.run(None, feed) for session in sessions)
    for one, other in zip(before, after, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-4 * np.max(np.abs(one)) + 5e-7)
