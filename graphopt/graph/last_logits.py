"""Logits of the last position only: what generation reads of a prompt, without the head's work on all other positions.

The head of a language model is a product of every position with the whole vocabulary. A prompt of 512 tokens needs one
row of it, so the hidden state is cut to its last position before the head:

    head(norm(x))[:, -1:]  =  head(norm(x[:, -1:]))

which is exact, because everything between acts on each position by itself. What stands between is found by dataflow:
from the logits upwards, through operators that work row by row, past the head (the first product with something that
doesn't depend on the position) as far as one value [batch, sequence, features] is all that comes in; that is the end
of the residual stream, before the final norm.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
import onnx_ir as ir

from graphopt.errors import ModelError
from graphopt.graph.constants import constant_array, constant_tensor
from graphopt.graph.edits import Editor, opset
from graphopt.graph.kv_interface import kv_interface

Form = Literal["rows", "flat"]
"""How a value holds the positions: [batch, sequence, features], or [batch · sequence, features]."""

_END = np.iinfo(np.int64).max
_UNARY = frozenset({
    "Abs", "Cast", "Ceil", "Celu", "Clip", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity",
    "IsNaN", "LeakyRelu", "Log", "Mish", "Neg", "Not", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign",
    "Softplus", "Softsign", "Sqrt", "Swish", "Tanh", "com.microsoft::FastGelu", "com.microsoft::Gelu",
    "com.microsoft::QuickGelu",
})  # fmt: skip
_BROADCAST = frozenset({
    "Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min", "Mod", "Mul", "Or",
    "PRelu", "Pow", "Sub", "Sum", "Where", "Xor",
})  # fmt: skip
_NORMS = frozenset({"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "Softmax", "LogSoftmax"})
_REDUCTIONS = frozenset({"ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "ReduceSumSquare"})
_PRODUCTS = frozenset({"MatMul", "Gemm", "com.microsoft::FusedMatMul", "com.microsoft::MatMulNBits"})


@dataclasses.dataclass(frozen=True)
class _Step:
    """What a node reads position by position, the form of each, and whether it is a product with a weight."""

    reads: dict[ir.Value, Form]
    product: bool = False


@dataclasses.dataclass(frozen=True)
class _Reached:
    """A value on the way up: its form, and the products between it and the logits (the most on any way)."""

    form: Form
    products: int


def last_logits(model: ir.Model) -> None:
    """Let a decoder give the logits of the last position alone, [batch, 1, vocabulary], whoever exported it.

    Nothing is changed where it does so already.

    Raises:
        ModelError: Its logits or its head aren't found; the message says what stands in the way.
    """
    logits = _logits(model)
    if opset(model) < 10:
        raise ModelError(f"logits of the last position alone need opset 10 or newer, and this model has {opset(model)}")
    found = _search(logits)
    if found is None:
        return
    cut, region = found
    editor = Editor(model)
    editor.at(next(node for node in model.graph if node in region))
    places = {name: np.array([number], dtype=np.int64) for name, number in (("start", -1), ("end", _END), ("axis", 1))}
    last = editor.op("Slice", [cut, *(editor.constant(array, name) for name, array in places.items())])
    last.type, last.shape = cut.type, ir.Shape([None if cut.shape is None else cut.shape[0], 1, _features(cut)])
    for node, index in list(cut.uses()):
        if node in region:
            editor.set_input(node, index, last)
    for node, form in region.items():
        _shorten(editor, node, form)


def _logits(model: ir.Model) -> ir.Value:
    interface = kv_interface(model)
    name = "logits" if interface is None else interface.logits
    for value in model.graph.outputs:
        if value.name == name:
            if value.shape is not None and len(value.shape) != 3:
                raise ModelError(
                    f"the logits {name!r} have {len(value.shape)} dimensions, only [batch, sequence, vocabulary] has "
                    "a last position"
                )
            if readers := [node for node, _ in value.uses()]:
                raise ModelError(
                    f"the logits {name!r} are read by {readers[0].op_type} ({readers[0].name!r}) too, which would get "
                    "the last position only"
                )
            return value
    raise ModelError("no output of the model is recognised as its logits, so there is none to cut to the last position")


def _search(logits: ir.Value) -> tuple[ir.Value, dict[ir.Node, Form]] | None:
    """The value to cut, and the nodes from it to the logits with the form of what they make; None where the logits are
    of one position already.

    Raises:
        ModelError: The head isn't found.
    """
    region: dict[ir.Node, Form] = {}
    frontier = {logits: _Reached("rows", 0)}
    best: tuple[ir.Value, dict[ir.Node, Form]] | None = None
    depth = 0
    refused = "nothing computes it"
    while True:
        for value, reached in frontier.items():
            node = value.producer()
            if node is None or (value is not logits and not _read_by(value, region)):
                continue
            if _cuts_to_last(node):
                return None
            step = _step(node, value, reached.form)
            if isinstance(step, str):
                refused = step
            elif all(read not in frontier or frontier[read].form == form for read, form in step.reads.items()):
                break
        else:
            break
        del frontier[value]
        region[node] = reached.form
        for read, form in step.reads.items():
            products = max(reached.products + step.product, frontier[read].products if read in frontier else 0)
            frontier[read] = _Reached(form, products)
        (only, at), *others = frontier.items()
        if not others and at.form == "rows" and at.products:
            # Beyond the next product lies the last layer; the stream stays whole up to its end.
            if best is not None and at.products > depth:
                break
            best, depth = (only, dict(region)), at.products
    if best is None:
        raise ModelError(f"the head that makes the logits {logits.name!r} isn't found: {refused}")
    return best


def _read_by(value: ir.Value, region: dict[ir.Node, Form]) -> bool:
    """Whether the nodes of the region are all that read a value."""
    return not value.is_graph_output() and all(node in region for node, _ in value.uses())


def _step(node: ir.Node, value: ir.Value, form: Form) -> _Step | str:
    """What a node reads at each position to make `value` there; a clause that says why not where it mixes positions."""
    name = _qualified(node)
    where = f"{node.op_type} ({node.name!r}) before it"
    if len(node.outputs) > 1 and any(out.uses() or out.is_graph_output() for out in node.outputs if out is not value):
        return f"{where} has other outputs that are read"
    if any(attribute.is_ref() for attribute in node.attributes.values()):
        return f"{where} has attributes of a function"
    main = node.inputs[0] if node.inputs else None
    if main is None:
        return f"{where} isn't computed from the hidden state"
    rest = node.inputs[1:]
    if name in _PRODUCTS:
        return _product(node, main, form) or f"{where} isn't the product of the hidden state with a weight"
    if name in _BROADCAST:
        operands = [operand for operand in node.inputs if operand is not None]
        moving = {operand: form for operand in operands if not _same_everywhere(operand)}
        return _Step(moving) if moving else f"{where} is constant"
    if name in _UNARY and all(v is None or _same_everywhere(v) for v in rest):
        return _Step({main: form})
    if name in _NORMS and _last_axis(node, form) and all(v is None or _same_everywhere(v) for v in rest):
        return _Step({main: form})
    if name in _REDUCTIONS and _keeps_rows(node, form):
        return _Step({main: form})
    if name == "Slice" and _along_features(node, form):
        return _Step({main: form})
    if name == "Concat" and _last_axis(node, form):
        return _Step({operand: form for operand in node.inputs if operand is not None})
    if name == "Reshape":
        other = _reshaped(node, main, form)
        return _Step({main: other}) if other is not None else f"{where} may mix the positions"
    return f"{where} isn't known to work on each position by itself"


def _product(node: ir.Node, main: ir.Value, form: Form) -> _Step | None:
    """A product from the right, with something that every position shares."""
    name = _qualified(node)
    if any(_given(node, attribute) for attribute in ("transA", "transBatchA", "transBatchB")):
        return None
    if name == "Gemm":
        summand = node.inputs[2] if len(node.inputs) > 2 else None
        if form != "flat" or (summand is not None and not _same_everywhere(summand)):
            return None
    if name == "com.microsoft::MatMulNBits":
        return _Step({main: form}, product=True)
    weight = node.inputs[1]
    if weight is None or _origin(weight) is None:
        return None
    return _Step({main: form}, product=True)


def _origin(value: ir.Value) -> ir.Value | None:
    """The constant that a value is made of by operators that take nothing else that changes."""
    for _ in range(8):
        if constant_tensor(value) is not None:
            return value
        node = value.producer()
        if node is None or node.op_type not in ("Transpose", "Cast", "Identity", "DequantizeLinear", "Reshape"):
            return None
        if (
            not node.inputs
            or node.inputs[0] is None
            or not all(v is None or constant_tensor(v) for v in node.inputs[1:])
        ):
            return None
        value = node.inputs[0]
    return None


def _same_everywhere(value: ir.Value) -> bool:
    """Whether a value is a constant that is added to, or multiplied with, every position alike."""
    for _ in range(4):
        tensor = constant_tensor(value)
        if tensor is not None:
            sizes = tensor.shape.numpy()
            return len(sizes) < 2 or sizes[-2] == 1
        node = value.producer()
        if node is None or node.op_type not in ("Cast", "Identity") or node.inputs[0] is None:
            return False
        value = node.inputs[0]
    return False


def _last_axis(node: ir.Node, form: Form) -> bool:
    attribute = node.attributes.get("axis")
    if attribute is None:  # Softmax of before opset 13 runs over the second axis and all after it
        assert node.graph is not None
        return "Softmax" not in node.op_type or node.graph.opset_imports.get("", 0) >= 13
    return attribute.as_int() in (-1, _rank(form) - 1)


def _keeps_rows(node: ir.Node, form: Form) -> bool:
    """Whether a reduction runs over the features alone and keeps their axis."""
    keeps = node.attributes.get("keepdims")
    if keeps is not None and keeps.as_int() == 0:
        return False
    attribute = node.attributes.get("axes")
    if attribute is not None:
        axes = list(attribute.as_ints())
    else:
        array = constant_array(node.inputs[1], 8) if len(node.inputs) > 1 else None
        axes = [] if array is None else [int(axis) for axis in array.reshape(-1)]
    return axes in ([-1], [_rank(form) - 1])


def _along_features(node: ir.Node, form: Form) -> bool:
    """Whether a Slice takes a part of the features, or all positions."""
    if len(node.inputs) < 4:
        return False
    arrays = [None if v is None else constant_array(v, 8) for v in node.inputs[1:5]]
    if any(array is None for array in arrays[:3]) or (len(node.inputs) > 4 and arrays[3] is None):
        return False
    starts, ends, axes = ([int(n) for n in array.reshape(-1)] for array in arrays[:3] if array is not None)
    steps = [1] * len(axes) if len(arrays) < 4 or arrays[3] is None else [int(n) for n in arrays[3].reshape(-1)]
    return all(
        axis in (-1, _rank(form) - 1) or (start == 0 and end >= np.iinfo(np.int32).max and step == 1)
        for start, end, axis, step in zip(starts, ends, axes, steps, strict=True)
    )


def _cuts_to_last(node: ir.Node) -> bool:
    """Whether a node takes the last position of [batch, sequence, features]."""
    if _qualified(node) != "Slice" or len(node.inputs) < 4:
        return False
    start, end, axis = (constant_array(v, 1) for v in node.inputs[1:4])
    if start is None or end is None or axis is None:
        return False
    return [int(n.reshape(-1)[0]) for n in (start, axis)] in ([-1, 1], [-1, -2]) and int(end.reshape(-1)[0]) > 1 << 30


def _reshaped(node: ir.Node, main: ir.Value, form: Form) -> Form | None:
    """The form of what a Reshape reads, where it only joins batch and sequence or takes them apart: the features stay
    the last axis, and the order of the rows can't change."""
    wanted = _last_size(node.inputs[1])
    if wanted is None or wanted != _features(main):
        return None
    rank = None if main.shape is None else len(main.shape)
    if form == "flat":
        return "rows" if rank in (None, 3) else None
    return "flat" if rank in (None, 2) else None


