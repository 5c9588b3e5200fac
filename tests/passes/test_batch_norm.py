"""`fold-batch-norm`: what is folded, proved in float64, and what is left with which reason."""

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from exactness import assert_exact, op_types, random_feeds, reference_outputs, to_float64

from graphopt.passes.fold import layers
from graphopt.passes.fold.batch_norm import FoldBatchNorm

STATISTICS = {"g": (6,), "b": (6,), "m": (6,), "v": (6,)}
BN = "BatchNormalization(c, g, b, m, v)"


def model(
    graph: str, dtype: str = "double", opset: int = 21, functions: str = "", **weights: tuple[int, ...]
) -> ir.Model:
    """A model from text with random weights of the given shapes; `v`, a variance, is positive."""
    imports = ', "local" : 1' if functions else ""
    text = f'<ir_version: 10, opset_import: ["" : {opset}{imports}]> g {graph.replace("T[", dtype + "[")} {functions}'
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    types = {"double": np.float64, "float": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
    for name, shape in weights.items():
        array = rng.uniform(0.5, 2, shape) if name == "v" else rng.normal(size=shape)
        tensor = ir.tensor(array.astype(types[dtype]), name=name)
        proto.graph.initializer.append(ir.to_proto(tensor))
    onnx.checker.check_model(proto, full_check=True)
    return ir.from_proto(proto)


def fold(before: ir.Model, expected: list[str], **dims: int) -> ir.Model:
    after = assert_exact(before, FoldBatchNorm(), dims=dims or {"N": 2})
    assert op_types(after) == expected
    return after


def reason(m: ir.Model) -> str:
    """Why the one site of `m` is left; `m` stays as it was."""
    before = ir.to_proto(m).SerializeToString(deterministic=True)
    rule = FoldBatchNorm()
    assert not rule(m).modified
    assert ir.to_proto(m).SerializeToString(deterministic=True) == before
    (site,) = rule.sites
    assert site.outcome == "left"
    return site.detail


# One line a case: the graph, the shapes of its weights, the operators after.
BEFORE: dict[str, tuple[str, dict[str, tuple[int, ...]], list[str]]] = {
    "conv": (f"(T[N,4,5,5] x) => (T[N,6,3,3] y) {{ c = Conv(x, w)  y = {BN} }}", {"w": (6, 4, 3, 3)}, ["Conv"]),
    "conv with bias, padded": (
        f"(T[N,4,5] x) => (T[N,6,5] y) {{ c = Conv<pads = [1,1]>(x, w, a)  y = {BN} }}",
        {"w": (6, 4, 3), "a": (6,)},
        ["Conv"],
    ),
    "grouped conv": (
        f"(T[N,4,5,5] x) => (T[N,6,3,3] y) {{ c = Conv<group = 2>(x, w)  y = {BN} }}",
        {"w": (6, 2, 3, 3)},
        ["Conv"],
    ),
    "transposed conv": (
        f"(T[N,4,5] x) => (T[N,6,11] y) {{ c = ConvTranspose<strides = [2]>(x, w)  y = {BN} }}",
        {"w": (4, 6, 3)},
        ["ConvTranspose"],
    ),
    "gemm": (f"(T[N,4] x) => (T[N,6] y) {{ c = Gemm(x, w)  y = {BN} }}", {"w": (4, 6)}, ["Gemm"]),
    "gemm with everything": (
        f"(T[4,N] x) => (T[N,6] y) {{ c = Gemm<transA = 1, transB = 1, alpha = 0.5, beta = 3.0>(x, w, a)  y = {BN} }}",
        {"w": (6, 4), "a": (6,)},
        ["Gemm"],
    ),
    "gemm with one number": (
        f"(T[N,4] x) => (T[N,6] y) {{ c = Gemm<beta = 2.0>(x, w, a)  y = {BN} }}",
        {"w": (4, 6), "a": ()},
        ["Gemm"],
    ),
    "gemm with a matrix": (
        f"(T[3,4] x) => (T[3,6] y) {{ c = Gemm<beta = 2.0>(x, w, a)  y = {BN} }}",
        {"w": (4, 6), "a": (3, 6)},
        ["Gemm"],
    ),
    "matmul": (f"(T[N,4] x) => (T[N,6] y) {{ c = MatMul(x, w)  y = {BN} }}", {"w": (4, 6)}, ["MatMul", "Add"]),
    "matmul and add": (
        f"(T[N,4] x) => (T[N,6] y) {{ d = MatMul(x, w)  c = Add(a, d)  y = {BN} }}",
        {"w": (4, 6), "a": (1, 6)},
        ["MatMul", "Add"],
    ),
    "spelled out": (
        "(T[N,4,5] x) => (T[N,6,3] y) { c = Conv(x, w)  d = Mul(c, k)  y = Add(l, d) }",
        {"w": (6, 4, 3), "k": (6, 1), "l": (1, 6, 1)},
        ["Conv"],
    ),
    "spelled out with sub and div": (
        "(T[N,4,5] x) => (T[N,6,7] y) { c = ConvTranspose(x, w, a)  d = Sub(c, k)  e = Div(d, l)  y = Relu(e) }",
        {"w": (4, 6, 3), "a": (6,), "k": (6, 1), "l": (6, 1)},
        ["ConvTranspose", "Relu"],
    ),
    "both in a row": (
        f"(T[N,4,5] x) => (T[N,6,3] y) {{ c0 = Conv(x, w)  c = Mul(c0, k)  y0 = {BN}  y = Add(y0, k) }}",
        {"w": (6, 4, 3), "k": (6, 1)},
        ["Conv"],
    ),
    "constant first, subtracted from": (
        "(T[N,4,5] x) => (T[N,6,3] y) { c = Conv(x, w)  y = Sub(k, c) }",
        {"w": (6, 4, 3), "k": (6, 1)},
        ["Conv", "Sub"],
    ),
    "one number is no normalization": (
        "(T[N,4,5] x) => (T[N,6,3] y) { c = Conv(x, w)  y = Mul(c, k) }",
        {"w": (6, 4, 3), "k": ()},
        ["Conv", "Mul"],
    ),
    "a constant that widens": (
        "(T[N,4,5] x) => (T[1,N,6,3] y) { c = Conv(x, w)  y = Mul(c, k) }",
        {"w": (6, 4, 3), "k": (1, 1, 6, 1)},
        ["Conv", "Mul"],
    ),
}


@pytest.mark.parametrize("case", BEFORE)
def test_into_the_layer_before(case: str) -> None:
    graph, weights, expected = BEFORE[case]
    used = STATISTICS if "BatchNormalization" in graph else {}
    fold(model(graph, **weights, **used), expected)


BEHIND: dict[str, tuple[str, dict[str, tuple[int, ...]], list[str]]] = {
    "conv": ("(T[N,6,5,5] c) => (T[N,4,3,3] y) { n = %s  y = Conv(n, w) }", {"w": (4, 6, 3, 3)}, ["Conv"]),
    "grouped conv with bias": (
        '(T[N,6,5] c) => (T[N,4,3] y) { n = %s  y = Conv<group = 2, auto_pad = "VALID">(n, w, a) }',
        {"w": (4, 3, 3), "a": (4,)},
        ["Conv"],
    ),
    "gemm": (
        "(T[N,6] c) => (T[N,4] y) { n = %s  y = Gemm<transB = 1, alpha = 0.5, beta = 3.0>(n, w, a) }",
        {"w": (4, 6), "a": (4,)},
        ["Gemm"],
    ),
    "matmul": ("(T[N,6] c) => (T[N,4] y) { n = %s  y = MatMul(n, w) }", {"w": (6, 4)}, ["MatMul", "Add"]),
    "matmul and add": (
        "(T[N,6] c) => (T[N,4] y) { n = %s  p = MatMul(n, w)  y = Add(p, a) }",
        {"w": (6, 4), "a": (4,)},
        ["MatMul", "Add"],
    ),
    "all that read it": (
        "(T[N,6] c) => (T[N,4] y, T[N,3] z) { n = %s  p = MatMul(n, w)  y = Add(p, a)  z = Gemm(n, u) }",
        {"w": (6, 4), "a": (4,), "u": (6, 3)},
        ["MatMul", "Add", "Gemm"],
    ),
    "behind a transpose": (
        "(T[N,6,5] c) => (T[N,5,4] y) { n = %s  t = Transpose<perm = [0, 2, 1]>(n)  p = MatMul(t, w)  y = Add(p, a) }",
        {"w": (6, 4), "a": (4,)},
        ["Transpose", "MatMul", "Add"],
    ),
    "matmul with other readers": (
        "(T[N,6] c) => (T[N,4] y, T[N,4] z) { n = %s  p = MatMul(n, w)  y = Add(p, a)  z = Relu(p) }",
        {"w": (6, 4), "a": (4,)},
        ["MatMul", "Add", "Add", "Relu"],
    ),
}


@pytest.mark.parametrize("case", BEHIND)
def test_into_the_layer_behind(case: str) -> None:
    graph, weights, expected = BEHIND[case]
    fold(model(graph % BN, **weights, **STATISTICS), expected)


@pytest.mark.parametrize("layer", ["Conv<pads = [1,1]>", "ConvTranspose"])
def test_zero_shift_goes_through_a_border(layer: str) -> None:
    shape = {"Conv<pads = [1,1]>": (4, 6, 3), "ConvTranspose": (6, 4, 3)}[layer]
    m = model(f"(T[N,6,5] c) => (T[N,4,P] y) {{ n = {BN}  y = {layer}(n, w) }}", w=shape, **STATISTICS)
    for name in ("b", "m"):
        value = m.graph.initializers[name]
        value.const_value = ir.tensor(np.zeros(6), name=name)
    fold(m, [layer.split("<")[0]])


def test_the_layer_before_is_preferred() -> None:
    m = model(
        f"(T[N,4,5] x) => (T[N,4,1] y) {{ c = Conv(x, w)  n = {BN}  y = Conv(n, u) }}",
        w=(6, 4, 3),
        u=(4, 6, 3),
        **STATISTICS,
    )
    after = fold(m, ["Conv", "Conv"])
    np.testing.assert_array_equal(
        after.graph.initializers["u"].const_value.numpy(), m.graph.initializers["u"].const_value.numpy()
    )
    assert len(next(iter(after.graph)).inputs) == 3


def test_names_of_weights_and_outputs_stay_and_statistics_go() -> None:
    m = model(f"(T[N,4,5] x) => (T[N,6,3] y) {{ c = Conv(x, w, a)  y = {BN} }}", w=(6, 4, 3), a=(6,), **STATISTICS)
    after = fold(m, ["Conv"])
    assert [o.name for o in after.graph.outputs] == ["y"]
    assert "w" in after.graph.initializers
    assert len(after.graph.initializers) == 2


@pytest.mark.parametrize("dtype", ["float", "float16", "bfloat16"])
def test_weights_are_rounded_once(dtype: str) -> None:
    m = model(f"(T[N,4,5] x) => (T[N,6,3] y) {{ c = Conv(x, w)  y = {BN} }}", dtype, 22, w=(6, 4, 3), **STATISTICS)
    w, g, b, mean, v = (m.graph.initializers[k].const_value.numpy().astype(np.float64) for k in "wgbmv")
    assert FoldBatchNorm()(m).modified
    conv = next(iter(m.graph))
    got, bias = (value.const_value.numpy() for value in conv.inputs[1:])
    scale = g / np.sqrt(v + np.float64(np.float32(1e-5)))
    assert got.dtype == bias.dtype == m.graph.inputs[0].dtype.numpy()
    np.testing.assert_array_equal(got, (w * scale[:, None, None]).astype(got.dtype))
    np.testing.assert_array_equal(bias, (b - scale * mean).astype(got.dtype))


def test_large_weights_are_lazy_and_compose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.graph.computed.LAZY_BYTES", 0)
    m = model(
        f"(T[N,4,5] x) => (T[N,6,3] y) {{ c0 = Conv(x, w)  c = Mul(c0, k)  n = {BN}  y = Add(n, k) }}",
        w=(6, 4, 3),
        k=(6, 1),
        **STATISTICS,
    )
    after = fold(m, ["Conv"])
    weight = after.graph.initializers["w"].const_value
    assert isinstance(weight, ir.LazyTensor)
    assert weight.name == "w"
    np.testing.assert_array_equal(weight.numpy(), weight.numpy())


def test_large_weights_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "_CHUNK", 8)
    for name in ("transposed conv", "grouped conv", "gemm with everything"):
        graph, weights, expected = BEFORE[name]
        fold(model(graph, **weights, **STATISTICS), expected)


