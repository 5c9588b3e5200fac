"""Groups of linear layers that read one value, and what a factor of each channel of it is folded into exactly.

    x W = (x / s) (s W)

1/s goes into what makes x: the gain and bias of a normalization, or the output channels of the layers before, where
only operators lie between that a scale commutes with: V → O through the attention (query heads that share keys and
values share the factors too), up → down through the product with the gate, fc1 → fc2 through a ReLU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.algebra import attribute_int
from graphopt.analysis.attention_sites import attention_sites
from graphopt.analysis.linear_sites import LinearSite, Role, linear_sites
from graphopt.analysis.shapes import ShapeFacts
from graphopt.graph.constants import constant_array
from graphopt.graph.edits import Editor
from graphopt.graph.kv_interface import kv_interface
from graphopt.passes.fold.centring import set_constant
from graphopt.passes.fold.channel_affine import Affine, into_input, into_output, rounded_to
from graphopt.passes.fold.layers import Layer, Numbers, bias_behind, layer_of
from graphopt.passes.quantize.channel_walk import ChannelWalk, Refused, Taker
from graphopt.passes.quantize.factor_numbers import Numbers as FactorNumbers


@dataclasses.dataclass
class ReaderGroup:
    """Linear layers that read one value, and nothing else does.

    Attributes:
        x: The value.
        sites: The MatMul and Gemm nodes, in the order of the graph.
    """

    x: ir.Value
    sites: list[LinearSite]

    @property
    def readers(self) -> list[ir.Node]:
        """The nodes."""
        return [site.node for site in self.sites]

    @property
    def roles(self) -> list[Role]:
        """The role of each."""
        return [site.role for site in self.sites]

    @property
    def channels(self) -> int:
        """Input features K."""
        return self.sites[0].inputs

    def layers(self) -> list[Layer]:
        """The readers as they are now, with the Adds of their biases."""
        found = [layer for node in self.readers if isinstance(layer := layer_of(node), Layer)]
        return [dataclasses.replace(layer, add=bias_behind(layer)) for layer in found]

    def weights(self) -> Iterator[npt.NDArray[np.float32]]:
        """The weights of the readers as they are now, [N, K] each, one at a time."""
        for layer in self.layers():
            yield rows_of(layer)

    @property
    def label(self) -> str:
        """For reports: "q, k, v"."""
        return ", ".join(self.roles)


@dataclasses.dataclass(frozen=True)
class ChannelFold:
    """Where factors of the channels of a group's value go.

    Attributes:
        numbers: The number of the factor of each channel, [K], from 0; `count` where it has to be 1.
        count: How many factors there are.
        takers: What takes their inverses; its numbers are of the same kind.
        linear: Whether any linear map that moves channels of neighbouring numbers together could go the same way.
        cached: Whether a cache of values of earlier tokens holds scaled ones from then on.
        depth: Channels of one head, where an attention lies between; else 0.
    """

    numbers: FactorNumbers
    count: int
    takers: list[Taker]
    linear: bool
    cached: bool
    depth: int

    def pooled(self, values: Numbers, largest: bool = False) -> Numbers:
        """One number for each factor: the mean (or the largest) of those of its channels, [count], in float64."""
        inside = self.numbers < self.count
        if largest:
            found = np.zeros(self.count)
            np.maximum.at(found, self.numbers[inside], values[inside])
            return found
        total = np.bincount(self.numbers[inside], values[inside], self.count)
        return np.asarray(total / np.bincount(self.numbers[inside], minlength=self.count))

    def spread(self, factors: Numbers) -> Numbers:
        """The factor of each channel, [K], of those by number, [count]."""
        return np.append(factors, 1.0)[self.numbers]


class ChannelFolds:
    """Finds groups and folds in one model; make it anew after the graph changed its structure.

    Args:
        model: The model.
        facts: Its shapes.
    """

    def __init__(self, model: ir.Model, facts: ShapeFacts) -> None:
        self.facts = facts
        interface = kv_interface(model)
        pairs = () if interface is None else interface.pairs
        self.caches = frozenset(name for p in pairs if p.present for name in (p.past, p.present))
        self.sites = linear_sites(model, attention_sites(model, facts))

    def groups(self) -> Iterator[ReaderGroup | tuple[LinearSite, str]]:
        """The groups in the order of the graph; for a site whose input something else reads too the reason."""
        by_value: dict[ir.Value, list[LinearSite]] = {}
        for site in self.sites:
            if site.role not in ("embed", "conv") and site.x is not None and isinstance(layer_of(site.node), Layer):
                by_value.setdefault(site.x, []).append(site)
        for x, sites in by_value.items():
            first = sites[0]
            readers = [site.node for site in sites]
            others = [user for user, index in x.uses() if index or user not in readers]
            others = [user for user in others if user.op_type not in ("Shape", "Size")]
            if x.is_graph_output():
                yield first, f"{x.name!r} is a graph output"
            elif others:
                what = "the addition" if others[0].op_type in ("Add", "Sum") else others[0].op_type
                yield first, f"{what} {others[0].name!r} reads its input too"
            elif any(node.graph is not first.node.graph for node in readers):
                yield first, "its input is read in an inner graph too"
            else:
                yield ReaderGroup(x, sites)

    def fold(self, group: ReaderGroup) -> ChannelFold | str:
        """Where factors of a group's channels go, or why nowhere."""
        for layer in group.layers():
            if others := layer.sharers():
                return f"the weights of {layer.name} are shared with {others[0].op_type} {others[0].name!r}"
        walk = ChannelWalk(self.facts, self.caches)
        try:
            roots = walk.start(group.x, group.channels, group.readers)
        except Refused as reason:
            return str(reason)
        used = np.unique(roots[roots < walk.ties.pinned])
        place = np.full(walk.ties.pinned + 1, len(used))
        place[used] = np.arange(len(used))
        takers = [dataclasses.replace(t, numbers=place[walk.ties.roots(t.numbers)]) for t in walk.takers]
        return ChannelFold(place[roots], len(used), takers, walk.linear, walk.cached, walk.depth)


