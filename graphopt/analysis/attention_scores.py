"""From a Softmax outward: the product of queries and keys below it, the product with the values above it, and what
happens to the scores in between."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from graphopt.analysis.algebra import attribute_int, cast_target, is_op, producer, users
from graphopt.analysis.layout import VIEWS, Axes, NotAView, below
from graphopt.analysis.shapes import ShapeFacts
from graphopt.graph.constants import constant_tensor, is_constant, scalar

_MAX_NODES = 40
FLOAT_LOWEST = float(np.finfo(np.float32).min)
_MIXED = 64 * 64
SWALLOWING = -1e30
HIDING = -1e4
"""What is written in place of a score, or added to it, hides the key where it is at most this."""


class NotAttention(Exception):
    """A Softmax between two products that isn't understood as attention; the message says which fact is missing."""


@dataclasses.dataclass(frozen=True)
class Bias:
    """Something added to the scores.

    Attributes:
        value: What is added, times `factor`.
        factor: 1, or what the scores were multiplied by afterwards.
        axes: The axes of the scores where it is added, in atoms of the queries and keys.
    """

    value: ir.Value
    factor: float
    axes: Axes


@dataclasses.dataclass(frozen=True)
class Keep:
    """A choice between the scores and a number that hides a key.

    Attributes:
        condition: A boolean value.
        kept: Whether a key is kept where the condition is true (else where it is false).
        fill: The number in place of a hidden score; -inf where a hidden key has no weight even where all are hidden.
        axes: As for `Bias`.
        added: Whether the number is added to the score, which it swallows, and not put in its place: a key that is
            hidden twice then gets the sum.
    """

    condition: ir.Value
    kept: bool
    fill: float
    axes: Axes
    added: bool


@dataclasses.dataclass(frozen=True)
class Clamp:
    """Scores below the lowest finite number (-inf) become that number."""


@dataclasses.dataclass
class Path:
    """The nodes of one attention between its two products.

    Attributes:
        softmax: The Softmax.
        product: MatMul (or FusedMatMul, Einsum) of queries and keys.
        steps: From the product to the Softmax: a node and the index of the input that carries the scores.
        weighing: The nodes from the Softmax to the product with the values, in their order.
        weighted: That product.
        place: The index of the input of `weighted` that carries the weights.
        guarded: Whether weights that aren't numbers are replaced by 0.
        rekept: (condition, kept) of choices between a weight and 0.
    """

    softmax: ir.Node
    product: ir.Node
    steps: list[tuple[ir.Node, int]]
    weighing: list[ir.Node]
    weighted: ir.Node
    place: int
    guarded: bool
    rekept: list[tuple[ir.Value, bool]]


def is_product(node: ir.Node) -> bool:
    """Whether `node` multiplies two matrices that both depend on the inputs of the model."""
    known = is_op(node, "MatMul", "Einsum") or (node.op_type == "FusedMatMul" and node.domain == "com.microsoft")
    return known and len(node.inputs) == 2 and not any(v is None or is_constant(v) for v in node.inputs)


QUANTIZING = ("QuantizeLinear", "DequantizeLinear")
_ON_WEIGHTS = ("Cast", "Dropout", "Slice", "Split", *QUANTIZING, *VIEWS)


def weighing(softmax: ir.Node) -> tuple[list[ir.Node], ir.Node, int, bool, list[tuple[ir.Value, bool]]] | None:
    """(nodes, product, place, guarded, rekept) from a Softmax to the product with the values; None without one."""
    current, guarded = softmax.outputs[0], False
    steps: list[ir.Node] = []
    rekept: list[tuple[ir.Value, bool]] = []
    for _ in range(12):
        readers = users(current)
        for reader in readers:
            if is_product(reader):
                return steps, reader, list(reader.inputs).index(current), guarded, rekept
        step = next((r for r in readers if is_op(r, *_ON_WEIGHTS) and r.inputs[0] is current), None)
        if step is None:
            choices = [r for r in readers if is_op(r, "Where") and current in r.inputs[1:]]
            if not choices:
                return None
            step = choices[0]
            kept = step.inputs[1] is current
            other, condition = step.inputs[2 if kept else 1], step.inputs[0]
            if number_everywhere(other) != 0.0 or condition is None:
                return None
            test = producer(condition, "IsNaN")
            if test is not None and test.inputs[0] is current and not kept:
                guarded = True
            else:
                rekept.append((condition, kept))
        steps.append(step)
        current = step.outputs[0]
    return None


