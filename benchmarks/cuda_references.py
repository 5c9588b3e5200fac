"""PyTorch references that the CUDA cases of several operators share."""

from __future__ import annotations

from typing import Any

LARGEST = 127


def quantized_tokens(torch: Any, values: Any, clip: float, largest: int) -> list[Any]:
    """Bytes and scales of float32 numbers [tokens, features], as HadamardQuantize and KroneckerQuantize define them."""
    # A division by a number would be a product with its inverse.
    magnitude = values.abs().amax(dim=-1, keepdim=True)
    raw = magnitude * clip / torch.full_like(magnitude, largest)
    scale = torch.where(raw < 2.0**-126, torch.ones_like(raw), raw)
    codes = (values * (1 / scale)).clamp(-largest, largest).round()
    finite = values.isfinite().all(dim=-1, keepdim=True)
    codes = torch.where(finite, codes, torch.zeros_like(codes))
    scale = torch.where(finite, scale, torch.full_like(scale, float("nan")))
    return [(128 + codes).to(torch.uint8), scale[:, 0]]
