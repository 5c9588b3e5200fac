"""KroneckerQuantize: KroneckerTransform, and what comes out as bytes with one scale for each token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from graphopt.runtime_ops.hadamard_quantize import OPERATOR as HADAMARD
from graphopt.runtime_ops.kronecker_transform import OPERATOR as TRANSFORM
from graphopt.runtime_ops.operator import Cost, Operator, Parameter, Shapes


def _cost(shapes: Shapes, attributes: Mapping[str, Any]) -> Cost:
    transform = TRANSFORM.cost(shapes, attributes)
    elements = math.prod(shapes[0])
    return Cost(
        flops=transform.flops + 3 * elements, bytes=transform.bytes - 3 * elements + 4 * math.prod(shapes[0][:-1])
    )


OPERATOR = Operator(
    name="KroneckerQuantize",
    summary="KroneckerTransform, quantized to bytes with one scale for each token.",
    description="""
The features of a token are transformed as `KroneckerTransform` does it, in float32, and quantized as `HadamardQuantize`
does it; that page has the formula and says who takes the bytes.
""",
    inputs=TRANSFORM.inputs,
    outputs=(
        Parameter("y", "uint8", "[..., a · b]", "the transformed features, quantized with zero point 128"),
        Parameter("y_scale", "float", "[..., 1]", "the scale of each token"),
    ),
    attributes=tuple(a for a in HADAMARD.attributes if a.name in ("clip", "largest")),
    cost=_cost,
    source="FlatQuant: Flatness Matters for LLM Quantization",
)
