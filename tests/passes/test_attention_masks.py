"""attention-masks: what a mask computes decides, whatever it is made of."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from exactness import assert_exact, op_types, parse, random_feeds

from graphopt.passes.raise_.attention_masks import AttentionMasks

HEAD = '<ir_version: 10, opset_import: ["": 23]>'
HEAD_24 = '<ir_version: 11, opset_import: ["": 24]>'
PAST = "float[B, 2, S, 4] q, float[B, 2, S, 4] k, float[B, 2, S, 4] v, float[B, 2, P, 4] pk, float[B, 2, P, 4] pv"
LENGTHS = """
    zero = Constant <value = int64 {0}> ()
    one = Constant <value = int64 {1}> ()
    first = Constant <value = int64[1] {0}> ()
    second = Constant <value = int64[1] {1}> ()
    nought = Constant <value = float {0}> ()
    s_shape = Shape <start = 2, end = 3> (q)
    p_shape = Shape <start = 2, end = 3> (pk)
    s = Squeeze(s_shape)
    p = Squeeze(p_shape)
    k_shape = Shape <start = 2, end = 3> (k)
    new = Squeeze(k_shape)
    t = Add(p, new)
    rows = Range(zero, s, one)
    columns = Range(zero, t, one)
    positions = Add(rows, p)
    i = Unsqueeze(positions, second)
    j = Unsqueeze(columns, first)
