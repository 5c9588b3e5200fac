"""`fold-affine`: what layers take, proved in float64, and what stays with which reason."""

from __future__ import annotations

import collections
import io
import logging
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from exactness import assert_exact, op_types
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.pass_manager import PassManager
from graphopt.passes.fold import layers
from graphopt.passes.fold.affine import FoldAffine
from graphopt.recipe import load

TYPES = {"double": np.float64, "float": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def model(
    graph: str, dtype: str = "double", opset: int = 21, functions: str = "", **weights: tuple[int, ...] | float
) -> ir.Model:
    """A model from text with random weights of the given shapes; a number is a scalar of that value."""
    imports = ', "local" : 1' if functions else ""
    text = f'<ir_version: 10, opset_import: ["" : {opset}{imports}]> g {graph.replace("T[", dtype + "[")} {functions}'
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    for name, shape in weights.items():
        array = rng.normal(size=shape) if isinstance(shape, tuple) else np.array(shape)
        proto.graph.initializer.append(ir.to_proto(ir.tensor(array.astype(TYPES[dtype]), name=name)))
    onnx.checker.check_model(proto, full_check=True)
    return ir.from_proto(proto)


def fold(before: ir.Model, expected: list[str], **options: bool) -> ir.Model:
    after = assert_exact(before, FoldAffine(**options), dims={"N": 2, "S": 3})
    assert op_types(after) == expected
    return after


def reasons(m: ir.Model, **options: bool) -> list[str]:
    """Why the sites of `m` are left; `m` stays as it was."""
    before = ir.to_proto(m).SerializeToString(deterministic=True)
    rule = FoldAffine(**options)
    assert not rule(m).modified
    assert ir.to_proto(m).SerializeToString(deterministic=True) == before
    return [site.detail for site in rule.sites]


# One line a case: the graph, the shapes of its weights, the operators after.
FOLDED: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "a number behind a matrix product": (
        "(T[N,S,4] x) => (T[N,S,6] y) { m = MatMul(x, w)  y = Mul(k, m) }",
        {"w": (4, 6), "k": 0.125},
        ["MatMul"],
    ),
    "LayerScale": (
        "(T[N,S,4] x) => (T[N,S,4] y) { m = MatMul(x, w)  b = Add(m, a)  s = Mul(b, k)  y = Add(x, s) }",
        {"w": (4, 4), "a": (4,), "k": (4,)},
        ["MatMul", "Add", "Add"],
    ),
    "LAuReL": (  # x + α·f(x) + x·A·B, f and the low-rank branch each scaled
        "(T[N,S,4] x) => (T[N,S,4] y) { f = MatMul(x, w)  g = Mul(f, k)  p = MatMul(x, u)  q = MatMul(p, v)"
        "  r = Mul(q, l)  s = Add(g, r)  y = Add(s, x) }",
        {"w": (4, 4), "u": (4, 2), "v": (2, 4), "k": 0.7, "l": 0.3},
        ["MatMul", "MatMul", "MatMul", "Add", "Add"],
    ),
    "constants of a higher rank": (
        "(T[N,S,4] x) => (T[N,S,6] y) { m = MatMul(x, w)  s = Div(m, k)  y = Sub(s, l) }",
        {"w": (4, 6), "k": (1, 1, 6), "l": (1, 6)},
        ["MatMul", "Add"],
    ),
    "subtracted from a constant": (
        "(T[N,4] x) => (T[N,6] y) { m = Gemm(x, w, a)  y = Sub(k, m) }",
        {"w": (4, 6), "a": (6,), "k": (6,)},
        ["Gemm"],
    ),
    "a convolution": (
        "(T[N,4,5] x) => (T[N,6,5] y) { c = Conv<pads = [1, 1]>(x, w)  s = Mul(c, k)  t = Add(s, l)  y = Relu(t) }",
        {"w": (6, 4, 3), "k": 3.0, "l": (6, 1)},
        ["Conv", "Relu"],
    ),
    "a transposed convolution": (
        "(T[N,4,5] x) => (T[N,6,7] y) { c = ConvTranspose(x, w, a)  s = Div(c, k)  y = Sub(s, l) }",
        {"w": (4, 6, 3), "a": (6,), "k": (6, 1), "l": 2.0},
        ["ConvTranspose"],
    ),
    "through what only moves numbers": (
        "(T[2,3,4] x) => (T[2,2,3,3] y) { m = MatMul(x, w)  b = Add(m, a)  f = Constant<value_ints = [2, 3, 2, 3]>()"
        "  r = Reshape(b, f)  t = Transpose<perm = [0, 2, 1, 3]>(r)  y = Mul(t, k) }",
        {"w": (4, 6), "a": (6,), "k": 0.3},
        ["MatMul", "Add", "Reshape", "Transpose"],
    ),
    "channels through a transpose": (
        "(T[N,S,4] x) => (T[N,6,S] y) { m = MatMul(x, w)  t = Transpose<perm = [0, 2, 1]>(m)  y = Mul(t, k) }",
        {"w": (4, 6), "k": (6, 1)},
        ["MatMul", "Transpose"],
    ),
    "channels through a reshape": (
        "(T[2,4,3,5] x) => (T[2,15,6] y) { c = Conv(x, w)  f = Constant<value_ints = [2, 6, 15]>()  r = Reshape(c, f)"
        "  t = Transpose<perm = [0, 2, 1]>(r)  y = Mul(t, k) }",
        {"w": (6, 4, 1, 1), "k": (6,)},
        ["Conv", "Reshape", "Transpose"],
    ),
    "a concatenation of channels": (
        "(T[N,4,5] x) => (T[N,5,5] y) { c = Conv(x, w)  d = Conv(x, u)  e = Concat<axis = 1>(c, d)  s = Mul(e, k)"
        "  y = Add(s, l) }",
        {"w": (3, 4, 1), "u": (2, 4, 1), "k": (5, 1), "l": (5, 1)},
        ["Conv", "Conv", "Concat"],
    ),
    "one part of packed queries, keys and values": (
        "(T[N,S,4] x) => (T[N,S,2] q, T[N,S,3] r) { m = MatMul(x, w)  f = Constant<value_ints = [2, 3]>()"
        "  p, r = Split<axis = -1>(m, f)  q = Mul(p, k) }",
        {"w": (4, 5), "k": 0.5},
        ["MatMul", "Split"],
    ),
    "pooling and an activation": (
        "(T[N,4,6] x) => (T[N,6,3] y) { c = Conv(x, w)  r = Relu(c)"
        "  p = MaxPool<kernel_shape = [2], strides = [2]>(r)  y = Mul(p, k) }",
        {"w": (6, 4, 1), "k": 2.0},
        ["Conv", "Relu", "MaxPool"],
    ),
    "a mean over the image": (
        "(T[N,4,6] x) => (T[N,6,1] y) { c = Conv(x, w)  p = GlobalAveragePool(c)  s = Mul(p, k)  y = Add(s, l) }",
        {"w": (6, 4, 1), "k": (6, 1), "l": (6, 1)},
        ["Conv", "GlobalAveragePool"],
    ),
    "into all readers": (
        "(T[N,S,4] x) => (T[N,S,6] q, T[N,S,3] r) { h = Tanh(x)  s = Mul(h, k)  t = Add(s, l)  q0 = MatMul(t, w)"
        "  q = Add(q0, a)  r0 = MatMul(t, u)  r = Add(b, r0) }",
        {"w": (4, 6), "u": (4, 3), "a": (6,), "b": (3,), "k": (4,), "l": (4,)},
        ["Tanh", "MatMul", "Add", "MatMul", "Add"],
    ),
    "before a convolution without padding": (
        "(T[N,4,5] x) => (T[N,6,3] y) { s = Sub(x, l)  d = Div(s, k)  y = Conv(d, w) }",
        {"w": (6, 4, 3), "k": (1, 4, 1), "l": (4, 1)},
        ["Conv"],
    ),
    "a scale before a padded convolution": (
        "(T[N,4,5] x) => (T[N,6,5] y) { r = Relu(x)  s = Mul(r, k)  y = Conv<pads = [1, 1]>(s, w) }",
        {"w": (6, 4, 3), "k": (4, 1)},
        ["Relu", "Conv"],
    ),
    "a scale that the shift keeps from a padded convolution": (
        "(T[N,4,5] x) => (T[N,6,5] y) { r = Relu(x)  s = Mul(r, k)  t = Add(s, l)  y = Conv<pads = [1, 1]>(t, w) }",
        {"w": (6, 4, 3), "k": 0.5, "l": (4, 1)},
        ["Relu", "Add", "Conv"],
    ),
    "a shift that would be added to more numbers": (
        "(T[N,4] x) => (T[N,9] y) { r = Relu(x)  s = Div(r, k)  t = Sub(s, l)  y = MatMul(t, w) }",
        {"w": (4, 9), "k": (4,), "l": 1.5},
        ["Relu", "Add", "MatMul"],
    ),
    "before one token's layer": (
        "(T[N,3,4] x) => (T[N,6] y) { r = Tanh(x)  s = Mul(r, k)  i = Constant<value = int64 {0}>()"
        "  t = Gather<axis = 1>(s, i)  y = Gemm(t, w) }",
        {"w": (4, 6), "k": (4,)},
        ["Tanh", "Gather", "Gemm"],
    ),
    "before a split of channels": (
        "(T[N,5] x) => (T[N,6] y, T[N,7] z) { r = Tanh(x)  s = Mul(r, k)  f = Constant<value_ints = [2, 3]>()"
        "  p, q = Split<axis = 1>(s, f)  y = MatMul(p, w)  z = MatMul(q, u) }",
        {"w": (2, 6), "u": (3, 7), "k": (5,)},
        ["Tanh", "Split", "MatMul", "MatMul"],
    ),
    "two scales and two shifts": (
        "(T[N,4] x) => (T[N,4] y) { a = Mul(x, k)  b = Div(a, l)  c = Add(b, l)  d = Sub(c, k)  y = Tanh(d) }",
        {"k": (4,), "l": 3.0},
        ["Mul", "Add", "Tanh"],
    ),
    "one that another fold frees, across a view": (
        "(T[N,4] x) => (T[N,1,6] y) { d = Div(x, k)  i = Constant<value_ints = [1]>()  u = Unsqueeze(d, i)"
        "  t = Add(u, l)  m = MatMul(t, w)  y = Add(m, a) }",
        {"w": (4, 6), "a": (6,), "k": (4,), "l": 1.5},
        ["Unsqueeze", "MatMul", "Add"],
    ),
    "a value whose shape is read": (
        "(T[N,S,4] x) => (T[N,S,6] y, int64[3] z) { m = MatMul(x, w)  z = Shape(m)  y = Mul(m, k) }",
        {"w": (4, 6), "k": 2.0},
        ["MatMul", "Shape"],
    ),
}


