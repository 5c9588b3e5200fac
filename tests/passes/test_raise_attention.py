from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from exactness import assert_exact, op_types, parse
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.passes.raise_.attention import RaiseAttention

HEAD = '<ir_version: 10, opset_import: ["": 23]>'


def attention_of(model: ir.Model) -> ir.Node:
    found = [node for node in model.graph if node.op_type == "Attention"]
    assert len(found) == 1, op_types(model)
    return found[0]


def raised(text: str, **dims: int) -> ir.Node:
    """The one Attention that the pass makes of a model, which stays equal to 1e-12."""
    return attention_of(assert_exact(parse(text), RaiseAttention(), dims=dims or None))


def reason(text: str) -> str:
    model, rule = parse(text), RaiseAttention()
    assert not rule(model).modified
    assert len(rule.sites) == 1
    return rule.sites[0].detail


def plain(scores: str, inputs: str = "", weights: str = "w = Softmax <axis = -1> (z)", constants: str = "") -> str:
    """Attention of 4 heads over `scores`, which makes z of the product s."""
    return f"""{HEAD} g (float[b, 4, s, 8] q, float[b, 4, t, 8] k, float[b, 4, t, 6] v{inputs}) => (float[b, 4, s, 6] y)
        <float half = {{0.5}}, float two = {{2.0}}, float four = {{4.0}}, float none = {{0}}{constants}> {{
        kt = Transpose <perm = [0, 1, 3, 2]> (k) s = MatMul(q, kt) {scores} {weights} y = MatMul(w, v) }}"""


LOW = ", float low = {-3.4028234663852886e38}, float ten = {-1e30}, float inf = {-inf}"


@pytest.mark.parametrize(
    ("scores", "scale"),
    [
        ("z = Identity(s)", 1.0),
        ("z = Mul(s, half)", 0.5),
        ("z = Mul(half, s)", 0.5),
        ("z = Div(s, four)", 0.25),
        ("z0 = Div(s, four) z = Mul(z0, half)", 0.125),
    ],
)
def test_scale_at_the_scores(scores: str, scale: float) -> None:
    node = raised(plain(scores))
    assert node.attributes["scale"].as_float() == scale
    assert [v.name for v in node.inputs] == ["q", "k", "v"]


@pytest.mark.parametrize(
    ("mask", "inputs", "kind"),
    [
        ("z = Add(s, m)", ", float[b, 1, s, t] m", "FLOAT"),
        ("z = Add(m, s)", ", float[s, t] m", "FLOAT"),
        ("z = Sub(s, m)", ", float[b, 4, s, t] m", "FLOAT"),
        ("z = Add(s, m)", ", float[b, 1, 1, t] m", "FLOAT"),
        ("z0 = Mul(s, half) z1 = Add(z0, m) z = Div(z1, two)", ", float[b, 1, s, t] m", "FLOAT"),
        ("z0 = Add(s, m) z = Add(z0, n)", ", float[4, s, t] m, float[b, 1, 1, t] n", "FLOAT"),
        ("z = Where(m, s, ten)", ", bool[b, 1, s, t] m", "FLOAT"),
        ("z = Where(m, ten, s)", ", bool[b, 1, s, t] m", "FLOAT"),
        ("n = Where(m, none, ten) z = Add(s, n)", ", bool[b, 1, s, t] m", "FLOAT"),
        ("z0 = Where(m, s, ten) z = Add(z0, n)", ", bool[b, 1, s, t] m, float[b, 1, 1, t] n", "FLOAT"),
        ("z0 = Where(m, s, ten) z = Where(n, s0, z0) s0 = Identity(ten)", ", bool[b, 1, s, t] m, bool[t] n", "FLOAT"),
    ],
)
def test_masks(mask: str, inputs: str, kind: str) -> None:
    if "s0 = Identity" in mask:
        mask = "s0 = Identity(ten) " + mask.replace(" s0 = Identity(ten)", "").replace("Where(n, s0", "Where(n, ten")
    node = raised(plain(mask, inputs, constants=LOW), b=2, s=3, t=5)
    assert node.inputs[3] is not None
    model = node.graph
    assert model is not None


