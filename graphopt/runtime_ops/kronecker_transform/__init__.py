"""KroneckerTransform: a linear map of the features that is the Kronecker product of two small matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from graphopt.runtime_ops.operator import Cost, Operator, Parameter, Shapes


def _cost(shapes: Shapes, attributes: Mapping[str, Any]) -> Cost:
    x, left, right = shapes
    elements, a, b = math.prod(x), left[0], right[0]
    return Cost(flops=2 * elements * (a + b), bytes=8 * elements + 4 * (a * a + b * b))


OPERATOR = Operator(
    name="KroneckerTransform",
    summary="The features of each token, as a matrix, between two small matrices.",
    description=r"""
The $K = a b$ features of a token, row by row a matrix $X$ of $a \times b$, become $Y = A^\top X B$. As a row vector
that is $x (A \otimes B)$: a map of all features into one another for $K (a + b)$ multiplications instead of $K^2$.
Folded into the weights behind it, $(A \otimes B)^{-1} = A^{-1} \otimes B^{-1}$ makes up for it.
""",
    inputs=(
        Parameter("x", "T", "[..., a · b]", "what is transformed"),
        Parameter("left", "float", "[a, a]", "the matrix A"),
        Parameter("right", "float", "[b, b]", "the matrix B"),
    ),
    outputs=(Parameter("y", "T", "[..., a · b]", "the transformed features"),),
    attributes=(),
    cost=_cost,
    source="FlatQuant: Flatness Matters for LLM Quantization",
)