@pytest.mark.parametrize("case", FOLDED)
def test_folds(case: str) -> None:
    graph, weights, expected = FOLDED[case]
    fold(model(graph, **weights), expected)


@pytest.mark.parametrize("case", ["LayerScale", "into all readers", "a concatenation of channels"])
def test_large_weights_are_lazy(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.graph.computed.LAZY_BYTES", 0)
    monkeypatch.setattr(layers, "_CHUNK", 5)
    graph, weights, expected = FOLDED[case]
    after = fold(model(graph, **weights), expected)
    assert isinstance(after.graph.initializers["w"].const_value, ir.LazyTensor)


SCORES = (
    "(T[N,S,4] x) => (T[N,2,S,S] y) { q = MatMul(x, w)  b = Add(q, a)  f = Constant<value_ints = [0, 0, 2, 2]>()"
    "  r = Reshape(b, f)  t = Transpose<perm = [0, 2, 1, 3]>(r)  k = MatMul(x, u)  s = Reshape(k, f)"
    "  v = Transpose<perm = [0, 2, 3, 1]>(s)  %s  y = Softmax(m) }"
)


@pytest.mark.parametrize(
    "scaled", ["p = MatMul(t, v)  m = Div(p, d)", "p = Mul(t, d)  o = Mul(d, v)  m = MatMul(p, o)"]
)
def test_the_scale_of_attention_only_where_asked(scaled: str) -> None:
    m = model(SCORES % scaled, w=(4, 4), u=(4, 4), a=(4,), d=1.4)
    assert {"attention" in why for why in reasons(m)} == {True}
    fold(
        m,
        ["MatMul", "Add", "Reshape", "Transpose", "MatMul", "Reshape", "Transpose", "MatMul", "Softmax"],
        attention=True,
    )


LEFT: dict[str, tuple[str, dict[str, Any], str]] = {
    "read elsewhere": (
        "(T[N,4] x) => (T[N,6] y, T[N,6] z) { m = MatMul(x, w)  y = Mul(m, k)  z = Tanh(m) }",
        {"w": (4, 6), "k": (6,)},
        "before it: 'm' is read by 2 nodes",
    ),
    "a graph output in between": (
        "(T[N,4] x) => (T[N,6] y, T[N,6] m) { m = MatMul(x, w)  y = Mul(m, k) }",
        {"w": (4, 6), "k": (6,)},
        "before it: 'm' is a graph output",
    ),
    "shared by three": (
        "(T[N,4] x, T[N,4] u) => (T[N,6] y, T[N,6] z, T[N,6] t)"
        " { m = MatMul(x, w)  y = Mul(m, k)  n = Exp(x)  z = MatMul(n, w)  t = MatMul(u, w) }",
        {"w": (4, 6), "k": (6,)},
        "the weights of MatMul '' are shared with 2 other nodes",
    ),
    "computed weights": (
        "(T[N,4] x, T[6,4,1] w) => (T[N,6,1] y) { i = Constant<value_ints = [2]>()  u = Unsqueeze(x, i)"
        "  m = Conv(u, w)  y = Mul(m, k) }",
        {"k": (6, 1)},
        "the weights of Conv '' aren't constant",
    ),
    "a division by zero": (
        "(T[N,4] x) => (T[N,6] y) { m = MatMul(x, w)  y = Div(m, k) }",
        {"w": (4, 6), "k": 0.0},
        "it divides by 0",
    ),
    "a logarithm's epsilon": (
        "(T[N,4] x) => (T[N,6] y) { m = Gemm(x, w, a)  e = Add(m, k)  y = Log(e) }",
        {"w": (4, 6), "a": (6,), "k": 1e-20},
        "the bias of Gemm '' would swallow the 1e-20 that is added",
    ),
    "a logarithm's epsilon behind another constant": (
        "(T[N,4] x) => (T[N,4] y) { m = Add(x, one)  e = Add(m, k)  y = Log(e) }",
        {"one": 1.0, "k": 1e-20},
        "one of the two constants would swallow the other",
    ),
    "a shift before padding": (
        "(T[N,4,5] x) => (T[N,6,5] y) { t = Add(x, k)  y = Conv<pads = [1, 1]>(t, w) }",
        {"w": (6, 4, 3), "k": (4, 1)},
        "pads its input with zeros",
    ),
    "a shift that would be more additions": (
        "(T[N,4] x) => (T[N,5] y, T[N,5] z) { t = Add(x, k)  y = MatMul(t, w)  z = MatMul(t, u) }",
        {"w": (4, 5), "u": (4, 5), "k": (4,)},
        "additions to more numbers",
    ),
    "a residual connection behind": (
        "(T[N,4] x) => (T[N,4] y) { h = Tanh(x)  t = Mul(h, k)  m = MatMul(t, w)  y = Add(t, m) }",
        {"w": (4, 4), "k": (4,)},
        "Add '' has no weights to fold into",
    ),
    "packed queries that are a graph output too": (
        "(T[N,4] x) => (T[N,2] q, T[N,3] r, T[N,5] m) { m = MatMul(x, w)  f = Constant<value_ints = [2, 3]>()"
        "  p, r = Split<axis = -1>(m, f)  q = Mul(p, k) }",
        {"w": (4, 5), "k": 0.5},
        "'m' is a graph output",
    ),
    "a GELU that is written out": (
        "(T[N,4] x) => (T[N,6] y) { d = Mul(x, k)  e = Erf(d)  p = Add(e, one)  m = Mul(x, p)  h = Mul(m, half)"
        "  y = MatMul(h, w) }",
        {"w": (4, 6), "k": 0.70710678, "one": 1.0, "half": 0.5},
        "it ends a GELU that is written out",
    ),
    "a normalization that is written out": (
        "(T[N,4] x, T[N,1] v) => (T[N,6] y) { r = Sqrt(v)  d = Div(x, r)  h = Mul(d, k)  y = MatMul(h, w) }",
        {"w": (4, 6), "k": (4,)},
        "it ends a normalization that is written out",
    ),
    "a column broadcast to channels": (
        "(T[N,P] x) => (T[N,6] y) { h = Tanh(x)  t = Mul(h, k)  y = MatMul(t, w) }",
        {"w": (4, 6), "k": (4,)},
        "isn't known to have 4 channels",
    ),
}


@pytest.mark.parametrize("case", LEFT)
def test_left_with_its_reason(case: str) -> None:
    graph, weights, expected = LEFT[case]
    (why,) = reasons(model(graph, **weights))
    assert expected in why


SILENT: dict[str, tuple[str, dict[str, Any]]] = {
    # The pre-activation unit: scale and shift read the sum of the skip, and an activation reads them.
    "pre-activation residual unit": (
        "(T[N,4,5] x, T[N,4,5] z) => (T[N,4,5] y) { c = Add(x, z)  s = Mul(c, k)  t = Add(s, l)  r = Relu(t)"
        "  d = Conv(r, w)  y = Add(c, d) }",
        {"w": (4, 4, 1), "k": (4, 1), "l": (4, 1)},
    ),
    "the skip of LAuReL, which the branch reads too": (
        "(T[N,4] x) => (T[N,4] y) { h = MatMul(x, w)  r = Tanh(h)  s = Mul(h, k)  y = Add(r, s) }",
        {"w": (4, 4), "k": 0.5},
    ),
    "a hard swish": (
        "(T[N,4] x) => (T[N,6] y) { m = MatMul(x, w)  t = Add(m, three)  c = Relu(t)  y = Mul(m, c) }",
        {"w": (4, 6), "three": 3.0},
    ),
    "times zero": ("(T[N,4] x) => (T[N,6] y) { m = MatMul(x, w)  y = Mul(m, k) }", {"w": (4, 6), "k": 0.0}),
    "a number a row": ("(T[3,4] x) => (T[3,6] y) { m = MatMul(x, w)  y = Mul(m, k) }", {"w": (4, 6), "k": (3, 1)}),
    "positions": ("(T[3,4] x) => (T[3,4] y) { t = Add(x, k)  y = MatMul(t, w) }", {"w": (4, 4), "k": (3, 4)}),
    "a constant that widens": (
        "(T[N,4] x) => (T[1,N,6] y) { m = MatMul(x, w)  y = Mul(m, k) }",
        {"w": (4, 6), "k": (1, 1, 6)},
    ),
    "a negative scale behind an activation": (
        "(T[N,4] x) => (T[N,6] y) { m = Gemm(x, w)  r = Relu(m)  y = Mul(r, k) }",
        {"w": (4, 6), "k": -2.0},
    ),
    "a shift and then a scale": ("(T[N,4] x) => (T[N,4] y) { a = Add(x, k)  y = Mul(a, k) }", {"k": (4,)}),
    "divided by a value": ("(T[N,4] x) => (T[N,6] y) { m = MatMul(x, w)  y = Div(k, m) }", {"w": (4, 6), "k": 2.0}),
}


@pytest.mark.parametrize("case", SILENT)
def test_no_site(case: str) -> None:
    graph, weights = SILENT[case]
    assert reasons(model(graph, **weights)) == []


def test_a_bias_stays_where_it_is() -> None:
    graph = "(T[N,4] x) => (T[N,5] y) { m = MatMul(x, w)  a = Add(m, b)  y = MatMul(a, u) }"
    assert reasons(model(graph, w=(4, 4), b=(4,), u=(4, 5))) == []


@pytest.mark.parametrize("dtype", ["float", "float16", "bfloat16"])
def test_weights_are_rounded_once(dtype: str) -> None:
    m = model(
        "(T[N,4] x) => (T[N,6] y) { m = MatMul(x, w)  s = Mul(m, k)  y = Add(s, l) }",
        dtype,
        w=(4, 6),
        k=(6,),
        l=(6,),
    )
    w, k, shift = (m.graph.initializers[name].const_value.numpy() for name in "wkl")
    assert FoldAffine()(m).modified
    product, addition = m.graph
    got = product.inputs[1].const_value.numpy()
    assert got.dtype == TYPES[dtype]
    np.testing.assert_array_equal(got, (w.astype(np.float64) * k.astype(np.float64)).astype(TYPES[dtype]))
    np.testing.assert_array_equal(addition.inputs[1].const_value.numpy(), shift)


@pytest.mark.parametrize(
    ("number", "weight", "why"), [(6e4, 100.0, "would overflow float16"), (1e-6, 1e-2, "would lose precision")]
)
def test_float16_that_cannot_hold_the_product(number: float, weight: float, why: str) -> None:
    m = model("(T[N,4] x) => (T[N,6] y) { m = MatMul(x, w)  y = Mul(m, k) }", "float16", w=(4, 6), k=number)
    m.graph.initializers["w"].const_value = ir.tensor(np.full((4, 6), weight, np.float16), name="w")
    (reason,) = reasons(m)
    assert why in reason


def test_float16_constants_that_cannot_be_merged() -> None:
    m = model("(T[N,4] x) => (T[N,4] y) { a = Mul(x, k)  y = Mul(a, l) }", "float16", k=1e3, l=1e3)
    assert reasons(m) == ["its constant and the one before would leave FLOAT16"]


def test_overridable_constants() -> None:
    m = model("(T[N,4] x) => (T[N,6] y) { m = MatMul(x, w)  y = Mul(m, k) }", w=(4, 6), k=0.5)
    m.graph.inputs.append(m.graph.initializers["k"])
    assert reasons(m) == []


def test_in_subgraphs_and_functions() -> None:
    m = model(
        """(T[N,4] x, bool c) => (T[P,Q] y) {
        y = If(c) <then_branch = yes () => (T[P,Q] p) { m = MatMul(x, w)  p = Mul(m, k) },
            else_branch = no () => (T[P,Q] p) { p = Relu(x) }> }""",
        w=(4, 4),
        k=0.5,
    )
    for chosen in (True, False):
        feeds = {"x": np.random.default_rng(1).normal(size=(2, 4)), "c": np.array(chosen)}
        after = assert_exact(m, FoldAffine(), feeds=feeds)
    yes = next(iter(after.graph)).attributes["then_branch"].as_graph()
    assert [n.op_type for n in yes] == ["MatMul"]
    outer = model(
        """(T[N,4] x, bool c) => (T[P,Q] y) { m = MatMul(x, w)
        y = If(c) <then_branch = yes () => (T[P,Q] p) { p = Mul(m, k) },
            else_branch = no () => (T[P,Q] p) { p = Relu(x) }> }""",
        w=(4, 4),
        k=(4,),
    )
    assert reasons(outer) == ["before it: MatMul '' is in an outer graph"]
    function = """<domain: "local", opset_import: ["" : 21]> Block (x) => (y) {
        w = Constant<value = double[2,2] {3, 1, 2, 4}>()  k = Constant<value = double {2}>()
        l = Constant<value = double[2] {5, 6}>()  m = MatMul(x, w)  s = Mul(m, k)  y = Mul(s, l) }"""
    after = assert_exact(model("(T[N,2] x) => (T[N,2] y) { y = local.Block(x) }", functions=function), FoldAffine())
    (block,) = after.functions.values()
    assert [n.op_type for n in block if n.op_type != "Constant"] == ["MatMul"]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.sampled_from(["Mul", "Div", "Add", "Sub", "from"]), st.sampled_from(["()", "(4,)", "(1, 4)"])),
        min_size=1,
        max_size=6,
    ),
    st.booleans(),
    st.booleans(),
    st.integers(0, 9),
)
def test_any_chain_goes_into_the_layer_before_it(
    steps: list[tuple[str, str]], bias: bool, commuted: bool, seed: int
) -> None:
    """Whatever the chain of constants, one layer with its bias is left."""
    rng = np.random.default_rng(seed)
    sizes = {"()": (), "(4,)": (4,), "(1, 4)": (1, 4)}
    text, weights, last = "m = MatMul(x, w)", {"w": (3, 4)}, "m"
    if bias:
        text, last, weights["a"] = text + "  b = Add(m, a)", "b", (4,)
    for i, (kind, size) in enumerate(steps):
        operands = [last, f"k{i}"]
        if kind == "from" or (commuted and kind in ("Mul", "Add")):
            operands.reverse()
        text += f"  v{i} = {kind.replace('from', 'Sub')}({', '.join(operands)})"
        last, weights[f"k{i}"] = f"v{i}", sizes[size]
    m = model(f"(T[N,S,3] x) => (T[N,S,4] y) {{ {text}  y = Tanh({last}) }}", **weights)
    for value in m.graph.initializers.values():
        shape = value.const_value.shape.numpy()
        value.const_value = ir.tensor(rng.uniform(0.5, 2, shape) * rng.choice([-1, 1], shape), name=value.name)
    after = assert_exact(m, FoldAffine(), dims={"N": 2, "S": 3}, seeds=1, rtol=1e-11)
    assert op_types(after) in (["MatMul", "Add", "Tanh"], ["MatMul", "Tanh"])


