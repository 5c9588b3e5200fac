"""HadamardTransform: a rotation of groups of features that costs additions alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from graphopt.runtime_ops.operator import Attribute, Cost, Operator, Parameter, Shapes


def _cost(shapes: Shapes, attributes: Mapping[str, Any]) -> Cost:
    x, factor = shapes
    elements, m = math.prod(x), factor[0]
    levels = int(math.log2(attributes["group_size"] // m))
    return Cost(flops=elements * (levels + 2 * m * (m > 1) + 1), bytes=8 * elements)


OPERATOR = Operator(
    name="HadamardTransform",
    summary="Each group of features times an orthogonal Hadamard matrix of 2^k · m rows.",
    description=r"""
Along the last axis, each group $x$ of $g = 2^k m$ features becomes $(H_{2^k} \otimes F)\, x \cdot s$, with

$$H_1 = 1,\quad H_{2n} = \begin{pmatrix} H_n & H_n \\ H_n & -H_n \end{pmatrix},$$

and a factor $F$ of $m \times m$ numbers that the node is given ($m = 1$: the number 1; else a Hadamard matrix whose
size is no power of two, such as 12, 20 or 28). With $s = 1/\sqrt{g}$ the transform is orthogonal, and for a
symmetric $F$ its own inverse. The fast transform needs $g (k + m)$ operations a group instead of $g^2$.
""",
    inputs=(
        Parameter("x", "T", "[..., K]", "what is transformed; K is a multiple of `group_size`"),
        Parameter("factor", "float", "[m, m]", "the factor F"),
    ),
    outputs=(Parameter("y", "T", "[..., K]", "the transformed features"),),
    attributes=(
        Attribute("group_size", "int", "features of a group, 2^k · m"),
        Attribute("scale", "float", "the scale s"),
    ),
    cost=_cost,
    source="QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs",
)
