"""From the channels of a value back to the weights that make them: where a factor of each channel can be put instead.

Every channel of the value has the number of a factor. Going back through an operator gives its operand an array of such
numbers, of the operand's rank and of length 1 along axes that don't matter: a Transpose permutes it, a Split makes it a
part of a larger one whose other elements are *pinned* (their factor is 1), repeated heads are *tied* to one factor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphopt.analysis.algebra import attribute_int, is_op
from graphopt.analysis.dims import Dim
from graphopt.analysis.feature_space import NORMS, normalizes_last
from graphopt.analysis.shapes import ShapeFacts
from graphopt.graph.constants import constant_array, is_constant
from graphopt.passes.fold.layers import Layer, layer_of
from graphopt.passes.fold.neighbours import is_product
from graphopt.passes.quantize.factor_numbers import PARTS, Numbers, Ties, places_of, regrouped

_HOMOGENEOUS = ("Relu", "LeakyRelu", "PRelu", "Abs")
"""f(s·x) = s·f(x) for s > 0, number by number."""
_COPIES = ("Identity", "Dropout", "Cast", "Neg")
_VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
_ATTENTIONS = {"Attention": ("q_num_heads", "kv_num_heads", 5), "GroupQueryAttention": ("num_heads", "kv_num_heads", 4)}
"""Fused attentions: names of the attributes with the numbers of heads, place of the old values among the inputs."""
_LIMIT = 64


class Refused(Exception):
    """A factor can't be put there; the message says why."""


@dataclasses.dataclass(frozen=True)
class Taker:
    """A node whose constants take factors.

    Attributes:
        node: A layer or its Add, a normalization, or an operator with a constant operand.
        index: The constant operand, -1 for a layer or a normalization.
        numbers: The number of the factor of each output channel, [M]; for a constant operand an array that broadcasts
            to what the node gives out.
    """

    node: ir.Node
    index: int
    numbers: Numbers