# ---- what exporters write


class _Scaled:
    """LayerScale, a learned residual scalar, and an element-wise norm, as a network."""

    def __new__(cls) -> Any:
        import torch
        from torch import nn

        class Block(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.alpha, self.gain, self.shift = (nn.Parameter(torch.rand(n) + 0.5) for n in (1, 8, 8))
                self.up, self.gate, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8, bias=False)
                self.gamma, self.beta = nn.Parameter(torch.rand(8)), nn.Parameter(torch.rand(()))

            def forward(self, x: Any) -> Any:
                h = torch.tanh(self.alpha * x) * self.gain + self.shift
                return x + self.gamma * self.beta * self.down(torch.relu(self.gate(h)) * self.up(h))

        torch.manual_seed(0)
        return nn.Sequential(Block(), Block()).eval()


@pytest.mark.export
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("script", [False, True], ids=["torch.export", "TorchScript"])
def test_what_exporters_write(script: bool) -> None:
    torch = pytest.importorskip("torch")
    network, x = _Scaled(), torch.randn(2, 3, 8)
    logging.disable(logging.WARNING)
    try:
        if script:
            buffer = io.BytesIO()
            torch.onnx.export(network, (x,), buffer, dynamo=False, opset_version=17)
            m = ir.from_proto(onnx.load_from_string(buffer.getvalue()))
        else:
            m = ir.from_proto(torch.onnx.export(network, (x,), dynamo=True, opset_version=20).model_proto)
    finally:
        logging.disable(logging.NOTSET)
    PassManager(load().passes(), verifier_of=None)(m)
    rule = FoldAffine()
    rule(m)
    counts = collections.Counter(op_types(m))
    assert counts["Mul"] == 4  # the gates, and the scales in the tanh, whose input is the residual
    assert counts["Add"] + counts["Sum"] == 6  # two biases and a residual a block
    assert [site.detail for site in rule.sites if site.outcome == "left"] == []
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(ir.to_proto(m).SerializeToString(), providers=["CPUExecutionProvider"])
    got = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    np.testing.assert_allclose(got, network(x).detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.real
@pytest.mark.parametrize(
    ("key", "least", "size"), [("ppocr-v4-rec", 100, (2, 3, 48, 160)), ("ppocr-cls", 10, (2, 3, 48, 192))]
)
def test_real_model(key: str, least: int, size: tuple[int, ...]) -> None:
    """Scales and shifts of PaddlePaddle's activations: ÷ 6 of hard swishes, learned affine blocks."""
    onnxruntime = pytest.importorskip("onnxruntime")
    from graphopt.models import catalogue

    m = ir.load(catalogue.fetch(key))
    before = ("lift-constants", "simplify-shapes", "convert-opset", "fold-constants", "fold-batch-norm")
    PassManager(load({"passes": list(before)}).passes(), verifier_of=None)(m)
    data = np.random.default_rng(0).normal(size=size).astype(np.float32)
    results = []
    for _ in range(2):
        session = onnxruntime.InferenceSession(ir.to_proto(m).SerializeToString(), providers=["CPUExecutionProvider"])
        results.append(session.run(None, {m.graph.inputs[0].name: data})[0])
        rule = FoldAffine()
        rule(m)
        applied = sum(site.outcome == "applied" for site in rule.sites)
        assert applied >= least if len(results) == 1 else applied == 0
    np.testing.assert_allclose(results[1], results[0], rtol=1e-4, atol=2e-5)
