"""What a convolution multiplies, as rows: one for each place of the kernel."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.algebra import is_op

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Patches:
    """The patches of a two-dimensional convolution: a row for each place, columns as in a weight [N, C, h, w].

    So the second moment of the rows is the Hessian of the weight seen as a matrix [N, C·h·w].

    Attributes:
        kernel: Height and width of the kernel.
        strides: Steps from place to place.
        pads: Zeros above, left, below and right; None: as `same` says.
        dilations: Distances of the elements of the kernel.
        same: "upper" or "lower": so many zeros that the result is as large as the input, divided by the strides; the
            odd one goes below and right, or above and left.
    """

    kernel: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] | None = (0, 0, 0, 0)
    dilations: tuple[int, int] = (1, 1)
    same: str = ""

    @classmethod
    def of_node(cls, node: ir.Node) -> Patches | None:
        """The patches of a Conv without groups; None of any other node."""
        weight = node.inputs[1] if is_op(node, "Conv") and len(node.inputs) > 1 else None
        attributes = node.attributes
        if weight is None or weight.shape is None or len(weight.shape) != 4:
            return None
        if any(attribute.is_ref() for attribute in attributes.values()):
            return None
        kernel = [size for size in weight.shape[2:] if isinstance(size, int)]
        if len(kernel) != 2 or ("group" in attributes and attributes["group"].as_int() != 1):
            return None

        def two(name: str) -> tuple[int, int]:
            given = attributes[name].as_ints() if name in attributes else (1, 1)
            return given[0], given[1]

        how = attributes["auto_pad"].as_string() if "auto_pad" in attributes else "NOTSET"
        pads = tuple(attributes["pads"].as_ints()) if "pads" in attributes and how == "NOTSET" else (0, 0, 0, 0)
        same = how.removeprefix("SAME_").lower() if how.startswith("SAME_") else ""
        return cls(
            (kernel[0], kernel[1]),
            two("strides"),
            None if same else (pads[0], pads[1], pads[2], pads[3]),
            two("dilations"),
            same,
        )

    def columns(self, channels: int) -> int:
        """Columns of a row."""
        return channels * self.kernel[0] * self.kernel[1]

    def of(self, images: Array) -> Array:
        """The rows [batch, rows, columns of places, C·h·w] of images [batch, C, height, width]."""
        pads = self._pads(images.shape[2:])
        padded = np.pad(images, ((0, 0), (0, 0), (pads[0], pads[2]), (pads[1], pads[3])))
        extent = [(size - 1) * step + 1 for size, step in zip(self.kernel, self.dilations, strict=True)]
        windows = np.lib.stride_tricks.sliding_window_view(padded, extent, axis=(2, 3))
        places = windows[:, :, :: self.strides[0], :: self.strides[1], :: self.dilations[0], :: self.dilations[1]]
        batch, channels, rows, columns = places.shape[:4]
        return places.transpose(0, 2, 3, 1, 4, 5).reshape(batch, rows, columns, self.columns(channels))

    def _pads(self, size: tuple[int, ...]) -> tuple[int, int, int, int]:
        if self.pads is not None:
            return self.pads
        whole = []
        for length, kernel, stride, dilation in zip(size, self.kernel, self.strides, self.dilations, strict=True):
            places = -(-length // stride)
            whole.append(max((places - 1) * stride + (kernel - 1) * dilation + 1 - length, 0))
        less, more = [total // 2 for total in whole], [total - total // 2 for total in whole]
        before, after = (less, more) if self.same == "upper" else (more, less)
        return before[0], before[1], after[0], after[1]