def rows_of(layer: Layer) -> npt.NDArray[np.float32]:
    """The weight of a MatMul or Gemm, float32 [N, K]. Don't write into it."""
    array = layer.weight.numpy().astype(np.float32, copy=False)
    return array if outputs_first(layer) else array.T


def outputs_first(layer: Layer) -> bool:
    """Whether the weight of a MatMul or Gemm is stored as [N, K]."""
    return layer.node.op_type == "Gemm" and attribute_int(layer.node, "transB", 0) == 1


def scale(group: ReaderGroup, fold: ChannelFold, factors: Numbers, facts: ShapeFacts, edit: Editor) -> str | None:
    """Multiply the channels that the readers of a group take by factors, and divide what makes them by the same.

    Args:
        group: The group.
        fold: Where its factors go.
        factors: Positive, by number, [count].
        facts: Shapes of the model.
        edit: Where the changes are made.

    Returns:
        Why nothing was done (a weight would overflow, ...), or None.
    """
    channels = fold.spread(factors)
    inverse = 1 / np.append(factors, 1.0)
    rank = facts.shape(group.x)
    changes = []
    for layer in group.layers():
        change = into_input(layer, Affine(channels, np.zeros(1)), None if rank is None else len(rank), 0)
        if isinstance(change, str):
            return change
        changes.append(change)
    constants: list[tuple[ir.Node, int, Numbers]] = []
    for taker in fold.takers:
        numbers = inverse[taker.numbers]
        made = layer_of(taker.node) if taker.index < 0 else ""
        if isinstance(made, Layer):
            shape = facts.shape(taker.node.outputs[0])
            affine = Affine(numbers, np.zeros(1), made.channel_axis)
            change = into_output(made, affine, None if shape is None else len(shape), 0)
            if isinstance(change, str):
                return change
            changes.append(change)
        elif taker.index < 0:
            constants.extend((taker.node, index, numbers) for index in (1, 2) if _given(taker.node, index))
        else:
            constants.append((taker.node, taker.index, numbers))
    scaled = [_scaled(node, index, numbers) for node, index, numbers in constants]
    if any(tensor is None for tensor in scaled):
        return "a gain or bias would overflow"
    for change in changes:
        change.apply(edit)
    for (node, index, _), tensor in zip(constants, scaled, strict=True):
        value = node.inputs[index]
        assert value is not None
        assert tensor is not None
        set_constant(value, [(node, index)], tensor, edit, "scaled")
    return None


def _given(node: ir.Node, index: int) -> bool:
    return len(node.inputs) > index and node.inputs[index] is not None


def _scaled(node: ir.Node, index: int, numbers: Numbers) -> ir.TensorProtocol | None:
    """A constant of `node` times an array that broadcasts to it, rounded once; None where that overflows."""
    value = node.inputs[index]
    array = constant_array(value)
    assert array is not None
    assert value is not None
    while numbers.ndim > max(array.ndim, 1) and numbers.shape[0] == 1:
        numbers = numbers[0]
    rounded = rounded_to(array.astype(np.float64) * numbers, ir.DataType.from_numpy(array.dtype))
    return None if rounded is None else ir.tensor(rounded, name=value.name)
