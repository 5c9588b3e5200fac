"""Statistics gathered block by block equal NumPy's over all rows at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.calibration.statistics import (
    AbsMax,
    Histogram,
    MeanAbs,
    MeanVariance,
    MinMax,
    Rows,
    SecondMoment,
    Statistic,
    Summary,
    percentile,
)

RNG = np.random.default_rng(0)
DATA = (RNG.normal(size=(300, 7)) * np.geomspace(0.01, 100, 7) + np.arange(7)).astype(np.float32)
WEIGHTS = RNG.random(300)


def gathered(
    statistic: Statistic, blocks: Sequence[np.ndarray], weights: Sequence[np.ndarray] | None = None
) -> Summary:
    accumulator = statistic.accumulator()
    for index, block in enumerate(blocks):
        accumulator.add(block, None if weights is None else weights[index])
    return accumulator.summary()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 299), max_size=5), st.booleans())
def test_any_blocks_give_what_all_rows_give(cuts: list[int], weighted: bool) -> None:
    at = sorted(set(cuts))
    blocks, parts = np.split(DATA, at), np.split(WEIGHTS, at) if weighted else None
    share = WEIGHTS if weighted else np.ones(300)
    wide = DATA.astype(np.float64)
    mean = share @ wide / share.sum()
    expected = {
        "absmax": (AbsMax(True), np.abs(DATA).max(axis=0)),
        "low": (MinMax(True), DATA.min(axis=0)),
        "high": (MinMax(), DATA.max()),
        "mean_abs": (MeanAbs(), share @ np.abs(wide) / share.sum()),
        "mean": (MeanVariance(), mean),
        "variance": (MeanVariance(), share @ np.square(wide - mean) / share.sum()),
        "second_moment": (SecondMoment(), (wide * share[:, None]).T @ wide / share.sum()),
    }
    for name, (statistic, value) in expected.items():
        found = gathered(statistic, blocks, parts)
        np.testing.assert_allclose(found[name], value, rtol=2e-5, atol=1e-5, err_msg=name)
        assert found.rows == 300
        assert found.excluded == 0
        assert found.weight == pytest.approx(share.sum())


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 299), max_size=5), st.floats(0.001, 0.999))
def test_percentiles(cuts: list[int], fraction: float) -> None:
    found = gathered(Histogram(bins=4096), np.split(DATA, sorted(set(cuts))))
    width = 2 * float(found["range"]) / 4096
    assert found["counts"].sum() == DATA.size
    low, high = (np.quantile(DATA, fraction, method=method) for method in ("lower", "higher"))
    assert low - width <= percentile(found, fraction) <= high + width


def test_a_histogram_grows_to_what_comes_later() -> None:
    found = gathered(Histogram(bins=8), [np.zeros((3, 1)), np.full((1, 1), 0.3), np.full((2, 1), -3.0)])
    assert float(found["range"]) == 4
    assert found["counts"].tolist() == [0, 2, 0, 0, 4, 0, 0, 0]


def test_what_is_not_finite_is_left_out_and_counted() -> None:
    block = DATA.copy()
    block[3, 2], block[5, 1], block[8, 0] = -np.inf, np.nan, np.finfo(np.float32).min
    kept = np.delete(DATA, [3, 5, 8], axis=0)
    for statistic, expected in ((MeanAbs(), np.abs(kept).mean(axis=0)), (SecondMoment(), kept.T @ kept / len(kept))):
        found = gathered(statistic, [block])
        np.testing.assert_allclose(found.array, expected, rtol=1e-4, atol=1e-4)
        assert (found.rows, found.excluded) == (297, 3)
    usable = np.abs(block) < 1e30
    found = gathered(MinMax(True), [block])
    np.testing.assert_array_equal(found["low"], np.where(usable, block, np.inf).min(axis=0))
    assert found.excluded == 3
    assert gathered(Histogram(), [block])["counts"].sum() == block.size - 3
    # A mask of nothing but -inf has no range, and no error.
    assert gathered(AbsMax(), [np.full((2, 3), -np.inf)]).array == 0


def test_a_wide_second_moment_is_symmetric() -> None:
    block = np.random.default_rng(1).normal(size=(40, 1200)).astype(np.float32)
    found = gathered(SecondMoment(), [block[:7], block[7:]]).array
    np.testing.assert_array_equal(found, found.T)
    np.testing.assert_allclose(found, block.T.astype(np.float64) @ block / 40, rtol=1e-4, atol=1e-5)


def test_nothing_seen() -> None:
    for statistic in (AbsMax(), MinMax(), Histogram(), MeanAbs(), MeanVariance(), SecondMoment()):
        found = gathered(statistic, [np.zeros((0, 4), np.float32)])
        assert found.rows == 0
        assert not found.arrays
    with pytest.raises(ValueError, match="percentile"):
        percentile(gathered(Histogram(), []), 0.5)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 299), max_size=5), st.integers(1, 400))
def test_some_rows(cuts: list[int], count: int) -> None:
    found = gathered(Rows(count, seed=1), np.split(DATA, sorted(set(cuts))))["rows"]
    whole = gathered(Rows(count, seed=1), [DATA])["rows"]
    np.testing.assert_array_equal(found, whole)
    places = [int(np.flatnonzero((row == DATA).all(axis=1))[0]) for row in found]
    assert places == sorted(set(places))
    assert len(places) == min(count, 300)


def test_a_variance_far_from_zero_keeps_its_digits() -> None:
    block = (np.asarray([[1.0], [2.0], [3.0]]) * 0.01 + 1000).astype(np.float32)
    found = gathered(MeanVariance(), [block[:1], block[1:]])
    np.testing.assert_allclose(found["variance"], block.astype(np.float64).var(axis=0), rtol=1e-6)
