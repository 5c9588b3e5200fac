"""raise-silu and expand-swish: the spellings on both sides of opset 24, and what stays."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from exactness import assert_exact, op_types, parse, reference_outputs

from graphopt.passes.lower.expand_swish import ExpandSwish
from graphopt.passes.raise_.silu import RaiseSilu

CONSTANTS = """<float one = {1.0}, float minus = {-1.0}, float alpha = {1.702}, float malpha = {-1.702}, float zero = {0.0},
  float three = {3.0}, float[1] one1 = {1.0}>"""
SPELLINGS = [
    "s = Sigmoid(x)  y = Mul(x, s)",
    "s = Sigmoid(x)  y = Mul(s, x)",
    "m = Neg(x)  e = Exp(m)  p = Add(e, one)  y = Div(x, p)",
    "m = Mul(x, minus)  e = Exp(m)  p = Add(one, e)  y = Div(x, p)",
    "m = Sub(zero, x)  e = Exp(m)  p = Add(one, e)  y = Div(x, p)",
    "m = Neg(x)  e = Exp(m)  p = Add(one, e)  r = Reciprocal(p)  y = Mul(x, r)",
    "m = Neg(x)  e = Exp(m)  p = Add(one, e)  r = Div(one, p)  y = Mul(r, x)",
    "u = Mul(x, one)  s = Sigmoid(u)  y = Mul(x, s)",
    "u = Mul(x, one1)  s = Sigmoid(u)  y = Mul(x, s)",
]
SCALED = [
    "u = Mul(x, alpha)  s = Sigmoid(u)  y = Mul(x, s)",
    "u = Mul(alpha, x)  s = Sigmoid(u)  y = Mul(s, x)",
    "u = Mul(x, malpha)  e = Exp(u)  p = Add(e, one)  y = Div(x, p)",
    "w = Neg(x)  u = Mul(alpha, w)  e = Exp(u)  p = Add(e, one)  y = Div(x, p)",
]


def graph(body: str, *, opset: int = 24, x: str = "float[B, 4] x", y: str = "float[B, 4] y") -> ir.Model:
    lines = "\n".join(body.replace("  ", "\n").splitlines())
    return parse(f'<ir_version: 11, opset_import: ["" : {opset}]> g ({x}) => ({y}) {CONSTANTS} {{ {lines} }}')


@pytest.mark.parametrize("body", SPELLINGS)
def test_spellings_at_opset_24(body: str) -> None:
    after = assert_exact(graph(body), RaiseSilu())
    assert op_types(after) == ["Swish"]
    assert "alpha" not in after.graph.node(0).attributes


@pytest.mark.parametrize("body", SPELLINGS)
def test_spellings_below_opset_24(body: str) -> None:
    assert op_types(assert_exact(graph(body, opset=17), RaiseSilu())) == ["Sigmoid", "Mul"]


@pytest.mark.parametrize("body", SPELLINGS)
def test_no_operator_where_it_would_be_expanded_again(body: str) -> None:
    assert op_types(assert_exact(graph(body), RaiseSilu(operator=False))) == ["Sigmoid", "Mul"]


@pytest.mark.parametrize("body", SCALED)
def test_alpha_at_opset_24(body: str) -> None:
    after = assert_exact(graph(body), RaiseSilu())
    assert op_types(after) == ["Swish"]
    assert after.graph.node(0).attributes["alpha"].value == pytest.approx(1.702)


@pytest.mark.parametrize("body", SCALED)
def test_alpha_below_opset_24(body: str) -> None:
    assert op_types(assert_exact(graph(body, opset=17), RaiseSilu())) == ["Mul", "Sigmoid", "Mul"]


def test_sigmoid_spelled_out() -> None:
    after = assert_exact(graph("m = Neg(x)  e = Exp(m)  p = Add(e, one)  y = Reciprocal(p)"), RaiseSilu())
    assert op_types(after) == ["Sigmoid"]


def test_gate_over_another_value_stays_a_product() -> None:
    body = "m = Neg(x)  e = Exp(m)  p = Add(e, one)  y = Div(z, p)"
    model = graph(body, x="float[B, 4] x, float[B, 4] z")
    assert op_types(assert_exact(model, RaiseSilu())) == ["Sigmoid", "Mul"]


def test_overflow_of_the_exponential() -> None:
    before = graph(SPELLINGS[2])
    after = before.clone()
    RaiseSilu()(after)
    feed = {"x": np.float32([[-1000.0, -100.0, 100.0, 1000.0]])}
    with np.errstate(over="ignore"):
        for model in (before, after):
            np.testing.assert_allclose(reference_outputs(model, feed)[0], [[0.0, 0.0, 100.0, 1000.0]], atol=1e-40)


@pytest.mark.parametrize(
    ("body", "y", "why"),
    [
        ("s = Sigmoid(x)  y = Mul(x, s)", "float[B, 4] y, float[B, 4] s", "'s' inside the SiLU is used elsewhere"),
        (
            "m = Neg(x)  e = Exp(m)  p = Add(e, one)  y = Div(x, p)",
            "float[B, 4] y, float[B, 4] e",
            "'e' inside the sigmoid is used elsewhere",
        ),
        ("u = Div(x, three)  s = Sigmoid(u)  y = Mul(x, s)", "float[B, 4] y", "isn't a float32"),
    ],
)
def test_left_with_reason(body: str, y: str, why: str) -> None:
    rule = RaiseSilu()
    assert not rule(graph(body, y=y)).modified
    (site,) = rule.sites
    assert why in site.detail


def test_left_where_a_constant_may_add_an_axis() -> None:
    rule = RaiseSilu()
    model = graph("x = Squeeze(i)  u = Mul(x, one1)  s = Sigmoid(u)  y = Mul(x, s)", x="float[B] i", y="float y")
    assert not rule(model).modified
    assert "rank isn't known" in rule.sites[0].detail


@pytest.mark.parametrize(
    "body", ["y = Sigmoid(x)", "y = Exp(x)", "s = Sigmoid(x)  y = Mul(z, s)", "s = Sigmoid(x)  y = Mul(s, s)"]
)
def test_other_gates_are_no_sites(body: str) -> None:
    rule = RaiseSilu()
    assert not rule(graph(body, x="float[B, 4] x, float[B, 4] z")).modified
    assert rule.sites == []


@pytest.mark.parametrize(
    ("swish", "expected"),
    [("Swish(x)", ["Sigmoid", "Mul"]), ("Swish<alpha=1.702>(x)", ["Mul", "Sigmoid", "Mul"])],
)
def test_expand(swish: str, expected: list[str]) -> None:
    after = assert_exact(graph(f"y = {swish}"), ExpandSwish())
    assert op_types(after) == expected


def test_expand_without_a_known_type() -> None:
    after = assert_exact(graph("h = Identity(x)  k = Swish<alpha=2.0>(h)  y = Identity(k)"), ExpandSwish())
    assert "CastLike" in op_types(after)


@pytest.mark.parametrize("body", SPELLINGS + SCALED)
def test_raise_and_expand_give_back_the_canonical_form(body: str) -> None:
    model = graph(body)
    RaiseSilu()(model)
    assert_exact(model, ExpandSwish())


def test_inside_a_branch() -> None:
    text = f"""<ir_version: 11, opset_import: ["" : 24]> g (bool c, float[B, 4] x) => (float[B, 4] y) {CONSTANTS} {{
      y = If (c) <
        then_branch = t () => (float[B, 4] ty) {{ m = Neg(x)  e = Exp(m)  p = Add(e, one)  ty = Div(x, p) }},
        else_branch = f () => (float[B, 4] fy) {{ fy = Identity(x) }}
      >
    }}"""
    after = assert_exact(parse(text), RaiseSilu())
    branch = after.graph.node(0).attributes["then_branch"].as_graph()
    assert [n.op_type for n in branch] == ["Swish"]


def test_argument_is_not_taken_from_a_later_copy() -> None:
    """The copy that the product reads is made after the Sigmoid, or in a subgraph, so the Sigmoid can't read it."""
    body = "u = Mul(x, one)  s = Sigmoid(u)  c = Identity(x)  y = Mul(c, s)"
    assert op_types(assert_exact(graph(body, opset=17), RaiseSilu())) == ["Sigmoid", "Identity", "Mul"]


@pytest.mark.parametrize("outer", ["y = Div(e, p)", "y = Div(p, p)", "f = Exp(m)  y = Div(f, p)"])
def test_left_where_an_exponential_is_divided(outer: str) -> None:
    """e^80 / (1 + e^80) is 1, but e^80 · Sigmoid(-80) is 0 in float32 kernels."""
    rule = RaiseSilu()
    model = graph(f"m = Neg(x)  e = Exp(m)  p = Add(e, one)  {outer}")
    assert not rule(model).modified
    assert "an exponential is divided" in rule.sites[0].detail