def infinite(guard: bool) -> tuple[ir.Model, dict[str, np.ndarray]]:
    weights = "w = Softmax <axis = -1> (z)"
    if guard:
        weights = "p = Softmax <axis = -1> (z) n = IsNaN(p) w = Where(n, none, p)"
    model = parse(plain("z = Where(m, s, inf)", ", bool[b, 1, s, t] m", weights, LOW))
    rng = np.random.default_rng(0)
    feeds = {name: rng.normal(size=(2, 4, n, d)).astype(np.float32) for name, n, d in
             (("q", 3, 8), ("k", 5, 8), ("v", 5, 6))}  # fmt: skip
    feeds["m"] = rng.random((2, 1, 3, 5)) < 0.5
    feeds["m"][..., 0] = True
    return model, feeds


@pytest.mark.parametrize("guard", [False, True])
def test_minus_infinity_is_a_boolean_mask(guard: bool) -> None:
    model, feeds = infinite(guard)
    if guard:
        feeds["m"][0, 0, 1] = False  # a query that sees nothing gets zeros
    node = attention_of(assert_exact(model, RaiseAttention(), feeds=feeds))
    assert node.inputs[3] is not None
    assert node.inputs[3].name == "m"


def test_weights_set_to_zero_where_the_scores_were_hidden() -> None:
    weights = "p = Softmax <axis = -1> (z) w = Where(m, p, none)"
    node = raised(plain("z = Where(m, s, ten)", ", bool[b, 1, s, t] m", weights, LOW), b=2, s=3, t=5)
    assert node.inputs[3] is not None
    assert node.inputs[3].name == "m"
    assert "weights are set to 0" in reason(
        plain("z = Where(m, s, ten)", ", bool[b, 1, s, t] m, bool[t] n", weights.replace("(m,", "(n,"), LOW)
    )


def test_softcap() -> None:
    node = raised(plain("z0 = Div(s, four) z1 = Tanh(z0) z2 = Mul(z1, two) z = Add(z2, m)", ", float[b, 1, s, t] m"))
    assert node.attributes["softcap"].as_float() == 2.0
    assert node.attributes["scale"].as_float() == 0.5


def test_temperature_multiplies_the_queries() -> None:
    node = raised(plain("z = Mul(s, m)", ", float[4, 1, 1] m"), b=2)
    query = node.inputs[0]
    assert query is not None
    assert query.producer() is not None
    assert query.producer().op_type == "Mul"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (plain("z = Mul(s, m)", ", float[b, 4, s, t] m"), "multiplied by 'm'"),
        (plain("z = Where(m, s, half)", ", bool[b, 1, s, t] m"), "doesn't hide a key"),
        (plain("z0 = Max(s, half) z = Identity(z0)"), "limits the scores"),
        (plain("z = Where(m, s, n)", ", bool[b, 1, s, t] m, float[b, 4, s, t] n"), "isn't one number"),
        (plain("z = Identity(s)", weights="w = Softmax <axis = 1> (z)"), "isn't over one of the last two axes"),
        (plain("z = Identity(s)").replace("(float[b, 4, s, 6] y)", "(float[b, 4, s, 6] y, float[b, 4, s, t] w)"),
         "read elsewhere"),
        (plain("z = Identity(s)").replace("(float[b, 4, s, 6] y)", "(float[b, 4, s, 6] y, float[b, 4, s, t] s)"),
         "is an output of the graph"),
        (plain("z = Identity(s)").replace("float[", "double[").replace("float ", "double "), "computes in DOUBLE"),
        (plain("z = Identity(s)").replace('"": 23', '"": 21'), "needs opset 23"),
    ],
)  # fmt: skip
def test_left_with_a_reason(text: str, words: str) -> None:
    assert words in reason(text)


def test_a_softmax_that_is_no_attention_gets_no_reason() -> None:
    text = f"""{HEAD} g (float[b, 8] x) => (float[b, 8] y) <float[8, 8] w = {{{", ".join(["0.1"] * 64)}}}> {{
        s = MatMul(x, w) y = Softmax(s) }}"""
    model, rule = parse(text), RaiseAttention()
    assert not rule(model).modified
    assert rule.sites == []


