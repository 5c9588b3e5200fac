"""KroneckerQuantize: body, kernel and formula."""

from __future__ import annotations

import numpy as np
import pytest

from graphopt.runtime_ops import operators
from tests.runtime_ops.operator_cases import ISAS, limited, run_node
from tests.runtime_ops.test_kronecker_transform import inputs_of
from tests.runtime_ops.token_quantization import into_integer_product, judge_quantized


def transformed(inputs: list[np.ndarray]) -> np.ndarray:
    x, left, right = inputs
    return run_node("KroneckerTransform", [x.astype(np.float32), left, right], kernel=False)[0]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("a", "b"), [(1, 1), (3, 7), (6, 32), (17, 17), (24, 24), (9, 100)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_is_the_formula(isa: str, a: int, b: int, dtype: type) -> None:
    inputs = inputs_of(a, b, (3, 8), dtype)
    r = transformed(inputs)
    with limited(isa):
        for clip, largest in ((1.0, 127), (0.875, 7)):
            judge_quantized("KroneckerQuantize", inputs, r, exact=False, clip=clip, largest=largest)


@pytest.mark.parametrize("tokens", [(), (1,), (2,), (33,), (0,)])
@pytest.mark.parametrize(("a", "b"), [(16, 24), (86, 128)])
def test_any_number_of_tokens(tokens: tuple[int, ...], a: int, b: int) -> None:
    inputs = inputs_of(a, b, tokens)
    judge_quantized("KroneckerQuantize", inputs, transformed(inputs), exact=False)


def test_whole_numbers_are_exact() -> None:
    rng = np.random.default_rng(0)
    inputs = [rng.integers(-9, 10, shape).astype(np.float32) for shape in ((11, 48), (6, 6), (8, 8))]
    inputs[0][2], inputs[0][3, 5], inputs[0][4, 47] = 0, np.nan, np.inf
    y, scale = judge_quantized("KroneckerQuantize", inputs, transformed(inputs), exact=True)
    assert scale[2] == 1
    assert np.isnan(scale[3:5]).all()
    assert (y[2:5] == 128).all()


def test_feeds_an_integer_product() -> None:
    inputs, rng = inputs_of(8, 6, (2, 5)), np.random.default_rng(1)
    weight, scales = rng.integers(-63, 64, (48, 10)).astype(np.int8), rng.random(10).astype(np.float32)
    found = into_integer_product("KroneckerQuantize", inputs, weight, scales)
    y, y_scale = run_node("KroneckerQuantize", inputs)
    np.testing.assert_allclose(found, (y.astype(np.float64) - 128) @ weight * y_scale * scales, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("attributes", "says"),
    [({"clip": -1.0}, "clip is -1"), ({"largest": 200}, "largest is 200, and must be from 1 to 127")],
)
def test_what_is_wrong_names_the_node(attributes: dict, says: str) -> None:
    with pytest.raises(Exception, match=f"KroneckerQuantize 'the_node': .*{says}"):
        run_node("KroneckerQuantize", inputs_of(2, 3, (2,)), **attributes)
    with pytest.raises(Exception, match=r"KroneckerQuantize 'the_node': .*isn't the 2 times 3 rows"):
        run_node("KroneckerQuantize", [np.zeros((2, 7), np.float32), *inputs_of(2, 3, (2,))[1:]])


def test_what_it_costs() -> None:
    cost = operators()["KroneckerQuantize"].cost([(4, 96), (8, 8), (12, 12)], {})
    assert cost.flops == 2 * 4 * 96 * 20 + 3 * 4 * 96
    assert cost.bytes == 4 * 96 * 5 + 4 * 4 + 4 * (8 * 8 + 12 * 12)
