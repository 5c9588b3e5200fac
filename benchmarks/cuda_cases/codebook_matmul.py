"""CUDA cases of CodebookMatMul; the reference is its portable body."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

from cuda_case import Call, Case
from cuda_references import of_body

SHAPES = ((576, 576), (1536, 576), (576, 1536), (4096, 4096), (11008, 4096), (4096, 11008))
"""Rows and columns of projections of SmolLM2 and of a 7B model."""


@dataclasses.dataclass(frozen=True)
class Form:
    """How weights are written down, and whether activations are rounded."""

    bits: int = 4
    tile: tuple[int, int] = (1, 1)
    group: int = 32
    books: int = 1
    by_row: bool = False
    outliers: int = 0
    bias: bool = False
    activation_block: int = 0
    half_scales: bool = False


REAL = (
    Form(),
    Form(bits=3),
    Form(bits=2),
    Form(activation_block=32),
    Form(bits=8, tile=(1, 4)),
    Form(bits=12, tile=(8, 1)),
)
ODD = (
    Form(), Form(bits=3, outliers=17, bias=True), Form(bits=2, group=16, books=3, half_scales=True),
    Form(bits=5, by_row=True), Form(bits=8, tile=(1, 4), group=8), Form(bits=8, tile=(1, 2), activation_block=16),
    Form(bits=9, tile=(4, 1), group=1 << 20), Form(bits=4, tile=(2, 2), group=4, books=2),
    Form(bits=1, activation_block=32),
)  # fmt: skip


def product(m: int, rows: int, columns: int, form: Form, kind: str, torch: Any, device: str, launchers: Any) -> Call:
    generator = torch.Generator().manual_seed(m + rows + columns)
    dtype = torch.float16 if kind == "half" else torch.float32
    tile_rows, tile_columns = form.tile
    down, across = -(-rows // tile_rows), -(-columns // tile_columns)
    groups = -(-columns // form.group)
    books = down if form.by_row else form.books
    selected = form.books > 1 and not form.by_row

    def random_bytes(*shape: int) -> Any:
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

    def random(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator)

    pointers = torch.randint(0, form.outliers + 1, (rows + 1,), generator=generator).sort().values
    pointers[0], pointers[-1] = 0, form.outliers
    of_rows = pointers if form.outliers else torch.zeros(0)
    tensors = {
        "x": random(m, columns).to(dtype),
        "indices": random_bytes(down, (across * form.bits + 7) // 8),
        "codebooks": random(books, 1 << form.bits, tile_rows, tile_columns),
        "scales": (torch.rand(rows, groups, generator=generator) + 0.5).to(
            torch.float16 if form.half_scales else torch.float32
        ),
        "selectors": random_bytes(down, groups) % books if selected else torch.zeros(0, dtype=torch.uint8),
        "outlier_rows": of_rows.int(),
        "outlier_columns": torch.randint(0, columns, (form.outliers,), generator=generator).int(),
        "outlier_values": random(form.outliers),
        "bias": (random(rows) if form.bias else torch.zeros(0)).to(dtype),
    }
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    y = torch.empty(m, rows, dtype=dtype, device=device)
    arguments: dict[str, Any] = {
        name: tensor if tensor.numel() or name == "x" else None for name, tensor in tensors.items()
    }
    arguments |= {
        "y": y, "m": m, "activation_block": form.activation_block, "rows": rows, "columns": columns,
        "group_size": form.group, "books": books, "outliers": form.outliers, "bits": form.bits, "tile_rows": tile_rows,
        "tile_columns": tile_columns, "half_scales": int(form.half_scales),
    }  # fmt: skip
    attributes = {
        "bits": form.bits, "columns": columns, "group_size": form.group, "activation_block": form.activation_block,
    }  # fmt: skip
    return Call(
        arguments, [y], lambda: of_body(torch, "CodebookMatMul", list(tensors.values()), attributes),
        bytes=sum(int(t.numel() * t.element_size()) for t in (*tensors.values(), y)),
        operations=2 * m * rows * columns, arithmetic="float16 tensor", atol=2e-5 * columns**0.5,
        rtol=2e-3 if kind == "half" else 1e-4,
    )  # fmt: skip


def cases() -> Iterator[Case]:
    """Projections of real models; every form at odd sizes."""
    for (rows, columns), form, m, kind in itertools.product(SHAPES, REAL, (1, 16, 128), ("float", "half")):
        block = f", x in 8 by {form.activation_block}" if form.activation_block else ""
        shape = f"{m} × {columns} → {rows}, {form.bits} bits for {form.tile[0]} × {form.tile[1]}{block}"
        make = functools.partial(product, m, rows, columns, form, kind)
        yield Case("CodebookMatMul", f"graphopt_cuda_codebook_matmul_{kind}", shape, make)
    for form, m, kind in itertools.product(ODD, (0, 1, 3, 17), ("float", "half")):
        make = functools.partial(product, m, 21, 68, form, kind)
        yield Case("CodebookMatMul", f"graphopt_cuda_codebook_matmul_{kind}", f"{m} × 68 → 21, {form}", make, False)