@pytest.mark.parametrize(
    "repeat",
    [
        "k5 = Unsqueeze(k, two) e = Constant <value_ints = [1, 1, 3, 1, 1]> () k6 = Expand(k5, e) kr = Reshape(k6, merged)",
        "k5 = Unsqueeze(k, two) e = Constant <value_ints = [1, 1, 3, 1, 1]> () k6 = Tile(k5, e) kr = Reshape(k6, merged)",
        "k5 = Unsqueeze(k, two) k6 = Concat <axis = 2> (k5, k5, k5) kr = Reshape(k6, merged)",
        "e = Constant <value_ints = [0, 0, 0, 1, 1, 1]> () kr = Gather <axis = 1> (k, e)",
    ],
)
def test_grouped_heads(repeat: str) -> None:
    text = f"""{HEAD} g (float[b, 6, s, 8] q, float[b, 2, t, 8] k) => (float[b, 6, s, 8] y)
        <int64[1] two = {{2}}, int64[4] merged = {{0, 6, -1, 8}}> {{
        {repeat} kt = Transpose <perm = [0, 1, 3, 2]> (kr) s = MatMul(q, kt) w = Softmax <axis = -1> (s)
        y = MatMul(w, kr) }}"""
    node = raised(text, b=2, s=3, t=5)
    assert [v.name for v in node.inputs] == ["q", "k", "k"]


def test_heads_repeated_in_another_order() -> None:
    text = f"""{HEAD} g (float[b, 6, s, 8] q, float[b, 2, t, 8] k) => (float[b, 6, s, 8] y) {{
        e = Constant <value_ints = [0, 1, 0, 1, 0, 1]> () kr = Gather <axis = 1> (k, e)
        kt = Transpose <perm = [0, 1, 3, 2]> (kr) s = MatMul(q, kt) w = Softmax <axis = -1> (s) y = MatMul(w, kr) }}"""
    assert "another order than group by group" in reason(text)


def test_one_head_of_keys_is_broadcast_by_the_product() -> None:
    text = f"""{HEAD} g (float[b, 6, s, 8] q, float[b, 1, t, 8] k) => (float[b, 6, s, 8] y) {{
        kt = Transpose <perm = [0, 1, 3, 2]> (k) s = MatMul(q, kt) w = Softmax <axis = -1> (s) y = MatMul(w, k) }}"""
    assert [v.name for v in raised(text, b=2, s=3, t=5).inputs] == ["q", "k", "k"]


CACHE = f"""{HEAD} g (float[b, 4, s, 8] q, float[b, 4, s, 8] k, float[b, 4, s, 8] v, float[b, 4, p, 8] pk, float[b, 4, p, 8] pv)
    => (float[b, 4, s, 8] y, float[b, 4, t, 8] nk, float[b, 4, t, 8] nv) {{
    nk = Concat <axis = 2> (pk, k) nv = Concat <axis = -2> (pv, v) kt = Transpose <perm = [0, 1, 3, 2]> (nk)
    s = MatMul(q, kt) w = Softmax <axis = -1> (s) y = MatMul(w, nv) }}"""


def test_cache() -> None:
    node = raised(CACHE, b=2, s=3, p=5)
    assert [v.name if v else None for v in node.inputs] == ["q", "k", "v", None, "pk", "pv"]
    assert [v.name for v in node.outputs][1:] == ["nk", "nv"]


def test_a_cache_that_something_needs_before_stays_outside() -> None:
    text = CACHE.replace("s = MatMul(q, kt)", "l = Shape(nk) f = Cast <to = 1> (l) r = ReduceMax <keepdims = 0> (f) "
                         "q2 = Add(q, r) s = MatMul(q2, kt)")  # fmt: skip
    node = raised(text, b=2, s=3, p=5)
    assert len(node.inputs) == 3


def test_an_operator_with_repeated_keys_and_a_cache() -> None:
    text = f"""{HEAD} g (float[b, 6, s, 8] q, float[b, 2, s, 8] k, float[b, 2, s, 8] v, float[b, 2, p, 8] pk,
        float[b, 2, p, 8] pv, bool[b, 1, s, t] m) => (float[b, 6, s, 8] y, float[b, 2, t, 8] nk, float[b, 2, t, 8] nv) {{
        e = Constant <value_ints = [0, 0, 0, 1, 1, 1]> ()
        nk = Concat <axis = 2> (pk, k) nv = Concat <axis = 2> (pv, v) kr = Gather <axis = 1> (nk, e)
        vr = Gather <axis = 1> (nv, e) y = Attention <scale = 0.25> (q, kr, vr, m) }}"""
    node = raised(text, b=2, s=3, p=2, t=5)
    assert [v.name if v else None for v in node.inputs] == ["q", "k", "v", "m", "pk", "pv"]
    assert node.attributes["scale"].as_float() == 0.25


