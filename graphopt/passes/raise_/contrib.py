"""raise-contrib: ONNX Runtime's own operators become standard ones again."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from graphopt.graph.edits import Editor
from graphopt.passes.raise_.contrib_attention_operators import is_attention
from graphopt.passes.raise_.contrib_operators import DOMAIN, ContribRulePass
from graphopt.passes.raise_.contrib_rules import RULES, Call, Formulas
from graphopt.passes.raise_.root_mean_square import NotRaised

__all__ = ["DOMAIN", "RaiseContrib"]


class RaiseContrib(ContribRulePass):
    """Write the operators that ONNX Runtime contributes (domain `com.microsoft`) as standard ones.

    A model that ONNX Runtime or its transformers optimizer fused and saved runs nowhere else, and other passes can't
    see into its operators. Each is replaced by the formula it computes; the runtime fuses what is standard again
    where that is the faster form. One rule an operator, in `contrib_rules.py`:

    1. Activations: `Gelu`, `BiasGelu`, `FastGelu` and `GemmFastGelu` (with bias), `BiasSplitGelu` → `Gelu`;
       `QuickGelu` → x · Sigmoid(α x), which `raise-silu` may write as `Swish`.
    2. Products: `FusedMatMul`, `TransposeMatMul` → α · (MatMul of transposed operands); `FusedMatMulActivation`,
       `FusedGemm`, `FusedConv` → the product (+ z), then the activation with its parameters.
    3. Norms: `SkipLayerNormalization` → x + skip + bias, LayerNormalization; `SkipSimplifiedLayerNormalization` →
       the same sum, RMSNormalization; `GroupNorm`, `SkipGroupNorm` → GroupNormalization between the transposes that
       its layout asks for; `EmbedLayerNormalization` → three Gathers, their sum, LayerNormalization, and the mask's
       counts. The sum is given out where it is read.
    4. `BiasSoftmax`, `BiasAdd`; `BiasDropout`, `BitmaskDropout`, `BitmaskBiasDropout` in inference.
    5. Operators that the standard has had since: `Trilu`, `GatherND`, `ExpandDims`, `Range`, `Pad`.

    `SimplifiedLayerNormalization`, which ONNX Runtime puts in the default domain, is raised by `raise-rms-norm`.

    **Needs:** the opset that has the target (Gelu 20, RMSNormalization 23, LayerNormalization 17, ...): run
    `convert-opset` first. The rank of what is transposed. **Guarantees:** the same function, up to the order of sums:
    ONNX Runtime's `SkipLayerNormalization` takes the variance as E[x²] − E[x]², which cancels where the mean is large,
    and in float16 norms the sum before it is rounded. `Gelu` and `QuickGelu` use the same constants.

    **Options:** `bfloat16` (default false): raise norms of bfloat16 too. ONNX Runtime 1.31 has a CPU kernel for its
    fused norm in that type and none for `Add`, so on the CPU the model would no longer load.

    Attention is raised by `raise-contrib-attention`, `RotaryEmbedding` by `raise-rotary`.

    **Left alone, with the reason:** quantized operators, and those of `com.microsoft.nchwc`, whose weights lie in the
    layout of one machine; a mean, a deviation or a dropout mask that is read; FastGelu in float64, where the runtime's
    `Gelu` holds 0.044715 in float32; attributes that the caller of a function sets.

    **When not to use it:** for a model that only ever runs in ONNX Runtime on a provider that was measured to be
    faster with its own operators, such as float16 on CUDA.
    """

    name: ClassVar[str] = "raise-contrib"
    family: ClassVar[str] = "raise"
    anchors: ClassVar[tuple[str, ...]] = tuple(f"{DOMAIN}::{operator}" for operator in RULES)

    def __init__(self, bfloat16: bool = False) -> None:
        super().__init__()
        self.bfloat16 = bfloat16

    def formulas(self, node: ir.Node, edit: Editor) -> Formulas:
        """The rule of the operator."""
        self._check_type(node)
        return RULES[node.op_type](Call(node, self))

    def why_it_stays(self, node: ir.Node) -> str | None:
        """What has no rule, but for the attention that raise-contrib-attention and raise-rotary look at."""
        if node.domain == DOMAIN and (node.op_type in RULES or is_attention(node) or node.op_type == "RotaryEmbedding"):
            return None
        return _why_it_stays(node)

    def _check_type(self, node: ir.Node) -> None:
        dtype = self.dtype(node.outputs[0])
        if dtype == ir.DataType.BFLOAT16 and "Normalization" in node.op_type and not self.bfloat16:
            raise NotRaised("in bfloat16 ONNX Runtime's CPU has a kernel for it and none for Add (option bfloat16)")
        if dtype == ir.DataType.DOUBLE and node.op_type in ("FastGelu", "GemmFastGelu"):
            raise NotRaised("it computes in float64, and Gelu holds 0.044715 in float32")
        if dtype == ir.DataType.DOUBLE and node.op_type == "SkipSimplifiedLayerNormalization":
            raise NotRaised("it computes in float64, and RMSNormalization in float32")


_QUANTIZED = (
    "NBits",
    "Quantize",
    "Integer",
    "QLinear",
    "QGemm",
    "QMoE",
    "Bnb4",
    "FpQ4",
    "Fp4",
    "Fp8",
    "QOrdered",
    "BFP",
)


def _why_it_stays(node: ir.Node) -> str:
    if node.domain != DOMAIN:
        return f"{node.op_type} of {node.domain} has its data in the layout of one machine: start from the original"
    if any(part in node.op_type for part in _QUANTIZED):
        return f"{node.op_type} is quantized arithmetic, which stays as it is"
    return f"{node.op_type} has no counterpart among the standard operators, or no rule here"
