from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from exactness import assert_exact, op_types, parse, parse_weighted
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.graph.edits import nodes
from graphopt.passes.raise_.rotary import RaiseRotary

HEAD = '<ir_version: 10, opset_import: ["": 23]>'
INTS = "int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] last = {-1}, int64[1] all = {9999999999}"
"""Constants of the graphs below; x is [b, 2, s, 8], positions are [b, s] unless a test says otherwise."""

HALVES = {
    "slices": "a = Slice(x, zero, four, last) b = Slice(x, four, all, last)",
    "split": "a, b = Split <axis = -1, num_outputs = 2> (x)",
    "split with sizes": "a, b = Split <axis = 3> (x, sizes)",
    "gathered": "a = Gather <axis = -1> (x, i0) b = Gather <axis = 3> (x, i1)",
    "an axis of two": """x5 = Reshape(x, in_halves) a5, b5 = Split <axis = 3, num_outputs = 2> (x5)
        a = Squeeze(a5, minus_two) b = Squeeze(b5, minus_two)""",
}
TURNED = {
    "negated": "nb = Neg(b) r = Concat <axis = -1> (nb, a) xc = Mul(x, c) rs = Mul(r, s) y = Add(xc, rs)",
    "commuted": "nb = Neg(b) r = Concat <axis = 3> (nb, a) xc = Mul(c, x) rs = Mul(s, r) y = Add(rs, xc)",
    "times minus one": "nb = Mul(b, minus) r = Concat <axis = -1> (nb, a) xc = Mul(x, c) rs = Mul(r, s) y = Add(xc, rs)",
    "subtracted": "na = Neg(a) r = Concat <axis = -1> (b, na) xc = Mul(x, c) rs = Mul(r, s) y = Sub(xc, rs)",
    "sign in the sine": """ns = Neg(sin) s2 = Concat <axis = -1> (ns, sin) sm = Unsqueeze(s2, one)
        r = Concat <axis = -1> (b, a) xc = Mul(x, c) rs = Mul(r, sm) y = Add(xc, rs)""",
    "signs beside it": """r = Concat <axis = -1> (b, a) sr = Mul(r, signs) xc = Mul(x, c) rs = Mul(sr, s) y = Add(xc, rs)""",
    "half by half": """c1 = Unsqueeze(cos, one) s1 = Unsqueeze(sin, one)
        ac = Mul(a, c1) bs = Mul(b, s1) bc = Mul(b, c1) as = Mul(a, s1)
        y1 = Sub(ac, bs) y2 = Add(bc, as) y = Concat <axis = -1> (y1, y2)""",
}
CONSTANTS = f"""{INTS}, int64[1] four = {{4}}, int64[1] minus_two = {{-2}}, int64[2] sizes = {{4, 4}}, float minus = {{-1}},
    int64[4] i0 = {{0, 1, 2, 3}}, int64[4] i1 = {{4, -3, 6, 7}}, int64[5] in_halves = {{0, 0, 0, 2, 4}},
    int64[5] in_pairs = {{0, 0, 0, 4, 2}}, int64[4] flat = {{0, 0, 0, 8}}, int64 even = {{0}}, int64 odd = {{1}},
    int64[4] evens = {{0, 2, 4, 6}}, int64[4] odds = {{1, 3, 5, 7}}, int64[5] twice = {{1, 1, 1, 1, 2}},
    float[8] signs = {{-1, -1, -1, -1, 1, 1, 1, 1}}, float[4] f = {{1, 0.5, 0.25, 0.125}}"""
ANGLES = """p3 = Unsqueeze(p, last) pf = Cast <to = 1> (p3) angle = Mul(pf, f) cos = Cos(angle) sin = Sin(angle)"""
DOUBLED = """c2 = Concat <axis = -1> (cos, cos) sd = Concat <axis = -1> (sin, sin)
    c = Unsqueeze(c2, one) s = Unsqueeze(sd, one)"""


def spelled(
    body: str, *, x: str = "float[b, 2, q, 8]", p: str = "int64[b, q]", more: str = "", head: str = HEAD
) -> ir.Model:
    """x turned by the angles of the positions p."""
    y = x.replace("int64", "float")
    return parse(f"{head} g ({x} x, {p} p) => ({y} y) <{CONSTANTS}{more}> {{ {body} }}")


def raised(before: ir.Model, dims: dict[str, int] | None = None) -> ir.Model:
    return assert_exact(before, RaiseRotary(), dims=dims or {"b": 2, "q": 3})


def rotations(model: ir.Model) -> list[dict[str, int]]:
    """The attributes of all RotaryEmbedding."""
    return [{k: a.as_int() for k, a in n.attributes.items()} for n in nodes(model) if n.op_type == "RotaryEmbedding"]


