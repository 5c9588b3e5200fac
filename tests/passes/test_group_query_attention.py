"""group-query-attention: exact in float64 by the operator's definition, equal in ONNX Runtime, and honest about domains."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from contrib_reference import contrib_outputs
from exactness import op_types, parse_weighted, to_float64

from graphopt.graph.assumptions import Assumptions, read
from graphopt.passes.clean.eliminate_dead_code import EliminateDeadCode
from graphopt.passes.clean.fold_constants import FoldConstants
from graphopt.passes.fold.weight_subgraphs import FoldWeightSubgraphs
from graphopt.passes.lower.group_query_attention import GroupQueryAttention

MASK = """
  t1 = Shape<start = 1, end = 2>(attention_mask)
  p1 = Shape<start = 2, end = 3>(past_key)
  t0 = Squeeze(t1)
  p0 = Squeeze(p1)
  columns = Range(zero, t0, one)
  rows = Range(p0, t0, one)
  row = Unsqueeze(rows, last)
  causal = LessOrEqual(columns, row)
  %s
  kept = Cast<to = 9>(attention_mask)
  padding = Unsqueeze(kept, middle)
  mask = And(%s, padding)
"""
CAUSAL = MASK % ("", "causal")
WINDOW = MASK % ("far = Sub(row, columns)\n  near = Less(far, four)\n  both = And(causal, near)", "both")
POSITIONS = """
  wide = Unsqueeze(position_ids, last)
  number = Cast<to = 1>(wide)
  angle = Mul(number, freq)
  cos = Cos(angle)
  sin = Sin(angle)
"""
ROTATED = """
  q = RotaryEmbedding(q3, cos, sin)
  k = RotaryEmbedding(k3, cos, sin)
"""
LAYER = """
  qa = MatMul(x, wq)
  q1 = Add(qa, bq)
  q2 = Reshape(q1, qs)
  q3 = Transpose<perm = [0, 2, 1, 3]>(q2)
  k1 = MatMul(x, wk)
  k2 = Reshape(k1, ks)
  k3 = Transpose<perm = [0, 2, 1, 3]>(k2)
  v1 = MatMul(x, wv)
  v2 = Reshape(v1, ks)
  v = Transpose<perm = [0, 2, 1, 3]>(v2)
"""
ATTENTION = "o, present_key, present_value = Attention<scale = 0.25>(q, k, v, mask, past_key, past_value)"
AFTER = """
  o1 = Transpose<perm = [0, 2, 1, 3]>(o)
  o2 = Reshape(o1, os)
  y = MatMul(o2, wo)
"""
BODY = CAUSAL + POSITIONS + LAYER + ROTATED + ATTENTION + AFTER
PLAIN = LAYER.replace("q3 =", "q =").replace("k3 =", "k =")
HEAD = """<ir_version: 10, opset_import: ["": 23]>
g (float[batch, seq, 32] x, int64[batch, total] attention_mask, int64[batch, seq] position_ids,
   float[batch, 2, past, 16] past_key, float[batch, 2, past, 16] past_value)
  => (float[batch, seq, 32] y, float[batch, 2, total, 16] present_key, float[batch, 2, total, 16] present_value)
