"""Channel folds: where factors of channels go, by dataflow, without changing the function."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from exactness import op_types, parse_weighted, random_feeds, reference_outputs
from hypothesis import given, settings
from hypothesis import strategies as st
from scaled_graphs import ATTENTION, HEAD, SPELLED_OUT, gated, numbers_of
from tiny_decoders import decoder
from tiny_transformers import exported, feeds

from graphopt import api
from graphopt.analysis.dims import Dim
from graphopt.analysis.shapes import infer
from graphopt.graph.edits import Editor
from graphopt.graph.load import load
from graphopt.passes.quantize.channel_folds import ChannelFold, ChannelFolds, ReaderGroup, scale
from graphopt.passes.quantize.factor_numbers import regrouped
from graphopt.runtime_ops.memory_session import make_session


def folds_of(model: ir.Model) -> dict[str, tuple[ReaderGroup, ChannelFold]]:
    found = ChannelFolds(model, infer(model))
    groups = [group for group in found.groups() if isinstance(group, ReaderGroup)]
    return {g.label: (g, fold) for g in groups if isinstance(fold := found.fold(g), ChannelFold)}


def reasons_of(model: ir.Model) -> dict[str, str]:
    found = ChannelFolds(model, infer(model))
    result = {}
    for group in found.groups():
        if not isinstance(group, ReaderGroup):
            result[group[0].role] = group[1]
        elif isinstance(fold := found.fold(group), str):
            result[group.label] = fold
    return result


def scaled(model: ir.Model, seed: int = 0) -> tuple[ir.Model, list[str]]:
    """A copy whose groups are scaled at random, and what was scaled."""
    copy = model.clone()
    facts, edit, rng, done = infer(copy), Editor(copy), np.random.default_rng(seed), []
    for label, (group, fold) in folds_of(copy).items():
        assert scale(group, fold, np.exp(rng.normal(size=fold.count)), facts, edit) is None
        done.append(label)
    return copy, done


def assert_same(before: ir.Model, after: ir.Model, rtol: float = 1e-12) -> None:
    for seed in range(2):
        inputs = random_feeds(before, seed)
        for a, b in zip(reference_outputs(before, inputs), reference_outputs(after, inputs), strict=True):
            assert np.abs(a - b).max() <= rtol * np.abs(a).max()
    assert op_types(before) == op_types(after)


# ---- folds


@pytest.mark.parametrize(
    ("text", "labels"),
    [(gated(), ["gate, up", "down"]), (ATTENTION, ["q, k, v", "o"]), (SPELLED_OUT, ["o"])],
    ids=["gated", "attention", "packed"],
)
def test_scaling_at_random_changes_nothing(text: str, labels: list[str]) -> None:
    before = parse_weighted(text)
    after, done = scaled(before)
    assert done == labels
    assert_same(before, after)
    changed = [
        k
        for k, v in before.graph.initializers.items()
        if not np.array_equal(numbers_of(v), numbers_of(after.graph.initializers[k]))
    ]
    assert len(changed) == len(before.graph.initializers) - (text is gated())


def test_query_heads_share_the_factors_of_their_values() -> None:
    _, fold = folds_of(parse_weighted(ATTENTION))["o"]
    assert fold.count == 8
    assert fold.depth == 4
    heads = fold.numbers.reshape(4, 4)
    assert (heads[0] == heads[1]).all()
    assert (heads[2] == heads[3]).all()
    assert (np.sort(np.unique(fold.numbers)) == np.arange(8)).all()
    assert fold.linear


def test_of_packed_queries_keys_and_values_the_values_alone_are_scaled() -> None:
    before = parse_weighted(SPELLED_OUT)
    _, fold = folds_of(before)["o"]
    assert fold.count == 4
    (taker,) = fold.takers
    assert (taker.numbers[:20] == fold.count).all()
    after, _ = scaled(before)
    old, new = (numbers_of(m.graph.initializers["packed"]) for m in (before, after))
    assert np.array_equal(old[:, :20], new[:, :20])
    assert not np.isclose(old[:, 20:], new[:, 20:]).any()


@pytest.mark.parametrize("how", ["gather", "slice", "split"])
def test_values_are_found_in_a_stack_of_queries_keys_and_values(how: str) -> None:
    """[batch, seq, 3, heads, depth], parted along the third axis as vision transformers are written."""
    parts = {
        "gather": """zero = Constant<value_int = 0>()
  one = Constant<value_int = 1>()
  two = Constant<value_int = 2>()
  q = Gather<axis = 0>(stacked, zero)
  k = Gather<axis = 0>(stacked, one)
  v = Gather<axis = 0>(stacked, two)""",
        "slice": """zero = Constant<value_ints = [0]>()
  one = Constant<value_ints = [1]>()
  two = Constant<value_ints = [2]>()
  three = Constant<value_ints = [3]>()
  q5 = Slice(stacked, zero, one, zero)
  k5 = Slice(stacked, one, two, zero)
  v5 = Slice(stacked, two, three, zero)
  q = Squeeze(q5, zero)
  k = Squeeze(k5, zero)
  v = Squeeze(v5, zero)""",
        "split": """zero = Constant<value_ints = [0]>()
  q5, k5, v5 = Split<axis = 0, num_outputs = 3>(stacked)
  q = Squeeze(q5, zero)
  k = Squeeze(k5, zero)
  v = Squeeze(v5, zero)""",
    }[how]
    before = parse_weighted(
        f"""{HEAD}g (double[2, seq, 12] x) => (double[2, seq, 12] y) <double[12, 36] packed, double[12, 12] wo> {{
  all = MatMul(x, packed)
  wide = Constant<value_ints = [0, 0, 3, 2, 6]>()
  five = Reshape(all, wide)
  stacked = Transpose<perm = [2, 0, 3, 1, 4]>(five)
  {parts}
  a4 = Attention(q, k, v)
  at = Transpose<perm = [0, 2, 1, 3]>(a4)
  merged = Constant<value_ints = [0, 0, 12]>()
  a = Reshape(at, merged)
  y = MatMul(a, wo)
}}"""
    )
    _, fold = folds_of(before)["o"]
    assert fold.count == 12
    assert (fold.takers[0].numbers[:24] == 12).all()
    assert (fold.takers[0].numbers[24:] == np.arange(12)).all()
    assert_same(before, scaled(before)[0])


def test_a_relu_passes_factors_on_and_a_gelu_does_not() -> None:
    text = f"""{HEAD}g (double[batch, 8] x) => (double[batch, 8] y)