def reasons(before: ir.Model) -> list[str]:
    """Why nothing was done."""
    rule, after = RaiseRotary(), before.clone()
    assert not rule(after).modified
    return [site.detail for site in rule.sites]


@pytest.mark.parametrize("turned", TURNED)
@pytest.mark.parametrize("halves", HALVES)
def test_in_halves(halves: str, turned: str) -> None:
    after = raised(spelled(f"{ANGLES} {DOUBLED} {HALVES[halves]} {TURNED[turned]}"))
    assert rotations(after) == [{}]
    assert not {"Neg", "Slice", "Split", "Mul", "Sub"} & {*op_types(after)} - {"Mul"}
    assert op_types(after).count("Mul") == 1


PAIRS = {
    "strides": "a = Slice(x, zero, all, last, two) b = Slice(x, one, all, last, two)",
    "gathered": "a = Gather <axis = -1> (x, evens) b = Gather <axis = -1> (x, odds)",
    "an axis of two": """x5 = Reshape(x, in_pairs) a = Gather <axis = -1> (x5, even) b = Gather <axis = -1> (x5, odd)""",
}
REPEATED = {
    "unsqueezed and expanded": """c4 = Unsqueeze(cos, last) ce = Expand(c4, twice) sf = Unsqueeze(sin, last)
        se = Expand(sf, twice)""",
    "joined": """c4 = Unsqueeze(cos, last) ce = Concat <axis = -1> (c4, c4) sf = Unsqueeze(sin, last)
        se = Concat <axis = -1> (sf, sf)""",
    "tiled": """c4 = Unsqueeze(cos, last) ce = Tile(c4, twice4) sf = Unsqueeze(sin, last) se = Tile(sf, twice4)""",
}


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("repeated", REPEATED)
def test_interleaved(pairs: str, repeated: str) -> None:
    table = REPEATED[repeated].replace("Expand(c4, twice)", "Expand(c4, twice4)").replace("(sf, twice)", "(sf, twice4)")
    before = spelled(
        f"""{ANGLES} {table} cr = Reshape(ce, table) sr = Reshape(se, table) {PAIRS[pairs]} nb = Neg(b)
        n5 = Unsqueeze(nb, last) a6 = Unsqueeze(a, last) st = Concat <axis = -1> (n5, a6) r = Reshape(st, flat)
        xc = Mul(x, cr) rs = Mul(r, sr) y = Add(xc, rs)""",
        p="int64[2, 3]",
        x="float[2, 2, 3, 8]",
        more=", int64[4] table = {2, 1, 3, 8}, int64[4] twice4 = {1, 1, 1, 2}",
    )
    assert rotations(raised(before)) == [{"interleaved": 1}]


@pytest.mark.parametrize("pairs", PAIRS)
def test_interleaved_without_doubled_tables(pairs: str) -> None:
    before = spelled(
        f"""{ANGLES} {PAIRS[pairs]} c1 = Unsqueeze(cos, one) s1 = Unsqueeze(sin, one)
        ac = Mul(a, c1) bs = Mul(b, s1) bc = Mul(b, c1) as = Mul(a, s1) y1 = Sub(ac, bs) y2 = Add(as, bc)
        y1u = Unsqueeze(y1, last) y2u = Unsqueeze(y2, last) st = Concat <axis = 4> (y1u, y2u) y = Reshape(st, flat)"""
    )
    after = raised(before)
    assert rotations(after) == [{"interleaved": 1}]
    assert op_types(after).count("Cos") == 1


def test_pairs_taken_apart_and_halves_joined() -> None:
    before = spelled(
        f"""{ANGLES} {PAIRS["strides"]} c1 = Unsqueeze(cos, one) s1 = Unsqueeze(sin, one)
        ac = Mul(a, c1) bs = Mul(b, s1) bc = Mul(b, c1) as = Mul(a, s1) y1 = Sub(ac, bs) y2 = Add(as, bc)
        y = Concat <axis = -1> (y1, y2)"""
    )
    after = raised(before)
    assert rotations(after) == [{}]
    assert op_types(after).count("Slice") == 2


def test_elements_in_any_order() -> None:
    before = spelled(
        f"""{ANGLES} {DOUBLED} x0 = Gather <axis = -1> (x, mixed) {HALVES["slices"].replace("(x,", "(x0,")}
        {TURNED["negated"].replace("(x,", "(x0,")} """,
        more=", int64[8] mixed = {5, 0, 3, 1, 7, 2, 6, 4}",
    )
    assert rotations(raised(before)) == [{}]


