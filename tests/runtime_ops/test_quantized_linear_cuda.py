"""QuantizedLinear's CUDA kernels, run on the host: every form of weight against numpy, and how many tokens there are."""

from __future__ import annotations

import ctypes
import dataclasses
from typing import Any

import numpy as np
import pytest

from tests.runtime_ops.cuda_emulation import emulated, pointer, size
from tests.runtime_ops.operator_cases import run_node
from tests.runtime_ops.quantized_weights import Weight, rounded, weight


def scratch_bytes(tokens: int, length: int, block_size: int, activation_bits: int) -> int:
    function = emulated("quantized_linear", "quantized_mlp").graphopt_cuda_quantized_linear_scratch_bytes
    function.restype = ctypes.c_int64
    return int(function(size(tokens), size(length), block_size, activation_bits))


def linear(
    x: np.ndarray,
    w: Weight,
    block_size: int,
    activation_bits: int = 8,
    *,
    norm: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    residual: np.ndarray | None = None,
    epsilon: float = 1e-5,
    backwards: bool = False,
) -> np.ndarray:
    """What the launcher makes of x [tokens, length]."""
    library = emulated("quantized_linear", "quantized_mlp")
    library.on_host_run_backwards(int(backwards))
    scratch = np.full(scratch_bytes(*x.shape, block_size, activation_bits), 0xA5, np.uint8)
    y = np.full((len(x), w.packed.shape[0]), np.nan, x.dtype)
    code = library.graphopt_cuda_quantized_linear(
        pointer(x), pointer(norm), *map(pointer, w.inputs), pointer(bias), pointer(residual), pointer(y),
        pointer(scratch), size(len(x)), size(y.shape[1]), size(x.shape[1]), w.bits, block_size, activation_bits,
        int(x.dtype == np.float16), int(w.scales.dtype == np.float16), ctypes.c_float(epsilon), None,
    )  # fmt: skip
    assert code == 0
    return y


