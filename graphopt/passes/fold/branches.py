"""Equal branches that begin at one value, walked back in lock-step to make one branch of their joint width.

Concat of branches fᵢ(x) along the channels, for layers that work on each channel by itself or have weights:

    Concat(act(uᵢ)) = act(Concat(uᵢ))               element by element, or pooling
    Concat(uᵢ ⊙ aᵢ) = Concat(uᵢ) ⊙ Concat(aᵢ)       a product or sum with one constant a channel, or of two such values
    Concat(Wᵢ ∗ uᵢ) = W ∗ Concat(uᵢ)                with groups: W is the Wᵢ stacked, each group sees its own branch
    Concat(Wᵢ ∗ x)  = W ∗ x                         without groups, the Wᵢ stacked along the output channels
    Concat(Split(x)) = x

and for the last layer of branches that are added, Σ Wᵢ ∗ uᵢ = W ∗ Concat(uᵢ) with the Wᵢ stacked along the input
channels. For branches of MatMul the channels are the last axis, and only the first and the last layer have weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.analysis.algebra import attribute_int, is_op, producer
from graphopt.graph.computed import concatenated
from graphopt.graph.constants import constant_array, constant_tensor, is_constant
from graphopt.graph.edits import Editor
from graphopt.passes.fold.convolutions import Convolution, ConvRulePass

ELEMENTWISE = frozenset(
    {
        *(
            "Relu",
            "LeakyRelu",
            "PRelu",
            "Elu",
            "Selu",
            "Celu",
            "ThresholdedRelu",
            "HardSigmoid",
            "HardSwish",
            "Sigmoid",
        ),
        *("Tanh", "Softplus", "Softsign", "Mish", "Gelu", "Swish", "Erf", "Abs", "Neg", "Exp", "Log", "Sqrt", "Floor"),
        *("Ceil", "Round", "Sign", "Reciprocal", "Identity", "Cast", "Clip", "Add", "Sub", "Mul", "Div", "Max", "Min"),
        *("Pow",),
    }
)
POOLING = frozenset({"MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool"})
LONGEST = 24
"""Nodes of a branch at most: a chain of equal towers isn't walked to its end for each pair of its values."""
BLOCK = 16
"""ONNX Runtime has fast grouped convolutions for groups of a multiple of so many channels (8 without AVX-512) only."""
FEW = 4
"""Channels of a group up to which a layer of its own costs more than the slower grouped convolution does."""
MANY = 3
"""Added branches from which on the work saved in their last layers outweighs it, whatever their width."""


class NoBranches(Exception):
    """These values aren't the ends of equal branches; the message is the reason where they nearly are."""


@dataclasses.dataclass(frozen=True)
class Joined:
    """Values of equal branches, planned as one value.

    Attributes:
        channels: How many channels of it each branch has.
        build: Makes it at the site; call it once all of the plan is certain.
    """

    channels: tuple[int, ...]
    build: Callable[[], ir.Value]


