"""merge-siblings: layers that read one value become one layer and a Split."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analysis.algebra import is_op
from graphopt.graph.computed import concatenated
from graphopt.graph.constants import constant_array
from graphopt.graph.edits import Editor, nodes
from graphopt.passes.base import RulePass
from graphopt.passes.fold.layers import Layer, layer_of, sole_reader

OPSET = 13
_ACTIVATIONS = ("Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Relu", "Sigmoid", "Softplus", "Tanh")
_DEFAULTS: dict[str, Any] = {"auto_pad": "NOTSET", "group": 1}


@dataclasses.dataclass
class _Sibling:
    """A layer of a group, its bias (None: none), and the value that a part of the merged result will replace."""

    layer: Layer
    bias: ir.TensorProtocol | None
    output: ir.Value

    @property
    def width(self) -> int:
        return self.layer.outputs


class MergeSiblings(RulePass):
    """Compute layers that read one value as one layer, and split its result.

        [x·W₁ + b₁, …, x·Wₙ + bₙ] = Split(x·[W₁ … Wₙ] + [b₁ … bₙ])

    1. MatMuls with constant matrices (queries, keys and values; gate and up), each with or without a constant bias.
    2. Convolutions with constant weights, one group and the same kernel, strides, dilations and pads (the 1 × 1
       convolutions of an Inception block: Going Deeper with Convolutions, Szegedy et al., 2014).

    An activation that all of them go through alone is applied once, before the Split.

    Measured on ONNX Runtime 1.31 (CPU, 1 and 2 threads, median ratio of CPU time, A/A 0.92 to 1.06): merged MatMuls of
    384 to 768 channels take 0.92 to 1.06 times as long at one row and 1.07 to 1.16 from 128 rows on, because the Split
    copies what the separate ones write where it is read; of 2048 channels 0.92 to 1.06. Merged 1 × 1 convolutions take
    1.04 to 1.20. So the recipes that ship have it with `measured`, and without a target profile it does nothing there.

    **Options:** `min_inputs` (channels, default 0): merge only layers that read at least so many; `max_bytes` (bytes
    of the merged weight, default 0 for no limit); `convolutions` (default true): rule 2; `measured` (default
    false): only where the target profile prefers `packed` for the choice `siblings` at that many channels, and rule 1
    alone.

    **Needs:** opset 13; weights that nothing else reads. **Guarantees:** the same function: every output is the same
    sum of the same products. Large weights are concatenated when they are saved, one at a time.

    **Left alone, with the reason:** a weight that something else reads (a second copy would be made); a group beyond
    `max_bytes` or below `min_inputs`. A layer without siblings isn't reported.

    **When not to use it:** on the CPU without `measured`, unless `graphopt bench` shows a gain on the model.
    """

    name: ClassVar[str] = "merge-siblings"
    family: ClassVar[str] = "lower"
    paper: ClassVar[str] = "Going Deeper with Convolutions"
    anchors: ClassVar[tuple[str, ...]] = ("MatMul", "Conv")

    def __init__(
        self, min_inputs: int = 0, max_bytes: int = 0, convolutions: bool = True, measured: bool = False
    ) -> None:
        super().__init__()
        self.min_inputs, self.max_bytes, self.convolutions = min_inputs, max_bytes, convolutions
        self.measured = measured

    def prepare(self, model: ir.Model, edit: Editor) -> None:
        """Note the order of the nodes: the merged layer takes the place of the first of its group."""
        self._place = {node: number for number, node in enumerate(nodes(model))}
        self._first: dict[tuple[ir.Value, Any], ir.Node] = {}

    def rewrite(self, node: ir.Node, edit: Editor) -> bool:
        """See the class."""
        x = node.inputs[0]
        if x is None or (node.op_type == "Conv" and (self.measured or not self.convolutions)):
            return False
        geometry = _geometry(node)
        first = self._first.get((x, geometry))
        if first is not None and first is not node and first.graph is not None:
            return False  # its group was looked at there
        alike = {
            use.node: None
            for use in x.uses()
            if use.idx == 0 and use.node.graph is node.graph and is_op(use.node, node.op_type)
        }
        if len(alike) < 2 or geometry is None:
            return False
        group = sorted(
            (other for other in alike if _geometry(other) == geometry), key=lambda other: self._place.get(other, 0)
        )
        self._first[x, geometry] = group[0]
        if len(group) < 2 or group[0] is not node:
            return False
        layers = [layer for layer in map(layer_of, group) if isinstance(layer, Layer)]
        free = [layer for layer in layers if _reads_alone(layer)]
        if len(free) < 2:
            return self.left(node, f"the weights of its {len(group) - 1} siblings are read elsewhere too")
        if self.measured and self.prefers("siblings", free[0].inputs) != "packed":
            return False
        if free[0].inputs < self.min_inputs:
            return self.left(node, f"it reads {free[0].inputs} channels, and min_inputs is {self.min_inputs}")
        size = sum(layer.weight.nbytes for layer in free)
        if self.max_bytes and size > self.max_bytes:
            return self.left(node, f"the merged weight would have {size} bytes, and max_bytes is {self.max_bytes}")
        if edit.opset < OPSET:
            return self.left(node, f"needs opset {OPSET}, the model has {edit.opset}: run convert-opset first")
        edit.at(node)
        return self._merge([_sibling(layer) for layer in free], x, edit)

    def _merge(self, group: Sequence[_Sibling], x: ir.Value, edit: Editor) -> bool:
        first = group[0].layer
        convolution = first.node.op_type == "Conv"
        axis = 1 if convolution else -1
        weight = edit.constant(concatenated([s.layer.weight for s in group], 0 if convolution else 1), "merged")
        bias = _merged_bias(group, edit)
        tail = _common_activation([s.output for s in group])
        if convolution:
            attributes = {name: attribute.value for name, attribute in first.node.attributes.items()}
            value = edit.op("Conv", [x, weight, bias] if bias is not None else [x, weight], attributes)
        else:
            value = edit.op("MatMul", [x, weight])
            value = value if bias is None else edit.op("Add", [value, bias])
        outputs = [s.output for s in group]
        if tail:
            value = edit.op(tail[0].op_type, [value], {name: a.value for name, a in tail[0].attributes.items()})
            outputs = [node.outputs[0] for node in tail]
        sizes = edit.constant(np.array([s.width for s in group], dtype=np.int64), "widths")
        split = edit.op("Split", [value, sizes], {"axis": axis}, outputs=len(group), like=None).producer()
        assert split is not None
        # The records of what is replaced go with it.
        anchor, names = first.node, ", ".join(repr(s.layer.node.name) for s in group[1:])
        self.applied(anchor, f"merged with {names} to {sum(s.width for s in group)} channels")
        for old, new in zip(outputs, split.outputs, strict=True):
            new.type, new.shape = old.type, None if old.shape is None else ir.Shape(old.shape)
            edit.replace(old, new)
        return True


def _geometry(node: ir.Node) -> tuple[Any, ...] | None:
    """What layers that can be merged have in common; None for a node that isn't such a layer."""
    layer = layer_of(node)
    if isinstance(layer, str):
        return None
    dims = tuple(layer.weight.shape.numpy())
    if node.op_type == "MatMul":
        return (layer.weight.dtype, dims[0])
    found = {name: attribute.value for name, attribute in node.attributes.items()}
    found.pop("kernel_shape", None)
    ones, zeros = (1,) * (len(dims) - 2), (0,) * (2 * len(dims) - 4)
    given = {"strides": ones, "dilations": ones, "pads": zeros, **_DEFAULTS, **found}
    # A bias that isn't constant can't be merged.
    if given["group"] != 1 or (len(node.inputs) > 2 and isinstance(layer.bias(), str)):
        return None
    return (
        layer.weight.dtype,
        dims[1:],
        *(tuple(given[name]) for name in ("strides", "dilations", "pads")),
        given["auto_pad"],
    )


