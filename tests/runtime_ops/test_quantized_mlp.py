"""QuantizedMlp: kernel and body, over activations, forms of weights and numbers of tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.runtime_ops.operator_cases import ISAS, judge, limited, run_node
from tests.runtime_ops.quantized_weights import rounded, weight


def case(tokens: int, width: int, hidden: int, *, dtype: type = np.float32, norm: bool = False) -> list[Any]:
    """Inputs of a node with weights of 4 bits."""
    rng = np.random.default_rng(tokens + width + hidden)
    first, second = weight(rng, 2 * hidden, width), weight(rng, width, hidden)
    x = rng.standard_normal((1, tokens, width)).astype(dtype)
    gains = rng.uniform(0.5, 2, width).astype(np.float32) if norm else np.zeros(0, np.float32)
    return [x, gains, *first.inputs, *second.inputs]


def reference(inputs: list[Any], first: np.ndarray, second: np.ndarray, block: int, bits: int) -> np.ndarray:
    numbers, _ = rounded(inputs[0], block, bits)
    gate, up = np.split(numbers @ first.T, 2, axis=-1)
    hidden, _ = rounded((gate / (1 + np.exp(-gate)) * up).astype(np.float32), block, bits)
    return inputs[0] + hidden @ second.T


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "form",
    [
        {"bits": 4, "block_size": 32},
        {"bits": 4, "block_size": 64, "zero_points": True, "half": True},
        {"bits": 4, "block_size": 32, "minimums": True, "half": True},
        {"bits": 8, "block_size": 32},
        {"bits": 2, "block_size": 16, "minimums": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_forms(isa: str, form: dict[str, Any], tokens: int) -> None:
    rng = np.random.default_rng(7)
    block, width, hidden = form["block_size"], 96 if form["block_size"] < 64 else 128, 192
    first, second = weight(rng, 2 * hidden, width, **form), weight(rng, width, hidden, **form)
    x = (0.3 * rng.standard_normal((1, tokens, width))).astype(np.float32)
    inputs = [x, np.zeros(0, np.float32), *first.inputs, *second.inputs]
    expected = reference(inputs, first.dense(), second.dense(), block, 16)
    # A hidden number off by its last place may round to the next of 32512 steps.
    step = np.abs(expected).max() * 4 / 32512
    with limited(isa):
        (y,) = judge("QuantizedMlp", inputs, atol=step, bits=form["bits"], block_size=block, activation_bits=16)
    np.testing.assert_allclose(y, expected, atol=2 * step)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_activations_and_norm(isa: str, activation: int, dtype: type) -> None:
    inputs = case(3, 64, 160, norm=True, dtype=dtype)
    with limited(isa):
        found = run_node("QuantizedMlp", inputs, bits=4, block_size=32, activation_bits=16, activation=activation)[0]
    expected = run_node(
        "QuantizedMlp", inputs, kernel=False, bits=4, block_size=32, activation_bits=16, activation=activation
    )[0]
    largest = np.abs(expected.astype(np.float64)).max()
    atol = largest * (2e-3 if dtype == np.float16 else 4 / 32512)
    np.testing.assert_allclose(found.astype(np.float64), expected.astype(np.float64), atol=atol)


@pytest.mark.parametrize("isa", ISAS)
def test_large_and_missing_numbers(isa: str) -> None:
    """SiLU far from zero on both sides, and a token that isn't finite."""
    inputs = case(3, 64, 64)
    inputs[0][0, 0] *= 200
    inputs[0][0, 1, 5] = np.nan
    with limited(isa):
        (y,) = judge("QuantizedMlp", inputs, rtol=1e-3, atol=2.0, bits=4, block_size=32, activation_bits=16)
    assert np.isnan(y[0, 1]).all()
    assert np.isfinite(y[0, [0, 2]]).all()


def test_no_hidden_numbers() -> None:
    """Nothing is added to the stream; the body has no answer, since Split doesn't split nothing."""
    inputs = case(3, 64, 0)
    np.testing.assert_array_equal(run_node("QuantizedMlp", inputs, bits=4, block_size=32)[0], inputs[0])


def test_no_tokens() -> None:
    inputs = case(0, 64, 64)
    judge("QuantizedMlp", inputs, atol=0, bits=4, block_size=32)


@pytest.mark.parametrize(
    ("index", "array", "says"),
    [
        (0, np.zeros((2, 32), np.float32), "the weights take rows of 64 numbers"),
        (1, np.zeros(3, np.float32), "the norm has 3 gains"),
        (2, np.zeros((126, 2, 16), np.uint8), "126 blocks|252 blocks"),
        (3, np.zeros((127, 2), np.float32), "256 blocks and 254 scales"),
        (6, np.zeros((64, 4, 16), np.uint8), "down has 256 blocks and 128 scales"),
        (6, np.zeros((32, 4, 16), np.uint8), "they don't fit each other"),
    ],
)
def test_what_is_wrong_names_the_node(index: int, array: np.ndarray, says: str) -> None:
    inputs = case(2, 64, 64)
    inputs[index] = array
    with pytest.raises(Exception, match=f"QuantizedMlp 'the_node': .*({says})"):
        run_node("QuantizedMlp", inputs, bits=4, block_size=32)


def test_an_unknown_activation_names_the_node() -> None:
    inputs = case(2, 64, 64)
    with pytest.raises(Exception, match="QuantizedMlp 'the_node': activation is 4"):
        run_node("QuantizedMlp", inputs, bits=4, block_size=32, activation=4)
