"""What is asked of calibration: a statistic of a value, each token with a weight or not."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.calibration.data import digest
from graphopt.calibration.patches import Patches
from graphopt.calibration.statistics import Statistic
from graphopt.errors import UsageError

_CHANNELS = 1024
"""What the number of channels is taken for where it isn't known."""
Form = Literal["linear", "received"]
"""How attention becomes a weight; see `TokenWeights`."""


@dataclasses.dataclass(frozen=True)
class TokenWeights:
    """Weights of tokens by the attention that they receive: s, the mean of softmax(q·kᵀ) over heads and queries.

    Forms, for each row of the batch apart:

    - "linear": r = floor + (1 − floor) · (s − min s) / (max s − min s), as RSQ: Learning from Important Tokens Leads to
      Better Quantized LLMs (Sung et al., 2025) maps its importance; there features are scaled by r, so that H takes r²,
      here H takes r itself.
    - "received": r = s / mean s, the attention itself; sink tokens weigh most.

    Attributes:
        attention: The Attention, or the Softmax of a spelled-out one, whose probabilities count.
        form: "linear" or "received".
        floor: The smallest weight of "linear".
    """

    attention: ir.Node
    form: Form = "linear"
    floor: float = 0.005

    def of(self, received: npt.NDArray[Any], valid: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
        """The weights [batch, tokens] from the attention received [batch, tokens]; 0 for tokens that don't count."""
        seen = np.where(valid, received, np.nan).astype(np.float64)
        if self.form == "received":
            weights = seen / np.nanmean(seen, axis=1, keepdims=True)
        else:
            low, high = np.nanmin(seen, axis=1, keepdims=True), np.nanmax(seen, axis=1, keepdims=True)
            weights = self.floor + (1 - self.floor) * (seen - low) / np.maximum(high - low, 1e-30)
        return np.asarray(np.nan_to_num(weights), dtype=np.float64)


@dataclasses.dataclass(frozen=True)
class Request:
    """One statistic of one value.

    Attributes:
        value: A value of the main graph that isn't constant.
        statistic: What to gather.
        weights: Weights of its tokens; None: all count alike.
        channel_axis: The axis of its channels: -1 for tokens [batch, tokens, channels], 1 for images [batch, channels,
            height, width].
        patches: Rows are the patches of a convolution on images [batch, channels, height, width]; `channel_axis` and
            `weights` don't matter then. None: they are what lies along the axis of channels.
    """

    value: ir.Value
    statistic: Statistic
    weights: TokenWeights | None = None
    channel_axis: int = -1
    patches: Patches | None = None

    @property
    def bytes(self) -> int:
        """About how much memory gathering it takes."""
        axis, shape = (1 if self.patches is not None else self.channel_axis), self.value.shape
        size = shape[axis] if shape is not None and -len(shape) <= axis < len(shape) else None
        channels = size if isinstance(size, int) else _CHANNELS
        return self.statistic.bytes(channels if self.patches is None else self.patches.columns(channels))

    @property
    def key(self) -> str:
        """What tells it from other requests on the same model."""
        by = self.weights
        weighted = "" if by is None else f"{by.attention.name} {by.form} {by.floor}"
        return digest(self.value.name or "", repr(self.statistic), weighted, str(self.channel_axis), repr(self.patches))


def rows_of(
    array: npt.NDArray[Any],
    channel_axis: int,
    valid: npt.NDArray[np.bool_] | None,
    weights: npt.NDArray[Any] | None,
) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None]:
    """An activation as rows of channels, without those of tokens that don't count, and their weights.

    Args:
        array: The activation.
        channel_axis: The axis of its channels.
        valid: Tokens that count [batch, tokens]; None: all. Where no axes of the activation fit, it has no tokens.
        weights: Weights of tokens [batch, tokens]; None: none.

    Returns:
        [rows, channels], and the weights [rows] or None.

    Raises:
        UsageError: There are weights, but the activation has no tokens.
    """
    if array.ndim == 0:
        return array.reshape(1, 1), None
    moved = np.moveaxis(array, channel_axis, -1)
    block = moved.reshape(-1, moved.shape[-1])
    spread = None if weights is None else _spread(weights, moved.shape[:-1])
    if weights is not None and spread is None:
        raise UsageError(
            f"Tokens can't be weighted in an activation of shape {list(array.shape)}: the attention has "
            f"{weights.shape[1]} tokens."
        )
    kept = None if valid is None else _spread(valid, moved.shape[:-1])
    if kept is not None and not kept.all():
        block, spread = block[kept], None if spread is None else spread[kept]
    return block, spread


def _spread(tokens: npt.NDArray[Any], axes: tuple[int, ...]) -> npt.NDArray[Any] | None:
    """A number for each row of an activation whose axes but that of channels are `axes`, from one for each token."""
    batch, count = tokens.shape
    if axes[:2] == (batch, count):
        shaped = tokens.reshape(batch, count, *[1] * (len(axes) - 2))
    elif len(axes) == 3 and axes[0] == batch and axes[2] == count:
        shaped = tokens.reshape(batch, 1, count)
    elif axes == (batch * count,):
        shaped = tokens.reshape(-1)
    else:
        return None
    return np.ascontiguousarray(np.broadcast_to(shaped, axes)).reshape(-1)
