"""QuantizedLinear: a decoder's norm, projection, bias and residual in one kernel, on block-quantized weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from graphopt.runtime_ops.operator import Attribute, Cost, Operator, Parameter, Shapes

WEIGHT = (
    ("", "uint8", "[N, K / block_size, block_size · bits / 8]", "the packed numbers of the weight, as in MatMulNBits"),
    ("scales", "S", "[N, K / block_size]", "the scale of each block (or as one list, as in MatMulNBits)"),
    (
        "zero_points",
        "uint8",
        "[N, ⌈K / block_size · bits / 8⌉]",
        "packed zero points; empty: 2^(bits - 1), or 0 where there are minimums",
    ),
    ("minimums", "S", "[N, K / block_size]", "what is added to each block's numbers; empty: nothing"),
)
"""Name, type, shape and meaning of the inputs that make up a weight; see `weight_inputs`."""

FORMAT = (
    Attribute("bits", "int", "bits of a weight's number: 2, 4 or 8"),
    Attribute("block_size", "int", "numbers that share a scale: a power of two from 16 to 256"),
    Attribute("activation_bits", "int", "bits that activations are rounded to: 8 or 16", 8),
)
"""The attributes that say how weights and activations are quantized."""


def weight_inputs(name: str, rows: str = "N", columns: str = "K") -> tuple[Parameter, ...]:
    """The inputs that make up one weight of `rows` times `columns` numbers."""
    return tuple(
        Parameter(
            "_".join(part for part in (name, suffix) if part),
            kind,
            shape.replace("N", rows).replace("K", columns),
            meaning,
        )
        for suffix, kind, shape, meaning in WEIGHT
    )


def weight_bytes(rows: int, columns: int, attributes: Mapping[str, Any], scale_bytes: int = 4) -> int:
    """Bytes of a weight's numbers and scales."""
    return rows * columns * int(attributes["bits"]) // 8 + rows * columns // int(attributes["block_size"]) * scale_bytes


def _cost(shapes: Shapes, attributes: Mapping[str, Any]) -> Cost:
    x, weight = shapes[0], shapes[2]
    rows, columns, tokens = weight[0], x[-1], math.prod(x[:-1])
    return Cost(
        flops=2 * tokens * rows * columns,
        bytes=weight_bytes(rows, columns, attributes) + 4 * tokens * (rows + columns),
    )


OPERATOR = Operator(
    name="QuantizedLinear",
    summary="Norm, product with a block-quantized weight, bias and residual in one dispatch of the threads.",
    description=r"""
$y = r + b + W \operatorname{round}(n)$, where $n = x / \sqrt{\overline{x^2} + \epsilon} \cdot g$ with the gains $g$ of
an RMS norm, or $n = x$ where there are none. Any of the norm, the bias and the residual is left out by an empty input.

The weight's numbers are $w = s\,(q - z) + m$ with a scale $s$, a zero point $z$ and a minimum $m$ for each block of a
row, in the layout of ONNX Runtime's `MatMulNBits`, whose initializers it takes as they are. Minimums carry grids with
float offsets (Q4_1 of GGUF, HQQ) at the speed of integers.

Activations are rounded in the same blocks: $\operatorname{round}(n) = \operatorname{rint}(n / t)\, t$ with
$t = \max|n| / 127$ of the block for 8 bits, as `MatMulNBits` does at `accuracy_level` 4, and $t = \max|n| / 32512$ for
16 bits. 16 bits cost a second integer product of the same bytes of weights and leave an error of some 1e-5; 8 bits some
5e-3.
""",
    inputs=(
        Parameter("x", "T", "[..., K]", "the activations"),
        Parameter("norm", "float", "[K]", "gains of the norm; empty: no norm"),
        *(Parameter("weight", p.type, p.shape, p.meaning) if not p.name else p for p in weight_inputs("")),
        Parameter("bias", "float", "[N]", "the bias; empty: none"),
        Parameter("residual", "T", "[..., N]", "what is added to the product; empty: nothing"),
    ),
    outputs=(Parameter("y", "T", "[..., N]", "the result"),),
    attributes=(*FORMAT, Attribute("epsilon", "float", "what the norm adds to the mean square", 1e-5)),
    cost=_cost,
)