@pytest.mark.parametrize(
    "text",
    [
        # heads and batch in one axis, as torch.bmm wants them
        """q1 = Reshape(x, split) q2 = Transpose <perm = [0, 2, 1, 3]> (q1) q3 = Reshape(q2, merged)
           kt = Transpose <perm = [0, 2, 1]> (q3) s = MatMul(q3, kt) w = Softmax <axis = -1> (s) o = MatMul(w, q3)
           o1 = Reshape(o, apart) o2 = Transpose <perm = [0, 2, 1, 3]> (o1) y = Reshape(o2, back)""",
        # the same with a mask at four axes
        """q1 = Reshape(x, split) q2 = Transpose <perm = [0, 2, 1, 3]> (q1) q3 = Reshape(q2, merged)
           kt = Transpose <perm = [0, 2, 1]> (q3) s = MatMul(q3, kt) s1 = Reshape(s, scores) s2 = Add(s1, m)
           s3 = Reshape(s2, scored) w = Softmax <axis = -1> (s3) o = MatMul(w, q3)
           o1 = Reshape(o, apart) o2 = Transpose <perm = [0, 2, 1, 3]> (o1) y = Reshape(o2, back)""",
        # queries and results of a model that keeps the heads last
        """q1 = Reshape(x, split) s = Einsum <equation = "bqhd,bkhd->bhqk"> (q1, q1) w = Softmax <axis = -1> (s)
           o = Einsum <equation = "bhqk,bkhd->bqhd"> (w, q1) y = Reshape(o, back)""",
        """q1 = Reshape(x, split) s = Einsum <equation = "bkhd,bqhd->bhqk"> (q1, q1) w = Softmax <axis = -1> (s)
           o = Einsum <equation = "bhqk,bkhd->bqhd"> (w, q1) y = Reshape(o, back)""",
    ],
)  # fmt: skip
def test_layouts(text: str) -> None:
    model = f"""{HEAD} g (float[2, 5, 24] x, float[2, 1, 5, 5] m) => (float[2, 5, 24] y)
        <int64[4] split = {{2, 5, 4, 6}}, int64[3] merged = {{8, 5, 6}}, int64[4] apart = {{2, 4, 5, 6}},
         int64[3] back = {{2, 5, 24}}, int64[4] scores = {{2, 4, 5, 5}}, int64[3] scored = {{8, 5, 5}}> {{ {text} }}"""
    node = raised(model)
    assert [size for size in (node.inputs[0].shape or ())] in ([2, 4, 5, 6], [])


def test_single_head_on_channels() -> None:
    """SHViT: v · softmax(qᵀ k)ᵀ with positions last."""
    text = f"""{HEAD} g (float[b, 8, n] q, float[b, 8, n] k, float[b, 12, n] v) => (float[b, 12, n] y) {{
        qt = Transpose <perm = [0, 2, 1]> (q) s = MatMul(qt, k) w = Softmax <axis = -1> (s)
        wt = Transpose <perm = [0, 2, 1]> (w) y = MatMul(v, wt) }}"""
    raised(text, b=2, n=5)


def test_softmax_over_the_rows() -> None:
    """Keys times queries, with the mask in that order too."""
    text = f"""{HEAD} g (float[b, 2, s, 8] q, float[b, 2, t, 8] k, float[b, 2, t, 6] v, float[t, s] m)
        => (float[b, 2, 6, s] y) {{ qt = Transpose <perm = [0, 1, 3, 2]> (q) s = MatMul(k, qt) z = Add(s, m)
        w = Softmax <axis = -2> (z) vt = Transpose <perm = [0, 1, 3, 2]> (v) y = MatMul(vt, w) }}"""
    raised(text, b=2, s=3, t=5)


def test_attention_over_channels() -> None:
    """EdgeNeXt: the tokens are what is summed over."""
    text = f"""{HEAD} g (float[b, 4, 6, n] q, float[b, 4, 6, n] k, float[b, 4, 6, n] v, float[4, 1, 1] t)
        => (float[b, 4, 6, n] y) {{ kt = Transpose <perm = [0, 1, 3, 2]> (k) s = MatMul(q, kt) z = Mul(s, t)
        w = Softmax <axis = -1> (z) y = MatMul(w, v) }}"""
    raised(text, b=2, n=5)


