"""Formulas over values as data: built, asked which opset they need, and only then written into a graph.

A rule that finds an obstacle half-way must not have touched the graph, so rules build an `Expression`; the pass that
runs them writes it where everything held.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.graph.edits import Editor

OPSETS: Mapping[str, int] = {
    "Attention": 23, "Cast": 13, "CastLike": 15, "Celu": 12, "Clip": 12, "Expand": 8, "GatherND": 12, "Gelu": 20,
    "GroupNormalization": 21, "Hardmax": 13, "LayerNormalization": 17, "LogSoftmax": 13, "Pad": 11, "Range": 11,
    "ReduceSum": 13, "RMSNormalization": 23, "RotaryEmbedding": 23, "Shape": 15, "Slice": 13, "Softmax": 13,
    "Split": 18, "Squeeze": 13, "Trilu": 14, "Unsqueeze": 13, "Where": 9,
}  # fmt: skip
"""The opset from which an operator has the form that `op` writes; 7 where it isn't listed."""


@dataclasses.dataclass(frozen=True, eq=False)
class Expression:
    """One operator of the default domain applied to values, arrays and other expressions."""

    op_type: str
    inputs: tuple[Operand | None, ...]
    attributes: Mapping[str, Any]
    outputs: int = 1

    def __getitem__(self, index: int) -> Output:
        """Another output than the first."""
        return Output(self, index)


@dataclasses.dataclass(frozen=True, eq=False)
class Output:
    """Output `index` of an expression."""

    of: Expression
    index: int


Operand: TypeAlias = "ir.Value | Expression | Output | npt.NDArray[Any] | ir.TensorProtocol"


def op(op_type: str, *inputs: Operand | None, outputs: int = 1, **attributes: Any) -> Expression:
    """An operator of the default domain; attributes that are None are left out."""
    while inputs and inputs[-1] is None:
        inputs = inputs[:-1]
    return Expression(op_type, inputs, {k: v for k, v in attributes.items() if v is not None}, outputs)


def added(first: Operand, *others: Operand | None) -> Operand:
    """The sum from left to right; what is None is left out."""
    total = first
    for other in others:
        total = total if other is None else op("Add", total, other)
    return total


def ints(*numbers: int) -> npt.NDArray[np.int64]:
    """A vector of int64: axes, sizes, starts."""
    return np.array(numbers, dtype=np.int64)


def needed_opset(operands: Iterable[Operand]) -> int:
    """The lowest opset that has all operators of these formulas."""
    return max((OPSETS.get(expression.op_type, 7) for expression in expressions(operands)), default=7)


def write(
    operands: Mapping[ir.Value, Operand], edit: Editor, made: dict[Expression, ir.Value] | None = None
) -> dict[ir.Value, ir.Value]:
    """Write formulas before the site, each shared part once; returns for each key the value that may replace it.

    Args:
        operands: The formulas.
        edit: The editor, at the site.
        made: What was written for other sites, which isn't written again; what is written now is added.
    """
    results = {operand: old for old, operand in operands.items() if isinstance(operand, Expression)}
    made = {} if made is None else made
    for expression in expressions(operands.values()):
        if expression in made and _stands(made[expression]):
            continue
        inputs = [None if item is None else _value(item, made, edit) for item in expression.inputs]
        made[expression] = edit.op(
            expression.op_type,
            inputs,
            expression.attributes,
            outputs=expression.outputs,
            like=results.get(expression),
        )
    return {old: _value(operand, made, edit) for old, operand in operands.items()}


def _stands(value: ir.Value) -> bool:
    node = value.producer()
    return node is not None and node.graph is not None


def _value(operand: Operand, made: Mapping[Expression, ir.Value], edit: Editor) -> ir.Value:
    if isinstance(operand, ir.Value):
        return operand
    if isinstance(operand, Expression):
        return made[operand]
    if isinstance(operand, Output):
        node = made[operand.of].producer()
        assert node is not None
        return node.outputs[operand.index]
    return edit.constant(operand)


def expressions(operands: Iterable[Operand]) -> list[Expression]:
    """The expressions in these formulas, each once, what is read before what reads it."""
    found: dict[Expression, None] = {}

    def visit(operand: Operand | None) -> None:
        expression = operand.of if isinstance(operand, Output) else operand
        if isinstance(expression, Expression) and expression not in found:
            for item in expression.inputs:
                visit(item)
            found[expression] = None

    for operand in operands:
        visit(operand)
    return list(found)
