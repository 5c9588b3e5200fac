"""quantize-kv: what is written, that it computes nearly the same however a text is fed, and what is left alone."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from exactness import op_types, parse_weighted

from graphopt.api import optimize
from graphopt.calibration.text import TextDataset
from graphopt.errors import UsageError
from graphopt.graph.assumptions import Assumptions, read
from graphopt.graph.edits import sort
from graphopt.graph.kv_interface import kv_interface
from graphopt.graph.save import save
from graphopt.pass_manager import PassManager
from graphopt.passes.clean.eliminate_dead_code import EliminateDeadCode
from graphopt.passes.kv.quantize_kv import QuantizeKV, renamed
from graphopt.passes.lower.group_query_attention import GroupQueryAttention
from graphopt.recipe import load, shipped
from graphopt.report.summary import headline
from graphopt.runtime_ops.generation import Generator

HEAD = """<ir_version: 10, opset_import: ["": 23]>
g (int64[batch, seq] input_ids, int64[batch, total] attention_mask, int64[batch, seq] position_ids,
   float[batch, 2, past, 16] past_key, float[batch, 2, past, 16] past_value)
  => (float[batch, seq, 41] logits, float[batch, 2, total, 16] present_key, float[batch, 2, total, 16] present_value)
<float[41, 32] embedding, float[32, 64] wq, float[32, 32] wk, float[32, 32] wv, float[64, 41] wo, float[8] freq,
 float[512, 8] cosines, float[512, 8] sines, int64[4] qs = {0, 0, 4, 16}, int64[4] ks = {0, 0, 2, 16},
 int64[3] os = {0, 0, 64}, int64 zero = {0}, int64 one = {1}, int64 four = {4}, int64[1] last = {-1},
 int64[2] middle = {1, 2}> {
"""
MASK = """
  x = Gather(embedding, input_ids)
  t1 = Shape<start = 1, end = 2>(attention_mask)
  p1 = Shape<start = 2, end = 3>(past_key)
  t0 = Squeeze(t1)
  p0 = Squeeze(p1)
  columns = Range(zero, t0, one)
  rows = Range(p0, t0, one)
  row = Unsqueeze(rows, last)
  causal = LessOrEqual(columns, row)
  kept = Cast<to = 9>(attention_mask)
  padding = Unsqueeze(kept, middle)
  mask = And(causal, padding)
"""
POSITIONS = """
  wide = Unsqueeze(position_ids, last)
  number = Cast<to = 1>(wide)
  angle = Mul(number, freq)
  cos = Cos(angle)
  sin = Sin(angle)
"""
LAYER = """
  q1 = MatMul(x, wq)
  q2 = Reshape(q1, qs)
  q3 = Transpose<perm = [0, 2, 1, 3]>(q2)
  k1 = MatMul(x, wk)
  k2 = Reshape(k1, ks)
  k3 = Transpose<perm = [0, 2, 1, 3]>(k2)
  v1 = MatMul(x, wv)
  v2 = Reshape(v1, ks)
  v = Transpose<perm = [0, 2, 1, 3]>(v2)
"""
ROTATED = """
  q = RotaryEmbedding(q3, cos, sin)
  k = RotaryEmbedding(k3, cos, sin)
"""
ATTENTION = "  o, present_key, present_value = Attention<scale = 0.25>(q, k, v, mask, past_key, past_value)"
AFTER = """
  o1 = Transpose<perm = [0, 2, 1, 3]>(o)
  o2 = Reshape(o1, os)
  logits = MatMul(o2, wo)
"""
BODY = MASK + POSITIONS + LAYER + ROTATED + ATTENTION + AFTER
ASSUMED = ("no-left-padding", "counted-positions")
SMALL = {"block_size": 8, "window": 4}
"""Sizes at which short texts have quantized tokens."""


def decoder(body: str = BODY, head: str = HEAD) -> ir.Model:
    model = parse_weighted(f"{head}{body}}}")
    for value in model.graph.initializers.values():
        if (
            value.dtype == ir.DataType.FLOAT
            and value.const_value is not None
            and value.name not in ("cosines", "sines")
        ):
            value.const_value = ir.tensor(value.const_value.numpy() * np.float32(0.3), name=value.name)
    return model


def quantized(model: ir.Model, *assumed: str, **options: Any) -> tuple[ir.Model, QuantizeKV]:
    """The result of the pass on a copy, without what became dead, and the pass; a second run changes nothing."""
    after = model.clone()
    rule = QuantizeKV(**options)
    rule.assumptions = Assumptions.parse(assumed)
    rule(after)
    sort(after)
    EliminateDeadCode()(after)
    again = QuantizeKV(**options)
    again.assumptions = rule.assumptions
    assert not again(after).modified
    return after, rule


def generator(model: ir.Model, folder: Path, cache: Any = "auto") -> Generator:
    path = folder / f"{len(list(folder.iterdir()))}.onnx"
    save(model, path)
    return Generator(path, cache=cache)


def fed(running: Generator, ids: npt.NDArray[np.int64], pieces: Sequence[int]) -> npt.NDArray[np.float32]:
    """The logits after all tokens, read piece by piece."""
    decoding = running.start(len(ids), ids.shape[1])
    ends = list(itertools.accumulate(pieces))
    assert ends[-1] == ids.shape[1]
    return np.concatenate([decoding.feed(ids[:, e - n : e]).copy() for n, e in zip(pieces, ends, strict=True)], axis=1)


def off(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


IDS = np.random.default_rng(0).integers(0, 41, (3, 45))


# ---- what is written


def test_one_operator_in_place_of_attention_rotation_and_mask() -> None:
    after, rule = quantized(decoder(), *ASSUMED)
    assert [s.detail for s in rule.sites] == ["wrote QuantizedKVAttention: 8 bits, rotated when read"]
    types = op_types(after)
    assert types.count("QuantizedKVAttention") == 1
    assert not {"Attention", "RotaryEmbedding", "Transpose", "And", "LessOrEqual"} & set(types)
    (node,) = (n for n in after.graph if n.op_type == "QuantizedKVAttention")
    given = {name: attribute.value for name, attribute in node.attributes.items()}
    assert given["scale"] == 0.25
    assert (given["num_heads"], given["kv_num_heads"], given["rotate_at_read"], given["window"]) == (4, 2, 1, 32)
    assert {e.assumption for e in read(after)} == set(ASSUMED)
    assert [(v.name, str(v.dtype), str(v.shape)) for v in after.graph.inputs[3:]] == [
        ("past_codes", "UINT8", "[batch,past_blocks,2,1024]"),
        ("past_scales", "FLOAT16", "[batch,past_blocks,2,96]"),
        ("past_recent", "FLOAT16", "[batch,2,2,64,16]"),
    ]
    assert [v.name for v in after.graph.outputs] == ["logits", "present_codes", "present_scales", "present_recent"]
    assert ("ai.graphopt", "QuantizedKVAttention", "") in after.functions


def test_the_interface_is_read_off_the_graph() -> None:
    found = kv_interface(quantized(decoder(), *ASSUMED, **SMALL)[0])
    assert found is not None
    assert [(p.part, p.layout, p.axis) for p in found.pairs] == [
        ("codes", "BCHN", 1),
        ("scales", "BCHN", 1),
        ("recent", "BH2ND", None),
    ]
    assert found.shared_buffer
    assert found.problems == ()
    assert found.attention_mask == "attention_mask"
    assert found.mask_values
    assert [found.pairs[0].places(n) for n in (0, 11, 12, 19, 20)] == [0, 0, 1, 1, 2]


@pytest.mark.parametrize(
    ("key", "part", "expected"),
    [
        ("past_key_values.0.key", "codes", "past_key_values.0.codes"),
        ("present.3.key", "recent", "present.3.recent"),
        ("cache_keys_7", "scales", "cache_scales_7"),
        ("k7", "codes", "k7.codes"),
        ("monkey", "codes", "monkey.codes"),
    ],
)
def test_names_come_from_those_of_the_keys(key: str, part: str, expected: str) -> None:
    assert renamed(key)(part) == expected


@pytest.mark.parametrize(("assumed", "spelled"), [(("max-length=64",), False), ((), True)])
def test_rotations_of_all_positions(assumed: tuple[str, ...], spelled: bool, tmp_path: Path) -> None:
    before = decoder()
    after, _ = quantized(before, *ASSUMED, *assumed, **SMALL)
    assert ("Cos" in op_types(after)) == spelled
    expected = fed(generator(before, tmp_path), IDS[:1], [45])
    assert off(fed(generator(after, tmp_path), IDS[:1], [45]), expected) < 0.01


def test_rotations_that_are_a_table_already(tmp_path: Path) -> None:
    body = BODY.replace("(q3, cos, sin)", "(q3, cosines, sines, position_ids)")
    before = decoder(body.replace("(k3, cos, sin)", "(k3, cosines, sines, position_ids)"))
    after, rule = quantized(before, *ASSUMED, **SMALL)
    assert "rotated when read" in rule.sites[0].detail
    expected = fed(generator(before, tmp_path), IDS[:1], [45])
    assert off(fed(generator(after, tmp_path), IDS[:1], [30, 1, 14]), expected) < 0.01


def test_without_a_word_about_positions_the_rotation_stays_before_it(tmp_path: Path) -> None:
    before = decoder()
    after, rule = quantized(before, "no-left-padding", **SMALL)
    assert rule.sites[0].detail == "wrote QuantizedKVAttention: 8 bits, rotated before"
    assert op_types(after).count("RotaryEmbedding") == 2
    expected = fed(generator(before, tmp_path), IDS[:1], [45])
    assert off(fed(generator(after, tmp_path), IDS[:1], [30, 1, 14]), expected) < 0.01


def test_who_asks_for_the_length_of_the_cache_gets_it_from_the_mask(tmp_path: Path) -> None:
    counted = "  far = Cast<to = 1>(p0)\n  scaled = Mul(raw, far)\n  logits = Add(raw, scaled)\n"
    before = decoder(BODY.replace("logits = MatMul", "raw = MatMul") + counted)
    after, _ = quantized(before, *ASSUMED, **SMALL)
    expected = fed(generator(before, tmp_path), IDS[:1], [30, 3, 12])
    assert off(fed(generator(after, tmp_path), IDS[:1], [30, 3, 12]), expected) < 0.01


# ---- numbers

FORMS: list[dict[str, Any]] = [
    {},
    {"key_per_channel": False},
    {"group_size": 8},
    {"rotate_at_read": False},
    {"window": 0},
]


@pytest.mark.parametrize("cache", ["growing", "static"])
@pytest.mark.parametrize("options", FORMS)
def test_near_the_original_however_a_text_is_fed(options: dict[str, Any], cache: str, tmp_path: Path) -> None:
    before = decoder()
    after = generator(quantized(before, *ASSUMED, **{**SMALL, **options})[0], tmp_path, cache)
    assert after.cache == cache
    whole = fed(generator(before, tmp_path), IDS, [45])
    for pieces in ([45], [20, 25], [30, *[1] * 15], [1] * 45):
        assert off(fed(after, IDS, pieces), whole) < 0.01


def test_the_portable_body_computes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    after, _ = quantized(decoder(), *ASSUMED, key_bits=4, value_bits=3, **SMALL)
    expected = fed(generator(after, tmp_path), IDS, [20, 25])
    monkeypatch.setenv("GRAPHOPT_LIBRARY", "")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it is slower
        running = [generator(after, tmp_path, cache) for cache in ("growing", "static")]
    for body in running:
        assert off(fed(body, IDS, [20, 25]), expected) < 1e-4


def test_fewer_bits_cost_more(tmp_path: Path) -> None:
    before = decoder()
    expected = fed(generator(before, tmp_path), IDS, [45])
    errors = [
        off(
            fed(generator(quantized(before, *ASSUMED, key_bits=b, value_bits=b, **SMALL)[0], tmp_path), IDS, [45]),
            expected,
        )
        for b in (8, 4, 3, 2)
    ]
    assert errors == sorted(errors)
    assert errors[0] < 0.01 < errors[2] < 0.5


@pytest.mark.parametrize("cache", ["growing", "static"])
def test_rows_of_several_lengths(cache: str, tmp_path: Path) -> None:
    running = generator(quantized(decoder(), *ASSUMED, **SMALL)[0], tmp_path, cache)
    prompts = [IDS[0, :30].tolist(), IDS[1, :7].tolist(), IDS[2, :19].tolist()]
    alone = [running.generate([prompt], max_new_tokens=20)[0] for prompt in prompts]
    assert running.generate(prompts, max_new_tokens=20) == alone
    assert [running.generate([p], max_new_tokens=20, chunk=4)[0] for p in prompts] == alone
    equal = [prompt[:7] for prompt in prompts]
    assert running.generate(equal, max_new_tokens=9, chunk=3) == running.generate(equal, max_new_tokens=9)


def test_half_precision(tmp_path: Path) -> None:
    half = (HEAD + BODY).replace("float[", "float16[").replace("to = 1>", "to = 10>")
    before = parse_weighted(half + "}")
    after, _ = quantized(before, *ASSUMED, **SMALL)
    (node,) = (n for n in after.graph if n.op_type == "QuantizedKVAttention")
    assert [v.dtype for v in node.inputs[7:] if v is not None and v.is_initializer()] in (
        [],
        [ir.DataType.FLOAT, ir.DataType.FLOAT],
    )
    expected = fed(generator(before, tmp_path), IDS, [45]).astype(np.float32)
    assert off(fed(generator(after, tmp_path), IDS, [20, 25]).astype(np.float32), expected) < 0.05


def test_a_window_and_a_softcap(tmp_path: Path) -> None:
    near = (
        "  far = Sub(row, columns)\n  near = Less(far, four)\n  both = And(causal, near)\n  mask = And(both, padding)"
    )
    body = BODY.replace("  mask = And(causal, padding)", near).replace("scale = 0.25", "scale = 0.25, softcap = 2.0")
    before = decoder(body)
    after, rule = quantized(before, *ASSUMED, **SMALL)
    assert "window 4" in rule.sites[0].detail
    expected = fed(generator(before, tmp_path), IDS, [45])
    assert off(fed(generator(after, tmp_path), IDS, [20, 25]), expected) < 0.01


# ---- what is left


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("causal = LessOrEqual(columns, row)", "causal = GreaterOrEqual(columns, row)", "its mask is"),
        ("x = Gather(embedding, input_ids)", "n = ReduceMax<keepdims = 0>(past_key)\n  e = Gather(embedding, input_ids)\n"
         "  x = Add(e, n)", "'past_key' is read by a ReduceMax too"),
        ("logits = MatMul(o2, wo)", "n = ReduceMax<keepdims = 0>(present_key)\n  raw = MatMul(o2, wo)\n"
         "  logits = Add(raw, n)", "'present_key' is read by a ReduceMax"),
        ("mask, past_key, past_value)", ", past_key, past_value)", "--assume"),
    ],
)  # fmt: skip
def test_left(old: str, new: str, told: str) -> None:
    body = BODY.replace(old, new)
    if told == "--assume":
        body, told = body.replace("scale = 0.25", "scale = 0.25, is_causal = 1"), "no attention mask"
        body = body[body.index("  x =") :].replace("total", "total")
        head = HEAD.replace("int64[batch, total] attention_mask, ", "")
        start, end = body.index("  t1 ="), body.index("  wide =")
        body = body[:start] + body[end:]
    else:
        head = HEAD
    after, rule = quantized(decoder(body, head), *ASSUMED)
    assert "Attention" in op_types(after)
    assert not after.functions
    assert [told in site.detail for site in rule.sites] == [True], rule.sites


def test_what_is_not_assumed_is_named() -> None:
    after, rule = quantized(decoder())
    assert [s.detail for s in rule.sites] == [
        "not QuantizedKVAttention: rows may be padded on the left: --assume no-left-padding"
    ]
    assert read(after) == []


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"key_bits": 5}, "2, 3, 4 or 8 bits"),
        ({"block_size": 6}, "multiples of 4"),
        ({"window": -1}, "can't be negative"),
        ({"operator": "other"}, '"graphopt" or "contrib"'),
        ({"operator": "contrib", "key_bits": 4}, "of 8 bits or of 4"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        QuantizeKV(**options)


def test_groups_that_dont_divide_a_head() -> None:
    _, rule = quantized(decoder(), *ASSUMED, group_size=12)
    assert ["groups of 12" in site.detail for site in rule.sites] == [True]


# ---- ONNX Runtime's operator with static scales


def static(bits: int) -> tuple[ir.Model, ir.Model, QuantizeKV]:
    """The model with GroupQueryAttention, and with its cache quantized."""
    before = decoder()
    lower = GroupQueryAttention()
    lower.assumptions = Assumptions.parse((*ASSUMED, "no-batched-chunks"))
    lower(before)
    sort(before)
    after = before.clone()
    rule = QuantizeKV(operator="contrib", key_bits=bits, value_bits=bits)
    text = np.random.default_rng(1).integers(0, 41, 500)
    PassManager([rule], verify="none", calibration=TextDataset(text, 100))(after)
    return before, after, rule


@pytest.mark.parametrize(("bits", "dtype", "depth", "worst"), [(8, "INT8", 16, 0.02), (4, "UINT8", 8, 0.3)])
def test_static_scales(bits: int, dtype: str, depth: int, worst: float, tmp_path: Path) -> None:
    before, after, rule = static(bits)
    assert [s.detail for s in rule.sites] == [f"GroupQueryAttention with a cache of {bits} bits and static scales"]
    assert [(str(v.dtype), v.shape[3]) for v in after.graph.inputs[3:] if v.shape is not None] == [(dtype, depth)] * 2
    assert not rule(after).modified
    expected = fed(generator(before, tmp_path), IDS[:1], [45])
    for cache in ("growing", "static"):
        error = off(fed(generator(after, tmp_path, cache), IDS[:1], [30, *[1] * 15]), expected)
        assert error < worst
    assert bits == 8 or error > 0.01


def test_static_scales_need_text() -> None:
    with pytest.raises(UsageError, match="'quantize-kv' needs calibration data"):
        PassManager([QuantizeKV(operator="contrib")])
    assert QuantizeKV().needs == ()


# ---- the recipes


@pytest.mark.parametrize(
    ("name", "step"), [("kv8", "quantize-kv"), ("kv4", {"quantize-kv": {"key_bits": 4, "value_bits": 4}})]
)
def test_recipes_are_the_exact_one_with_the_pass_in_place(name: str, step: Any) -> None:
    data = load(shipped_name := name).to_data()
    assert shipped_name in shipped()
    place = data["passes"].index(step)
    assert place == len(load("canonical").steps)
    assert [p for p in data["passes"] if p != step] == load("exact").to_data()["passes"]
    assert data["assume"] == list(ASSUMED)


@pytest.mark.parametrize("name", ["kv8", "kv4"])
def test_recipes_run_and_later_passes_are_judged_on_the_new_interface(name: str, tmp_path: Path) -> None:
    before = decoder()
    result = optimize(before.clone(), name)
    assert result.report.ok
    records = {record.name: record for record in result.report.run.records if record.status == "applied"}
    assert records["quantize-kv"].guarantee == "lossy"
    assert records["quantize-kv"].verdict is None
    assert result.report.run.verdict is not None
    assert result.report.run.verdict.ok
    assert "but for the loss of quantize-kv" in headline(result.report.to_dict())
    expected = fed(generator(before, tmp_path), IDS, [45])
    assert off(fed(generator(result.model, tmp_path), IDS, [45]), expected) < 0.01  # all still in the window
