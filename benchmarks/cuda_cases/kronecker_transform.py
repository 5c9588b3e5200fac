"""CUDA cases of KroneckerTransform and KroneckerQuantize."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

from cuda_case import Call, Case
from cuda_references import LARGEST, quantized_tokens

REAL = ((24, 24), (32, 48), (64, 64), (86, 128), (112, 128))
"""Rows of the two matrices for 576, 1536, 4096, 11008 and 14336 features."""
ODD = ((1, 1), (3, 5), (5, 1), (1, 33), (9, 31), (8, 32), (17, 65), (7, 130))


def inputs(torch: Any, device: str, tokens: int, a: int, b: int, kind: str) -> list[Any]:
    """x [tokens, a · b] and the two matrices."""
    generator = torch.Generator().manual_seed(tokens + a * b)
    x = torch.randn(tokens, a * b, generator=generator).to(torch.float16 if kind == "half" else torch.float32)
    return [x.to(device), *((torch.randn(n, n, generator=generator) / n**0.5).to(device) for n in (a, b))]


def product(x: Any, left: Any, right: Any) -> Any:
    """Aᵀ X B of every token, by float64, as float32."""
    whole = left.double().T @ (x.double().reshape(-1, len(left), len(right)) @ right.double())
    return whole.float().reshape(x.shape)


def least_bytes(x: Any, a: int, b: int) -> int:
    """Of x and the matrices."""
    return int(x.numel() * x.element_size() + 4 * (a * a + b * b))


def transform(tokens: int, a: int, b: int, kind: str, torch: Any, device: str, launchers: Any) -> Call:
    x, left, right = inputs(torch, device, tokens, a, b, kind)
    y = torch.empty_like(x)
    return Call(
        {"x": x, "left": left, "right": right, "y": y, "tokens": tokens, "a": a, "b": b}, [y],
        lambda: [product(x, left, right).to(x.dtype)],
        bytes=least_bytes(x, a, b) + y.numel() * y.element_size(), operations=2 * x.numel() * (a + b), atol=2e-5,
        rtol=2e-3 if kind == "half" else 1e-5,
    )  # fmt: skip


def quantize(
    tokens: int, a: int, b: int, kind: str, clip: float, largest: int, torch: Any, device: str, launchers: Any
) -> Call:
    x, left, right = inputs(torch, device, tokens, a, b, kind)
    y = torch.empty(x.shape, dtype=torch.uint8, device=device)
    scales = torch.empty(tokens, dtype=torch.float32, device=device)
    return Call(
        {"x": x, "left": left, "right": right, "y": y, "scales": scales, "tokens": tokens, "a": a, "b": b, "clip": clip,
         "largest": float(largest)}, [y, scales],
        lambda: quantized_tokens(torch, product(x, left, right), clip, largest),
        bytes=least_bytes(x, a, b) + y.numel() + 4 * tokens, operations=2 * x.numel() * (a + b), rtol=1e-4, steps=1,
        share=0.01,
    )  # fmt: skip


def both(tokens: int, a: int, b: int, clip: float, largest: int, timed: bool) -> Iterator[Case]:
    """Both operators in both types."""
    shape = f"{tokens} × {a} · {b}"
    for kind in ("float", "half"):
        sizes = (tokens, a, b, kind)
        name = f"graphopt_cuda_kronecker_transform_{kind}"
        yield Case("KroneckerTransform", name, shape, functools.partial(transform, *sizes), timed)
        name = f"graphopt_cuda_kronecker_quantize_{kind}"
        yield Case("KroneckerQuantize", name, shape, functools.partial(quantize, *sizes, clip, largest), timed)


def cases() -> Iterator[Case]:
    """Sizes of real models and odd ones."""
    for (a, b), tokens in itertools.product(REAL, (1, 16, 128, 2048)):
        yield from both(tokens, a, b, 1.0, LARGEST, True)
    for (a, b), tokens in itertools.product(ODD, (0, 1, 3)):
        yield from both(tokens, a, b, 0.875, 7, False)
