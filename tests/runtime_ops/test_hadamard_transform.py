"""HadamardTransform: body, kernel and the matrix that both stand for."""

from __future__ import annotations

import numpy as np
import pytest

from tests.runtime_ops.operator_cases import ISAS, judge, limited, run_node


def matrix(factor: np.ndarray, group: int) -> np.ndarray:
    made = np.ones((1, 1))
    while len(made) * len(factor) < group:
        made = np.kron([[1, 1], [1, -1]], made)
    return np.kron(made, factor)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("m", "halves"), [(1, 1), (1, 2), (1, 64), (1, 1024), (3, 8), (12, 16), (5, 1)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_is_the_matrix(isa: str, m: int, halves: int, dtype: type) -> None:
    rng = np.random.default_rng(m * halves)
    group = m * halves
    factor = np.ones((1, 1), np.float32) if m == 1 else rng.standard_normal((m, m)).astype(np.float32)
    x = rng.standard_normal((2, 3, 2 * group)).astype(dtype)
    scale = group**-0.5
    with limited(isa):
        (y,) = judge(
            "HadamardTransform", [x, factor], atol=4e-6 if dtype == np.float32 else 4e-3, group_size=group, scale=scale
        )
    expected = x.reshape(-1, group).astype(np.float64) @ matrix(factor, group).T * scale
    np.testing.assert_allclose(y.reshape(-1, group), expected, atol=1e-5 if dtype == np.float32 else 8e-3)


def test_sizes_of_nothing_and_what_is_no_number() -> None:
    one = np.ones((1, 1), np.float32)
    (empty,) = judge("HadamardTransform", [np.zeros((0, 8), np.float32), one], atol=0, group_size=8, scale=1.0)
    assert empty.shape == (0, 8)
    x = np.array([[1, np.nan, 2, 3, np.inf, 1, 1, 1]], np.float32)
    judge("HadamardTransform", [x, one], atol=0, group_size=4, scale=0.5)


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
