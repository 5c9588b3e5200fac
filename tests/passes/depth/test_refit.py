"""Least squares from moments."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.passes.depth.refit import Moments, factors, linear_map, of_written


def moments(y: np.ndarray, r: np.ndarray) -> Moments:
    rows = len(y)
    return Moments(y.T @ y / rows, y.T @ r / rows, np.square(r).mean(0), rows)


def data(rows: int, seed: int = 0, noise: float = 1.0, size: int = 6) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    true = np.random.default_rng(99).normal(size=(size, 4))
    y = rng.normal(size=(rows, size)) * np.logspace(-2, 2, size)
    return y, (y / np.logspace(-2, 2, size)) @ true + noise * rng.normal(size=(rows, 4)), true


def test_the_error_is_that_of_the_rows() -> None:
    y, r, _ = data(50)
    weight = np.random.default_rng(1).normal(size=(6, 4))
    assert moments(y, r).error(weight) == pytest.approx(np.square(r - y @ weight).sum(1).mean())


@given(st.floats(1e-4, 1e4), st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_it_solves_the_equations(ridge: float, seed: int) -> None:
    y, r, _ = data(40, seed)
    before = np.random.default_rng(seed).normal(size=(6, 4))
    found = linear_map(moments(y, r), before, ridge)
    penalty = ridge * np.diag(np.square(y).mean(0))
    expected = np.linalg.solve(y.T @ y / 40 + penalty, y.T @ r / 40 + penalty @ before)
    np.testing.assert_allclose(
        found * np.logspace(-2, 2, 6)[:, None], expected * np.logspace(-2, 2, 6)[:, None], rtol=1e-6, atol=1e-8
    )


def test_cross_validation_trusts_many_rows_and_not_few() -> None:
    size = 40
    fresh, wanted, _ = data(4000, 7, noise=0.0, size=size)
    before = np.zeros((size, 4))
    none = np.square(wanted).mean()
    for rows, noise, limit in ((4000, 1.0, 0.02), (60, 12.0, 1.05)):
        y, r, _ = data(rows, 3, noise, size)
        found, plain = linear_map(moments(y, r), before), linear_map(moments(y, r), before, 1e-9)
        assert np.square(fresh @ found - wanted).mean() < limit * none
        assert np.square(fresh @ found - wanted).mean() <= np.square(fresh @ plain - wanted).mean() * 1.01


def test_halves_see_that_rows_of_a_sample_are_alike() -> None:
    rng = np.random.default_rng(0)
    size, samples, each = 40, 50, 40
    # Rows of a sample differ in little, so that they are far fewer than they seem.
    y = np.repeat(rng.normal(size=(samples, size)), each, 0) + 0.01 * rng.normal(size=(samples * each, size))
    r = np.repeat(rng.normal(size=(samples, 4)), each, 0)
    parts = np.repeat(np.arange(samples) % 2, each)
    halves = (moments(y[parts == 0], r[parts == 0]), moments(y[parts == 1], r[parts == 1]))
    before = np.zeros((size, 4))
    fooled, careful = linear_map(moments(y, r), before), linear_map(moments(y, r), before, halves=halves)
    # Nothing of r is told by y.
    assert np.abs(careful).max() < 0.1 < np.abs(fooled).max()


@pytest.mark.parametrize("shift", [False, True])
def test_a_factor_and_a_shift_for_each_channel(shift: bool) -> None:
    rng = np.random.default_rng(0)
    y = rng.normal(size=(200, 3)) + 1
    r = y * [2.0, -1.0, 0.5] + (np.array([1.0, 2.0, 3.0]) if shift else 0)
    inputs = np.hstack([y, np.ones((200, 1))]) if shift else y
    found = factors(moments(inputs, r))
    np.testing.assert_allclose(found[:3], np.diag([2.0, -1.0, 0.5]), atol=1e-9)
    if shift:
        np.testing.assert_allclose(found[3], [1.0, 2.0, 3.0], atol=1e-9)


@pytest.mark.parametrize("shifted", [False, True])
def test_moments_of_what_is_written(shifted: bool) -> None:
    rng = np.random.default_rng(0)
    h, r, c = rng.normal(size=(30, 5)), rng.normal(size=(30, 3)), rng.random((30, 1))
    weight = rng.normal(size=(5, 3))
    whole = np.hstack([h, r, c])
    found = of_written((whole.T @ whole / 30).astype(np.float32), weight, shifted=shifted, rows=30)
    expected = moments(np.hstack([h @ weight, c]) if shifted else h @ weight, r)
    for a, b in ((found.gram, expected.gram), (found.cross, expected.cross), (found.energy, expected.energy)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
