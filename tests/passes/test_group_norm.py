"""raise-group-norm and expand-group-norm: the forms of both sides, and what stays."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from exactness import assert_exact, op_types, parse

from graphopt.passes.lower.expand_group_norm import ExpandGroupNorm
from graphopt.passes.raise_.group_norm import RaiseGroupNorm

FIVE = ["InstanceNormalization", "Reshape", "Reshape", "Mul", "Add"]
CONSTANTS = """<int64[3] rows = {0, 2, -1}, int64[3] each = {0, 6, -1}, int64[5] split = {0, 2, 3, 0, -1},
  int64[4] shape4 = {2, 6, 4, 5}, float[2] ones = {1, 1}, float[2] zeros = {0, 0}, float[6] ones6 = {1, 1, 1, 1, 1, 1},
  float[6] zeros6 = {0, 0, 0, 0, 0, 0}, float[2] s = {2, 0.5}, float[2] t = {1, -1},
  float[6, 1, 1] g = {1.5, 0.5, -2, 3, 1, 2}, float[1, 6, 1, 1] b = {0.1, 0.2, -0.3, 1, 2, 3},
  float[1, 2, 3, 1, 1] g5 = {1.5, 0.5, -2, 3, 1, 2}, float[2, 3, 1, 1] b5 = {0.1, 0.2, -0.3, 1, 2, 3},
  float[2, 1] gr = {3, 4}, float two = {2}, float[5] w = {1, 2, 3, 4, 5}>"""
NORM = "r = Reshape(x, rows)  n = InstanceNormalization<epsilon=0.001>(r, ones, zeros)"
BACK = "h = Shape(x)  k = Reshape(n, h)"


def graph(
    body: str, *, opset: int = 21, x: str = "float[B, 6, H, W] x", y: str = "float[B, 6, H, W] y", more: str = ""
) -> ir.Model:
    lines = "\n".join(body.replace("  ", "\n").splitlines())
    return parse(f'<ir_version: 10, opset_import: ["" : {opset}]> g ({x}) => ({y}) {CONSTANTS} {{ {lines} }} {more}')


FORMS = [
    f"{NORM}  {BACK}  m = Mul(k, g)  y = Add(m, b)",
    f"{NORM}  {BACK}  m = Mul(g, k)  y = Add(b, m)",
    f"{NORM}  {BACK}  y = Mul(k, g)",
    f"{NORM}  {BACK}  y = Add(k, b)",
    f"{NORM}  {BACK}  m = Mul(k, two)  y = Add(m, b)",
    f"{NORM}  h = Shape(x)  y = Reshape(n, h)",
    "r = Reshape(x, rows)  n = InstanceNormalization(r, s, t)  h = Shape(x)  y = Reshape(n, h)",
    "r = Reshape(x, rows)  n = InstanceNormalization(r, s, zeros) " + f" {BACK}  y = Add(k, b)",
    f"{NORM}  q = Mul(n, gr)  h = Shape(x)  k = Reshape(q, h)  y = Add(k, b)",
    "r = Reshape(x, split)  n = InstanceNormalization(r, ones, zeros)  p = Mul(n, g5)  q = Add(p, b5)  h = Shape(x)  "
    "y = Reshape(q, h)",
]


@pytest.mark.parametrize("body", FORMS)
def test_raise(body: str) -> None:
    after = assert_exact(graph(body), RaiseGroupNorm())
    assert op_types(after) == ["GroupNormalization"]
    assert after.graph.node(0).attributes["num_groups"].value == 2
    assert [value.shape for value in after.graph.node(0).inputs[1:]] == [ir.Shape([6])] * 2
    again = assert_exact(after, ExpandGroupNorm())
    # A gain of ones and a bias of zeros aren't written.
    plain = {op for op, value in zip(("Mul", "Add"), after.graph.node(0).inputs[1:], strict=True)
             if (value.const_value.numpy() == (op == "Mul")).all()}  # fmt: skip
    assert sorted(op_types(again)) == sorted(op for op in [*FIVE, "Shape"] if op not in plain)


def test_gain_that_was_already_taken_stays_behind() -> None:
    body = f"r = Reshape(x, rows)  n = InstanceNormalization(r, s, zeros)  {BACK}  m = Mul(k, g)  y = Add(m, b)"
    assert op_types(assert_exact(graph(body), RaiseGroupNorm())) == ["GroupNormalization", "Mul", "Add"]


def test_gain_over_positions_stays_behind() -> None:
    model = graph(f"{NORM}  {BACK}  y = Mul(k, w)", x="float[B, 6, 4, 5] x", y="float[B, 6, 4, 5] y")
    assert op_types(assert_exact(model, RaiseGroupNorm())) == ["GroupNormalization", "Mul"]


@pytest.mark.parametrize("operator", [True, False])
def test_a_group_for_each_channel_is_an_instance_norm(operator: bool) -> None:
    body = f"r = Reshape(x, each)  n = InstanceNormalization(r, ones6, zeros6)  {BACK}  m = Mul(k, g)  y = Add(m, b)"
    for opset in (17, 21):
        after = assert_exact(graph(body, opset=opset), RaiseGroupNorm(operator))
        assert op_types(after) == ["InstanceNormalization"]


@pytest.mark.parametrize("body", FORMS)
def test_without_the_operator_nothing_changes(body: str) -> None:
    rule = RaiseGroupNorm(operator=False)
    assert not rule(graph(body)).modified
    assert rule.sites == []


@pytest.mark.parametrize(
    ("body", "options", "why"),
    [
        (FORMS[0], {"opset": 17}, "needs opset 21"),
        (FORMS[0], {"y": "float[B, 6, H, W] y, float[B, 2, N] n"}, "isn't reshaped back"),
        (f"{NORM}  y = Relu(n)", {"y": "float[B, 2, N] y"}, "isn't reshaped back"),
        (
            f"{NORM}  k = Reshape(n, shape4)  m = Mul(k, g)  y = Add(m, b)",
            {"y": "float[2, 6, 4, 5] y"},
            "isn't reshaped to",
        ),
        (FORMS[0].replace("ones", "o"), {"x": "float[B, 6, H, W] x, float[2] o"}, "aren't constant"),
    ],
)
def test_left_with_reason(body: str, options: dict[str, object], why: str) -> None:
    rule = RaiseGroupNorm()
    model = graph(body, **options)
    before = op_types(model)
    assert not rule(model).modified
    assert op_types(model) == before
    (site,) = rule.sites
    assert why in site.detail


@pytest.mark.parametrize(
    ("body", "x", "y"),
    [
        ("y = InstanceNormalization(x, ones6, zeros6)", "float[B, 6, H, W] x", "float[B, 6, H, W] y"),
        (FORMS[0], "float[B, C, H, W] x", "float[B, C, H, W] y"),
    ],
)
def test_others_are_no_sites(body: str, x: str, y: str) -> None:
    rule = RaiseGroupNorm()
    assert not rule(graph(body, x=x, y=y)).modified
    assert rule.sites == []


@pytest.mark.parametrize("shape", ["B, 6, H, W", "B, 6, L", "B, 6, D, H, W"])
@pytest.mark.parametrize("constant", [True, False])
def test_expand(shape: str, constant: bool) -> None:
    more = "" if constant else ", float[6] v, float[6] u"
    body = f"y = GroupNormalization<num_groups=2, epsilon=0.001>(x, {'ones6, zeros6' if constant else 'v, u'})"
    after = assert_exact(graph(body, x=f"float[{shape}] x{more}", y=f"float[{shape}] y"), ExpandGroupNorm())
    assert [op for op in op_types(after) if op in ("InstanceNormalization", "Mul", "Add")] == (
        [FIVE[0]] if constant else [FIVE[0], "Mul", "Add"]
    )
    assert op_types(after).count("Reshape") == (2 if constant else 4)


def test_expand_leaves_an_unknown_rank() -> None:
    rule = ExpandGroupNorm()
    body = "z = Reshape(x, d)  y = GroupNormalization<num_groups=2>(z, ones6, zeros6)"
    assert not rule(graph(body, x="float[N] x, int64[R] d")).modified
    assert "rank of its input isn't known" in rule.sites[0].detail


def test_expand_leaves_the_operator_of_opset_18() -> None:
    """Its gain and bias are those of groups; the ONNX checker calls it deprecated, convert-opset brings it to 21."""
    lines = "y = GroupNormalization<num_groups=2>(x, s, b)"
    text = "g (float[B, 6, H, W] x, float[2] s, float[2] b) => (float[B, 6, H, W] y)"
    rule = ExpandGroupNorm()
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 18]> {text} {{ {lines} }}')
    assert not rule(ir.from_proto(proto)).modified
    assert "before opset 21" in rule.sites[0].detail


def test_expand_leaves_float64() -> None:
    text = "g (double[B, 6, H, W] x, double[6] s, double[6] b) => (double[B, 6, H, W] y)"
    rule = ExpandGroupNorm()
    head = '<ir_version: 10, opset_import: ["" : 21]>'
    assert not rule(parse(f"{head} {text} {{ y = GroupNormalization<num_groups=2>(x, s, b) }}")).modified
    assert "computes in double" in rule.sites[0].detail


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_all_forms_agree_in_onnx_runtime(dtype: type) -> None:
    ort = pytest.importorskip("onnxruntime")
    name = {np.float32: "float", np.float16: "float16"}[dtype]
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 21]> g ({name}[B, 6, H, W] x) => ({name}[B, 6, H, W] y) '
        "{ y = GroupNormalization<num_groups=2>(x, s, b) }"
    )
    rng = np.random.default_rng(0)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(rng.normal(size=6).astype(dtype), k) for k in "sb")
    expanded = ir.from_proto(proto)
    assert ExpandGroupNorm()(expanded).modified
    raised = expanded.clone()
    assert RaiseGroupNorm()(raised).modified
    assert op_types(raised) == ["GroupNormalization"]
    feed = {"x": rng.normal(1, 2, size=(2, 6, 7, 5)).astype(dtype)}
    first, *others = (
        ort.InferenceSession(p.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feed)[0].astype(float)
        for p in (proto, ir.to_proto(expanded), ir.to_proto(raised))
    )
    tolerance = 20 * float(np.finfo(dtype).eps)
    for other in others:
        np.testing.assert_allclose(other, first, rtol=tolerance, atol=tolerance)


def test_inside_a_branch_and_back() -> None:
    text = f"""<ir_version: 10, opset_import: ["" : 21]>
    g (bool c, float[B, 6, H, W] x) => (float[B, 6, H, W] y) {CONSTANTS} {{
      y = If (c) <
        then_branch = p () => (float[B, 6, H, W] ty) {{ {NORM}  {BACK}  m = Mul(k, g)  ty = Add(m, b) }},
        else_branch = f () => (float[B, 6, H, W] fy) {{ fy = Identity(x) }}
      >
    }}"""
    after = assert_exact(parse("\n".join(text.replace("  ", "\n").splitlines())), RaiseGroupNorm())
    branch = after.graph.node(0).attributes["then_branch"].as_graph()
    assert [n.op_type for n in branch] == ["GroupNormalization"]
    assert_exact(after, ExpandGroupNorm())
