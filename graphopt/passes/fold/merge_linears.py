"""merge-linears: two linear layers with nothing between them as one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.views import chain_above, permutation
from graphopt.graph.computed import identity, weight
from graphopt.graph.constants import constant_tensor
from graphopt.graph.edits import Editor
from graphopt.passes.fold.layers import Layer, Numbers, bias_behind, layer_of, sole_reader
from graphopt.passes.raise_.shape_rules import ShapeRulePass

_CHUNK = 1 << 20
_SMALLEST_PEAK = 2.0**-15
"""Half of float16's smallest normal number: a column whose largest weight is below it would lose bits."""


@dataclasses.dataclass(frozen=True)
class _Pair:
    """Two layers, the second reading the first, and the permutation of the axes between them, () for none."""

    first: Layer
    second: Layer
    order: tuple[int, ...]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Features that go in, between the two, and out."""
        return self.first.inputs, self.first.outputs, self.second.outputs


class MergeLinears(ShapeRulePass):
    """Multiply the weights of two linear layers in a row, so that one layer is left.

        (x·W₁ + b₁)·W₂ + b₂ = x·(W₁·W₂) + (b₁·W₂ + b₂)

    with α and β of Gemm, and its transposed weights, multiplied in. Where such pairs come from: the kernel form of
    Scalable Neural Network Kernels, whose feature maps are bundled with the layer before; Model-Based Control with
    Sparse Neural Dynamics, where an activation was removed; the value and output projections of an attention that
    became the identity (MLP Can Be A Good Transformer Learner; see `remove-identity-attention`); Deep Linear Networks.

    The rules:

    1. MatMul or Gemm, each with or without a constant bias, directly one behind the other.
    2. The same, with reshapes and transposes between them that cancel out, such as heads that are split off and merged
       again.
    3. The same, with a transpose between them that leaves the features last: it goes before the merged layer.

    **Needs:** constant weights and biases; float64, float32, float16 or bfloat16. **Guarantees:** the same function;
    the product is computed in float64 and rounded once. Large ones are computed when they are saved. No more
    operations and no more bytes than before, times `max_growth`.

    **Left alone, with the reason:** a low-rank pair (merging `in × rank` and `rank × out` costs more operations than
    it saves: factorised layers and adapters stay as they are); a value between the two that something else reads or
    that is a graph output; weights that other nodes read too, where the merged ones would be stored beside them; two
    layers in different graphs; a reshape or transpose between them that mixes the features with another axis; products
    that would overflow, or in float16 lose bits.

    **Options:** `max_growth` (ratio, default 1.0): operations, and bytes, after merging over those before; a pair above
    it stays.

    **When not to use it:** before training goes on: a product of two matrices learns otherwise than one matrix.
    """

    name: ClassVar[str] = "merge-linears"
    family: ClassVar[str] = "fold"
    paper: ClassVar[str] = "Scalable Neural Network Kernels"
    anchors: ClassVar[tuple[str, ...]] = ("MatMul", "Gemm")

    def __init__(self, max_growth: float = 1.0) -> None:
        super().__init__()
        self.max_growth = max_growth

    def rewrite(self, node: ir.Node, edit: Editor) -> bool:
        """See the class."""
        pair = self._pair(node)
        if pair is None:
            return False
        if isinstance(pair, str):
            return self.left(node, pair)
        if (why := self._slower(pair)) is not None:
            return self.left(node, why)
        bias = _bias(pair)
        if isinstance(bias, str):
            return self.left(node, bias)
        if (why := self._larger(pair, bias) or _problem(pair)) is not None:
            return self.left(node, why)
        self.applied(node, f"merged with {pair.first.name} before it: {' × '.join(map(str, pair.sizes))} features")
        self._merge(pair, bias, node, edit)
        return True

    # ---- what to merge

    def _pair(self, node: ir.Node) -> _Pair | str | None:
        """The pair that ends at `node`; a reason where there is one that can't be merged; None where there is none."""
        second = layer_of(node)
        x = node.inputs[0]
        if isinstance(second, str) or x is None:
            return None
        chain = chain_above(x)
        product = chain[0].inputs[0] if chain else x
        core = None if product is None else product.producer()
        add = None
        if core is not None and core.op_type == "Add" and core.domain == "":
            add = core
            operands = [v for v in add.inputs if constant_tensor(v) is None]
            core = operands[0].producer() if len(operands) == 1 and operands[0] is not None else None
        if core is None or core.op_type not in ("MatMul", "Gemm") or (add is not None and core.op_type == "Gemm"):
            return None
        first = layer_of(core)
        if isinstance(first, str):
            return None
        between = [*core.outputs[:1], *(add.outputs if add else ()), *(view.outputs[0] for view in chain)]
        for value in between:
            if (why := sole_reader(value)) is not None:
                return f"not merged with {first.name} before it: {why}"
        if core.graph is not node.graph:
            return f"{first.name} before it is in an outer graph"
        transposed = node.attributes.get("transA")
        if transposed is not None and transposed.value:
            return f"it transposes what {first.name} gives"
        if first.weight.dtype != second.weight.dtype or first.outputs != second.inputs or not first.outputs:
            return None  # no valid graph
        order = permutation(chain, self._facts)
        if order is None or (order and order[-1] != len(order) - 1):
            return f"the {chain[-1].op_type} between {first.name} and it mixes the features with another axis"
        if order and (core.op_type == "Gemm" or self.rank(core.outputs[0]) != len(order)):
            return f"the rank of what goes into {first.name} isn't known"
        first = dataclasses.replace(first, add=add)
        return _Pair(first, self._with_bias(second), order)

    def _with_bias(self, layer: Layer) -> Layer:
        """The layer with the Add of a constant that alone reads it, where that adds one number a column."""
        add = bias_behind(layer, sole_reader)
        ended = layer if add is None else dataclasses.replace(layer, add=add)
        return ended if self._fits(ended) else layer

    def _fits(self, layer: Layer) -> bool:
        """Whether the Add of a bias gives no more axes than the product has."""
        if layer.add is None:
            return True
        ranks = [len(tensor.shape) for v in layer.add.inputs if (tensor := constant_tensor(v)) is not None]
        return ranks[0] <= 1 or self.has_rank(layer.node.outputs[0], ranks[0])

    def _slower(self, pair: _Pair) -> str | None:
        k, m, n = pair.sizes
        ratio = k * n / max(1, m * (k + n))
        if ratio > self.max_growth:
            return f"a low-rank pair ({k} × {m} × {n}): merging would cost {ratio:.3g} times the operations"
        return None if self._fits(pair.first) else f"the rank of what {pair.first.name} gives isn't known"

    def _larger(self, pair: _Pair, bias: Numbers | None) -> str | None:
        k, _, n = pair.sizes
        inside = {pair.first.node, pair.second.node, pair.first.add, pair.second.add}
        freed = 0
        constants = dict.fromkeys(v for node in inside if node is not None for v in node.inputs if v is not None)
        for value in constants:
            tensor = constant_tensor(value)
            readers = {user for user, _ in value.uses()}
            if tensor is not None and readers <= inside and not value.is_graph_output():
                freed += tensor.nbytes
        size = pair.first.weight.dtype.itemsize * (k * n + (0 if bias is None else bias.size))
        if size > self.max_growth * freed:
            return f"other nodes read its weights or those of {pair.first.name}, so merging would store more bytes"
        return None

    # ---- merging

    def _merge(self, pair: _Pair, bias: Numbers | None, node: ir.Node, edit: Editor) -> None:
        first, second = pair.first, pair.second
        edit.at(node)
        x = first.node.inputs[0]
        assert x is not None
        if pair.order:
            x = edit.op("Transpose", [x], {"perm": list(pair.order)})
        weight = edit.constant(_merged(pair), "weight")
        rounded = None if bias is None else edit.constant(bias.astype(first.weight.dtype.numpy()), "bias")
        if "Gemm" in (first.node.op_type, second.node.op_type):
            transposed = first.node.attributes.get("transA")
            attributes = {"transA": 1} if transposed is not None and transposed.value else {}
            inputs = [x, weight] if rounded is None else [x, weight, rounded]
            new = edit.op("Gemm", inputs, attributes, like=second.output)
        else:
            new = edit.op("MatMul", [x, weight], like=second.output)
            if rounded is not None:
                new = edit.op("Add", [new, rounded], like=second.output)
        edit.replace(second.output, new)


