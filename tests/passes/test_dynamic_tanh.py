"""raise-dynamic-tanh and the recogniser behind it: Dynamic Tanh and elementwise LayerNorm."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from exactness import assert_exact, op_types, parse
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.analysis.elementwise_norms import elementwise_norms
from graphopt.passes.raise_.dynamic_tanh import RaiseDynamicTanh
from graphopt.passes.raise_.gelu import RaiseGelu

# Powers of two and small integers: merged, they are the same numbers in float32 as in float64.
CONSTANTS = """<float half = {0.5}, float two = {2.0}, float four = {4.0}, float minus = {-1.0}, float mhalf = {-0.5},
  float one = {1.0}, float c = {3.0}, float[4] g = {1.5, 0.5, -2.0, 4.0}, float[4] b = {0.5, 0.25, -3, 4},
  float[1, 1, 4] g3 = {1.5, 0.5, -2.0, 4.0}, float[4, 4] table = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
  float[4] big = {1e30, 1e30, 1e30, 1e30}>"""
TANH = ["Mul", "Tanh", "Mul", "Add"]
ROOT = ["Mul", "Add", "Sqrt", "Div", "Mul", "Add"]


def graph(body: str, *, x: str = "float[B, 4, 4] x", y: str = "float[B, 4, 4] y") -> ir.Model:
    lines = "\n".join(body.replace("  ", "\n").splitlines())
    return parse(f'<ir_version: 10, opset_import: ["" : 21]> g ({x}) => ({y}) {CONSTANTS} {{ {lines} }}')


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("u = Div(x, two)  t = Tanh(u)  m = Mul(t, g)  y = Add(m, b)", TANH),
        ("v = Mul(x, four)  u = Div(v, two)  t = Tanh(u)  m = Mul(t, g)  y = Add(m, b)", TANH),
        ("u = Mul(x, mhalf)  t = Tanh(u)  m = Mul(t, g)  y = Add(m, b)", TANH),
        ("n = Neg(x)  u = Mul(n, half)  t = Tanh(u)  m = Mul(t, g)  n2 = Neg(m)  y = Add(n2, b)", TANH),
        ("u = Mul(half, x)  t = Tanh(u)  m = Mul(g, t)  y = Sub(m, b)", TANH),
        ("u = Mul(half, x)  t = Tanh(u)  m = Mul(g, t)  y = Sub(b, m)", TANH),
        ("u = Mul(half, x)  t = Tanh(u)  m = Mul(t, g)  a = Add(m, b)  k = Mul(a, two)  y = Add(k, b)", TANH),
        ("u = Mul(half, x)  t = Tanh(u)  a = Add(t, b)  y = Mul(a, g3)", TANH),
        ("n = Neg(x)  t = Tanh(n)  y = Mul(t, g)", ["Tanh", "Mul"]),
        ("q = Pow(x, two)  a = Add(q, c)  s = Sqrt(a)  n = Div(x, s)  m = Mul(n, g)  y = Add(m, b)", ROOT),
        ("q = Mul(x, x)  a = Add(c, q)  s = Pow(a, mhalf)  n = Mul(s, x)  m = Mul(n, g)  y = Add(m, b)", ROOT),
        ("q = Mul(x, x)  a = Add(c, q)  s = Pow(a, half)  r = Reciprocal(s)  n = Mul(s2, r)  y = Mul(n, g)".replace(
            "q = Mul", "s2 = Mul(x, two)  q = Mul"), ROOT[:-1]),
        ("q = Mul(x, x)  k = Mul(q, four)  a = Add(k, c)  s = Sqrt(a)  n = Div(x, s)  m = Mul(n, g)  y = Sub(m, b)", ROOT),
        ("q = Pow(x, two)  a = Add(q, c)  s = Sqrt(a)  y = Div(x, s)", ROOT[:4]),
        ("v = Mul(x, two)  q = Mul(v, v)  a = Add(q, c)  s = Sqrt(a)  y = Div(v, s)", ROOT[:4]),
    ],
)  # fmt: skip
def test_one_form(body: str, expected: list[str]) -> None:
    before = graph(body)
    found = list(elementwise_norms(before))
    assert [norm.kind for norm in found] == ["tanh" if expected is TANH or "Tanh" in expected else "root"]
    after = assert_exact(before, RaiseDynamicTanh())
    assert op_types(after) == expected
    (again,) = elementwise_norms(after)
    assert again.is_canonical
    assert again.constant == found[0].constant
    np.testing.assert_array_equal(again.gain, found[0].gain)
    np.testing.assert_array_equal(again.bias, found[0].bias)


@pytest.mark.parametrize(
    "body",
    [
        "u = Mul(x, half)  t = Tanh(u)  m = Mul(t, g)  y = Add(m, b)",
        "t = Tanh(x)  y = Mul(t, g)",
        "q = Mul(x, x)  a = Add(q, c)  s = Sqrt(a)  n = Div(x, s)  m = Mul(n, g)  y = Add(m, b)",
    ],
)
def test_the_form_itself_stays(body: str) -> None:
    model = graph(body)
    rule = RaiseDynamicTanh()
    assert not rule(model).modified
    assert rule.sites == []
    assert len(list(elementwise_norms(model))) == 1


@pytest.mark.parametrize(
    "body",
    [
        "y = Tanh(x)",
        "u = Mul(x, half)  t = Tanh(u)  m = Mul(t, half)  y = Add(m, half)",  # a sigmoid
        "q = Mul(x, x)  s = Sqrt(q)  y = Div(x, s)",
        "q = Mul(x, x)  a = Add(q, c)  y = Sqrt(a)",
        "q = Mul(x, x)  a = Add(q, x)  s = Sqrt(a)  y = Div(x, s)",
        "q = Mul(x, x)  v = ReduceMean<axes=[-1]>(q)  a = Add(v, c)  s = Sqrt(a)  y = Div(x, s)".replace(
            "<axes=[-1]>", ""
        ),
    ],
)
def test_others_are_no_sites(body: str) -> None:
    model = graph(body)
    assert list(elementwise_norms(model)) == []
    rule = RaiseDynamicTanh()
    assert not rule(model).modified
    assert rule.sites == []


def test_a_gelu_is_no_site() -> None:
    body = """p = Mul(x, x)  q = Mul(p, x)  k = Mul(q, k3)  i = Add(x, k)  u = Mul(i, root)  t = Tanh(u)
      o = Add(t, one)  h = Mul(x, half)  y = Mul(h, o)"""
    lines = "\n".join(line for part in body.splitlines() for line in part.strip().split("  "))
    model = parse(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[B, 4] x) => (float[B, 4] y) '
        f"<float k3 = {{0.044715}}, float root = {{0.7978845608}}, float one = {{1}}, float half = {{0.5}}> {{ {lines} }}"
    )
    assert list(elementwise_norms(model)) == []
    assert RaiseGelu()(model).modified


def test_a_table_of_positions_is_no_bias() -> None:
    body = "u = Div(x, two)  t = Tanh(u)  m = Mul(t, g)  y = Add(m, table)"
    after = assert_exact(graph(body), RaiseDynamicTanh())
    (norm,) = elementwise_norms(after)
    assert norm.root.op_type == "Mul"
    assert op_types(after) == TANH


@pytest.mark.parametrize(
    ("body", "y", "why"),
    [
        ("u = Div(x, two)  t = Tanh(u)  a = Add(t, b)  y = Mul(a, g)", "float[B, 4, 4] y, float[B, 4, 4] u", None),
        (
            "q = Pow(x, two)  a = Add(q, c)  s = Sqrt(a)  y = Div(x, s)",
            "float[B, 4, 4] y, float[B, 4, 4] s",
            "'s' inside it is used elsewhere",
        ),
        (
            "u = Div(x, two)  t = Tanh(u)  m = Mul(t, big)  y = Mul(m, big)",
            "float[B, 4, 4] y",
            "out of the range of float",
        ),
    ],
)
def test_parts_that_are_read_elsewhere(body: str, y: str, why: str | None) -> None:
    model = graph(body, y=y)
    rule = RaiseDynamicTanh()
    if why is None:  # the scale stays outside, and the rest is a site
        assert op_types(assert_exact(model, rule)) == ["Div", "Tanh", "Mul", "Add"]
        return
    assert not rule(model).modified
    assert why in rule.sites[0].detail


def test_left_where_a_constant_may_add_an_axis() -> None:
    rule = RaiseDynamicTanh()
    body = "x = Squeeze(i)  u = Div(x, two)  t = Tanh(u)  a = Add(t, b)  y = Mul(a, g3)"
    assert not rule(graph(body, x="float[B, 4] i", y="float[B, C, D] y")).modified
    assert "rank isn't known" in rule.sites[0].detail


def test_inside_a_branch() -> None:
    text = f"""<ir_version: 10, opset_import: ["" : 21]>
    g (bool cond, float[B, 4] x) => (float[B, 4] y) {CONSTANTS} {{
      y = If (cond) <
        then_branch = p () => (float[B, 4] ty) {{ u = Div(x, two)  t = Tanh(u)  a = Add(t, b)  ty = Mul(a, g) }},
        else_branch = f () => (float[B, 4] fy) {{ fy = Identity(x) }}
      >
    }}"""
    after = assert_exact(parse("\n".join(text.replace("  ", "\n").splitlines())), RaiseDynamicTanh())
    branch = after.graph.node(0).attributes["then_branch"].as_graph()
    assert [n.op_type for n in branch if n.op_type != "Constant"] == TANH


STEPS = {
    "Mul": "Mul({v}, {k})",
    "Add": "Add({v}, {k})",
    "Sub": "Sub({v}, {k})",
    "From": "Sub({k}, {v})",
    "Neg": "Neg({v})",
}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.sampled_from(["g", "b", "two", "half"])), max_size=5),
    st.lists(st.sampled_from(["half", "two", "minus", "mhalf"]), max_size=3),
    st.booleans(),
)
def test_any_order(steps: list[tuple[str, str]], scales: list[str], root: bool) -> None:
    lines, value = [], "x"
    for index, scale in enumerate(scales):
        lines.append(f"u{index} = Mul({value}, {scale})")
        value = f"u{index}"
    if root:
        lines += [f"q = Mul({value}, {value})", "a = Add(q, c)", "s = Sqrt(a)", f"t = Div({value}, s)"]
    else:
        lines += [f"t = Tanh({value})"]
    value = "t"
    for index, (step, constant) in enumerate(steps):
        lines.append(f"v{index} = {STEPS[step].format(v=value, k=constant)}")
        value = f"v{index}"
    after = assert_exact(graph("  ".join([*lines, f"y = Relu({value})"])), RaiseDynamicTanh(), seeds=1)
    assert all(norm.is_canonical for norm in elementwise_norms(after))