FORMS: list[dict[str, Any]] = [
    {"bits": 4, "block_size": 32},
    {"bits": 4, "block_size": 16, "zero_points": True},
    {"bits": 4, "block_size": 64, "minimums": True, "half": True},
    {"bits": 4, "block_size": 32, "minimums": True, "zero_points": True},
    {"bits": 4, "block_size": 256},
    {"bits": 8, "block_size": 16, "zero_points": True},
    {"bits": 8, "block_size": 128, "minimums": True},
    {"bits": 8, "block_size": 256, "half": True},
    {"bits": 2, "block_size": 16},
    {"bits": 2, "block_size": 32, "zero_points": True},
    {"bits": 2, "block_size": 128, "minimums": True},
]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("activation_bits", [8, 16])
@pytest.mark.parametrize("tokens", [1, 5, 17, 33])
def test_every_form_of_weight(form: dict[str, Any], activation_bits: int, tokens: int) -> None:
    """A kernel for one token, for few, for some and for many; rows and lengths that fill their tiles and that don't."""
    rng = np.random.default_rng(form["bits"] * 1000 + form["block_size"])
    block = form["block_size"]
    for rows, blocks in ((3, 1), (37, 5)) if tokens < 33 else ((67, 144 // block + 1),):
        w = weight(rng, rows, blocks * block, **form)
        x = rng.standard_normal((tokens, blocks * block)).astype(np.float32)
        y = linear(x, w, block, activation_bits, backwards=rows > 3)
        numbers, _ = rounded(x, block, activation_bits)
        np.testing.assert_allclose(y, numbers @ w.dense().T, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens", [1, 3])
def test_rows_longer_than_a_warp_reads_at_once(tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    w = weight(rng, 5, 2208, zero_points=True)
    x = rng.standard_normal((tokens, 2208)).astype(np.float32)
    numbers, _ = rounded(x, 32, 16)
    np.testing.assert_allclose(linear(x, w, 32, 16), numbers @ w.dense().T, atol=5e-5)


@pytest.mark.parametrize("tokens", [1, 20])
def test_a_weight_that_begins_at_four_bytes(tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    w = weight(rng, 9, 128)
    x = rng.standard_normal((tokens, 128)).astype(np.float32)
    room = np.zeros(w.packed.size + 16, np.uint8)
    begin = -room.ctypes.data % 16 + 4
    moved = room[begin : begin + w.packed.size].reshape(w.packed.shape)
    moved[:] = w.packed
    np.testing.assert_array_equal(linear(x, dataclasses.replace(w, packed=moved), 32), linear(x, w, 32))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("tokens", [1, 6, 40])
@pytest.mark.parametrize("backwards", [False, True])
def test_norm_bias_and_residual_as_the_body(dtype: type, tokens: int, backwards: bool) -> None:
    rng = np.random.default_rng(tokens)
    w = weight(rng, 20, 96, minimums=True, half=dtype == np.float32)
    x = (3 * rng.standard_normal((tokens, 96))).astype(dtype)
    norm, bias = rng.uniform(0.5, 2, 96).astype(np.float32), rng.standard_normal(20).astype(np.float32)
    residual = rng.standard_normal((tokens, 20)).astype(dtype)
    (expected,) = run_node(
        "QuantizedLinear", [x, norm, *w.inputs, bias, residual], kernel=False,
        bits=4, block_size=32, activation_bits=16, epsilon=0.5,
    )  # fmt: skip
    found = linear(x, w, 32, 16, norm=norm, bias=bias, residual=residual, epsilon=0.5, backwards=backwards)
    atol = 2e-2 if dtype == np.float16 else 5e-3  # a number may round to the next of 32512 steps
    np.testing.assert_allclose(found.astype(np.float64), expected.astype(np.float64), atol=atol)


@pytest.mark.parametrize("tokens", [3, 12])
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_stays_none(tokens: int, wrong: float) -> None:
    rng = np.random.default_rng(1)
    w = weight(rng, 6, 64)
    x = rng.standard_normal((tokens, 64)).astype(np.float32)
    x[1, 40] = wrong
    y = linear(x, w, 32)
    assert np.isnan(y[1]).all()
    assert np.isfinite(np.delete(y, 1, axis=0)).all()


def test_zeros_and_tiny_numbers() -> None:
    w = weight(np.random.default_rng(2), 6, 64)
    x = np.zeros((3, 64), np.float32)
    x[1, 3], x[2, 4] = 1e-30, 1e-40
    y = linear(x, w, 32)
    np.testing.assert_allclose(y, x.astype(np.float64) @ w.dense().T, rtol=1e-4, atol=1e-40)


@pytest.mark.parametrize(("tokens", "rows", "length"), [(0, 5, 64), (2, 0, 64), (2, 5, 0), (11, 5, 0)])
def test_nothing_to_do(tokens: int, rows: int, length: int) -> None:
    rng = np.random.default_rng(3)
    residual = rng.standard_normal((tokens, rows)).astype(np.float32)
    y = linear(np.zeros((tokens, length), np.float32), weight(rng, rows, length), 32, residual=residual)
    np.testing.assert_array_equal(y, residual)


@pytest.mark.parametrize(
    ("tokens", "length", "block_size", "activation_bits"),
    [(-1, 64, 32, 8), (1, 65, 32, 8), (1, 48, 24, 8), (1, 64, 32, 4), (2**40, 2**40, 32, 8)],
)
def test_what_there_is_not(tokens: int, length: int, block_size: int, activation_bits: int) -> None:
    """The launcher refuses it too, before it reads anything."""
    assert scratch_bytes(tokens, length, block_size, activation_bits) < 0
    nothing = [None] * 10
    code = emulated("quantized_linear", "quantized_mlp").graphopt_cuda_quantized_linear(
        *nothing, size(tokens), size(4), size(length), 4, block_size, activation_bits, 0, 0, ctypes.c_float(0), None
    )
    assert code != 0
