"""balance-columns: the inputs of linear layers scaled until all columns of their weights are of one size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.calibration.request import Request
from graphopt.passes.quantize.channel_folds import ChannelFold, ChannelFolds, ReaderGroup
from graphopt.passes.quantize.scale_channels import ScaleChannels, ScalePlan, Statistics

_ROLES = ("q", "k", "v", "kv", "qkv", "gate", "up", "gate_up", "fc1")
_DECIDING = ("v", "kv", "qkv", "up", "gate_up", "fc1")


class BalanceColumns(ScaleChannels):
    """Multiply the columns of weights by factors that make them alike, and divide what they meet by the same, exactly.

        x W = (x / s) (s W)        s_j = (mean size / size of column j)^α

    A column of small weights meets large activations: the gain of a norm that was folded into the weights is small just
    where the residual stream is huge, above all for the first token of a text. A rounding that spreads its error evenly
    over the columns, such as that of rotated weights (HIGGS), has the same error in those columns as in all others, and
    the huge activations multiply it. With α = 1 each column has an error of its own size. No data is needed.

    1. A group is all MatMul and Gemm nodes with constant weights that read one value (q, k, v; gate, up). The size of a
       column is the root of its sum of squares in v or up, whose errors go straight into what is added to the residual
       stream, while those of q, k and gate pass a softmax or another saturating function. Of several `deciding` ones
       it is the root of the mean of their squares, each as a part of its matrix; where there is none, of all.
    2. 1/s goes into what makes x: gain and bias of a normalization, or the output channels of the layers before; see
       smooth-quant. Channels that must share a factor share that of their mean square.

    **Options:** `alpha` (default 1): from 0, nothing, to 1, all columns alike; `roles` (default q, k, v, gate, up and
    those in their place): whose inputs are scaled. The inputs of `o` and `down` have been through no norm, and scaling
    them cost quality where it was measured; `deciding` (default v, up and those in their place): whose weights say how
    large a column is; `head` (default false): scale the output layer too, if `roles` names it.

    **Needs:** nothing. **Guarantees:** LOSSY by name only: outputs are the same up to the rounding of the new weights.

    **Left alone, with the reason:** what smooth-quant leaves: values that something else reads, activations that a
    scale doesn't commute with, shared weights.

    **When not to use it:** without quantizing weights afterwards; behind awq-scales, whose factors it would undo.
    """

    name: ClassVar[str] = "balance-columns"

    def __init__(
        self,
        alpha: float = 1.0,
        roles: list[str] | None = None,
        deciding: list[str] | None = None,
        head: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha lies between 0 and 1, not at {alpha}")
        self.alpha, self.head, self.roles = alpha, head, list(_ROLES if roles is None else roles)
        self.deciding = list(_DECIDING if deciding is None else deciding)

    def requests(self, group: ReaderGroup) -> Sequence[Request]:
        """See the base: nothing."""
        return ()

    def _plans(self, model: ir.Model, found: Sequence[tuple[ReaderGroup, ChannelFold]]) -> dict[int, ScalePlan]:
        return {index: self.plan(*one, {}) for index, one in enumerate(found)}

    def _groups(self, folds: ChannelFolds) -> list[tuple[ReaderGroup, ChannelFold]]:
        return [one for one in super()._groups(folds) if set(one[0].roles) & set(self.roles)]

    def plan(self, group: ReaderGroup, fold: ChannelFold, statistics: Statistics) -> ScalePlan:
        """See the class."""
        squares = np.zeros(group.channels)
        deciding = [role in self.deciding for role in group.roles]
        for weight, decides in zip(group.weights(), deciding, strict=True):
            if any(deciding) and not decides:
                continue
            column = np.einsum("nk,nk->k", weight, weight, dtype=np.float64)
            squares += column / max(float(column.sum()), 1e-300)
        sizes = np.sqrt(fold.pooled(squares))
        known = sizes > 0
        if not known.any():
            return ScalePlan(np.ones(len(sizes)), "all weights are 0")
        mean = np.exp(np.log(sizes[known]).mean())
        factors = (mean / np.where(known, sizes, mean)) ** self.alpha
        return ScalePlan(factors, f"factors of {factors.min():.3g} to {factors.max():.3g}")
