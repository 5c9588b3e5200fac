"""`merge-convs`: two convolutions as one, proved at the borders in float64, and what is left with which reason."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from exactness import assert_exact, op_types, random_feeds
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from graphopt.graph.constants import constant_array
from graphopt.passes.fold.merge_convs import MergeConvs

ANY = 1e9  # a max_growth that never stands in the way


def model(
    graph: str, dtype: str = "double", opset: int = 21, functions: str = "", **weights: tuple[int, ...]
) -> ir.Model:
    """A model from text with random weights of the given shapes."""
    imports = ', "local" : 1' if functions else ""
    text = f'<ir_version: 10, opset_import: ["" : {opset}{imports}]> g {graph.replace("T[", dtype + "[")} {functions}'
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    types = {"double": np.float64, "float": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
    for name, shape in weights.items():
        array = rng.normal(size=shape).astype(types[dtype])
        proto.graph.initializer.append(ir.to_proto(ir.tensor(array, name=name)))
    onnx.checker.check_model(proto, full_check=True)
    return ir.from_proto(proto)


def merge(before: ir.Model, growth: float = ANY, **dims: int) -> ir.Model:
    """`before` merged into one Conv, proved equal."""
    after = assert_exact(before, MergeConvs(growth), dims=dims or {"N": 2, "H": 7, "W": 9, "D": 6})
    assert op_types(after) == ["Conv"]
    return after


def reason(m: ir.Model, growth: float = ANY) -> str:
    """Why the one site of `m` is left; `m` stays as it was."""
    before = ir.to_proto(m).SerializeToString(deterministic=True)
    rule = MergeConvs(growth)
    assert not rule(m).modified
    assert ir.to_proto(m).SerializeToString(deterministic=True) == before
    (site,) = rule.sites
    assert site.outcome == "left"
    return site.detail


# Two convolutions: attributes and shapes of the weights. Outputs are declared by nothing but their rank.
MERGED: dict[str, tuple[str, str, dict[str, tuple[int, ...]]]] = {
    "two pointwise": ("", "", {"v": (6, 4, 1, 1), "w": (3, 6, 1, 1)}),
    "spatial, then pointwise": ("pads = [1,1,1,1]", "", {"v": (6, 4, 3, 3), "c": (6,), "w": (3, 6, 1, 1), "b": (3,)}),
    "strides multiply": ("strides = [2,1]", "strides = [2,3]", {"v": (6, 4, 2, 2), "c": (6,), "w": (3, 6, 1, 1)}),
    "3x3 twice without padding": ("", "", {"v": (6, 4, 3, 3), "c": (6,), "w": (3, 6, 3, 3), "b": (3,)}),
    "asymmetric padding": ("pads = [2,0,1,3]", "", {"v": (5, 4, 3, 2), "c": (5,), "w": (3, 5, 2, 1)}),
    "dilations": ("dilations = [2,1]", "dilations = [1,2]", {"v": (5, 4, 2, 2), "w": (3, 5, 2, 2)}),
    "common dilation": ("dilations = [2,2], pads = [4,4,4,4]", "dilations = [4,4]", {"v": (5, 4, 2, 2), "w": (3, 5, 2, 2)}),
    "pointwise without bias, then padding": ("", "pads = [1,1,1,1]", {"v": (6, 4, 1, 1), "w": (3, 6, 3, 3), "b": (3,)}),
    "pointwise, then depthwise with padding": ("", "pads = [1,1,1,1], group = 6", {"v": (6, 4, 1, 1), "w": (6, 1, 3, 3)}),
    "full padding, then padding": ("pads = [2,2,2,2]", "pads = [1,0,2,1]", {"v": (6, 4, 3, 3), "w": (3, 6, 3, 3)}),
    "padding of one axis": ("pads = [2,0,2,0]", "pads = [1,0,1,0]", {"v": (6, 4, 3, 3), "w": (3, 6, 3, 3)}),
    "strided pointwise, then padding": ("strides = [2,2]", "pads = [1,1,0,2]", {"v": (6, 4, 1, 1), "w": (3, 6, 3, 3)}),
    "depthwise, then pointwise": ("pads = [1,1,1,1], group = 4", "", {"v": (4, 1, 3, 3), "c": (4,), "w": (3, 4, 1, 1)}),
    "depthwise twice": ("group = 4", "group = 8", {"v": (8, 1, 3, 3), "c": (8,), "w": (8, 1, 2, 2), "b": (8,)}),
    "groups 2 and 4": ("group = 2", "group = 4", {"v": (8, 2, 1, 1), "c": (8,), "w": (4, 2, 3, 3)}),
    "groups 4 and 6": ("group = 4", "group = 6", {"v": (12, 1, 3, 1), "c": (12,), "w": (6, 2, 1, 3)}),
    "valid": ('auto_pad = "VALID"', 'auto_pad = "VALID"', {"v": (6, 4, 3, 3), "w": (3, 6, 2, 2)}),
    "same upper, stride 1": ('auto_pad = "SAME_UPPER"', "", {"v": (6, 4, 4, 2), "c": (6,), "w": (3, 6, 1, 1)}),
    "same lower, stride 1": ('auto_pad = "SAME_LOWER"', "", {"v": (6, 4, 4, 2), "c": (6,), "w": (3, 6, 1, 1)}),
    "same, pointwise with a stride": ("", 'auto_pad = "SAME_UPPER"', {"v": (6, 4, 3, 3), "w": (3, 6, 1, 1)}),
}  # fmt: skip


def pair(
    first: str,
    second: str,
    weights: dict[str, tuple[int, ...]],
    x: str = "N,4,H,W",
    dtype: str = "double",
    opset: int = 21,
) -> ir.Model:
    one = f"<{first}>" if first else ""
    two = f"<{second}>" if second else ""
    c, b = (", c" if "c" in weights else ""), (", b" if "b" in weights else "")
    outputs = ",".join(["N", str(weights["w"][0]), "P", "Q", "R"][: len(weights["w"])])
    return model(
        f"(T[{x}] x) => (T[{outputs}] y) {{ h = Conv{one}(x, v{c})  y = Conv{two}(h, w{b}) }}", dtype, opset, **weights
    )


@pytest.mark.parametrize("case", MERGED)
def test_merged(case: str) -> None:
    first, second, weights = MERGED[case]
    merge(pair(first, second, weights))


@pytest.mark.parametrize(("case", "x"), [("a row", "N,4,W"), ("a volume", "N,4,D,H,W")])
def test_other_ranks(case: str, x: str) -> None:
    n = x.count(",") - 1
    weights = {"v": (6, 4, *[2] * n), "c": (6,), "w": (3, 6, *[2] * n), "b": (3,)}
    after = merge(pair(f"pads = {[1, *[0] * (2 * n - 1)]}", "", weights, x))
    (conv,) = [node for node in after.graph if node.op_type == "Conv"]
    assert list(conv.attributes["kernel_shape"].as_ints()) == [3] * n


def test_a_chain_becomes_one() -> None:
    m = model(
        "(T[N,4,H,W] x) => (T[N,2,P,Q] y) { h = Conv(x, u)  i = Conv<pads=[1,1,1,1]>(h, v)  y = Conv(i, w) }",
        u=(8, 4, 1, 1), v=(8, 8, 3, 3), w=(2, 8, 1, 1),
    )  # fmt: skip
    merge(m)


def test_same_with_a_stride_needs_the_size() -> None:
    weights = {"v": (6, 4, 3, 3), "c": (6,), "w": (3, 6, 1, 1)}
    same = 'auto_pad = "SAME_UPPER", strides = [2,2]'
    assert "depends on sizes that aren't known (SAME_UPPER)" in reason(pair(same, "", weights))
    merge(pair(same, "", weights, "N,4,7,8"))
    merge(pair(same.replace("UPPER", "LOWER"), "", weights, "N,4,8,7"))


def test_the_size_can_show_that_the_border_is_zero() -> None:
    # 5 positions at stride 2 of a kernel of 2: the window after the last begins at 6, past the input.
    weights = {"v": (6, 4, 2), "w": (3, 6, 3)}
    merge(pair("strides = [2]", "pads = [1,1]", weights, "N,4,6"))
    assert "read the border" in reason(pair("strides = [2]", "pads = [1,1]", weights, "N,4,7"))
    assert "read the border" in reason(pair("strides = [2]", "pads = [1,1]", weights, "N,4,W"))


LEFT: dict[str, tuple[str, str, dict[str, tuple[int, ...]], str]] = {
    "padding after a bias": (
        "", "pads = [1,1,1,1]", {"v": (6, 4, 1, 1), "c": (6,), "w": (3, 6, 3, 3)}, "which have no bias of the first",
    ),
    "padding after 3x3": ("pads = [1,1,1,1]", "pads = [1,1,1,1]", {"v": (6, 4, 3, 3), "w": (3, 6, 3, 3)}, "the border"),
    "one end of one axis": ("pads = [2,2,2,1]", "pads = [0,0,0,1]", {"v": (6, 4, 3, 3), "w": (3, 6, 3, 3)}, "the border"),
    "one beginning": ("pads = [1,2,2,2]", "pads = [1,0,0,0]", {"v": (6, 4, 3, 3), "w": (3, 6, 3, 3)}, "the border"),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT)
def test_left_at_the_border(case: str) -> None:
    first, second, weights, words = LEFT[case]
    assert words in reason(pair(first, second, weights))


def test_the_refusals_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Merged all the same, a pair refused for its border is wrong there."""
    monkeypatch.setattr("graphopt.analysis.windows.Window.zero_outside", lambda *_: True)
    for first, second, weights, words in LEFT.values():
        if words == "the border":
            with pytest.raises(AssertionError, match="relative error"):
                assert_exact(pair(first, second, weights, "2,4,6,6"), MergeConvs(ANY))


