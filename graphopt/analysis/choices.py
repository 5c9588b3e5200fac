"""What a target profile decides: spellings of one computation between which ONNX Runtime may be faster or slower.

Each alternative is a few nodes in ONNX text, with the neighbours that ONNX Runtime's own fusions look for, so that what
is timed is what runs by default: `Add` + `LayerNormalization` after a MatMul is really its `SkipLayerNormalization`.
The names beginning with "$" are filled in for each of several blocks in a row: `$x` is the input of the block, `$y` its
output (of the same shape), `$e` a narrow second input of the model that keeps the MatMul before the site cheap, and
the rest are values, weights and constants of the choice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

Layout = Literal["tokens", "matrix", "image"]
"""How rows × width lie in a tensor: [batch, rows, width], [rows, width] or [1, width, height, height · ratio]."""

NARROW = 8
"""Width of the second input `$e`."""

LIGHT_WIDTHS = (128, 768, 3072)
HEAVY_WIDTHS = (256, 768)
TOKEN_ROWS = (1, 16, 128, 512)
"""Tokens in a batch: one of a decoder, 1 × 16, 1 × 128 and 8 × 64 of an encoder."""
PIXELS = (64, 1024, 4096)


@dataclasses.dataclass(frozen=True)
class Choice:
    """Spellings of one computation.

    Attributes:
        name: The name under which passes ask.
        title: What is computed.
        alternatives: ONNX text by alternative; the first is the baseline that the others are timed against.
        default: The alternative that is used where nothing was measured: it never lost on the machines seen.
        since: Other defaults from some version of ONNX Runtime on, as ((major, minor), alternative), ascending.
        weights: Shapes of the weights by name: numbers, products of numbers and "W" (the width), or parts ("W/32").
        derived: Weights that hold the numbers of others, joined along the last axis.
        constants: Constants by name: a number, floats, or integers.
        layout: How the tensors lie.
        widths: The widths measured.
        rows: The rows measured.
        blocks: How often the block stands in the model that is timed.
        heads: Attention heads, each W / heads wide: "{heads}" in the text, and what the constants `$heads`, `$joined`
            and `$scale` are made of; 0: none.
        tolerance: How far alternatives may be apart, relative to the largest output.
    """

    name: str
    title: str
    alternatives: Mapping[str, str]
    default: str
    weights: Mapping[str, tuple[int | str, ...]]
    derived: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    constants: Mapping[str, float | list[float] | list[int]] = dataclasses.field(default_factory=dict)
    layout: Layout = "tokens"
    widths: tuple[int, ...] = LIGHT_WIDTHS
    rows: tuple[int, ...] = TOKEN_ROWS
    blocks: int = 8
    heads: int = 0
    since: tuple[tuple[tuple[int, int], str], ...] = ()
    tolerance: float = 1e-5

    def default_for(self, version: tuple[int, int] | None) -> str:
        """The default with a version of ONNX Runtime; None: with an unknown one."""
        found = self.default
        for first, alternative in self.since:
            if version is not None and version >= first:
                found = alternative
        return found


_PROJECT = "$h = MatMul($e, $w)\n"
_PROJECT_BIAS = "$h = MatMul($e, $w)\n$a = Add($h, $b)\n"
_PROJECTION: dict[str, tuple[int | str, ...]] = {"w": (NARROW, "W"), "b": ("W",)}
_NORM: dict[str, tuple[int | str, ...]] = {"g": ("W",), "c": ("W",)}

_QKV: dict[str, tuple[int | str, ...]] = {
    "wq": ("W", "W"), "wk": ("W", "W"), "wv": ("W", "W"), "bq": ("W",), "bk": ("W",), "bv": ("W",)
}  # fmt: skip
_SEPARATE = """$q0 = MatMul($x, $wq)
$q = Add($q0, $bq)
$k0 = MatMul($x, $wk)
$k = Add($k0, $bk)
$v0 = MatMul($x, $wv)
$v = Add($v0, $bv)
"""
_AFTER_SIBLINGS = """$m = Mul($q, $k)
$y = Add($m, $v)
"""

_NBITS_BLOCK = 32
_NBITS_BITS = f"bits = 4, block_size = {_NBITS_BLOCK}"
_NBITS = f"""$c = Mul($w, $spread)
$i = Cast<to = 2>($c)
$m = com.microsoft.MatMulNBits<K = {{width}}, N = {{width}}, {_NBITS_BITS}, accuracy_level = %d>(%s, $i, $s)
"""
_NBITS_TWICE = f"""$u = Cast<to = 2>($identity)
$o = Reshape($u, $identity_shape)
$b = Reshape($x, $by_block)
$r = com.microsoft.MatMulNBits<K = {_NBITS_BLOCK}, N = {_NBITS_BLOCK}, {_NBITS_BITS}, accuracy_level = 4>($b, $o, $ones)
$d = Sub($b, $r)
$t = Concat<axis = 0>($b, $d)
$f = Reshape($t, $by_row)
{_NBITS % (4, "$f")}$g, $h = Split<axis = 0, num_outputs = 2>($m)
$y = Add($g, $h)"""
_NBITS_IDENTITY = [
    0x88 + (16 ** (column % 2) if column // 2 == byte else 0)
    for column in range(_NBITS_BLOCK)
    for byte in range(_NBITS_BLOCK // 2)
]
"""The unit matrix in 4 bits, 8 being its 0."""

CHOICES: dict[str, Choice] = {
    choice.name: choice
    for choice in (
        Choice(
            "residual-norm",
            "residual addition before a LayerNormalization",
            {
                "add": _PROJECT_BIAS + "$s = Add($a, $x)\n$y = LayerNormalization<axis = -1>($s, $g, $c)",
                "sum": _PROJECT_BIAS + "$s = Sum($a, $x)\n$y = LayerNormalization<axis = -1>($s, $g, $c)",
            },
            "add",
            _PROJECTION | _NORM,
            # Up to 1.29 the fused kernel is the faster one, and from 1.27 on LayerNormalization itself three times
            # slower; with 1.30 LayerNormalization is as before and the fused kernel four times slower.
            since=(((1, 30), "sum"),),
        ),
        Choice(
            "rms-norm",
            "root mean square normalization",
            {
                "standard": _PROJECT + "$n = RMSNormalization<axis = -1>($h, $g)\n$y = Add($n, $x)",
                "contrib": _PROJECT + "$n = SimplifiedLayerNormalization<axis = -1>($h, $g)\n$y = Add($n, $x)",
            },
            "standard",
            {"w": (NARROW, "W"), "g": ("W",)},
        ),
        Choice(
            "residual-rms-norm",
            "residual addition before a root mean square normalization; the sum is read again",
            {
                "add": _PROJECT + "$s = Add($h, $x)\n$n = RMSNormalization<axis = -1>($s, $g)\n$y = Add($n, $s)",
                "skip": _PROJECT
                + "$n, $u, $v, $s = com.microsoft.SkipSimplifiedLayerNormalization($h, $x, $g)\n$y = Add($n, $s)",
            },
            "add",
            {"w": (NARROW, "W"), "g": ("W",)},
        ),
        Choice(
            "gelu",
            "Gelu after a bias",
            {
                "add": _PROJECT_BIAS + "$y = Gelu($a)",
                "sum": "$h = MatMul($e, $w)\n$a = Sum($h, $b)\n$y = Gelu($a)",
                "bias-gelu": "$h = MatMul($e, $w)\n$y = com.microsoft.BiasGelu($h, $b)",
            },
            "add",
            _PROJECTION,
        ),
        Choice(
            "gelu-tanh",
            "the tanh form of Gelu after a bias",
            {
                "gelu": _PROJECT_BIAS + '$y = Gelu<approximate = "tanh">($a)',
                "fast-gelu": "$h = MatMul($e, $w)\n$y = com.microsoft.FastGelu($h, $b)",
            },
            "gelu",
            _PROJECTION,
        ),
        Choice(
            "swish",
            "x · Sigmoid(x)",
            {
                "sigmoid-mul": _PROJECT + "$s = Sigmoid($h)\n$y = Mul($h, $s)",
                "quick-gelu": _PROJECT + "$y = com.microsoft.QuickGelu<alpha = 1.0>($h)",
            },
            "sigmoid-mul",
            {"w": (NARROW, "W")},
        ),
        Choice(
            "hard-swish",
            "x · HardSigmoid(x)",
            {
                "hard-swish": _PROJECT + "$y = HardSwish($h)",
                "hard-sigmoid-mul": _PROJECT
                + "$s = HardSigmoid<alpha = 0.16666667, beta = 0.5>($h)\n$y = Mul($h, $s)",
            },
            "hard-swish",
            {"w": (NARROW, "W")},
            widths=(768,),
        ),
        Choice(
            "linear",
            "product with a weight and a bias, of a matrix",
            {
                "matmul-add": "$h = MatMul($x, $w)\n$y = Add($h, $b)",
                "gemm": "$y = Gemm($x, $w, $b)",
            },
            "matmul-add",
            {"w": ("W", "W"), "b": ("W",)},
            layout="matrix",
            widths=HEAVY_WIDTHS,
            blocks=4,
        ),
        Choice(
            "linear-tokens",
            "product with a weight and a bias, of batches of tokens",
            {
                "matmul-add": "$h = MatMul($x, $w)\n$y = Add($h, $b)",
                "reshape-gemm": "$s = Shape($x)\n$f = Reshape($x, $flat)\n$g = Gemm($f, $w, $b)\n$y = Reshape($g, $s)",
            },
            "matmul-add",
            {"w": ("W", "W"), "b": ("W",)},
            widths=HEAVY_WIDTHS,
            blocks=2,
        ),
        Choice(
            "nbits-inputs",
            "product with a weight of 4 bits, whose inputs are rounded to 8 bits, to 8 bits twice, or not at all",
            {
                "int8": _NBITS % (4, "$x") + "$y = Identity($m)",
                "int8x2": _NBITS_TWICE,
                "float32": _NBITS % (0, "$x") + "$y = Identity($m)",
            },
            "int8",
            {"w": ("W", "W/32", 16), "s": ("W", "W/32")},
            constants={
                "spread": 100.0, "identity": _NBITS_IDENTITY, "identity_shape": [_NBITS_BLOCK, 1, _NBITS_BLOCK // 2],
                "ones": [1.0] * _NBITS_BLOCK, "by_block": [0, 0, -1, _NBITS_BLOCK], "by_row": [0, 0, -1],
            },
            widths=(512, 2048),
            blocks=2,
            tolerance=0.05,
        ),
        Choice(
            "siblings",
            "three products of one input with three weights",
            {
                "separate": _SEPARATE + _AFTER_SIBLINGS,
                "packed": "$p0 = MatMul($x, $wp)\n$p = Add($p0, $bp)\n"
                "$q, $k, $v = Split<axis = -1, num_outputs = 3>($p)\n" + _AFTER_SIBLINGS,
            },
            "separate",
            _QKV | {"wp": ("W", "3*W"), "bp": ("3*W",)},
            {"wp": ("wq", "wk", "wv"), "bp": ("bq", "bk", "bv")},
            widths=HEAVY_WIDTHS,
            blocks=1,
        ),
        Choice(
            "attention",
            "attention with heads, with the projections before it",
            {
                "spelled-out": _SEPARATE
                + """$q3 = Reshape($q, $heads)
                $q4 = Transpose<perm = [0, 2, 1, 3]>($q3)
                $k3 = Reshape($k, $heads)
                $k4 = Transpose<perm = [0, 2, 3, 1]>($k3)
                $v3 = Reshape($v, $heads)
                $v4 = Transpose<perm = [0, 2, 1, 3]>($v3)
                $s = MatMul($q4, $k4)
                $t = Mul($s, $scale)
                $p = Softmax<axis = -1>($t)
                $o4 = MatMul($p, $v4)
                $o3 = Transpose<perm = [0, 2, 1, 3]>($o4)
                $y = Reshape($o3, $joined)
                """,
                "attention": _SEPARATE + "$y = Attention<q_num_heads = {heads}, kv_num_heads = {heads}>($q, $k, $v)",
                "contrib-attention": "$y = com.microsoft.Attention<num_heads = {heads}>($x, $wp, $bp)",
            },
            "spelled-out",
            _QKV | {"wp": ("W", "3*W"), "bp": ("3*W",)},
            {"wp": ("wq", "wk", "wv"), "bp": ("bq", "bk", "bv")},
            widths=HEAVY_WIDTHS,
            blocks=1,
            heads=8,
            # Up to 1.27 the operator gives queries that see no key something else than 0.
            since=(((1, 29), "attention"),),
        ),
        Choice(
            "group-norm",
            "group normalization between convolutions",
            {
                "standard": "$t = GroupNormalization<num_groups = 8>($x, $g, $c)\n$y = Conv($t, $w)",
                "instance-norm": """$s = Shape($x)
                $r = Reshape($x, $groups)
                $i = InstanceNormalization<epsilon = 0.00001>($r, $ones, $zeros)
                $j = Reshape($i, $s)
                $m = Mul($j, $g4)
                $t = Add($m, $c4)
                $y = Conv($t, $w)""",
            },
            "instance-norm",
            _NORM | {"g4": ("W", 1, 1), "c4": ("W", 1, 1), "w": ("W", "W", 1, 1)},
            {"g4": ("g",), "c4": ("c",)},
            {"groups": [0, 8, -1], "ones": [1.0] * 8, "zeros": [0.0] * 8},
            layout="image",
            widths=(64, 256),
            rows=PIXELS,
            blocks=2,
        ),
        Choice(
            "batch-norm",
            "batch normalization that no convolution can take up",
            {
                "standard": "$t = BatchNormalization<epsilon = 0.0>($x, $g, $c, $none, $unit)\n"
                "$r = Relu($t)\n$y = Conv($r, $w)",
                "mul-add": "$m = Mul($x, $g4)\n$t = Add($m, $c4)\n$r = Relu($t)\n$y = Conv($r, $w)",
            },
            "standard",
            _NORM | {"g4": ("W", 1, 1), "c4": ("W", 1, 1), "w": ("W", "W", 1, 1)},
            {"g4": ("g",), "c4": ("c",)},
            layout="image",
            widths=(64, 256),
            rows=PIXELS,
            blocks=2,
        ),
    )
}  # fmt: skip
"""Every choice by name."""
