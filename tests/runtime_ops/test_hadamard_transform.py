"""HadamardTransform: body, kernel and the matrix that both stand for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.runtime_ops.hadamard_transform.factors import hadamard_factor
from tests.runtime_ops.operator_cases import ISAS, in_place, judge, limited, run_node


def matrix(factor: np.ndarray, group: int) -> np.ndarray:
    made = np.ones((1, 1))
    while len(made) * len(factor) < group:
        made = np.kron([[1, 1], [1, -1]], made)
    return np.kron(made, factor)


SIZES = [(1, 1 << k) for k in (*range(9), 10, 12)] + [
    (3, 8),
    (12, 128),
    (5, 1),
    (7, 2),
    (9, 64),
    (15, 4),
    (16, 4),
    (17, 4),
    (33, 2),
]
REAL = [(36, 16), (43, 256), (28, 512), (1, 4096), (140, 64)]


def factor_of(m: int) -> np.ndarray:
    rng = np.random.default_rng(m)
    return np.ones((1, 1), np.float32) if m == 1 else rng.standard_normal((m, m)).astype(np.float32)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("m", "halves"), SIZES)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_is_the_matrix(isa: str, m: int, halves: int, dtype: type) -> None:
    group, factor = m * halves, factor_of(m)
    x = np.random.default_rng(halves).standard_normal((3, 2 * group)).astype(dtype)
    scale = group**-0.5
    # Without a factor the kernel does the body's arithmetic in its order; with one, sums of products may differ.
    exact = 0.0 if m == 1 else 1e-5 * m**0.5 if dtype == np.float32 else 0.01 * m**0.5
    with limited(isa):
        (y,) = judge("HadamardTransform", [x, factor], atol=exact, group_size=group, scale=scale)
    expected = x.reshape(-1, group).astype(np.float64) @ matrix(factor, group).T * scale
    atol = 1e-5 * m**0.5 if dtype == np.float32 else 8e-3 * m**0.5
    np.testing.assert_allclose(y.reshape(-1, group), expected, atol=atol)


@pytest.mark.parametrize(("m", "halves"), REAL)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_sizes_of_real_models(m: int, halves: int, dtype: type) -> None:
    group = m * halves
    x = np.random.default_rng(m).standard_normal((2, 5, group)).astype(dtype)
    factor = hadamard_factor(group)
    assert len(factor) == m
    (y,) = judge(
        "HadamardTransform", [x, factor], atol=2e-5 if dtype == np.float32 else 8e-3, group_size=group,
        scale=group**-0.5,
    )  # fmt: skip
    lengths = np.linalg.norm(x.astype(np.float64), axis=-1)
    np.testing.assert_allclose(
        np.linalg.norm(y.astype(np.float64), axis=-1), lengths, rtol=1e-5 if dtype == np.float32 else 1e-3
    )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_many_groups_and_a_factor_of_one_number(isa: str, dtype: type) -> None:
    x = np.random.default_rng(3).standard_normal((129, 3 * 512)).astype(dtype)
    with limited(isa):
        judge("HadamardTransform", [x, np.full((1, 1), 1.5, np.float32)], atol=0, group_size=512, scale=0.04)


@given(st.integers(0, 7), st.integers(1, 40), st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_an_orthogonal_factor_keeps_lengths(k: int, m: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    factor = np.linalg.qr(rng.standard_normal((m, m)))[0].astype(np.float32)
    x = rng.standard_normal((3, m << k)).astype(np.float32)
    (y,) = run_node("HadamardTransform", [x, factor], group_size=m << k, scale=2.0 ** (-k / 2))
    np.testing.assert_allclose(np.linalg.norm(y, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-4)


def test_output_in_the_memory_of_the_input() -> None:
    for m, group in ((1, 4096), (1, 64), (12, 1536)):
        x = np.random.default_rng(1).standard_normal((4, group)).astype(np.float32)
        factor = factor_of(m)
        (expected,) = run_node("HadamardTransform", [x, factor], kernel=False, group_size=group, scale=0.1)
        found = in_place("HadamardTransform", [x, factor], group_size=group, scale=0.1)
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_sizes_of_nothing_and_what_is_no_number() -> None:
    one = np.ones((1, 1), np.float32)
    (empty,) = judge("HadamardTransform", [np.zeros((0, 8), np.float32), one], atol=0, group_size=8, scale=1.0)
    assert empty.shape == (0, 8)
    x = np.array([[1, np.nan, 2, 3, np.inf, 1, 1, 1]], np.float32)
    judge("HadamardTransform", [x, one], atol=0, group_size=4, scale=0.5)
    wide = np.ones((4, 64), np.float32)
    wide[1, 7], wide[2, 9], wide[3, 60] = np.nan, np.inf, -np.inf
    for isa in ISAS:
        with limited(isa):
            judge("HadamardTransform", [wide, one], atol=0, group_size=64, scale=0.125)
            judge("HadamardTransform", [wide.astype(np.float16), one], atol=0, group_size=64, scale=0.125)
            judge("HadamardTransform", [wide, np.eye(4, dtype=np.float32)], atol=0, group_size=64, scale=0.125)


@pytest.mark.parametrize(
    ("shape", "factor", "group", "says"),
    [
        ((2, 24), (3, 3), 8, "isn't a power of two times the factor's 3 rows"),
        ((2, 20), (1, 1), 8, "isn't a multiple of group_size 8"),
        ((2, 24), (2, 3), 8, "must be a square matrix"),
        ((2, 24), (1, 1), 0, "must be positive"),
        ((), (1, 1), 8, "isn't a multiple"),
    ],
)
def test_what_is_wrong_names_the_node(shape: tuple, factor: tuple, group: int, says: str) -> None:
    inputs = [np.zeros(shape, np.float32), np.ones(factor, np.float32)]
    with pytest.raises(Exception, match=f"HadamardTransform 'the_node': .*{says}"):
        run_node("HadamardTransform", inputs, group_size=group, scale=1.0)