PARTIAL = """x0 = Slice(x, zero, four, last) x1 = Slice(x, four, all, last)
    a = Slice(x0, zero, two, last) b = Slice(x0, two, all, last) nb = Neg(b) r = Concat <axis = -1> (nb, a)
    p3 = Unsqueeze(p, last) pf = Cast <to = 1> (p3) fh = Slice(f, zero, two, zero) angle = Mul(pf, fh)
    twofold = Concat <axis = -1> (angle, angle) c2 = Cos(twofold) s2 = Sin(twofold)
    c = Unsqueeze(c2, one) s = Unsqueeze(s2, one) xc = Mul(x0, c) rs = Mul(r, s) t = Add(xc, rs)"""


def test_partial() -> None:
    after = raised(spelled(f"{PARTIAL} y = Concat <axis = -1> (t, x1)"))
    assert rotations(after) == [{"rotary_embedding_dim": 4}]
    assert "Concat" not in [op for op in op_types(after)[:-1] if op != "Concat"]


def test_the_first_elements_pass() -> None:
    body = PARTIAL.replace(
        "x0 = Slice(x, zero, four, last) x1 = Slice(x, four, all, last)",
        "x1 = Slice(x, zero, four, last) x0 = Slice(x, four, all, last)",
    )
    after = raised(spelled(f"{body} y = Concat <axis = -1> (x1, t)"))
    assert rotations(after) == [{}]
    assert op_types(after).count("Slice") == 3


def test_partial_by_the_operator_becomes_one() -> None:
    before = spelled(
        """x0 = Slice(x, zero, four, last) x1 = Slice(x, four, all, last) p3 = Unsqueeze(p, last) pf = Cast <to = 1> (p3)
        fh = Slice(f, zero, two, zero) angle = Mul(pf, fh) cos = Cos(angle) sin = Sin(angle)
        t = RotaryEmbedding(x0, cos, sin) y = Concat <axis = -1> (t, x1)""",
        x="float[2, 2, 3, 8]",
        p="int64[2, 3]",
    )
    after = raised(before)
    assert rotations(after) == [{"rotary_embedding_dim": 4}]


def test_parts_joined_at_once() -> None:
    before = spelled(
        """x1, a, b, x2 = Split <axis = -1, num_outputs = 4> (x) p3 = Unsqueeze(p, last) pf = Cast <to = 1> (p3)
        fh = Slice(f, zero, two, zero) angle = Mul(pf, fh) cos = Cos(angle) sin = Sin(angle)
        c1 = Unsqueeze(cos, one) s1 = Unsqueeze(sin, one)
        ac = Mul(a, c1) bs = Mul(b, s1) bc = Mul(b, c1) as = Mul(a, s1) y1 = Sub(ac, bs) y2 = Add(as, bc)
        y = Concat <axis = -1> (x1, y1, y2, x2)"""
    )
    assert rotations(raised(before)) == [{}]


SWAPPED = f"""{ANGLES} c2 = Concat <axis = -1> (cos, cos) sd = Concat <axis = -1> (sin, sin)
    c = Unsqueeze(c2, two) s = Unsqueeze(sd, two) {HALVES["slices"]} {TURNED["negated"].replace("y = ", "t = ")}"""


@pytest.mark.parametrize(("perm", "count"), [("0, 2, 1, 3", 1), ("0, 2, 3, 1", 2)])
def test_heads_behind_positions(perm: str, count: int) -> None:
    before = parse(f"""{HEAD} g (float[b, q, 2, 8] x, int64[b, q] p) => (float[b, h, m, n] y) <{CONSTANTS}> {{
        {SWAPPED} y = Transpose <perm = [{perm}]> (t) }}""")
    after = raised(before)
    assert rotations(after) == [{}]
    assert op_types(after).count("Transpose") == count


def test_heads_behind_positions_to_the_end() -> None:
    after = raised(spelled(SWAPPED + " y = Identity(t)", x="float[b, q, 2, 8]"))
    assert op_types(after).count("Transpose") == 2


@pytest.mark.parametrize(
    ("x", "axis"),
    [("float[2, 3, 8]", 0), ("float[3, 2, 8]", 1)],
    ids=["heads first", "positions first"],
)
def test_without_a_batch(x: str, axis: int) -> None:
    before = spelled(
        f"""{ANGLES} c2 = Concat <axis = -1> (cos, cos) sd = Concat <axis = -1> (sin, sin)
        c = Unsqueeze(c2, {"zero" if axis == 0 else "one"}) s = Unsqueeze(sd, {"zero" if axis == 0 else "one"})
        {HALVES["slices"]} {TURNED["negated"]}""",
        x=x,
        p="int64[3]",
    )
    assert rotations(raised(before)) == [{}]


