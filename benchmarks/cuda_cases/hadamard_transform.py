"""CUDA cases of HadamardTransform and HadamardQuantize."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

from cuda_case import Call, Case
from cuda_references import LARGEST, quantized_tokens

from graphopt.runtime_ops.hadamard_transform.factors import hadamard_factor

REAL = (576, 1536, 4096, 11008, 14336)
"""Features of a token, one group each."""
SMALL = (32, 64, 128, 256)
"""Groups of which a token has many, with a factor of one."""
ODD = (
    (1, 1, 5),
    (1, 2, 9),
    (1, 4, 33),
    (1, 8, 1),
    (1, 16, 77),
    (1, 512, 3),
    (3, 4, 3),
    (5, 1, 7),
    (12, 8, 1),
    (68, 4, 2),
)
"""Rows of the factor, a power of two, groups."""


def rotated(torch: Any, x: Any, factor: Any, halves: int, scale: float) -> Any:
    """Groups [groups, halves · m] in float32: the factor, then one level after the other, then the scale."""
    m = len(factor)
    values = x.float().reshape(-1, halves, m)
    # By products in float64, whatever PyTorch takes for float32; with a factor of one number they are exact anyway.
    values = (values.double() @ factor.double().T).float()
    pairs = halves // 2
    while pairs > 0:
        first, second = values.reshape(len(x), pairs, 2, halves * m // (2 * pairs)).unbind(2)
        values = torch.stack((first + second, first - second), dim=2)
        pairs //= 2
    return values.reshape(len(x), halves * m) * scale


def inputs(torch: Any, device: str, tokens: int, groups: int, halves: int, m: int, kind: str) -> tuple[Any, Any]:
    """x [tokens, groups · halves · m] and the factor, of float64 seeds that are the same everywhere."""
    generator = torch.Generator().manual_seed(tokens * m + halves)
    x = torch.randn(tokens, groups * halves * m, generator=generator)
    if m == 1:
        factor = torch.ones(1, 1)
    elif groups == 1 and halves * m in REAL:
        factor = torch.from_numpy(hadamard_factor(halves * m))
    else:
        factor = torch.randn(m, m, generator=generator)
    return x.to(torch.float16 if kind == "half" else torch.float32).to(device), factor.to(device)


def transform(
    tokens: int, groups: int, halves: int, m: int, kind: str, torch: Any, device: str, launchers: Any
) -> Call:
    x, factor = inputs(torch, device, tokens, groups, halves, m, kind)
    y = torch.empty_like(x)
    scale = float(torch.tensor((halves * m) ** -0.5))
    flat = x.reshape(-1, halves * m)
    return Call(
        {"x": x, "factor": factor, "y": y, "groups": tokens * groups, "halves": halves, "m": m, "scale": scale}, [y],
        lambda: [rotated(torch, flat, factor, halves, scale).to(x.dtype).reshape(x.shape)],
        bytes=2 * x.numel() * x.element_size() + 4 * m * m, operations=operations(x.numel(), halves, m),
        # The levels are done in the same order: with a factor of one all numbers are equal.
        atol=0.0 if m == 1 else 1e-5 * m**0.5, rtol=0.0 if m == 1 else 2e-3 if kind == "half" else 1e-5,
    )  # fmt: skip


def quantize(
    tokens: int, groups: int, halves: int, m: int, kind: str, clip: float, largest: int,
    torch: Any, device: str, launchers: Any,
) -> Call:  # fmt: skip
    x, factor = inputs(torch, device, tokens, groups, halves, m, kind)
    y = torch.empty(x.shape, dtype=torch.uint8, device=device)
    scales = torch.empty(tokens, dtype=torch.float32, device=device)
    scale = float(torch.tensor((halves * m) ** -0.5))

    def expected() -> list[Any]:
        values = rotated(torch, x.reshape(-1, halves * m), factor, halves, scale).reshape(x.shape)
        return quantized_tokens(torch, values, clip, largest)

    return Call(
        {"x": x, "factor": factor, "y": y, "scales": scales, "tokens": tokens, "groups": groups, "halves": halves,
         "m": m, "scale": scale, "clip": clip, "largest": float(largest)}, [y, scales], expected,
        bytes=x.numel() * (x.element_size() + 1) + 4 * tokens + 4 * m * m, operations=operations(x.numel(), halves, m),
        rtol=1e-6 if m == 1 else 1e-4, steps=1, share=0.0 if m == 1 else 0.01,
    )  # fmt: skip


def operations(numbers: int, halves: int, m: int) -> int:
    """What a transform of so many numbers can't do without."""
    return numbers * (halves.bit_length() + 2 * m * (m > 1))


def both(sizes: tuple[int, int, int, int], shape: str, clip: float, largest: int, timed: bool) -> Iterator[Case]:
    """Both operators in both types."""
    for kind in ("float", "half"):
        name = f"graphopt_cuda_hadamard_transform_{kind}"
        yield Case("HadamardTransform", name, shape, functools.partial(transform, *sizes, kind), timed)
        name = f"graphopt_cuda_hadamard_quantize_{kind}"
        yield Case("HadamardQuantize", name, shape, functools.partial(quantize, *sizes, kind, clip, largest), timed)


def cases() -> Iterator[Case]:
    """Sizes of real models, many small groups, odd ones."""
    for features, tokens in itertools.product(REAL, (1, 16, 128, 2048)):
        m = len(hadamard_factor(features))
        yield from both((tokens, 1, features // m, m), f"{tokens} × {features}, factor of {m}", 1.0, LARGEST, True)
    for group in SMALL:
        groups = 4096 // group
        yield from both((2048, groups, group, 1), f"2048 × {groups} groups of {group}", 1.0, LARGEST, True)
    for (m, halves, groups), tokens in itertools.product(ODD, (0, 1, 3)):
        yield from both((tokens, groups, halves, m), f"{tokens} × {groups} groups of {halves} · {m}", 0.875, 7, False)