def paths(softmax: ir.Node) -> Iterator[Path]:
    """The ways to see a Softmax as attention, the likeliest first; none where it isn't between two products."""
    above = weighing(softmax)
    if above is None or softmax.inputs[0] is None:
        return
    queue: list[tuple[ir.Value, list[tuple[ir.Node, int]]]] = [(softmax.inputs[0], [])]
    seen: set[ir.Value] = set()
    while queue and len(seen) < _MAX_NODES:
        value, steps = queue.pop(0)
        node = value.producer()
        if node is None or value in seen:
            continue
        seen.add(value)
        if is_product(node):
            yield Path(softmax, node, steps, *above)
            continue
        for index in _carriers(node):
            operand = node.inputs[index]
            if operand is not None and not is_constant(operand):
                queue.append((operand, [(node, index), *steps]))


def _carriers(node: ir.Node) -> tuple[int, ...]:
    """The inputs of a node through which scores may come."""
    if is_op(node, *VIEWS, *QUANTIZING, "Cast", "Div", "Sub", "Tanh", "Clip", "Dropout"):
        return (0,)
    if is_op(node, "Add", "Mul", "Max", "Concat"):
        return (0, 1) if len(node.inputs) == 2 else ()
    if is_op(node, "MatMul", "Einsum", "Conv") and len(node.inputs) > 1:
        # Scores of all heads mixed (talking heads): no attention that an operator computes, but one to tell of.
        small = [tensor is not None and tensor.size <= _MIXED for tensor in map(constant_tensor, node.inputs[:2])]
        return (small.index(False),) if sum(small) == 1 else ()
    return (1, 2) if is_op(node, "Where") else ()


@dataclasses.dataclass
class Scores:
    """What the Softmax takes: softcap · tanh(scale · product · temperature / softcap) + biases, with keys hidden.

    Attributes:
        scale: A number.
        softcap: A number, 0 where there is no cap.
        temperatures: Values that the product is multiplied by, of length 1 along queries and keys.
        terms: What is added and which keys are kept, in order.
        precision: The type of the Softmax where it isn't that of the product.
        axes: The axes of what the Softmax takes.
        keys: Which of them is that of the keys.
    """

    axes: Axes
    keys: int = -1
    scale: float = 1.0
    softcap: float = 0.0
    temperatures: list[ir.Value] = dataclasses.field(default_factory=list)
    terms: list[Bias | Keep | Clamp] = dataclasses.field(default_factory=list)
    precision: ir.DataType | None = None


def read_scores(path: Path, axes: Axes, facts: ShapeFacts) -> Scores:
    """What happens to the scores of `path`, whose product has `axes`.

    Raises:
        NotAttention: Something that attention doesn't do.
    """
    scores = Scores(axes)
    inner = path.product.outputs[0]
    tanh = False
    alpha = path.product.attributes.get("alpha")
    if path.product.op_type == "FusedMatMul" and alpha is not None:
        if alpha.is_ref():
            raise NotAttention(f"the scale of {path.product.name!r} is set by a caller")
        scores.scale = alpha.as_float()
    for node, index in path.steps:
        only_reader(inner, node)
        other = node.inputs[1 - index] if len(node.inputs) == 2 and index < 2 else None
        number = scalar(other)
        masked = bool(scores.terms)
        if is_op(node, "Mul", "Div"):
            if number is not None and number != 0 and (number > 0 or not masked):
                _multiply(scores, 1 / number if node.op_type == "Div" else number, tanh)
            elif node.op_type == "Mul" and other is not None and not masked and not tanh and _per_row(other, facts):
                scores.temperatures.append(other)
            else:
                raise NotAttention(f"the scores are multiplied by {_name(other)} at {node.name!r}")
        elif is_op(node, "Tanh"):
            if tanh or masked or scores.temperatures:
                raise NotAttention(f"Tanh {node.name!r} comes after something else than a number")
            tanh, scores.softcap = True, 1.0
        elif is_op(node, "Add", "Sub"):
            assert other is not None
            _add(scores, other, -1.0 if node.op_type == "Sub" else 1.0)
        elif is_op(node, "Where"):
            _choose(scores, node, index)
        elif is_op(node, "Max", "Clip"):
            low = number if node.op_type == "Max" else scalar(node.inputs[1] if len(node.inputs) > 1 else None)
            if low is None or low > FLOAT_LOWEST * 0.999 or (node.op_type == "Clip" and _given(node, 2)):
                raise NotAttention(f"{node.op_type} {node.name!r} limits the scores")
            scores.terms.append(Clamp())
        elif is_op(node, "Cast"):
            scores.precision = cast_target(node)
        elif is_op(node, "Dropout"):
            pass
        elif is_op(node, *QUANTIZING):
            raise NotAttention(f"{node.op_type} {node.name!r} quantizes the scores")
        elif is_op(node, "MatMul", "Einsum", "Conv"):
            raise NotAttention(f"{node.op_type} {node.name!r} mixes the scores by a constant")
        elif is_op(node, "Concat"):
            raise NotAttention(f"Concat {node.name!r} puts further scores (attention sinks) beside those of the keys")
        else:
            try:
                scores.axes = below(node, scores.axes, facts)
            except NotAView as reason:
                raise NotAttention(f"the axes of the scores aren't known behind {node.name!r}: {reason}") from reason
        inner = node.outputs[0]
    only_reader(inner, path.softmax)
    axis = attribute_int(path.softmax, "axis", -1)
    if axis is None or axis % len(scores.axes) < len(scores.axes) - 2:
        raise NotAttention("the Softmax isn't over one of the last two axes")
    scores.keys = axis % len(scores.axes)
    if tanh:
        scores.scale *= scores.softcap
    return scores


