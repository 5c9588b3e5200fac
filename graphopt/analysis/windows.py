"""Where the taps of a convolution read: kernel size, stride, dilation and padding, and their algebra.

Along each axis, output position o of a convolution reads the input at s·o + d·a − p for a = 0 … K − 1, zeros outside.
So a convolution is known by its stride, by the offsets d·a − p of its taps, and by how many positions it puts out:
⌊(L − 1 + e) / s⌋ + 1 for an input of L, where e = (padding at the end) − (offset of the last tap).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import onnx_ir as ir

from graphopt.analysis.algebra import attribute_int

Axes = tuple[int, ...]
"""One number for each spatial axis."""
Sizes = Sequence[int | None]
"""The spatial sizes of an input, None where one isn't certain."""


@dataclasses.dataclass(frozen=True)
class Window:
    """What one output position of a convolution reads, for each spatial axis.

    Attributes:
        kernel: Number of taps.
        strides: Input positions from one output position to the next.
        dilations: Input positions from one tap to the next.
        begin: Zeros before the first position.
        end: Zeros after the last position.
    """

    kernel: Axes
    strides: Axes
    dilations: Axes
    begin: Axes
    end: Axes

    @property
    def reach(self) -> Axes:
        """From the first tap to the last, in input positions."""
        return tuple(d * (k - 1) for d, k in zip(self.dilations, self.kernel, strict=True))

    @property
    def slack(self) -> Axes:
        """The e of the module's text, which with the stride decides the size of the output."""
        return tuple(b + e - r for b, e, r in zip(self.begin, self.end, self.reach, strict=True))

    @property
    def padded(self) -> bool:
        """Whether any zeros are added."""
        return any(self.begin) or any(self.end)

    def outputs(self, sizes: Sequence[int]) -> Axes:
        """The sizes of the output for an input of these sizes."""
        return tuple((n - 1 + e) // s + 1 for n, e, s in zip(sizes, self.slack, self.strides, strict=True))

    def attributes(self, group: int = 1) -> dict[str, object]:
        """The attributes of a Conv node with this window; those at their default are left out, but the kernel."""
        result: dict[str, object] = {"kernel_shape": list(self.kernel)}
        if any(n != 1 for n in self.strides):
            result["strides"] = list(self.strides)
        if any(n != 1 for n in self.dilations):
            result["dilations"] = list(self.dilations)
        if self.padded:
            result["pads"] = [*self.begin, *self.end]
        if group != 1:
            result["group"] = group
        return result

    def then(self, second: Window) -> Window:
        """The window of a convolution behind this one, in positions of this one's input.

        h[i] = Σₐ V[a] · x[s₁·i + d₁·a − p₁] in y[o] = Σ_b W[b] · h[s₂·o + d₂·b − p₂] gives
        y[o] = Σ_{a,b} W[b]·V[a] · x[s₁·s₂·o + (s₁·d₂·b + d₁·a) − (p₁ + s₁·p₂)]; the sizes agree, since
        ⌊⌊z / s₁⌋ / s₂⌋ = ⌊z / (s₁·s₂)⌋.
        """
        strides = tuple(a * b for a, b in zip(self.strides, second.strides, strict=True))
        dilations, kernel = [], []
        for axis in range(len(strides)):
            inner, outer = self.dilations[axis], self.strides[axis] * second.dilations[axis]
            step = math.gcd(inner * (self.kernel[axis] > 1), outer * (second.kernel[axis] > 1)) or 1
            dilations.append(step)
            kernel.append((self.reach[axis] + self.strides[axis] * second.reach[axis]) // step + 1)
        return Window(
            tuple(kernel),
            strides,
            tuple(dilations),
            tuple(p + s * q for p, s, q in zip(self.begin, self.strides, second.begin, strict=True)),
            tuple(p + s * q for p, s, q in zip(self.end, self.strides, second.end, strict=True)),
        )

    def zero_outside(self, second: Window, sizes: Sizes) -> bool:
        """Whether this convolution, without its bias, would be 0 wherever `second` pads its output with zeros.

        It is where the padded positions read nothing but this one's own zeros. Then padding its output with zeros and
        going on with the input padded by as many zeros more is the same.
        """
        for axis, size in enumerate(sizes):
            stride, begin, reach = self.strides[axis], self.begin[axis], self.reach[axis]
            # Position −1 reads up to −stride + reach − begin.
            if second.begin[axis] and reach - begin >= stride:
                return False
            # The first position after the last reads from stride · (number of positions) − begin on.
            after = stride * self._positions(axis, size) if size is not None else None
            if second.end[axis] and (self.end[axis] < reach if after is None else after - begin < (size or 0)):
                return False
        return True

    def _positions(self, axis: int, size: int) -> int:
        return (size - 1 + self.slack[axis]) // self.strides[axis] + 1


def window_of(node: ir.Node, kernel: Sequence[int], sizes: Callable[[], Sizes | None]) -> Window | str:
    """The window of a Conv, or why it isn't certain.

    Args:
        node: The Conv.
        kernel: The spatial sizes of its weight.
        sizes: Gives the spatial sizes of its input; asked only where they decide the padding.
    """
    label = f"{node.op_type} {node.name!r}"
    ones = (1,) * len(kernel)
    given = [_axes(node, name, default) for name, default in (("strides", ones), ("dilations", ones), ("pads", None))]
    strides, dilations, pads = given
    shape = _axes(node, "kernel_shape", tuple(kernel))
    if strides is None or dilations is None or shape != tuple(kernel):
        return f"the attributes of {label} don't fit its weights"
    mode = node.attributes.get("auto_pad")
    auto_pad = "NOTSET" if mode is None else mode.as_string()
    if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        return _same(label, Window(tuple(kernel), strides, dilations, ones, ones), auto_pad, sizes)
    if auto_pad == "VALID" or (pads is None and "pads" not in node.attributes):
        pads = (0,) * (2 * len(kernel))
    half = len(kernel)
    if pads is None or len(pads) != 2 * half or min(pads, default=0) < 0 or min((*strides, *dilations), default=1) < 1:
        return f"the attributes of {label} don't fit its weights"
    return Window(tuple(kernel), strides, dilations, pads[:half], pads[half:])


def _same(label: str, window: Window, auto_pad: str, sizes: Callable[[], Sizes | None]) -> Window | str:
    known = (1,) * len(window.kernel) if all(s == 1 for s in window.strides) else sizes()
    if known is None:
        return f"the padding of {label} depends on sizes that aren't known ({auto_pad})"
    begin, end = [], []
    for size, stride, reach in zip(known, window.strides, window.reach, strict=True):
        if size is None and stride != 1:
            return f"the padding of {label} depends on sizes that aren't known ({auto_pad})"
        length = size or 1
        total = reach if stride == 1 else max((-(-length // stride) - 1) * stride + reach + 1 - length, 0)
        less, more = total // 2, total - total // 2
        begin.append(less if auto_pad == "SAME_UPPER" else more)
        end.append(more if auto_pad == "SAME_UPPER" else less)
    return dataclasses.replace(window, begin=tuple(begin), end=tuple(end))


def _axes(node: ir.Node, name: str, default: Axes | None) -> Axes | None:
    """An attribute of one number an axis (`pads`: two); None where it has another length."""
    attribute = node.attributes.get(name)
    if attribute is None:
        return default
    numbers = tuple(attribute.as_ints())
    return numbers if default is None or len(numbers) == len(default) else None


def group_of(node: ir.Node) -> int:
    """The number of groups of a Conv whose attributes are its own."""
    return attribute_int(node, "group", 1) or 1


def merged(windows: Sequence[Window], sizes: Sizes) -> Window | None:
    """One window that holds the taps of all, which are of one input and are added; None where they don't align.

    The strides must be equal and so must the sizes of the outputs, for every size of the input that isn't known.
    """
    first = windows[0]
    if any(window.strides != first.strides for window in windows):
        return None
    kernel, dilations, begin, end = [], [], [], []
    for axis, size in enumerate(sizes):
        slacks = [window.slack[axis] for window in windows]
        stride = first.strides[axis]
        if len(set(slacks)) > 1 and (size is None or len({(size - 1 + e) // stride for e in slacks}) > 1):
            return None
        lows = [-window.begin[axis] for window in windows]
        highs = [window.reach[axis] - window.begin[axis] for window in windows]
        low, high = min(lows), max(highs)
        steps = [window.dilations[axis] for window in windows if window.kernel[axis] > 1]
        step = math.gcd(*steps, *(n - low for n in lows)) or 1
        kernel.append((high - low) // step + 1)
        dilations.append(step)
        begin.append(-low)
        end.append(high + max(slacks))
    return Window(tuple(kernel), first.strides, tuple(dilations), tuple(begin), tuple(end))


def place(window: Window, inside: Window) -> tuple[slice, ...]:
    """Where the taps of `window` lie among those of `inside`, made by `merged`: an index of its spatial axes."""
    slices = []
    for axis, count in enumerate(window.kernel):
        step = inside.dilations[axis]
        first = (inside.begin[axis] - window.begin[axis]) // step
        stride = max(1, window.dilations[axis] // step) if count > 1 else 1
        slices.append(slice(first, first + stride * (count - 1) + 1, stride))
    return tuple(slices)