"""
ATTEND = "y, ok, ov = Attention(q, k, v, mask, pk, pv)"
DIMS = {"B": 2, "S": 3, "P": 2}


def with_past(mask: str, inputs: str = PAST, head: str = HEAD, kind: str = "float") -> ir.Model:
    return parse(f"{head} g ({inputs}) => ({kind}[a, b, c, d] y) {{ {LENGTHS} {mask} {ATTEND} }}")


def attentions(model: ir.Model) -> list[tuple[bool, int]]:
    """Whether each Attention has a mask, and its `is_causal`."""
    return [
        (n.inputs[3] is not None, n.attributes["is_causal"].as_int() if "is_causal" in n.attributes else 0)
        for n in model.graph
        if n.op_type == "Attention"
    ]


def run_exact(model: ir.Model, **options: object) -> tuple[ir.Model, list[str]]:
    rule = AttentionMasks()
    after = assert_exact(model, rule, dims=DIMS, **options)  # type: ignore[arg-type]
    rule(model.clone())
    return after, [site.detail for site in rule.sites]


@pytest.mark.parametrize(
    "mask",
    [
        "mask = LessOrEqual(j, i)",
        "hidden = Less(i, j) mask = Not(hidden)",
        "low = Constant <value = float {-inf}> () seen = LessOrEqual(j, i) mask = Where(seen, nought, low)",
        "low = Constant <value = float {-3.4028235e38}> () seen = LessOrEqual(j, i) mask = Where(seen, nought, low)",
        """low = Constant <value = float {-3.4028235e38}> ()
           hidden = Greater(j, i) h = Cast <to = 1> (hidden) mask = Mul(h, low)""",
    ],
)
def test_a_causal_mask_is_an_attribute(mask: str) -> None:
    after, details = run_exact(with_past(mask))
    assert attentions(after) == [(False, 1)]
    assert op_types(after) == ["Attention"]
    assert details == ["is_causal instead of a causal mask"]


def test_without_a_past_it_starts_top_left() -> None:
    model = parse(f"""{HEAD} g (float[B, 2, S, 4] q, float[B, 2, T, 4] k, float[B, 2, T, 4] v)
        => (float[a, b, c, d] y) {{
        size = Constant <value = int64[2] {{3, 5}}> ()
        zero = Constant <value = int64 {{0}}> () one = Constant <value = int64 {{1}}> ()
        first = Constant <value = int64[1] {{0}}> () second = Constant <value = int64[1] {{1}}> ()
        s_shape = Shape <start = 2, end = 3> (q) t_shape = Shape <start = 2, end = 3> (k)
        s = Squeeze(s_shape) t = Squeeze(t_shape)
        rows = Range(zero, s, one) columns = Range(zero, t, one)
        i = Unsqueeze(rows, second) j = Unsqueeze(columns, first)
        mask = LessOrEqual(j, i)
        y = Attention(q, k, v, mask)
    }}""")
    for lengths in ({"S": 3, "T": 5}, {"S": 5, "T": 3}, {"S": 4, "T": 4}):
        after = assert_exact(model, AttentionMasks(), dims={"B": 2, **lengths})
        assert attentions(after) == [(False, 1)]


def test_another_offset_isnt_the_operators() -> None:
    after, details = run_exact(with_past("mask = LessOrEqual(j, r) r = Unsqueeze(rows, second)".replace(
        "mask = LessOrEqual(j, r) r = Unsqueeze(rows, second)", "r = Unsqueeze(rows, second) mask = LessOrEqual(j, r)"
    )))  # fmt: skip
    assert attentions(after) == [(True, 0)]
    assert details == ["mask kept: it is causal with offset 0, and pk[2] positions are past"]


@pytest.mark.parametrize(
    "mask",
    [
        "mask = GreaterOrEqual(j, zero)",
        "mask = Less(j, t)",
        "all = Shape(j) mask = ConstantOfShape <value = float[1] {0}> (all)",
        "yes = Constant <value = bool {1}> () mask = Or(seen, yes) seen = LessOrEqual(j, i)".replace(
            "mask = Or(seen, yes) seen = LessOrEqual(j, i)", "seen = LessOrEqual(j, i) mask = Or(seen, yes)"
        ),
    ],
)
def test_a_mask_that_masks_nothing_goes(mask: str) -> None:
    after, details = run_exact(with_past(mask))
    assert attentions(after) == [(False, 0)]
    assert details == ["mask dropped: it masks nothing"]


def test_one_new_token_sees_all() -> None:
    inputs = PAST.replace("S, 4", "1, 4")
    after, _ = run_exact(with_past("mask = LessOrEqual(j, i)", inputs=inputs))
    assert attentions(after) == [(False, 0)]


@pytest.mark.parametrize(
    ("mask", "inputs", "reason"),
    [
        (
            "seen = LessOrEqual(j, i) kept = Cast <to = 9> (m) a = Constant <value = int64[2] {1, 2}> () "
            "pad = Unsqueeze(kept, a) mask = And(seen, pad)",
            PAST + ", int64[B, T] m",
            "mask kept: it is causal with offset pk[2], padding from 'm'",
        ),
        (
            "low = Constant <value = float {-10000}> () seen = LessOrEqual(j, i) mask = Where(seen, nought, low)",
            PAST,
            "mask kept: it is causal by adding -10000, which a score may outweigh",
        ),
        (
            "w = Constant <value = int64 {2}> () seen = LessOrEqual(j, i) start = Sub(i, w) "
            "near = Greater(j, start) mask = And(seen, near)",
            PAST,
            "mask kept: it is causal with offset pk[2], window 2",
        ),
        (
            "low = Constant <value = float {-3.4e38}> () seen = LessOrEqual(j, i) hidden = Where(seen, nought, low) "
            "mask = Add(hidden, bias)",
            PAST + ", float[2, 1, 1] bias",
            "mask kept: it is causal with offset pk[2], a bias 'bias'",
        ),
        (
            "two = Constant <value = int64 {2}> () seen = LessOrEqual(j, i) rest = Mod(j, two) even = Equal(rest, zero) "
            "mask = And(seen, even)",
            PAST,
            "mask kept: it is causal with offset pk[2], where rest[0, j] == 0, 'rest': Mod isn't followed",
        ),
    ],
)
def test_what_is_more_than_causal_stays_and_says_why(mask: str, inputs: str, reason: str) -> None:
    model = with_past(mask, inputs=inputs)
    after, details = (
        (assert_exact(model, AttentionMasks(), dims={**DIMS, "T": 5}), None) if "T]" in inputs else run_exact(model)
    )
    assert attentions(after) == [(True, 0)]
    if details is None:
        rule = AttentionMasks()
        rule(model.clone())
        details = [site.detail for site in rule.sites]
    assert details[0].startswith(reason)


def test_a_constant_number_of_columns_can_only_be_that_of_the_keys() -> None:
    """A size that isn't 1 doesn't broadcast, so in any run in which the mask fits it is T."""
    after, _ = run_exact(
        with_past("""c = Constant <value = int64 {5}> () up = Range(zero, c, one)
        f = Unsqueeze(up, first) mask = LessOrEqual(f, i)""")
    )
    assert attentions(after) == [(False, 1)]


def test_lengths_that_share_a_name_arent_equal() -> None:
    """Queries and keys of one declared length: ONNX Runtime doesn't check that, so neither is it relied on."""
    after, details = run_exact(
        with_past("""
        until = Add(p, s) up = Range(zero, until, one) f = Unsqueeze(up, first) mask = LessOrEqual(f, i)""")
    )
    assert attentions(after) == [(True, 0)]
    assert "isn't proven" in details[0]