def test_cost() -> None:
    separable = pair("pads=[1,1,1,1], group=16", "", {"v": (16, 1, 3, 3), "w": (32, 16, 1, 1)}, "N,16,H,W")
    assert "it would cost 7.0 times the operations" in reason(separable, 1.0)  # 9·16·32 / (9·16 + 16·32)
    bottleneck = pair("", "", {"v": (4, 16, 1, 1), "w": (16, 4, 1, 1)}, "N,16,H,W")
    assert "2.0 times" in reason(bottleneck, 1.0)
    merge(pair("", "", {"v": (16, 4, 1, 1), "w": (4, 16, 1, 1)}), 1.0)
    # At stride 2 the first has four positions for each of the second, but its weights count once.
    strided = {"v": (8, 8, 1, 1), "w": (8, 8, 2, 2)}
    merge(pair("", "strides = [2,2]", strided, "N,8,H,W"), 1.0)
    grown = {"v": (8, 8, 1, 1), "w": (40, 8, 1, 1)}
    assert "7.7 times" not in reason(
        pair("", "strides = [2,2]", {"v": (4, 8, 1, 1), "w": (40, 4, 1, 1)}, "N,8,H,W"), 1.0
    )
    merge(pair("", "strides = [2,2]", grown, "N,8,H,W"), 1.0)