class ChannelWalk:
    """One walk back from the last axis of a value.

    Args:
        facts: Shapes of the model.
        caches: Names of the inputs and outputs that hold values of earlier tokens: they hold scaled ones from then on.

    Attributes:
        takers: What takes the factors.
        ties: Which factors must be equal.
        linear: Whether nothing on the way depends on the factors' being factors: any linear map of the channels would
            go the same way, as far as they are moved together.
        cached: Whether the contents of a cache change.
        depth: Channels of one head, where an attention lies on the way; else 0.
    """

    def __init__(self, facts: ShapeFacts, caches: frozenset[str]) -> None:
        self.facts = facts
        self.caches = caches
        self.takers: list[Taker] = []
        self.linear = True
        self.cached = False
        self.depth = 0
        self._steps = 0

    def start(self, value: ir.Value, channels: int, readers: Sequence[ir.Node]) -> Numbers:
        """Walk back from `value`, which `readers` alone read, and return the number of the factor of each channel.

        Raises:
            Refused: There is no place for the factors.
        """
        self.ties = Ties(channels)
        numbers = np.arange(channels).reshape(*[1] * (self._rank(value) - 1), channels)
        self._take(value, numbers, {(node, 0) for node in readers})
        found = self.ties.roots(numbers.reshape(-1))
        if (found == self.ties.pinned).all():
            raise Refused("every channel is used elsewhere too")
        return found

    # ---- a value

    def _take(self, value: ir.Value, numbers: Numbers, known: set[tuple[ir.Node, int]]) -> None:
        """Let `value` be made with factors, where `known` are the readers that expect that."""
        numbers = self.ties.roots(numbers)
        if (numbers == self.ties.pinned).all():
            return
        self._steps += 1
        if self._steps > _LIMIT:
            raise Refused("no weights are near")
        self._check_readers(value, numbers, known)
        node = value.producer()
        if node is None:
            raise Refused(f"{value.name!r} is an input of the graph")
        if any(node.graph is not reader.graph for reader, _ in known):
            raise Refused(f"{_label(node)} is in an outer graph")
        if any(a.is_ref() for a in node.attributes.values()):
            raise Refused(f"{_label(node)} takes an attribute from the function that it is in")
        layer = layer_of(node)
        if isinstance(layer, Layer):
            self._into_layer(layer, node, numbers)
        elif is_op(node, *NORMS) or node.op_type == "SimplifiedLayerNormalization":
            self._into_norm(node, numbers)
        else:
            self._back(node, value, numbers)

    def _check_readers(self, value: ir.Value, numbers: Numbers, known: set[tuple[ir.Node, int]]) -> None:
        if value.is_graph_output():
            if value.name not in self.caches:
                raise Refused(f"{value.name!r} is a graph output")
            self.cached = True
        for user, index in value.uses():
            if (user, index) in known or is_op(user, "Shape", "Size"):
                continue
            if index or not self._spares(user, value, numbers):
                raise Refused(f"{value.name!r} is read by {_label(user)} too")

    def _spares(self, node: ir.Node, value: ir.Value, numbers: Numbers) -> bool:
        """Whether `node` reads none of the channels that get a factor."""
        if not is_op(node, *PARTS):
            return False
        for axis, places in (
            places_of(node, out, self.facts) for out in node.outputs if out.uses() or out.is_graph_output()
        ):
            if places is None or axis is None or numbers.shape[axis] == 1:
                return False
            if (self.ties.roots(numbers.take(places, axis=axis)) != self.ties.pinned).any():
                return False
        return True

    # ---- ends

    def _into_layer(self, layer: Layer, node: ir.Node, numbers: Numbers) -> None:
        axis = numbers.ndim + layer.channel_axis if layer.channel_axis < 0 else layer.channel_axis
        if numbers.size != numbers.shape[axis]:
            raise Refused(f"the factors don't lie along the channels of {layer.name}")
        if numbers.size not in (1, layer.outputs):
            raise Refused(f"{layer.name} has {layer.outputs} channels, not {numbers.size}")
        self.takers.append(Taker(node, -1, np.broadcast_to(numbers.reshape(-1), layer.outputs)))

    def _into_norm(self, node: ir.Node, numbers: Numbers) -> None:
        if not normalizes_last(node, self.facts) and attribute_int(node, "axis", -1) != -1:
            raise Refused(f"{_label(node)} normalises more than one axis, or its rank isn't known")
        if any(out.uses() or out.is_graph_output() for out in node.outputs[1:]):
            raise Refused(f"the mean or deviation that {_label(node)} gives out is used")
        given = [v for v in node.inputs[1:3] if v is not None]
        if len(node.inputs) < 2 or any(constant_array(v) is None for v in given):
            raise Refused(f"the gain or bias of {_label(node)} isn't constant")
        if numbers.size != numbers.shape[-1]:
            raise Refused(f"the factors don't lie along the channels of {_label(node)}")
        self.linear = False
        self.takers.append(Taker(node, -1, numbers.reshape(-1)))

    # ---- operators

    def _back(self, node: ir.Node, value: ir.Value, numbers: Numbers) -> None:
        x = node.inputs[0] if node.inputs else None
        if node.op_type in _ATTENTIONS and value is node.outputs[0]:
            self._attention(node, value, numbers)
        elif x is None or node.domain not in ("", "ai.onnx"):
            raise Refused(_stops(node))
        elif is_op(node, *_COPIES, *_HOMOGENEOUS):
            self.linear &= is_op(node, *_COPIES)
            self._take(x, numbers, {(node, 0)})
        elif is_op(node, "Transpose"):
            self._take(x, np.transpose(numbers, np.argsort(_order(node, numbers.ndim))), {(node, 0)})
        elif is_op(node, *_VIEWS):
            moved = regrouped(numbers, self._shape(value), self._shape(x))
            if moved is None:
                raise Refused(f"the channels can't be followed through {_label(node)}")
            self._take(x, moved, {(node, 0)})
        elif is_op(node, "Expand", "Tile"):
            self._take(x, self._repeated(node, x, numbers), {(node, 0)})
        elif is_op(node, *PARTS):
            self._take(x, self._in_whole(node, value, x, numbers), {(node, 0)})
        elif is_op(node, "Concat"):
            self._concatenated(node, numbers)
        elif is_op(node, "Add", "Sub", "Sum"):
            self._sum(node, numbers)
        elif is_op(node, "Mul", "Div"):
            self._multiplied(node, numbers)
        elif is_product(node) and node.op_type == "MatMul":
            if numbers.ndim < 2 or numbers.shape[-2] > 1 or node.inputs[1] is None:
                raise Refused(f"the factors don't lie along the columns of {_label(node)}")
            self.depth = numbers.shape[-1]
            self._take(node.inputs[1], self._to(node.inputs[1], numbers), {(node, 1)})
        else:
            raise Refused(_stops(node))

    def _attention(self, node: ir.Node, value: ir.Value, numbers: Numbers) -> None:
        """Heads of the output have the factors of the head of the values that they read."""
        of_queries, of_keys, past = _ATTENTIONS[node.op_type]
        v = node.inputs[2]
        if v is None or is_constant(v):
            raise Refused(f"the values of {_label(node)} are packed with its queries")
        heads, own = attribute_int(node, of_queries, 0), attribute_int(node, of_keys, 0)
        old = node.inputs[past] if len(node.inputs) > past else None
        old = None if is_constant(old) else old
        if numbers.ndim == 4:
            heads = numbers.shape[1] if numbers.shape[1] > 1 else self._size(value, 1)
            # New values and old ones are joined, so that they have as many heads.
            own = self._size(v, 1) or (None if old is None else self._size(old, 1))
        if not heads or not own or heads % own or (numbers.shape[-2] > 1 and numbers.ndim == 3):
            raise Refused(f"the heads of {_label(node)} aren't known")
        depth = numbers.shape[-1] if numbers.ndim == 4 else numbers.shape[-1] // heads
        if numbers.ndim == 4 and (numbers.shape[2] > 1 or numbers.shape[0] > 1):
            raise Refused(f"the factors don't lie along the heads of {_label(node)}")
        self.depth = depth
        full = np.broadcast_to(numbers, (1, heads, 1, depth)) if numbers.ndim == 4 else numbers
        grouped = self.ties.along(full.reshape(own, heads // own, depth), 1)
        if old is not None:
            self._past(old, (node, past))
        for present in node.outputs[2:3]:
            if present.uses() or (present.is_graph_output() and present.name not in self.caches):
                raise Refused(f"{present.name!r} holds the values too")
        self._take(v, grouped.reshape((1, own, 1, depth) if numbers.ndim == 4 else (1, 1, own * depth)), {(node, 2)})

    def _past(self, value: ir.Value, reader: tuple[ir.Node, int]) -> None:
        others = [user for user, index in value.uses() if (user, index) != reader and not is_op(user, "Shape", "Size")]
        if value.name not in self.caches or others:
            raise Refused(f"{value.name!r} isn't known to be a cache that nothing else reads")
        self.cached = True

    def _repeated(self, node: ir.Node, x: ir.Value, numbers: Numbers) -> Numbers:
        if is_op(node, "Expand"):
            return self._to(x, numbers)
        repeats = constant_array(node.inputs[1])
        if repeats is None:
            raise Refused(f"the repeats of {_label(node)} aren't constant")
        for axis, times in enumerate(repeats.reshape(-1).tolist()):
            if times > 1 and numbers.shape[axis] > 1:
                shape = numbers.shape
                parted = numbers.reshape(*shape[:axis], times, shape[axis] // times, *shape[axis + 1 :])
                numbers = self.ties.along(parted, axis).squeeze(axis)
        return numbers

    def _to(self, operand: ir.Value, numbers: Numbers) -> Numbers:
        """Numbers of what an operand is broadcast to, as those of the operand."""
        shape = self._shape(operand)
        while numbers.ndim > len(shape):
            numbers = self.ties.along(numbers, 0)[0]
        for axis, size in enumerate(shape):
            if numbers.shape[axis] == 1 or size.value == numbers.shape[axis]:
                continue
            if size.value != 1:
                raise Refused(f"the sizes of {operand.name!r} aren't known")
            numbers = self.ties.along(numbers, axis)
        return numbers

    def _in_whole(self, node: ir.Node, value: ir.Value, x: ir.Value, numbers: Numbers) -> Numbers:
        """Numbers of a part as those of what it is taken from."""
        axis, places = places_of(node, value, self.facts)
        if axis is None:
            raise Refused(f"the channels can't be followed through {_label(node)}")
        scalar = numbers.ndim < self._rank(x)
        if scalar:
            numbers = np.expand_dims(numbers, axis)
        alone = sum(bool(out.uses()) or out.is_graph_output() for out in node.outputs) == 1
        alone &= all(user is node or is_op(user, "Shape", "Size") for user, _ in x.uses())
        if alone and numbers.shape[axis] == 1:
            return numbers  # what isn't taken is read by nobody
        size = self._size(x, axis)
        if places is None or size is None:
            raise Refused(f"{_label(node)} takes a part along an axis of unknown size")
        shape = list(numbers.shape)
        shape[axis] = size
        whole = np.full(shape, self.ties.pinned)
        seen = np.zeros(size, bool)
        numbers = np.broadcast_to(numbers, [*shape[:axis], len(places), *shape[axis + 1 :]])
        for index, place in enumerate(places):
            part = numbers.take([index], axis=axis)
            at = (slice(None),) * axis + (slice(place, place + 1),)
            if seen[place]:
                self.ties.tie(whole[at], part)
            whole[at], seen[place] = part, True
        return whole

    def _concatenated(self, node: ir.Node, numbers: Numbers) -> None:
        written = attribute_int(node, "axis", 0)
        if written is None:
            raise Refused(_stops(node))
        axis, start = written % numbers.ndim, 0
        for index, x in enumerate(node.inputs):
            if x is None:
                continue
            part = numbers
            if numbers.shape[axis] > 1:
                size = self._size(x, axis)
                if size is None:
                    raise Refused(f"the sizes of {x.name!r} aren't known")
                part = numbers.take(range(start, start + size), axis=axis)
                start += size
            if x.is_graph_input() and x.name in self.caches:
                self._past(x, (node, index))
            elif is_constant(x):
                self._constant(node, index, part, x)
            else:
                self._take(x, part, {(node, index)})

    def _sum(self, node: ir.Node, numbers: Numbers) -> None:
        for index, x in enumerate(node.inputs):
            if x is not None and is_constant(x):
                self._constant(node, index, numbers, x)
            elif x is not None:
                self._take(x, self._to(x, numbers), {(node, index)})

    def _constant(self, node: ir.Node, index: int, numbers: Numbers, x: ir.Value) -> None:
        if is_op(node, "Concat") and any(n != 1 for n in numbers.shape[:-1]):
            raise Refused(f"the factors don't lie along the last axis of {x.name!r}")
        if constant_array(x) is None:
            raise Refused(f"{x.name!r} is too large to be scaled")
        self.takers.append(Taker(node, index, numbers))

    def _multiplied(self, node: ir.Node, numbers: Numbers) -> None:
        """A factor of a product may be put into either operand: the first that can take it does."""
        varying = [(i, x) for i, x in enumerate(node.inputs) if x is not None and not is_constant(x)]
        if is_op(node, "Div"):
            varying = [(i, x) for i, x in varying if i == 0]
        self.linear &= len(varying) == 1 and all(
            (array := constant_array(v)) is not None and array.size == 1 for v in node.inputs if is_constant(v)
        )
        reasons = []
        # What a layer makes directly comes before what an activation makes.
        for index, x in sorted(varying, key=lambda place: isinstance(_made(place[1]), str)):
            before = self.ties.copy(), list(self.takers), self.linear, self.cached, self._steps
            try:
                return self._take(x, self._to(x, numbers), {(node, index)})
            except Refused as reason:
                reasons.append(str(reason))
                self.ties, self.takers, self.linear, self.cached, self._steps = before
        raise Refused(reasons[0] if reasons else _stops(node))

    # ---- shapes

    def _shape(self, value: ir.Value) -> Sequence[Dim]:
        shape = self.facts.shape(value)
        if shape is None:
            raise Refused(f"the shape of {value.name!r} isn't known")
        return shape

    def _rank(self, value: ir.Value) -> int:
        return len(self._shape(value))

    def _size(self, value: ir.Value, axis: int) -> int | None:
        return self._shape(value)[axis].value


def _order(node: ir.Node, rank: int) -> list[int]:
    perm = node.attributes.get("perm")
    return list(range(rank))[::-1] if perm is None else list(perm.as_ints())


def _made(value: ir.Value) -> Layer | str:
    node = value.producer()
    return "" if node is None else layer_of(node)


def _label(node: ir.Node) -> str:
    return f"{node.op_type} {node.name!r}"


def _stops(node: ir.Node) -> str:
    return f"{_label(node)} doesn't commute with a scale of its channels"