def test_a_mask_read_elsewhere_stays_for_its_reader() -> None:
    model = parse(f"""{HEAD} g ({PAST}) => (float[a, b, c, d] y, bool[e, f] mask) {{
        {LENGTHS} mask = LessOrEqual(j, i) {ATTEND} }}""")
    after = assert_exact(model, AttentionMasks(), dims=DIMS)
    assert attentions(after) == [(False, 1)]
    assert "LessOrEqual" in op_types(after)


def test_scores_that_are_read_keep_the_mask() -> None:
    model = parse(f"""{HEAD} g ({PAST}) => (float[a, b, c, d] y, float[e, f, g, h] qk) {{
        {LENGTHS} low = Constant <value = float {{-3.4028235e38}}> () seen = LessOrEqual(j, i)
        mask = Where(seen, nought, low)
        y, ok, ov, qk = Attention <qk_matmul_output_mode = 1> (q, k, v, mask, pk, pv) }}""")
    assert attentions(assert_exact(model, AttentionMasks(), dims=DIMS)) == [(True, 0)]


def test_masks_of_equal_numbers_are_one() -> None:
    model = parse(f"""{HEAD} g ({PAST}, int64[B, T] m) => (float[a, b, c, d] y, float[e, f, g, h] z) {{ {LENGTHS}
        axes = Constant <value = int64[2] {{1, 2}}> ()
        kept = Cast <to = 9> (m)
        pad = Unsqueeze(kept, axes)
        seen = LessOrEqual(j, i)
        mask = And(seen, pad)
        y, ok, ov = Attention(q, k, v, mask, pk, pv)
        wide = Unsqueeze(m, axes)
        no = Equal(wide, zero)
        hidden = Greater(j, i)
        either = Or(hidden, no)
        again = Not(either)
        z, ok2, ov2 = Attention(y, k, v, again, pk, pv)
    }}""")
    rule = AttentionMasks()
    after = assert_exact(model, rule, dims={**DIMS, "T": 5})
    masks = [n.inputs[3] for n in after.graph if n.op_type == "Attention"]
    assert masks[0] is masks[1]
    assert "Or" not in op_types(after)
    rule(model.clone())
    assert [s.outcome for s in rule.sites] == ["applied", "left"] or "mask shared" in str(rule.sites)


def test_masks_of_other_numbers_stay() -> None:
    model = parse(f"""{HEAD} g ({PAST}, int64[B, T] m, int64[B, T] n)
        => (float[a, b, c, d] y, float[e, f, g, h] z) {{ {LENGTHS}
        axes = Constant <value = int64[2] {{1, 2}}> ()
        kept = Cast <to = 9> (m)
        mask = Unsqueeze(kept, axes)
        y, ok, ov = Attention(q, k, v, mask, pk, pv)
        other = Cast <to = 9> (n)
        again = Unsqueeze(other, axes)
        z, ok2, ov2 = Attention(y, k, v, again, pk, pv)
    }}""")
    after = assert_exact(model, AttentionMasks(), dims={**DIMS, "T": 5})
    assert op_types(after) == op_types(model)


