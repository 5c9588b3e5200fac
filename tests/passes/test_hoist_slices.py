from __future__ import annotations

import numpy as np
import pytest
from exactness import assert_exact, op_types, parse
from hypothesis import given, settings
from hypothesis import strategies as st

import graphopt
from graphopt.graph.constants import constant_array
from graphopt.graph.edits import nodes
from graphopt.models.catalogue import fetch
from graphopt.passes.clean.hoist_slices import HoistSlices

HEAD = '<ir_version: 10, opset_import: ["": 21]>'
END = 9223372036854775807
CUT = f"int64[1] s = {{1}}, int64[1] e = {{{END}}}, int64[1] a2 = {{2}}, int64[1] zero = {{0}}, int64[1] two = {{2}}, int64[1] one = {{1}}"


def check(inputs: str, outputs: str, body: str, constants: str = "") -> tuple[list[str], list[str]]:
    before = parse(f"{HEAD} g ({inputs}) => ({outputs}) <{CUT}{constants}> {{ {body} }}")
    after = assert_exact(before, HoistSlices())
    rule = HoistSlices()
    rule(before)
    return op_types(after), [s.detail for s in rule.sites if s.outcome == "left"]


def test_two_axes_in_one() -> None:
    ops, _ = check("float[2, 4, 6] x", "float[2, 2, 5] y", "b = Slice(x, zero, two, one) y = Slice(b, s, e, a2)")
    assert ops == ["Slice"]


def test_negative_axes_bounds_and_steps() -> None:
    ops, _ = check(
        "float[2, 4, 6] x",
        "float[i, j, k] y",
        "b = Slice(x, m, e, n) y = Slice(b, m, n9, l, m)",
        f", int64[1] m = {{-1}}, int64[1] n = {{-2}}, int64[1] l = {{2}}, int64[1] n9 = {{{-END}}}",
    )
    assert ops == ["Slice"]


@pytest.mark.parametrize(
    "body",
    [
        "b = Slice(x, s, e, a2) y = Slice(b, s, e, a2)",  # one axis twice
        "b = Slice(x, s, e, a2) z = Neg(b) y = Slice(z, s, e, one)",
        "b = Slice(x, t, e, a2) y = Slice(b, s, e, one)",  # computed bounds
    ],
)
def test_no_site(body: str) -> None:
    ops, left = check("float[2, 4, 6] x, int64[1] t", "float[i, j, k] y", body)
    assert ops.count("Slice") == 2
    assert not left


def test_the_inner_slice_stays_for_others() -> None:
    ops, _ = check(
        "float[2, 4, 6] x",
        "float[2, 2, 5] y, float[2, 2, 6] b",
        "b = Slice(x, zero, two, one) y = Slice(b, s, e, a2)",
    )
    assert ops == ["Slice", "Slice"]


CONV = "c = Conv <strides = [2]{}> (x, w)"
WEIGHT = ", float[4, 3, 2] w = {" + ", ".join(str(i % 5 - 2) for i in range(24)) + "}"


def test_a_convolution_of_what_is_kept() -> None:
    ops, _ = check("float[2, 3, 8] x", "float[2, 4, 3] y", f"{CONV.format('')} y = Slice(c, s, e, a2)", WEIGHT)
    assert ops == ["Slice", "Conv"]


def test_readers_that_cut_the_same_and_more() -> None:
    ops, _ = check(
        "float[2, 3, 8] x",
        "float[2, 2, 3] y, float[2, 1, 3] z",
        f"{CONV.format('')} p = Slice(c, zero, two, one) y = Slice(p, s, e, a2) q = Slice(c, s, two, one) "
        "z = Slice(q, s, e, a2)",
        WEIGHT,
    )
    assert ops.count("Slice") == 3
    assert ops[:2] == ["Slice", "Conv"]


