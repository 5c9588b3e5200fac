"""KroneckerTransform: body, kernel and the matrix that both stand for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.runtime_ops import operators
from tests.runtime_ops.operator_cases import ISAS, in_place, judge, limited, run_node

SIZES = [
    (1, 1),
    (1, 5),
    (5, 1),
    (2, 16),
    (3, 7),
    (4, 4),
    (6, 32),
    (7, 33),
    (8, 64),
    (13, 48),
    (17, 17),
    (5, 80),
    (24, 24),
    (9, 100),
    (14, 128),
]
"""Rows of the two matrices."""


def inputs_of(a: int, b: int, tokens: tuple[int, ...], dtype: type = np.float32) -> list[np.ndarray]:
    rng = np.random.default_rng(a * 1000 + b)
    left = (rng.standard_normal((a, a)) / a**0.5).astype(np.float32)
    right = (rng.standard_normal((b, b)) / b**0.5).astype(np.float32)
    return [rng.standard_normal((*tokens, a * b)).astype(dtype), left, right]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("a", "b"), SIZES)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_is_the_matrix(isa: str, a: int, b: int, dtype: type) -> None:
    x, left, right = inputs_of(a, b, (2, 3), dtype)
    atol = 2e-5 if dtype == np.float32 else 2e-2
    with limited(isa):
        (y,) = judge("KroneckerTransform", [x, left, right], atol=atol)
    np.testing.assert_allclose(y, x.astype(np.float64) @ np.kron(left, right).astype(np.float64), atol=atol)


@pytest.mark.parametrize("tokens", [(), (1,), (2,), (7,), (64,), (0,), (3, 0, 2)])
@pytest.mark.parametrize(("a", "b"), [(16, 24), (86, 128), (112, 100)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_any_number_of_tokens(tokens: tuple[int, ...], a: int, b: int, dtype: type) -> None:
    judge("KroneckerTransform", inputs_of(a, b, tokens, dtype), atol=3e-5 if dtype == np.float32 else 2e-2)


@pytest.mark.parametrize("isa", ISAS)
def test_what_is_no_number_stays_in_its_token(isa: str) -> None:
    x, left, right = inputs_of(6, 10, (4,))
    x[1, 3], x[2, 59] = np.nan, np.inf
    with limited(isa):
        (y,) = judge("KroneckerTransform", [x, left, right], atol=2e-5)
    assert np.isfinite(y[[0, 3]]).all()
    assert not np.isfinite(y[[1, 2]]).any()


@given(st.integers(1, 20), st.integers(1, 40), st.integers(1, 5), st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_the_inverses_bring_it_back(a: int, b: int, tokens: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.standard_normal((n, n)))[0].astype(np.float32) for n in (a, b))
    x = rng.standard_normal((tokens, a * b)).astype(np.float32)
    (y,) = run_node("KroneckerTransform", [x, left, right])
    (back,) = run_node("KroneckerTransform", [y, left.T.copy(), right.T.copy()])
    np.testing.assert_allclose(back, x, atol=1e-4)


@pytest.mark.parametrize(("a", "b", "tokens"), [(16, 24, 5), (86, 128, 1), (86, 128, 3)])
def test_output_in_the_memory_of_the_input(a: int, b: int, tokens: int) -> None:
    inputs = inputs_of(a, b, (tokens,))
    (expected,) = run_node("KroneckerTransform", inputs, kernel=False)
    np.testing.assert_allclose(in_place("KroneckerTransform", inputs), expected, atol=3e-5)


@pytest.mark.parametrize(
    ("shape", "left", "right", "says"),
    [
        ((2, 12), (3, 3), (5, 5), r"the last dimension of \[2, 12\] isn't the 3 times 5 rows of the two matrices"),
        ((2, 30), (3, 3), (5, 5), "isn't the 3 times 5 rows"),
        ((), (3, 3), (4, 4), "isn't the 3 times 4 rows"),
        ((2, 0), (3, 3), (4, 4), "isn't the 3 times 4 rows"),
        ((2, 12), (3, 4), (4, 4), r"left must be a square matrix, not \[3, 4\]"),
        ((2, 12), (3, 3), (16,), r"right must be a square matrix, not \[16\]"),
        ((2, 0), (0, 0), (4, 4), "left must be a square matrix"),
        ((2, 0), (3, 3), (0, 0), "right must be a square matrix"),
    ],
)
def test_what_is_wrong_names_the_node(shape: tuple, left: tuple, right: tuple, says: str) -> None:
    inputs = [np.zeros(s, np.float32) for s in (shape, left, right)]
    with pytest.raises(Exception, match=f"KroneckerTransform 'the_node': .*{says}"):
        run_node("KroneckerTransform", inputs)


def test_what_it_costs() -> None:
    cost = operators()["KroneckerTransform"].cost([(4, 96), (8, 8), (12, 12)], {})
    assert cost.flops == 2 * 4 * 96 * 20
    assert cost.bytes == 4 * (2 * 4 * 96 + 8 * 8 + 12 * 12)