def test_in_a_branch() -> None:
    model = parse(f"""{HEAD} g (bool c, {PAST}) => (float[a, b, c, d] y) {{ {LENGTHS}
        mask = LessOrEqual(j, i)
        y = If (c) <
            then_branch = t () => (float[a, b, c, d] u) {{ u, ok, ov = Attention(q, k, v, mask, pk, pv) }},
            else_branch = e () => (float[a, b, c, d] w) {{ w = Neg(q) }}
        >
    }}""")
    after = assert_exact(model, AttentionMasks(), dims=DIMS)
    (attention,) = [n for g in after.graph.subgraphs() for n in g if n.op_type == "Attention"]
    assert attention.inputs[3] is None
    assert attention.attributes["is_causal"].as_int() == 1


def test_an_attribute_of_a_functions_caller() -> None:
    model = parse(f"""<ir_version: 10, opset_import: ["": 23, "local": 1]>
        g ({PAST}) => (float[a, b, c, d] y) {{ y = local.attend <causal = 0> (q, k, v, pk, pv) }}
        <domain: "local", opset_import: ["": 23]>
        attend <causal> (q, k, v, pk, pv) => (y) {{ {LENGTHS} mask = LessOrEqual(j, i)
            y, ok, ov = Attention <is_causal: int = @causal> (q, k, v, mask, pk, pv) }}""")
    rule = AttentionMasks()
    rule(model)
    assert [s.detail for s in rule.sites] == ["mask kept: an attribute is set by the caller of the function"]


def test_a_later_opset_pads_a_shorter_mask() -> None:
    short = with_past("""some = Constant <value = int64 {2}> () up = Range(zero, some, one) f = Unsqueeze(up, first)
        mask = GreaterOrEqual(f, zero)""", head=HEAD_24)  # fmt: skip
    rule = AttentionMasks()
    rule(short)
    assert attentions(short) == [(True, 0)]
    full = with_past("mask = LessOrEqual(j, i)", head=HEAD_24)
    assert attentions(assert_exact(full, AttentionMasks(), dims=DIMS)) == [(False, 1)]


def test_other_nodes_are_no_sites() -> None:
    model = parse(f"{HEAD} g (float[B, 2, S, 4] q) => (float[B, 2, S, 4] y) {{ y = Attention(q, q, q) }}")
    rule = AttentionMasks()
    assert not rule(model).modified
    assert not rule.sites


@pytest.mark.parametrize("kind", ["float16", "float"])
@pytest.mark.parametrize("lengths", [(4, 0), (1, 3), (3, 2)])
def test_in_onnx_runtime(kind: str, lengths: tuple[int, int]) -> None:
    """The kernel aligns `is_causal` to the past, as the standard says."""
    low = {"float16": "-65504", "float": "-3.4028235e38"}[kind]
    model = with_past(
        f"low_32 = Constant <value = float {{{low}}}> () low = CastLike(low_32, q) none = CastLike(nought, q) "
        "seen = LessOrEqual(j, i) mask = Where(seen, none, low)",
        inputs=PAST.replace("float[", f"{kind}["),
        kind=kind,
    )
    after = model.clone()
    AttentionMasks()(after)
    assert attentions(after) == [(False, 1)]
    rows, past = lengths
    feeds = random_feeds(model, dims={"B": 2, "S": rows, "P": past})
    results = [
        ort.InferenceSession(ir.to_proto(m).SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds)[0]
        for m in (model, after)
    ]
    np.testing.assert_allclose(results[1], results[0], rtol=1e-3 if kind == "float16" else 1e-6, atol=1e-6)


def test_rows_that_see_nothing_in_onnx_runtime() -> None:
    """Why boolean and additive masks aren't exchanged: -10000 isn't 0 rows, and the lowest number is only here."""
    model = parse(f"""{HEAD} g (float[1, 1, 2, 4] q, float[1, 1, 2, 4] k, float[1, 1, 2, 4] v, float[2, 2] mask)
        => (float[1, 1, 2, 4] y) {{ y = Attention(q, k, v, mask) }}""")
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = random_feeds(model)
    rows = {}
    for number in (-np.inf, np.finfo(np.float32).min, -1e4, 0):
        mask = np.array([[number, number], [0, 0]], dtype=np.float32)
        rows[number] = session.run(None, {**feeds, "mask": mask})[0][0, 0, 0]
    assert not rows[-np.inf].any()
    np.testing.assert_allclose(rows[-1e4], rows[0], rtol=1e-2)