<float[32, 64] wq, float[64] bq, float[32, 32] wk, float[32, 32] wv, float[64, 32] wo, float[8] freq,
 int64[4] qs = {0, 0, 4, 16}, int64[4] ks = {0, 0, 2, 16}, int64[3] os = {0, 0, 64}, int64 zero = {0}, int64 one = {1},
 int64 four = {4}, int64[1] last = {-1}, int64[2] middle = {1, 2}, float slope = {0.5}, float[16] g> {
"""
NEEDED = ("no-left-padding", "batch=1")
BATCHES = ("no-left-padding", "no-batched-chunks", "counted-positions")
STAGES = ((0, 6), (5, 1), (5, 3), (0, 1))


def decoder(body: str = BODY, head: str = HEAD) -> ir.Model:
    return parse_weighted(f"{head}{body}}}")


def lowered(model: ir.Model, *assumed: str, **options: Any) -> tuple[ir.Model, GroupQueryAttention]:
    """The result of the pass on a copy, without what became dead, and the pass; a second run changes nothing."""
    after = model.clone()
    rule = GroupQueryAttention(**options)
    rule.assumptions = Assumptions.parse(assumed)
    rule(after)
    EliminateDeadCode()(after)
    again = GroupQueryAttention(**options)
    again.assumptions = rule.assumptions
    assert not again(after).modified
    assert [(v.name, v.shape, v.dtype) for v in after.graph.inputs] == [
        (v.name, v.shape, v.dtype) for v in model.graph.inputs
    ]
    assert [v.name for v in after.graph.outputs] == [v.name for v in model.graph.outputs]
    return after, rule


def fed(batch: int, past: int, tokens: int, padding: bool = False, start: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(batch + past + tokens)
    mask = np.ones((batch, past + tokens), dtype=np.int64)
    if padding:
        for row in range(batch):
            mask[row, past + tokens - min(tokens - 1, 2 * (batch - 1 - row)) :] = 0
        mask[-1] = 1
        mask[0, past + tokens - min(tokens - 1, 2) :] = 0
    positions = np.where(mask > 0, np.cumsum(mask, axis=1) - 1, 1)[:, past:] + start
    cache = {f"past_{name}": rng.normal(size=(batch, 2, past, 16)).astype(np.float32) for name in ("key", "value")}
    return {
        "x": rng.normal(size=(batch, tokens, 32)).astype(np.float32), "attention_mask": mask, "position_ids": positions,
        **cache,
    }  # fmt: skip


def in_ort(model: ir.Model, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    known = {value.name for value in session.get_inputs()}
    return dict(zip(names, session.run(None, {k: v for k, v in feeds.items() if k in known}), strict=True))


def assert_equal(before: ir.Model, after: ir.Model, feeds: dict[str, np.ndarray], rtol: float = 1e-12) -> None:
    """Equal where the mask has a token: in float64 by the definitions, and in ONNX Runtime."""
    double = {k: v.astype(np.float64) if v.dtype == np.float32 else v for k, v in feeds.items()}
    pairs = [
        (contrib_outputs(to_float64(before), double), contrib_outputs(to_float64(after), double), rtol),
        (in_ort(before, feeds), in_ort(after, feeds), 1e-5),
    ]
    for expected, got, tolerance in pairs:
        for name, e in expected.items():
            g, tokens = got[name], e.shape[1] if name == "y" else e.shape[2]
            assert e.shape == g.shape
            assert np.isfinite(g).all()
            there = feeds["attention_mask"][:, -tokens:] != 0
            difference = np.abs(e - g) if name == "y" else np.abs(e - g).transpose(0, 2, 1, 3)
            assert difference[there].max(initial=0) <= tolerance * np.abs(e).max(), name


def check(
    before: ir.Model, after: ir.Model, batches: tuple[int, ...] = (1,), start: int = 0, rtol: float = 1e-12
) -> None:
    for batch in batches:
        for past, tokens in STAGES:
            if batch == 1 or past == 0 or tokens == 1:
                for padding in (False, True) if tokens > 1 else (False,):
                    assert_equal(before, after, fed(batch, past, tokens, padding, start), rtol)


# ---- what is written


def test_one_operator_with_rotation_and_packed_projections() -> None:
    before = decoder()
    after, rule = lowered(before, *NEEDED)
    assert [s.detail for s in rule.sites] == [
        "wrote GroupQueryAttention: 4 heads on 2, rotated inside, projections packed"
    ]
    types = op_types(after)
    assert types.count("MatMul") == 2
    assert not {"Attention", "RotaryEmbedding", "Transpose", "Reshape", "Range", "And"} & set(types)
    assert {e.assumption for e in read(after)} == {"batch=1", "no-batched-chunks", "no-left-padding"}
    check(before, after, start=3)  # any positions, where the batch is 1


def test_batches_with_counted_positions() -> None:
    before = decoder()
    after, _ = lowered(before, *BATCHES)
    assert op_types(after).count("RotaryEmbedding") == 0
    assert {e.assumption for e in read(after)} == set(BATCHES)
    check(before, after, (1, 3))


def test_a_constant_table_up_to_the_longest_length() -> None:
    before = decoder()
    after, _ = lowered(before, *BATCHES, "max-length=20")
    assert not {"Cos", "Sin", "Pad"} & set(op_types(after))
    assert {e.assumption for e in read(after)} == {*BATCHES, "max-length=20"}
    check(before, after, (1, 3), rtol=1e-5)  # the table is rounded to float32 when it is written


def test_a_long_table_is_computed_when_it_is_loaded() -> None:
    before = decoder()
    after, _ = lowered(before, *BATCHES, "max-length=8192")
    assert {"Range", "Cos", "Sin"} <= set(op_types(after))
    assert not any(8192 in v.const_value.shape for v in after.graph.initializers.values() if v.const_value is not None)
    check(before, after, (1, 3))
    (node,) = [n for n in after.graph if n.op_type == "GroupQueryAttention"]
    work = [table for table in node.inputs[7:9] if table is not None]
    while work:  # constants alone, so that a session computes it once
        value = work.pop()
        assert not value.is_graph_input() or value.is_initializer()
        work += [] if value.producer() is None else [v for v in value.producer().inputs if v is not None]
    # It isn't told as left alone: it was written so.
    assert not any(rule(after).modified or rule.sites for rule in (FoldConstants(), FoldWeightSubgraphs()))


def test_without_a_word_about_positions_the_rotation_stays_before_it() -> None:
    before = decoder()
    after, rule = lowered(before, *BATCHES[:2])
    assert op_types(after).count("RotaryEmbedding") == 2
    assert "rotated before" in rule.sites[0].detail
    check(before, after, (1, 3), start=2)


@pytest.mark.parametrize("options", [{"rotary": False}, {"packed": False}])
def test_options(options: dict[str, bool]) -> None:
    before = decoder()
    after, _ = lowered(before, *NEEDED, **options)
    assert op_types(after).count("MatMul") == 4
    check(before, after)


def test_window() -> None:
    before = decoder(WINDOW + POSITIONS + LAYER + ROTATED + ATTENTION + AFTER)
    after, rule = lowered(before, *NEEDED)
    assert "window 4" in rule.sites[0].detail
    check(before, after)


@pytest.mark.parametrize(
    "change",
    [
        ("scale = 0.25", "scale = 0.125, softcap = 2.0"),
        ("(q3, cos, sin)", "<interleaved = 1>(q3, cos, sin)"),
        (" mask, past", ", past"),
    ],
)
def test_attributes(change: tuple[str, str]) -> None:
    body = BODY.replace(*change).replace(
        "(k3, cos, sin)", change[1].replace("q3", "k3") if "q3" in change[1] else "(k3, cos, sin)"
    )
    if change[1] == ", past":
        body = body.replace("scale = 0.25", "scale = 0.25, is_causal = 1")
    before = decoder(body)
    after, _ = lowered(before, *NEEDED)
    assert op_types(after).count("GroupQueryAttention") == 1
    if change[1] != ", past":  # the reference evaluator aligns is_causal to the first key, not to the past
        check(before, after, rtol=1e-6 if "softcap" in change[1] else 1e-12)  # it caps in float32
    else:
        for name, value in in_ort(before, fed(1, 5, 3)).items():
            np.testing.assert_allclose(in_ort(after, fed(1, 5, 3))[name], value, atol=1e-4)


def test_without_rotation() -> None:
    before = decoder(CAUSAL + PLAIN + ATTENTION + AFTER)
    after, _ = lowered(before, "no-left-padding", "no-batched-chunks")
    assert op_types(after).count("MatMul") == 2
    check(before, after, (1, 3))


def test_norms_of_heads_stay_before_the_rotation() -> None:
    norm = "q2 = RMSNormalization<axis = -1>(q0, g)\n  q3 ="
    body = BODY.replace("q2 = Reshape", "q0 = Reshape").replace("q3 =", norm, 1)
    before = decoder(body)
    after, rule = lowered(before, *NEEDED)
    assert "packed" not in rule.sites[0].detail
    assert op_types(after).count("Transpose") == 0
    check(before, after)


def test_operands_in_three_axes() -> None:
    body = (
        CAUSAL
        + LAYER[: LAYER.index("q2 =")]
        + "  k1 = MatMul(x, wk)\n  v1 = MatMul(x, wv)\n"
        + ATTENTION.replace("o, ", "o2, ")
        .replace("q, k, v,", "q1, k1, v1,")
        .replace("scale", "q_num_heads = 4, kv_num_heads = 2, scale")
        + "\n  y = MatMul(o2, wo)"
    )
    before = decoder(body)
    after, _ = lowered(before, "no-left-padding", "no-batched-chunks")
    assert op_types(after).count("MatMul") == 2
    check(before, after, (1, 3))


def test_another_reader_of_the_result_gets_it_in_heads() -> None:
    body = BODY.replace(
        "y = MatMul(o2, wo)", "y0 = MatMul(o2, wo)\n  most = ReduceMax<keepdims = 0>(o)\n  y = Add(y0, most)"
    )
    before = decoder(body)
    after, _ = lowered(before, *NEEDED)
    assert op_types(after).count("Transpose") == 1
    assert_equal(before, after, fed(1, 5, 3))


def test_a_projection_that_is_read_elsewhere_is_not_packed() -> None:
    body = BODY.replace("y = MatMul(o2, wo)", "y0 = MatMul(o2, wo)\n  y = Add(y0, k1)")
    before = decoder(body)
    after, rule = lowered(before, *NEEDED)
    assert "packed" not in rule.sites[0].detail
    check(before, after)


def test_positions_that_the_graph_makes_for_all_rows() -> None:
    made = POSITIONS.replace("Unsqueeze(position_ids, last)", "Unsqueeze(counted, last)")
    made = (
        "  counted = Unsqueeze(rows, first)\n"
        + made
        + """
  b1 = Shape<start = 0, end = 1>(x)
  sizes = Concat<axis = 0>(b1, ones)
  cosb = Expand(cos, sizes)
  sinb = Expand(sin, sizes)
"""
    )
    body = CAUSAL + made + LAYER + ROTATED.replace("cos, sin", "cosb, sinb") + ATTENTION + AFTER
    head = HEAD.replace("float[16] g", "float[16] g, int64[1] first = {0}, int64[2] ones = {1, 1}")
    before = decoder(body, head)
    after, rule = lowered(before, *BATCHES[:2])
    assert "rotated inside" in rule.sites[0].detail
    check(before, after, (1, 3))


def test_half_precision() -> None:
    text = (
        (HEAD.replace(", float slope = {0.5}", "") + BODY).replace("float[", "float16[").replace("to = 1>", "to = 10>")
    )
    before = parse_weighted(text + "}")
    after, _ = lowered(before, *NEEDED)
    assert "GroupQueryAttention" in op_types(after)
    feeds = {k: v.astype(np.float16) if v.dtype == np.float32 else v for k, v in fed(1, 5, 3).items()}
    for name, value in in_ort(before, feeds).items():
        error = np.abs(in_ort(after, feeds)[name].astype(np.float32) - value).max() / np.abs(value).max()
        assert error < 0.02, name


# ---- what is left


@pytest.mark.parametrize(
    ("assumed", "told"),
    [
        ((), "rows may be padded on the left: --assume no-left-padding"),
        (("batch=1",), "rows may be padded on the left: --assume no-left-padding"),
        (("no-left-padding",), "--assume no-batched-chunks, or batch=1"),
    ],
)
def test_what_is_not_assumed_is_named(assumed: tuple[str, ...], told: str) -> None:
    model = decoder()
    after, rule = lowered(model, *assumed)
    assert "Attention" in op_types(after)
    assert read(after) == []
    assert [told in site.detail for site in rule.sites] == [True]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("causal = LessOrEqual(columns, row)", "causal = GreaterOrEqual(columns, row)", "where"),
        ("mask = And(causal, padding)", "seen = And(causal, padding)\n  mask = Where(seen, slope, low)", "a bias"),
        ("mask = And(causal, padding)", "mask = Identity(padding)", "and the operator is causal"),
        ("scale = 0.25", "scale = 0.25, softmax_precision = 11", "type of its own"),
    ],
)
def test_left(old: str, new: str, told: str) -> None:
    head = HEAD.replace("float slope = {0.5}", "float slope = {0.5}, float low = {-1e30}")
    after, rule = lowered(decoder(BODY.replace(old, new), head), *NEEDED)
    assert "Attention" in op_types(after)
    assert [told in site.detail for site in rule.sites] == [True], rule.sites


def test_depth_and_float64_and_no_cache() -> None:
    narrow = HEAD.replace("{0, 0, 4, 16}", "{0, 0, 16, 4}").replace("{0, 0, 2, 16}", "{0, 0, 8, 4}")
    narrow = narrow.replace("2, past, 16]", "8, past, 4]").replace("2, total, 16]", "8, total, 4]")
    _, rule = lowered(decoder(CAUSAL + PLAIN + ATTENTION + AFTER, narrow), *NEEDED)
    assert ["multiples of 8" in site.detail for site in rule.sites] == [True]
    double = to_float64(decoder(CAUSAL + PLAIN + ATTENTION + AFTER))
    _, rule = lowered(double, *NEEDED)
    assert ["DOUBLE" in site.detail for site in rule.sites] == [True]
    alone = parse_weighted("""<ir_version: 10, opset_import: ["": 23]>
    g (float[b, 2, s, 16] q) => (float[b, 2, s, 16] y) { y = Attention<is_causal = 1>(q, q, q) }""")
    assert lowered(alone, *NEEDED)[1].sites == []


def test_a_shared_buffer_for_past_and_present() -> None:
    before = decoder()
    after, _ = lowered(before, *BATCHES)
    past, tokens, room = 5, 1, 12
    feeds = fed(3, past, tokens)
    session = ort.InferenceSession(ir.to_proto(after).SerializeToString(), providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for name in ("x", "attention_mask", "position_ids"):
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(feeds[name]))
    binding.bind_output("y")
    buffers = {}
    for name in ("key", "value"):
        buffer = np.zeros((3, 2, room, 16), dtype=np.float32)
        buffer[:, :, :past] = feeds[f"past_{name}"]
        buffers[name] = ort.OrtValue.ortvalue_from_numpy(buffer)
        binding.bind_ortvalue_input(f"past_{name}", buffers[name])
        binding.bind_ortvalue_output(f"present_{name}", buffers[name])
    session.run_with_iobinding(binding)
    expected = in_ort(before, feeds)
    np.testing.assert_allclose(binding.get_outputs()[0].numpy(), expected["y"], atol=1e-4)
    for name, value in buffers.items():
        np.testing.assert_allclose(value.numpy()[:, :, : past + tokens], expected[f"present_{name}"], atol=1e-5)
        assert not value.numpy()[:, :, past + tokens :].any()