def _bias(pair: _Pair) -> Numbers | str | None:
    """b₁·W₂ + b₂ in float64, None where there is neither, or why one of them can't be merged."""
    first, second = pair.first.bias(), pair.second.bias()
    if isinstance(first, str) or isinstance(second, str):
        return first if isinstance(first, str) else str(second)
    if not first.any() and not second.any() and _bare(pair.first) and _bare(pair.second):
        return None
    if pair.order and first.ndim == 2 and first.shape[0] > 1:
        return f"the bias of {pair.first.name} has one number a row"
    full = np.broadcast_to(first, (*first.shape[:-1], pair.first.outputs))
    total: Numbers = full @ _matrix(pair.second) + second
    with np.errstate(over="ignore"):
        finite = np.isfinite(total.astype(pair.first.weight.dtype.numpy()).astype(np.float64)).all()
    return total if finite else "the merged bias would overflow"


def _bare(layer: Layer) -> bool:
    """Whether a layer has no bias."""
    return layer.add is None and (layer.node.op_type == "MatMul" or len(layer.node.inputs) < 3)


def _problem(pair: _Pair) -> str | None:
    """Why the product can't be rounded to the type of the weights."""
    dtype = pair.first.weight.dtype
    highest = float(ml_dtypes.finfo(dtype.numpy()).max)
    if dtype != ir.DataType.FLOAT16:
        bound = _peak(pair.first) * _peak(pair.second) * pair.first.outputs
        if bound <= highest:
            return None
    peak = np.zeros(pair.second.outputs)
    for rows in _product(pair):
        if not (np.abs(rows) <= highest).all():
            return f"the product with the weights of {pair.first.name} would overflow {dtype.name.lower()}"
        peak = np.maximum(peak, np.abs(rows).max(axis=0, initial=0.0))
    if dtype == ir.DataType.FLOAT16 and ((peak > 0) & (peak < _SMALLEST_PEAK)).any():
        return f"the product with the weights of {pair.first.name} would lose precision in float16"
    return None


