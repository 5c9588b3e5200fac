"""QuantizedMlp: a decoder's whole feed-forward branch, from the residual stream and back to it, in one kernel."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from graphopt.runtime_ops.operator import Attribute, Cost, Operator, Parameter, Shapes
from graphopt.runtime_ops.quantized_linear import FORMAT, weight_bytes, weight_inputs


def _cost(shapes: Shapes, attributes: Mapping[str, Any]) -> Cost:
    x, gate_up = shapes[0], shapes[2]
    width, hidden, tokens = x[-1], gate_up[0] // 2, math.prod(x[:-1])
    weights = weight_bytes(2 * hidden, width, attributes) + weight_bytes(width, hidden, attributes)
    return Cost(flops=6 * tokens * hidden * width + 14 * tokens * hidden, bytes=weights + 8 * tokens * width)


ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
"""The activations, by the number that the attribute holds."""

OPERATOR = Operator(
    name="QuantizedMlp",
    summary="Norm, gate and up, activation, down and residual of a gated feed-forward branch in one dispatch.",
    description=r"""
$y = x + W_d \operatorname{round}(a(W_g\, n) \odot W_u\, n)$ with $n = \operatorname{round}(x / \sqrt{\overline{x^2} +
\epsilon} \cdot g)$, in one dispatch of the threads instead of seven: they stay awake between the two products, and the
hidden numbers never leave the caches. An empty `norm` leaves the norm out.

`gate_up` holds the rows of $W_g$ and, below them, those of $W_u$. Weights and the rounding of activations are those of
[QuantizedLinear](QuantizedLinear.md).
""",
    inputs=(
        Parameter("x", "T", "[..., D]", "the residual stream"),
        Parameter("norm", "float", "[D]", "gains of the norm; empty: no norm"),
        *weight_inputs("gate_up", "2F", "D"),
        *weight_inputs("down", "D", "F"),
    ),
    outputs=(Parameter("y", "T", "[..., D]", "the residual stream behind the branch"),),
    attributes=(
        *FORMAT,
        Attribute("activation", "int", "0: SiLU, 1: GELU, 2: GELU by tanh, 3: ReLU", 0),
        Attribute("epsilon", "float", "what the norm adds to the mean square", 1e-5),
    ),
    cost=_cost,
)