def _multiply(scores: Scores, number: float, tanh: bool) -> None:
    scores.terms = [
        dataclasses.replace(term, factor=term.factor * number) if isinstance(term, Bias) else term
        for term in scores.terms
    ]
    if tanh:
        scores.softcap *= number
    else:
        scores.scale *= number


def _add(scores: Scores, value: ir.Value, factor: float) -> None:
    choice = producer(value, "Where")
    if choice is not None and choice.inputs[0] is not None and factor == 1.0:
        numbers = [number_everywhere(v) for v in choice.inputs[1:]]
        for kept, (zero, fill) in ((True, numbers), (False, numbers[::-1])):
            # A number of this size swallows the score that it is added to.
            if zero == 0.0 and fill is not None and fill <= SWALLOWING:
                scores.terms.append(Keep(choice.inputs[0], kept, fill, scores.axes, True))
                return
    scores.terms.append(Bias(value, factor, scores.axes))


def _choose(scores: Scores, node: ir.Node, index: int) -> None:
    condition, fill = node.inputs[0], number_everywhere(node.inputs[3 - index])
    if fill is None or condition is None:
        raise NotAttention(f"Where {node.name!r} chooses between the scores and something that isn't one number")
    if fill > HIDING:
        raise NotAttention(f"Where {node.name!r} puts {fill:g} in place of scores, which doesn't hide a key")
    scores.terms.append(Keep(condition, index == 1, fill, scores.axes, False))


def only_reader(value: ir.Value, reader: ir.Node) -> None:
    """Check that nothing but `reader` reads a value of the attention.

    Raises:
        NotAttention: Something else does.
    """
    others = [user for user in users(value) if user is not reader and not is_op(user, "Shape")]
    if value.is_graph_output() or others:
        what = "is an output of the graph" if value.is_graph_output() else f"is read by {others[0].name!r} too"
        raise NotAttention(f"{value.name!r}, inside of the attention, {what}")


def check_weighing(path: Path) -> None:
    """Check that nothing but the product with the values reads the weights.

    Raises:
        NotAttention: Something else does, or sinks are cut off.
    """
    value = path.softmax.outputs[0]
    for node in [*path.weighing, path.weighted]:
        tests = [user for user in users(value) if is_op(user, "IsNaN")]
        if value.is_graph_output() or any(
            u is not node and u not in tests and not is_op(u, "Shape") for u in users(value)
        ):
            raise NotAttention(f"the weights {value.name!r} are read elsewhere too")
        if is_op(node, *QUANTIZING):
            raise NotAttention(f"{node.op_type} {node.name!r} quantizes the weights")
        if is_op(node, "Slice", "Split"):
            raise NotAttention(f"{node.op_type} {node.name!r} takes a part of the weights (attention sinks)")
        value = node.outputs[0]


def number_everywhere(value: ir.Value | None) -> float | None:
    """The number that all elements of `value` are, whatever its shape; None where there is none."""
    for _ in range(4):
        number = scalar(value)
        node = None if value is None else value.producer()
        if number is not None or node is None:
            return number
        if is_op(node, "ConstantOfShape"):
            fill = node.attributes.get("value")
            if fill is None:
                return 0.0
            return None if fill.is_ref() else float(fill.as_tensor().numpy().reshape(-1)[0])
        if not is_op(node, "Expand", "Identity", "Reshape", "Unsqueeze"):
            return None
        value = node.inputs[0]
    return None


def _per_row(value: ir.Value, facts: ShapeFacts) -> bool:
    """Whether a value has length 1 along queries and keys, so that it can multiply the queries instead."""
    shape = facts.shape(value)
    return shape is not None and all(size == 1 for size in shape[-2:])


def _given(node: ir.Node, index: int) -> bool:
    return len(node.inputs) > index and node.inputs[index] is not None


def _name(value: ir.Value | None) -> str:
    tensor = constant_tensor(value)
    return "nothing" if value is None else f"{value.name!r}" + (f" of shape {list(tensor.shape)}" if tensor else "")
