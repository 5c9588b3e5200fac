"""What a model costs: parameters, bytes, and floating-point operations for given sizes of the inputs.

FLOPs count a multiplication and an addition as two, as is usual for roofline estimates. Operators that only move data
(Reshape, Transpose, Gather, Concat, ...) cost none; an elementwise operator costs one for each element of its output,
a transcendental one too.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping

import onnx_ir as ir

from graphopt.analysis.dims import Dim, Symbol
from graphopt.analysis.shapes import ShapeFacts, infer
from graphopt.graph.constants import constant_tensor
from graphopt.graph.edits import walk
from graphopt.runtime_ops.operator import DOMAIN, operators

DEFAULT_SIZE = 128
IMAGE_SIZE = 224

MOVES = frozenset(
    {
        *("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity", "Constant", "Shape", "Size", "Slice"),
        *("Gather", "GatherElements", "GatherND", "Concat", "Split", "Expand", "Tile", "Pad", "ConstantOfShape"),
        *("Range", "ScatterND", "ScatterElements", "TensorScatter", "DepthToSpace", "SpaceToDepth", "Dropout"),
        *("If", "Loop", "Scan", "SequenceAt", "SequenceInsert", "SequenceConstruct", "SequenceEmpty", "NonZero"),
        *("OneHot", "Trilu", "EyeLike", "Compress", "ConcatFromSequence", "SplitToSequence", "SequenceLength"),
    }
)
"""Operators that compute nothing (the bodies of If, Loop and Scan are counted by themselves, once)."""

PER_ELEMENT = {
    "Softmax": 5, "LogSoftmax": 5, "LayerNormalization": 8, "RMSNormalization": 5, "InstanceNormalization": 8,
    "GroupNormalization": 8, "BatchNormalization": 2, "SimplifiedLayerNormalization": 5, "SkipLayerNormalization": 9,
    "SkipSimplifiedLayerNormalization": 6, "EmbedLayerNormalization": 9, "RotaryEmbedding": 3, "Gelu": 8, "FastGelu": 8,
    "BiasGelu": 9, "QuickGelu": 6, "LRN": 8, "LpNormalization": 4, "MeanVarianceNormalization": 6,
}  # fmt: skip
"""Operations for each element of the output, where it isn't one."""