def _features(value: ir.Value) -> int | None:
    """The size of the last axis: as declared, or that of the weight which the producer applies."""
    node, sizes, axis = value.producer(), value.shape, -1
    weight = node.inputs[1] if node is not None and len(node.inputs) > 1 else None
    if sizes is None and node is not None and weight is not None and node.op_type in (*_NORMS, "MatMul", "Gemm"):
        sizes, axis = weight.shape, 0 if _given(node, "transB") else -1
    if sizes is None or not len(sizes):
        return None
    size = sizes[axis]
    return size if isinstance(size, int) else None


def _last_size(shape: ir.Value | None) -> int | None:
    """The last number of the shape that a Reshape is given, where it is a plain size."""
    node = None if shape is None else shape.producer()
    if node is not None and node.op_type == "Concat" and node.inputs:
        shape = node.inputs[-1]
    array = constant_array(shape, 8)
    return int(array.reshape(-1)[-1]) if array is not None and array.size and int(array.reshape(-1)[-1]) > 0 else None


def _shorten(editor: Editor, node: ir.Node, form: Form) -> None:
    """Let a node of the region say that it makes one position: its declared shape, and the one that a Reshape gives."""
    if node.op_type == "Reshape":
        editor.at(node)
        sizes = np.array([-1, _last_size(node.inputs[1])] if form == "flat" else [-1, 1, _last_size(node.inputs[1])])
        editor.set_input(node, 1, editor.constant(sizes.astype(np.int64), "shape"))
    value = node.outputs[0]
    value.shape = _one_position(value.shape)


def _one_position(shape: ir.Shape | None) -> ir.Shape | None:
    if shape is None or len(shape) != 3:
        return None
    return ir.Shape([shape[0], 1, shape[2]])


def _rank(form: Form) -> int:
    return 3 if form == "rows" else 2


def _given(node: ir.Node, attribute: str) -> bool:
    found = node.attributes.get(attribute)
    return found is not None and bool(found.as_int())


def _qualified(node: ir.Node) -> str:
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"