def test_one_head_without_an_axis() -> None:
    before = spelled(
        f"""{ANGLES} c = Concat <axis = -1> (cos, cos) s = Concat <axis = -1> (sin, sin)
        {HALVES["slices"]} {TURNED["negated"]}""",
        x="float[b, q, 8]",
    )
    assert rotations(raised(before)) == [{}]


def test_all_sites_share_one_pair_of_tables() -> None:
    layer = f"{DOUBLED} {HALVES['slices']} {TURNED['negated']}"
    names = ["c2", "sd", "c", "s", "a", "b", "nb", "r", "xc", "rs", "y"]
    both = []
    for layer_of, source in ((layer, "x"), (layer, "z")):
        text = f" {layer_of} "
        for name in names:
            for end in " ,)":
                text = text.replace(f" {name}{end}", f" {name}_{source}{end}").replace(
                    f"({name}{end}", f"({name}_{source}{end}"
                )
        both.append(text.replace("(x,", f"({source},"))
    before = parse(f"""{HEAD} g (float[b, 2, q, 8] x, float[b, 4, q, 8] z, int64[b, q] p)
        => (float[b, 2, q, 8] y_x, float[b, 4, q, 8] y_z) <{CONSTANTS}> {{ {ANGLES} {both[0]} {both[1]} }}""")
    after = assert_exact(before, RaiseRotary(), dims={"b": 2, "q": 3})
    first, second = (n for n in after.graph if n.op_type == "RotaryEmbedding")
    counts = {op: op_types(after).count(op) for op in ("Cos", "Sin", "Concat")}
    assert counts["Cos"] == counts["Sin"] == 1
    # z has a batch and a length of its own, as far as ONNX Runtime checks.
    assert first.inputs[1].producer().inputs[0] is second.inputs[1].producer().inputs[0]


def test_tables_of_batch_one_fit_any_batch() -> None:
    body = f"{ANGLES} {DOUBLED} {HALVES['slices']} {TURNED['negated']}"
    before = spelled(body, p="int64[1, q]")
    after = raised(before)
    session = ort.InferenceSession(ir.to_proto(after).SerializeToString())
    reference = ort.InferenceSession(ir.to_proto(before).SerializeToString())
    for batch in (1, 3):
        feeds = {
            "x": np.random.default_rng(0).normal(size=(batch, 2, 5, 8)).astype(np.float32),
            "p": np.array([[0, 0, 7, 2, 30]]),
        }
        np.testing.assert_allclose(session.run(None, feeds)[0], reference.run(None, feeds)[0], atol=1e-6)


def test_sizes_that_are_known_need_no_expand() -> None:
    before = spelled(
        f"{ANGLES} {DOUBLED} {HALVES['slices']} {TURNED['negated']}", x="float[2, 2, 3, 8]", p="int64[2, 3]"
    )
    assert "Expand" not in op_types(raised(before))


def test_a_scaling_of_the_tables_stays() -> None:
    body = f"{ANGLES} cm = Mul(cos, k) sm = Mul(sin, k) {DOUBLED} {HALVES['slices']} {TURNED['negated']}"
    body = body.replace("(cos, cos)", "(cm, cm)").replace("(sin, sin)", "(sm, sm)")
    after = raised(spelled(body, more=", float k = {1.25}"))
    assert op_types(after).count("Mul") == 3


def test_a_scale_of_the_vector_stays_outside() -> None:
    body = f"x0 = Mul(x, k) {ANGLES} {DOUBLED} {HALVES['slices']} {TURNED['negated']}".replace("(x,", "(x0,")
    after = raised(spelled(body.replace("Mul(x0, k)", "Mul(x, k)"), more=", float k = {0.125}"))
    (node,) = (n for n in after.graph if n.op_type == "RotaryEmbedding")
    assert node.inputs[0].producer().op_type == "Mul"


@pytest.mark.parametrize("x", ["float[b, 2, q, 8]", "float[b, q, 2, 8]"])
def test_one_after_the_other(x: str) -> None:
    tables = DOUBLED if x == "float[b, 2, q, 8]" else DOUBLED.replace("one", "two")
    again = f"{HALVES['slices']} {TURNED['negated']}"
    for name in ("a", "b", "nb", "r", "xc", "rs"):
        again = (
            again.replace(f"{name} =", f"{name}_ =")
            .replace(f"({name},", f"({name}_,")
            .replace(f", {name})", f", {name}_)")
        )
    again = again.replace("(b)", "(b_)").replace("(x,", "(t,").replace("(nb, a)", "(nb_, a_)")
    first = f"{HALVES['slices']} {TURNED['negated']}".replace("y = ", "t = ")
    after = raised(spelled(f"{ANGLES} {tables} {first} {again}", x=x))
    assert rotations(after) == [{}, {}]