@dataclasses.dataclass(frozen=True)
class NodeCost:
    """The cost of one node; None where the shapes that decide it aren't known.

    Attributes:
        node: The node.
        flops: Floating-point operations.
        output_bytes: Bytes of the outputs.
    """

    node: ir.Node
    flops: int | None
    output_bytes: int | None


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a model costs for one set of input sizes.

    Attributes:
        parameters: Elements of the constants in use, each stored tensor once.
        weight_bytes: Their bytes as stored (4-bit types take half a byte).
        nodes: Number of nodes, subgraphs and function bodies included, by operator.
        flops: Floating-point operations of one run, of the nodes whose shapes are known. The body of a Loop or Scan
            counts once, both branches of an If count.
        activation_bytes: Bytes of all intermediate tensors of one run whose shapes are known.
        unknown_flops: Nodes whose operations aren't in `flops`, because a shape isn't known.
        unknown_bytes: Values whose bytes aren't in `activation_bytes`.
        sizes: The number used for each free size.
        per_node: The nodes one by one, in the order of the graphs.
    """

    parameters: int
    weight_bytes: int
    nodes: Mapping[str, int]
    flops: int
    activation_bytes: int
    unknown_flops: int
    unknown_bytes: int
    sizes: Mapping[str, int]
    per_node: tuple[NodeCost, ...] = dataclasses.field(repr=False)

    @property
    def node_count(self) -> int:
        """Number of nodes."""
        return sum(self.nodes.values())


@dataclasses.dataclass
class Counted:
    """The FLOPs of the nodes of a model as `cost` counted them last.

    Attributes:
        sizes: The number used for each free size.
        flops: For each node what its shapes were made of (see `ShapeFacts.basis`), and its operations.
    """

    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    flops: dict[ir.Node, tuple[object, int | None]] = dataclasses.field(default_factory=dict)


def cost(
    model: ir.Model,
    facts: ShapeFacts | None = None,
    dims: Mapping[str, int] | None = None,
    *,
    activations: bool = True,
    counted: Counted | None = None,
) -> Cost:
    """Count what `model` costs.

    Args:
        model: The model.
        facts: Its shapes, where they are inferred already.
        dims: Numbers for dynamic sizes of the inputs, by their `dim_param` or by "input[axis]". Others are 1 on the
            first axis, 0 for other sizes of inputs called past... (an empty cache), 224 on the last two axes of an
            image (rank 4; 1, 3, 4 or unknown channels), and 128 elsewhere.
        activations: Count the bytes of intermediate tensors too, which takes as long as all else.
        counted: What an earlier call has counted, taken again where nothing about a node has changed; it is brought
            up to date.

    Returns:
        The cost; what can't be known is counted in `unknown_flops` and `unknown_bytes`.
    """
    # An estimate may believe the names of sizes; nothing is rewritten by it.
    facts = infer(model, believe_names=True) if facts is None else facts
    sizes = _input_sizes(model, dims or {})
    known: dict[Dim, int | None] = {}

    def lookup(symbol: Symbol) -> int | None:
        return sizes.get(symbol.name)

    def number(dim: Dim) -> int | None:
        if dim.value is not None:
            return dim.value
        if dim not in known:
            size = dim.evaluate(lookup)
            known[dim] = size if size is not None and size >= 0 else None  # below 0: the inputs don't fit the model
        return known[dim]

    def shape(value: ir.Value | None) -> list[int] | None:
        dims_of = None if value is None else facts.shape(value)
        if dims_of is None:
            return None
        result = [n for d in dims_of if (n := number(d)) is not None]
        return result if len(result) == len(dims_of) else None

    parameters, weight_bytes = _weights(model)

    before = counted.flops if counted is not None and counted.sizes == sizes else {}
    now: dict[ir.Node, tuple[object, int | None]] = {}

    def flops_of(node: ir.Node) -> int | None:
        basis = facts.basis(node)
        if counted is None or basis is None:
            return _flops(node, shape)
        earlier = before.get(node)
        now[node] = earlier if earlier is not None and earlier[0] is basis else (basis, _flops(node, shape))
        return now[node][1]

    operators: collections.Counter[str] = collections.Counter()
    per_node = []
    for graph in walk(model):
        for node in graph:
            operators[node.op_type] += 1
            per_node.append(NodeCost(node, flops_of(node), _bytes(node, shape, facts) if activations else None))
    if counted is not None:
        counted.sizes, counted.flops = sizes, now
    return Cost(
        parameters=parameters,
        weight_bytes=weight_bytes,
        nodes=dict(sorted(operators.items())),
        flops=sum(n.flops or 0 for n in per_node),
        activation_bytes=sum(n.output_bytes or 0 for n in per_node),
        unknown_flops=sum(n.flops is None for n in per_node),
        unknown_bytes=sum(n.output_bytes is None for n in per_node),
        sizes=sizes,
        per_node=tuple(per_node),
    )


def _input_sizes(model: ir.Model, given: Mapping[str, int]) -> dict[str, int]:
    sizes: dict[str, int] = dict(given)
    for value in model.graph.inputs:
        if value.shape is None:
            continue
        past = (value.name or "").startswith("past")
        channels = [d for d in value.shape if isinstance(d, int)][:1]
        image = len(value.shape) == 4 and not past and (not channels or channels[0] in (1, 3, 4))
        for axis, size in enumerate(value.shape):
            if isinstance(size, int) and size > 0:
                continue
            default = 1 if axis == 0 else 0 if past else IMAGE_SIZE if image and axis >= 2 else DEFAULT_SIZE
            name, declared = f"{value.name}[{axis}]", None if isinstance(size, int) else size.value
            if declared:
                default = sizes.setdefault(declared, given.get(name, default))
            sizes.setdefault(name, default)
    return sizes


def _weights(model: ir.Model) -> tuple[int, int]:
    """Elements and bytes of the constants in use. Tensors that share their storage count once."""
    seen: dict[object, ir.TensorProtocol] = {}
    for graph in walk(model):
        candidates = [*graph.initializers.values(), *(n.outputs[0] for n in graph if n.op_type == "Constant")]
        for value in candidates:
            tensor = constant_tensor(value) if value.uses() or value.is_graph_output() else None
            if tensor is None and value.is_initializer() and value.uses():
                tensor = value.const_value  # one that can be overridden
            if tensor is None:
                continue
            key: object = id(tensor)
            if isinstance(tensor, ir.ExternalTensor):
                key = (str(tensor.path), tensor.offset, tensor.length)
            seen[key] = tensor
    return sum(t.size for t in seen.values()), sum(t.nbytes for t in seen.values())


ShapeOf = Callable[[ir.Value | None], list[int] | None]


def _bytes(node: ir.Node, shape: ShapeOf, facts: ShapeFacts) -> int | None:
    if node.op_type == "Constant":
        return 0
    total = 0
    for value in node.outputs:
        if not (value.uses() or value.is_graph_output()):
            continue
        sizes, dtype = shape(value), facts.dtype(value)
        if sizes is None or dtype is None or dtype == ir.DataType.STRING:
            return None
        total += math.ceil(math.prod(sizes) * dtype.itemsize)
    return total


def _flops(node: ir.Node, shape: ShapeOf) -> int | None:
    if node.domain == DOMAIN and (operator := operators().get(node.op_type)) is not None:
        try:
            return operator.cost([shape(v) for v in node.inputs], operator.read(node)).flops
        except (TypeError, IndexError, KeyError, ValueError, AssertionError):  # a size that isn't known
            return None
    if node.op_type in MOVES:
        return 0
    rule = _RULES.get(node.op_type)
    try:
        if rule is not None:
            return rule(node, shape)
        output = _known(shape(node.outputs[0]))
        if node.op_type.startswith(("Reduce", "Arg", "GlobalAverage", "GlobalMax", "CumSum", "TopK")):
            output = _known(shape(node.inputs[0]))
        return math.prod(output) * PER_ELEMENT.get(node.op_type, 1)
    except (_UnknownCostError, IndexError, KeyError):
        return None


class _UnknownCostError(Exception):
    pass


def _known(sizes: list[int] | None) -> list[int]:
    if sizes is None:
        raise _UnknownCostError
    return sizes


def _matmul(node: ir.Node, shape: ShapeOf) -> int:
    return 2 * math.prod(_known(shape(node.outputs[0]))) * _known(shape(node.inputs[0]))[-1]


def _fused_matmul(node: ir.Node, shape: ShapeOf) -> int:
    inner = _known(shape(node.inputs[0]))[-2 if node.attributes.get_int("transA", 0) else -1]
    return 2 * math.prod(_known(shape(node.outputs[0]))) * inner


def _gemm(node: ir.Node, shape: ShapeOf) -> int:
    output, a = _known(shape(node.outputs[0])), _known(shape(node.inputs[0]))
    inner = a[0 if node.attributes.get_int("transA", 0) else 1]
    return 2 * math.prod(output) * inner + (math.prod(output) if len(node.inputs) > 2 else 0)


def _conv(weight: int, bias: int) -> Callable[[ir.Node, ShapeOf], int]:
    def count(node: ir.Node, shape: ShapeOf) -> int:
        output, w = math.prod(_known(shape(node.outputs[0]))), _known(shape(node.inputs[weight]))
        has_bias = len(node.inputs) > bias and node.inputs[bias] is not None
        return 2 * output * math.prod(w[1:]) + (output if has_bias else 0)

    return count


def _conv_transpose(node: ir.Node, shape: ShapeOf) -> int:
    x, w = _known(shape(node.inputs[0])), _known(shape(node.inputs[1]))
    bias = math.prod(_known(shape(node.outputs[0]))) if len(node.inputs) > 2 else 0
    return 2 * math.prod(x) * math.prod(w[1:]) + bias


def _pool(node: ir.Node, shape: ShapeOf) -> int:
    window = node.attributes["kernel_shape"].as_ints()
    return math.prod(_known(shape(node.outputs[0]))) * math.prod(window)


def _recurrent(gates: int) -> Callable[[ir.Node, ShapeOf], int]:
    def count(node: ir.Node, shape: ShapeOf) -> int:
        x, w, r = (_known(shape(node.inputs[i])) for i in range(3))
        steps, hidden = x[0] * x[1], r[-1]
        return w[0] * steps * gates * hidden * (2 * (w[-1] + hidden) + 4)

    return count


def _attention(node: ir.Node, shape: ShapeOf) -> int:
    """Scores, softmax and weighted values: 2 q t d + 5 q t + 2 q t d for each head, whatever the mask."""
    q, k, v = (_known(shape(node.inputs[i])) for i in range(3))
    if len(q) == 4:
        batch, heads, length, size = q
        new, value_size = k[2], v[3]
    else:
        heads = node.attributes["q_num_heads" if "q_num_heads" in node.attributes else "num_heads"].as_int()
        kv_heads = node.attributes.get_int("kv_num_heads", heads)
        batch, length, size, new, value_size = q[0], q[1], q[2] // heads, k[1], v[2] // kv_heads
    place = {"Attention": 4, "GroupQueryAttention": 3, "MultiHeadAttention": 6}[node.op_type]
    past = node.inputs[place] if len(node.inputs) > place else None
    total = new + (0 if past is None else _known(shape(past))[2])
    return batch * heads * length * total * (2 * size + 5 + 2 * value_size)


def _matmul_bits(node: ir.Node, shape: ShapeOf) -> int:
    return 2 * math.prod(_known(shape(node.outputs[0]))) * node.attributes["K"].as_int()


def _einsum(node: ir.Node, shape: ShapeOf) -> int:
    left = node.attributes["equation"].as_string().replace(" ", "").split("->")[0]
    if "." in left:
        raise _UnknownCostError
    sizes: dict[str, int] = {}
    for letters, value in zip(left.split(","), node.inputs, strict=True):
        for letter, size in zip(letters, _known(shape(value)), strict=True):
            sizes[letter] = max(sizes.get(letter, 1), size)
    return len(node.inputs) * math.prod(sizes.values())


_RULES: dict[str, Callable[[ir.Node, ShapeOf], int]] = {
    "MatMul": _matmul,
    "MatMulInteger": _matmul,
    "QLinearMatMul": _matmul,
    "DynamicQuantizeMatMul": _matmul,
    "MatMulIntegerToFloat": _matmul,
    "FusedMatMul": _fused_matmul,
    "MatMulNBits": _matmul_bits,
    "Gemm": _gemm,
    "Conv": _conv(1, 2),
    "ConvInteger": _conv(1, 99),
    "FusedConv": _conv(1, 2),
    "QLinearConv": _conv(3, 8),
    "ConvTranspose": _conv_transpose,
    "MaxPool": _pool,
    "AveragePool": _pool,
    "LSTM": _recurrent(4),
    "GRU": _recurrent(3),
    "RNN": _recurrent(1),
    "Attention": _attention,
    "GroupQueryAttention": _attention,
    "MultiHeadAttention": _attention,
    "Einsum": _einsum,
}
