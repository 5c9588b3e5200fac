"""`merge-parallel-convs`: convolutions side by side as one, proved in float64, and what is left with which reason."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from exactness import assert_exact, op_types, random_feeds, reference_outputs
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from graphopt.passes.fold.batch_norm import FoldBatchNorm
from graphopt.passes.fold.merge_parallel_convs import MergeParallelConvs

ANY = 1e9


def model(
    graph: str, dtype: str = "double", opset: int = 21, functions: str = "", **weights: tuple[int, ...]
) -> ir.Model:
    """A model from text with random weights of the given shapes; `v...`, a variance, is positive."""
    imports = ', "local" : 1' if functions else ""
    text = f'<ir_version: 10, opset_import: ["" : {opset}{imports}]> g {graph.replace("T[", dtype + "[")} {functions}'
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    for name, shape in weights.items():
        array = rng.uniform(0.5, 2, shape) if name.startswith("v") else rng.normal(size=shape)
        types = {"double": np.float64, "float": np.float32, "float16": np.float16}
        proto.graph.initializer.append(ir.to_proto(ir.tensor(array.astype(types[dtype]), name=name)))
    onnx.checker.check_model(proto, full_check=True)
    return ir.from_proto(proto)


DIMS = {"N": 2, "H": 7, "W": 6, "D": 5}


def merge(before: ir.Model, expected: list[str], growth: float = 1.0, any_width: bool = False) -> ir.Model:
    after = assert_exact(before, MergeParallelConvs(growth, any_width), dims=DIMS)
    assert op_types(after) == expected
    return after


def reasons(m: ir.Model, growth: float = 1.0) -> list[str]:
    """Why the sites of `m` are left; `m` stays as it was."""
    before = ir.to_proto(m).SerializeToString(deterministic=True)
    rule = MergeParallelConvs(growth)
    assert not rule(m).modified
    assert ir.to_proto(m).SerializeToString(deterministic=True) == before
    assert all(site.outcome == "left" for site in rule.sites)
    return [site.detail for site in rule.sites]


def reason(m: ir.Model, growth: float = 1.0) -> str:
    (only,) = reasons(m, growth)
    return only


# ---- convolutions of one value that are added: the graph, the weights, the operators after

IMAGE = "(T[N,6,H,W] x) => (T[N,6,P,Q] y)"
BN = "BatchNormalization(x, g, b, m, v)"
STATISTICS = {"g": (6,), "b": (6,), "m": (6,), "v": (6,)}
ADDED: dict[str, tuple[str, dict[str, tuple[int, ...]], list[str]]] = {
    "3x3 and 1x1": (
        f"{IMAGE} {{ p = Conv<pads=[1,1,1,1]>(x, a, c)  q = Conv(x, d, e)  y = Add(p, q) }}",
        {"a": (6, 6, 3, 3), "c": (6,), "d": (6, 6, 1, 1), "e": (6,)}, ["Conv"],
    ),
    "RepVGG": (
        f"{IMAGE} {{ p = Conv<pads=[1,1,1,1]>(x, a, c)  q = Conv(x, d)  r = {BN}  s = Add(q, r)  t = Add(s, p)  y = Relu(t) }}",
        {"a": (6, 6, 3, 3), "c": (6,), "d": (6, 6, 1, 1), **STATISTICS}, ["Conv", "Relu"],
    ),
    "RepVGG with stride": (
        "(T[N,6,H,W] x) => (T[N,8,P,Q] y) { p = Conv<pads=[1,1,1,1], strides=[2,2]>(x, a)  q = Conv<strides=[2,2]>(x, d, e)  y = Add(p, q) }",
        {"a": (8, 6, 3, 3), "d": (8, 6, 1, 1), "e": (8,)}, ["Conv"],
    ),
    "RepVGG in groups": (
        f"{IMAGE} {{ p = Conv<pads=[1,1,1,1], group=2>(x, a)  q = Conv<group=2>(x, d)  r = Add(p, q)  y = Add(x, r) }}",
        {"a": (6, 3, 3, 3), "d": (6, 3, 1, 1)}, ["Conv"],
    ),
    "ACNet": (
        f"{IMAGE} {{ p = Conv<pads=[1,1,1,1]>(x, a)  q = Conv<pads=[0,1,0,1]>(x, d)  r = Conv<pads=[1,0,1,0]>(x, e)  y = Sum(p, q, r) }}",
        {"a": (6, 6, 3, 3), "d": (6, 6, 1, 3), "e": (6, 6, 3, 1)}, ["Conv"],
    ),
    "depthwise 7x7 and 3x3": (
        f"{IMAGE} {{ p = Conv<pads=[3,3,3,3], group=6>(x, a)  q = Conv<pads=[1,1,1,1], group=6>(x, d)  y = Add(p, q) }}",
        {"a": (6, 1, 7, 7), "d": (6, 1, 3, 3)}, ["Conv"],
    ),
    "dilated inside": (
        f"{IMAGE} {{ p = Conv<pads=[2,2,2,2]>(x, a)  q = Conv<pads=[2,2,2,2], dilations=[2,2]>(x, d)  y = Add(p, q) }}",
        {"a": (6, 6, 5, 5), "d": (6, 6, 3, 3)}, ["Conv"],
    ),
    "dilated both": (
        f"{IMAGE} {{ p = Conv<pads=[2,4,2,4], dilations=[2,4]>(x, a)  q = Conv(x, d)  y = Add(p, q) }}",
        {"a": (6, 6, 3, 3), "d": (6, 6, 1, 1)}, ["Conv"],
    ),
    "causal and identity": (
        "(T[N,6,W] x) => (T[N,6,W] y) { p = Conv<pads=[2,0], group=6>(x, a, c)  y = Add(p, x) }",
        {"a": (6, 1, 3), "c": (6,)}, ["Conv"],
    ),
    "same": (
        f'{IMAGE} {{ p = Conv<auto_pad="SAME_UPPER">(x, a)  q = Conv<auto_pad="SAME_UPPER">(x, d)  y = Add(p, q) }}',
        {"a": (6, 6, 3, 2), "d": (6, 6, 1, 1)}, ["Conv"],
    ),
    "without padding, one of them cropped": (
        f"{IMAGE} {{ p = Conv<pads=[0,0,0,0]>(x, a)  q = Conv<pads=[0,0,0,0]>(x, d)  y = Add(p, q) }}",
        {"a": (6, 6, 3, 3), "d": (6, 6, 3, 3)}, ["Conv"],
    ),
    "scaled identity": (
        f"{IMAGE} {{ p = Conv<pads=[1,1,1,1]>(x, a)  q = Mul(s, x)  y = Add(q, p) }}",
        {"a": (6, 6, 3, 3), "s": (6, 1, 1)}, ["Conv"],
    ),
    "divided identity": (
        f"{IMAGE} {{ p = Conv<pads=[1,1,1,1]>(x, a)  q = Div(x, s)  y = Add(q, p) }}",
        {"a": (6, 6, 3, 3), "s": (1,)}, ["Conv"],
    ),
    "a residual stays": (
        "(T[N,6,H,W] x, T[N,6,H,W] z) => (T[N,6,H,W] y) { p = Conv<pads=[1,1,1,1]>(x, a)  q = Add(p, z)  r = Conv(x, d)  s = Relu(z)  y = Sum(q, r, s) }",
        {"a": (6, 6, 3, 3), "d": (6, 6, 1, 1)}, ["Relu", "Conv", "Add", "Add"],
    ),
    "a constant stays": (
        f"{IMAGE} {{ p = Conv<pads=[1,1,1,1]>(x, a)  q = Add(p, s)  r = Conv(x, d)  y = Add(q, r) }}",
        {"a": (6, 6, 3, 3), "d": (6, 6, 1, 1), "s": (6, 1, 1)}, ["Conv", "Add"],
    ),
    "volumes": (
        "(T[N,4,D,H,W] x) => (T[N,4,D,H,W] y) { p = Conv<pads=[1,1,1,1,1,1]>(x, a)  q = Conv(x, d)  r = Add(p, q)  y = Add(r, x) }",
        {"a": (4, 4, 3, 3, 3), "d": (4, 4, 1, 1, 1)}, ["Conv"],
    ),
    "two inputs": (
        "(T[N,6,H,W] x, T[N,6,H,W] z) => (T[N,6,H,W] y) { p = Conv(x, a)  q = Conv(z, d)  r = Conv(x, e)  s = Conv(z, f)  y = Sum(p, q, r, s) }",
        {"a": (6, 6, 1, 1), "d": (6, 6, 1, 1), "e": (6, 6, 1, 1), "f": (6, 6, 1, 1)}, ["Conv", "Conv", "Add"],
    ),
    "the costly one stays": (
        f"{IMAGE} {{ p = Conv<pads=[1,1,1,1]>(x, a)  q = Conv(x, d)  r = Conv<pads=[2,2,2,2], group=6>(x, e)  y = Sum(p, q, r) }}",
        {"a": (6, 6, 3, 3), "d": (6, 6, 1, 1), "e": (6, 1, 5, 5)}, ["Conv", "Conv", "Add"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ADDED)
def test_added(case: str) -> None:
    graph, weights, expected = ADDED[case]
    merge(model(graph, **weights), expected)


def test_a_repvgg_block_after_its_norms_are_folded() -> None:
    m = model(
        f"""{IMAGE} {{ i = Conv<pads=[1,1,1,1]>(x, a)  p = BatchNormalization(i, g, b, m, v)
        j = Conv(x, d)  q = BatchNormalization(j, g, b, m, v)  r = {BN}
        s = Add(p, q)  t = Add(s, r)  y = Relu(t) }}""",
        a=(6, 6, 3, 3), d=(6, 6, 1, 1), **STATISTICS,
    )  # fmt: skip

    class Both(ir.passes.InPlacePass):
        def call(self, model: ir.Model) -> ir.passes.PassResult:
            changed = FoldBatchNorm()(model).modified
            return ir.passes.PassResult(model, MergeParallelConvs()(model).modified or changed)

    assert op_types(assert_exact(m, Both(), dims=DIMS)) == ["Conv", "Relu"]


def test_asymmetric_padding_with_stride_needs_the_size() -> None:
    """Padding (0, 1) as TensorFlow writes it: as large as a pointwise one for even sizes only."""
    text = "(T[N,6,{0}] x) => (T[N,6,P,Q] y) {{ p = Conv<pads=[0,0,1,1], strides=[2,2]>(x, a)  q = Conv<strides=[2,2]>(x, d)  y = Add(p, q) }}"
    weights = {"a": (6, 6, 3, 3), "d": (6, 6, 1, 1)}
    merge(model(text.format("8,4"), **weights), ["Conv"])
    assert "sizes do for some size of the input" in reason(model(text.format("H,W"), **weights))


LEFT: dict[str, tuple[str, dict[str, tuple[int, ...]], str]] = {
    "pointwise and depthwise": (
        f"{IMAGE} {{ p = Conv<pads=[1,1,1,1], group=6>(x, a)  q = Conv(x, d)  y = Add(p, q) }}",
        {"a": (6, 1, 3, 3), "d": (6, 6, 1, 1)}, "3.6 times the operations",
    ),
    "a row and a column": (
        f"{IMAGE} {{ p = Conv<pads=[0,3,0,3]>(x, a)  q = Conv<pads=[3,0,3,0]>(x, d)  y = Add(p, q) }}",
        {"a": (6, 6, 1, 7), "d": (6, 6, 7, 1)}, "3.5 times the operations",
    ),
    "read elsewhere": (
        "(T[N,6,H,W] x) => (T[N,6,P,Q] y, T[N,6,P,Q] p) { p = Conv<pads=[1,1,1,1]>(x, a)  q = Conv(x, d)  y = Add(p, q) }",
        {"a": (6, 6, 3, 3), "d": (6, 6, 1, 1)}, "'p' is a graph output",
    ),
    "strides": (
        "(T[N,6,1,1] x) => (T[N,6,1,1] y) { p = Conv<strides=[2,2]>(x, a)  q = Conv(x, d)  y = Add(p, q) }",
        {"a": (6, 6, 1, 1), "d": (6, 6, 1, 1)}, "their strides differ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT)
def test_left(case: str) -> None:
    graph, weights, words = LEFT[case]
    assert words in reason(model(graph, **weights))


def test_what_is_no_site() -> None:
    weights = {"a": (6, 6, 3, 3), "d": (6, 6, 1, 1)}
    for text in (
        # a residual unit: the convolutions read different values
        f"{IMAGE} {{ p = Conv<pads=[1,1,1,1]>(x, a)  q = Relu(p)  r = Conv(q, d)  y = Add(r, x) }}",
        f"{IMAGE} {{ p = Conv<pads=[1,1,1,1]>(x, a)  q = Relu(p)  s = Relu(x)  r = Conv(s, d)  y = Add(r, q) }}",
    ):
        rule = MergeParallelConvs()
        assert not rule(model(text, **weights)).modified
        assert rule.sites == []


def test_overridable_weights() -> None:
    m = model(
        "(T[N,6,H,W] x, T[6,6,1,1] d) => (T[N,6,H,W] y) { p = Conv<pads=[1,1,1,1]>(x, a)  q = Conv(x, d)  y = Add(p, q) }",
        a=(6, 6, 3, 3),
    )
    m.graph.initializers["d"] = m.graph.inputs[1]
    m.graph.inputs[1].const_value = ir.tensor(np.ones((6, 6, 1, 1)), name="d")
    assert "aren't constant" in reason(m)


@pytest.mark.parametrize(("dtype", "atol"), [("float", 1e-5), ("float16", 2e-2)])
def test_types(dtype: str, atol: float) -> None:
    graph, weights, _ = ADDED["RepVGG"]
    m = model(graph, dtype=dtype, **weights)
    feeds = random_feeds(m, 0, DIMS)
    before = reference_outputs(m, feeds)[0]
    assert MergeParallelConvs()(m).modified
    after = reference_outputs(m, feeds)[0]
    assert after.dtype == before.dtype
    np.testing.assert_allclose(after.astype(float), before.astype(float), atol=atol * np.abs(before).max())


def test_in_a_branch() -> None:
    m = model(
        """(bool c, T[N,6,H,W] x) => (T[N,6,H,W] y) {
        y = If (c) <then_branch = t () => (T[N,6,H,W] o) { p = Conv<pads=[1,1,1,1]>(x, a)  q = Conv(x, d)  o = Add(p, q) },
                    else_branch = e () => (T[N,6,H,W] n) { n = Relu(x) }> }""",
        a=(6, 6, 3, 3), d=(6, 6, 1, 1),
    )  # fmt: skip
    after = assert_exact(m, MergeParallelConvs(), feeds={**random_feeds(m, 0, DIMS), "c": np.array(True)})
    assert [n.op_type for g in after.graph.subgraphs() for n in g] == ["Conv", "Relu"]


def test_in_a_function() -> None:
    m = model(
        "(T[N,2,H,W] x) => (T[N,2,H,W] y) { y = local.f(x) }",
        functions="""<domain: "local", opset_import: ["" : 21]> f (x) => (y) {
            a = Constant<value = double[2,2,1,3] {1.0,2.0,3.0,4.0,5.0,6.0,7.0,8.0,9.0,10.0,11.0,12.0}>()
            d = Constant<value = double[2,2,1,1] {1.0,2.0,3.0,4.0}>()
            p = Conv<pads=[0,1,0,1]>(x, a)  q = Conv(x, d)  r = Add(p, q)  y = Add(r, x) }""",
    )
    after = assert_exact(m, MergeParallelConvs(), dims=DIMS)
    (function,) = after.functions.values()
    assert [n.op_type for n in function if n.op_type != "Constant"] == ["Conv"]


AXIS = st.tuples(*[st.integers(1, 4), st.integers(1, 2), st.integers(0, 4), st.integers(0, 4)] * 2, st.integers(1, 2))


@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    axes=st.lists(AXIS, min_size=1, max_size=2),
    groups=st.tuples(st.sampled_from([1, 2, 3, 6]), st.sampled_from([1, 2, 3, 6])),
    identity=st.booleans(),
    known=st.booleans(),
)
def test_any_geometry(axes: list[tuple[int, ...]], groups: tuple[int, int], identity: bool, known: bool) -> None:
    """Whatever is added up is equal, whatever the kernels, dilations, paddings, strides and groups."""
    k, d, b, e, j, f, c, g, s = zip(*axes, strict=True)
    size = 7
    outputs = [
        [(size + p + q - r * (m - 1) - 1) // t + 1 for m, r, p, q, t in zip(*a, s, strict=True)]
        for a in ((k, d, b, e), (j, f, c, g))
    ]
    assume(outputs[0] == outputs[1] and min(outputs[0]) > 0)
    assume(not identity or outputs[0] == [size] * len(axes))

    def attributes(dilations: tuple[int, ...], pads: tuple[int, ...], group: int) -> str:
        return f"strides={list(s)}, dilations={list(dilations)}, pads={list(pads)}, group={group}"

    x = ",".join(map(str, (2, 6, *([size] * len(axes) if known else "HW"[: len(axes)]))))
    terms = "Sum(p, q, x)" if identity else "Add(p, q)"
    m = model(
        f"(T[{x}] x) => (T[{','.join('NMPQ'[: len(axes) + 2])}] y) {{ p = Conv<{attributes(d, (*b, *e), groups[0])}>(x, a, z)"
        f"  q = Conv<{attributes(f, (*c, *g), groups[1])}>(x, h)  y = {terms} }}",
        a=(6, 6 // groups[0], *k), z=(6,), h=(6, 6 // groups[1], *j),
    )  # fmt: skip
    after = assert_exact(m, MergeParallelConvs(ANY), seeds=1, dims={"H": size, "W": size})
    if known and not identity:
        assert op_types(after) == ["Conv"]


# ---- equal branches


def resnext(
    branches: int, end: str, activation: str = "Relu({0})", bias: bool = True, dtype: str = "double"
) -> ir.Model:
    """`branches` times 1x1, 3x3, 1x1 with activations, then added one by one, by one Sum, or concatenated."""
    lines, weights, last = [], {}, []
    for i in range(branches):
        b = f", e{i}" if bias else ""
        lines += [
            f"p{i} = Conv(x, a{i}{b})  q{i} = {activation.format(f'p{i}')}",
            f"r{i} = Conv<pads=[1,1,1,1]>(q{i}, c{i})  s{i} = {activation.format(f'r{i}')}",
        ]
        weights |= {f"a{i}": (3, 6, 1, 1), f"c{i}": (3, 3, 3, 3)} | ({f"e{i}": (3,)} if bias else {})
        if end != "Concat":
            lines.append(f"t{i} = Conv(s{i}, d{i}{f', f{i}' if bias and i else ''})")
            weights |= {f"d{i}": (5, 3, 1, 1)} | ({f"f{i}": (5,)} if bias and i else {})
        last.append(f"{'s' if end == 'Concat' else 't'}{i}")
    if end == "Add":
        lines += [f"u{i} = Add({f'u{i - 1}' if i > 1 else 't0'}, t{i})" for i in range(1, branches)]
        lines.append(f"y = Relu(u{branches - 1})")
    else:
        lines.append(f"y = {end}{'<axis=1>' if end == 'Concat' else ''}({', '.join(last)})")
    channels = 3 * branches if end == "Concat" else 5
    return model(f"(T[N,6,H,W] x) => (T[N,{channels},H,W] y) {{ {' '.join(lines)} }}", dtype, 22, **weights)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("end", ["Add", "Sum", "Concat"])
def test_resnext(end: str, bias: bool) -> None:
    middle = ["Conv", "Relu", "Conv", "Relu"]
    after = merge(resnext(4, end, bias=bias), [*middle, *{"Add": ["Conv", "Relu"], "Sum": ["Conv"], "Concat": []}[end]])
    convs = [n for n in after.graph if n.op_type == "Conv"]
    assert convs[1].attributes["group"].as_int() == 4


def joined(
    graph: str,
    expected: list[str],
    any_width: bool = False,
    dims: dict[str, int] | None = None,
    **weights: tuple[int, ...],
) -> ir.Model:
    after = assert_exact(model(graph, **weights), MergeParallelConvs(1.0, any_width), dims=dims or DIMS)
    assert op_types(after) == expected
    return after


# What stands between two pointwise convolutions of a branch: its lines, its weights (of 3 channels), the operators.
BETWEEN: dict[str, tuple[str, dict[str, tuple[int, ...]], list[str]]] = {
    "attributes": ("h@ = LeakyRelu<alpha=0.25>(p@)", {}, ["LeakyRelu"]),
    "limits": ("h@ = Clip(p@, lo, hi)", {"lo": (), "hi": ()}, ["Clip"]),
    "a number": ("h@ = Mul(half, p@)", {"half": (1, 1, 1)}, ["Mul"]),
    "a number a channel": ("h@ = Add(p@, s@)", {"s@": (3, 1, 1)}, ["Add"]),
    "a number a channel of rank 4": ("h@ = Mul(s@, p@)", {"s@": (1, 3, 1, 1)}, ["Mul"]),
    "SiLU": ("g@ = Sigmoid(p@)  h@ = Mul(p@, g@)", {}, ["Sigmoid", "Mul"]),
    "PRelu": ("h@ = PRelu(p@, s@)", {"s@": (3, 1, 1)}, ["PRelu"]),
    "pooling": ("h@ = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>(p@)", {}, ["AveragePool"]),
    "squeeze and excite": (
        "g@ = GlobalAveragePool(p@)  i@ = Conv(g@, s@)  j@ = Sigmoid(i@)  h@ = Mul(p@, j@)",
        {"s@": (3, 3, 1, 1)}, ["GlobalAveragePool", "Conv", "Sigmoid", "Mul"],
    ),
    "an inner residual": (
        "g@ = Relu(p@)  i@ = Conv<pads=[1,1,1,1]>(g@, s@)  h@ = Add(i@, p@)", {"s@": (3, 3, 3, 3)}, ["Relu", "Conv", "Add"],
    ),
}  # fmt: skip


def between(
    lines: str, weights: dict[str, tuple[int, ...]], branches: int = 3
) -> tuple[str, dict[str, tuple[int, ...]]]:
    """Branches of two pointwise convolutions with `lines` between, @ the number of the branch; added by a Sum."""
    body = [f"p@ = Conv(x, a@)  {lines}  t@ = Conv(h@, d@)".replace("@", str(i)) for i in range(branches)]
    terms = ", ".join(f"t{i}" for i in range(branches))
    shapes = {"a@": (3, 6, 1, 1), "d@": (5, 3, 1, 1), **weights}
    every = {name.replace("@", str(i)): shape for name, shape in shapes.items() for i in range(branches)}
    return f"(T[N,6,H,W] x) => (T[N,5,H,W] y) {{ {' '.join(body)} y = Sum({terms}) }}", every


@pytest.mark.parametrize("case", BETWEEN)
def test_between(case: str) -> None:
    lines, shapes, expected = BETWEEN[case]
    graph, weights = between(lines, shapes)
    joined(graph, ["Conv", *expected, "Conv"], **weights)


# Near misses: nothing is rewritten, and a reason stands only where all but one thing is right.
NEAR: dict[str, tuple[str, dict[str, tuple[int, ...]], str]] = {
    "across channels": ("h@ = Softmax<axis=1>(p@)", {}, ""),
    "own numbers": ("h@ = Mul(p@, s@)", {"s@": (1,)}, ""),
    "a number a column": ("h@ = Add(p@, s@)", {"s@": (6,)}, ""),
    "a gate of one channel": ("g@ = Conv(p@, s@)  i@ = Sigmoid(g@)  h@ = Mul(p@, i@)", {"s@": (1, 3, 1, 1)}, ""),
}  # fmt: skip


@pytest.mark.parametrize("case", NEAR)
def test_near_misses(case: str) -> None:
    lines, shapes, words = NEAR[case]
    graph, weights = between(lines, shapes)
    assert reasons(model(graph, **weights)) == ([words] if words else [])


def test_branches_of_another_kind() -> None:
    """Two equal branches among others: these become one, the others stay."""
    joined(
        """(T[N,6,H,W] x) => (T[N,5,H,W] y) {
        p = Conv(x, a)  q = Relu(p)  r = Conv(q, d)  i = Conv(x, b)  j = Relu(i)  k = Conv(j, e)
        l = Conv<pads=[1,1,1,1]>(x, c)  m = Tanh(l)  n = Conv(m, f)  o = MaxPool<kernel_shape=[1,1]>(n)
        s = Add(r, o)  y = Add(s, k) }""",
        ["Conv", "Tanh", "Conv", "MaxPool", "Conv", "Relu", "Conv", "Add"],
        a=(3, 6, 1, 1), d=(5, 3, 1, 1), b=(3, 6, 1, 1), e=(5, 3, 1, 1), c=(3, 6, 3, 3), f=(5, 3, 1, 1),
    )  # fmt: skip


def test_concatenated_runs() -> None:
    """Inception: of the operands of a Concat, equal neighbours become one."""
    joined(
        """(T[N,6,H,W] x) => (T[N,C,H,W] y) {
        p = Conv(x, a)  q = Relu(p)  i = Conv(x, b, c)  j = Relu(i)  k = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(x)
        y = Concat<axis=-3>(k, q, j) }""",
        ["MaxPool", "Conv", "Relu", "Concat"],
        a=(3, 6, 1, 1), b=(4, 6, 1, 1), c=(4,),
    )  # fmt: skip


SPLIT = """(T[N,{c},H,W] x) => (T[N,8,H,W] y) {{ s, t = Split<axis=1, num_outputs=2>(x)
    p = Conv<pads=[1,1,1,1]>({a}, d)  q = Conv<pads=[1,1,1,1]>({b}, e)  y = Concat<axis=1>({o}) }}"""


def test_a_grouped_convolution_that_was_taken_apart() -> None:
    weights = {"d": (4, 3, 3, 3), "e": (4, 3, 3, 3)}
    after = joined(SPLIT.format(c=6, a="s", b="t", o="p, q"), ["Conv"], any_width=True, **weights)
    (conv,) = [n for n in after.graph if n.op_type == "Conv"]
    assert conv.attributes["group"].as_int() == 2
    wide = {"d": (16, 16, 3, 3), "e": (16, 16, 3, 3)}
    joined(SPLIT.format(c=32, a="s", b="t", o="p, q").replace("[N,8,", "[N,32,"), ["Conv"], **wide)
    assert "grouped convolutions with 3 → 4 channels a group may be slower" in reason(
        model(SPLIT.format(c=6, a="s", b="t", o="p, q"), **weights)
    )


def test_narrow_groups_where_little_is_saved() -> None:
    lines, shapes = "g@ = Conv(p@, s@)  h@ = Relu(g@)", {"a@": (6, 6, 1, 1), "s@": (6, 6, 1, 1), "d@": (5, 6, 1, 1)}
    graph, weights = between(lines, shapes, 2)
    assert "6 → 6 channels a group" in reason(model(graph, **weights))
    joined(graph, ["Conv", "Conv", "Relu", "Conv"], any_width=True, **weights)
    graph, weights = between(lines, shapes, 3)
    joined(graph, ["Conv", "Conv", "Relu", "Conv"], **weights)


@pytest.mark.parametrize(("a", "b", "o"), [("t", "s", "p, q"), ("s", "s", "p, q"), ("s", "t", "q, p")])
def test_parts_in_another_order(a: str, b: str, o: str) -> None:
    m = model(SPLIT.format(c=6, a=a, b=b, o=o), d=(4, 3, 3, 3), e=(4, 3, 3, 3))
    after = assert_exact(m, MergeParallelConvs(1.0, True), dims=DIMS)
    # Both of one part: one stacked convolution, no groups. In another order: nothing.
    assert op_types(after) == (["Split", "Conv"] if a == b else op_types(m))


def test_unequal_parts_of_a_split_that_are_added() -> None:
    joined(
        """(T[N,6,H,W] x) => (T[N,5,H,W] y) <int64[2] n = {2, 4}> { s, t = Split<axis=1>(x, n)
        p = Conv(s, a)  q = Conv(t, b)  y = Add(p, q) }""",
        ["Conv"], a=(5, 2, 1, 1), b=(5, 4, 1, 1),
    )  # fmt: skip


def test_branches_that_others_see() -> None:
    graph, weights = between("h@ = Relu(p@)", {})
    seen = graph.replace("y) {", "y, T[N,3,H,W] h1) {")
    assert "'h1' is a graph output" in reason(model(seen, **weights))
    read = graph.replace("y) {", "y, T[N,3,H,W] z) {").replace(" }", "  z = Tanh(p2) }")
    assert "'p2' is read by something else too" in reason(model(read, **weights))
    shared = graph.replace("a1", "a0")
    weights.pop("a1")
    assert "the weights of Conv '' are read by other nodes too" in reason(model(shared, **weights))


def test_branches_of_different_values() -> None:
    graph, weights = between("h@ = Relu(p@)", {}, 2)
    two = graph.replace("(T[N,6,H,W] x)", "(T[N,6,H,W] x, T[N,6,H,W] z)").replace("Conv(x, a1)", "Conv(z, a1)")
    assert reasons(model(two, **weights)) == []


def test_long_towers_are_not_walked_to_their_end() -> None:
    towers = [f"{t}{i + 1} = Relu({t}{i})" for t in "pq" for i in range(1500)]
    m = model(
        f"(T[N,6,H,W] x) => (T[N,12,H,W] y) {{ p0 = Conv(x, a)  q0 = Conv(x, b)  {' '.join(towers)}"
        "  y = Concat<axis=1>(p1500, q1500) }",
        a=(6, 6, 1, 1), b=(6, 6, 1, 1),
    )  # fmt: skip
    assert reasons(m) == []


def test_branches_of_matmul() -> None:
    body = ["p@ = MatMul(x, a@)  q@ = Add(p@, b@)  r@ = Gelu(q@)  s@ = MatMul(r@, c@)".replace("@", i) for i in "012"]
    shapes = {"a@": (6, 4), "b@": (4,), "c@": (4, 5)}
    weights = {name.replace("@", i): shape for name, shape in shapes.items() for i in "012"} | {"e": (5,)}
    joined(
        f"(T[N,H,6] x) => (T[N,H,5] y) {{ {' '.join(body)} t = Add(s0, s1)  u = Add(t, e)  y = Add(u, s2) }}",
        ["MatMul", "Add", "Gelu", "MatMul", "Add"], **weights,
    )  # fmt: skip
    joined(
        f"(T[N,H,6] x) => (T[N,H,12] y) {{ {' '.join(body)} y = Concat<axis=-1>(r0, r1, r2) }}".replace(
            "s0 = MatMul(r0, c0)", ""
        ).replace("s1 = MatMul(r1, c1)", "").replace("s2 = MatMul(r2, c2)", ""),
        ["MatMul", "Add", "Gelu"], **weights,
    )  # fmt: skip


def test_the_branches_stand_in_a_branch_of_if() -> None:
    graph, weights = between("h@ = Relu(p@)", {}, 2)
    body = graph[graph.index("{") + 1 : -1].replace("y = Sum", "o = Sum")
    m = model(
        f"""(bool c, T[N,6,H,W] x) => (T[N,5,H,W] y) {{
        y = If (c) <then_branch = g () => (T[N,5,H,W] o) {{ {body} }},
                    else_branch = e () => (T[N,5,H,W] n) {{ n = Conv(x, w) }}> }}""",
        w=(5, 6, 1, 1), **weights,
    )  # fmt: skip
    after = assert_exact(m, MergeParallelConvs(), feeds={**random_feeds(m, 0, DIMS), "c": np.array(True)})
    assert [n.op_type for g in after.graph.subgraphs() for n in g] == ["Conv", "Relu", "Conv", "Conv"]


def test_large_weights_are_lazy() -> None:
    graph, weights = between("h@ = Relu(p@)", {}, 2)
    weights = {name: (512, 512, 1, 1) for name in weights}
    m = model(graph.replace("N,6", "N,512").replace("N,5,", "N,512,"), dtype="float", **weights)
    assert MergeParallelConvs()(m).modified
    assert {type(v.const_value) for v in m.graph.initializers.values()} == {ir.LazyTensor}
    assert {tuple(v.const_value.shape) for v in m.graph.initializers.values()} == {(1024, 512, 1, 1), (512, 1024, 1, 1)}
    onnx.checker.check_model(ir.to_proto(m), full_check=True)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    steps=st.lists(st.sampled_from(sorted(BETWEEN)), min_size=1, max_size=3),
    branches=st.integers(2, 4),
    end=st.sampled_from(["Sum", "Concat"]),
)
def test_any_branches(steps: list[str], branches: int, end: str) -> None:
    """Any order of what may stand in a branch is joined, and equal."""
    lines, weights, expected = [], {}, []
    value = "p@"
    for position, name in enumerate(steps):
        text, shapes, operators = BETWEEN[name]
        renamed = {**{c: f"{c}{position}_" for c in "ghij"}, "s": f"s{position}_"}
        for old, new in renamed.items():
            text = text.replace(f"{old}@", f"{new}@")
            shapes = {k.replace(f"{old}@", f"{new}@"): v for k, v in shapes.items()}
        lines.append(text.replace("p@", value))
        value = f"h{position}_@"
        weights |= shapes
        expected += operators
    graph, shapes = between(f"{'  '.join(lines)}  h@ = Identity({value})", weights, branches)
    if end == "Concat":
        graph = graph.replace("T[N,5,", "T[N,C,").replace("y = Sum(", "y = Concat<axis=1>(")
        for i in range(branches):
            graph = graph.replace(f"t{i} = Conv(h{i}, d{i})", f"t{i} = Tanh(h{i})")
    m = model(graph, **shapes)
    after = assert_exact(m, MergeParallelConvs(), seeds=1, dims={"N": 1, "H": 4, "W": 5})
    assert op_types(after) == ["Conv", *expected, "Identity", "Conv" if end == "Sum" else "Tanh"]