@pytest.mark.parametrize(
    ("inputs", "conv", "readers", "left"),
    [
        ("float[2, 3, 8] x", CONV.format(", pads = [1, 0]"), "y = Slice(c, s, e, a2)", 0),
        ("float[2, 3, 8] x", CONV.format(', auto_pad = "SAME_UPPER"'), "y = Slice(c, s, e, a2)", 0),
        ("float[2, 3, n] x", CONV.format(""), "y = Slice(c, s, e, a2)", 0),  # may be empty
        ("float[2, 3, 8] x", CONV.format(""), "y = Slice(c, s, two, a2)", 0),
        ("float[2, 3, 8] x", CONV.format(""), "y1 = Slice(c, s, e, a2) m = Relu(c) y = Concat <axis = 2> (y1, m)", 0),
        ("float[2, 3, 8] x", CONV.format(""), "y1 = Slice(c, s, e, a2) m = Slice(c, two, e, a2) "
         "y = Concat <axis = 2> (y1, m)", 1),
    ],
)  # fmt: skip
def test_convolutions_left_alone(inputs: str, conv: str, readers: str, left: int) -> None:
    ops, reasons = check(inputs, "float[i, j, k] y", f"{conv} {readers}", WEIGHT)
    assert ops[0] == "Conv"
    assert len(reasons) == left


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge", "wrap"])
def test_a_smaller_pad(mode: str) -> None:
    ops, _ = check(
        "float[2, 5] x",
        "float[2, 6] y",
        f'p = Pad <mode = "{mode}"> (x, pads) y = Slice(p, two, e, one)',
        ", int64[4] pads = {0, 2, 0, 1}",
    )
    assert ops == ["Pad"]


def test_a_pad_with_axes_and_a_slice_that_goes_on() -> None:
    ops, _ = check(
        "float[2, 5] x",
        "float[1, 7] y",
        "p = Pad(x, pads, , m) y = Slice(p, cut, ends)",
        f", int64[2] pads = {{2, 1}}, int64[1] m = {{-1}}, int64[2] cut = {{1, 1}}, int64[2] ends = {{{END}, {END}}}",
    )
    assert ops == ["Pad", "Slice"]


def test_more_than_the_padding_is_cut_off() -> None:
    ops, _ = check("float[2, 5] x", "float[2, 4] y", "p = Pad(x, pads) y = Slice(p, two, e, one)",
                   ", int64[4] pads = {0, 1, 0, 0}")  # fmt: skip
    assert ops == ["Pad", "Slice"]


def test_before_an_unsqueeze() -> None:
    ops, _ = check("float[2, 5] x", "float[2, 1, 4] y", "u = Unsqueeze(x, one) y = Slice(u, s, e, a2)")
    assert ops == ["Slice", "Unsqueeze"]
    ops, _ = check("float[2, 5] x", "float[2, i, 5] y", "u = Unsqueeze(x, one) y = Slice(u, s, e, one)")
    assert ops == ["Unsqueeze", "Slice"]


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.integers(1, 3), st.integers(0, 2))
@settings(max_examples=30, deadline=None)
def test_any_stride_dilation_and_cut(kernel: int, stride: int, dilation: int, cut: int, end_pad: int) -> None:
    length = 24
    weight = ", ".join(str(i % 3 - 1) for i in range(6 * kernel))
    before = parse(f"""{HEAD} g (float[1, 2, {length}] x) => (float[1, 3, k] y)
        <float[3, 2, {kernel}] w = {{{weight}}}, int64[1] s = {{{cut}}}, int64[1] e = {{{END}}}, int64[1] a = {{-1}}> {{
        c = Conv <strides = [{stride}], dilations = [{dilation}], pads = [0, {end_pad}]> (x, w) y = Slice(c, s, e, a)
    }}""")
    after = assert_exact(before, HoistSlices())
    assert op_types(after) == ["Slice", "Conv"]
    start = constant_array(next(iter(after.graph)).inputs[1])
    assert np.array_equal(start, [cut * stride])


@pytest.mark.real
def test_silero() -> None:
    result = graphopt.optimize(fetch("silero-vad-sequence"), {"passes": ["fold-constants", "hoist-slices"]})
    assert result.report.ok
    assert [n.op_type for n in nodes(result.model)].count("Slice") == 2