def test_known_sizes_count_for_the_cost() -> None:
    # One position of each: stride 2 saves nothing.
    weights = {"v": (4, 8, 1, 1), "w": (12, 4, 1, 1)}
    assert "1.2 times the operations" in reason(pair("", "strides = [2,2]", weights, "N,8,1,1"), 1.0)
    assert "1.2 times the weights" in reason(pair("", "strides = [2,2]", weights, "N,8,8,8"), 1.0)


def test_a_value_between_that_is_read() -> None:
    weights = {"v": (6, 4, 1, 1), "w": (3, 6, 1, 1)}
    text = "(T[N,4,H,W] x) => (T[N,3,H,W] y, T[N,6,H,W] {z}) {{ h = Conv(x, v)  y = Conv(h, w) {more} }}"
    assert "'h' is a graph output" in reason(model(text.format(z="h", more=""), **weights))
    assert "read by 2 nodes" in reason(model(text.format(z="z", more="z = Relu(h)"), **weights))
    inner = """(bool c, T[N,4,H,W] x) => (T[N,3,H,W] y) { h = Conv(x, v)
        y = If (c) <then_branch = t () => (T[N,3,H,W] p) { p = Conv(h, w) },
                    else_branch = e () => (T[N,3,H,W] q) { q = Conv(x, u) }> }"""
    assert "in an outer graph" in reason(model(inner, **weights, u=(3, 4, 1, 1)))