@pytest.mark.parametrize("before", [True, False])
def test_groups_of_a_transposed_conv(before: bool) -> None:
    """The reference evaluator can't run these groups, so it runs the same layer with zeros between the groups."""
    if before:
        graph = f"(T[N,4,5] x) => (T[N,6,7] y) {{ c = ConvTranspose<group = 2>(x, w, a)  y = {BN} }}"
        m = model(graph, w=(4, 3, 3), a=(6,), **STATISTICS)
    else:
        graph = f"(T[N,6,5] c) => (T[N,4,7] y) {{ n = {BN}  y = ConvTranspose<group = 2>(n, w) }}"
        m = model(graph, w=(6, 2, 3), **STATISTICS)
        for name in ("b", "m"):
            m.graph.initializers[name].const_value = ir.tensor(np.zeros(6), name=name)
    after = m.clone()
    assert FoldBatchNorm()(after).modified
    assert op_types(after) == ["ConvTranspose"]
    feeds = random_feeds(m, dims={"N": 2})
    for grouped in (m, after):
        value = grouped.graph.initializers["w"]
        w = value.const_value.numpy()
        rows, columns, _ = w.shape
        dense = np.zeros((rows, 2 * columns, 3))
        for group in range(2):
            part = slice(group * rows // 2, (group + 1) * rows // 2)
            dense[part, group * columns : (group + 1) * columns] = w[part]
        value.const_value, value.shape = ir.tensor(dense, name="w"), ir.Shape(dense.shape)
        for node in grouped.graph:
            node.attributes.pop("group", None)
    (expected,), (got,) = reference_outputs(m, feeds), reference_outputs(after, feeds)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


def test_shared_weights_are_copied_once() -> None:
    graph = f"(T[N,4,5] x, T[N,4,5] z) => (T[N,6,3] y, T[N,6,3] u) {{ c = Conv(x, w)  u = Conv(z, w)  y = {BN} }}"
    after = fold(model(graph, w=(6, 4, 3), **STATISTICS), ["Conv", "Conv"])
    assert sum(v.const_value.size == 72 for v in after.graph.initializers.values()) == 2
    # Both readers folded: the first has a copy, the second the original.
    both = graph.replace("u = Conv(z, w)", "d = Conv(z, w)").replace("}", "u = BatchNormalization(d, v, b, m, v) }")
    after = fold(model(both, w=(6, 4, 3), **STATISTICS), ["Conv", "Conv"])
    assert sum(v.const_value.size == 72 for v in after.graph.initializers.values()) == 2


def test_in_subgraphs_and_functions() -> None:
    call = f"""(T[N,4,5] x, bool k) => (T[P,Q,R] y) {{
        y = If(k) <then_branch = yes () => (T[P,Q,R] p) {{ c = Conv(x, w)  p = {BN} }},
            else_branch = no () => (T[P,Q,R] p) {{ p = Relu(x) }}> }}"""
    m = model(call, w=(6, 4, 3), **STATISTICS)
    for chosen in (True, False):
        feeds = {"x": np.random.default_rng(1).normal(size=(2, 4, 5)), "k": np.array(chosen)}
        after = assert_exact(m, FoldBatchNorm(), feeds=feeds)
    yes = next(iter(after.graph)).attributes["then_branch"].as_graph()
    assert [n.op_type for n in yes] == ["Conv"]
    function = """<domain: "local", opset_import: ["" : 21]> Block (x) => (y) {
        w = Constant<value = double[1,1,1] {3}>()  g = Constant<value = double[1] {2}>()
        c = Conv(x, w)  y = BatchNormalization(c, g, g, g, g) }"""
    after = assert_exact(
        model("(T[N,1,5] x) => (T[N,1,5] y) { y = local.Block(x) }", functions=function), FoldBatchNorm()
    )
    (block,) = after.functions.values()
    assert [n.op_type for n in block if n.op_type != "Constant"] == ["Conv"]


LEFT: dict[str, tuple[str, dict[str, tuple[int, ...]], str]] = {
    "pre-activation residual": (
        f"(T[N,6,5] x, T[N,6,5] z) => (T[N,6,5] y) {{ c = Add(x, z)  n = {BN}  y = Relu(n) }}",
        {},
        "Relu '' has no weights to fold into",
    ),
    "another reader": (
        f"(T[N,4,5] x) => (T[N,6,3] y, T[N,6,3] z) {{ c = Conv(x, w)  y = {BN}  z = Relu(c) }}",
        {"w": (6, 4, 3)},
        "before it: 'c' is read by 2 nodes",
    ),
    "graph output in between": (
        f"(T[N,4,5] x) => (T[N,6,3] y, T[N,6,3] c) {{ c = Conv(x, w)  y = {BN} }}",
        {"w": (6, 4, 3)},
        "before it: 'c' is a graph output",
    ),
    "computed weights": (
        f"(T[N,4,5] x, T[6,4,3] w) => (T[N,6,3] y) {{ c = Conv(x, w)  y = {BN} }}",
        {},
        "the weights of Conv '' aren't constant",
    ),
    "computed bias": (
        f"(T[N,4,5] x, T[6] a) => (T[N,6,3] y) {{ c = Conv(x, w, a)  y = {BN} }}",
        {"w": (6, 4, 3)},
        "the bias of Conv '' isn't constant",
    ),
    "shared by three": (
        f"""(T[N,4,5] x) => (T[N,6,3] y, T[N,6,3] p, T[N,6,3] q)
        {{ c = Conv(x, w)  y = {BN}  p = Conv(x, w)  q = Conv(x, w) }}""",
        {"w": (6, 4, 3)},
        "the weights of Conv '' are shared with 2 other nodes",
    ),
    "training mode": (
        """(T[N,4,5] x) => (T[N,6,3] y)
        { c = Conv(x, w)  y, p, q = BatchNormalization<training_mode = 1>(c, g, b, m, v) }""",
        {"w": (6, 4, 3)},
        "it is in training mode",
    ),
    "batched rows": (
        f"(T[N,6,4] x) => (T[N,6,4] y) {{ c = MatMul(x, w)  y = {BN} }}",
        {"w": (4, 4)},
        "isn't known to be a matrix",
    ),
    "gemm with a number a row": (
        f"(T[3,4] x) => (T[3,6] y) {{ c = Gemm(x, w, a)  y = {BN} }}",
        {"w": (4, 6), "a": (3, 1)},
        "has one number a row",
    ),
    "padded conv behind": (
        f"(T[N,6,5] c) => (T[N,4,5] y) {{ n = {BN}  y = Conv<pads = [1,1]>(n, w) }}",
        {"w": (4, 6, 3)},
        "behind it: Conv '' pads its input with zeros",
    ),
    "automatically padded conv behind": (
        f'(T[N,6,5] c) => (T[N,4,5] y) {{ n = {BN}  y = Conv<auto_pad = "SAME_UPPER">(n, w) }}',
        {"w": (4, 6, 3)},
        "behind it: Conv '' pads its input with zeros",
    ),
    "transposed conv behind": (
        f"(T[N,6,5] c) => (T[N,4,7] y) {{ n = {BN}  y = ConvTranspose(n, w) }}",
        {"w": (6, 4, 3)},
        "the border of ConvTranspose ''",
    ),
    "many new additions behind": (
        f"(T[N,6] c) => (T[N,4] y, T[N,4] z) {{ n = {BN}  y = MatMul(n, w)  z = MatMul(n, u) }}",
        {"w": (6, 4), "u": (6, 4)},
        "to more numbers than it normalizes",
    ),
    "transposed input behind": (
        f"(T[3,6] c) => (T[6,4] y) {{ n = {BN}  y = Gemm<transA = 1>(n, w) }}",
        {"w": (3, 4)},
        "Gemm '' transposes its input",
    ),
    "as a filter": (
        f"(T[2,6,3] c, T[1,6,5] x) => (T[1,2,3] y) {{ n = {BN}  y = Conv(x, n) }}",
        {},
        "behind it: the weights of Conv '' aren't constant",
    ),
}


@pytest.mark.parametrize("case", LEFT)
def test_left_with_its_reason(case: str) -> None:
    graph, weights, expected = LEFT[case]
    assert expected in reason(model(graph, **weights, **STATISTICS))


def test_old_training_form() -> None:
    m = model(
        "(T[N,4,5] x) => (T[N,6,3] y) { c = Conv(x, w)  y, p, q, r, s = BatchNormalization(c, g, b, m, v) }",
        opset=9,
        w=(6, 4, 3),
        **STATISTICS,
    )
    assert "training form" in reason(m)


def test_unused_outputs_of_the_new_form_do_no_harm() -> None:
    m = model(f"(T[N,4,5] x) => (T[N,6,3] y) {{ c = Conv(x, w)  y = {BN} }}", w=(6, 4, 3), **STATISTICS)
    norm = list(m.graph)[-1]
    norm.resize_outputs(3)
    for index, name in enumerate("pq", start=1):
        norm.outputs[index].name = name
    assert FoldBatchNorm()(m).modified
    assert op_types(m) == ["Conv"]


def test_weights_that_the_caller_can_override() -> None:
    m = model(f"(T[N,4,5] x) => (T[N,6,3] y) {{ c = Conv(x, w)  y = {BN} }}", w=(6, 4, 3), **STATISTICS)
    m.graph.inputs.append(m.graph.initializers["w"])
    assert "the weights of Conv '' aren't constant" in reason(m)
    m.graph.inputs[-1:] = [m.graph.initializers["v"]]
    assert "its scale, shift or statistics aren't constant" in reason(m)


@pytest.mark.parametrize(
    ("factor", "why"), [(1e6, "would overflow float16"), (1e-6, "would lose precision in float16")]
)
def test_float16_that_cannot_hold_the_product(factor: float, why: str) -> None:
    m = model(f"(T[N,4,5] x) => (T[N,6,3] y) {{ c = Conv(x, w)  y = {BN} }}", "float16", 22, w=(6, 4, 3), **STATISTICS)
    small = min(factor, 1.0) ** 0.5
    m.graph.initializers["g"].const_value = ir.tensor(
        np.full(6, min(factor * 1e-2, 6e4) * 1e0 + small, np.float16), name="g"
    )
    m.graph.initializers["w"].const_value = ir.tensor(
        np.full((6, 4, 3), 100.0 if factor > 1 else small * 1e-2, np.float16), name="w"
    )
    assert why in reason(m)


def test_divided_by_zero() -> None:
    m = model("(T[N,4,5] x) => (T[N,6,3] y) { c = Conv(x, w)  y = Div(c, k) }", w=(6, 4, 3), k=(6, 1))
    m.graph.initializers["k"].const_value = ir.tensor(np.zeros((6, 1)), name="k")
    assert reason(m) == "it divides by 0"


@pytest.mark.real
@pytest.mark.parametrize(("key", "count"), [("orientation", 27), ("ppocr-cls", 35)])
def test_real_models(key: str, count: int) -> None:
    from graphopt.models import catalogue
    from graphopt.passes.raise_.convert_opset import ConvertOpset

    before = ir.load(catalogue.fetch(key))
    ConvertOpset()(before)
    rng = np.random.default_rng(0)
    size = (1, 3, 48, 64) if key == "ppocr-cls" else (1, 3, 224, 224)
    before = to_float64(before)
    after = assert_exact(before, FoldBatchNorm(), seeds=1, feeds={before.graph.inputs[0].name: rng.normal(size=size)})
    assert op_types(before).count("BatchNormalization") == count
    assert "BatchNormalization" not in op_types(after)
