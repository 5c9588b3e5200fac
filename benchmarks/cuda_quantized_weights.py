"""Block-quantized weights, and PyTorch references of products with them, for the CUDA cases of decode blocks."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Form:
    """How numbers are made.

    Attributes:
        bits: Of a weight's number.
        block_size: Numbers that share a scale.
        activation_bits: Of an activation's.
        zero_points: Whether blocks have them.
        minimums: The same.
        half: Whether activations are half-precision numbers.
        half_scales: The same for scales and minimums.
    """

    bits: int = 4
    block_size: int = 32
    activation_bits: int = 8
    zero_points: bool = False
    minimums: bool = False
    half: bool = True
    half_scales: bool = True

    def __str__(self) -> str:
        kinds = f"{'half' if self.half else 'float'}, scales {'half' if self.half_scales else 'float'}"
        more = [name for name in ("zero points", "minimums") if getattr(self, name.replace(" ", "_"))]
        numbers = f"{self.bits} bits by {self.block_size}, x {self.activation_bits} bits {kinds}"
        return ", ".join([numbers, *more])


@dataclasses.dataclass
class Weight:
    """A weight as launchers take it: uint8 [rows, blocks, bytes], scales [rows, blocks], and the others or None."""

    packed: Any
    scales: Any
    zero_points: Any
    minimums: Any

    @property
    def arguments(self) -> list[Any]:
        return [self.packed, self.scales, self.zero_points, self.minimums]

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.arguments if t is not None)


def random_weight(torch: Any, device: str, generator: Any, rows: int, length: int, form: Form) -> Weight:
    """A weight whose numbers are about as large as those of a trained one."""
    blocks = length // form.block_size
    kind = torch.float16 if form.half_scales else torch.float32

    def made_bytes(*shape: int) -> Any:
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(device)

    scales = (torch.rand(rows, blocks, generator=generator) + 0.5) * (2.0 / 2**form.bits / max(length, 1) ** 0.5)
    minimums = torch.randn(rows, blocks, generator=generator) * (0.3 / max(length, 1) ** 0.5)
    return Weight(
        made_bytes(rows, blocks, form.block_size * form.bits // 8),
        scales.to(kind).to(device),
        made_bytes(rows, (blocks * form.bits + 7) // 8) if form.zero_points else None,
        minimums.to(kind).to(device) if form.minimums else None,
    )


def unpacked(torch: Any, packed: Any, bits: int) -> Any:
    """The numbers of rows of bytes [rows, bytes], from the lowest bits up, as uint8."""
    parts = [packed >> shift & (2**bits - 1) for shift in range(0, 8, bits)]
    return torch.stack(parts, dim=-1).reshape(len(packed), -1)


def dense(torch: Any, weight: Weight, form: Form) -> Any:
    """A weight as float64 [rows, length]."""
    rows, blocks, _ = weight.packed.shape
    numbers = unpacked(torch, weight.packed.reshape(rows, -1), form.bits).double()
    numbers = numbers.reshape(rows, blocks, form.block_size)
    if weight.zero_points is not None:
        numbers -= unpacked(torch, weight.zero_points, form.bits)[:, :blocks, None].double()
    elif weight.minimums is None:
        numbers -= 2 ** (form.bits - 1)
    numbers *= weight.scales.double()[:, :, None]
    if weight.minimums is not None:
        numbers += weight.minimums.double()[:, :, None]
    return numbers.reshape(rows, blocks * form.block_size)


def normalised(torch: Any, x: Any, norm: Any, epsilon: float) -> Any:
    """x over its root mean square, times the gains, in float32; as it is where there are none."""
    if norm is None:
        return x.float()
    mean = x.double().square().mean(dim=-1, keepdim=True).float()
    return x.float() / (mean + epsilon).sqrt() * norm


def rounded(torch: Any, x: Any, form: Form) -> tuple[Any, float]:
    """Float32 activations [tokens, length] as what they are rounded to, in float64, and the largest step."""
    blocks = x.reshape(len(x), x.shape[1] // form.block_size, form.block_size)
    if blocks.numel() == 0:
        return x.double(), 0.0
    peaks = blocks.abs().amax(dim=-1, keepdim=True)
    # A division by a number would be a product with its inverse.
    most = torch.full_like(peaks, 127.0 * 2.0 ** (form.activation_bits - 8))
    inverse = torch.where(peaks > 0, most / peaks, torch.zeros_like(peaks))
    scale = peaks / most
    made = (blocks * inverse).round().double() * scale.double()
    return made.reshape(x.shape), float(scale.max())
