"""Which constants of a model turn with its residual stream, and where a rotation has to be computed when it runs.

With x' = x Q in place of x, whatever writes x gets its output axis turned, and whatever reads x its input axis. An
RMSNormalization whose gain is one number commutes with Q, so that what it gives out is turned too:

    n(x Q) = n(x) Q        since |x Q| = |x|
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import onnx_ir as ir

from graphopt.analysis.algebra import attribute_int, is_op, producer
from graphopt.analysis.feature_space import FeatureSpace, Reader, feature_space
from graphopt.analysis.shapes import ShapeFacts
from graphopt.graph.constants import constant_array, constant_tensor, is_constant
from graphopt.passes.fold.centring import COPIED_BYTES, Use, constants_of, described
from graphopt.passes.fold.layers import FLOATS


@dataclasses.dataclass
class _Part:
    """A writer, a reader, or a norm with what reads it.

    Attributes:
        label: For reports.
        value: What is rotated at run time, where constants can't be.
        back: Whether it is rotated back (a reader), else forth (a writer).
        reader: The node and the index of its input; None for a writer.
        uses: Its constants.
        why: Why it is rotated at run time; None: it isn't.
        possible: Whether it can be rotated at run time.
        norm: Whether it is a norm that reads the stream.
    """

    label: str
    value: ir.Value
    axis: int
    back: bool
    reader: tuple[ir.Node, int] | None
    uses: list[Use]
    why: str | None = None
    possible: bool = True
    norm: bool = False


@dataclasses.dataclass
class RotationPlan:
    """How a stream is rotated.

    Attributes:
        space: The stream.
        constants: The constants that turn, each with the nodes that read it and the axis (from the end).
        forth: Values that are multiplied by Q when the model runs, for all who read them.
        back: Readers whose input is multiplied by Qᵀ when the model runs: node and index.
        why: For each of both why, for reports.
    """

    space: FeatureSpace
    constants: dict[ir.Value, list[Use]]
    forth: list[ir.Value]
    back: list[tuple[ir.Node, int]]
    why: list[str]


def plan_rotation(space: FeatureSpace, facts: ShapeFacts, online: int) -> RotationPlan | str:
    """How a stream can be rotated with at most `online` rotations at run time, or why it can't."""
    if space.conflict is not None:
        return space.conflict
    parts: list[_Part] = []
    for writer in space.writers:
        uses = constants_of(writer)
        table = writer.kind == "constant" and writer.node is not None and is_op(writer.node, "Gather")
        value = writer.node.outputs[0] if table and writer.node is not None else writer.value
        label = described(writer.value.producer() or writer.node)
        part = _Part(label, value, space.axes.get(value, writer.axis), False, None, [])
        part.possible = not value.is_graph_output() and (table or writer.kind != "constant")
        if isinstance(uses, list):
            part.uses = uses
        else:
            part.why = uses or "no constant makes it"
        parts.append(part)
    for reader in space.readers:
        read = _reader(reader, facts)
        if read is None:
            return f"{described(reader.node)} reads {reader.value.name!r}"
        parts.append(read)
    _settle(parts)
    waiting = [part for part in parts if part.why is not None]
    for part in waiting:
        if not part.possible or part.axis != -1:
            return f"{part.label} can't be rotated: {part.why}"
    if len(waiting) > online:
        return (
            f"{len(waiting)} rotations would have to be computed at run time ({online} are allowed): "
            f"for example {waiting[0].label}: {waiting[0].why}"
        )
    if len(waiting) > (turning := sum(part.norm and part.why is None for part in parts)):
        return f"{len(waiting)} rotations would have to be computed at run time for {turning} norms that turn"
    constants: dict[ir.Value, list[Use]] = {}
    for part in parts:
        for use in part.uses:
            constant = use.node.inputs[use.index]
            assert constant is not None
            constants.setdefault(constant, []).append(use)
    forth = list(dict.fromkeys(part.value for part in waiting if not part.back))
    back = [part.reader for part in waiting if part.reader is not None]
    return RotationPlan(space, constants, forth, back, [f"{part.label}: {part.why}" for part in waiting])


