"""lower-attention: both forms, masks of every kind, heads that share keys, caches, and where nothing is done."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from exactness import RTOL_FLOAT64, assert_exact, op_types, parse, parse_weighted
from fake_profiles import fake
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graphopt.passes.lower.attention import LowerAttention

HEAD = '<ir_version: 10, opset_import: ["": 23]>'
SPELLED, OPERATOR = "spelled-out", "attention"


def heads(operands: str, body: str, result: str = "float[B, 2, S, 3] y", constants: str = "") -> ir.Model:
    return parse(f"{HEAD} g ({operands}) => ({result}) {f'<{constants}>' if constants else ''} {{ {body} }}")


def encoder(attributes: str = "scale = 0.5", target: str = "0, 0, 6", result: str = "float[B, S, 6] y") -> ir.Model:
    """One attention between the views that split heads off and merge them."""
    return parse(f"""{HEAD} g (float[B, S, 6] q, float[B, S, 6] k, float[B, S, 6] v) => ({result})
        <int64[4] split = {{0, 0, 2, 3}}, int64[3] join = {{{target}}}> {{
        q3 = Reshape(q, split)
        q4 = Transpose <perm = [0, 2, 1, 3]> (q3)
        k3 = Reshape(k, split)
        k4 = Transpose <perm = [0, 2, 1, 3]> (k3)
        v3 = Reshape(v, split)
        v4 = Transpose <perm = [0, 2, 1, 3]> (v3)
        o4 = Attention <{attributes}> (q4, k4, v4)
        o3 = Transpose <perm = [0, 2, 1, 3]> (o4)
        y = Reshape(o3, join)
    }}""")


QKV = "float[B, 2, S, 3] q, float[B, 2, T, 3] k, float[B, 2, T, 3] v"


def test_heads_are_left_to_the_operator() -> None:
    after = assert_exact(encoder(), LowerAttention(OPERATOR))
    assert op_types(after) == ["Attention"]
    (node,) = after.graph
    assert node.attributes["q_num_heads"].as_int() == node.attributes["kv_num_heads"].as_int() == 2


def test_a_merge_that_leaves_one_axis_open() -> None:
    assert op_types(assert_exact(encoder(target="0, 0, -1"), LowerAttention(OPERATOR))) == ["Attention"]


def test_heads_stay_where_something_else_reads_them() -> None:
    before = heads(
        "float[B, S, 6] x",
        "h = Reshape(x, split) q = Transpose <perm = [0, 2, 1, 3]> (h) r = Relu(q) o = Attention(r, q, q) "
        "p = Transpose <perm = [0, 2, 1, 3]> (o) y = Reshape(p, join)",
        "float[B, S, 6] y",
        "int64[4] split = {0, 0, 2, 3}, int64[3] join = {0, 0, 6}",
    )
    rule = LowerAttention(OPERATOR)
    assert op_types(assert_exact(before, rule)) == op_types(before)
    assert rule.sites == []


def test_another_merge_isnt_taken() -> None:
    before = encoder(target="0, -1, 3", result="float[B, N, 3] y")
    assert op_types(assert_exact(before, LowerAttention(OPERATOR))) == op_types(before)


def test_spelled_out_transposes_the_keys_once() -> None:
    after = assert_exact(encoder(), LowerAttention(SPELLED))
    assert op_types(after).count("Transpose") == 4
    assert sorted(set(op_types(after))) == ["MatMul", "Mul", "Reshape", "Softmax", "Transpose"]
    assert [list(n.attributes["perm"].as_ints()) for n in after.graph if n.op_type == "Transpose"].count(
        [0, 2, 3, 1]
    ) == 1


def test_merged_heads_are_split_off() -> None:
    before = parse(f"""{HEAD} g (float[2, 5, 8] q, float[2, 4, 4] k, float[2, 4, 6] v) => (float[2, 5, 12] y) {{
        y = Attention <q_num_heads = 4, kv_num_heads = 2, scale = 0.5> (q, k, v)
    }}""")
    assert "Attention" not in op_types(assert_exact(before, LowerAttention(SPELLED)))
    assert op_types(assert_exact(before, LowerAttention(OPERATOR))) == ["Attention"]


def test_a_scale_of_one_is_no_product() -> None:
    after = assert_exact(encoder("scale = 1.0"), LowerAttention(SPELLED))
    assert "Mul" not in op_types(after)


def test_float16_is_scaled_first() -> None:
    before = parse(f"""{HEAD} g (float16[1, 2, 3, 4] q, float16[1, 2, 3, 4] k, float16[1, 2, 3, 4] v)
        => (float16[1, 2, 3, 4] y) {{ y = Attention <scale = 0.25> (q, k, v) }}""")
    after = assert_exact(before, LowerAttention(SPELLED), rtol=2e-3)
    assert op_types(after) == ["Mul", "Transpose", "MatMul", "Softmax", "MatMul"]


def test_a_finite_mask_needs_no_guard() -> None:
    before = heads(
        f"{QKV}, bool[B, 1, S, T] seen",
        "m = Where(seen, zero, hidden) y = Attention <scale = 0.5> (q, k, v, m)",
        constants="float zero = {0}, float hidden = {-3e38}",
    )
    after = assert_exact(before, LowerAttention(SPELLED), dims={"T": 4})
    assert op_types(after) == ["Where", "Transpose", "MatMul", "Mul", "Add", "Softmax", "MatMul"]


def test_queries_that_see_nothing_give_0() -> None:
    before = heads(f"{QKV}, bool[B, 1, S, T] seen", "y = Attention <scale = 0.5> (q, k, v, seen)")
    rng = np.random.default_rng(0)
    feeds: dict[str, Any] = {n: rng.normal(size=(2, 2, 3, 3)).astype(np.float32) for n in "qkv"}
    feeds["seen"] = np.ones((2, 1, 3, 3), dtype=bool)
    feeds["seen"][0, 0, 1] = feeds["seen"][1, 0, 2, 1:] = False
    after = assert_exact(before, LowerAttention(SPELLED), feeds=feeds)
    assert op_types(after).count("Where") == 2


def test_a_constant_mask_that_hides_no_query() -> None:
    before = heads(
        "float[B, 1, 2, 3] q",
        "y = Attention <scale = 0.5> (q, q, q, seen)",
        "float[B, 1, 2, 3] y",
        "bool[2, 2] seen = {1, 0, 1, 1}",
    )
    assert op_types(assert_exact(before, LowerAttention(SPELLED))).count("Where") == 1


def test_layers_share_what_is_made_of_the_mask() -> None:
    before = heads(
        f"{QKV}, bool[B, 1, S, T] seen",
        "a = Attention <scale = 0.5, is_causal = 1> (q, k, v, seen) "
        "y = Attention <scale = 0.5, is_causal = 1> (a, k, v, seen)",
    )
    after = assert_exact(before, LowerAttention(SPELLED), dims={"T": 4})
    operators = op_types(after)
    assert [operators.count(o) for o in ("LessOrEqual", "And", "ReduceMax", "Equal", "Where", "Softmax")] == [
        1, 1, 1, 1, 3, 2
    ]  # fmt: skip


def test_a_cache() -> None:
    before = heads(
        f"{QKV}, float[B, 2, P, 3] pk, float[B, 2, P, 3] pv",
        "y, nk, nv = Attention <scale = 0.5, is_causal = 1> (q, k, v, , pk, pv)",
        "float[B, 2, S, 3] y, float[B, 2, N, 3] nk, float[B, 2, N, 3] nv",
    )
    for past in (0, 2):
        after = assert_exact(before, LowerAttention(SPELLED), dims={"P": past, "S": 2, "T": 2})
        assert op_types(after).count("Concat") == 2
    assert [v.name for v in after.graph.outputs] == ["y", "nk", "nv"]


def test_a_cache_behind_heads_that_the_operator_splits() -> None:
    before = parse(f"""{HEAD} g (float[B, S, 6] q, float[B, S, 6] k, float[B, S, 6] v, float[B, 2, P, 3] pk,
        float[B, 2, P, 3] pv) => (float[B, S, 6] y, float[B, 2, N, 3] nk, float[B, 2, N, 3] nv)
        <int64[4] split = {{0, 0, 2, 3}}, int64[3] join = {{0, 0, 6}}> {{
        q3 = Reshape(q, split)
        q4 = Transpose <perm = [0, 2, 1, 3]> (q3)
        k3 = Reshape(k, split)
        k4 = Transpose <perm = [0, 2, 1, 3]> (k3)
        v3 = Reshape(v, split)
        v4 = Transpose <perm = [0, 2, 1, 3]> (v3)
        o4, nk, nv = Attention <is_causal = 1> (q4, k4, v4, , pk, pv)
        o3 = Transpose <perm = [0, 2, 1, 3]> (o4)
        y = Reshape(o3, join)
    }}""")
    after = assert_exact(before, LowerAttention(OPERATOR), dims={"P": 2})
    assert op_types(after) == ["Attention"]
    assert [v.name for v in after.graph.outputs] == ["y", "nk", "nv"]


def test_in_a_branch() -> None:
    before = parse(f"""{HEAD} g (bool c, float[1, 2, 3, 4] x) => (float[1, 2, 3, 4] y) {{
        y = If (c) <
            then_branch = t () => (float[1, 2, 3, 4] u) {{ u = Attention <scale = 0.5, is_causal = 1> (x, x, x) }},
            else_branch = e () => (float[1, 2, 3, 4] w) {{ w = Attention <scale = 0.5, is_causal = 1> (x, x, x) }}
        >
    }}""")
    after = assert_exact(before, LowerAttention(SPELLED))
    assert all("Attention" not in [n.op_type for n in graph] for graph in after.graph.subgraphs())


@pytest.mark.parametrize(
    ("attributes", "operands", "outputs", "reason"),
    [
        ("scale = 0.5, qk_matmul_output_mode = 1", "q, k, v", "y, , , s", "scores are read"),
        ("scale = 0.5", "q, k, v, m", "y", "its mask covers 2 keys"),
        ("scale = 0.5", "q, k, v, n", "y", "its mask is INT32"),
    ],
)
def test_left_with_the_reason(attributes: str, operands: str, outputs: str, reason: str) -> None:
    proto = onnx.parser.parse_model(f"""{HEAD} g ({QKV}, float[S, 2] m, int32[S, T] n)
        => (float[B, 2, S, 3] y, float[B, 2, S, T] s) {{ {outputs} = Attention <{attributes}> ({operands})
        }}""")
    if "s" not in outputs:
        del proto.graph.output[1]
    model = ir.from_proto(proto)
    rule = LowerAttention(SPELLED)
    assert not rule(model).modified
    assert [reason in site.detail for site in rule.sites] == [True]


def test_the_profile_decides() -> None:
    before = parse(
        f"""{HEAD} g (float[1, 2, 3, 128] x) => (float[1, 2, 3, 128] y) {{ y = Attention <scale = 0.25> (x, x, x) }}"""
    )
    rule = LowerAttention()
    rule.profile = fake("attention", 0.8, alternative="spelled-out")
    assert "Softmax" in op_types(assert_exact(before, rule))
    rule.profile = fake("attention", 1.2, alternative="spelled-out")
    assert op_types(assert_exact(before, rule)) == ["Attention"]


def test_an_older_runtime_only_where_every_query_sees_a_key() -> None:
    plain = "y = Attention <scale = 0.5> (q, k, v)"
    hidden = "y = Attention <scale = 0.5> (q, k, v, seen)"
    rule = LowerAttention()
    old = fake("attention", 1.25, alternative="spelled-out")
    rule.profile = dataclasses.replace(old, runtime="Some Runtime 1.27")
    for body, operator in ((plain, True), (hidden, False)):
        before = heads(f"{QKV}, bool[B, 1, S, T] seen".replace("3]", "128]"), body, "float[B, 2, S, 128] y")
        assert ("Attention" in op_types(assert_exact(before, rule, dims={"T": 4}))) is operator


SHAPES = ("S, T", "1, 1, S, T", "B, 1, S, T", "B, H, S, T", "1, H, S, T", "B, 1, 1, T", "1, T", "H, S, T")


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_attention(data: st.DataObject) -> None:
    draw = data.draw
    batch, queries, keys, kv = (draw(st.integers(1, 3)) for _ in range(4))
    groups, depth, value_depth = (draw(st.integers(1, 3)) for _ in range(3))
    past = draw(st.sampled_from((0, 0, 2)))
    count, total = kv * groups, keys + past
    sizes = {"B": batch, "H": count, "S": queries, "T": total}
    merged = draw(st.booleans())
    if merged:
        shapes = [(batch, queries, count * depth), (batch, keys, kv * depth), (batch, keys, kv * value_depth)]
    else:
        shapes = [(batch, count, queries, depth), (batch, kv, keys, depth), (batch, kv, keys, value_depth)]
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    feeds: dict[str, Any] = {n: rng.normal(size=s).astype(np.float32) for n, s in zip("qkv", shapes, strict=True)}
    kind = draw(st.sampled_from(("", "float", "infinite", "bool")))
    causal = draw(st.booleans())
    if kind:
        # The evaluator makes the causal part as long as the mask, so that one for all queries hides too much.
        shapes_left = [s for s in SHAPES if "S, T" in s or not causal]
        shape = [int(sizes.get(n, 1)) for n in draw(st.sampled_from(shapes_left)).split(", ")]
        seen = rng.random(size=shape) < 0.6
        numbers = rng.normal(size=shape) if kind == "float" else np.where(seen, rng.normal(size=shape), -np.inf)
        feeds["m"] = seen if kind == "bool" else numbers.astype(np.float32)
    if past:
        feeds["pk"] = rng.normal(size=(batch, kv, past, depth)).astype(np.float32)
        feeds["pv"] = rng.normal(size=(batch, kv, past, value_depth)).astype(np.float32)
    attributes: dict[str, Any] = {}
    written = draw(st.booleans())
    if written:
        attributes["scale"] = draw(st.sampled_from((1.0, 0.3)))
    if draw(st.booleans()):
        attributes["softcap"] = 1.5
    if causal:
        attributes["is_causal"] = 1
    if merged:
        attributes |= {"q_num_heads": count, "kv_num_heads": kv}
    names = ["q", "k", "v", "m" if kind else "", *(("pk", "pv") if past else ())]
    while not names[-1]:
        names.pop()
    outputs = ["y", "nk", "nv"] if past else ["y"]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Attention", names, outputs, **attributes)],
        "g",
        [
            onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
            for n, a in feeds.items()
        ],
        [
            onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [None] * (3 if merged and n == "y" else 4))
            for n in outputs
        ],
    )
    before = ir.from_proto(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=10)
    )
    # A scale that isn't written is one over a root, rounded to float32 in the graph.
    rtol = RTOL_FLOAT64 if written else 1e-6
    after = assert_exact(before, LowerAttention(SPELLED), feeds=feeds, seeds=1, rtol=rtol)
    assert "Attention" not in op_types(after)


def packed(mask: str = "") -> ir.Model:
    """The layers, the heads and the attention of an encoder."""
    weights = ", ".join(f"float[8, 8] w{c}, float[8] b{c}" for c in "qkv")
    lines = " ".join(
        f"{c}0 = MatMul(x, w{c}) {c}1 = Add({c}0, b{c}) {c}3 = Reshape({c}1, split) "
        f"{c}4 = Transpose <perm = [0, 2, 1, 3]> ({c}3)"
        for c in "qkv"
    )
    return parse_weighted(f"""{HEAD} g (float[3, 5, 8] x{mask and ", bool[3, 1, 5, 5] seen"}) => (float[3, 5, 8] y)
        <int64[4] split = {{0, 0, 2, 4}}, int64[3] join = {{0, 0, 8}}, float zero = {{0}}, float hidden = {{-3e38}},
        {weights}> {{ {mask} {lines}
        o4 = Attention <scale = 0.5> (q4, k4, v4{mask and ", m"})
        o3 = Transpose <perm = [0, 2, 1, 3]> (o4)
        y = Reshape(o3, join)
    }}""")


def equal_in_runtime(before: ir.Model, after: ir.Model, feeds: dict[str, Any]) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    first, second = (
        onnxruntime.InferenceSession(ir.to_proto(m).SerializeToString(), providers=["CPUExecutionProvider"]).run(
            None, feeds
        )[0]
        for m in (before, after)
    )
    np.testing.assert_allclose(second, first, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mask", ["", "m = Where(seen, zero, hidden)"])
def test_layers_heads_and_attention_as_one_operator(mask: str) -> None:
    before = packed(mask)
    after = before.clone()
    assert LowerAttention("contrib-attention")(after).modified
    assert op_types(after) == (["Where", "Attention"] if mask else ["Attention"])
    assert after.graph.node(-1).domain == "com.microsoft"
    assert after.graph.opset_imports["com.microsoft"] == 1
    assert {v.const_value.shape.numpy() for v in after.graph.initializers.values() if v.const_value.size > 1} == {
        (8, 24), (24,)
    }  # fmt: skip
    rng = np.random.default_rng(0)
    feeds: dict[str, Any] = {"x": rng.normal(size=(3, 5, 8)).astype(np.float32)}
    if mask:
        feeds["seen"] = rng.random(size=(3, 1, 5, 5)) < 0.5
        feeds["seen"][1, 0, 2] = False
    equal_in_runtime(before, after, feeds)
    assert not LowerAttention("contrib-attention")(after).modified


def test_a_mask_that_may_hide_all_keys_stays_with_the_standard_operator() -> None:
    after = packed("m = And(seen, seen)").clone()
    assert LowerAttention("contrib-attention")(after).modified
    assert [n.domain for n in after.graph if n.op_type == "Attention"] == [""]


def test_weights_with_another_reader_stay_where_they_are() -> None:
    before = packed()
    weight = before.graph.initializers["wq"]
    before.graph.append(ir.node("Identity", [weight], name="other"))
    before.graph.outputs.append(before.graph.node("other").outputs[0])
    before.graph.outputs[-1].name, before.graph.outputs[-1].type = "out", weight.type
    before.graph.outputs[-1].shape = weight.shape
    after = before.clone()
    assert LowerAttention("contrib-attention")(after).modified
    assert [n.domain for n in after.graph if n.op_type == "Attention"] == [""]
