"""raise-gelu: the spellings, the constants, what stays as it is and why.

The graphs are in float64, where the constants can be written exactly and the result must agree to 1e-12.
"""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from exactness import assert_exact, op_types, parse

from graphopt.passes.raise_.gelu import RaiseGelu

NUMBERS = {
    "root2": math.sqrt(2), "isqrt2": math.sqrt(0.5), "one": 1.0, "half": 0.5, "two": 2.0, "three": 3.0,
    "c": math.sqrt(2 / math.pi), "k": 0.044715, "ck": 0.044715 * math.sqrt(2 / math.pi), "hundred": 100.0,
    "short": 1.41421, "minus": -1.0,
}  # fmt: skip
ERF = "a = Div(x, root2)  t = Erf(a)"
OUTER = "p = Add(t, one)  h = Mul(x, p)  y = Mul(h, half)"


def graph(
    body: str, *, opset: int = 20, kind: str = "double", x: str = "[B, 4] x", y: str = "[B, 4] y", rank1: bool = False
) -> ir.Model:
    text = f'<ir_version: 10, opset_import: ["" : {opset}]> g (double{x}) => (double{y}) {{ {body} }}'
    proto = onnx.parser.parse_model("\n".join(text.replace("double", kind).replace("  ", "\n").splitlines()))
    dtype = {"double": np.float64, "float": np.float32, "float16": np.float16}[kind]
    used = {name for node in proto.graph.node for name in node.input}
    for name, number in NUMBERS.items():
        if name in used:
            array = np.asarray([number] if rank1 else number, dtype=dtype)
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.checker.check_model(proto, full_check=True)
    return ir.from_proto(proto)


def reason(model: ir.Model, double: bool = False) -> str:
    before = op_types(model)
    rule = RaiseGelu(double=double)
    assert not rule(model).modified
    assert op_types(model) == before
    (site,) = rule.sites
    return site.detail


@pytest.mark.parametrize(
    "body",
    [
        f"{ERF} {OUTER}",
        f"a = Mul(isqrt2, x)  t = Erf(a) {OUTER}",
        # torch.export: x (½ (1 + t)); TorchScript: (x (1 + t)) ½; PaddlePaddle, TensorFlow: (½ x) (1 + t).
        f"{ERF} p = Add(one, t)  h = Mul(half, p)  y = Mul(x, h)",
        f"{ERF} p = Add(one, t)  h = Mul(half, x)  y = Mul(h, p)",
        f"{ERF} h = Mul(x, half)  p = Add(t, one)  y = Mul(p, h)",
        f"{ERF} p = Add(one, t)  h = Mul(x, p)  y = Div(h, two)",
        f"{ERF} p = Add(one, t)  h = Div(p, two)  y = Mul(h, x)",
        # Multiplied out.
        f"{ERF} u = Mul(half, t)  p = Add(half, u)  y = Mul(x, p)",
        f"{ERF} u = Mul(x, t)  p = Add(x, u)  y = Mul(p, half)",
        f"{ERF} h = Mul(x, half)  u = Mul(h, t)  y = Add(u, h)",
        # Subtracting −1.
        f"{ERF} p = Sub(t, minus)  h = Mul(x, p)  y = Mul(h, half)",
    ],
)
def test_spellings_of_the_erf_form(body: str) -> None:
    after = assert_exact(graph(body), RaiseGelu())
    assert op_types(after) == ["Gelu"]
    assert "approximate" not in after.graph.node(0).attributes


@pytest.mark.parametrize(
    "argument",
    [
        "q = Pow(x, three)  u = Mul(k, q)  s = Add(x, u)  a = Mul(c, s)",
        "q = Mul(x, x)  r = Mul(q, x)  u = Mul(r, k)  s = Add(u, x)  a = Mul(s, c)",
        "w = Mul(k, x)  q = Mul(x, w)  r = Mul(x, q)  s = Add(x, r)  a = Mul(c, s)",
        # transformers' gelu_fast: x c (1 + k x x).
        "e = Mul(x, c)  w = Mul(k, x)  q = Mul(w, x)  s = Add(one, q)  a = Mul(e, s)",
        # The constants multiplied together: x (c + ck x²).
        "q = Pow(x, two)  u = Mul(q, ck)  s = Add(u, c)  a = Mul(x, s)",
    ],
)
@pytest.mark.parametrize("outer", [OUTER, "p = Add(one, t)  h = Mul(half, p)  y = Mul(x, h)"])
def test_spellings_of_the_tanh_form(argument: str, outer: str) -> None:
    after = assert_exact(graph(f"{argument}  t = Tanh(a)  {outer}"), RaiseGelu(double=True))
    assert op_types(after) == ["Gelu"]
    assert after.graph.node(0).attributes["approximate"].value == "tanh"


