"""Models whose products round what they read to 8 bits, without that rounding, so that they can be compared closely.

A number beside the boundary between two steps goes to the one or the other with the last digit of what was computed
before, and layer by layer such differences grow: with a cache of random numbers, two exact forms of one decoder are
apart by half of an output's scale. What a rewrite does is told where nothing rounds, in both models.

`MatMulNBits` and `CodebookMatMul` have an attribute for that. graphopt's other products always round, to 16 bits at
best, of which a deep decoder makes 1e-2 of the scale; they are spelled out around `MatMulNBits`, on the same weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphopt.analysis.algebra import attribute_int
from graphopt.graph.constants import is_nothing
from graphopt.graph.edits import Editor, nodes
from graphopt.runtime_ops.operator import DOMAIN

CONTRIB = "com.microsoft"
_SPELLED_OUT = ("QuantizedLinear", "QuantizedMlp")
_ROUNDING = {"MatMulNBits": ("accuracy_level", 1), "CodebookMatMul": ("activation_block", 0)}
"""Attributes that tell how x is rounded, and their values for not at all."""


def rounds(model: ir.Model) -> bool:
    """Whether a product of `model` rounds what it reads to 8 bits."""
    return any(_rounds(node) for node in nodes(model))


def unrounded(model: ir.Model) -> ir.Model:
    """A copy of `model`, with the same weights, whose products don't round what they read."""
    copy = model.clone()
    edit = Editor(copy)
    for node in list(nodes(copy)):
        if node.domain == DOMAIN and node.op_type in _SPELLED_OUT:
            edit.at(node)
            spelled = _linear if node.op_type == "QuantizedLinear" else _mlp
            edit.replace(node.outputs[0], spelled(node, edit))
        elif _rounds(node):
            name, value = _ROUNDING[node.op_type]
            node.attributes[name] = ir.AttrInt64(name, value)
    copy.graph.opset_imports.setdefault(CONTRIB, 1)
    return copy


def _rounds(node: ir.Node) -> bool:
    if node.domain == CONTRIB and node.op_type == "MatMulNBits":
        return attribute_int(node, "accuracy_level", 0) == 4
    if node.domain != DOMAIN:
        return False
    if node.op_type == "CodebookMatMul":
        return bool(attribute_int(node, "activation_block", 0))
    return node.op_type in _SPELLED_OUT and attribute_int(node, "activation_bits", 8) == 8


def _linear(node: ir.Node, edit: Editor) -> ir.Value:
    """What `QuantizedLinear` computes."""
    x, norm, *weight, bias, residual = node.inputs
    y = _product(node, _normalised(node, x, norm, edit), weight, edit)
    for term in (bias, residual):
        if not is_nothing(term):
            y = edit.op("Add", [y, _wide(term, edit)])
    return edit.op("CastLike", [y, x], like=node.outputs[0])


def _mlp(node: ir.Node, edit: Editor) -> ir.Value:
    """What `QuantizedMlp` computes."""
    x, norm = node.inputs[:2]
    both = _product(node, _normalised(node, x, norm, edit), node.inputs[2:6], edit)
    half = _sizes(node.inputs[2])[0] // 2
    gate, up = (
        edit.op("Slice", [both, *(edit.constant(np.array([n], np.int64)) for n in (first, first + half, -1))])
        for first in (0, half)
    )
    hidden = edit.op("Mul", [_activated(gate, attribute_int(node, "activation", 0), edit), up])
    y = edit.op("Add", [_wide(x, edit), _product(node, hidden, node.inputs[6:10], edit)])
    return edit.op("CastLike", [y, x], like=node.outputs[0])


def _product(node: ir.Node, x: ir.Value, weight: Sequence[ir.Value | None], edit: Editor) -> ir.Value:
    """x times the transpose of a weight given as packed numbers, scales, zero points and minimums."""
    packed, scales, zeros, minimums = weight
    bits, block = attribute_int(node, "bits", 4) or 4, attribute_int(node, "block_size", 32) or 32
    rows, blocks = _sizes(packed)[:2]
    given: list[ir.Value | None] = [x, packed, _wide(scales, edit)]
    if not is_nothing(minimums):  # the numbers as they are, and minimums times the sums of x's blocks
        given.append(edit.constant(np.zeros((rows, -(-blocks * bits // 8)), np.uint8)))
    elif not is_nothing(zeros):
        given.append(zeros)
    attributes = {"K": blocks * block, "N": rows, "bits": bits, "block_size": block, "accuracy_level": 1}
    y = edit.op("MatMulNBits", given, attributes, domain=CONTRIB)
    if is_nothing(minimums):
        return y
    into_blocks = edit.op(
        "Concat",
        [
            edit.op("Slice", [edit.op("Shape", [x]), *(edit.constant(np.array([n], np.int64)) for n in (0, -1))]),
            edit.constant(np.array([blocks, block], np.int64)),
        ],
        {"axis": 0},
    )
    sums = edit.op(
        "ReduceSum",
        [edit.op("Reshape", [x, into_blocks]), edit.constant(np.array([-1], np.int64))],
        {"keepdims": 0},
    )
    shape = edit.constant(np.array([rows, blocks], np.int64))
    by_row = edit.op("Reshape", [_wide(minimums, edit), shape])
    return edit.op("Add", [y, edit.op("MatMul", [sums, edit.op("Transpose", [by_row], {"perm": [1, 0]})])])


def _normalised(node: ir.Node, x: ir.Value | None, norm: ir.Value | None, edit: Editor) -> ir.Value:
    """x over its root mean square times the gains; as it is where there are none."""
    wide = _wide(x, edit)
    if is_nothing(norm):
        return wide
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    axes = edit.constant(np.array([-1], np.int64))
    squares = edit.op("ReduceMean", [edit.op("Mul", [wide, wide]), axes], {"keepdims": 1})
    root = edit.op("Sqrt", [edit.op("Add", [squares, edit.constant(np.array(epsilon, np.float32))])])
    return edit.op("Mul", [edit.op("Div", [wide, root]), norm])


def _activated(x: ir.Value, activation: int | None, edit: Editor) -> ir.Value:
    """The activation by its number (`graphopt.runtime_ops.quantized_mlp.ACTIVATIONS`)."""
    if activation == 0:
        return edit.op("Mul", [x, edit.op("Sigmoid", [x])])
    if activation == 3:
        return edit.op("Relu", [x])

    def number(value: float) -> ir.Value:
        return edit.constant(np.array(value, np.float32))

    if activation == 1:
        inner = edit.op("Erf", [edit.op("Mul", [x, number(2**-0.5)])])
    else:
        cube = edit.op("Mul", [edit.op("Mul", [x, x]), edit.op("Mul", [x, number(0.044715)])])
        inner = edit.op("Tanh", [edit.op("Mul", [edit.op("Add", [x, cube]), number((2 / np.pi) ** 0.5)])])
    return edit.op("Mul", [edit.op("Mul", [x, number(0.5)]), edit.op("Add", [inner, number(1.0)])])


def _wide(value: ir.Value | None, edit: Editor) -> ir.Value:
    """A value as float32."""
    assert value is not None
    return value if value.dtype == ir.DataType.FLOAT else edit.op("Cast", [value], {"to": ir.DataType.FLOAT})


def _sizes(weight: ir.Value | None) -> tuple[int, ...]:
    """The sizes of a weight."""
    assert weight is not None
    assert weight.shape is not None
    return weight.shape.numpy()