<double[8, 12] w1, double[12] b1, double[12, 8] w2> {{
  a = MatMul(x, w1)
  b = Add(a, b1)
  c = ACT(b)
  y = MatMul(c, w2)
}}"""
    before = parse_weighted(text.replace("ACT", "Relu"))
    after, done = scaled(before)
    assert done == ["fc2"]
    assert_same(before, after)
    assert "doesn't commute" in reasons_of(parse_weighted(text.replace("ACT", "Gelu")))["fc2"]


def test_the_gate_takes_factors_where_its_activation_lets_them_through() -> None:
    text = gated("act = Relu(a)").replace("b = MatMul(n, up)", "b0 = MatMul(n, up)\n  b = Tanh(b0)")
    before = parse_weighted(text)
    _, fold = folds_of(before)["down"]
    assert [taker.node.outputs[0].name for taker in fold.takers] == ["a"]
    assert_same(before, scaled(before)[0])


def test_two_terms_of_a_sum_take_the_same_factors() -> None:
    before = parse_weighted(
        f"""{HEAD}g (double[batch, 8] x) => (double[batch, 4] y)
<double[8, 6] w, double[8, 2] a, double[2, 6] b, double[6, 4] w2> {{
  first = MatMul(x, w)
  low = MatMul(x, a)
  second = MatMul(low, b)
  both = Add(first, second)
  act = Relu(both)
  y = MatMul(act, w2)
}}"""
    )
    _, fold = next(pair for label, pair in folds_of(before).items() if len(pair[1].takers) == 2)
    assert len(fold.takers) == 2
    assert_same(before, scaled(before)[0])


def test_what_else_reads_the_value_stands_in_the_way() -> None:
    post = f"""{HEAD}g (double[batch, seq, 8] x) => (double[batch, seq, 8] y)
