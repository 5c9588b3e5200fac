"""Scales of the values of a region: how each is rounded, and which layers read in fewer bits."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import onnx_ir as ir

from graphopt.analysis.algebra import is_op
from graphopt.passes.quantize.quantized_region import MOVERS, Region, clamp_limits, data_inputs
from graphopt.passes.quantize.value_ranges import ValueRange

_DIGITS = 7
"""Binary digits of the ends of a range. Their last digits hang on the order in which a kernel sums; from rounding to
rounding such a difference grows, until after five layers all codes are rounded anew. With few digits the same data give
the same model."""


@dataclasses.dataclass(frozen=True)
class Scale:
    """How a value is rounded: x = step · (code - zero_point), codes from 0 to `top`."""

    step: float
    zero_point: int
    top: int = 255


@dataclasses.dataclass(frozen=True)
class Narrow:
    """How layers read values in fewer bits: the range of each by its root, and to how many levels it is rounded."""

    seen: dict[ir.Value, ValueRange]
    levels: int


def scale_of(value: ir.Value, held: ValueRange, found: Region, levels: int = 256) -> Scale:
    """The scale of a root of a region whose range is known, for so many levels.

    The ends of the range are rounded away from 0 to 7 binary digits, so that all of it has codes.
    """
    low, high, top = min(held.low, 0.0), max(held.high, 0.0), levels - 1
    node = value.producer()
    if node is not None and is_op(node, "Sigmoid"):
        return Scale(1 / top, 0, top)  # 1 has a code: what a gate lets through isn't made smaller
    if node is not None and any(clamp is node for clamp in found.clamps.values()):
        least, most = clamp_limits(node)
        low, high = max(low, least), min(high, most)
    low, high = outward(low), outward(high)
    step = float(np.float32((high - low) / top))
    if step < np.finfo(np.float32).tiny:
        return Scale(1.0, 0, top)
    return Scale(step, int(np.clip(np.rint(-low / step), 0, top)), top)


def share_with_concats(scales: dict[ir.Value, Scale], found: Region) -> None:
    """Give what a Concat reads the scale of what it makes, so that it moves codes and rounds nothing again.

    Of an input with the step s that is rounded again with the result's step S, the squared error is (s² + S²) / 12, and
    S² / 12 with one scale. Only where nothing else reads the input: for others S is the coarser step.

    Args:
        scales: By root of the region, changed in place.
        found: The region.
    """
    for node in reversed(found.between):
        if not is_op(node, "Concat"):
            continue
        whole = scales[found.root(found.outputs(node)[0])]
        for value in data_inputs(node):
            alone = all(use.node is node for use in value.uses()) and not value.is_graph_output()
            if alone and found.root(value) is value and scales[value].top == whole.top and _held(value, whole, found):
                scales[value] = whole


def _held(value: ir.Value, scale: Scale, found: Region) -> bool:
    """Whether codes of a scale end where a value's own do: those of a gate at 0 and 1, those of a clamp at its ends."""
    node = value.producer()
    if node is None or is_op(node, "Sigmoid"):
        return False
    if any(clamp is node for clamp in found.clamps.values()):
        return clamp_limits(node) == (0.0, math.inf) and scale.zero_point == 0
    return True


def outward(end: float) -> float:
    """The next number from 0 outward with 7 binary digits."""
    mantissa, exponent = math.frexp(end)
    return math.copysign(math.ldexp(math.ceil(math.ldexp(abs(mantissa), _DIGITS)), exponent - _DIGITS), end)


def layers_alone(root: ir.Value, found: Region) -> bool:
    """Whether layers, and what moves their inputs, are all that reads a value and those with its scale."""
    values = [root, *(value for value in found.values() if value is not root and found.root(value) is root)]
    readers = [use.node for value in values for use in value.uses()]
    return not any(value.is_graph_output() for value in values) and all(
        node in found.layers or (node in found.between and is_op(node, *MOVERS)) for node in readers
    )
