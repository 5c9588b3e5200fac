"""smooth-quant: outliers of activations are moved into the weights that they are multiplied with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from graphopt.calibration.request import Request
from graphopt.calibration.statistics import AbsMax
from graphopt.passes.quantize.channel_folds import ChannelFold, ReaderGroup
from graphopt.passes.quantize.scale_channels import ScaleChannels, ScalePlan, Statistics


class SmoothQuant(ScaleChannels):
    """Divide the channels of what linear layers read by factors, and multiply their weights by the same.

        x W = (x / s) (s W)        s_j = max|x_j|^α / max|W_j|^(1−α)

    A channel of activations that is a hundred times the others takes the whole range of an int8 activation; in the
    weights, which have a range for each output channel, its factor costs little. With α = 0.5 activations and weights
    share the difficulty evenly.

    Paper: SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models.

    1. A group is all MatMul and Gemm nodes with constant weights that read one value (q, k, v; gate, up). They have the
       same factors, and max|W_j| is over all of them.
    2. 1/s goes into what makes x: gain and bias of a normalization; the output channels of V for O, through the
       attention, where query heads share the factors of the head of keys and values that they read; those of up for
       down, through the product with the gate; those of fc1 for fc2 through a ReLU. Nothing is left to be computed.
    3. Channels that must share a factor take the largest of their activations and of their weights.

    **Options:** `alpha` (default 0.5): from 0 to 1, how much of an outlier goes into the weights; 0.75 and more for
    activations with extreme outliers; `head` (default false): scale the output layer too.

    **Needs:** calibration data (the largest magnitude of each channel). **Guarantees:** LOSSY by name only: outputs are
    the same up to the rounding of the new weights, but where V → O is scaled the cache of a decoder holds scaled
    values, so caches of the original can't be continued.

    **Left alone, with the reason:** a value that something else than linear layers reads (post-norm networks, whose
    residual addition reads what the norm gives out); activations that a scale doesn't commute with (GELU before fc2);
    weights that another node reads too, such as an output layer tied to the embedding.

    **When not to use it:** for weights alone, which it makes harder to round: that is what awq-scales is for.
    """

    name: ClassVar[str] = "smooth-quant"
    paper: ClassVar[str] = "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models"
    needs = ("absmax",)

    def __init__(self, alpha: float = 0.5, head: bool = False) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha lies between 0 and 1, not at {alpha}")
        self.alpha, self.head = alpha, head

    def requests(self, group: ReaderGroup) -> Sequence[Request]:
        """See the base."""
        return [Request(group.x, AbsMax(per_channel=True))]

    def plan(self, group: ReaderGroup, fold: ChannelFold, statistics: Statistics) -> ScalePlan:
        """See the class."""
        largest = np.zeros(group.channels)
        for weight in group.weights():
            np.maximum(largest, np.abs(weight).max(axis=0), out=largest)
        activations = fold.pooled(statistics[self.requests(group)[0]].astype(np.float64), largest=True)
        weights = fold.pooled(largest, largest=True)
        # A channel that is always 0, or that nothing reads, needs no factor.
        known = (activations > 0) & (weights > 0)
        activations, weights = np.where(known, activations, 1), np.where(known, weights, 1)
        factors = activations**self.alpha / weights ** (1 - self.alpha)
        before, after = activations.max(), (activations / factors).max()
        return ScalePlan(factors, f"largest activation {before:.3g} → {after:.3g}")
