"""omit-zero-states: recurrent layers that start from computed zeros."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analysis.algebra import producer
from graphopt.graph.constants import constant_array, constant_tensor
from graphopt.graph.edits import Editor
from graphopt.passes.base import RulePass

STATES = {"LSTM": (5, 6), "GRU": (5,), "RNN": (5,)}
"""The inputs that are zeros where they are left out."""
MOVES = ("Cast", "Concat", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Tile",
         "Transpose", "Unsqueeze")  # fmt: skip
"""Operators that give zeros from zeros: from all inputs for Concat, else from the first."""
MAX_DEPTH = 16
MAX_ELEMENTS = 1 << 20


class OmitZeroStates(RulePass):
    """Leave out the initial state of a recurrent layer where it is zero anyway.

    LSTM, GRU and RNN begin with zeros where no state is given:

        LSTM(x, W, R, B, lengths, 0, 0) = LSTM(x, W, R, B, lengths)

    Keras and PyTorch write the zeros out for a batch of any size: Shape, Slice, Concat, Cast, Expand and Unsqueeze at
    every run, which is dead afterwards and goes. What is followed: constants, `ConstantOfShape`, and operators that
    only move elements.

    **Needs:** nothing. **Guarantees:** the same numbers, bit for bit.

    **Left alone, with the reason:** nothing is reported; most states are inputs.

    **When not to use it:** never.
    """

    name: ClassVar[str] = "omit-zero-states"
    family: ClassVar[str] = "clean"
    bitwise: ClassVar[bool] = True
    anchors: ClassVar[tuple[str, ...]] = tuple(sorted(STATES))

    def rewrite(self, node: ir.Node, edit: Editor) -> bool:
        """See the class."""
        places = [i for i in STATES[node.op_type] if i < len(node.inputs) and _is_zero(node.inputs[i])]
        for index in places:
            edit.set_input(node, index, None)
        return bool(places) and self.applied(
            node, f"{len(places)} initial state{'s' * (len(places) > 1)} of zeros left out"
        )


def _is_zero(value: ir.Value | None, depth: int = 0) -> bool:
    """Whether every element of `value` is 0 in every run."""
    if value is None or depth > MAX_DEPTH:
        return False
    if constant_tensor(value) is not None:
        array = constant_array(value, MAX_ELEMENTS)
        return array is not None and array.dtype.kind in "fiub" and not np.any(array)
    if (node := producer(value, "ConstantOfShape")) is not None:
        fill = node.attributes.get("value")
        return fill is None or (not fill.is_ref() and not np.any(fill.as_tensor().numpy()))
    node = producer(value, *MOVES)
    if node is None:
        return False
    sources = dict.fromkeys(node.inputs if node.op_type == "Concat" else node.inputs[:1])
    return all(_is_zero(source, depth + 1) for source in sources)
