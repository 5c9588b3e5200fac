"""`merge-linears`: what is merged, proved in float64, and what is left with which reason."""

from __future__ import annotations

import itertools
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from exactness import assert_exact, op_types, random_feeds, reference_outputs
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.graph import load
from graphopt.graph.computed import origin_of
from graphopt.pass_manager import PassManager
from graphopt.passes.fold.identity_attention import RemoveIdentityAttention
from graphopt.passes.fold.merge_linears import MergeLinears
from graphopt.recipe import load as load_recipe

TYPES = {"double": np.float64, "float": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def model(
    graph: str, dtype: str = "double", functions: str = "", scale: float = 1.0, **weights: tuple[int, ...]
) -> ir.Model:
    """A model from text with random weights of the given shapes."""
    imports = ', "local" : 1' if functions else ""
    text = f'<ir_version: 10, opset_import: ["" : 21{imports}]> g {graph.replace("T[", dtype + "[")} {functions}'
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    for name, shape in weights.items():
        tensor = ir.tensor((scale * rng.normal(size=shape)).astype(TYPES[dtype]), name=name)
        proto.graph.initializer.append(ir.to_proto(tensor))
    onnx.checker.check_model(proto, full_check=True)
    return ir.from_proto(proto)


def reasons(before: ir.Model, rule: MergeLinears | None = None) -> list[str]:
    """Why nothing of `before` was merged."""
    rule = rule or MergeLinears()
    text = ir.to_proto(before).SerializeToString(deterministic=True)
    assert not rule(before).modified
    assert ir.to_proto(before).SerializeToString(deterministic=True) == text
    return [site.detail for site in rule.sites]


W = {"w": (5, 6), "v": (6, 4)}
CASES: dict[str, tuple[str, dict[str, tuple[int, ...]], list[str]]] = {
    "two products": ("(T[N,3,5] x) => (T[N,3,4] y) { h = MatMul(x, w)  y = MatMul(h, v) }", W, ["MatMul"]),
    "both biases": (
        "(T[N,3,5] x) => (T[N,3,4] y) { h = MatMul(x, w)  i = Add(b, h)  j = MatMul(i, v)  y = Add(j, c) }",
        {**W, "b": (6,), "c": (1, 4)},
        ["MatMul", "Add"],
    ),
    "the first bias alone": (
        "(T[N,3,5] x) => (T[N,3,4] y) { h = MatMul(x, w)  i = Add(h, b)  y = MatMul(i, v) }",
        {**W, "b": (1,)},
        ["MatMul", "Add"],
    ),
    "the second bias alone": (
        "(T[5] x) => (T[4] y) { h = MatMul(x, w)  i = MatMul(h, v)  y = Add(i, c) }",
        {**W, "c": (4,)},
        ["MatMul", "Add"],
    ),
    "a bias for each row": (
        "(T[3,5] x) => (T[3,4] y) { h = MatMul(x, w)  i = Add(h, b)  y = MatMul(i, v) }",
        {**W, "b": (3, 6)},
        ["MatMul", "Add"],
    ),
    "a bias that widens stays": (
        "(T[N,3,5] x) => (T[N,3,4] y) { h = MatMul(x, w)  i = MatMul(h, v)  y = Add(i, c) }",
        {**W, "c": (3, 4)},
        ["MatMul", "Add"],
    ),
    "three in a row": (
        "(T[N,5] x) => (T[N,3] y) { h = MatMul(x, w)  i = Add(h, b)  j = MatMul(i, v)  k = Add(j, c)  y = MatMul(k, u) }",
        {**W, "b": (6,), "c": (4,), "u": (4, 3)},
        ["MatMul", "Add"],
    ),
    "gemm": (
        "(T[5,N] x) => (T[N,4] y) { h = Gemm<transA=1, transB=1, alpha=0.5, beta=2.0>(x, w, b)  "
        "y = Gemm<transB=1, alpha=3.0>(h, v, c) }",
        {"w": (6, 5), "v": (4, 6), "b": (6,), "c": ()},
        ["Gemm"],
    ),
    "gemm without bias": ("(T[N,5] x) => (T[N,4] y) { h = Gemm(x, w)  y = Gemm<alpha=3.0>(h, v) }", W, ["Gemm"]),
    "matmul, then gemm": (
        "(T[N,5] x) => (T[N,4] y) { h = MatMul(x, w)  i = Add(h, b)  y = Gemm(i, v) }",
        {**W, "b": (6,)},
        ["Gemm"],
    ),
    "gemm, then matmul": (
        "(T[N,5] x) => (T[N,4] y) { h = Gemm<beta=0.5>(x, w, b)  i = MatMul(h, v)  y = Add(i, c) }",
        {**W, "b": (1, 6), "c": (4,)},
        ["Gemm"],
    ),
    "heads split and merged": (
        "(T[N,3,5] x) => (T[N,3,4] y) { h = MatMul(x, w)  s = Constant<value_ints = [0, 3, 2, 3]>()  r = Reshape(h, s) "
        "t = Transpose<perm = [0, 2, 1, 3]>(r)  u = Transpose<perm = [0, 2, 1, 3]>(t)  m = Constant<value_ints = [0, 3, 6]>() "
        "i = Reshape(u, m)  y = MatMul(i, v) }",
        W,
        ["MatMul"],
    ),
    "a transpose of the rest": (
        "(T[N,3,5] x) => (T[3,N,4] y) { h = MatMul(x, w)  i = Add(h, b)  t = Transpose<perm = [1, 0, 2]>(i)  y = MatMul(t, v) }",
        {**W, "b": (6,)},
        ["Transpose", "MatMul", "Add"],
    ),
    "as small": (
        "(T[N,4] x) => (T[N,4] y) { h = MatMul(x, w)  y = MatMul(h, v) }",
        {"w": (4, 2), "v": (2, 4)},
        ["MatMul"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_merged(case: str) -> None:
    graph, weights, expected = CASES[case]
    assert op_types(assert_exact(model(graph, **weights), MergeLinears(), dims={"N": 2})) == expected


LEFT: dict[str, tuple[str, dict[str, tuple[int, ...]], list[str]]] = {
    "low rank": (
        "(T[N,8] x) => (T[N,8] y) { h = MatMul(x, w)  y = MatMul(h, v) }",
        {"w": (8, 2), "v": (2, 8)},
        ["a low-rank pair (8 × 2 × 8): merging would cost 2 times the operations"],
    ),
    "read elsewhere": (
        "(T[N,5] x) => (T[N,4] y, T[N,6] z) { h = MatMul(x, w)  y = MatMul(h, v)  z = Relu(h) }",
        W,
        ["not merged with MatMul '' before it: 'h' is read by 2 nodes"],
    ),
    "a graph output": (
        "(T[N,5] x) => (T[N,4] y, T[N,6] h) { h = MatMul(x, w)  y = MatMul(h, v) }",
        W,
        ["not merged with MatMul '' before it: 'h' is a graph output"],
    ),
    "shared weights": (
        "(T[N,8] x, T[N,8] k) => (T[N,4] y, T[N,6] z) { h = MatMul(x, w)  y = MatMul(h, v)  z = MatMul(k, w) }",
        {"w": (8, 6), "v": (6, 4)},
        ["*more bytes"],
    ),
    "mixed": (
        "(T[N,6,5] x) => (T[N,6,4] y) { h = MatMul(x, w)  t = Transpose<perm = [0, 2, 1]>(h)  y = MatMul(t, v) }",
        W,
        ["*mixes the features"],
    ),
    "another shape": (
        "(T[N,5] x) => (T[2,3,4] y) { h = MatMul(x, w)  s = Constant<value_ints = [2, 3, 6]>()  t = Reshape(h, s)  "
        "y = MatMul(t, v) }",
        W,
        ["*mixes the features"],
    ),
    "transposed by the second": (
        "(T[6,5] x) => (T[6,4] y) { h = Gemm(x, w)  y = Gemm<transA = 1>(h, v) }",
        W,
        ["it transposes what Gemm '' gives"],
    ),
    "an activation between": ("(T[N,5] x) => (T[N,4] y) { h = MatMul(x, w)  r = Relu(h)  y = MatMul(r, v) }", W, []),
    "weights that are an input": (
        "(T[N,5] x, T[6,4] v) => (T[N,4] y) { h = MatMul(x, w)  y = MatMul(h, v) }",
        {"w": (5, 6)},
        [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT)
def test_left(case: str) -> None:
    graph, weights, expected = LEFT[case]
    found = reasons(model(graph, **weights))
    assert len(found) == len(expected)
    for got, want in zip(found, expected, strict=True):
        assert got == want if not want.startswith("*") else want[1:] in got


def test_growth_is_an_option() -> None:
    graph, weights, _ = LEFT["low rank"]
    assert op_types(assert_exact(model(graph, **weights), MergeLinears(max_growth=2.0), dims={"N": 2})) == ["MatMul"]


def test_a_bias_that_adds_an_axis_needs_the_rank() -> None:
    before = model("(T[5] x) => (T[1,4] y) { h = MatMul(x, w)  i = Add(h, b)  y = MatMul(i, v) }", **W, b=(1, 6))
    assert reasons(before) == ["the rank of what MatMul '' gives isn't known"]


def test_float16_overflow_and_underflow() -> None:
    graph = "(T[N,5] x) => (T[N,4] y) { h = MatMul(x, w)  y = MatMul(h, v) }"
    assert "overflow float16" in reasons(model(graph, "float16", scale=300.0, **W))[0]
    assert "lose precision" in reasons(model(graph, "float16", scale=1e-3, **W))[0]
    before = model(graph, "float16", **W)
    after = before.clone()
    assert MergeLinears()(after).modified
    feeds = random_feeds(before, dims={"N": 2})
    (expected,), (got,) = reference_outputs(before, feeds), reference_outputs(after, feeds)
    np.testing.assert_allclose(got.astype(np.float32), expected.astype(np.float32), atol=0.05)
    assert got.dtype == np.float16


def test_bfloat16_is_rounded_once() -> None:
    before = model("(T[N,5] x) => (T[N,4] y) { h = MatMul(x, w)  y = MatMul(h, v) }", "bfloat16", **W)
    w, v = (before.graph.initializers[n].const_value.numpy().astype(np.float64) for n in "wv")
    MergeLinears()(before)
    (weight,) = before.graph.initializers.values()
    np.testing.assert_array_equal(weight.const_value.numpy(), (w @ v).astype(ml_dtypes.bfloat16))


def test_in_a_branch_and_in_a_function() -> None:
    before = model(
        "(bool k, T[N,5] x) => (T[N,4] y) { y = If (k) <then_branch = t () => (T[N,4] a) { h = MatMul(x, w)  "
        "a = MatMul(h, v) }, else_branch = e () => (T[N,4] b) { h2 = MatMul(x, w2)  b = MatMul(h2, v2) }> }",
        w=(5, 6), v=(6, 4), w2=(5, 6), v2=(6, 4),
    )  # fmt: skip
    after = assert_exact(before, MergeLinears(), dims={"N": 2})
    assert [n.op_type for g in after.graph.subgraphs() for n in g] == ["MatMul", "MatMul"]
    before = model(
        "(T[N,2] x) => (T[N,2] y) { y = local.f(x) }",
        functions='<domain: "local", opset_import: ["" : 21]> f (x) => (y) { w = Constant<value = double[2,2] {1,2,3,4}>() '
        "h = MatMul(x, w)  y = MatMul(h, w) }",
    )
    after = assert_exact(before, MergeLinears(), dims={"N": 2})
    (function,) = after.functions.values()
    assert [n.op_type for n in function] == ["Constant", "MatMul"]


def test_shared_weights_are_merged_where_the_product_is_smaller() -> None:
    before = model(
        "(T[N,5] x, T[N,5] k) => (T[N,4] y, T[N,6] z) { h = MatMul(x, w)  y = MatMul(h, v)  z = MatMul(k, w) }", **W
    )
    assert op_types(assert_exact(before, MergeLinears(), dims={"N": 2})) == ["MatMul", "MatMul"]


def test_across_graphs_it_is_left() -> None:
    before = model(
        "(bool k, T[N,5] x) => (T[N,4] y) { h = MatMul(x, w)  y = If (k) <then_branch = t () => (T[N,4] a) "
        "{ a = MatMul(h, v) }, else_branch = e () => (T[N,4] b) { b = MatMul(x, u) }> }",
        **W, u=(5, 4),
    )  # fmt: skip
    assert reasons(before) == ["MatMul '' before it is in an outer graph"]


def test_a_large_product_is_computed_later_and_equal_ones_are_known() -> None:
    before = model(
        "(T[N,600] x) => (T[N,500] y, T[N,500] z) { h = MatMul(x, w)  y = MatMul(h, v)  i = MatMul(x, w2)  z = MatMul(i, v2) }",
        "float", w=(600, 550), v=(550, 500), w2=(600, 550), v2=(550, 500),
    )  # fmt: skip
    for name in "wv":
        before.graph.initializers[name + "2"].const_value = before.graph.initializers[name].const_value
    w, v = (before.graph.initializers[n].const_value.numpy() for n in "wv")
    MergeLinears()(before)
    tensors = [value.const_value for value in before.graph.initializers.values()]
    assert all(isinstance(tensor, ir.LazyTensor) for tensor in tensors)
    assert origin_of(tensors[0]) == origin_of(tensors[1])
    np.testing.assert_array_equal(tensors[0].numpy(), (w.astype(np.float64) @ v.astype(np.float64)).astype(np.float32))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=3, max_size=5),
    biases=st.lists(st.sampled_from([None, "one", "column"]), min_size=4, max_size=4),
    gemm=st.lists(st.booleans(), min_size=4, max_size=4),
)
def test_any_stack_of_linears_never_grows(sizes: list[int], biases: list[str | None], gemm: list[bool]) -> None:
    rng = np.random.default_rng(0)
    nodes, constants, value = [], {}, "x"
    for i, (k, n) in enumerate(itertools.pairwise(sizes)):
        constants[f"w{i}"] = rng.normal(size=(k, n))
        if biases[i]:
            constants[f"b{i}"] = rng.normal(size=1 if biases[i] == "one" else n)
        bias = [f"b{i}"] if biases[i] else []
        if gemm[i]:
            nodes.append(onnx.helper.make_node("Gemm", [value, f"w{i}", *bias], [f"h{i}"]))
        else:
            nodes.append(onnx.helper.make_node("MatMul", [value, f"w{i}"], [f"m{i}" if bias else f"h{i}"]))
            nodes += [onnx.helper.make_node("Add", [f"m{i}", *bias], [f"h{i}"])] if bias else []
        value = f"h{i}"
    double = onnx.TensorProto.DOUBLE
    graph = onnx.helper.make_graph(
        nodes, "g", [onnx.helper.make_tensor_value_info("x", double, [3, sizes[0]])],
        [onnx.helper.make_tensor_value_info(value, double, [3, sizes[-1]])],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )  # fmt: skip
    before = ir.from_proto(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    )
    after = assert_exact(before, MergeLinears(), seeds=1, rtol=1e-11)
    size = [sum(v.const_value.nbytes for v in m.graph.initializers.values()) for m in (before, after)]
    assert size[1] <= size[0]
    assert len(op_types(after)) <= len(op_types(before))


@pytest.mark.export
@pytest.mark.parametrize("dynamo", [True, False])
def test_values_and_output_of_an_identity_attention(dynamo: bool, tmp_path: Path) -> None:
    """Values, heads split off and merged again, output: one linear layer once the attention between them is gone."""
    torch = pytest.importorskip("torch")

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.LayerNorm(32)
            self.q, self.k, self.v, self.o = (torch.nn.Linear(32, 32) for _ in range(4))
            self.register_buffer("eye", torch.eye(7, dtype=torch.bool))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            n = self.norm(x)
            q, k, v = (f(n).view(x.shape[0], -1, 4, 8).transpose(1, 2) for f in (self.q, self.k, self.v))
            y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.eye)
            return x + self.o(y.transpose(1, 2).reshape(x.shape[0], -1, 32))

    path = tmp_path / "block.onnx"
    shapes = (
        {"dynamic_shapes": {"x": {0: "batch"}}}
        if dynamo
        else {"input_names": ["x"], "dynamic_axes": {"x": {0: "batch"}}}
    )
    torch.onnx.export(Block().eval(), (torch.randn(2, 7, 32),), str(path), dynamo=dynamo, opset_version=18, **shapes)
    model = load(path)
    passes = load_recipe().passes()
    at = next(i for i, p in enumerate(passes) if getattr(p, "name", "") == "fold-batch-norm")
    report = PassManager([*passes[:at], RemoveIdentityAttention(), MergeLinears(), *passes[at:]])(model)
    assert op_types(model).count("MatMul") == 1
    assert "Softmax" not in op_types(model)
    assert report.verdict is not None
    assert report.verdict.ok
