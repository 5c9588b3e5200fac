"""A small decoder, and a pass that is right only where inputs suit an assumption (a stand-in for such lowerings)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_ir as ir
from exactness import parse_weighted

from graphopt.graph.edits import Editor
from graphopt.passes.base import RulePass

TEXT = """<ir_version: 10, opset_import: ["": 21]>
d (int64[batch, seq] input_ids, int64[batch, total] attention_mask, int64[batch, seq] position_ids,
   float[batch, 2, past, 4] past_key)
  => (float[batch, seq, 9] logits, float[batch, 2, all, 4] present_key)
<float[9, 8] table, float[8, 9] head, int64[4] split = {0, 0, 2, 4}, int64[3] join = {0, 0, 8},
 int64[2] around = {1, 3}, int64[1] length = {2}, float slow = {0.1}> {
  x = Gather(table, input_ids)
  heads = Reshape(x, split)
  new = Transpose<perm = [0, 2, 1, 3]>(heads)
  present_key = Concat<axis = 2>(past_key, new)
  weight = Cast<to = 1>(attention_mask)
  column = Unsqueeze(weight, around)
  kept = Mul(present_key, column)
  sum = ReduceSum(kept, length)
  y = Add(new, sum)
  back = Transpose<perm = [0, 2, 1, 3]>(y)
  tokens = Reshape(back, join)
  number = Cast<to = 1>(position_ids)
  angle = Mul(number, slow)
  wave = Sin(angle)
  waves = Unsqueeze(wave, length)
  rows = Add(tokens, waves)
  scores = MatMul(rows, head)
  logits = Softsign(scores)
}"""
"""Each new token plus the sum of the tokens that the mask has and a wave of its position, and the longer cache."""

INPUTS = {"mask": "attention_mask", "ids": "input_ids", "positions": "position_ids", "past": "past_key"}


def decoder() -> ir.Model:
    """The decoder, with random weights."""
    return parse_weighted(TEXT)


class Narrow(RulePass):
    """Writes Softsign as x / (1 + |x|) times a factor that is 1 where an assumption holds.

    Args:
        right_for: The assumption.
        honest: Whether the pass says that it relies on it, and does nothing where it isn't assumed.
    """

    name: ClassVar[str] = "narrow"
    family: ClassVar[str] = "lower"
    anchors: ClassVar[tuple[str, ...]] = ("Softsign",)

    def __init__(self, right_for: str, honest: bool = True) -> None:
        super().__init__()
        self.right_for, self.honest = right_for, honest

    def prepare(self, model: ir.Model, edit: Editor) -> None:
        """See `RulePass`."""
        self.model = model
        self.inputs = {v.name: v for v in model.graph.inputs}

    def rewrite(self, node: ir.Node, edit: Editor) -> bool:
        """See `RulePass`."""
        if self.honest:
            if not self.assumptions.holds(self.right_for):
                return self.left(node, f"{self.right_for} isn't assumed")
            self.rely_on(self.model, self.right_for, INPUTS, "a quicker formula")
        exact = self.exact(node.inputs[0], edit)
        padding = self.right_for == "no-left-padding"
        by_token = {"no-left-padding": self.padding_factor, "counted-positions": self.counting_factor}
        factor = by_token.get(self.right_for, self.factor)(edit)
        edit.replace(node.outputs[0], edit.op("Mul", [exact, factor], like=node.outputs[0]))
        if padding:
            self.spoil_slots(edit)
        return self.applied(node, "written in another way")

    def exact(self, x: ir.Value | None, edit: Editor) -> ir.Value:
        """What the node computes, by others."""
        return edit.op("Div", [x, edit.op("Add", [self.number(edit, 1), edit.op("Abs", [x])])])

    def number(self, edit: Editor, value: float) -> ir.Value:
        """A constant."""
        return edit.constant(np.array(value, np.float32))

    def size(self, edit: Editor, name: str, axis: int) -> ir.Value:
        """A size of an input as a float."""
        shape = edit.op("Shape", [self.inputs[name]], {"start": axis, "end": axis + 1})
        return edit.op("Cast", [shape], {"to": ir.DataType.FLOAT})

    def mask(self, edit: Editor) -> ir.Value:
        """The mask as floats."""
        return edit.op("Cast", [self.inputs["attention_mask"]], {"to": ir.DataType.FLOAT})

    def factor(self, edit: Editor) -> ir.Value:
        """A number that is 1 where the assumption holds."""
        one, zero = self.number(edit, 1), self.number(edit, 0)
        batch, new, past = (self.size(edit, n, a) for n, a in (("input_ids", 0), ("input_ids", 1), ("past_key", 2)))
        if self.right_for == "batch=1":
            return batch
        if self.right_for == "no-padding":
            zeros = edit.op("ReduceSum", [edit.op("Sub", [one, self.mask(edit)])], {"keepdims": 0})
            return edit.op("Add", [one, zeros])
        if self.right_for == "no-batched-chunks":
            chunk = edit.op("Mul", [edit.op("Sub", [batch, one]), edit.op("Sub", [new, one])])
            return edit.op("Add", [one, edit.op("Mul", [chunk, past])])
        most = self.number(edit, float(self.right_for.partition("=")[2]))
        total = edit.op("Add", [new, past])
        return edit.op("Add", [one, edit.op("Max", [zero, edit.op("Sub", [total, most])])])

    def padding_factor(self, edit: Editor) -> ir.Value:
        """By row and new token: 1 where the mask is ones, then zeros, and the token counts."""
        one = self.number(edit, 1)
        mask = self.mask(edit)
        last = edit.constant(np.array([1]))
        count = edit.op("ReduceSum", [mask, last])
        zero, total = edit.constant(np.array(0)), edit.op("Shape", [self.inputs["attention_mask"]], {"start": 1})
        slots = edit.op("Range", [zero, edit.op("Squeeze", [total]), edit.constant(np.array(1))])
        counted = edit.op("Less", [edit.op("Cast", [slots], {"to": ir.DataType.FLOAT}), count])
        wrong = edit.op("Abs", [edit.op("Sub", [mask, edit.op("Cast", [counted], {"to": ir.DataType.FLOAT})])])
        by_row = edit.op("Unsqueeze", [edit.op("ReduceSum", [wrong, last]), last])
        padded = edit.op("Unsqueeze", [edit.op("Sub", [one, self.new_mask(edit)]), edit.constant(np.array([2]))])
        return edit.op("Add", [one, edit.op("Add", [by_row, padded])])

    def new_mask(self, edit: Editor) -> ir.Value:
        """The mask of the new tokens."""
        past = edit.op("Shape", [self.inputs["past_key"]], {"start": 2, "end": 3})
        return edit.op(
            "Slice", [self.mask(edit), past, edit.constant(np.array([1 << 30])), edit.constant(np.array([1]))]
        )

    def counting_factor(self, edit: Editor) -> ir.Value:
        """By row and new token: 1 where the position is the count of tokens before, or the token is padding."""
        total = edit.op("Shape", [self.inputs["attention_mask"]], {"start": 1})
        past = edit.op("Shape", [self.inputs["past_key"]], {"start": 2, "end": 3})
        counted = edit.op(
            "Range", [edit.op("Squeeze", [past]), edit.op("Squeeze", [total]), edit.constant(np.array(1))]
        )
        wrong = edit.op("Abs", [edit.op("Sub", [self.inputs["position_ids"], counted])])
        wrong = edit.op("Mul", [edit.op("Cast", [wrong], {"to": ir.DataType.FLOAT}), self.new_mask(edit)])
        return edit.op("Add", [self.number(edit, 1), edit.op("Unsqueeze", [wrong, edit.constant(np.array([2]))])])

    def spoil_slots(self, edit: Editor) -> None:
        """Let the cache hold something else where it is padded."""
        present = next(v for v in self.model.graph.outputs if v.name == "present_key")
        joined = present.producer()
        assert joined is not None
        edit.at(joined)
        plain = edit.op("Concat", list(joined.inputs), {"axis": 2}, like=present)
        odd = edit.op("Sub", [self.number(edit, 3), edit.op("Mul", [self.number(edit, 2), self.mask(edit)])])
        column = edit.op("Unsqueeze", [odd, edit.constant(np.array([1, 3]))])
        edit.replace(present, edit.op("Mul", [plain, column], like=present))


class NarrowWaves(Narrow):
    """The same for Sin, written as Cos; not for what is right by token."""

    name: ClassVar[str] = "narrow-waves"
    anchors: ClassVar[tuple[str, ...]] = ("Sin",)

    def exact(self, x: ir.Value | None, edit: Editor) -> ir.Value:
        """See `Narrow`."""
        return edit.op("Cos", [edit.op("Sub", [x, self.number(edit, np.pi / 2)])])