def _reader(reader: Reader, facts: ShapeFacts) -> _Part | None:
    """A reader as a part, None where it can't even be rotated back."""
    node = reader.node
    if node is None or reader.kind == "subgraph":
        return None
    part = _Part(described(node), reader.value, reader.axis, True, (node, reader.index), [], norm=reader.kind == "norm")
    found = _of_norm(node, facts) if reader.kind == "norm" else _weight(node, reader)
    if isinstance(found, str):
        part.why = found
    else:
        part.uses = found
    return part


def _of_norm(norm: ir.Node, facts: ShapeFacts) -> list[Use] | str:
    """The constants of what reads a norm, or why the norm doesn't commute with a rotation."""
    if norm.op_type == "LayerNormalization":
        return "it subtracts the mean (layer-norm-to-rms-norm makes an RMSNormalization of it)"
    gain = constant_array(norm.inputs[1]) if len(norm.inputs) > 1 else None
    if gain is None or gain.size == 0 or (gain != gain.reshape(-1)[0]).any():
        return "it has a gain for each channel (fold-norm-affine moves it into the layers behind)"
    if any(out.uses() or out.is_graph_output() for out in norm.outputs[1:]):
        return "it gives out more than the normalised values"
    space = feature_space(norm.outputs[0], -1, facts)
    if space is None or space.conflict is not None:
        return "what it gives out can't be followed"
    if [writer.node for writer in space.writers] != [norm]:
        return "what it gives out is mixed with other values"
    uses: list[Use] = []
    for reader in space.readers:
        found = "it isn't a linear layer" if reader.node is None else _weight(reader.node, reader)
        if isinstance(found, str):
            return f"{described(reader.node)} reads it, and {found}"
        uses.extend(found)
    return uses


def _weight(node: ir.Node, reader: Reader) -> list[Use] | str:
    """The weight of a linear layer along whose input axis a vector is read, or why there is none."""
    index, axis, user = 1, -2, node
    if reader.index != 0 or not is_op(node, "MatMul", "Gemm", "Conv"):
        return "it isn't a linear layer"
    if is_op(node, "Conv"):
        tensor = constant_tensor(node.inputs[1])
        if tensor is None or reader.axis != 1 - len(tensor.shape) or attribute_int(node, "group", 1) != 1:
            return "it isn't a convolution of these channels as a whole"
        axis = reader.axis
    elif reader.axis != -1 or attribute_int(node, "transA", 0) != 0:
        return "it takes another axis"
    elif is_op(node, "Gemm") and attribute_int(node, "transB", 0) == 1:
        axis = -1
    if (transpose := producer(node.inputs[1], "Transpose")) is not None and not is_op(node, "Conv"):
        perm = transpose.attributes.get("perm")
        if perm is None or list(perm.as_ints()) == [1, 0]:
            user, index, axis = transpose, 0, -3 - axis
    value = user.inputs[index]
    tensor = constant_tensor(value)
    if tensor is None or not is_constant(value):
        return "its weight isn't constant"
    if tensor.dtype not in FLOATS or len(tensor.shape) < 2 or (is_op(node, "MatMul") and len(tensor.shape) != 2):
        return f"its weight is {tensor.dtype.name.lower()}, or no matrix"
    return [Use(user, index, axis)]


def _settle(parts: list[_Part]) -> None:
    """Rotate at run time whatever shares a large constant with something that doesn't turn with it."""
    changed = True
    while changed:
        changed = False
        shared: dict[ir.Value, list[_Part]] = {}
        for part in parts:
            for value in dict.fromkeys(use.node.inputs[use.index] for use in part.uses):
                assert value is not None
                shared.setdefault(value, []).append(part)
        for value, readers in shared.items():
            uses = [use for part in readers for use in part.uses if use.node.inputs[use.index] is value]
            reason = _tied(value, uses)
            if reason is not None:
                for part in readers:
                    part.uses, part.why = [], reason
                changed = True
                break


def _tied(value: ir.Value, uses: Iterable[Use]) -> str | None:
    """Why a constant can't turn, or None."""
    known = {(use.node, use.index): use.axis for use in uses}
    if len(set(known.values())) > 1:
        return f"{value.name!r} is read along two axes"
    others = [user for user, index in value.uses() if (user, index) not in known]
    tensor = constant_tensor(value)
    assert tensor is not None
    if (others or value.is_graph_output()) and tensor.nbytes > COPIED_BYTES:
        return f"{value.name!r} is shared with {described(others[0] if others else None)}"
    return None