class Branches:
    """One attempt to join the values that `reader` and the nodes beside it read.

    Args:
        rules: The pass, for what it knows of convolutions.
        edit: Where new nodes go.
        readers: The nodes at which the branches end: they may read the values of the branches.
        last: Whether the channels are the last axis, as in branches of MatMul, or axis 1, as in those of Conv.
        any_width: Also make grouped convolutions that were measured to be slower than their groups.
    """

    def __init__(
        self, rules: ConvRulePass, edit: Editor, readers: Iterable[ir.Node], last: bool, any_width: bool
    ) -> None:
        self.rules = rules
        self.edit = edit
        self.inside = set(readers)
        self.last = last
        self.any_width = any_width
        self.rank = 0
        """The rank of the values of convolutions, known from the first one that is met."""
        self._layers: list[ir.Node] = []
        self._joined: dict[tuple[ir.Value, ...], Joined] = {}
        self._values: list[ir.Value] = []
        self._narrow: list[tuple[int, int]] = []
        self._split = False

    # ---- how branches end

    def concatenation(self, values: Sequence[ir.Value]) -> Callable[[], ir.Value]:
        """A plan for Concat of `values` along the channels.

        Raises:
            NoBranches: They are no equal branches.
        """
        joined = self._join(tuple(values))
        self._check(0)
        return joined.build

    def convolutions(self, ends: Sequence[Convolution], inputs: Sequence[ir.Value]) -> Callable[[], ir.Value]:
        """A plan for the sum of convolutions of `inputs`.

        Raises:
            NoBranches: They are no equal branches.
        """
        self.rank = len(ends[0].kernel.shape)
        self._layers.extend(end.layer.node for end in ends)
        self.inside.update(end.layer.node for end in ends)
        joined = self._join(tuple(inputs))
        if joined.channels != tuple(end.kernel.inputs for end in ends):
            raise NoBranches
        self._check(len(ends))
        weight = [end.layer.weight for end in ends]
        bias = np.sum([end.bias for end in ends], axis=0)

        def build() -> ir.Value:
            first = ends[0]
            given = [joined.build(), self.edit.constant(concatenated(weight, 1), "weight")]
            if any(len(end.layer.node.inputs) > 2 for end in ends):
                given.append(self.edit.constant(bias.astype(first.kernel.dtype.numpy()), "bias"))
            return self.edit.op("Conv", given, first.kernel.window.attributes(), like=first.layer.node.outputs[0])

        return build

    def products(self, ends: Sequence[ir.Node]) -> Callable[[], ir.Value]:
        """A plan for the sum of MatMul nodes with constant matrices.

        Raises:
            NoBranches: They are no equal branches.
        """
        self._layers.extend(ends)
        self.inside.update(ends)
        matrices = [_matrix(node) for node in ends]
        joined = self._join(tuple(_operand(node, 0) for node in ends))
        if joined.channels != tuple(int(m.shape.numpy()[0]) for m in matrices):
            raise NoBranches
        self._check(len(ends))
        return lambda: self.edit.op(
            "MatMul",
            [joined.build(), self.edit.constant(concatenated(matrices, 0), "weight")],
            like=ends[0].outputs[0],
        )

    def _check(self, added: int) -> None:
        """That nothing but the branches sees their values, and that it is worth it; `added` branches are summed up."""
        if not self._layers:
            raise NoBranches
        for node in self._layers:
            # Weights that something else reads would stay, beside the joined ones.
            if len(_operand(node, 1).uses()) > 1:
                raise NoBranches(f"the weights of {node.op_type} {node.name!r} are read by other nodes too")
        for value in self._values:
            if value.is_graph_output():
                raise NoBranches(f"{value.name!r} is a graph output")
            if any(use.node not in self.inside for use in value.uses()):
                raise NoBranches(f"{value.name!r} is read by something else too")
        for widths in () if self.any_width or added >= MANY else self._narrow:
            if self._split or max(widths) > FEW:
                raise NoBranches(
                    f"grouped convolutions with {' → '.join(map(str, widths))} channels a group may be slower "
                    "(see any_width)"
                )

    # ---- the walk

    def _join(self, values: tuple[ir.Value, ...]) -> Joined:
        """One value for `values`, which are distinct and made in the same way."""
        if values in self._joined:
            return self._joined[values]
        if len(set(values)) < len(values):
            raise NoBranches
        made = [value.producer() for value in values]
        nodes = [node for node in made if node is not None]
        if len(nodes) < len(values) or len({(n.op_type, n.domain, n.graph) for n in nodes}) > 1:
            raise NoBranches
        if nodes[0] is nodes[1]:
            return self._whole(nodes[0], values)
        if len(self._values) >= LONGEST * len(values) or any(len(node.outputs) > 1 for node in nodes):
            raise NoBranches
        self.inside.update(nodes)
        self._values.extend(values)
        if is_op(nodes[0], "Conv") and not self.last:
            joined = self._convolved(nodes)
        elif is_op(nodes[0], "MatMul") and self.last:
            joined = self._multiplied(nodes)
        elif is_op(nodes[0], *ELEMENTWISE) or (not self.last and is_op(nodes[0], *POOLING)):
            joined = self._elementwise(nodes)
        else:
            raise NoBranches
        cached: list[ir.Value] = []

        def build() -> ir.Value:
            if not cached:
                cached.append(joined.build())
            return cached[0]

        self._joined[values] = Joined(joined.channels, build)
        return self._joined[values]

    def _whole(self, split: ir.Node, values: tuple[ir.Value, ...]) -> Joined:
        """All parts of a Split along the channels, in order."""
        x = split.inputs[0] if split.inputs else None
        if not is_op(split, "Split") or tuple(split.outputs) != values or x is None:
            raise NoBranches
        shapes = [self.rules.shape(value) for value in values]
        axis = attribute_int(split, "axis", 0)
        self._split = True
        channels = []
        for shape in shapes:
            if shape is None or axis is None or (not self.last and self.rank not in (0, len(shape))):
                raise NoBranches
            place = len(shape) - 1 if self.last else 1
            size = shape[place]
            if axis % len(shape) != place or size is None:
                raise NoBranches
            channels.append(size)
        return Joined(tuple(channels), lambda: x)

    def _convolved(self, nodes: list[ir.Node]) -> Joined:
        convs = []
        for node in nodes:
            conv = self.rules.convolution(node)
            if isinstance(conv, str):
                raise NoBranches
            convs.append(conv)
        first = convs[0].kernel
        kernels = [conv.kernel for conv in convs]
        inputs = [_operand(node, 0) for node in nodes]
        if self.rank not in (0, len(first.shape)) or any(k.window != first.window for k in kernels):
            raise NoBranches
        if any(kernel.dtype != first.dtype for kernel in kernels):
            raise NoBranches
        self._layers.extend(nodes)
        self.rank = len(first.shape)
        if len(set(inputs)) == 1:
            if any(kernel.group > 1 or kernel.inputs != first.inputs for kernel in kernels):
                raise NoBranches
            group, below = 1, Joined((first.inputs,), lambda: inputs[0])
        else:
            # One number of groups holds for all, so all groups must be equally wide.
            if len({(k.shape[0] // k.group, k.shape[1]) for k in kernels}) > 1:
                raise NoBranches
            below = self._join(tuple(inputs))
            if below.channels != tuple(kernel.inputs for kernel in kernels):
                raise NoBranches
            widths = first.shape[1], first.shape[0] // first.group
            if any(width % BLOCK for width in widths):
                self._narrow.append(widths)
            group = sum(kernel.group for kernel in kernels)

        def build() -> ir.Value:
            given = [
                below.build(),
                self.edit.constant(concatenated([conv.layer.weight for conv in convs], 0), "weight"),
            ]
            if any(len(node.inputs) > 2 for node in nodes):
                bias = np.concatenate([conv.bias for conv in convs])
                given.append(self.edit.constant(bias.astype(first.dtype.numpy()), "bias"))
            return self._typed(self.edit.op("Conv", given, first.window.attributes(group)), nodes[0])

        return Joined(tuple(kernel.shape[0] for kernel in kernels), build)

    def _multiplied(self, nodes: list[ir.Node]) -> Joined:
        matrices = [_matrix(node) for node in nodes]
        x = _operand(nodes[0], 0)
        if any(node.inputs[0] is not x for node in nodes) or len({(m.dtype, m.shape[0]) for m in matrices}) > 1:
            raise NoBranches

        def build() -> ir.Value:
            weight = self.edit.constant(concatenated(matrices, 1), "weight")
            return self._typed(self.edit.op("MatMul", [x, weight]), nodes[0])

        self._layers.extend(nodes)
        return Joined(tuple(int(m.shape.numpy()[1]) for m in matrices), build)

    def _elementwise(self, nodes: list[ir.Node]) -> Joined:
        first = nodes[0]
        if any(len(node.inputs) != len(first.inputs) for node in nodes):
            raise NoBranches
        if any(a.is_ref() for node in nodes for a in node.attributes.values()):
            raise NoBranches
        if any(_settings(node) != _settings(first) for node in nodes):
            raise NoBranches
        operands = [tuple(node.inputs[i] for node in nodes) for i in range(len(first.inputs))]
        joined: dict[int, Joined] = {}
        for index, operand in enumerate(operands):
            values = tuple(value for value in operand if value is not None)
            if len(values) == len(operand) and not any(is_constant(value) for value in values):
                joined[index] = self._join(values)
            elif values and not all(is_constant(value) for value in operand):
                raise NoBranches
        if len({j.channels for j in joined.values()}) != 1:
            raise NoBranches  # also where one is broadcast along the channels
        channels = next(iter(joined.values())).channels
        constants = {i: self._constants(o, channels) for i, o in enumerate(operands) if i not in joined}

        def build() -> ir.Value:
            given: list[ir.Value | None] = []
            for index in range(len(operands)):
                constant = constants.get(index)
                if isinstance(constant, ir.Value) or (constant is None and index not in joined):
                    given.append(constant)
                else:
                    given.append(
                        joined[index].build() if constant is None else self.edit.constant(constant, "constant")
                    )
            settings = {name: attribute.value for name, attribute in first.attributes.items()}
            return self._typed(self.edit.op(first.op_type, given, settings), first)

        return Joined(channels, build)

    def _constants(
        self, operand: Sequence[ir.Value | None], channels: tuple[int, ...]
    ) -> ir.Value | ir.TensorProtocol | None:
        """Constant operands as one: a number that all have, or one number a channel of each."""
        if all(value is None for value in operand):
            return None
        arrays = [constant_array(value) for value in operand]
        first = arrays[0]
        if first is None or any(a is None or a.dtype != first.dtype or a.ndim != first.ndim for a in arrays):
            raise NoBranches
        known = [array for array in arrays if array is not None]
        rank = 1 if self.last else self.rank
        if first.size == 1 and first.ndim <= rank and all(np.array_equal(a, first) for a in known):
            return operand[0]
        # Aligned from the right, the axis of the channels is this one of the constant.
        axis = first.ndim - (1 if self.last else rank - 1)
        expected = [tuple(n if i == axis else 1 for i in range(first.ndim)) for n in channels]
        if axis < 0 or [a.shape for a in known] != expected or first.ndim > rank:
            raise NoBranches
        tensors = [tensor for value in operand if (tensor := constant_tensor(value)) is not None]
        return concatenated(tensors, axis)

    def _typed(self, value: ir.Value, like: ir.Node) -> ir.Value:
        value.type = like.outputs[0].type
        return value


def signature(value: ir.Value) -> tuple[object, ...]:
    """What `value` is made by, a few layers back: equal for the ends of equal branches."""
    result: list[object] = []
    current: ir.Value | None = value
    while len(result) < LONGEST:
        node = producer(current, "Conv", "MatMul", *ELEMENTWISE, *POOLING)
        if node is None:
            break
        weight = constant_tensor(node.inputs[1]) if node.op_type in ("Conv", "MatMul") else None
        shape = None if weight is None else tuple(weight.shape.numpy())
        # The last layers may read values of different widths, and each layer may make one of its own.
        fixed = shape and (
            shape[2 if not result else 1 :] if node.op_type == "Conv" else shape[: 0 if not result else 1]
        )
        result.append((node.op_type, fixed))
        current = next((v for v in node.inputs if v is not None and not is_constant(v)), None)
    return tuple(result)


def _settings(node: ir.Node) -> dict[str, object]:
    return {name: attribute.value for name, attribute in node.attributes.items()}


def _operand(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index] if len(node.inputs) > index else None
    if value is None:
        raise NoBranches
    return value


def _matrix(node: ir.Node) -> ir.TensorProtocol:
    tensor = constant_tensor(_operand(node, 1))
    if tensor is None or len(tensor.shape) != 2 or not tensor.dtype.is_floating_point():
        raise NoBranches
    return tensor