@pytest.mark.parametrize("doubled", [False, True])
def test_rows_of_a_constant(doubled: bool) -> None:
    """Tables gathered by positions, doubled before or after."""
    rng = np.random.default_rng(0)
    half = {name: rng.normal(size=(5, 4)).astype(np.float32) for name in ("cos_rows", "sin_rows")}
    gather = "cos = Gather(cos_rows, p) sin = Gather(sin_rows, p)"
    tables = DOUBLED if not doubled else "c = Unsqueeze(cos, one) s = Unsqueeze(sin, one)"
    before = spelled(
        f"{gather} {tables} {HALVES['slices']} {TURNED['negated']}",
        more=f", float[5, {8 if doubled else 4}] cos_rows = {{{', '.join(['0'] * (40 if doubled else 20))}}}, "
        f"float[5, {8 if doubled else 4}] sin_rows = {{{', '.join(['0'] * (40 if doubled else 20))}}}",
    )
    for name, rows in half.items():
        value = before.graph.initializers[name]
        value.const_value = ir.tensor(np.concatenate([rows, rows], axis=-1) if doubled else rows, name=name)
    after = raised(before)
    assert rotations(after) == [{}]
    rows = [n.inputs[0].shape.numpy() for n in after.graph if n.op_type == "Gather"]
    assert rows == [(5, 4), (5, 4)]


def test_constant_tables_with_the_sign_in_them() -> None:
    angle = np.random.default_rng(0).normal(size=(3, 4))
    tables = {
        "c": np.tile(np.cos(angle), (1, 2)),
        "s": np.concatenate([-np.sin(angle), np.sin(angle)], axis=-1),
    }
    before = parse_weighted(f"""{HEAD} g (float[b, 2, 3, 8] x) => (float[b, 2, 3, 8] y)
        <float[1, 1, 3, 8] c, float[1, 1, 3, 8] s, {CONSTANTS}> {{
        {HALVES["slices"]} r = Concat <axis = -1> (b, a) xc = Mul(x, c) rs = Mul(r, s) y = Add(xc, rs) }}""")
    for name, table in tables.items():
        tensor = ir.tensor(table.astype(np.float32).reshape(1, 1, 3, 8), name=name)
        before.graph.initializers[name].const_value = tensor
    after = raised(before)
    assert rotations(after) == [{}]
    assert "Mul" not in op_types(after)


def test_in_another_direction() -> None:
    body = TURNED["negated"].replace("nb = Neg(b)", "nb = Neg(a)").replace("(nb, a)", "(b, nb)")
    after = raised(spelled(f"{ANGLES} {DOUBLED} {HALVES['slices']} {body}"))
    assert op_types(after).count("Neg") == 1


# ---- what stays


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("nb = Neg(b)", "nb = Identity(b)"), ["the signs of the sines aren't those of a rotation"]),
        (
            ("(sin, sin)", "(sin, cos)"),
            ["the sines of the two elements that turn together aren't known to be the same"],
        ),
        (("rs = Mul(r, s)", "r2 = Mul(r, s) rs = Mul(r2, s)"), ["what it turns 'x' into isn't one rotation of it"]),
        (("y = Add(xc, rs)", "t = Add(xc, rs) y = Add(t, x)"), []),
        (
            ("Slice(x, four, all, last)", "Slice(x, one, five, last)"),
            ["what it turns 'x' into isn't one rotation of it"],
        ),
    ],
)
def test_near_misses(change: tuple[str, str], reason: list[str]) -> None:
    body = f"{ANGLES} {DOUBLED} {HALVES['slices']} {TURNED['negated']}"
    assert change[0] in body
    before = spelled(body.replace(*change), more=", int64[1] five = {5}")
    if change[1].startswith("t = "):
        assert rotations(raised(before)) == [{}]  # the sum with x isn't part of it
    else:
        assert reasons(before) == reason


def test_an_older_opset() -> None:
    before = spelled(f"{ANGLES} {DOUBLED} {HALVES['slices']} {TURNED['negated']}", head=HEAD.replace("23", "21"))
    assert reasons(before) == ["needs opset 23, the model has 21: run convert-opset first"]


def test_float64() -> None:
    text = f"{ANGLES.replace('to = 1', 'to = 11')} {DOUBLED} {HALVES['slices']} {TURNED['negated']}"
    before = parse(
        f"{HEAD} g (double[b, 2, q, 8] x, int64[b, q] p) => (double[b, 2, q, 8] y) <{CONSTANTS}> {{ {text} }}".replace(
            "float[4] f", "double[4] f"
        )
    )
    assert reasons(before) == ["it computes in float64, which RotaryEmbedding doesn't"]


