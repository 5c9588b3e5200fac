"""HadamardQuantize: body, kernel and formula."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.runtime_ops import operators
from graphopt.runtime_ops.hadamard_transform.factors import hadamard_factor
from tests.runtime_ops.operator_cases import ISAS, limited, run_node
from tests.runtime_ops.token_quantization import into_integer_product, judge_quantized

ONE = np.ones((1, 1), np.float32)


def transformed(x: np.ndarray, factor: np.ndarray, group: int, scale: float) -> np.ndarray:
    inputs = [x.astype(np.float32), factor]
    return run_node("HadamardTransform", inputs, kernel=False, group_size=group, scale=scale)[0]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("m", "halves", "groups"), [(1, 1, 5), (1, 2, 9), (1, 16, 3), (1, 64, 7), (1, 4096, 1), (12, 8, 2), (7, 1, 1)]
)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_is_the_formula(isa: str, m: int, halves: int, groups: int, dtype: type) -> None:
    group, factor = m * halves, hadamard_factor(m)
    if m > 1:
        factor = np.linalg.qr(np.random.default_rng(m).standard_normal((m, m)))[0].astype(np.float32)
    x = (np.random.default_rng(halves).standard_normal((2, 9, groups * group)) * 3).astype(dtype)
    r = transformed(x, factor, group, 0.25)
    with limited(isa):
        for clip, largest in ((1.0, 127), (0.875, 7), (1.0, 1)):
            judge_quantized(
                "HadamardQuantize",
                [x, factor],
                r,
                exact=m == 1,
                group_size=group,
                scale=0.25,
                clip=clip,
                largest=largest,
            )


@pytest.mark.parametrize("isa", ISAS)
def test_halves_go_to_even(isa: str) -> None:
    x = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5] * 5], np.float32)
    with limited(isa):
        y, scale = run_node("HadamardQuantize", [x, ONE], group_size=1, scale=1.0)
    assert scale.item() == 1
    np.testing.assert_array_equal(y[0, :8], 128 + np.array([127, 0, 2, 2, 0, -2, -2, 126]))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("width", [4, 16, 64])
def test_what_is_no_number_nothing_and_next_to_nothing(isa: str, width: int) -> None:
    x = np.random.default_rng(0).standard_normal((9, width)).astype(np.float32)
    x[0, 1], x[1, 0], x[2, width - 1] = np.nan, np.inf, -np.inf
    x[3], x[4], x[5], x[6], x[7] = 0, 1e-44, 1e-39, 3e38, -0.0
    r = transformed(x, ONE, 1, 1.0)
    with limited(isa):
        y, scale = judge_quantized("HadamardQuantize", [x, ONE], r, exact=True, group_size=1, scale=1.0)
    assert np.isnan(scale[:3]).all()
    assert (y[:3] == 128).all()
    assert (scale[[3, 4, 7]] == 1).all()
    assert (y[[3, 7]] == 128).all()


def test_no_tokens() -> None:
    judge_quantized(
        "HadamardQuantize", [np.zeros((0, 8), np.float32), ONE], np.zeros((0, 8), np.float32), exact=True, group_size=8,
        scale=1.0,
    )  # fmt: skip


@given(
    st.integers(0, 6), st.integers(1, 4), st.integers(1, 127), st.floats(0.125, 1, width=32), st.integers(0, 2**32 - 1)
)
@settings(max_examples=20, deadline=None)
def test_no_number_is_further_off_than_half_a_step(k: int, groups: int, largest: int, clip: float, seed: int) -> None:
    x = np.random.default_rng(seed).standard_normal((3, groups << k)).astype(np.float32)
    attributes = {"group_size": 1 << k, "scale": 2.0 ** (-k / 2)}
    y, scale = run_node("HadamardQuantize", [x, ONE], clip=clip, largest=largest, **attributes)
    (r,) = run_node("HadamardTransform", [x, ONE], **attributes)
    inside = np.clip(r, -scale * largest, scale * largest)
    assert (np.abs((y.astype(np.float32) - 128) * scale - inside) <= scale * 0.50001).all()


@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 64)])
def test_feeds_an_integer_product(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(shape) * np.arange(1, shape[-2] + 1)[:, None]).astype(np.float32)
    weight, scales = rng.integers(-63, 64, (64, 24)).astype(np.int8), rng.random(24).astype(np.float32)
    found = into_integer_product("HadamardQuantize", [x, ONE], weight, scales, group_size=64, scale=0.125)
    y, y_scale = run_node("HadamardQuantize", [x, ONE], group_size=64, scale=0.125)
    np.testing.assert_allclose(found, (y.astype(np.float64) - 128) @ weight * y_scale * scales, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "attributes", "says"),
    [
        ((2, 20), {}, "isn't a multiple of group_size 8"),
        ((2, 8), {"clip": 0.0}, "clip is 0, and must be above 0 and at most 1"),
        ((2, 8), {"clip": 1.5}, "clip is 1.5"),
        ((2, 8), {"clip": float("nan")}, "clip is nan"),
        ((2, 8), {"largest": 128}, "largest is 128, and must be from 1 to 127"),
        ((2, 8), {"largest": 0}, "largest is 0"),
        ((2, 8), {"group_size": -8}, "must be positive"),
        ((2, 0), {}, "no features"),
        ((), {}, "isn't a multiple"),
    ],
)
def test_what_is_wrong_names_the_node(shape: tuple, attributes: dict, says: str) -> None:
    with pytest.raises(Exception, match=f"HadamardQuantize 'the_node': .*{says}"):
        run_node(
            "HadamardQuantize", [np.zeros(shape, np.float32), ONE], **{"group_size": 8, "scale": 1.0, **attributes}
        )


def test_what_it_costs() -> None:
    cost = operators()["HadamardQuantize"].cost([(4, 64), (1, 1)], {"group_size": 64})
    assert cost.bytes == 4 * 64 * 5 + 4 * 4
    assert cost.flops == 4 * 64 * (6 + 1 + 3)
