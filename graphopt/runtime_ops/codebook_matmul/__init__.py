"""CodebookMatMul: a product with weights that are indices into a codebook."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from graphopt.runtime_ops.operator import Attribute, Cost, Operator, Parameter, Shapes


def _cost(shapes: Shapes, attributes: Mapping[str, Any]) -> Cost:
    x, indices, codebooks, scales, selectors, rows, columns, values, bias = (math.prod(shape) for shape in shapes)
    outputs = x // shapes[0][-1] * shapes[3][0] if x else 0
    weights = indices + 4 * codebooks + 4 * scales + selectors + 4 * (rows + columns + values) + 4 * bias
    per_row = shapes[0][-1] * shapes[3][0] + values
    return Cost(flops=2 * (x // shapes[0][-1] if x else 0) * per_row, bytes=weights + 4 * (x + outputs))


OPERATOR = Operator(
    name="CodebookMatMul",
    summary="x times the transpose of weights that are packed indices into a codebook, with group scales and outliers.",
    description=r"""
$y = x W^\top + b$ with $W$ of $N$ rows and $K$ columns, in tiles of $r \times c$ weights. A tile is one entry of a
codebook, found by an index of 1 to 16 bits:

$$W_{nk} = s_{n, \lfloor k / g \rfloor} \cdot
C_{b}\big[\, i_{\lfloor n / r \rfloor, \lfloor k / c \rfloor} \,\big]_{n \bmod r,\, k \bmod c} + S_{nk}$$

- **Indices** $i$ lie row by row, each row from a byte of its own, as one stream of bits without gaps, the lowest bit
  first (`codebook_matmul.packing`). Where $c$ doesn't divide $K$, or $r$ doesn't divide $N$, the last tiles stand out.
- **Codebooks** $C$, all of $2^{bits}$ entries (a shorter one is padded with zeros, so that no index is out of range):
  one for all of $W$, or one for each row of tiles, or a set of them from which `selectors` choose for each group, up to
  256. Their numbers must be finite.
- **Scales** $s$, one for each row and each $g$ columns (`group_size`, a multiple of $c$; $g \ge K$: one for each row).
- **Outliers** $S$, a sparse matrix in compressed rows, added to the weights as they are; several at one place add up.
- With `activation_block` $a > 0$, each $a$ columns of $x$ are first rounded to 8 bits, $q = \mathrm{round}(x / t)$
  (half to even), $t = \max |x| / 127$, and $q t$ takes the place of $x$; a block with a number that isn't finite
  becomes NaN. With up to four rows of $x$ that buys speed where weights come from a cache, at the price of 0.4 to 0.7 %
  of the output, the same as `MatMulNBits` does at accuracy level 4.

The fast kernels of the CPU are those of 2, 3 and 4 bits with tiles of 1 × 1 and groups of a multiple of 8 columns, or
of 128 where codebooks are selected; and for one or two rows of $x$, tiles of 1 × 2, 1 × 4, 1 × 8, 4 × 1 and 8 × 1. All
others write the weights out a piece at a time and multiply; with one row of $x$, indices of 8 bits for single weights
gain nothing over float32 but memory. Where $x$ is rounded ($a$ a multiple of 8, AVX-512 VNNI), a narrow codebook whose
numbers aren't multiples of one step, from -127 to 127 times it, is itself rounded to 16 bits of its range.

What has no use is an empty tensor. How the methods are written down:

- **NF4, FP4 variants**: 4 bits, tiles of 1 × 1, one codebook of the 16 numbers of the type, scales of the groups'
  absolute maxima.
- **NUPES**: one codebook of $\mathrm{sign}(q)\,\lvert q \rvert^{1/a}$ for all integers $q$ of the width (a row's own
  exponent $a$: a codebook for each row).
- **BitMoD**: 3 or 4 bits; a codebook for each special value that the type may hold, `selectors` choose for each group.
- **HIGGS**: tiles of 1 × p from the Gaussian grid of n entries ($bits = \log_2 n$, padded), scales of the rotated
  groups' norms, `HadamardTransform` of $x$ before the node.
- **VPTQ**: tiles of v × 1 (v outputs of one column) or 1 × v, indices of 8 to 16 bits, scales of 1 with
  `group_size` of K; codebooks of their own for groups of columns by `selectors`. Residual codebooks, like the additive
  ones of PV-Tuning, are a second node and an addition.
- **EasyQuant**: the integers -8 to 7 as codebook, a scale for each row; the 1 % of the weights that keep their
  precision are outliers, less what the indices stand for at their places.
""",
    inputs=(
        Parameter("x", "T", "[..., K]", "the activation"),
        Parameter("indices", "uint8", "[ceil(N / r), ceil(ceil(K / c) * bits / 8)]", "packed indices"),
        Parameter("codebooks", "float", "[C, 2^bits, r, c]", "C codebooks: 1, ceil(N / r), or as many as are selected"),
        Parameter("scales", "S", "[N, ceil(K / group_size)]", "factors of the groups"),
        Parameter("selectors", "uint8", "[ceil(N / r), ceil(K / group_size)] or [0]", "the codebook of each group"),
        Parameter("outlier_rows", "int32", "[N + 1] or [0]", "where each row of outliers starts, and the end"),
        Parameter("outlier_columns", "int32", "[outliers]", "the column of each"),
        Parameter("outlier_values", "float", "[outliers]", "what is added there"),
        Parameter("bias", "T", "[N] or [0]", "what is added to the outputs"),
    ),
    outputs=(Parameter("y", "T", "[..., N]", "the product"),),
    attributes=(
        Attribute("columns", "int", "columns K of the weights"),
        Attribute("bits", "int", "bits of an index, 1 to 16"),
        Attribute("group_size", "int", "columns that share a scale and a selector"),
        Attribute("activation_block", "int", "columns of x that are rounded to 8 bits together; 0: none are", 0),
    ),
    cost=_cost,
)
