"""hoist-slices: what a Slice throws away isn't computed first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analysis.algebra import producer, users
from graphopt.analysis.shapes.arrangement import ENDLESS
from graphopt.graph.constants import constant_array
from graphopt.graph.edits import Editor
from graphopt.passes.raise_.shape_rules import ShapeRulePass

OPSET = 10
END = np.iinfo(np.int64).max
Range = tuple[int, int, int]
"""Start, end and step of one axis."""


class HoistSlices(ShapeRulePass):
    """Merge slices, and move those that cut off the beginning of an axis up to where less is computed.

        x[a, :][:, b] = x[a, b]
        Conv(x)[..., s:] = Conv(x[..., s · stride:])      without padding at the beginning of that axis
        Unsqueeze(x)[s:] = Unsqueeze(x[s:])               on an axis that was there before
        Pad(x, l, r)[s:] = Pad(x, l − s, r)               for s ≤ l, in every mode

    1. Two slices in a row of different axes become one.
    2. Where everything that reads a convolution cuts the same s first columns (or rows) off, its input is cut instead.
       Spectrograms do that: silero-vad's pads its frames, and drops the first result of each.
    3. A slice behind an Unsqueeze changes places with it.
    4. A slice of what a Pad put there makes the Pad smaller.

    **Needs:** constant bounds; a convolution of proven size, longer than what is cut off (of an empty rest ONNX Runtime
    makes an error in some versions). **Guarantees:** the same numbers; rules 1, 3 and 4 bit for bit.

    **Left alone, with the reason:** a convolution that only some of its readers cut, or cut differently.

    **When not to use it:** never.
    """

    name: ClassVar[str] = "hoist-slices"
    family: ClassVar[str] = "clean"
    anchors: ClassVar[tuple[str, ...]] = ("Conv", "Slice")

    def rewrite(self, node: ir.Node, edit: Editor) -> bool:
        """See the class."""
        if edit.opset < OPSET:
            return False
        if node.op_type == "Conv":
            return self._convolution(node, edit)
        ranges = self._ranges(node)
        source = node.inputs[0]
        if ranges is None or source is None or len(source.uses()) != 1 or source.is_graph_output():
            return False
        return self._merge(node, ranges, edit) or self._unsqueeze(node, ranges, edit) or self._pad(node, ranges, edit)

    # ---- reading and writing slices

    def _ranges(self, node: ir.Node) -> dict[int, Range] | None:
        """What a Slice takes of each axis that it names; None where that isn't constant."""
        rank = self.rank(node.inputs[0]) if node.inputs[0] is not None else None
        lists = [constant_array(v, 64) for v in node.inputs[1:]]
        if (
            rank is None
            or len(lists) < 2
            or any(array is None and value is not None for array, value in zip(lists, node.inputs[1:], strict=True))
        ):
            return None
        starts, ends = (array.tolist() for array in lists[:2] if array is not None)
        axes = lists[2].tolist() if len(lists) > 2 and lists[2] is not None else list(range(len(starts)))
        steps = lists[3].tolist() if len(lists) > 3 and lists[3] is not None else [1] * len(starts)
        axes = [axis + rank if axis < 0 else axis for axis in axes]
        if len(set(axes)) != len(axes):
            return None
        return {a: (s, e, p) for a, s, e, p in sorted(zip(axes, starts, ends, steps, strict=True))}

    @staticmethod
    def _slice(value: ir.Value, ranges: dict[int, Range], edit: Editor, like: ir.Value | None = None) -> ir.Value:
        axes = sorted(ranges)
        columns = [[ranges[a][i] for a in axes] for i in (0, 1)] + [axes, [ranges[a][2] for a in axes]]
        names = ("starts", "ends", "axes", "steps")
        inputs = [edit.constant(np.array(c, np.int64), n) for c, n in zip(columns, names, strict=True)]
        return edit.op("Slice", [value, *inputs], like=like)

    # ---- rules

    def _merge(self, node: ir.Node, ranges: dict[int, Range], edit: Editor) -> bool:
        inner = producer(node.inputs[0], "Slice")
        first = None if inner is None else self._ranges(inner)
        if inner is None or first is None or inner.inputs[0] is None or set(first) & set(ranges):
            return False
        self.applied(node, f"merged with the Slice before it, axes {sorted({**first, **ranges})}")
        merged = self._slice(inner.inputs[0], {**first, **ranges}, edit, like=node.outputs[0])
        edit.replace(node.outputs[0], merged)
        return True

    def _unsqueeze(self, node: ir.Node, ranges: dict[int, Range], edit: Editor) -> bool:
        view = producer(node.inputs[0], "Unsqueeze")
        axes = None if view is None or len(view.inputs) < 2 else constant_array(view.inputs[1], 64)
        rank = self.rank(node.inputs[0]) if node.inputs[0] is not None else None
        if view is None or view.inputs[0] is None or axes is None or rank is None:
            return False
        added = {int(a) + rank if a < 0 else int(a) for a in axes.reshape(-1)}
        if added & set(ranges):
            return False
        kept = [axis for axis in range(rank) if axis not in added]
        self.applied(node, f"moved before the Unsqueeze {view.name!r}")
        cut = self._slice(view.inputs[0], {kept.index(a): r for a, r in ranges.items()}, edit)
        edit.replace(node.outputs[0], edit.op("Unsqueeze", [cut, view.inputs[1]], like=node.outputs[0]))
        return True

    def _pad(self, node: ir.Node, ranges: dict[int, Range], edit: Editor) -> bool:
        pad = producer(node.inputs[0], "Pad")
        if pad is None or pad.inputs[0] is None or len(pad.inputs) < 2:
            return False
        amounts = constant_array(pad.inputs[1], 64)
        given = constant_array(pad.inputs[3], 64) if len(pad.inputs) > 3 and pad.inputs[3] is not None else None
        rank = self.rank(pad.inputs[0])
        if amounts is None or rank is None or (len(pad.inputs) > 3 and pad.inputs[3] is not None and given is None):
            return False
        axes = list(range(rank)) if given is None else [int(a) + rank if a < 0 else int(a) for a in given]
        pads = amounts.tolist()
        taken = {
            axis: start
            for axis, (start, end, step) in ranges.items()
            if axis in axes and 0 < start <= pads[axes.index(axis)] and end >= ENDLESS and step == 1
        }
        if not taken:
            return False
        for axis, start in taken.items():
            pads[axes.index(axis)] -= start
        self.applied(node, f"the Pad {pad.name!r} made smaller, axes {sorted(taken)}")
        inputs = [pad.inputs[0], edit.constant(np.array(pads, np.int64), "pads"), *pad.inputs[2:]]
        rest = {axis: r for axis, r in ranges.items() if axis not in taken}
        attributes = {a.name: a.value for a in pad.attributes.values()}
        padded = edit.op("Pad", inputs, attributes, like=None if rest else node.outputs[0])
        edit.replace(node.outputs[0], self._slice(padded, rest, edit, like=node.outputs[0]) if rest else padded)
        return True

    def _convolution(self, node: ir.Node, edit: Editor) -> bool:
        result, source = node.outputs[0], node.inputs[0]
        readers = users(result)
        if source is None or not readers or result.is_graph_output():
            return False
        if any(r.op_type != "Slice" or r.domain not in ("", "ai.onnx") or r.graph is not node.graph for r in readers):
            return False
        cuts = [self._ranges(reader) for reader in readers]
        shape = self._facts.shape(result)
        if shape is None or any(c is None for c in cuts) or any(a.is_ref() for a in node.attributes.values()):
            return False
        found = [c for c in cuts if c is not None]
        spatial = len(shape) - 2
        strides, pads = _numbers(node, "strides", [1] * spatial), _numbers(node, "pads", [0] * 2 * spatial)
        begun = {a: r[0] for a, r in found[0].items() if a >= 2 and r[0] > 0 and r[1] >= ENDLESS and r[2] == 1}
        if node.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
            return False
        begun = {a: s for a, s in begun.items() if pads[a - 2] == 0 and shape[a].low > s}
        common = {a: s for a, s in begun.items() if all(c.get(a) == found[0][a] for c in found)}
        if not common:
            return bool(begun) and self.left(node, "not cut before it: not everything that reads it cuts the same off")
        self.applied(node, f"what its readers cut off isn't computed, axes {sorted(common)}")
        cut = self._slice(source, {a: (s * strides[a - 2], END, 1) for a, s in common.items()}, edit)
        attributes = {a.name: a.value for a in node.attributes.values()}
        smaller = edit.op("Conv", [cut, *node.inputs[1:]], attributes)
        smaller.type = result.type
        for reader, ranges in zip(readers, found, strict=True):
            rest = {a: r for a, r in ranges.items() if a not in common}
            edit.at(reader)
            edit.replace(
                reader.outputs[0], self._slice(smaller, rest, edit, like=reader.outputs[0]) if rest else smaller
            )
        return True


def _numbers(node: ir.Node, name: str, default: Sequence[int]) -> list[int]:
    attribute = node.attributes.get(name)
    return list(default if attribute is None else attribute.as_ints())