def test_windows_with_a_mask_each() -> None:
    """Swin: the mask has one entry a window, the scores are [images · windows, heads, ...]."""
    text = f"""{HEAD} g (float[6, 2, 4, 8] q, float[3, 4, 4] m, float[2, 4, 4] bias) => (float[6, 2, 4, 8] y)
        <int64[5] apart = {{2, 3, 2, 4, 4}}, int64[4] joined = {{6, 2, 4, 4}}, int64[1] one = {{1}}, int64[1] zero = {{0}}> {{
        kt = Transpose <perm = [0, 1, 3, 2]> (q) s = MatMul(q, kt) s0 = Add(s, bias) s1 = Reshape(s0, apart)
        m1 = Unsqueeze(m, one) m2 = Unsqueeze(m1, zero) s2 = Add(s1, m2) s3 = Reshape(s2, joined)
        w = Softmax <axis = -1> (s3) y = MatMul(w, q) }}"""
    raised(text)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_spelling(data: st.DataObject) -> None:
    """Heads merged or not, the scale in up to three places, keys in groups or not, masks: always one operator, equal."""
    b, h, g, s, t, d = 2, data.draw(st.sampled_from([1, 2])), data.draw(st.sampled_from([1, 2])), 3, 4, 6
    heads = h * g
    lines, constants = [], ["float half = {0.5}", f"int64[4] qs = {{{b}, {s}, {heads}, {d}}}",
                            f"int64[4] ks = {{{b}, {t}, {h}, {d}}}", f"int64[4] kr = {{{b}, {heads}, {t}, {d}}}",
                            f"int64[5] ke = {{{b}, {h}, {g}, {t}, {d}}}", f"int64[3] qm = {{{b * heads}, {s}, {d}}}",
                            f"int64[3] km = {{{b * heads}, {t}, {d}}}", f"int64[4] sa = {{{b}, {heads}, {s}, {t}}}",
                            f"int64[3] sm = {{{b * heads}, {s}, {t}}}", f"int64[4] oa = {{{b}, {heads}, {s}, {d}}}",
                            "int64[1] two = {2}"]  # fmt: skip

    def scaled(name: str) -> str:
        if data.draw(st.booleans()):
            lines.append(f"{name}h = Mul({name}, half)")
            return name + "h"
        return name

    def step(name: str, expression: str) -> str:
        lines.append(f"{name} = {expression}")
        return name

    q = scaled(step("q1", f"Reshape({scaled('q')}, qs)"))
    q = scaled(step("q2", f"Transpose <perm = [0, 2, 1, 3]> ({q})"))
    operands = []
    for name in ("k", "v"):
        value = step(f"{name}1", f"Reshape({name}, ks)")
        value = step(f"{name}2", f"Transpose <perm = [0, 2, 1, 3]> ({value})")
        if name == "k":
            value = scaled(value)
        if g > 1:
            value = step(f"{name}3", f"Unsqueeze({value}, two)")
            value = step(f"{name}4", f"Expand({value}, ke)")
            value = step(f"{name}5", f"Reshape({value}, kr)")
        operands.append(value)
    k, v = operands
    merged = data.draw(st.booleans())
    if merged:
        q, k, v = step("q9", f"Reshape({q}, qm)"), step("k9", f"Reshape({k}, km)"), step("v9", f"Reshape({v}, km)")
    k = step("kt", f"Transpose <perm = {[0, 2, 1] if merged else [0, 1, 3, 2]}> ({k})")
    scores = scaled(step("s", f"MatMul({q}, {k})"))
    if data.draw(st.booleans()):
        apart = merged and data.draw(st.booleans())
        if apart:
            scores = step("s1", f"Reshape({scores}, sa)")
        mask = "mask" if apart or not merged else "flat"
        scores = step("s2", f"Add({scores}, {mask})")
        if apart:
            scores = step("s3", f"Reshape({scores}, sm)")
    weights = step("w", f"Softmax <axis = -1> ({scores})")
    step("o" if merged else "y", f"MatMul({weights}, {v})")
    if merged:
        step("y", "Reshape(o, oa)")
    text = f"""{HEAD} g (float[{b}, {s}, {heads * d}] q, float[{b}, {t}, {h * d}] k, float[{b}, {t}, {h * d}] v,
        float[{b}, 1, {s}, {t}] mask, float[{s}, {t}] flat) => (float[{b}, {heads}, {s}, {d}] y)
        <{", ".join(constants)}> {{ {" ".join(lines)} }}"""
    node = raised(text)
    assert len(node.inputs[1].shape or [0] * 4) == 4