def _peak(layer: Layer) -> float:
    """The largest magnitude among the weights; NaN or infinite where one of them is."""
    array = layer.weight.numpy()
    with np.errstate(invalid="ignore", over="ignore"):
        lowest, highest = float(array.min(initial=0)), float(array.max(initial=0))
    return max(abs(lowest), abs(highest)) * abs(_alpha(layer)) if lowest == lowest and highest == highest else np.nan


def _alpha(layer: Layer) -> float:
    attribute = layer.node.attributes.get("alpha")
    return 1.0 if attribute is None else float(attribute.value)


def _matrix(layer: Layer) -> Numbers:
    """The weights of a layer in float64, one row for each feature that goes in, α multiplied in."""
    return _oriented(layer.weight.numpy(), layer).astype(np.float64) * _alpha(layer)


def _oriented(array: npt.NDArray[Any], layer: Layer) -> npt.NDArray[Any]:
    return array.T if _transposed(layer) else array


def _transposed(layer: Layer) -> bool:
    """Whether the weights have one row for each feature that goes out."""
    attribute = layer.node.attributes.get("transB")
    return layer.node.op_type == "Gemm" and attribute is not None and bool(attribute.value)


def _product(pair: _Pair) -> Iterator[Numbers]:
    """The rows of W₁·W₂ in float64, some at a time."""
    left, right = _oriented(pair.first.weight.numpy(), pair.first), _matrix(pair.second)
    alpha = _alpha(pair.first)
    step = max(1, _CHUNK // max(1, left.shape[1] + right.shape[1]))
    for start in range(0, len(left), step):
        with np.errstate(invalid="ignore", over="ignore"):
            yield (left[start : start + step].astype(np.float64) * alpha) @ right


def _merged(pair: _Pair) -> ir.TensorProtocol:
    """W₁·W₂ rounded to the type of the weights; a large one is computed when it is asked for."""
    dtype, shape = pair.first.weight.dtype, (pair.first.inputs, pair.second.outputs)
    # The nodes leave the graph, and others may change what they read: keep what was read now.
    frozen = _Pair(_frozen(pair.first), _frozen(pair.second), ())

    def compute() -> ir.TensorProtocol:
        result = np.empty(shape, dtype=dtype.numpy())
        start = 0
        for rows in _product(frozen):
            result[start : start + len(rows)] = rows
            start += len(rows)
        return ir.tensor(result, dtype=dtype)

    layers = (frozen.first, frozen.second)
    origin = ("product", *((identity(x.weight), _alpha(x), _transposed(x)) for x in layers))
    return weight(compute, dtype, shape, origin=origin)


def _frozen(layer: Layer) -> Layer:
    """The layer as it is now, on a node that is in no graph."""
    node = ir.node(layer.node.op_type, [], outputs=[ir.Value(name="result")])
    node.attributes.update(layer.node.attributes)
    return Layer(node, layer.weight)
