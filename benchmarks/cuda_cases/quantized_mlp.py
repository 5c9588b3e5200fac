"""CUDA cases of QuantizedMlp."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

from cuda_case import Call, Case
from cuda_quantized_weights import Form, dense, normalised, random_weight, rounded

REAL = ((576, 1536), (4096, 11008))
"""Width and hidden numbers of SmolLM2 and of a model with 7 billion weights."""
REAL_FORMS = (Form(), Form(activation_bits=16), Form(bits=8), Form(bits=2, block_size=64, minimums=True))
ODD = ((1, 1), (3, 5), (7, 2))
"""Blocks of both."""
EPSILON = 1e-5


def activated(torch: Any, activation: int, x: Any) -> Any:
    """SiLU, GELU, GELU by tanh, ReLU."""
    functional = torch.nn.functional
    if activation == 0:
        return functional.silu(x)
    if activation == 3:
        return functional.relu(x)
    return functional.gelu(x, approximate="tanh" if activation == 2 else "none")


def mlp(
    tokens: int,
    width: int,
    hidden: int,
    form: Form,
    activation: int,
    normed: bool,
    torch: Any,
    device: str,
    launchers: Any,
) -> Call:
    generator = torch.Generator().manual_seed(tokens + width + hidden)
    kind = torch.float16 if form.half else torch.float32
    x = torch.randn(tokens, width, generator=generator).to(kind).to(device)
    norm = torch.rand(width, generator=generator).to(device) + 0.5 if normed else None
    gate_up = random_weight(torch, device, generator, 2 * hidden, width, form)
    down = random_weight(torch, device, generator, width, hidden, form)
    y = torch.empty_like(x)
    name = "graphopt_cuda_quantized_mlp_scratch_bytes"
    needed = launchers.call(name, [tokens, width, hidden, form.block_size, form.activation_bits])
    scratch = torch.empty(needed, dtype=torch.uint8, device=device)

    numbers, step = rounded(torch, normalised(torch, x, norm, EPSILON), form)
    first = dense(torch, gate_up, form)
    gate, up = (numbers @ first.T).chunk(2, dim=-1)
    inner, inner_step = rounded(torch, (activated(torch, activation, gate) * up).float(), form)
    second = dense(torch, down, form)
    wanted = (x.double() + inner @ second.T).to(kind)
    # A number that is off by its last place may round to the next step: some hidden ones of a token, and behind a norm
    # one of its own, which moves all hidden ones a little.
    largest = [float(matrix.abs().max()) if matrix.numel() else 0.0 for matrix in (first, second)]
    flips = 4 * inner_step * largest[1] + (step * largest[0] * largest[1] * hidden**0.5 if normed else 0.0)
    others = [t for t in (x, norm, y) if t is not None]
    return Call(
        [x, norm, *gate_up.arguments, *down.arguments, y, scratch, tokens, width, hidden, form.bits, form.block_size,
         form.activation_bits, activation, int(form.half), int(form.half_scales), EPSILON],
        [y], lambda: [wanted],
        bytes=gate_up.bytes + down.bytes + sum(t.numel() * t.element_size() for t in others),
        operations=6 * tokens * width * hidden * form.activation_bits // 8, arithmetic="int8 tensor",
        atol=1e-4 + flips, rtol=2e-3 if form.half else 1e-5,
    )  # fmt: skip


def case(tokens: int, width: int, hidden: int, form: Form, activation: int, normed: bool, timed: bool) -> Case:
    name = ("SiLU", "GELU", "GELU by tanh", "ReLU")[activation]
    shape = f"{width} to {hidden} and back, tokens {tokens}, {form}, {name}{', norm' if normed else ''}"
    make = functools.partial(mlp, tokens, width, hidden, form, activation, normed)
    return Case("QuantizedMlp", "graphopt_cuda_quantized_mlp", shape, make, timed)


def cases() -> Iterator[Case]:
    """Shapes of real models, and all activations on odd ones."""
    for (width, hidden), tokens in itertools.product(REAL, (1, 4, 16, 128, 2048)):
        for form in REAL_FORMS if width == 4096 else REAL_FORMS[:1]:
            yield case(tokens, width, hidden, form, 0, True, True)
    for (a, b), tokens, activation in itertools.product(ODD, (0, 1, 3, 9, 33), range(4)):
        for bits, block_size in itertools.product((2, 4, 8), (16, 64)):
            form = Form(bits, block_size, 16, activation % 2 == 1, activation > 1, tokens == 9, tokens == 3)
            yield case(tokens, a * block_size, b * block_size, form, activation, activation == 0, False)
