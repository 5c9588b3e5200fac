"""Tokens dropped from a cache: budgets that are kept, what always stays, and generation with it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_decoders import decoder

from graphopt import Eviction, Generator
from graphopt.api import canonical, optimize
from graphopt.errors import InputDataError, UsageError
from graphopt.graph.save import save
from graphopt.runtime_ops.eviction import Evictor
from graphopt.runtime_ops.token_budgets import Allocation, budgets, by_chunks, places

ALLOCATIONS = get_args(Allocation)
ASSUMED = ("no-left-padding", "no-batched-chunks", "counted-positions", "max-length=128")
PROMPT = [(7 * i + 3) % 41 for i in range(40)]


def scores_of(lengths: list[int], seed: int) -> list[np.ndarray]:
    """Attention as uneven as that of a model."""
    rng = np.random.default_rng(seed)
    return [rng.dirichlet(np.full(n, 0.2), size=(1, 2)).astype(np.float32) for n in lengths]


layers = st.lists(st.integers(1, 60), min_size=1, max_size=6)


@settings(max_examples=100, deadline=None)
@given(
    layers, st.integers(0, 300), st.sampled_from(ALLOCATIONS), st.integers(0, 5), st.integers(1, 8), st.integers(0, 9)
)
def test_budgets_are_kept(lengths: list[int], total: int, allocation: Any, sinks: int, recent: int, seed: int) -> None:
    scores = scores_of(lengths, seed)
    ends = {"sinks": sinks, "recent": recent, "minimum": 5, "most": 100.0}
    counts = budgets(scores, total, allocation, **ends)
    stay = [min(n, sinks + recent) for n in lengths]
    assert all(s <= c <= n for s, c, n in zip(stay, counts, lengths, strict=True))
    assert sum(counts) == max(sum(stay), min(total, sum(lengths))) or allocation == "dynamic"
    assert sum(counts) <= max(sum(stay), total)
    more = budgets(scores, total + 7, allocation, **ends)
    assert all(a <= b for a, b in zip(counts, more, strict=True))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 50), st.integers(0, 5), st.integers(1, 8), st.integers(1, 9), st.integers(0, 9), st.data())
def test_places_hold_what_stays(length: int, sinks: int, recent: int, chunk: int, seed: int, data: Any) -> None:
    ends = {"sinks": sinks, "recent": recent}
    (scores,) = scores_of([length], seed)
    count = data.draw(st.integers(min(length, sinks + recent), length))
    pooled = by_chunks(scores, chunk, **ends)
    assert pooled.shape == scores.shape
    np.testing.assert_allclose(pooled.sum(-1), scores.sum(-1), rtol=1e-5)
    found = places(pooled, count, **ends)
    assert found.shape == (1, 2, count)
    assert (np.diff(found, axis=-1) > 0).all()
    for row in found[0]:
        assert set(range(min(sinks, length))) <= set(row)
        assert set(range(max(length - recent, 0), length)) <= set(row)
    for head in range(2):
        gone = np.delete(pooled[0, head], found[0, head])
        middle = [p for p in found[0, head] if sinks <= p < length - recent]
        if len(gone) and middle:
            assert pooled[0, head][middle].min() >= gone.max()


def test_chunks_stay_whole() -> None:
    scores = np.zeros((1, 1, 20), dtype=np.float32)
    scores[0, 0, [6, 13]] = 3, 2
    found = places(by_chunks(scores, 4, sinks=2, recent=3), 2 + 3 + 8, sinks=2, recent=3)
    assert found[0, 0].tolist() == [0, 1, 6, 7, 8, 9, 10, 11, 12, 13, 17, 18, 19]
    cut = places(by_chunks(scores, 4, sinks=2, recent=3), 2 + 3 + 2, sinks=2, recent=3)
    assert cut[0, 0].tolist() == [0, 1, 6, 7, 17, 18, 19]


def flat_and_sharp() -> list[np.ndarray]:
    """A layer whose attention is even, and one where few tokens get it."""
    flat, sharp = np.full(100, 0.01), np.full(100, 0.1 / 95)
    sharp[40:45] = 0.9 / 5
    return [np.broadcast_to(row, (1, 2, 100)).astype(np.float32) for row in (flat, sharp)]


def test_a_layer_of_even_attention_gets_more() -> None:
    assert budgets(flat_and_sharp(), 80, "uniform") == [40, 40]
    # 90 of 100 tokens hold 90 % in one, 5 in the other.
    assert budgets(flat_and_sharp(), 95, "uncertainty", share=0.899) == [90, 5]
    assert budgets(flat_and_sharp(), 80, "uncertainty", share=0.899, minimum=30) == [49, 31]
    flat, sharp = budgets(flat_and_sharp(), 95, "prefix")
    assert flat + sharp == 95
    assert abs(flat * 0.01 - 0.9) < 0.02
    assert budgets(flat_and_sharp(), 50, "dynamic") == [45, 5]
    assert budgets(flat_and_sharp(), 50, "dynamic", most=1.2) == [30, 20]


def test_prefix_is_what_a_binary_search_finds() -> None:
    scores = scores_of([80, 80, 60, 30], 4)
    total = 90
    curves = [np.cumsum(-np.sort(-s.astype(np.float64), axis=-1).mean((0, 1))) for s in scores]
    low, high = 0.0, 1.0
    for _ in range(100):
        middle = (low + high) / 2
        if sum(int((curve / curve[-1] < middle).sum()) + 1 for curve in curves) <= total:
            low = middle
        else:
            high = middle
    found = [int((curve / curve[-1] < low).sum()) + 1 for curve in curves]
    assert budgets(scores, total, "prefix") == found


def test_nothing_fits_more_than_it_may() -> None:
    assert budgets(scores_of([10, 10], 0), 0, "uniform", sinks=1, recent=2) == [3, 3]
    assert budgets(scores_of([10, 2], 0), 100, "prefix", sinks=1, recent=2) == [10, 2]


def test_neighbours_share_places() -> None:
    eviction = Eviction(10, reuse=2, recent=2, sinks=1)
    chosen = eviction.chosen(scores_of([30, 30, 30, 20, 20], 1), 30)
    assert [found.shape[-1] for found in chosen] == [10] * 5
    assert [a is b for a, b in itertools.pairwise(chosen)] == [True, False, False, True]


# ---- generation


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evictable")
    model = ir.from_proto(decoder("attention", layers=3))
    canonical(model)
    save(model, folder / "plain.onnx")
    for name, more in (("prepared", ()), ("lowered", ("lower",)), ("own", ("lower+decode",))):
        recipe = {"passes": [{"evictable-kv": {"window": 8}}, *({"recipe": one} for one in more)]}
        save(optimize(model.clone(), recipe, verify="none", assume=ASSUMED).model, folder / f"{name}.onnx")
    return folder


@pytest.mark.parametrize("name", ["prepared", "lowered", "own"])
def test_a_budget_of_all_tokens_drops_none(folder: Path, name: str) -> None:
    prompts = [PROMPT, PROMPT[::-1]]
    plain, generator = Generator(folder / "plain.onnx"), Generator(folder / f"{name}.onnx")
    expected = plain.generate(prompts, max_new_tokens=20, stop=())
    assert generator.generate(prompts, max_new_tokens=20, stop=()) == expected
    for eviction in (Eviction(1.0, every=3), Eviction(200, every=3), Eviction(1.0, chunk=4, reuse=2, every=5)):
        assert generator.generate(prompts, max_new_tokens=20, stop=(), eviction=eviction) == expected


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("name", ["prepared", "lowered", "own"])
def test_caches_are_cut_to_their_budget(folder: Path, name: str, allocation: Any) -> None:
    generator = Generator(folder / f"{name}.onnx")
    eviction = Eviction(16, allocation, recent=4, sinks=2, every=10, minimum=8)
    decoding = generator.start(1, 80)
    evictor = Evictor(decoding, eviction)
    ids = np.array([PROMPT])
    logits = generator.prefill(decoding, ids, chunk=16, evictor=evictor)

    def lengths() -> list[int]:
        return [decoding.caches[f"past_key_values.{layer}.key"].shape()[2] for layer in range(3)]

    assert sum(lengths()) == 48
    assert (len(set(lengths())) == 1) == (allocation == "uniform")
    full = generator.start(1, 80)
    np.testing.assert_allclose(logits, generator.prefill(full, ids), atol=1e-4)  # of before the first was dropped
    for step in range(1, 25):
        evictor.step(np.array([[5]]))
        assert sum(lengths()) == 48 + 3 * (step % 10)
    assert int(decoding.lengths[0]) == 64


def test_all_operators_keep_the_same(folder: Path) -> None:
    eviction = Eviction(0.4, "prefix", recent=4, sinks=2, every=6, chunk=3)
    texts = [
        Generator(folder / f"{name}.onnx").generate([PROMPT], max_new_tokens=30, stop=(), eviction=eviction)
        for name in ("prepared", "lowered", "own")
    ]
    assert texts[0] == texts[1] == texts[2]


def test_the_last_piece_of_a_prompt_is_as_long_as_what_is_looked_at(folder: Path) -> None:
    """A prompt in pieces keeps what one in one piece does, though its last piece would have one token."""
    kept = []
    for chunk in (13, 64):
        generator = Generator(folder / "prepared.onnx")
        decoding = generator.start(1, 80)
        evictor = Evictor(decoding, Eviction(16, "prefix", recent=4, sinks=2))
        generator.prefill(decoding, np.array([PROMPT]), chunk=chunk, evictor=evictor)
        kept.append({name: value.numpy() for name, value in decoding.caches.items()})
    for name, array in kept[0].items():
        np.testing.assert_allclose(array, kept[1][name], atol=1e-5)


def test_a_fork_goes_on_by_itself(folder: Path) -> None:
    generator = Generator(folder / "lowered.onnx")
    decoding = generator.start(1, 80)
    decoding.feed(np.array([PROMPT]))
    fork = decoding.fork()
    first = np.array(fork.feed(np.array([[1, 2]])))
    fork.feed(np.array([[3]]))
    assert np.array_equal(first, decoding.feed(np.array([[1, 2]])))
    assert (int(fork.lengths[0]), int(decoding.lengths[0])) == (43, 42)


def test_what_is_refused(folder: Path, tmp_path: Path) -> None:
    eviction = Eviction(16, recent=4, sinks=2)
    with pytest.raises(UsageError, match="prepare it with the pass evictable-kv"):
        Generator(folder / "plain.onnx").generate([PROMPT], eviction=eviction)
    onnx.save(decoder("group-query"), tmp_path / "static.onnx")
    with pytest.raises(UsageError, match="only with a growing cache"):
        Generator(tmp_path / "static.onnx").start(1, 8).fork()
    generator = Generator(folder / "prepared.onnx")
    with pytest.raises(InputDataError, match="different lengths"):
        generator.generate([PROMPT, PROMPT[:5]], eviction=eviction)
    for name in ("prepared", "lowered", "own"):
        # Without eviction, too: padding would be counted.
        with pytest.raises(InputDataError, match="different lengths"):
            Generator(folder / f"{name}.onnx").generate([PROMPT, PROMPT[:5]])
    decoding = generator.start(2, 8)
    with pytest.raises(InputDataError, match="all prompts have one length"):
        Evictor(decoding, eviction).feed(np.array([[1], [2]]), np.array([[True], [False]]))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"budget": 0}, "budget"), ({"budget": 1.5}, "budget"), ({"budget": True}, "budget"),
        ({"budget": 20}, "no room"), ({"budget": 0.5, "allocation": "best"}, "allocation"),
        ({"budget": 0.5, "recent": 0}, "recent"), ({"budget": 0.5, "chunk": 0}, "chunk"),
        ({"budget": 0.5, "share": 0.0}, "share"), ({"budget": 0.5, "every": 0}, "every"),
    ],
)  # fmt: skip
def test_options_that_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        Eviction(**options)
