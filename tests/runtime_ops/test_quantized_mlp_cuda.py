"""QuantizedMlp's CUDA kernels, run on the host, beside the portable body."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from tests.runtime_ops.cuda_emulation import emulated, pointer, size
from tests.runtime_ops.operator_cases import run_node
from tests.runtime_ops.quantized_weights import weight


def mlp(
    inputs: list[Any], block_size: int, activation_bits: int, activation: int = 0, *, in_place: bool = False
) -> Any:
    """What the launcher makes of a node's inputs."""
    x, norm, gate_up, scales, *_ = inputs
    tokens, width, hidden = len(x), x.shape[1], len(gate_up) // 2
    library = emulated("quantized_linear", "quantized_mlp")
    needed = library.graphopt_cuda_quantized_mlp_scratch_bytes
    needed.restype = ctypes.c_int64
    sizes = [size(tokens), size(width), size(hidden)]
    scratch = np.full(needed(*sizes, block_size, activation_bits), 0xA5, np.uint8)
    x = x.copy()
    y = x if in_place else np.full_like(x, np.nan)
    bits = 8 * gate_up.shape[2] // block_size
    code = library.graphopt_cuda_quantized_mlp(
        pointer(x), pointer(norm), *map(pointer, inputs[2:]), pointer(y), pointer(scratch), *sizes, bits, block_size,
        activation_bits, activation, int(x.dtype == np.float16), int(scales.dtype == np.float16), ctypes.c_float(1e-5),
        None,
    )  # fmt: skip
    assert code == 0
    return y


def case(
    tokens: int, width: int, hidden: int, *, dtype: type = np.float32, norm: bool = False, **form: Any
) -> list[Any]:
    rng = np.random.default_rng(tokens + width + hidden)
    first, second = weight(rng, 2 * hidden, width, **form), weight(rng, width, hidden, **form)
    x = (0.5 * rng.standard_normal((tokens, width))).astype(dtype)
    gains = rng.uniform(0.5, 2, width).astype(np.float32) if norm else np.zeros(0, np.float32)
    return [x, gains, *first.inputs, *second.inputs]


def judge(inputs: list[Any], block_size: int, activation_bits: int = 16, activation: int = 0, **how: Any) -> None:
    bits = 8 * inputs[2].shape[2] // block_size
    (expected,) = run_node(
        "QuantizedMlp", inputs, kernel=False, bits=bits, block_size=block_size, activation_bits=activation_bits,
        activation=activation,
    )  # fmt: skip
    found = mlp(inputs, block_size, activation_bits, activation, **how).astype(np.float64)
    # A hidden number off by its last place may round to the next step.
    steps = 32512 if activation_bits == 16 else 127
    share = 2e-3 if expected.dtype == np.float16 else 4 / steps
    largest = np.abs(expected.astype(np.float64)).max(initial=0, where=np.isfinite(expected))
    np.testing.assert_allclose(found, expected.astype(np.float64), atol=largest * share)


@pytest.mark.parametrize(
    "form",
    [
        {"bits": 4, "block_size": 32},
        {"bits": 4, "block_size": 64, "zero_points": True, "half": True},
        {"bits": 8, "block_size": 32, "minimums": True},
        {"bits": 2, "block_size": 16, "minimums": True, "half": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("tokens", [1, 5, 35])
def test_forms(form: dict[str, Any], tokens: int) -> None:
    judge(case(tokens, 96 if form["block_size"] < 64 else 128, 192, **form), form["block_size"])


@pytest.mark.parametrize("activation", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_activations_and_norm(activation: int, dtype: type) -> None:
    judge(case(3, 64, 160, norm=True, dtype=dtype), 32, activation=activation)


def test_activations_of_8_bits() -> None:
    judge(case(2, 64, 96), 32, 8)


def test_more_tokens_than_go_together() -> None:
    judge(case(1030, 32, 32), 32)


def test_in_place() -> None:
    judge(case(2, 64, 96), 32, in_place=True)


@pytest.mark.parametrize(("tokens", "width", "hidden"), [(0, 64, 64), (3, 0, 64), (3, 64, 0)])
def test_nothing_to_do(tokens: int, width: int, hidden: int) -> None:
    inputs = case(tokens, width, hidden)
    np.testing.assert_array_equal(mlp(inputs, 32, 8), inputs[0])


def test_large_and_missing_numbers() -> None:
    """SiLU far from zero on both sides, and a token that isn't finite."""
    inputs = case(3, 64, 64)
    inputs[0][0] *= 200
    inputs[0][1, 5] = np.nan
    y = mlp(inputs, 32, 16)
    assert np.isnan(y[1]).all()
    assert np.isfinite(y[[0, 2]]).all()


@pytest.mark.parametrize("activation", [-1, 4])
def test_an_unknown_activation_is_refused(activation: int) -> None:
    nothing = [None] * 12
    code = emulated("quantized_linear", "quantized_mlp").graphopt_cuda_quantized_mlp(
        *nothing, size(1), size(64), size(64), 4, 32, 8, activation, 0, 0, ctypes.c_float(0), None
    )
    assert code != 0