def test_angles_of_each_head() -> None:
    before = spelled(
        f"""{ANGLES} c = Concat <axis = -1> (cos, cos) s = Concat <axis = -1> (sin, sin)
        {HALVES["slices"]} {TURNED["negated"]}""",
        p="int64[b, 2, q]",
    )
    assert reasons(before) == ["the angles differ from head to head"]


def test_five_axes() -> None:
    before = spelled(
        f"{ANGLES} {DOUBLED} {HALVES['slices']} {TURNED['negated']}", x="float[b, 2, 2, q, 8]", p="int64[2, q]"
    )
    assert ["5 axes" in reason for reason in reasons(before)] == [True]


def test_a_size_that_is_not_known() -> None:
    before = spelled(f"{ANGLES} {DOUBLED} {HALVES['slices']} {TURNED['negated']}", x="float[b, 2, q, d]")
    assert reasons(before) == ["the size of the last axis of 'x' isn't known"]


def test_a_vector_broadcast_by_the_tables() -> None:
    before = parse(f"""{HEAD} g (float[1, 2, q, 8] x, int64[3, q] p) => (float[3, 2, q, 8] y) <{CONSTANTS}> {{
        {ANGLES} {DOUBLED} {HALVES["slices"]} {TURNED["negated"]} }}""")
    assert reasons(before) == ["'x' is broadcast to the shape of the tables"]


def test_tables_that_a_caller_may_set() -> None:
    """An initializer that is an input of the graph is no constant."""
    before = parse(f"""{HEAD} g (float[b, 2, 3, 8] x, float[3, 8] c, float[3, 8] s) => (float[b, 2, 3, 8] y)
        <{CONSTANTS}> {{ {HALVES["slices"]} {TURNED["negated"]} }}""")
    for name in ("c", "s"):
        value = next(v for v in before.graph.inputs if v.name == name)
        value.const_value = ir.tensor(np.ones((3, 8), np.float32), name=name)
        before.graph.register_initializer(value)
    assert reasons(before) == ["the cosines of the two elements that turn together aren't known to be the same"]


# ---- where it stands


def test_values_inside_it_that_are_read_elsewhere() -> None:
    body = f"{ANGLES} {DOUBLED} {HALVES['slices']} {TURNED['negated']}"
    before = parse(f"""{HEAD} g (float[b, 2, q, 8] x, int64[b, q] p) => (float[b, 2, q, 8] y, float[b, 2, q, 8] r)
        <{CONSTANTS}> {{ {body} }}""")
    after = raised(before)
    assert rotations(after) == [{}]
    assert [v.name for v in after.graph.outputs] == ["y", "r"]


def test_inside_a_branch() -> None:
    before = parse(f"""{HEAD} g (bool k, float[b, 2, q, 8] x, int64[b, q] p) => (float[b, 2, q, 8] z) <{CONSTANTS}> {{
        {ANGLES} {DOUBLED}
        z = If (k) <
            then_branch = t () => (float[b, 2, q, 8] y) {{ {HALVES["slices"]} {TURNED["negated"]} }},
            else_branch = e () => (float[b, 2, q, 8] v) {{ v = Neg(x) }}
        > }}""")
    assert rotations(raised(before)) == [{}]


def test_read_by_a_branch() -> None:
    before = parse(f"""{HEAD} g (bool k, float[b, q, 2, 8] x, int64[b, q] p) => (float[b, 2, q, 8] z) <{CONSTANTS}> {{
        {SWAPPED}
        z = If (k) <
            then_branch = then () => (float[b, 2, q, 8] y) {{ y = Transpose <perm = [0, 2, 1, 3]> (t) }},
            else_branch = else () => (float[b, 2, q, 8] v) {{ n = Neg(t) v = Transpose <perm = [0, 2, 1, 3]> (n) }}
        > }}""")
    assert rotations(raised(before)) == [{}]


def test_in_a_function() -> None:
    """Of what a function is called with nothing is known inside it, so it is left; inlined, it is raised."""
    body = f"{ANGLES} {DOUBLED} {HALVES['slices']} {TURNED['negated']}"
    constants = " ".join(
        f"{item.split(' ')[1]} = Constant <value = {item}> ()" for item in _items(CONSTANTS.replace("\n", " "))
    )
    before = parse(f"""<ir_version: 10, opset_import: ["": 23, "local": 1]> g (float[b, 2, q, 8] x, int64[b, q] p)
        => (float[b, 2, q, 8] y) {{ y = local.rope(x, p) }}
        <domain: "local", opset_import: ["": 23]> rope (x, p) => (y) {{ {constants} {body} }}""")
    assert reasons(before) == ["the size of the last axis of 'x' isn't known"]


