"""CUDA cases of QuantizedLinear."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

from cuda_case import Call, Case
from cuda_quantized_weights import Form, dense, normalised, random_weight, rounded

REAL = ((960, 576), (576, 576), (576, 1536), (6144, 4096), (4096, 4096), (4096, 11008))
"""Rows and length: q, k and v together, o and down of SmolLM2 and of a model with 7 billion weights."""
REAL_FORMS = (
    Form(),
    Form(activation_bits=16),
    Form(half=False, half_scales=False),
    Form(block_size=128, zero_points=True),
    Form(bits=8),
    Form(bits=2, block_size=64, minimums=True),
)
ODD_FORMS = (
    Form(4, 16, zero_points=True),
    Form(4, 32),
    Form(4, 64, zero_points=True, minimums=True),
    Form(4, 256, minimums=True),
    Form(8, 16, minimums=True),
    Form(8, 32),
    Form(8, 128, zero_points=True),
    Form(2, 16, zero_points=True),
    Form(2, 32, minimums=True),
    Form(2, 256),
)
ODD = ((1, 1), (5, 3), (33, 9), (67, 5))
"""Rows and blocks."""
EPSILON = 1e-5


def linear(
    tokens: int, rows: int, length: int, form: Form, around: bool, torch: Any, device: str, launchers: Any
) -> Call:
    """`around`: with a norm, a bias and a residual."""
    generator = torch.Generator().manual_seed(tokens + rows + length)
    kind = torch.float16 if form.half else torch.float32

    def normal(*shape: int, dtype: Any = torch.float32) -> Any:
        return torch.randn(*shape, generator=generator).to(dtype).to(device)

    x = normal(tokens, length, dtype=kind)
    weight = random_weight(torch, device, generator, rows, length, form)
    norm, bias, residual = (
        (normal(length).abs(), normal(rows), normal(tokens, rows, dtype=kind)) if around else (None, None, None)
    )
    y = torch.empty(tokens, rows, dtype=kind, device=device)
    name = "graphopt_cuda_quantized_linear_scratch_bytes"
    needed = launchers.call(name, [tokens, length, form.block_size, form.activation_bits])
    scratch = torch.empty(needed, dtype=torch.uint8, device=device)
    numbers, step = rounded(torch, normalised(torch, x, norm, EPSILON), form)
    matrix = dense(torch, weight, form)
    wanted = numbers @ matrix.T
    if around:
        wanted = wanted + bias.double() + residual.double()
    others = [t for t in (x, norm, bias, residual, y) if t is not None]
    # A norm that is off by its last place may round an activation to the next step.
    flips = 2 * step * float(matrix.abs().max()) if around and matrix.numel() else 0.0
    return Call(
        [x, norm, *weight.arguments, bias, residual, y, scratch, tokens, rows, length, form.bits, form.block_size,
         form.activation_bits, int(form.half), int(form.half_scales), EPSILON],
        [y], lambda: [wanted.to(kind)],
        bytes=weight.bytes + sum(t.numel() * t.element_size() for t in others),
        operations=2 * tokens * rows * length * form.activation_bits // 8, arithmetic="int8 tensor",
        atol=2e-5 + flips, rtol=2e-3 if form.half else 1e-5,
    )  # fmt: skip


def case(tokens: int, rows: int, length: int, form: Form, around: bool, timed: bool) -> Case:
    around_it = ", norm, bias, residual" if around else ""
    shape = f"{rows} × {length}, tokens {tokens}, {form}{around_it}"
    make = functools.partial(linear, tokens, rows, length, form, around)
    return Case("QuantizedLinear", "graphopt_cuda_quantized_linear", shape, make, timed)


def cases() -> Iterator[Case]:
    """Shapes of real models, and every form of weight on odd ones."""
    for (rows, length), tokens in itertools.product(REAL, (1, 4, 16, 128, 2048)):
        for form in REAL_FORMS if (rows, length) == (4096, 4096) else REAL_FORMS[:1]:
            yield case(tokens, rows, length, form, False, True)
    yield case(1, 4096, 4096, Form(), True, True)
    for (rows, blocks), tokens in itertools.product(ODD, (0, 1, 3, 9, 33, 65)):
        for number, (form, activation_bits) in enumerate(itertools.product(ODD_FORMS, (8, 16))):
            halves = {"half": number % 3 == 0, "half_scales": number % 4 > 1}
            made = dataclasses.replace(form, activation_bits=activation_bits, **halves)
            yield case(tokens, rows, blocks * form.block_size, made, number % 5 > 1, False)