def test_weights_that_others_read() -> None:
    text = "(T[N,4,H,W] x) => (T[N,4,H,W] y, T[N,4,H,W] z{more}) {{ h = Conv(x, v)  y = Conv(h, w)  i = Relu(y)  z = Conv(i, v){use} }}"
    weights = {"v": (4, 4, 1, 1), "w": (4, 4, 1, 1)}
    after = assert_exact(model(text.format(more="", use=""), **weights), MergeConvs(), dims={"N": 1})
    assert op_types(after) == ["Conv", "Relu", "Conv"]
    three = model(text.format(more=", T[N,4,H,W] a", use="  j = Relu(z)  a = Conv(j, v)"), **weights)
    assert "shared with 2 other nodes" in reason(three)


def test_not_constant() -> None:
    overridable = model(
        "(T[N,4,H,W] x, T[3,6,1,1] w) => (T[N,3,H,W] y) { h = Conv(x, v)  y = Conv(h, w) }", v=(6, 4, 1, 1)
    )
    assert "aren't constant" in reason(overridable)
    bias = model(
        "(T[N,4,H,W] x, T[3] b) => (T[N,3,H,W] y) { h = Conv(x, v)  y = Conv(h, w, b) }", v=(6, 4, 1, 1), w=(3, 6, 1, 1)
    )
    assert "the bias of" in reason(bias)


def test_an_activation_between_is_no_site() -> None:
    m = model(
        "(T[N,4,H,W] x) => (T[N,3,H,W] y) { h = Conv(x, v)  i = Relu(h)  y = Conv(i, w) }",
        v=(6, 4, 1, 1),
        w=(3, 6, 1, 1),
    )
    rule = MergeConvs()
    assert not rule(m).modified
    assert rule.sites == []


@pytest.mark.parametrize("dtype", ["float", "float16", "bfloat16"])
def test_types(dtype: str) -> None:
    first, second, weights = MERGED["spatial, then pointwise"]
    m = pair(first, second, weights, dtype=dtype, opset=22)
    exact = pair(first, second, weights)
    assert MergeConvs(ANY)(m).modified
    MergeConvs(ANY)(exact)
    arrays = [constant_array(next(n for n in g.graph if n.op_type == "Conv").inputs[1]) for g in (m, exact)]
    assert arrays[0].dtype == m.graph.inputs[0].dtype.numpy()
    scale = {"float": 1e-6, "float16": 5e-3, "bfloat16": 5e-2}[dtype]
    np.testing.assert_allclose(arrays[0].astype(np.float64), arrays[1], atol=scale * np.abs(arrays[1]).max())


@pytest.mark.parametrize(
    ("value", "words"), [(300.0, "would overflow float16"), (1e-4, "would lose precision in float16")]
)
def test_float16_ranges(value: float, words: str) -> None:
    m = pair("", "", {"v": (6, 4, 1, 1), "w": (3, 6, 1, 1)}, dtype="float16")
    for name in ("v", "w"):
        shape = tuple(m.graph.initializers[name].shape)
        m.graph.initializers[name].const_value = ir.tensor(np.full(shape, value, np.float16), name=name)
    assert words in reason(m)


def test_large_weights_are_lazy() -> None:
    m = pair("", "", {"v": (1024, 512, 1, 1), "w": (512, 1024, 1, 1)}, "N,512,H,W", dtype="float")
    MergeConvs()(m)
    (weight,) = m.graph.initializers.values()
    assert isinstance(weight.const_value, ir.LazyTensor)
    onnx.checker.check_model(ir.to_proto(m), full_check=True)


def test_in_a_branch_and_a_function() -> None:
    m = model(
        """(bool c, T[N,4,H,W] x) => (T[N,3,H,W] y) {
        y = If (c) <then_branch = t () => (T[N,3,H,W] p) { h = Conv(x, v)  p = Conv(h, w) },
                    else_branch = e () => (T[N,3,H,W] q) { q = local.f(x) }> }""",
        functions="""<domain: "local", opset_import: ["" : 21]> f (x) => (y) {
            v = Constant<value = double[2,4,1,1] {1.0,2.0,3.0,4.0,5.0,6.0,7.0,8.0}>()
            w = Constant<value = double[3,2,1,1] {1.0,2.0,3.0,4.0,5.0,6.0}>()
            h = Conv(x, v)  y = Conv(h, w) }""",
        v=(6, 4, 1, 1), w=(3, 6, 1, 1),
    )  # fmt: skip
    rule = MergeConvs(ANY)
    for flag in (True, False):
        feeds = {**random_feeds(m, 0, {"N": 1}), "c": np.array(flag)}
        assert_exact(m, rule, feeds=feeds)
    after = m.clone()
    rule(after)
    assert [s.outcome for s in rule.sites] == ["applied", "applied"]