def _items(text: str) -> list[str]:
    items, depth, start = [], 0, 0
    for i, letter in enumerate(text + ","):
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            items.append(" ".join(text[start:i].split()))
            start = i + 1
    return items


def test_float16_in_onnx_runtime() -> None:
    text = f"""{ANGLES} ch = Cast <to = 10> (cos) sh = Cast <to = 10> (sin) {DOUBLED} {HALVES["slices"]} {TURNED["negated"]}"""
    text = text.replace("(cos, cos)", "(ch, ch)").replace("(sin, sin)", "(sh, sh)")
    before = parse(
        f"{HEAD} g (float16[b, 2, q, 8] x, int64[b, q] p) => (float16[b, 2, q, 8] y) <{CONSTANTS}> {{ {text} }}".replace(
            "float minus = {-1},", ""
        )
    )
    after = before.clone()
    assert RaiseRotary()(after).modified
    rng = np.random.default_rng(0)
    feeds = {"x": rng.normal(size=(3, 2, 5, 8)).astype(np.float16), "p": rng.integers(0, 50, size=(3, 5))}
    expected, got = (
        ort.InferenceSession(ir.to_proto(m).SerializeToString()).run(None, feeds)[0].astype(np.float32)
        for m in (before, after)
    )
    assert np.abs(expected - got).max() < 4e-3


# ---- the operators


@pytest.mark.parametrize("rank", [3, 4])
def test_tables_of_batch_one_of_the_operator(rank: int) -> None:
    """What torch.onnx writes for opset 23: ONNX Runtime fails at any other batch than the tables'."""
    x = "float[b, 2, q, 8]" if rank == 4 else "float[b, q, 16]"
    attribute = "" if rank == 4 else "<num_heads = 2>"
    before = spelled(f"{ANGLES} y = RotaryEmbedding {attribute} (x, cos, sin)", x=x, p="int64[1, q]")
    after = raised(before, {"b": 1, "q": 3})
    rng = np.random.default_rng(0)
    shape = (3, 2, 5, 8) if rank == 4 else (3, 5, 16)
    feeds = {"x": rng.normal(size=shape).astype(np.float32), "p": np.arange(5)[None]}
    sessions = [ort.InferenceSession(ir.to_proto(m).SerializeToString()) for m in (before, after)]
    with pytest.raises(Exception, match="same shape"):
        sessions[0].run(None, feeds)
    got = sessions[1].run(None, feeds)[0]
    one = [sessions[0].run(None, {**feeds, "x": feeds["x"][i : i + 1]})[0] for i in range(3)]
    np.testing.assert_allclose(got, np.concatenate(one), atol=1e-6)


CONTRIB = '<ir_version: 10, opset_import: ["": 23, "com.microsoft": 1]>'


@pytest.mark.parametrize("positions", ["int64[1]", "int64[b, q]"])
@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize(
    ("x", "attributes", "width"),
    [
        ("float[b, 2, q, 8]", {}, 4),
        ("float[b, q, 16]", {}, 4),
        ("float[b, q, 16]", {"num_heads": 2}, 4),
        ("float[b, q, 16]", {"num_heads": 2, "rotary_embedding_dim": 4}, 2),
        ("float[b, 2, q, 8]", {"num_heads": 2, "rotary_embedding_dim": 4}, 2),
    ],
)
def test_the_contributed_operator(
    positions: str, interleaved: int, x: str, attributes: dict[str, int], width: int
) -> None:
    given_ = ", ".join(f"{k} = {v}" for k, v in {**attributes, "interleaved": interleaved}.items())
    before = ir.from_proto(
        onnx.parser.parse_model(f"""{CONTRIB} g ({x} x, {positions} p, float[20, {width}] c,
        float[20, {width}] s) => ({x} y) {{ y = com.microsoft.RotaryEmbedding <{given_}> (x, p, c, s) }}""")
    )
    after = before.clone()
    assert RaiseRotary()(after).modified
    assert not RaiseRotary()(after.clone()).modified
    assert {n.domain for n in after.graph} == {""}
    onnx.checker.check_model(ir.to_proto(after), full_check=True)
    rng = np.random.default_rng(0)
    for batch, length in ((1, 1), (1, 4), (3, 5)):
        feeds = {
            "x": rng.normal(size=(batch, 2, length, 8) if x.count(",") == 3 else (batch, length, 16)),
            "c": rng.normal(size=(20, width)), "s": rng.normal(size=(20, width)),
            "p": np.array([3]) if positions == "int64[1]" else rng.integers(0, 20, size=(batch, length)),
        }  # fmt: skip
        feeds = {k: v if k == "p" else v.astype(np.float32) for k, v in feeds.items()}
        expected, got = (
            ort.InferenceSession(ir.to_proto(m).SerializeToString()).run(None, feeds)[0] for m in (before, after)
        )
        np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [("scale = 2.0", "its scale"), ("is_packed_batching = 1", "packed"), ("num_heads = 3", "aren't 3 heads")],
)
def test_a_contributed_operator_that_stays(attributes: str, reason: str) -> None:
    before = ir.from_proto(
        onnx.parser.parse_model(f"""{CONTRIB} g (float[b, q, 16] x, int64[1] p, float[20, 4] c,
        float[20, 4] s) => (float[b, q, 16] y) {{ y = com.microsoft.RotaryEmbedding <{attributes}> (x, p, c, s) }}""")
    )
    (why,) = reasons(before)
    assert reason in why


