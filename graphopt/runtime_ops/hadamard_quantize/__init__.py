"""HadamardQuantize: HadamardTransform, and what comes out as bytes with one scale for each token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from graphopt.runtime_ops.hadamard_transform import OPERATOR as TRANSFORM
from graphopt.runtime_ops.operator import Attribute, Cost, Operator, Parameter, Shapes


def _cost(shapes: Shapes, attributes: Mapping[str, Any]) -> Cost:
    transform = TRANSFORM.cost(shapes, attributes)
    elements = math.prod(shapes[0])
    return Cost(flops=transform.flops + 3 * elements, bytes=5 * elements + 4 * math.prod(shapes[0][:-1]))


OPERATOR = Operator(
    name="HadamardQuantize",
    summary="HadamardTransform, quantized to bytes with one scale for each token.",
    description=r"""
The features $x$ of a token are transformed as `HadamardTransform` does it, in float32, to $r$, and quantized
symmetrically around 128:

$$s = \frac{c \cdot \max_i |r_i|}{q},\qquad y_i = 128 + \operatorname{clamp}(\operatorname{round}(r_i \cdot s^{-1}), -q, q),$$

with halves rounded to even, $q$ = `largest` (127 for 8 bits, 7 for 4 bits in a byte each) and $c$ = `clip`. A rotated
token has no outliers and no sign that prevails, so that one scale and a fixed zero point do.

`MatMulIntegerToFloat` (com.microsoft) takes `y`, `y_scale` and a zero point of 128 as they are, at 8 bits and below;
elsewhere `MatMulInteger` with that zero point, and products with `y_scale` and the weight's scales. On processors
without VNNI those kernels add pairs of products in 16 bits and may saturate: weights of 7 bits can't.

A token with a number that isn't finite has the scale NaN and 128 everywhere, and so stays NaN behind a product with its
scale. Where $s$ would be below $2^{-126}$ it is 1.
""",
    inputs=TRANSFORM.inputs,
    outputs=(
        Parameter("y", "uint8", "[..., K]", "the transformed features, quantized with zero point 128"),
        Parameter("y_scale", "float", "[..., 1]", "the scale s of each token"),
    ),
    attributes=(
        *TRANSFORM.attributes,
        Attribute("clip", "float", "part of the largest magnitude that is represented, above 0, at most 1", 1.0),
        Attribute("largest", "int", "largest magnitude of a quantized number, 1 to 127", 127),
    ),
    cost=_cost,
    source="QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs",
)
