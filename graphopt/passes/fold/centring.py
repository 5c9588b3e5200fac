"""A linear map of the features, moved out of a feature space and into the constants of its writers.

Re-centring (v − mean v) is such a map: where every writer of a space gives centred vectors, so is every value of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.algebra import attribute_int, is_op
from graphopt.analysis.feature_space import FeatureSpace, Writer
from graphopt.graph.computed import identity, weight
from graphopt.graph.constants import constant_tensor, is_constant
from graphopt.graph.edits import Editor
from graphopt.passes.fold.layers import FLOATS, chunks

COPIED_BYTES = 1 << 14
"""A constant of at most so many bytes (a bias) that something else reads too is copied."""


@dataclasses.dataclass(frozen=True)
class Use:
    """A constant as one node reads it, and the axis of it (from the end) that runs over the features."""

    node: ir.Node
    index: int
    axis: int


@dataclasses.dataclass
class Plan:
    """How a space is re-centred.

    Attributes:
        space: The space.
        constants: The weights, biases and tables to be centred, each with the nodes that read it.
        at_run_time: Writers whose vectors are centred when the model runs, because no constant makes them.
    """

    space: FeatureSpace
    constants: dict[ir.Value, list[Use]]
    at_run_time: list[Writer]


def plan_centring(space: FeatureSpace) -> Plan | str:
    """How the writers of `space` can be made to write centred vectors, or why one can't."""
    plan = Plan(space, {}, [])
    for writer in space.writers:
        uses = constants_of(writer)
        if isinstance(uses, str):
            return uses
        if uses is None:
            plan.at_run_time.append(writer)
        for use in uses or ():
            value = use.node.inputs[use.index]
            assert value is not None
            plan.constants.setdefault(value, []).append(use)
    for value, shared in list(plan.constants.items()):
        known = {(use.node, use.index) for use in shared}
        tied = [user for user, index in value.uses() if (user, index) not in known] or value.is_graph_output()
        if len({use.axis for use in shared}) == 1:
            tensor = constant_tensor(value)
            assert tensor is not None
            if not tied or tensor.nbytes <= COPIED_BYTES:
                continue
        # Something else reads the same numbers, and a second copy of a weight makes the model larger.
        del plan.constants[value]
        writers = [w for w in space.writers if _reads_constant(w, value)]
        if any(w.kind == "constant" and not is_op(w.node, "Gather") for w in writers if w.node is not None):
            reader = tied[0] if isinstance(tied, list) else None
            return f"{value.name!r} is shared with {described(reader)}"
        plan.at_run_time.extend(w for w in writers if w not in plan.at_run_time)
    return plan


Rewritten = Callable[[ir.TensorProtocol, int], ir.TensorProtocol]
"""Makes a constant's new tensor from the old one and its feature axis, counted from the end."""


def centre(plan: Plan, edit: Editor, rewritten: Rewritten | None = None) -> None:
    """Carry out `plan`; `rewritten` makes the new constants (by default `centred`)."""
    for value, uses in plan.constants.items():
        tensor = constant_tensor(value)
        assert tensor is not None
        set_constant(value, [(use.node, use.index) for use in uses], (rewritten or centred)(tensor, uses[0].axis), edit)
    for writer in plan.at_run_time:
        value, axis = (writer.value, writer.axis)
        if writer.kind == "constant":
            assert writer.node is not None
            value = writer.node.outputs[0]
            axis = plan.space.axes[value]
        _centre_at_run_time(value, axis, edit)


def set_constant(
    value: ir.Value,
    readers: list[tuple[ir.Node, int]],
    tensor: ir.TensorProtocol,
    edit: Editor,
    label: str = "centred",
) -> None:
    """Let `readers` read `tensor` from now on, in place of the constant `value`; `label` is for the name of a copy."""
    if value.is_initializer() and len(readers) == len(value.uses()) and not value.is_graph_output():
        value.const_value, value.shape = tensor, ir.Shape(tensor.shape.numpy())
        return
    edit.at(readers[0][0])
    new = edit.constant(tensor, label)
    for node, index in readers:
        edit.set_input(node, index, new)


def centred(tensor: ir.TensorProtocol, axis: int) -> ir.TensorProtocol:
    """`tensor` minus its mean over `axis` (from the end), in float64, rounded once; a large one when it is saved.

    A tensor that is broadcast over the features adds the same to each of them: centred, it is 0.
    """

    def compute() -> ir.TensorProtocol:
        array = tensor.numpy()
        if array.ndim < -axis or array.shape[axis] == 1:
            return ir.tensor(np.zeros_like(array), dtype=tensor.dtype, name=tensor.name)
        result = np.empty(array.shape, dtype=array.dtype)
        overall: npt.NDArray[Any] | None = None
        if -axis == array.ndim:  # over the rows themselves
            total = sum(rows.astype(np.float64).sum(axis=0, keepdims=True) for _, rows in chunks(tensor))
            overall = np.asarray(total) / len(array)
        for start, rows in chunks(tensor):
            part = rows.astype(np.float64)
            mean = part.mean(axis=axis, keepdims=True) if overall is None else overall
            result[start : start + len(rows)] = part - mean
        return ir.tensor(result, dtype=tensor.dtype, name=tensor.name)

    return weight(compute, tensor.dtype, tensor.shape.numpy(), tensor.name, ("centred", axis, identity(tensor)))


def constants_of(writer: Writer) -> list[Use] | str | None:
    """The constants that make the vectors of `writer`; None where none do, a reason where they can't be centred."""
    node = writer.node
    if node is None or writer.kind in ("input", "norm", "other"):
        return None
    if writer.kind == "constant":
        uses = [Use(node, writer.index, writer.axis)]
    elif writer.kind == "conv":
        if attribute_int(node, "group", 1) != 1:
            return f"Conv {node.name!r} is grouped: the mean over its output channels is no grouped convolution"
        uses = [Use(node, 1, -len(node.inputs[1].shape or ()))] if node.inputs[1] is not None else []
        uses += [Use(node, 2, -1)] if len(node.inputs) > 2 and node.inputs[2] is not None else []
    else:
        transposed = is_op(node, "Gemm") and attribute_int(node, "transB", 0) == 1
        uses = [Use(node, 1, -2 if transposed else -1)]
        uses += [Use(node, 2, -1)] if len(node.inputs) > 2 and node.inputs[2] is not None else []
    for use in uses:
        value = node.inputs[use.index]
        tensor = constant_tensor(value)
        if tensor is None or value is None or not is_constant(value):
            return None
        if tensor.dtype not in FLOATS:
            return f"the constant {value.name!r} of {node.op_type} {node.name!r} is {tensor.dtype.name.lower()}"
    return uses


def _reads_constant(writer: Writer, value: ir.Value) -> bool:
    return writer.value is value or (
        writer.node is not None and writer.kind != "constant" and value in writer.node.inputs
    )


def _centre_at_run_time(value: ir.Value, axis: int, edit: Editor) -> None:
    node = value.producer()
    places = [(user, index) for user, index in value.uses()]
    readers = {user for user, _ in places}
    graph = value.graph if node is None else node.graph
    assert graph is not None
    edit.at(next(n for n in graph if n in readers))
    axes = edit.constant(np.array([axis], dtype=np.int64), "axes")
    mean = edit.op("ReduceMean", [value, axes], {"keepdims": 1})
    new = edit.op("Sub", [value, mean], like=value)
    for user, index in places:
        user.replace_input_with(index, new)


def described(node: ir.Node | None) -> str:
    """A reader in words; None stands for a graph output."""
    return "an output of the graph" if node is None else f"{node.op_type} {node.name!r}"