@pytest.mark.parametrize("kind", ["float", "float16"])
def test_constants_rounded_to_the_type(kind: str) -> None:
    ort = pytest.importorskip("onnxruntime")
    before = graph(f"{ERF} {OUTER}", kind=kind)
    after = before.clone()
    assert RaiseGelu()(after).modified
    assert op_types(after) == ["Gelu"]
    feed = {"x": np.linspace(-6, 6, 400).reshape(-1, 4).astype(before.graph.inputs[0].dtype.numpy())}
    got, expected = (
        ort.InferenceSession(ir.to_proto(m).SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feed)[0]
        for m in (after, before)
    )
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6 if kind == "float" else 4e-3)


def test_x_that_is_a_sum_itself() -> None:
    # The formula must stop at x = i + half, not run through it.
    body = f"x = Add(i, half) {ERF} {OUTER}"
    assert op_types(assert_exact(graph(body, x="[B, 4] i"), RaiseGelu())) == ["Add", "Gelu"]


def test_constants_of_rank_1() -> None:
    assert op_types(assert_exact(graph(f"{ERF} {OUTER}", rank1=True), RaiseGelu())) == ["Gelu"]


def test_left_where_a_constant_may_add_an_axis() -> None:
    # x may be a scalar, which constants of rank 1 make a vector.
    model = graph(f"x = Squeeze(i) {ERF} {OUTER}", x="[B] i", y=" y", rank1=True)
    assert "may broadcast x, whose rank isn't known" in reason(model)


def test_left_where_an_exponent_may_add_an_axis() -> None:
    body = "x = Squeeze(i)  q = Pow(x, three)  u = Mul(k, q)  s = Add(x, u)  a = Mul(c, s)  t = Tanh(a)"
    proto = ir.to_proto(graph(f"{body}  {OUTER}", x="[B] i", y=" y"))
    for tensor in proto.graph.initializer:
        if tensor.name == "three":
            tensor.dims[:] = [1]
    assert "may broadcast x" in reason(ir.from_proto(proto), double=True)


def test_left_in_float64_by_default() -> None:
    # ONNX Runtime computes Gelu in float64 by the standard's function body, whose 0.044715 is a float32.
    body = "q = Pow(x, three)  u = Mul(k, q)  s = Add(x, u)  a = Mul(c, s)  t = Tanh(a)"
    assert "float64" in reason(graph(f"{body}  {OUTER}"))


def test_left_with_a_short_constant() -> None:
    assert "has the constant 0.707108" in reason(graph(f"a = Div(x, short)  t = Erf(a) {OUTER}", kind="float"))


def test_left_without_the_half() -> None:
    assert "isn't multiplied to ½·x" in reason(graph(f"{ERF} p = Add(t, one)  y = Mul(x, p)"))


def test_left_where_the_erf_is_used_elsewhere() -> None:
    model = graph(f"{ERF} {OUTER}", y="[B, 4] y, double[B, 4] t")
    assert "'t' inside the GELU is used elsewhere" in reason(model)


def test_left_below_opset_20() -> None:
    assert "needs opset 20, the model has 17" in reason(graph(f"{ERF} {OUTER}", opset=17))


@pytest.mark.parametrize(
    "body",
    [
        "y = Erf(x)",
        "y = Tanh(x)",
        "a = Mul(x, hundred)  t = Tanh(a)  p = Add(one, t)  y = Mul(x, p)",
        "a = Mul(x, half)  t = Tanh(a)  p = Add(one, t)  y = Mul(half, p)",  # a sigmoid
    ],
)
def test_other_erf_and_tanh_are_no_sites(body: str) -> None:
    rule = RaiseGelu()
    assert not rule(graph(body)).modified
    assert rule.sites == []


def test_inside_a_branch() -> None:
    text = """<ir_version: 10, opset_import: ["" : 20]> g (bool c, double[B, 4] x) => (double[B, 4] y)
    <double root2 = {1.4142135623730951}, double one = {1.0}, double half = {0.5}> {
      y = If (c) <
        then_branch = t () => (double[B, 4] ty) {
          a = Div(x, root2)  t = Erf(a)  p = Add(t, one)  h = Mul(x, p)  ty = Mul(h, half) },
        else_branch = f () => (double[B, 4] fy) { fy = Identity(x) }
      >
    }"""
    after = assert_exact(parse(text), RaiseGelu())
    branch = after.graph.node(0).attributes["then_branch"].as_graph()
    assert [n.op_type for n in branch] == ["Gelu"]


def test_a_long_chain_is_walked_once() -> None:
    chain = "  ".join(f"v{i + 1} = Add(v{i}, v{i})" for i in range(60))
    rule = RaiseGelu()
    assert not rule(graph(f"v0 = Mul(x, half)  {chain}  t = Tanh(v60)  p = Add(t, one)  y = Mul(p, x)")).modified
    assert rule.sites == []