# ---- any spelling


@settings(max_examples=40, deadline=None)
@given(
    half=st.integers(1, 4),
    rest=st.integers(0, 3),
    interleaved=st.booleans(),
    commuted=st.booleans(),
    subtracted=st.booleans(),
    sign=st.sampled_from([-1.0, 1.0]),
)
def test_any_rotation_by_signed_tables(
    half: int, rest: int, interleaved: bool, commuted: bool, subtracted: bool, sign: float
) -> None:
    """x·C ± x[partner]·S for constant tables is one rotation, whatever the signs lie in."""
    size, count = 2 * half, 2 * half + rest
    place = np.arange(size)
    partner = place ^ 1 if interleaved else (place + half) % size
    pair = place // 2 if interleaved else place % half
    first = (place % 2 == 0) if interleaved else place < half
    rng = np.random.default_rng(half + 10 * rest)
    cos, sin = rng.normal(size=(2, 3, half))
    c, s = cos[:, pair], sign * sin[:, pair] * np.where(first, -1, 1) * (-1 if subtracted else 1)
    xc, rs = ("Mul(c, x0)", "Mul(s, r)") if commuted else ("Mul(x0, c)", "Mul(r, s)")
    operands = "rs, xc" if commuted and not subtracted else "xc, rs"
    before = parse_weighted(f"""{HEAD} g (float[b, 2, 3, {count}] x) => (float[b, 2, 3, {count}] y)
        <float[3, {size}] c, float[3, {size}] s, {CONSTANTS}, int64[1] size = {{{size}}},
        int64[{size}] partner = {{{", ".join(map(str, partner))}}}> {{
        x0 = Slice(x, zero, size, last) x1 = Slice(x, size, all, last) r = Gather <axis = -1> (x0, partner)
        xc = {xc} rs = {rs} t = {"Sub" if subtracted else "Add"}({operands}) y = Concat <axis = -1> (t, x1) }}""")
    for name, table in (("c", c), ("s", s)):
        before.graph.initializers[name].const_value = ir.tensor(table.astype(np.float32), name=name)
    after = raised(before)
    (attributes,) = rotations(after)
    assert attributes.get("rotary_embedding_dim", count) == size
    if half > 1:
        assert attributes.get("interleaved", 0) == interleaved


# ---- what exporters write


@pytest.mark.export
@pytest.mark.parametrize(
    ("name", "exporter"),
    [("llama", "dynamo"), ("gemma", "torchscript"), ("gemma2", "dynamo"), ("neox", "torchscript")],
)
def test_every_rotation_of_an_export(name: str, exporter: str) -> None:
    from tiny_transformers import exported, feeds

    from graphopt.graph.load import load
    from graphopt.recipe import load as load_recipe

    path = exported(name, exporter)
    model = load(path)
    for step in load_recipe("exact").passes():
        step(model)
    before = len(rotations(model))
    assert before == 0 or RaiseRotary.name in [getattr(step, "name", "") for step in load_recipe("exact").passes()]
    RaiseRotary()(model)
    found = rotations(model)
    assert len(found) == 6  # three layers
    assert all(r.get("rotary_embedding_dim") == (2 if name == "neox" else None) for r in found)
    tables = {n.inputs[1] for n in nodes(model) if n.op_type == "RotaryEmbedding"}
    assert len(tables) == 1
    source = ort.InferenceSession(str(path))
    result = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    for batch, tokens in ((1, 9), (3, 5), (2, 1)):
        inputs = feeds(name, batch, tokens)
        inputs = {v.name: inputs[v.name] for v in source.get_inputs()}
        expected, got = source.run(None, inputs)[0], result.run(None, inputs)[0]
        assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()