def test_an_attribute_of_the_caller() -> None:
    m = model(
        "(T[N,4,H,W] x) => (T[N,3,P,Q] y) { y = local.f<s = [1,1]>(x) }",
        functions="""<domain: "local", opset_import: ["" : 21]> f <s> (x) => (y) {
            v = Constant<value = double[1,4,1,1] {1.0,2.0,3.0,4.0}>()
            w = Constant<value = double[3,1,1,1] {1.0,2.0,3.0}>()
            h = Conv<strides : ints = @s>(x, v)  y = Conv(h, w) }""",
    )  # fmt: skip
    rule = MergeConvs(ANY)
    assert not rule(m).modified
    assert ["takes an attribute from the function" in site.detail for site in rule.sites] == [True]


# ---- Pad


def padded(pad: str, conv: str = "", opset: int = 21, inits: str = "", x: str = "N,4,H,W") -> ir.Model:
    return model(
        f"(T[{x}] x) => (T[N,3,P,Q] y) <{inits}> {{ h = Pad{pad}  y = Conv{conv}(h, w) }}", opset=opset, w=(3, 4, 3, 3)
    )


PADS: dict[str, tuple[str, str, int, str, list[int]]] = {
    "plain": ("(x, p)", "", 21, "int64[8] p = {0,0,1,2,0,0,3,4}", [1, 2, 3, 4]),
    "with a zero": (
        "(x, p, z)",
        "<pads=[1,1,1,1]>",
        13,
        "int64[8] p = {0,0,1,2,0,0,3,4}, T[1] z = {0.0}",
        [2, 3, 4, 5],
    ),
    "axes": ("(x, p, , a)", "", 21, "int64[4] p = {1,2,3,4}, int64[2] a = {-1,2}", [2, 1, 4, 3]),
    "attribute": ("<pads = [0,0,1,2,0,0,3,4]>(x)", '<auto_pad = "VALID">', 10, "", [1, 2, 3, 4]),
    "same": ("(x, p)", '<auto_pad = "SAME_UPPER">', 21, "int64[8] p = {0,0,1,0,0,0,0,0}", [2, 1, 1, 1]),
    "strided": ("(x, p)", "<strides=[2,2]>", 21, "int64[8] p = {0,0,1,1,0,0,1,1}", [1, 1, 1, 1]),
}


@pytest.mark.parametrize("case", PADS)
def test_pad_folded(case: str) -> None:
    pad, conv, opset, inits, expected = PADS[case]
    after = merge(padded(pad, conv, opset, inits))
    (node,) = [n for n in after.graph if n.op_type == "Conv"]
    assert list(node.attributes["pads"].as_ints()) == expected


@pytest.mark.parametrize(
    ("pad", "inits", "words"),
    [
        ('<mode = "reflect">(x, p)', "int64[8] p = {0,0,1,1,0,0,1,1}", "pads by reflect"),
        ('<mode = "edge">(x, p)', "int64[8] p = {0,0,1,1,0,0,1,1}", "pads by edge"),
        ("(x, p, z)", "int64[8] p = {0,0,1,1,0,0,1,1}, T[1] z = {1.0}", "other than 0"),
        ("(x, p)", "int64[8] p = {0,0,-1,1,0,0,1,1}", "negative"),
        ("(x, p)", "int64[8] p = {0,1,0,0,0,0,0,0}", "the batch or the channels"),
        ("(x, p)", "int64[8] p = {0,0,0,0,0,1,0,0}", "the batch or the channels"),
    ],
)
def test_pad_left(pad: str, inits: str, words: str) -> None:
    x = "N,3,H,W" if "channels" in words else "N,4,H,W"
    assert words in reason(padded(pad, inits=inits, x=x))