def _reads_alone(layer: Layer) -> bool:
    weight = layer.node.inputs[1]
    return weight is not None and len(weight.uses()) == 1 and not weight.is_graph_output()


def _sibling(layer: Layer) -> _Sibling:
    """The layer with the constant Add behind it, where that alone reads it and adds one number a channel."""
    node = layer.node
    output = node.outputs[0]
    if node.op_type == "Conv":
        given = node.inputs[2] if len(node.inputs) > 2 else None
        array = constant_array(given)
        return _Sibling(layer, None if array is None else ir.tensor(array), output)
    if sole_reader(output) is None and output.uses():
        (use,) = output.uses()
        add = use.node
        if is_op(add, "Add") and add.graph is node.graph:
            array = constant_array(add.inputs[1 - use.idx])
            if array is not None and array.shape in ((), (1,), (layer.outputs,)):
                return _Sibling(layer, ir.tensor(np.broadcast_to(array, (layer.outputs,)).copy()), add.outputs[0])
    return _Sibling(layer, None, output)


def _merged_bias(group: Sequence[_Sibling], edit: Editor) -> ir.Value | None:
    """One behind the other, 0 where a layer has none."""
    if all(s.bias is None for s in group):
        return None
    dtype = group[0].layer.weight.dtype.numpy()
    parts = [np.zeros(s.width, dtype=dtype) if s.bias is None else s.bias.numpy() for s in group]
    return edit.constant(np.concatenate(parts), "bias")


def _common_activation(outputs: Sequence[ir.Value]) -> list[ir.Node]:
    """The activations that alone read each of the values, where they are all the same; else none."""
    found: list[ir.Node] = []
    for output in outputs:
        if sole_reader(output) is not None or not output.uses():
            return []
        (use,) = output.uses()
        if not is_op(use.node, *_ACTIVATIONS) or use.node.graph is not output.graph:
            return []
        found.append(use.node)
    keys = {(node.op_type, tuple(sorted((name, a.value) for name, a in node.attributes.items()))) for node in found}
    refs = any(attribute.is_ref() for node in found for attribute in node.attributes.values())
    return found if len(keys) == 1 and not refs else []
