"""Elements at symbolic indices: random chains of operators that move elements, against their numbers."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import onnx_ir as ir
from exactness import random_feeds, reference_outputs
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_values import Numbers, UnknownSize
from onnx import TensorProto, helper, numpy_helper

from graphopt.analysis import element_arithmetic, element_moves  # noqa: F401
from graphopt.analysis.dims import Dim
from graphopt.analysis.elements import Elements, SameSize
from graphopt.analysis.leaves import Cases, Poly
from graphopt.analysis.shapes import lazily


class Chain:
    """A graph under construction, with the numbers that its last value has."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.array = np.zeros(shape, dtype=np.int64)
        self.last = "x"

    def constant(self, numbers: object) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(numbers, dtype=np.int64), name))
        return name

    def add(self, op: str, inputs: list[str], array: np.ndarray, **attributes: object) -> None:
        output = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [output], **attributes))
        self.last, self.array = output, array


@st.composite
def chains(draw: st.DrawFn) -> tuple[onnx.ModelProto, str]:
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=2, max_size=3)))
    chain = Chain(shape)
    named = draw(st.booleans())
    for _ in range(draw(st.integers(1, 6))):
        array, rank = chain.array, chain.array.ndim
        axis = draw(st.integers(0, rank - 1)) if rank else 0
        match draw(st.sampled_from(["t", "s", "c", "u", "q", "r", "g", "e", "l", "n", "w", "p"])):
            case "t":
                perm = draw(st.permutations(range(rank)))
                chain.add("Transpose", [chain.last], array.transpose(perm), perm=perm)
            case "s" if rank:
                start, end = draw(st.integers(-5, 5)), draw(st.integers(-5, 5))
                step = draw(st.sampled_from([1, 2, -1]))
                cut = array[(slice(None),) * axis + (slice(start, end, step),)]
                if cut.size:
                    inputs = [chain.last, *(chain.constant([n]) for n in (start, end, axis, step))]
                    chain.add("Slice", inputs, cut)
            case "c" if rank:
                other = (
                    chain.last if draw(st.booleans()) else chain.constant(np.arange(array.size).reshape(array.shape))
                )
                joined = np.concatenate([array, array], axis)
                if joined.size <= 64:
                    chain.add("Concat", draw(st.permutations([chain.last, other])), joined, axis=axis)
            case "u" if rank < 4:
                chain.add("Unsqueeze", [chain.last, chain.constant([axis])], np.expand_dims(array, axis))
            case "q" if rank > 1 and 1 in array.shape:
                axis = array.shape.index(1)
                chain.add("Squeeze", [chain.last, chain.constant([axis])], array.squeeze(axis))
            case "r":
                factors = [n for n in range(1, array.size + 1) if array.size % n == 0]
                first = draw(st.sampled_from(factors))
                target = [first, array.size // first] if draw(st.booleans()) else [array.size]
                chain.add("Reshape", [chain.last, chain.constant(target)], array.reshape(target))
            case "g" if rank:
                picks = draw(st.lists(st.integers(-array.shape[axis], array.shape[axis] - 1), min_size=1, max_size=3))
                chain.add("Gather", [chain.last, chain.constant(picks)], array.take(picks, axis), axis=axis)
            case "e":
                target = [2, *array.shape] if rank < 4 else list(array.shape)
                if array.size <= 32:
                    chain.add("Expand", [chain.last, chain.constant(target)], np.broadcast_to(array, target))
            case "l" if rank >= 2:
                shift, upper = draw(st.integers(-2, 2)), draw(st.integers(0, 1))
                chain.add("Trilu", [chain.last, chain.constant(shift)], array, upper=upper)
            case "n":
                places = list(itertools.product(*map(range, array.shape)))[:3]
                chain.add("GatherND", [chain.last, chain.constant(places)], np.zeros(len(places)))
            case "w" if rank:
                size = array.shape[axis]
                start = draw(st.integers(0, size - 1))
                place = np.stack(np.meshgrid(*[
                    np.arange(start, size) if k == axis else np.arange(n) for k, n in enumerate(array.shape)
                ], indexing="ij"), -1)  # fmt: skip
                update = chain.constant(np.full(place.shape[:-1], 7))
                chain.add("ScatterND", [chain.last, chain.constant(place), update], array)
            case "p":
                chain.add("Add", [chain.last, chain.constant(draw(st.integers(-3, 3)))], array)
    if not chain.nodes:
        chain.add("Identity", ["x"], chain.array)
    sizes = [f"d{k}" if named else n for k, n in enumerate(shape)]
    graph = helper.make_graph(
        chain.nodes, "g", [helper.make_tensor_value_info("x", TensorProto.INT64, sizes)],
        [helper.make_tensor_value_info(chain.last, TensorProto.INT64, None)], chain.constants,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return model, ",".join(map(str, shape))


@settings(max_examples=120, deadline=None)
@given(chains())
def test_elements_of_random_chains_are_true(made: tuple[onnx.ModelProto, str]) -> None:
    proto, sizes = made
    model = ir.from_proto(proto)
    elements = Elements(lazily(model))
    value = model.graph.outputs[0]
    dims = {f"d{k}": int(n) for k, n in enumerate(sizes.split(","))}
    feeds = random_feeds(model, dims=dims)
    names = [o for n in proto.graph.node for o in n.output]
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    arrays = {**feeds, **dict(zip(names, reference_outputs(ir.from_proto(proto), feeds), strict=True))}
    shape = elements.facts.shape(value)
    if shape is None:
        return
    indices = [elements.index(f"x{k}", size) for k, size in enumerate(shape)]
    element, assumed = elements.element(value, indices)
    assert isinstance(element, Cases)
    expected = arrays[value.name or ""]
    numbers = Numbers(elements, arrays)
    for size in [size for a in assumed if isinstance(a, SameSize) for size in (a.a, a.b)]:
        if any("[" not in symbol.name for symbol in size.symbols() if not symbol.op):
            return  # a size of which nothing is known
    if any(numbers.dim(a.a) != numbers.dim(a.b) for a in assumed if isinstance(a, SameSize)):
        return  # the element says nothing of this run
    for place in itertools.product(*map(range, expected.shape)):
        numbers.indices = {s: k for i, k in zip(indices, place, strict=True) for m in i.terms() for s in m}
        try:
            leaves = [leaf for guard, leaf in element.items if numbers.holds(guard)]
        except UnknownSize:
            return  # a guard compares with a size of which nothing is known
        assert len(leaves) == 1
        assert isinstance(leaves[0], Dim)
        assert not isinstance(leaves[0], Poly)
        assert numbers.dim(leaves[0]) == expected[place], (place, element)


def test_few_chains_are_opaque() -> None:
    """The rules do follow what they are for: an element of a chain is one of the input, not of the chain's end."""
    text = """<ir_version: 10, opset_import: ["": 21]> g (int64[B, 4, 6] x) => (int64[a, b, c, d] y) {
        shape = Constant <value = int64[4] {0, 4, 2, 3}> ()
        split = Reshape(x, shape)
        turned = Transpose <perm = [0, 2, 1, 3]> (split)
        ends = Constant <value = int64[1] {1}> () one = Constant <value = int64[1] {2}> ()
        axis = Constant <value = int64[1] {3}> ()
        y = Slice(turned, ends, one, axis)
    }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    elements = Elements(lazily(model))
    b, i, j = (elements.index(name, Dim.of(n)) for name, n in (("b", 5), ("i", 2), ("j", 4)))
    element, _ = elements.element(model.graph.outputs[0], (b, i, j, Dim.of(0)))
    assert isinstance(element, Cases)
    assert isinstance(element.leaf, Dim)
    (symbol,) = element.leaf.symbols()
    assert elements.reads[symbol].value.name == "x"
    assert elements.reads[symbol].indices == (b, j, i * 3 + 1)