def test_a_computed_pad_and_one_read_twice() -> None:
    m = model("(T[N,4,H,W] x, int64[8] p) => (T[N,3,P,Q] y) { h = Pad(x, p)  y = Conv(h, w) }", w=(3, 4, 3, 3))
    assert "its pads aren't constant" in reason(m)
    m = model(
        "(T[N,4,H,W] x) => (T[N,3,P,Q] y, T[N,4,P,Q] z) <int64[8] p = {0,0,1,1,0,0,1,1}> { h = Pad(x, p)  y = Conv(h, w)  z = Relu(h) }",
        w=(3, 4, 3, 3),
    )
    after = assert_exact(m, MergeConvs(), dims={"N": 1, "H": 4, "W": 4})
    assert op_types(after) == ["Pad", "Conv", "Relu"]


def test_a_pad_opens_the_way_for_a_merge() -> None:
    m = model(
        """(T[N,4,H,W] x) => (T[N,3,P,Q] y) <int64[8] p = {0,0,1,1,0,0,1,1}> {
        h = Pad(x, p)  i = Conv(h, v, c)  y = Conv(i, w) }""",
        v=(8, 4, 3, 3), c=(8,), w=(3, 8, 1, 1),
    )  # fmt: skip
    merge(m, 1.0)


# ---- every geometry

AXIS = st.tuples(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.integers(0, 3), st.integers(0, 3),  # the first
    st.integers(1, 3), st.integers(1, 2), st.integers(1, 2), st.integers(0, 2), st.integers(0, 2),  # the second
    st.integers(3, 9),
)  # fmt: skip


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    axes=st.lists(AXIS, min_size=1, max_size=2),
    groups=st.tuples(st.sampled_from([1, 2, 3, 6]), st.sampled_from([1, 2, 3, 6])),
    biases=st.tuples(st.booleans(), st.booleans()),
    known=st.booleans(),
)
def test_any_geometry(
    axes: list[tuple[int, ...]], groups: tuple[int, int], biases: tuple[bool, bool], known: bool
) -> None:
    """Whatever is merged is equal, at every border; what can't be is left."""
    for k, s, d, b, e, j, _, f, c, g, n in axes:
        inner = (n + b + e - d * (k - 1) - 1) // s + 1
        assume(n + b + e >= d * (k - 1) + 1 and inner + c + g >= f * (j - 1) + 1)
    k, s, d, b, e, j, t, f, c, g, n = zip(*axes, strict=True)

    def attributes(strides: tuple[int, ...], dilations: tuple[int, ...], pads: tuple[int, ...], group: int) -> str:
        return f"strides = {list(strides)}, dilations = {list(dilations)}, pads = {list(pads)}, group = {group}"

    weights = {"v": (6, 6 // groups[0], *k), "w": (6, 6 // groups[1], *j)}
    weights |= {name: (6,) for name, present in zip("cb", biases, strict=True) if present}
    x = ",".join(map(str, (2, 6, *(n if known else "HW"[: len(n)]))))
    before = pair(attributes(s, d, (*b, *e), groups[0]), attributes(t, f, (*c, *g), groups[1]), weights, x)
    rule = MergeConvs(ANY)
    after = assert_exact(before, rule, seeds=1, dims=dict(zip("HW", n, strict=False)))
    assert op_types(after) in (["Conv"], ["Conv", "Conv"])
    if not any((*c, *g)):
        assert op_types(after) == ["Conv"]


def test_merged_runs_in_the_runtime() -> None:
    """The same in ONNX Runtime, whose kernels differ by shape, for 1, 2 and 3 axes."""
    ort = pytest.importorskip("onnxruntime")
    cases = [("pads = [3,2]", "strides = [2]", (5,)), ("pads = [1,0,1,2]", "", (3, 3)), ("", "", (2, 1, 3))]
    for first, second, kernel in cases:
        weights = {"v": (16, 8, *kernel), "c": (16,), "w": (8, 16, *[1] * len(kernel)), "b": (8,)}
        x = ",".join(map(str, (1, 8, *[9] * len(kernel))))
        before = pair(first, second, weights, x, dtype="float")
        after = before.clone()
        assert MergeConvs(ANY)(after).modified
        feed = random_feeds(before)
        outputs = [
            ort.InferenceSession(ir.to_proto(m).SerializeToString(), providers=["CPUExecutionProvider"]).run(
                None, feed
            )[0]
            for m in (before, after)
        ]
        np.testing.assert_allclose(outputs[1], outputs[0], rtol=2e-5, atol=1e-4)