<double[8] gain, double[8, 8] w> {{
  n = RMSNormalization<axis = -1>(x, gain)
  z = MatMul(n, w)
  y = Add(n, z)
}}"""
    assert "addition" in next(iter(reasons_of(parse_weighted(post)).values()))
    seen = gated().replace("(double[batch, seq, 16] y)", "(double[batch, seq, 16] y, double[batch, seq, 24] b)")
    assert "graph output" in reasons_of(parse_weighted(seen))["down"]


def test_shared_weights_and_inputs_are_left() -> None:
    shared = gated().replace("b = MatMul(n, up)", "b = MatMul(n, gate)")
    assert "shared" in reasons_of(parse_weighted(shared))["gate, up"]
    assert "input of the graph" in reasons_of(parse_weighted(SPELLED_OUT))["qkv"]


@pytest.mark.parametrize("kind", ["attention", "concat", "group-query"])
def test_the_values_of_a_cache_are_scaled_with_the_new_ones(kind: Any) -> None:
    before = api.canonical(ir.from_proto(decoder(kind, layers=2)))
    after, done = scaled(before)
    assert done.count("o") == 1  # by label: both layers
    assert folds_of(before)["o"][1].cached
    # Two steps, each model on its own cache.
    logits = []
    for model in (before, after):
        session = make_session(model)
        names = [o.name for o in session.get_outputs()]
        state = {i.name: np.zeros((2, 2, 0, 16), np.float32) for i in session.get_inputs() if "past" in i.name}
        for new, total in ((3, 3), (1, 4)):
            ids = np.random.default_rng(total).integers(0, 41, (2, new))
            given_ = {"input_ids": ids, "attention_mask": np.ones((2, total), np.int64), **state}
            found = dict(zip(names, session.run(None, given_), strict=True))
            state = {k: found[k.replace("past_key_values", "present")] for k in state}
        logits.append(found["logits"])
    np.testing.assert_allclose(logits[0], logits[1], rtol=0, atol=1e-4 * np.abs(logits[0]).max())


@given(
    sizes=st.lists(st.sampled_from([1, 2, 3, 4]), min_size=2, max_size=4),
    split=st.integers(0, 3),
    seed=st.integers(0, 9),
)
@settings(max_examples=50, deadline=None)
def test_numbers_follow_a_reshape_as_elements_do(sizes: list[int], split: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    varies = rng.integers(0, 2, len(sizes)).astype(bool)
    shape = [n if v else 1 for n, v in zip(sizes, varies, strict=True)]
    numbers = rng.permutation(int(np.prod(shape))).reshape(shape)
    at = min(split, len(sizes) - 1)
    target = [*sizes[:at], int(np.prod(sizes[at:]))]
    found = regrouped(numbers, [Dim.of(n) for n in sizes], [Dim.of(n) for n in target])
    assert found is not None
    expected = np.broadcast_to(numbers, sizes).reshape(target)
    assert np.array_equal(np.broadcast_to(found, target), expected)
    back = regrouped(found, [Dim.of(n) for n in target], [Dim.of(n) for n in sizes])
    assert back is not None
    assert np.array_equal(np.broadcast_to(back, sizes), np.broadcast_to(numbers, sizes))


# ---- real forms of exporters


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", {"q, k, v", "o", "gate, up", "down", "head"}),
        ("bert", {"o"}),
    ],
)
def test_exported_transformers(name: str, expected: set[str]) -> None:
    before = api.canonical(load(exported(name)))
    after, done = scaled(before)
    assert set(done) == expected
    first, second = (make_session(m).run(None, feeds(name))[0] for m in (before, after))
    np.testing.assert_allclose(first, second, rtol=0, atol=1e-5 * np.abs(first).max())
